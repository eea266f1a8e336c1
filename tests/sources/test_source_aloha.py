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

from svam.sources.aloha import Options, open_source
from tests.sources.common import frames_of, refused

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


def said(**extra: Any) -> Options:
    return Options(instruction=SENTENCE, **extra)


def test_raw_pictures_vectors_and_alignment(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        record(
            tmp_path / f"episode_{number}.hdf5",
            steps=70 if number == 2 else 4,
            seed=number,
            base_action=np.ones((70 if number == 2 else 4, 2)),
        )
    source = open_source(tmp_path, said())
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


def test_raw_pictures_of_a_bgr_recorder(tmp_path: Path) -> None:
    seen = record(tmp_path / "episode_0.hdf5")
    episode = open_source(tmp_path / "episode_0.hdf5", said(channel_order="bgr", rate_hz=30)).read(0)
    assert np.array_equal(frames_of(episode, "cam_high"), seen["cam_high"][..., ::-1])
    assert episode.rate_hz == 30


def test_base_action_is_appended(tmp_path: Path) -> None:
    base = np.arange(10.0).reshape(5, 2)
    record(tmp_path / "episode_0.hdf5", base_action=base)
    actions = open_source(tmp_path, said(append_base_action=True)).read(0).actions
    assert actions is not None and actions.shape == (5, 16) and np.array_equal(actions[:, 14:], base)
    record(tmp_path / "a" / "episode_0.hdf5")
    with refused("no base_action"):
        open_source(tmp_path / "a", said(append_base_action=True)).read(0)
    with refused("columns of base_action"):
        open_source(tmp_path, said(append_base_action=True))
    record(tmp_path / "b" / "episode_0.hdf5", base_action=base[:4])
    with refused(r"\[5, 4\]"):
        open_source(tmp_path / "b", said(append_base_action=True)).read(0)


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
    assert open_source(tmp_path, Options(instruction="x", instructions={"b": "y"})).read(1).instruction == "y"
    with refused(r"names 'z', which is not there; it has a, b, c, d, e"):
        open_source(tmp_path, Options(instruction="x", instructions={"z": "y"}))
    record(tmp_path / "f" / "episode_0.hdf5")
    with refused(r"no instruction.*with the key 'f'"):
        open_source(tmp_path, Options())
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
    notes = " ".join(open_source(tmp_path, said()).notes)
    assert "images_depth is left out" in notes and "1 HDF5 files are left out" in notes


def remove(root: Any, name: str, value: Any = None) -> None:
    del root[name]
    if value is not None:
        root[name] = value


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("action", None, "action is missing"),
        ("action", np.zeros((0, 14)), "at least one step"),
        ("action", np.zeros((4, 14)), "but action has 4 steps"),
        ("action", np.full((5, 14), np.nan), r"actions\[0, 0\] is nan"),
        ("action", np.array([["a"] * 2] * 5, dtype="S1"), "expected numbers"),
        ("observations", None, "no group observations"),
        ("observations/qpos", None, "observations/qpos is missing"),
        ("observations/qpos", np.zeros((4, 14)), "state is joined of .4, 5. steps|state is joined"),
        ("observations/images/cam_high", np.zeros((5, 24, 32), np.uint8), "expected uint8 .steps, H, W, 3."),
        ("observations/images/cam_high", np.zeros((5, 100), np.uint8), r"cam_high\[0\] is empty"),
        ("observations/images/cam_high", np.full((5, 100), 7, np.uint8), "no whole JPEG or PNG"),
    ],
)  # fmt: skip
def test_one_sentence_for_each_fault(tmp_path: Path, name: str, value: Any, sentence: str) -> None:
    record(tmp_path / "episode_0.hdf5")
    with h5py.File(tmp_path / "episode_0.hdf5", "a") as root:
        remove(root, name, value)
    with refused(sentence, "episode_0.hdf5"):
        open_source(tmp_path, said()).read(0)


def test_faults_of_a_set(tmp_path: Path) -> None:
    with refused(r"no episode_\*.hdf5 in it$"):
        open_source(tmp_path, said())
    record(tmp_path / "episode_0.hdf5")
    record(tmp_path / "episode_1.hdf5", cameras=("cam_high",))
    with refused(r"episode_1.hdf5: cameras: \('cam_high',\), but .*episode_0"):
        open_source(tmp_path, said())


def test_a_recorder_that_stopped_early(tmp_path: Path) -> None:
    """Pictures that were never written read as zeros in HDF5; that is found by the chunks that are not there."""
    record(tmp_path / "episode_0.hdf5")
    with h5py.File(tmp_path / "episode_0.hdf5", "a") as root:
        del root["observations/images/cam_high"]
        pictures = root["observations/images"].create_dataset("cam_high", (5, 24, 32, 3), np.uint8, chunks=(1, 24, 32, 3))
        pictures[:3] = 1
    with refused("3 of its 5 chunks"):
        frames_of(open_source(tmp_path, said()).read(0), "cam_high")
    with h5py.File(tmp_path / "episode_0.hdf5", "a") as root:
        del root["action"]
        root.create_dataset("action", (5, 14), np.float64)
    with refused("claims 560 bytes, of which 0 are stored"):
        open_source(tmp_path, said()).read(0)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    record(tmp_path / "episode_0.hdf5", storage="padded")
    with h5py.File(tmp_path / "episode_0.hdf5", "a") as root:
        rows = root["observations/images/cam_high"]
        rows[3, np.flatnonzero(rows[3])[-1] - 60 :] = 0
    episode = open_source(tmp_path, said()).read(0)
    with refused(r"cam_high\[3\] is truncated or damaged"):
        frames_of(episode, "cam_high")
    with h5py.File(tmp_path / "episode_0.hdf5", "a") as root:
        small = np.frombuffer(imencode(np.zeros((8, 8, 3), np.uint8)), np.uint8)
        rows = root["observations/images/cam_high"]
        rows[3] = np.pad(small, (0, rows.shape[1] - len(small)))
    with refused(r"cam_high\[3\] is 8 x 8, but the first is 24 x 32"):
        frames_of(open_source(tmp_path, said()).read(0), "cam_high")
