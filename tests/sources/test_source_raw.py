"""The project's own raw layout: what is written comes back to the bit, and what is wrong is said in one sentence."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svam.contract import Choice
from svam.sources import _npz
from svam.sources.raw import Options, open_source
from tests.sources.common import decoded, film, frames_of, refused, spoil

META: dict[str, Any] = {
    "schema_version": 1, "rate_hz": 12.5, "cameras": ["front", "wrist"],
    "tasks": {"pick": {"train": ["pick it", "lift it"], "held_out": ["take it"]}, "push": {"train": ["push it"]}},
    "episodes": {
        "a": {"task": "pick"}, "b": {"task": "pick"}, "c": {"task": "push", "instruction": "shove it", "held_out": True},
    },
}  # fmt: skip
ONE_TASK: dict[str, Any] = {**META, "tasks": {"pick": {"train": ["pick it"]}}, "episodes": {}}


def arrays_of(seed: int, n: int = 70) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    index = np.arange(0, n, 3)
    return {
        "frames_front": rng.integers(0, 256, (n, 6, 8, 3), dtype=np.uint8),
        "frames_wrist": rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8),
        "actions": rng.normal(size=(n, 3)), "expert_actions": rng.normal(size=(n, 3)).astype(np.float32),
        "state": rng.normal(size=(n, 5)).astype(np.float16), "proprioception": np.asfortranarray(rng.normal(size=(n, 2))),
        "timestamps": np.arange(n) / 12.5 + 1.7e9, "annotation_index": index,
        "depth": rng.uniform(0.5, 2, (len(index), 6, 8)).astype(np.float16),
        "segmentation": rng.integers(0, 7, (len(index), 6, 8), dtype=np.uint8),
    }  # fmt: skip


def write(folder: Path, meta: Any = META, **episodes: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    for name, arrays in episodes.items():
        np.savez_compressed(folder / f"{name}.npz", **{key: value for key, value in arrays.items() if value is not None})
    return folder


def test_everything_comes_back(tmp_path: Path) -> None:
    written = {name: arrays_of(seed, 70 + seed) for seed, name in enumerate("abc")}
    source = open_source(write(tmp_path / "raw", **written), Options())
    assert len(source) == 3 and list(source.notes) == []
    description = source.describe()
    assert (description.rate_hz, description.cameras) == (12.5, ["front", "wrist"])
    assert description.instructions == {
        "pick": {"train": ["pick it", "lift it"], "held_out": ["take it"]},
        "push": {"train": ["push it", "shove it"], "held_out": []},
    }
    told = [("pick", "pick it", False), ("pick", "lift it", False), ("push", "shove it", True)]
    for index, (name, arrays) in enumerate(written.items()):
        shape, episode = source.shape(index), source.read(index)
        assert (episode.task, episode.instruction, shape.held_out) == told[index]
        assert shape.steps == episode.steps == 70 + index
        assert dict(shape.annotated) == {"depth": len(arrays["depth"]), "segmentation": len(arrays["depth"])}
        for camera in META["cameras"]:
            assert (frames_of(episode, camera) == arrays[f"frames_{camera}"]).all()
        for vector in ("actions", "expert_actions", "state", "proprioception"):
            assert (getattr(episode, vector) == arrays[vector].astype(np.float32)).all()
        assert episode.timestamps is not None and (episode.timestamps == arrays["timestamps"]).all()
        for label, annotation in episode.annotations.items():
            assert (annotation.values == arrays[label]).all() and (annotation.index == arrays["annotation_index"]).all()
        assert episode.provenance["file"] == f"{name}.npz"
    other = open_source(tmp_path / "raw", Options(), Choice(cameras=["wrist", "front"], instruction="go"))
    assert other.describe().instructions["push"] == {"train": ["go"], "held_out": []}
    assert not other.shape(0).annotated and not other.read(0).annotations  # which are of the other camera
    assert any("depth and segmentation are of the camera 'front', with which" in note for note in other.notes)


def test_a_video_may_replace_frames(tmp_path: Path) -> None:
    folder = write(tmp_path / "raw", {**META, "episodes": {"a": {"task": "pick"}}}, a=arrays_of(0, 9) | {"frames_wrist": None})
    with refused(r"a\.npz: field 'frames_wrist' is missing, and there is no a\.wrist\.mp4"):
        open_source(folder, Options()).shape(0)
    film(folder / "a.wrist.mp4", 9, fps=30)
    film(folder / "b.wrist.mp4", 9)
    told = open_source(folder, Options()).notes
    assert told[0] == f"{folder}/a.wrist.mp4: plays at 30 frames/s, but the rate is 12.5 Hz, at which it is stored"
    source = open_source(folder, Options(), Choice(rate_hz=30.5))
    assert ["1 videos of no episode" in note for note in source.notes] == [False, True]  # beside the rate of its timestamps
    expected = decoded(folder / "a.wrist.mp4")
    assert (frames_of(source.read(0), "wrist") == expected).all() and len(expected) == 9
    film(folder / "a.wrist.mp4", 9, rotate=90)
    turned = open_source(folder, Options(), Choice(rate_hz=10))
    assert "a.wrist.mp4: pictures are turned by 270 degrees clockwise, as its metadata ask" in turned.notes[1]
    assert (frames_of(turned.read(0), "wrist") == np.rot90(decoded(folder / "a.wrist.mp4"), 1, axes=(1, 2))).all()
    film(folder / "a.wrist.mp4", 8)
    with refused(r"a\.wrist\.mp4: 8 frames, but a\.npz has 9 actions"):
        source.shape(0)
    film(folder / "a.front.mp4", 9)
    with refused("has field 'frames_front', and a.front.mp4 is there too; keep one"):
        source.shape(0)


def test_instructions_may_stand_in_the_archives(tmp_path: Path) -> None:
    meta = {"schema_version": 1, "rate_hz": 5, "cameras": ["front"]}
    small = {"frames_front": np.zeros((1, 2, 2, 3), np.uint8), "actions": np.zeros((1, 1), np.float32)}
    sentences = [np.array("open it"), np.array(["schließ es"]), np.array("öffne es".encode())]
    folder = write(tmp_path / "raw", meta, **{f"e{k}": {**small, "instruction": text} for k, text in enumerate(sentences)})
    source = open_source(folder, Options())
    assert list(source.describe().instructions) == ["open it", "schließ es", "öffne es"]
    assert [source.read(k).instruction for k in range(3)] == ["open it", "schließ es", "öffne es"]
    assert source.shape(0).held_out is None
    for wrong, message in (
        (np.array(b"\xff\xfe"), "not valid UTF-8"), (np.array("\ud800"), "not valid UTF-8"), (np.array(" "), "no instruction"),
        (np.array(["a", "b"]), "expected one string"), (np.array(3), "expected one string"), (None, "no instruction"),
    ):  # fmt: skip
        write(folder, meta, e1={**small, "instruction": wrong})
        with refused(message):
            open_source(folder, Options()).shape(1)
    write(folder, {**meta, "episodes": {"e1": {"instruction": "shut it"}}}, e1={**small, "instruction": sentences[1]})
    with refused("its instruction is 'schließ es', but meta.json says 'shut it'"):
        open_source(folder, Options()).read(1)
    replaced = open_source(folder, Options(), Choice(instruction="go"))
    assert [(replaced.shape(k).task, replaced.read(k).instruction) for k in (0, 1)] == [("open it", "go"), ("shut it", "go")]
    write(folder, meta, e1={**small, "instruction": np.array(3)})
    assert open_source(folder, Options(), Choice(instruction="go")).shape(1).task == "go"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, r"meta\.json: schema_version is 2"),
        ({"rate_hz": 0}, r"meta\.json: rate_hz is 0"),
        ({"rate_hz": True}, r"meta\.json: rate_hz is true; expected a number"),
        ({"cameras": ["../x"]}, r"meta\.json: cameras\.0"),
        ({"cameras": ["front", "front"]}, "more than once"),
        ({"task": {}}, r"meta\.json: unknown key 'task'"),
        ({"tasks": {"pick": {"train": []}}}, r"meta\.json: tasks\.pick\.train"),
        ({"episodes": {"a": {"task": "pick"}, "../z": {}}}, r"episodes names '\.\./z', but there is no \.\./z\.npz"),
        ({"episodes": {}}, r"episodes\.a\.task is missing; tasks are pick, push"),
        ({"episodes": {"a": {"task": "fly"}}}, r"episodes\.a\.task is 'fly'; tasks are pick, push"),
    ],
)
def test_the_description_must_be_right(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write(tmp_path / "raw", {**META, "episodes": {"a": {"task": "pick"}}, **change}, a=arrays_of(0, 4))
    with refused(message):
        for index in range(len(source := open_source(folder, Options()))):
            source.shape(index)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"success": "maybe"}, r"meta\.json: episodes\.b\.success is 'maybe'; expected true or false"),
        ({"instruction": " "}, r"meta\.json: episodes\.b\.instruction is ' '"),
        ({"held": True}, r"meta\.json: unknown key 'episodes\.b\.held'"),
        ("pick", r"meta\.json: episodes\.b is 'pick'"),
    ],
)
def test_a_wrong_line_of_the_description_is_one_bad_episode(tmp_path: Path, said: Any, message: str) -> None:
    folder = write(
        tmp_path / "raw", {**META, "episodes": {"a": {"task": "pick"}, "b": said}}, a=arrays_of(0, 4), b=arrays_of(1, 4)
    )
    source = open_source(folder, Options())
    assert source.names == ["a", "b"] and source.read(0).steps == source.shape(0).steps == 4
    assert list(source.describe().instructions) == ["pick", "push"]
    for look in (source.shape, source.read):
        with refused(message):
            look(1)


def test_a_recording_that_is_not_there_is_one_bad_episode(tmp_path: Path) -> None:
    meta = {**META, "episodes": {name: {"task": "pick"} for name in "abc"}}
    source = open_source(write(tmp_path / "raw", meta, a=arrays_of(0, 4), c=arrays_of(1, 5)), Options())
    assert [source.read(index).steps for index in (0, 2)] == [4, 5] and source.notes == []
    with refused(r"meta\.json: episodes names 'b', but there is no b\.npz"):
        source.shape(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": None}, "field 'actions' is missing; it has annotation_index, depth"),
        ({"actions": np.zeros((4, 2), int)}, r"'actions' is int64 \(4, 2\), expected float16 or float32 or float64"),
        ({"actions": np.full((4, 2), 1e300)}, r"actions\[0, 0\] is inf"),
        ({"actions": np.array([[{}]], dtype=object)}, "field 'actions' holds Python objects, which are never unpickled"),
        ({"frames_front": np.array([{}] * 4, dtype=object)}, "field 'frames_front' holds Python objects"),
        ({"frames_front": np.zeros((5, 6, 8, 3), np.uint8)}, "'frames_front' has 5 rows, but there are 4 actions"),
        ({"state": np.zeros((3, 2))}, "field 'state' has 3 rows, but there are 4 actions"),
        ({"frames_front": np.zeros((4, 6, 8), np.uint16)}, r"'frames_front' is uint16 \(4, 6, 8\), expected uint8"),
        ({"frames_front": np.zeros((4, 6, 8, 3), np.uint8, order="F")}, "Fortran order"),
        ({"timestamps": np.zeros(4)}, r"timestamps\[1\] is 0"),
        ({"annotation_index": None}, "field 'annotation_index' is missing"),
        ({"depth": np.ones((2, 6, 4), np.float32)}, "labels of 4 x 6 cannot cover pictures of 8 x 6 alone"),
    ],
)
def test_fields_are_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source = open_source(write(tmp_path / "raw", ONE_TASK, a=arrays_of(0, 4) | change), Options())
    with refused(message, "a.npz"):  # all but values by the headers alone, with those of other episodes
        source.shape(0)
        source.read(0)


def test_choice_and_kinds_of_pictures(tmp_path: Path) -> None:
    """A camera left out is never looked for; alpha is dropped, channels are put last; sentence and rate are replaced."""
    arrays = arrays_of(0, 4)
    rgba = np.pad(arrays["frames_front"], ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=7)
    planes = np.ascontiguousarray(np.moveaxis(arrays["frames_front"], -1, 1))
    meta = {"schema_version": 1, "rate_hz": 5, "cameras": ["front", "wrist"], "episodes": {"a": {"success": False}}}
    first, second = ({**arrays, "frames_front": front, "frames_wrist": None} for front in (rgba, planes))
    folder = write(tmp_path / "raw", meta, a=first, b=second)
    (folder / "c.npz").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    source = open_source(folder, Options(), Choice(cameras=["frames_front"], rate_hz=30, instruction="go"))
    assert "four channels: the last, alpha, is dropped" in " ".join(source.notes)
    for index in range(2):
        episode = source.read(index)
        assert (frames_of(episode) == arrays["frames_front"]).all()
        assert (episode.rate_hz, episode.instruction, list(episode.frames)) == (30, "go", ["front"])
    assert [(source.shape(i).name, source.shape(i).success, source.shape(i).task) for i in range(2)] == [
        ("a", False, "go"), ("b", None, "go"),
    ]  # fmt: skip
    with refused("c.npz: a Git LFS pointer"):
        source.shape(2)
    spoiled = write(tmp_path / "spoiled", ONE_TASK, a=arrays)
    spoil(spoiled / "a.npz", "frames_wrist")
    with refused("a.npz: truncated, damaged"):
        open_source(spoiled, Options()).shape(0)
    source = open_source(spoiled, Options(), Choice(cameras=["front"]))
    assert source.shape(0).steps == 4 and list(source.notes) == []
    assert (frames_of(source.read(0)) == arrays["frames_front"]).all()
    with refused("a.npz: no instruction"):
        open_source(folder, Options(), Choice(cameras=["front"])).shape(0)
    filled = open_source(folder, Options(), Choice(cameras=["front"], missing_instruction="do"))
    assert list(filled.describe().instructions) == ["do"]


def test_a_camera_that_is_called_depth_is_doubted(tmp_path: Path) -> None:
    arrays = arrays_of(0, 4)
    folder = write(
        tmp_path / "raw", {**ONE_TASK, "cameras": ["front", "depth"]}, a={**arrays, "frames_depth": arrays["frames_front"]}
    )
    doubt = "frames_depth is read as colours; is it depth? to leave it out, name the other cameras in convert.cameras"
    assert doubt in open_source(folder, Options()).notes
    assert doubt not in open_source(folder, Options(), Choice(cameras=["depth"])).notes


def test_unknown_fields_are_noted(tmp_path: Path) -> None:
    source = open_source(
        write(
            tmp_path / "raw", ONE_TASK, a={**arrays_of(0, 4), "states": np.array([{}]), "frames_top": np.zeros(4)}, b={}
        ), Options(), Choice(rate_hz=25),
    )  # fmt: skip
    assert "s apart, but the rate is 25 Hz" in source.notes[0] and "set convert.rate_hz to 12.5" in source.notes[0]
    assert "ignoring frames_top, states" in source.notes[1] and source.read(0).steps == source.shape(0).steps == 4


def test_a_claimed_size_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "raw", ONE_TASK, a=arrays_of(0, 4))
    write(folder, ONE_TASK, a=arrays_of(0, 4) | {"state": None})
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 4)})
    with zipfile.ZipFile(folder / "a.npz", "a") as archive:
        archive.writestr("state.npy", header.getvalue())
    source = open_source(folder, Options())
    with refused("truncated, damaged"):
        source.shape(0)
    write(folder, ONE_TASK, a=arrays_of(0, 4))
    monkeypatch.setattr(_npz, "LARGEST_MEMBER", 100)
    with refused("expected at most 0 GiB; write shorter episodes"):
        source.read(0)
