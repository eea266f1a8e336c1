"""The store returns exactly what went in, whatever the order of the rows, and refuses what is not whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svam.episodes.arrays import write_array
from svam.episodes.joined import open_store
from svam.episodes.rows import RowReader
from svam.files import write_json
from tests.episodes.stores import SOURCE, edit, replace, shards
from tests.recorded import CAMERAS
from tests.sources.common import refused


def test_everything_comes_back_exactly(kept: Path) -> None:
    store = open_store(kept)
    assert (store.rate_hz, store.cameras, store.tasks) == (20.0, CAMERAS, ["push", "pull"])
    assert (store.image_size, store.action_dimensions, store.proprioception_dimensions) == ((8, 8), 3, 2)
    assert len(store) == sum(len(e.actions) for e in SOURCE.episodes)
    assert not store.has("state")
    for number, episode in enumerate(SOURCE.episodes):
        start, end = store.bounds(number)
        rows = np.arange(start, end)
        assert end - start == len(episode.actions)
        assert store.task_of(number) == episode.task and store.instruction_of(number) == episode.instruction
        assert store.episode_provenance[number] == episode.provenance
        assert (store.episode_of(rows) == number).all()
        np.testing.assert_array_equal(store.frames(rows), episode.frames["front"])
        np.testing.assert_array_equal(store.frames(rows, "wrist"), episode.frames["wrist"])
        for name in ("actions", "expert_actions", "proprioception"):
            np.testing.assert_array_equal(store.vector(name, rows), getattr(episode, name))
        np.testing.assert_array_equal(store.timestamps(rows), episode.timestamps)
        for name, annotation in episode.annotations.items():
            annotated = store.annotation(name)
            mine = np.flatnonzero((annotated.rows >= start) & (annotated.rows < end))
            np.testing.assert_array_equal(annotated.rows[mine], annotation.index + start)
            np.testing.assert_array_equal(annotated.values(mine), annotation.values)
            assert annotated.values(mine).dtype == annotation.values.dtype


def test_training_and_held_out_rows_are_disjoint_and_complete(kept: Path) -> None:
    store = open_store(kept)
    train, held_out = store.rows("train"), store.rows("held_out")
    assert sorted([*train, *held_out]) == list(range(len(store)))
    assert sorted([*store.episodes("train"), *store.episodes("held_out")]) == list(range(9))
    both, mine = store.annotation("depth"), store.annotation("depth", "train")
    assert set(mine.rows) == set(both.rows) & set(train) and len(mine.rows) < len(both.rows)
    np.testing.assert_array_equal(mine.values(np.array([5, 1])), both.values(np.searchsorted(both.rows, mine.rows[[5, 1]])))
    assert store.annotation("normals") is None


def test_paraphrases_are_drawn_from_the_training_ones_by_seed(kept: Path) -> None:
    store = open_store(kept)
    drawn = [store.instruction_of(5, seed) for seed in range(30)]
    assert set(drawn) == {"pull a", "pull b"}
    assert drawn == [store.instruction_of(5, seed) for seed in range(30)]


def test_wrong_questions(kept: Path) -> None:
    store = open_store(kept)
    with refused(r"no camera 'top'; there are front, wrist"):
        store.frames(np.array([0]), "top")
    with refused("no vector 'state'; there are actions, expert_actions, proprioception"):
        store.vector("state", np.array([0]))
    with refused(rf"rows -1\.\.0 asked for, there are 0\.\.{len(store) - 1}"):
        store.frames(np.array([0, -1]))
    with refused(r"expected \(k,\)"):
        store.frames(np.array([[0]]))


def test_missing_or_foreign_folders(path: Path, tmp_path: Path) -> None:
    with refused("no such directory"):
        open_store(tmp_path / "nothing.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with refused("not a Zarr v3 group"):
        open_store(tmp_path / "empty.zarr")
    (path / "zarr.json").write_text("{")
    with refused("not valid JSON"):
        open_store(path)


SCHEMA_2: dict[str, Any] = {
    "attributes": {
        "attributes_sha256": "c35dae644473e7d3c0840b1e00eb06bd90dbbef309bb54516cee3be07cc9ad36",
        "episode_instructions": ["push please, number 0"] * 2, "episode_provenance": [{"file": "push/0"}] * 2,
        "schema_version": 2, "statistics": None, "tasks": ["push"],
        "source": {
            "cameras": ["front", "wrist"], "instructions": {"push": {"held_out": ["push c"], "train": ["push a", "push b"]}},
            "provenance": {"source": "test"}, "rate_hz": 20.0,
        },
    },
    "node_type": "group", "zarr_format": 3,
}  # fmt: skip
"""What the last code of that version wrote of two episodes of pictures alone."""


def test_a_store_of_the_version_before_says_how_to_convert_it_again(tmp_path: Path) -> None:
    write_json(tmp_path / "zarr.json", SCHEMA_2)
    with refused(
        "schema_version is 2, this code reads 3; convert again: dvc repro --force --single-item convert$", str(tmp_path)
    ):
        open_store(tmp_path)


@pytest.mark.parametrize("changed, said", [
    ({"schema_version": 99}, "schema_version is 99, this code reads 3; convert again: dvc repro --force"),
    ({"tasks": "push"}, "zarr.json: tasks is 'push'; expected a list"),
])  # fmt: skip
def test_a_wrong_attribute_is_named(path: Path, changed: dict[str, Any], said: str) -> None:
    edit(path, lambda attributes: attributes.update(changed))
    with refused(said):
        open_store(path)


def test_numbers_that_contradict_one_another(path: Path) -> None:
    ends, split = open_store(path).episode_ends, np.zeros(9, dtype=np.uint8)
    twice = np.where(np.arange(9) == 3, ends[2], ends)
    for name, values, message in (
        ("episode_ends", twice, f"episode_ends must increase from above 0, but episode 3 ends at row {ends[2]}"),
        ("episode_ends", ends[:-1], "episode_split has 9 entries, episode_ends has 8"),
        ("episode_ends", ends + 1, rf"actions has {ends[-1]} rows, by episode_ends there are {ends[-1] + 1}"),
        ("episode_split", split + np.uint8(1), "has no training episode"),
        ("episode_split", split + np.uint8(2), r"episode_split holds 2\.\.2, expected 0\.\.1"),
    ):
        replace(path, "episode_ends", lambda _: ends)
        replace(path, name, lambda _, values=values: values)  # type: ignore[misc]
        with refused(message):
            open_store(path)


@pytest.mark.parametrize("array", ["frames/front", "actions", "annotations/depth/values", "episode_ends"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_shard_is_found_on_opening(path: Path, array: str, share: float) -> None:
    file = shards(path, array)[-1]
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with refused("truncated or damaged: .* bytes, expected", str(file)):
        open_store(path)


def test_a_missing_shard_is_not_zeros(path: Path) -> None:
    file = shards(path, "frames/front")[1]
    file.unlink()
    with refused("no such file, though the array has", str(file)):
        open_store(path)


def test_zeros_are_kept(tmp_path: Path) -> None:
    values = np.arange(37 * 6, dtype=np.float32).reshape(37, 2, 3) * (np.arange(37) > 20)[:, None, None]
    write_array(tmp_path / "x", values, 2, 8)
    reader = RowReader(tmp_path / "x")
    reader.check()
    np.testing.assert_array_equal(reader.read_range(0, 37), values)
    np.testing.assert_array_equal(reader.read(np.array([30, 2])), values[[30, 2]])
    assert reader.row_bytes == 24 and len(shards(tmp_path, "x")) == 5
