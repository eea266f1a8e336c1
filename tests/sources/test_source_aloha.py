"""The ALOHA source against files written here in the published layouts, each read again with plain h5py and Pillow."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from svam.contract import Choice
from svam.sources.aloha import AlohaSource, Options, open_source
from tests.sources.common import change, frames_of, refused

SENTENCE = "open the cabinet"
CAMERAS = ("cam_high", "cam_left_wrist")


def smooth(rng: np.random.Generator, steps: int, height: int = 24, width: int = 32) -> NDArray[np.uint8]:
    """(n, H, W, 3) pictures that JPEG keeps well, red above blue, each unlike the next."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    pictures = np.empty((steps, height, width, 3), np.uint8)
    for t in range(steps):
        phase = float(rng.uniform(0, 6))
        pictures[t, ..., 0] = 200 + 40 * np.sin(x / width * 3 + phase)
        pictures[t, ..., 1] = 110 + 60 * np.sin(y / height * 3 + phase)
        pictures[t, ..., 2] = 30 + 20 * np.cos(x / width * 2 + phase)
    return pictures


def imencode(picture: NDArray[np.uint8]) -> bytes:
    """What `cv2.imencode('.jpg', picture)` gives: it takes the last axis for blue, green, red."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture[..., ::-1])).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def record(
    file: Path, steps: int = 5, seed: int = 0, storage: str = "raw", cameras: tuple[str, ...] = CAMERAS, **extra: Any
) -> dict[str, NDArray[np.uint8]]:
    """One episode as the recorders write it; returns what the cameras saw."""
    rng = np.random.default_rng(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    seen = {camera: smooth(rng, steps) for camera in cameras}
    with h5py.File(file, "w") as root:
        root.attrs["sim"] = False
        root.attrs["compress"] = storage != "raw"
        observations = root.create_group("observations")
        images = observations.create_group("images")
        lengths = []
        for camera in reversed(cameras):  # not in the order of names, as compress_len's rows are not
            if storage == "raw":
                images.create_dataset(camera, data=seen[camera], chunks=(1, *seen[camera].shape[1:]))
                continue
            encoded = [imencode(picture) for picture in seen[camera]]
            lengths.append([len(row) for row in encoded])
            size = max(lengths[-1]) + 7
            if storage == "padded":
                rows = np.stack([np.frombuffer(row.ljust(size, b"\0"), np.uint8) for row in encoded])
                images.create_dataset(camera, data=rows, chunks=(1, size))
            elif storage == "strings":
                images.create_dataset(camera, data=np.array(encoded, dtype=f"S{size}"))
            else:
                rows = images.create_dataset(camera, (steps,), dtype=h5py.vlen_dtype(np.uint8))
                for t, row in enumerate(encoded):
                    rows[t] = np.frombuffer(row, np.uint8)
        if lengths:
            root["compress_len"] = np.array(lengths, np.float32)
        observations["qpos"] = rng.normal(size=(steps, 14)).astype(np.float32)
        observations["qvel"] = rng.normal(size=(steps, 14)).astype(np.float32)
        root["action"] = rng.normal(size=(steps, 14))  # float64, as the simulated recorder writes
        for key, value in extra.items():
            root[key] = value
    return seen


def open_said(path: Path, choice: dict[str, Any] | None = None, **options: Any) -> AlohaSource:
    return open_source(path, Options(**options), Choice(**{"instruction": SENTENCE} | (choice or {})))


def test_raw_pictures_vectors_and_alignment(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        steps = 70 if number == 2 else 4
        record(tmp_path / f"episode_{number}.hdf5", steps, seed=number, base_action=np.ones((steps, 2)))
    source = open_said(tmp_path)
    description = source.describe()
    assert description.rate_hz == 50 and description.cameras == list(CAMERAS)
    assert description.instructions == {SENTENCE: {"train": [SENTENCE], "held_out": []}}
    assert any("base_action" in note for note in source.notes)
    assert [source.shape(i).steps for i in range(len(source))] == [4, 70, 4]
    for i, number in enumerate((0, 2, 10)):
        episode = source.read(i)
        assert episode.provenance == {"file": f"episode_{number}.hdf5", "sim": False}
        with h5py.File(tmp_path / f"episode_{number}.hdf5") as root:
            # Row t of every array, not a neighbour: the pictures and the numbers of all steps differ.
            assert np.array_equal(episode.actions, root["action"][:].astype(np.float32))
            assert np.array_equal(episode.proprioception, root["observations/qpos"][:])
            assert np.array_equal(episode.state, np.hstack([root["observations/qpos"][:], root["observations/qvel"][:]]))
            for camera in CAMERAS:
                assert np.array_equal(frames_of(episode, camera), root[f"observations/images/{camera}"][:])


@pytest.mark.parametrize("storage", ["padded", "strings", "variable"])
def test_compressed_pictures(tmp_path: Path, storage: str) -> None:
    seen = record(tmp_path / "cabinet" / "episode_0.hdf5", steps=6, storage=storage)
    source = open_source(tmp_path, Options(instructions={"cabinet": SENTENCE}))
    episode = source.read(0)
    standard = open_source(tmp_path, Options(instructions={"cabinet": SENTENCE}, channel_order="bgr")).read(0)
    assert any("red and blue" in note for note in source.notes)
    for camera in CAMERAS:
        found = frames_of(episode, camera)
        expected = np.stack([np.asarray(Image.open(io.BytesIO(imencode(picture))))[..., ::-1] for picture in seen[camera]])
        assert np.array_equal(found, expected)
        assert np.abs(found.astype(int) - seen[camera]).max() < 25  # JPEG's own loss; swapped channels differ by 100
        assert np.array_equal(frames_of(standard, camera), expected[..., ::-1])


def test_pictures_that_exif_turns(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    Image.fromarray(smooth(np.random.default_rng(0), 1)[0]).save(buffer := io.BytesIO(), "PNG", exif=exif)
    record(tmp_path / "episode_0.hdf5")
    change(tmp_path / "episode_0.hdf5", "observations/images/cam_high", np.array([buffer.getvalue()] * 5))
    source = open_said(tmp_path, channel_order="bgr")
    expected = np.rot90(np.asarray(Image.open(buffer)), -1)
    assert np.array_equal(frames_of(source.read(0), "cam_high")[0], expected)
    assert any(f"{tmp_path}: pictures of observations/images/cam_high are turned as their EXIF asks" in n for n in source.notes)


def test_raw_pictures_of_a_bgr_recorder(tmp_path: Path) -> None:
    seen = record(tmp_path / "episode_0.hdf5")
    episode = open_said(tmp_path / "episode_0.hdf5", {"rate_hz": 30}, channel_order="bgr").read(0)
    assert np.array_equal(frames_of(episode, "cam_high"), seen["cam_high"][..., ::-1])
    assert episode.rate_hz == 30


def test_base_action_is_appended(tmp_path: Path) -> None:
    base = np.arange(10.0).reshape(5, 2)
    record(tmp_path / "episode_0.hdf5", base_action=base)
    actions = open_said(tmp_path, append_base_action=True).read(0).actions
    assert actions is not None and actions.shape == (5, 16) and np.array_equal(actions[:, 14:], base)
    record(tmp_path / "a" / "episode_0.hdf5")
    source = open_said(tmp_path, append_base_action=True)
    with refused("a/episode_0.hdf5: base_action is missing"):
        source.shape(0)
    record(tmp_path / "b" / "episode_0.hdf5", base_action=base[:4])
    with refused("base_action has 4 steps, but the actions have 5"):
        open_said(tmp_path / "b", append_base_action=True)


def test_where_the_instruction_comes_from(tmp_path: Path) -> None:
    record(tmp_path / "a" / "episode_0.hdf5", language_raw=np.array([b"fold the towel"], dtype="S20"))
    record(tmp_path / "b" / "episode_0.hdf5", language_raw="wipe the table")
    record(tmp_path / "c" / "episode_0.hdf5")
    with h5py.File(tmp_path / "c" / "episode_0.hdf5", "a") as root:
        root.attrs["instruction"] = "stack the cups"
    record(tmp_path / "d" / "episode_0.hdf5")
    (tmp_path / "d" / "expanded_instruction_gpt-4-turbo.json").write_text(json.dumps({"instruction": "pour the water"}))
    for number in range(3):
        record(tmp_path / "e" / f"episode_{number}.hdf5")
    (tmp_path / "e" / "instructions.json").write_text(json.dumps({"instructions": ["press it", "push the button"]}))
    source = open_source(tmp_path, Options())
    assert [source.read(i).instruction for i in range(len(source))] == [
        "fold the towel", "wipe the table", "stack the cups", "pour the water", "press it", "push the button", "press it",
    ]  # fmt: skip
    assert source.describe().instructions["press it"] == {"train": ["press it", "push the button"], "held_out": []}
    mapped = open_source(tmp_path, Options(instructions={"b": "y"}), Choice(missing_instruction="x"))
    assert mapped.read(1).instruction == "y"
    assert {open_said(tmp_path).read(i).instruction for i in range(7)} == {SENTENCE}
    with refused(r"names 'z', which is not there; it has a, b, c, d, e"):
        open_source(tmp_path, Options(instructions={"z": "y"}))
    record(tmp_path / "f" / "episode_0.hdf5")
    with refused(r"f/episode_0.hdf5: no instruction; set convert.missing_instruction"):
        open_source(tmp_path, Options()).shape(7)
    assert open_source(tmp_path, Options(), Choice(missing_instruction="go")).read(7).instruction == "go"
    record(tmp_path / "h" / "episode_0.hdf5", language_raw=["reach"] * 2 + ["lift"] * 3)
    with refused("language_raw has a sentence for each row, not all alike, .* convert.captions, or set convert.instruction"):
        open_source(tmp_path / "h", Options())
    record(tmp_path / "h" / "episode_0.hdf5", language_raw=["reach"] + [""] * 4)
    assert open_source(tmp_path / "h", Options()).read(0).instruction == "reach"
    record(tmp_path / "g" / "episode_0.hdf5", language_raw=np.array([b"\xff\xfe caf\xe9"], dtype="S20"))
    with refused(r"language_raw is not valid UTF-8"):
        open_source(tmp_path / "g", Options())
    with h5py.File(tmp_path / "f" / "episode_0.hdf5", "a") as root:
        root.attrs["instruction"] = np.bytes_(b"\xff\xfe")
    with refused(r"'instruction' of / is not valid UTF-8"):
        open_source(tmp_path / "f", Options())


def test_depth_and_other_files_are_left_out_with_a_note(tmp_path: Path) -> None:
    record(tmp_path / "episode_0.hdf5", **{"observations/images_depth/cam_high": np.zeros((5, 4, 4), np.uint16)})
    record(tmp_path / "notes.hdf5")
    notes = " ".join(open_said(tmp_path).notes)
    assert "no colour pictures: observations/images_depth" in notes and "1 HDF5 files are left out" in notes


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("action", None, "action is missing"),
        ("action", np.zeros((0, 14)), "at least one step"),
        ("action", np.zeros((4, 14)), "qpos has 5 steps, but the actions have 4"),
        ("action", np.full((5, 14), np.nan), r"actions\[0, 0\] is nan"),
        ("action", np.array([["a"] * 2] * 5, dtype="S1"), "expected numbers"),
        ("observations", None, "no group observations"),
        ("observations/qpos", None, "observations/qpos is missing"),
        ("observations/qpos", np.zeros((4, 14)), "qpos has 4 steps, but the actions have 5"),
        ("observations/images/cam_high", np.zeros((5, 3)), "cam_high is float64 .*, expected uint8 .*leave this camera out"),
        ("observations/images/cam_high", np.zeros((5, 100), np.uint8), r"cam_high\[0\]: no readable PNG or JPEG .* of 0 bytes"),
        ("observations/images/cam_high", np.full((5, 100), 7, np.uint8), "picture of 100 bytes .*leave this camera out"),
    ],
)  # fmt: skip
def test_one_sentence_for_each_fault(tmp_path: Path, name: str, value: Any, sentence: str) -> None:
    record(tmp_path / "episode_0.hdf5")
    change(tmp_path / "episode_0.hdf5", name, value)
    with refused(sentence, "episode_0.hdf5"):
        open_said(tmp_path).read(0)


def test_faults_of_a_set(tmp_path: Path) -> None:
    with refused("no .hdf5 or .h5 file in it or below it; it has nothing"):
        open_said(tmp_path)
    record(tmp_path / "episode_0.hdf5")
    record(tmp_path / "episode_1.hdf5", cameras=("cam_high",))
    record(tmp_path / "episode_2.hdf5")
    source = open_said(tmp_path)
    with refused(r"episode_1.hdf5: no camera 'cam_left_wrist', which other episodes have; it has cam_high"):
        source.shape(1)
    record(tmp_path / "episode_3.hdf5", cameras=(*CAMERAS, "top"))
    assert any("images/top is left out: 1 of 4 episodes have it; convert.cameras can" in n for n in open_said(tmp_path).notes)
    (tmp_path / "episode_0.hdf5").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    only = open_said(tmp_path, {"cameras": ["observations/images/cam_high"]})
    assert [only.shape(i).name for i in (1, 2)] == ["episode_1", "episode_2"] and only.describe().cameras == ["cam_high"]
    with refused("episode_0.hdf5: a Git LFS pointer"):
        only.shape(0)


def test_a_recorder_that_stopped_early(tmp_path: Path) -> None:
    """Pictures that were never written read as zeros in HDF5; that is found by the chunks that are not there."""
    record(tmp_path / "episode_0.hdf5")
    with h5py.File(tmp_path / "episode_0.hdf5", "a") as root:
        del root["observations/images/cam_high"]
        pictures = root["observations/images"].create_dataset("cam_high", (5, 24, 32, 3), np.uint8, chunks=(1, 24, 32, 3))
        pictures[:3] = 1
    with refused("3 of its 5 chunks"):
        frames_of(open_said(tmp_path).read(0), "cam_high")
    with h5py.File(tmp_path / "episode_0.hdf5", "a") as root:
        del root["action"]
        root.create_dataset("action", (5, 14), np.float64)
    with refused("claims 560 bytes, of which 0 are stored"):
        open_said(tmp_path).read(0)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    record(tmp_path / "episode_0.hdf5", storage="padded")
    with h5py.File(tmp_path / "episode_0.hdf5", "a") as root:
        rows = root["observations/images/cam_high"]
        rows[3, np.flatnonzero(rows[3])[-1] - 60 :] = 0
    episode = open_said(tmp_path).read(0)
    with refused(r"cam_high\[3\]: no readable PNG or JPEG picture"):
        frames_of(episode, "cam_high")
    with h5py.File(tmp_path / "episode_0.hdf5", "a") as root:
        small = np.frombuffer(imencode(np.zeros((8, 8, 3), np.uint8)), np.uint8)
        rows = root["observations/images/cam_high"]
        rows[3] = np.pad(small, (0, rows.shape[1] - len(small)))
    with refused(r"cam_high changes its picture size from \(24, 32\) to \(8, 8\)"):
        frames_of(open_said(tmp_path).read(0), "cam_high")


def test_cameras_and_files_of_other_recorders(tmp_path: Path) -> None:
    """Alpha, channels first, depth among the cameras, other file names: read, or left out with a note."""
    seen = record(tmp_path / "demo_10.hdf5", cameras=("cam_high", "left", "right"))
    buffer = io.BytesIO()
    Image.fromarray(np.ones((24, 32), np.uint16)).save(buffer, "PNG")
    for camera, stored in {
        "left": np.pad(seen["left"], ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=9),
        "right": np.moveaxis(seen["right"], -1, 1),
        "cam_high_depth": np.ones((5, 24, 32), np.uint16),
        "png_depth": np.array([buffer.getvalue()] * 5),
    }.items():
        change(tmp_path / "demo_10.hdf5", f"observations/images/{camera}", stored)
    record(tmp_path / "demo_9.hdf5", cameras=("cam_high", "left", "right"))
    source = open_said(tmp_path, {"rate_hz": 30})
    assert [source.shape(i).name for i in range(2)] == ["demo_9", "demo_10"]
    for camera, pictures in seen.items():
        assert np.array_equal(frames_of(source.read(1), camera), pictures)
    assert source.read(1).rate_hz == 30 and not any("Hz are assumed" in note for note in source.notes)
    notes = " ".join(source.notes)
    assert "cam_high_depth uint16" in notes and "png_depth" in notes and "alpha, is dropped" in notes
    change(tmp_path / "demo_10.hdf5", "observations/images/wrist/color", seen["left"])
    nested = open_said(tmp_path / "demo_10.hdf5")
    assert nested.describe().cameras == ["cam_high", "left", "right"]
    assert any("a group and no dataset: observations/images/wrist" in note for note in nested.notes)
    with refused("cam_high_depth is uint16 .*, expected uint8"):
        open_said(tmp_path / "demo_10.hdf5", {"cameras": ["cam_high_depth"]})
    change(tmp_path / "demo_10.hdf5", "observations/images/far", np.full((5, 24, 32, 3), 900, np.int32))
    assert any("images/far int32 (24, 32, 3)" in note for note in open_said(tmp_path / "demo_10.hdf5").notes)
    with refused(r"far is 900 in row 0, .*; to leave this camera out, set convert.cameras: \[left\]$"):
        open_said(tmp_path / "demo_10.hdf5", {"cameras": ["left", "far"]})
    record(tmp_path / "only" / "a.hdf5", cameras=())
    change(tmp_path / "only" / "a.hdf5", "observations/images/far", np.full((5, 24, 32, 3), 0.5))
    with refused(r"no camera in observations/images; it has far .*; .*far is 0.5 in row 0, expected whole numbers .*depth\?$"):
        open_said(tmp_path / "only")
    with refused("convert.cameras names 'top', but .* has cam_high|no camera of convert.cameras"):
        open_said(tmp_path, {"cameras": ["top"]})
