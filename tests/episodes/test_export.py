"""A store as a LeRobot data set, read back: the same vectors, sentences and split, pictures within the stated loss."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from svam.console import console
from svam.contract import VECTORS, Episode, SourceDescription
from svam.episodes import lerobot
from svam.episodes.__main__ import app
from svam.episodes.convert import convert
from svam.episodes.export import open_recording
from svam.episodes.inspection import facts
from svam.episodes.joined import open_store
from svam.episodes.store import EpisodeStore
from svam.files import read_json, sha256_tree
from svam.npy import write_arrays
from svam.sources.lerobot import LerobotSource, Options, open_source
from tests.recorded import SETTINGS, Recorded, make_episode
from tests.sources.common import frames_of, squares
from tests.toy import invoke

PYTHON = os.environ.get("SVAM_LEROBOT_PYTHON", "")
NEEDS_LEROBOT = pytest.mark.skipif(
    not PYTHON,
    reason="LeRobot needs an environment of its own, with the plug-in: svam/serving/lerobot/README.md; then "
    "SVAM_LEROBOT_PYTHON=~/lerobot/bin/python",
)
EVERYTHING = Options(expert_action=("expert_action",), state=("observation.environment_state",))


def export(path: Path, out: Path, *options: object) -> str:
    """What the command says."""
    console.width = 4000
    result = invoke(app, "export", path, out, "--format", "lerobot", *options)
    assert result.exit_code == 0, result.output
    return result.output


def filmed(source: Recorded) -> Recorded:
    """The episodes with pictures as cameras take them, not noise, and a state."""

    def changed(number: int, episode: Episode) -> Episode:
        pictures = {camera: squares(episode.steps + k, (32, 48))[: episode.steps] for k, camera in enumerate(episode.frames)}
        state = np.linspace(-1, number, 5 * episode.steps, dtype=np.float32).reshape(-1, 5)
        return dataclasses.replace(episode, frames=pictures, state=state)

    return Recorded([changed(number, episode) for number, episode in enumerate(source.episodes)])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    """Nine episodes of two tasks with two cameras, all vectors, timestamps and labels."""
    path = tmp_path_factory.mktemp("export") / "episodes.zarr"
    made = [make_episode(task, 9 + 3 * k, k) for k, task in enumerate(["push"] * 4 + ["pull"] * 5)]
    stamped = [dataclasses.replace(e, timestamps=3 + np.arange(e.steps) ** 1.01 / 20, annotations={}) for e in made]
    convert(filmed(Recorded(stamped)), path, SETTINGS, seed=0)
    return open_store(path)


@pytest.fixture(scope="module")
def written(store: EpisodeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`store` as a LeRobot data set."""
    out = tmp_path_factory.mktemp("lerobot") / "set"
    export(store.path, out)
    return out


def compare(store: EpisodeStore, source: LerobotSource) -> dict[str, tuple[float, int]]:
    """Vectors, sentences and split are those of the store, training episodes first; camera -> mean and largest difference of
    the pictures."""
    order = np.concatenate([store.episodes("train"), store.episodes("held_out")]).tolist()
    differences: dict[str, list[np.ndarray[Any, Any]]] = {camera: [] for camera in store.cameras}
    assert len(source) == len(order) and source.describe().cameras == store.cameras and not source.notes
    for number, episode in enumerate(order):
        rows, read = np.arange(*store.bounds(episode)), source.read(number)
        assert read.instruction == store.episode_instructions[episode]
        assert source.shape(number).held_out == (number >= len(store.episodes("train")))
        for name in filter(store.has, VECTORS):
            values = getattr(read, name)
            assert values.dtype == np.float32 and np.array_equal(values, store.vector(name, rows)), name
        assert read.timestamps == pytest.approx(np.arange(len(rows)) / store.rate_hz, abs=1e-6)
        for camera, found in differences.items():
            found.append(np.abs(frames_of(read, camera).astype(int) - store.frames(rows, camera)).ravel())
    return {camera: (np.concatenate(d).mean(), np.concatenate(d).max()) for camera, d in differences.items()}


def test_there_and_back(store: EpisodeStore, written: Path) -> None:
    info = read_json(written / "meta/info.json")
    for camera, (mean, _) in compare(store, open_source(written, EVERYTHING)).items():
        stated = info["features"][f"observation.images.{camera}"]["info"]
        assert stated["svam.pictures"] == len(store) and stated["svam.mean_absolute"] == pytest.approx(mean, abs=1e-4)
        assert 0 < mean < 4
    assert (info["fps"], info["total_frames"], info["splits"]) == (20, len(store), {"train": "0:7", "held_out": "7:9"})
    rows = pq.read_table(written / "data/chunk-000/file-000.parquet", columns=["recorded_timestamp", "index", "episode_index"])
    own = np.concatenate([np.arange(*store.bounds(int(e))) for split in ("train", "held_out") for e in store.episodes(split)])
    assert np.array_equal(rows["recorded_timestamp"], store.timestamps(own)) and np.array_equal(
        rows["index"], np.arange(len(own))
    )


@pytest.mark.parametrize("expert", [["lead_a", "lead_b", "lead_c"], []])
def test_names_of_dimensions_are_each_vectors_own(tmp_path: Path, expert: list[str]) -> None:
    class Named(Recorded):
        def describe(self) -> SourceDescription:
            names = {"actions": ["a", "b", "c"], **({"expert_actions": expert} if expert else {})}
            return super().describe().model_copy(update={"provenance": {"dimension_names": names}})

    convert(Named([make_episode("push", 9, k) for k in range(2)]), tmp_path / "s.zarr", SETTINGS, seed=0)
    vectors = facts(tmp_path / "s.zarr")["vectors"]
    assert (vectors["actions"]["names"], vectors["expert_actions"]["names"]) == (["a", "b", "c"], expert)
    export(tmp_path / "s.zarr", tmp_path / "set")
    features = read_json(tmp_path / "set/meta/info.json")["features"]
    assert (features["action"]["names"], features["expert_action"]["names"]) == (["a", "b", "c"], expert or None)


def test_equal_episodes_are_equal_bytes(store: EpisodeStore, written: Path, tmp_path: Path) -> None:
    export(store.path, tmp_path / "again")
    assert sha256_tree(written) == sha256_tree(tmp_path / "again")


def test_statistics_are_those_of_the_values(store: EpisodeStore, written: Path) -> None:
    found, rows = read_json(written / "meta/stats.json"), np.arange(len(store))
    actions, pictures = store.vector("actions", rows).astype(float), store.frames(rows, "wrist") / 255
    assert set(found) == {"action", "expert_action", "observation.state", "observation.environment_state"} | {
        f"observation.images.{camera}" for camera in store.cameras
    }
    for name, percent in (("q01", 1), ("q10", 10), ("q50", 50), ("q90", 90), ("q99", 99)):
        assert found["action"][name] == pytest.approx(np.percentile(actions, percent, axis=0))
        levels = np.percentile(pictures, percent, axis=(0, 1, 2), method="lower")
        assert np.ravel(found["observation.images.wrist"][name]) == pytest.approx(levels)
    for name, function in (("mean", np.mean), ("std", np.std), ("min", np.min), ("max", np.max)):
        assert found["action"][name] == pytest.approx(function(actions, axis=0), abs=1e-7)
        assert np.ravel(found["observation.images.wrist"][name]) == pytest.approx(function(pictures, axis=(0, 1, 2)))
    assert np.shape(found["observation.images.wrist"]["mean"]) == (3, 1, 1) and found["action"]["count"] == [len(store)]
    each = pq.read_table(written / "meta/episodes/chunk-000/file-000.parquet")
    first = np.arange(*store.bounds(int(store.episodes("train")[0])))
    assert each["stats/action/mean"][0].as_py() == pytest.approx(actions[first].mean(axis=0))
    assert np.ravel(each["stats/observation.images.wrist/max"][0].as_py()) == pytest.approx(pictures[first].max(axis=(0, 1, 2)))


def test_files_end_where_they_are_large(store: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And chunks after their number of files."""
    for name, value in (("TABLE_MB", 0.002), ("FILM_MB", 0.004), ("CHUNK", 2), ("WAITING", 2)):
        monkeypatch.setattr(lerobot, name, value)
    export(store.path, tmp_path / "set")
    names = {
        kind: sorted(f.relative_to(tmp_path / "set").as_posix() for f in (tmp_path / "set").rglob(kind)) for kind in ("*.mp4",)
    }
    assert len(names["*.mp4"]) > 5 and "videos/observation.images.front/chunk-001/file-000.mp4" in names["*.mp4"]
    assert len(list((tmp_path / "set/data").rglob("*.parquet"))) > 2
    assert len(list((tmp_path / "set/meta/episodes").rglob("*.parquet"))) > 1
    compare(store, open_source(tmp_path / "set", EVERYTHING))


def test_the_least_loss(store: EpisodeStore, tmp_path: Path) -> None:
    """Without halved colours and at the least constant rate factor only the rounding between colour spaces is left."""
    said = export(store.path, tmp_path / "set", "--crf", 0, "--pixel-format", "yuv444p")
    for mean, largest in compare(store, open_source(tmp_path / "set", EVERYTHING)).values():
        assert mean < 1 and largest <= 3
    assert f"{tmp_path}/set: 9 episodes, {len(store)} frames, 9 sentences" in said and "front: mean absolute error of" in said


def test_what_cannot_be_exported_is_one_sentence(store: EpisodeStore, kept: Path, tmp_path: Path) -> None:
    console.width = 4000
    (tmp_path / "there").mkdir()
    narrow = [dataclasses.replace(e, frames={c: f[:, :7] for c, f in e.frames.items()}) for e in filmed_plain()]
    odd = Recorded([dataclasses.replace(episode, annotations={}) for episode in narrow])
    convert(odd, tmp_path / "odd.zarr", SETTINGS, seed=0)
    for path, out, sentence in (
        (kept, tmp_path / "there", "there: is there already; name a folder that is not"),
        (tmp_path / "odd.zarr", tmp_path / "new", "has pictures of 7 x 8; name yuv444p"),
        (tmp_path, tmp_path / "new", "not a Zarr v3 group"),
    ):
        result = invoke(app, "export", path, out)
        assert result.exit_code == 1 and sentence in result.output, result.output
        assert not (tmp_path / "new").exists()


def filmed_plain() -> list[Episode]:
    return [make_episode("push", 4, k) for k in range(2)]


def test_a_store_without_actions_and_with_labels(tmp_path: Path) -> None:
    bare = [
        dataclasses.replace(e, actions=None, expert_actions=None, proprioception=e.proprioception[:, :1])  # type: ignore[index]
        for e in filmed_plain()
    ]
    convert(Recorded(bare), tmp_path / "bare.zarr", SETTINGS, seed=0)
    said = export(tmp_path / "bare.zarr", tmp_path / "set")
    assert "bare.zarr: labels (depth, segmentation) are left out" in said
    read = open_source(tmp_path / "set", Options(action=())).read(0)
    assert read.actions is None and read.proprioception is not None and read.proprioception.shape == (4, 1)


def rollouts(path: Path, *left_out: str) -> None:
    """Results with two recorded rollouts, of which the first succeeded, and another row's."""
    lines = [
        {"row": row, "task": "reach", "index": index, "instruction": "reach it", "success": index == 0}
        for row in ("expert", "policy") for index in range(3)
    ]  # fmt: skip
    path.mkdir()
    (path / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "metrics.json").write_text('{"metaworld": {"rate_hz": 80.0, "setting": {"cameras": ["corner2"]}}}')
    for index in (0, 1):
        rng = np.random.default_rng(index)
        arrays = {
            "frames": squares(5, (16, 16)), "calls": np.array([0]), "actions": rng.normal(size=(4, 4)).astype(np.float32),
            "proprioception": rng.normal(size=(5, 4)).astype(np.float32),
        }  # fmt: skip
        write_arrays(path / f"rollouts/reach_{index}", {name: v for name, v in arrays.items() if name not in left_out})


def test_rollouts(tmp_path: Path) -> None:
    rollouts(tmp_path / "results")
    export(tmp_path / "results", tmp_path / "set")
    source = open_source(tmp_path / "set", Options())
    assert len(source) == 2 and [source.shape(number).success for number in (0, 1)] == [True, False]
    for number in (0, 1):
        read, own = source.read(number), open_recording(tmp_path / "results").read(number)
        assert np.array_equal(read.actions, own.actions) and np.array_equal(read.proprioception, own.proprioception)
        assert read.steps == 4 and read.instruction == "reach it" and read.rate_hz == 80.0


def test_rollouts_without_actions(tmp_path: Path) -> None:
    rollouts(tmp_path / "results", "actions")
    result = invoke(app, "export", tmp_path / "results", tmp_path / "set")
    assert result.exit_code == 1 and "no actions.npy; evaluate again with evaluate.record_actions true" in result.output


SCRIPT = """
import sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

data = LeRobotDataset("local/set", root=sys.argv[1], delta_timestamps={"action": [0.0, 0.05]}, video_backend="pyav")
expected = np.load(sys.argv[2])
assert (data.num_episodes, data.num_frames, data.fps) == (9, len(expected["actions"]), 20)
assert data.meta.camera_keys == ["observation.images.front", "observation.images.wrist"]
assert list(data.meta.stats["observation.images.front"]["mean"].shape) == [3, 1, 1]
for row in range(0, len(data), 7):
    item = data[row]
    assert (item["action"][0].numpy() == expected["actions"][row]).all()
    assert (item["observation.state"].numpy() == expected["proprioception"][row]).all()
    assert item["task"] == str(expected["sentences"][row])
    for camera in ("front", "wrist"):
        picture = item["observation.images." + camera].numpy().transpose(1, 2, 0) * 255
        assert np.abs(picture - expected[camera][row]).mean() < 6, (row, camera)
print("as expected")
"""


@NEEDS_LEROBOT
def test_lerobot_itself_reads_it(store: EpisodeStore, written: Path, tmp_path: Path) -> None:
    order = [int(e) for split in ("train", "held_out") for e in store.episodes(split)]  # type: ignore[arg-type]
    rows = np.concatenate([np.arange(*store.bounds(e)) for e in order])
    sentences = [store.episode_instructions[e] for e in store.episode_of(rows).tolist()]
    np.savez(
        tmp_path / "expected.npz", actions=store.vector("actions", rows), proprioception=store.vector("proprioception", rows),
        sentences=np.array(sentences), **{camera: store.frames(rows, camera) for camera in store.cameras},
    )  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HF_LEROBOT_HOME": str(tmp_path / "l")}
    command = [PYTHON, "-c", SCRIPT, str(written), str(tmp_path / "expected.npz")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout.strip().endswith("as expected"), done.stderr
