"""Conversion: split, statistics of training episodes only, equal bytes, and one clear sentence when something is wrong."""

from __future__ import annotations

import dataclasses
import gc
import json
import resource
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import Result

from stages.convert import app
from svam.console import console
from svam.contract import Annotation, Episode, EpisodeShape, SourceDescription
from svam.episodes.convert import ONE_EPISODE, OWN_SPLIT, convert
from svam.episodes.inspection import facts
from svam.episodes.joined import open_store
from svam.episodes.split import split_episodes
from svam.files import FileError, read_json, sha256, sha256_tree, write_json
from svam.sources.metaworld import Options, open_source
from tests.recorded import SETTINGS, Recorded, make_episode, two_tasks, write_raw
from tests.sources.common import refused
from tests.toy import invoke, write_toy_params

SOURCE = two_tasks()


def drawn(tasks: list[str], held_out: float, seed: int) -> np.ndarray[Any, Any]:
    return split_episodes(tasks, [EpisodeShape(9)] * len(tasks), held_out, seed)


def test_the_split_holds_out_a_share_of_each_task() -> None:
    tasks = ["a"] * 20 + ["b"] * 2 + ["c"] * 7
    split = drawn(tasks, 0.15, seed=0)
    assert [int(split[:20].sum()), int(split[20:22].sum()), int(split[22:].sum())] == [3, 1, 1]
    assert (split == drawn(tasks, 0.15, seed=0)).all()
    assert (split != drawn(tasks, 0.15, seed=1)).any()
    # A task's split does not depend on which other tasks there are, or on their order.
    assert (drawn(tasks[22:] + tasks[:20], 0.15, seed=0) == np.concatenate([split[22:], split[:20]])).all()
    assert drawn(["a"] * 3, 0.99, seed=0).sum() == 2


def test_a_tasks_only_episode_is_trained_on() -> None:
    assert drawn(["a", "a", "b"], 0.1, seed=0)[2] == 0
    assert drawn(["a", "b", "c", "d"], 0.25, seed=0).sum() == 1  # no task has two: all are one pool
    assert drawn(["a"], 0.1, seed=0).tolist() == [0]


def test_a_sources_own_split_is_kept() -> None:
    shapes = [EpisodeShape(9, held_out=side) for side in (False, True, False)]
    assert split_episodes(["a", "a", "a"], shapes, 0.9, seed=0).tolist() == [0, 1, 0]
    with refused("own split holds out all 3 chosen episodes.*choose training episodes too, by convert.episodes"):
        split_episodes(["a"] * 3, [EpisodeShape(9, held_out=True)] * 3, 0.9, seed=0)


def test_a_split_is_drawn_where_a_sources_own_holds_out_none(tmp_path: Path) -> None:
    class OneSide(Recorded):
        def shape(self, index: int) -> EpisodeShape:
            return dataclasses.replace(super().shape(index), held_out=False)

    convert(OneSide(SOURCE.episodes), tmp_path / "s.zarr", SETTINGS, seed=0)
    store = open_store(tmp_path / "s.zarr")
    assert (
        store.episodes("held_out").tolist()
        == np.flatnonzero(drawn([episode.task for episode in SOURCE.episodes], SETTINGS.held_out, seed=0)).tolist()
    )
    assert OWN_SPLIT in facts(tmp_path / "s.zarr")["notes"]


def test_episodes_that_share_frames_are_on_one_side() -> None:
    groups = [g for g in "abcdefghij" for _ in range(3)]
    shapes = [EpisodeShape(9, group=g) for g in groups]
    split = split_episodes(["push", "pull", "open"] * 10, shapes, 0.2, seed=0)
    assert split.sum() == 6 and {g for g, s in zip(groups, split, strict=True) if s}.isdisjoint(
        g for g, s in zip(groups, split, strict=True) if not s
    )
    assert split_episodes(["a"] * 3, [EpisodeShape(9, group=g) for g in "aab"], 0.1, seed=0).tolist() == [0, 0, 1]
    assert not split_episodes(["a"] * 3, [EpisodeShape(9, group="a")] * 3, 0.1, seed=0).any()  # as one episode alone


def test_statistics_are_those_of_the_training_episodes(kept: Path) -> None:
    store = open_store(kept)
    training = np.concatenate([SOURCE.episodes[e].actions for e in store.episodes("train")]).astype(np.float64)
    statistics = store.statistics
    assert statistics.actions.count == len(training)
    np.testing.assert_allclose(statistics.actions.mean, training.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(statistics.actions.std, training.std(axis=0), rtol=1e-9)
    np.testing.assert_allclose(statistics.actions.q99, np.quantile(training, 0.99, axis=0), rtol=1e-12)
    assert statistics.proprioception is not None and len(statistics.proprioception.mean) == 2
    assert statistics.convention.normalisation == "minmax"


def test_a_changed_held_out_episode_changes_no_statistic(kept: Path, tmp_path: Path) -> None:
    store = open_store(kept)
    held_out, trained = int(store.episodes("held_out")[0]), int(store.episodes("train")[0])
    for number, equal in ((held_out, True), (trained, False)):
        episode = make_episode(SOURCE.episodes[number].task, 40, seed=99)  # another length too, so that all rows shift
        convert(SOURCE.changed(number, **vars(episode)), tmp_path / "t.zarr", SETTINGS, seed=0)
        changed = open_store(tmp_path / "t.zarr")
        assert (changed.statistics.model_dump_json() == store.statistics.model_dump_json()) is equal


def test_equal_input_gives_equal_bytes_and_few_files(tmp_path: Path) -> None:
    for name in ("a.zarr", "b.zarr"):
        convert(two_tasks(), tmp_path / name, SETTINGS, seed=0)
    assert sha256_tree(tmp_path / "a.zarr") == sha256_tree(tmp_path / "b.zarr")
    rows = len(open_store(tmp_path / "a.zarr"))
    shards = [file for file in (tmp_path / "a.zarr" / "frames" / "front" / "c").rglob("*") if file.is_file()]
    assert len(shards) == -(-rows // 16)
    convert(two_tasks(), tmp_path / "c.zarr", SETTINGS, seed=1)
    assert sha256_tree(tmp_path / "a.zarr") != sha256_tree(tmp_path / "c.zarr")


def test_one_episode_alone_is_trained_on(tmp_path: Path) -> None:
    """What the source notes, and what the conversion notes itself, stands in the store and in `inspect`."""
    source = Noted([SOURCE.episodes[0]])
    convert(source, tmp_path / "s.zarr", SETTINGS, seed=0)
    store = open_store(tmp_path / "s.zarr")
    assert store.episode_split.tolist() == [0] and len(store.rows("train")) == len(store) == 9
    for ask in (store.rows, store.episodes):
        with refused("no episode is held out, which this needs; convert at least two episodes"):
            ask("held_out")
    found = facts(tmp_path / "s.zarr")
    assert found["notes"] == [
        "turned", "the source names 2 dimensions of actions, which has 3: the names are not used", ONE_EPISODE,
    ]  # fmt: skip
    assert found["vectors"]["actions"]["names"] == [] and found["vectors"]["proprioception"]["names"] == ["x", "y"]


class Noted(Recorded):
    """With a note, and names of dimensions, of which those of the actions are too few."""

    notes = ("turned",)

    def describe(self) -> SourceDescription:
        names = {"dimension_names": {"actions": ["a", "b"], "proprioception": ["x", "y"]}}
        return super().describe().model_copy(update={"provenance": names})


def bad_actions(value: float) -> np.ndarray[Any, Any]:
    actions = SOURCE.episodes[2].actions.copy()
    actions[4, 1] = value
    return actions


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"actions": bad_actions(np.nan)}, r"episode push/2 of task 'push': actions\[4, 1\] is nan, expected a finite number"),
    ({"actions": bad_actions(np.inf)}, r"actions\[4, 1\] is inf"),
    ({name: np.zeros((15, 4), np.float32) for name in ("actions", "expert_actions")}, "actions differs from the first"),
    ({"actions": np.zeros((15, 3))}, r"actions is float64 \(15, 3\), expected float32 \(15, dimensions\)"),
    ({"actions": np.zeros((0, 3), np.float32)}, r"actions is float32 \(0, 3\), expected float32 \(15, dimensions\)"),
    ({"frames": {n: np.zeros((0, 8, 8, 3), np.uint8) for n in ("front", "wrist")}}, "no time steps"),
    ({"instruction": " "}, "the instruction is empty"),
    ({"timestamps": np.arange(15.0)}, r"lacks nothing, adds \['timestamps'\]"),
    ({"proprioception": None}, "differs from the first episode: lacks"),
    ({"frames": {"front": SOURCE.episodes[2].frames["front"]}}, r"cameras are \['front'\], expected \['front', 'wrist'\]"),
    ({"frames": {n: np.zeros((15, 9, 8, 3), np.uint8) for n in ("front", "wrist")}}, "frames/front differs from the first"),
    ({"frames": {n: np.zeros((14, 8, 8, 3), np.uint8) for n in ("front", "wrist")}}, r"actions is float32 \(15, 3\), expected"),
    ({"rate_hz": 30.0}, "rate_hz is 30, expected 20"),
    ({"annotations": {}}, "differs from the first episode: lacks"),
]


@pytest.mark.parametrize("fields, message", WRONG, ids=[message[:30] for _, message in WRONG])
def test_an_episode_that_breaks_the_contract_leaves_nothing(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with refused(message):
        convert(SOURCE.changed(2, **fields), tmp_path / "s.zarr", SETTINGS, seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index, classes, message", [
    ([0, 5, 5], 0, "index must increase"), ([0, 1, 99], 0, "index must increase"), ([0, 1], 0, r"index is int64 \(2,\)"),
    ([0, 1, 2], 7, r"class 7, expected 0\.\.6"),
])  # fmt: skip
def test_wrong_annotations(tmp_path: Path, index: list[int], classes: int, message: str) -> None:
    annotation = Annotation(np.full((3, 8, 8), classes, np.uint8), np.array(index, dtype=np.int64))
    source = SOURCE.changed(1, annotations=SOURCE.episodes[1].annotations | {"segmentation": annotation})
    with refused(message):
        convert(source, tmp_path / "s.zarr", SETTINGS, seed=0)


def test_binary_dimensions_are_checked(tmp_path: Path) -> None:
    binary = [e.actions.copy() for e in SOURCE.episodes]
    for actions in binary:
        actions[:, 2] = np.where(actions[:, 2] > 0, 1, -1)
    source = SOURCE
    for number, actions in enumerate(binary):
        source = source.changed(number, actions=actions)
    settings = SETTINGS.model_copy(update={"binary_dimensions": [2]})
    convert(source, tmp_path / "s.zarr", settings, seed=0)
    assert open_store(tmp_path / "s.zarr").statistics.convention.binary_dimensions == [2]
    with refused(r"actions\[:, 2\] must be -1 or 1"):
        convert(SOURCE, tmp_path / "t.zarr", settings, seed=0)
    with refused("convert.binary_dimensions lists 7, but actions have 3 dimensions"):
        convert(SOURCE, tmp_path / "t.zarr", SETTINGS.model_copy(update={"binary_dimensions": [7]}), seed=0)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Writing past `limit` bytes of one file fails with an OSError of the operating system, as on a full disk."""
    console.quiet = True  # the captured screen is a file as well
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        console.quiet = False


@pytest.mark.parametrize("limit", [0, 2000])
def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, limit: int) -> None:
    out = tmp_path / "s.zarr"
    with file_size_limit(limit), refused("not written: File too large"):
        convert(SOURCE, out, SETTINGS, seed=0)
    assert list(tmp_path.iterdir()) == []
    convert(SOURCE, out, SETTINGS, seed=0)
    before = sha256_tree(out)
    with file_size_limit(limit), pytest.raises(FileError):
        convert(SOURCE, out, SETTINGS, seed=1)
    assert sha256_tree(out) == before and list(tmp_path.iterdir()) == [out]


def test_memory_does_not_grow_with_the_number_of_episodes(tmp_path: Path) -> None:
    first, peaks = make_episode("push", 20, 0, 64), []

    class Fresh(Recorded):
        def read(self, index: int) -> Episode:
            return make_episode("push", 20, index, 64)

    gc.freeze()  # the more that other tests have left, the later cycles would be collected
    try:
        for count in (2, 3, 15, 3, 15):  # the first run also fills caches; a busy machine leaves more waiting for a moment
            source = Fresh([first] * count)
            tracemalloc.start()
            convert(source, tmp_path / "s.zarr", SETTINGS, seed=0)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    finally:
        gc.unfreeze()
    assert min(peaks[2], peaks[4]) < 1.1 * min(peaks[1], peaks[3])


# The stage and its source of collected demonstrations


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_raw(tmp_path / "raw", ["reach", "drawer-open"])
    return tmp_path / "raw"


def run(raw: Path, tasks: Sequence[str] = ("reach", "drawer-open")) -> Result:
    """Convert `raw` to `s.zarr` beside it, with these tasks to collect."""
    changes = {"collect": {"tasks": [*tasks], "episodes_of": {}}, "evaluate": {"metaworld": {"tasks": ["reach"]}}}
    write_toy_params(raw.parent / "params.yaml", changes)
    return invoke(app, raw, raw.parent / "s.zarr", "--params", raw.parent / "params.yaml")


def test_the_stage_converts_what_collect_wrote(raw: Path, tmp_path: Path) -> None:
    result = run(raw)
    assert result.exit_code == 0, result.output
    store = open_store(tmp_path / "s.zarr")
    assert store.tasks == ["reach", "drawer-open"] and store.rate_hz == 80.0 and len(store.episode_ends) == 8
    episode, rows = open_source(raw, Options(tasks=["drawer-open"])).read(2), np.arange(*store.bounds(6))
    np.testing.assert_array_equal(store.frames(rows), episode.frames["corner2"])
    np.testing.assert_array_equal(store.vector("state", rows), load_file(raw / "drawer-open/episode_0002.safetensors")["state"])
    assert store.instruction_of(5) == "do drawer-open"
    assert store.instructions["reach"]["held_out"] == ["please reach"]
    assert store.episode_provenance[5] == {"attempt": 0, "file": "drawer-open/episode_0001.safetensors", "noisy": True}


def test_folders_that_are_not_collected_are_named_and_ignored(raw: Path, tmp_path: Path) -> None:
    result = run(raw, ["reach"])
    assert result.exit_code == 0 and "ignoring drawer-open, which collect.tasks does not list" in result.output
    assert open_store(tmp_path / "s.zarr").tasks == ["reach"]
    assert run(raw, []).exit_code == 0, "with no tasks to collect all folders are read"
    assert open_store(tmp_path / "s.zarr").tasks == ["drawer-open", "reach"]


@pytest.mark.parametrize("name", ["episode_0001.safetensors", "episode_0001.corner2.png"])
def test_a_damaged_file_is_named(raw: Path, tmp_path: Path, name: str) -> None:
    file = raw / "reach" / name
    file.write_bytes(file.read_bytes()[:-1])
    result = run(raw)
    assert result.exit_code == 1 and f"{file}: truncated or damaged: its SHA-256 is not" in result.output
    assert "Traceback" not in result.output and not (tmp_path / "s.zarr").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["params.yaml", "raw"]


def rewrite(file: Path, **arrays: np.ndarray[Any, Any] | None) -> None:
    """Replace or remove arrays of an episode, and state its new SHA-256."""
    changed = load_file(file) | arrays
    save_file({name: values for name, values in changed.items() if values is not None}, file)
    meta = read_json(file.parent / "meta.json")
    meta["sha256"][file.name] = sha256(file)
    write_json(file.parent / "meta.json", meta)


def test_faults_of_an_episode_are_named(raw: Path) -> None:
    file = raw / "reach" / "episode_0003.safetensors"
    whole = load_file(file)
    for changed, sentence in (
        ({"actions": None}, "array 'actions' is missing; it has annotation_index, depth"),
        ({"success": whole["success"][:5]}, r"0003\.corner2\.png: 8 x 104 pixels in mode RGB, expected 8 x 40 in RGB"),
        ({"actions": whole["actions"][:5]}, r"episode_0003\.safetensors: .*actions is float32 \(5, 4\), expected .*\(13, "),
        ({"actions": np.zeros((13, 4))}, r"episode_0003\.safetensors: .*actions.*float64"),
        ({"actions": np.full((13, 4), np.nan, np.float32)}, r"episode_0003\.safetensors.*actions\[0, 0\] is nan"),
    ):
        rewrite(file, **whole | changed)
        with refused(sentence):
            open_source(raw, Options(tasks=["reach"])).read(3)
    file.unlink()
    with refused(r"episode_0003\.safetensors: no such file, though meta\.json lists its episode"):
        open_source(raw, Options(tasks=["reach"])).read(3)


def test_the_description_must_be_whole(raw: Path) -> None:
    with refused(r"sweep/meta\.json: no such file; collect task 'sweep' first"):
        open_source(raw, Options(tasks=["reach", "sweep"]))
    meta = json.loads((raw / "reach" / "meta.json").read_text())
    for change, message in (
        ({"rate_hz": 40.0}, r"rate_hz is 40\.0, but 80\.0 in drawer-open"),
        ({"schema_version": 1}, "schema_version is 1, this code reads 2; collect again"),
        ({"instructions": {"train": []}}, r"instructions\.train is missing or empty"),
        ({"provenance": {}}, r"provenance\.episodes is missing"),
        ({"task": "push"}, "task is 'push', expected 'reach'"),
    ):
        (raw / "reach" / "meta.json").write_text(json.dumps(meta | change))
        with refused(message):
            open_source(raw, Options())
    (raw / "reach" / "meta.json").write_text("[]")
    with refused("key 'schema_version' is missing"):
        open_source(raw, Options())
