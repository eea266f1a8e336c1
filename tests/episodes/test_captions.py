"""Sentences from one file for sets of any format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from svam.contract import EpisodeSource
from svam.episodes.options import open_named_source
from tests.episodes.test_options import raw_params
from tests.sources.common import LFS_POINTER, film, refused
from tests.sources.test_source_raw import ONE_TASK, arrays_of, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three recordings without a sentence, of 5, 6 and 7 rows."""
    return write(tmp_path / "raw", ONE_TASK, **{f"e{number}": arrays_of(number, 5 + number) for number in range(3)})


def opened(folder: Path, captions: str | list[Any], name: str = "said.jsonl", **choice: Any) -> EpisodeSource:
    """With such a file: its text, or the objects of its lines."""
    text = captions if isinstance(captions, str) else "\n".join(map(json.dumps, captions))
    (folder / name).write_text(text, encoding="utf-8")
    return open_named_source(folder, raw_params(captions=name, **choice))


def told(source: EpisodeSource) -> list[tuple[str, int]]:
    """Sentence and rows of each episode; the sentence that is read is the one that was announced."""
    episodes = [source.read(index) for index in range(len(source))]
    for index, episode in enumerate(episodes):
        shape = source.shape(index)
        assert (episode.task, episode.instruction, episode.steps) == (shape.task, shape.task, shape.steps)
        assert episode.instruction in source.describe().instructions[episode.task]["train"]
    return [(episode.instruction, episode.steps) for episode in episodes]


def test_several_sentences_an_episode(folder: Path) -> None:
    """By number, by name and by file; the first is the task, and a task has the sentences of all its episodes."""
    lines = [
        {"episode": 0, "text": "pick it"}, {"episode": "e1", "caption": "pick it"}, {"file_name": "e2.npz", "text": "drop it"},
        {"episode": 0, "text": "take it"}, {"episode": "e1", "text": "grasp it"}, {"episode": 0, "text": "take it"},
    ]  # fmt: skip
    source = opened(folder, lines)
    assert told(source) == [("pick it", 5), ("pick it", 6), ("drop it", 7)]
    assert source.describe().instructions == {
        "pick it": {"train": ["pick it", "take it", "grasp it"], "held_out": []},
        "drop it": {"train": ["drop it"], "held_out": []},
    }
    assert source.describe().provenance["captions"] == "said.jsonl"
    assert told(opened(folder, lines, tasks=["drop it"])) == [("drop it", 7)]


def test_parts_of_episodes(folder: Path) -> None:
    lines = ["episode,start,end,text,by", "0,,,all of it,me", 'e1,0,2,"go, left",me', "e1,2,6,go right,me"]
    lines += ["2,1,4,go right,me", "2,3,7,lift,me", ""]
    source = opened(folder, "\n".join(lines), "said.csv")
    assert told(source) == [("all of it", 5), ("go, left", 2), ("go right", 4), ("go right", 3), ("lift", 4)]
    whole = open_named_source(folder, raw_params()).read(2).actions
    parts = [source.read(index).actions for index in (3, 4)]
    assert whole is not None and all(part is not None for part in parts)
    assert (parts[0] == whole[1:4]).all() and (parts[1] == whole[3:7]).all()
    groups = [source.shape(index).group for index in range(5)]
    assert groups[1] == groups[2] != groups[3] == groups[4] != groups[0]


def test_commas_in_a_csv(folder: Path) -> None:
    """What follows a comma that is not quoted is not lost without a word."""
    with refused("said.csv: line 2 has more values than the first has names; quote a text that has commas"):
        opened(folder, "episode,text\n0,pick it, then place it\n1,drop it\n2,lift it\n", "said.csv")
    with refused("said.csv: the column 'text' is there twice; rename the one that is not meant"):
        opened(folder, "episode,text,text\n0,pick it,now\n", "said.csv")
    with refused("said.csv: cannot be read as .csv"):
        opened(folder, 'episode,text\n0,pick it\n1,drop it\n2,"lift it\n', "said.csv")
    with refused("said.tsv: cannot be read as .jsonl"):
        opened(folder, "episode\ttext\n0\tpick it\n", "said.tsv")
    source = opened(folder, 'episode,text,by\n0,"pick it, then place it",me\n1,drop it,,\n2,lift "it"\n', "said.csv")
    assert told(source) == [("pick it, then place it", 5), ("drop it", 6), ('lift "it"', 7)]
    assert source.notes == [f"{folder / 'said.csv'}: not read: by"]


def test_captions_beside_videos(tmp_path: Path) -> None:
    """As data sets of videos on hubs have them."""
    for name in ("a", "b/c"):
        film(tmp_path / f"clips/{name}.mp4", 4)
    text = "file_name,text\nclips/a.mp4,first\nclips/b/c.mp4,second\n"
    assert told(opened(tmp_path, text, "metadata.csv", source="video_folder")) == [("first", 4), ("second", 4)]


@pytest.mark.parametrize("captions, message", [
    ([{"episode": 0, "text": "a"}], r"2 of 3 .*: episode 1: .*said.jsonl: no line for episode 1 \(e1\); its first is for '0'"),
    ([{"episode": n, "text": "a", "start": 0, "end": 6} for n in range(3)], "rows 0 to 6 of episode 0, which has 5"),
    ([{"episode": 0, "text": "a", "start": 2}], "line 1: start is 2 and end None, expected rows with start below end"),
    ([{"episode": 0, "text": "a", "start": 2, "end": 2.5}], "start is 2 and end 2.5"),
    ([{"episode": 0, "words": "a"}], "line 1 has episode, words, expected episode or file_name, and text"),
    ([{"text": "a"}], "line 1 has text, expected episode"),
    ([["a"]], "^[^:]*said.jsonl: line 1 is .*, expected an object"),
    (LFS_POINTER, "said.jsonl: a Git LFS pointer"),
    ("{", "said.jsonl: cannot be read as .jsonl"),
    ("", "said.jsonl: no line in it"),
], ids=str)  # fmt: skip
def test_what_is_wrong_with_a_file(folder: Path, captions: Any, message: str) -> None:
    with refused(message):
        opened(folder, captions)


def test_a_line_is_not_of_two_episodes(tmp_path: Path) -> None:
    """Recordings that are called 1, 2 and 3, in a file that counts from 0."""
    folder = write(tmp_path / "raw", ONE_TASK, **{str(number): arrays_of(number, 5) for number in (1, 2, 3)})
    with refused(r"said.jsonl: no line for episode 2 \(3\)"):
        opened(folder, [{"episode": number, "text": f"push {number}"} for number in range(3)])
    lines = [{"episode": number, "text": f"push {number}"} for number in (1, 2, 3)]
    assert told(opened(folder, lines)) == [("push 1", 5), ("push 2", 5), ("push 3", 5)]
    with refused("convert.drop names '0', which is not there: .*, or 1, 2, 3"):
        opened(folder, lines, drop=["0"])


def test_files_that_are_elsewhere(folder: Path) -> None:
    with refused("a.csv: no such file, which convert.captions names"):
        open_named_source(folder, raw_params(captions="a.csv"))
    with refused(r"convert.captions is ../a.csv, expected a file below .*, where DVC notices a change"):
        open_named_source(folder, raw_params(captions="../a.csv"))
    lines = [{"episode": number, "text": "a"} for number in (0, 1, 2, 9)]
    assert any("1 episodes that it names are not there, such as '9'" in note for note in opened(folder, lines).notes)
