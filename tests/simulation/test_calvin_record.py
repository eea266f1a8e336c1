"""Recorded CALVIN demonstrations: what the simulator did, in the official layout, as our reader and the store then have it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from svam.episodes.convert import convert
from svam.episodes.joined import open_store
from svam.errors import ParamsError
from svam.files import sha256_tree
from svam.simulation.calvin import Checkout
from svam.simulation.calvin_record import Plan, _read_sentences, record
from svam.sources._calvin_files import read_annotations
from svam.sources.calvin import CalvinSource, Options
from tests.calvin import checkout, needs_calvin
from tests.recorded import SETTINGS

TASKS = ("turn_off_led", "turn_on_led")
SENTENCES = {"turn_on_led": ["light it", "press the button"], "turn_off_led": ["darken it"]}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan(checkout(), TASKS, SENTENCES, subtasks=2, seed=3, noisy_share=0.5, noise_scale=0.5, renderer="cpu")


def annotated(root: Path, split: str) -> Path:
    return root / split / "lang_annotations" / "auto_lang_ann.npy"


@pytest.fixture(scope="module")
def recorded(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calvin") / "set"
    record(out, plan, {"training": 2, "validation": 1}, workers=2)
    return out


@needs_calvin
def test_a_recorded_set_converts_exactly(recorded: Path, tmp_path: Path) -> None:
    source = CalvinSource(recorded, Options())
    assert [note for note in source.notes if "rel_actions" in note] == []
    convert(source, tmp_path / "store", SETTINGS, seed=0)
    store = open_store(tmp_path / "store")
    annotations = [
        (split, *row) for split in ("training", "validation") for row in read_annotations(annotated(recorded, split))
    ]
    assert len(store.episode_ends) == len(annotations) == 6 and store.cameras == ["static", "gripper"]
    assert store.episodes("held_out").tolist() == [4, 5] and set(store.tasks) == set(TASKS)
    for number, (split, first, last, task, _) in enumerate(annotations):
        start, end = store.bounds(number)
        rows = np.arange(start, end)
        assert len(rows) == last - first + 1 and store.task_of(number) == task
        steps = [np.load(recorded / split / f"episode_{step:07d}.npz") for step in range(first, last + 1)]
        for camera, name in (("static", "rgb_static"), ("gripper", "rgb_gripper")):
            np.testing.assert_array_equal(store.frames(rows, camera), np.stack([step[name] for step in steps]))
        for array, name in (("actions", "rel_actions"), ("proprioception", "robot_obs"), ("state", "scene_obs")):
            np.testing.assert_array_equal(
                store.vector(array, rows), np.stack([step[name] for step in steps]).astype(np.float32)
            )


@needs_calvin
def test_workers_change_no_byte(plan: Plan, recorded: Path, tmp_path: Path) -> None:
    record(tmp_path / "again", plan, {"training": 2, "validation": 1}, workers=1)
    assert sha256_tree(tmp_path / "again") == sha256_tree(recorded)


@needs_calvin
def test_every_segment_solves_its_task(recorded: Path) -> None:
    """The light is off before "turn_on_led" and on after it, and the other way round; sentences are the task's."""
    source = CalvinSource(recorded, Options())
    for number in range(len(source)):
        episode = source.read(number)
        assert episode.state is not None and episode.instruction in SENTENCES[episode.task]
        led = episode.state[:, 5].tolist()
        assert (led[0], led[-1]) == ((0, 1) if episode.task == "turn_on_led" else (1, 0))


def test_sentences_of_a_task_that_the_file_lacks(tmp_path: Path) -> None:
    file = tmp_path / "sentences.yaml"
    file.write_text("turn_on_led: [light it]\n", encoding="utf-8")
    made = Checkout(tmp_path, "", {"turn_on_led": "press it"})
    assert _read_sentences(file, made, ["turn_on_led"]) == {"turn_on_led": ["light it"]}
    assert _read_sentences(None, made, ["turn_on_led"]) == {"turn_on_led": ["press it"]}
    with pytest.raises(ParamsError, match="turn_off_led is None, expected a list of sentences"):
        _read_sentences(file, made, ["turn_off_led"])
