"""Instructions: every task has several, and the held-out one has no unknown word."""

from __future__ import annotations

import pytest

from svam.episodes.instructions import described_tasks, instructions_of


def words(sentence: str) -> set[str]:
    return set(sentence.replace(",", " ").split())


def test_fifty_tasks_have_paraphrases() -> None:
    assert len(described_tasks()) == 50
    for task in described_tasks():
        sentences = instructions_of(task)
        assert len(sentences["train"]) >= 4 and len(sentences["held_out"]) == 1, task
        assert all(s == s.lower().strip() and s.isascii() for s in sentences["train"] + sentences["held_out"]), task


def test_held_out_sentence_is_new_and_made_of_known_words() -> None:
    for task in described_tasks():
        train, held_out = instructions_of(task)["train"], instructions_of(task)["held_out"][0]
        assert held_out not in train
        known = set().union(*map(words, train))
        assert words(held_out) <= known, (task, words(held_out) - known)


def test_no_sentence_means_two_tasks() -> None:
    owner: dict[str, str] = {}
    for task in described_tasks():
        sentences = instructions_of(task)
        for sentence in sentences["train"] + sentences["held_out"]:
            assert owner.setdefault(sentence, task) == task, f"{sentence!r} describes {owner[sentence]} and {task}"


def test_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match="fly-away"):
        instructions_of("fly-away")
