"""Conversion by several workers: equal bytes, a kill costs a unit, one writer; resizing; long episodes in blocks."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from svam.contract import Episode, EpisodeShape, FrameBlocks, SourceDescription
from svam.episodes import convert as conversion
from svam.episodes.__main__ import app
from svam.episodes.convert import convert
from svam.episodes.frames import resize_frames, resize_labels
from svam.episodes.joined import open_store
from svam.episodes.options import ChosenEpisodes
from svam.episodes.validation import validate
from svam.files import FileError, locked, sha256_tree
from tests import ROOT, warm
from tests.recorded import CAMERAS, SETTINGS, Recorded, make_episode, two_tasks
from tests.sources.common import refused
from tests.toy import invoke


class Slow:
    """Episodes of noise in blocks of seven frames; `pause` seconds before each one, so that a kill comes in between."""

    notes = ()

    def __init__(self, lengths: list[int], pause: float = 0.0) -> None:
        self.lengths, self.pause = lengths, pause

    def describe(self) -> SourceDescription:
        return SourceDescription(
            rate_hz=10.0, cameras=["front"], instructions={"push": {"train": ["push"], "held_out": []}}, provenance={}
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def shape(self, index: int) -> EpisodeShape:
        return EpisodeShape(self.lengths[index])

    def frames(self, index: int) -> NDArray[np.uint8]:
        return np.random.default_rng(index).integers(0, 256, (self.lengths[index], 8, 8, 3), dtype=np.uint8)

    def read(self, index: int) -> Episode:
        time.sleep(self.pause)
        n = self.lengths[index]

        def blocks() -> Iterator[NDArray[np.uint8]]:
            frames = self.frames(index)
            return (frames[k : k + 7] for k in range(0, n, 7))

        return Episode(
            task="push", instruction="push", rate_hz=10.0, frames={"front": FrameBlocks((n, 8, 8, 3), blocks)},
            actions=np.arange(n, dtype=np.float32)[:, None] + index, timestamps=np.arange(n) / 10.0,
        )  # fmt: skip


LENGTHS = [700, 1, 513, 40, 1100, 3, 900, 260]


@pytest.mark.parametrize("unit_steps", [1, 300, 10**6])
def test_the_cut_into_units_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_steps: int) -> None:
    convert(two_tasks(), tmp_path / "a.zarr", SETTINGS, seed=0)
    monkeypatch.setattr(conversion, "UNIT_STEPS", unit_steps)
    convert(two_tasks(), tmp_path / "b.zarr", SETTINGS, seed=0)
    assert sha256_tree(tmp_path / "a.zarr") == sha256_tree(tmp_path / "b.zarr")


def test_workers_change_no_byte(tmp_path: Path) -> None:
    source = Slow(LENGTHS)
    convert(source, tmp_path / "a.zarr", SETTINGS, seed=0)
    convert(source, tmp_path / "b.zarr", SETTINGS, seed=0, workers=2, scratch=tmp_path / "scratch")
    assert sha256_tree(tmp_path / "a.zarr") == sha256_tree(tmp_path / "b.zarr")
    store = open_store(tmp_path / "b.zarr")
    for e in range(len(LENGTHS)):
        rows = np.arange(*store.bounds(e))
        np.testing.assert_array_equal(store.frames(rows), source.frames(e))
        np.testing.assert_array_equal(store.vector("actions", rows)[:, 0], np.arange(LENGTHS[e]) + e)
        np.testing.assert_array_equal(store.timestamps(rows), np.arange(LENGTHS[e]) / 10.0)
    assert not any((tmp_path / "scratch").iterdir())


def test_a_kill_costs_a_unit(tmp_path: Path) -> None:
    """The same conversion in a process of its own, killed when its first units are there, then continued."""
    convert(Slow(LENGTHS), tmp_path / "straight.zarr", SETTINGS, seed=0)
    code = (
        "from pathlib import Path\nfrom svam.episodes.convert import convert\nfrom tests.recorded import SETTINGS\n"
        "from tests.episodes.test_convert_workers import LENGTHS, Slow\n"
        f"convert(Slow(LENGTHS, 0.3), Path({str(tmp_path / 'out.zarr')!r}), SETTINGS, 0, 1, Path({str(tmp_path / 's')!r}))\n"
    )
    with Path(os.devnull).open("w") as none:
        process = warm.start(("-c", code), ROOT, os.environ, dict.fromkeys(range(3), none.fileno()))
    deadline = time.monotonic() + 240
    while not list((tmp_path / "s").glob("*/unit_*/episodes.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = [path.stat().st_mtime_ns for path in sorted((tmp_path / "s").glob("*/unit_*/episodes.json"))]
    assert done and not (tmp_path / "out.zarr").exists()
    read: list[int] = []

    class Watched(Slow):
        def read(self, index: int) -> Episode:
            read.append(index)
            return super().read(index)

    (tmp_path / "s" / "of_another_day" / "unit_000000").mkdir(parents=True)
    convert(Watched(LENGTHS), tmp_path / "out.zarr", SETTINGS, 0, 1, tmp_path / "s")
    assert sha256_tree(tmp_path / "out.zarr") == sha256_tree(tmp_path / "straight.zarr")
    assert len(set(read[1:])) < len(LENGTHS) and not any((tmp_path / "s").iterdir())


def test_changed_work_does_not_go_on_with_the_old(tmp_path: Path) -> None:
    source = Slow(LENGTHS)
    plan, shapes = conversion.Plan.of(source, SETTINGS)
    other = SETTINGS.model_copy(update={"chunk_frames": 8})
    changed = [*shapes[:-1], EpisodeShape(shapes[-1].steps, stamp="edited")]
    keys = {plan.key(shapes), conversion.Plan.of(source, other)[0].key(shapes), plan.key(changed)}
    assert len(keys) == 3 and plan.key(shapes) == conversion.Plan.of(source, SETTINGS)[0].key(shapes)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    plan, shapes = conversion.Plan.of(two_tasks(), SETTINGS)
    said = f"process {os.getpid()} is doing the same work; wait for it"
    with locked(tmp_path / f"{plan.key(shapes)}.lock"), refused(said):
        convert(two_tasks(), tmp_path / "out.zarr", SETTINGS, 0, 1, tmp_path)
    assert not (tmp_path / "out.zarr").exists()


def test_an_error_in_a_worker_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    episodes = [make_episode("push", 600, k) for k in range(4)]
    actions = episodes[2].actions
    actions[5, 1] = np.nan
    with refused(r"actions\[5, 1\] is nan, expected a finite number"):
        convert(Recorded(episodes), tmp_path / "out.zarr", SETTINGS, 0, 2, tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["s"] and not any((tmp_path / "s").iterdir())


class Cut(Recorded):
    """Of the last episode the pictures end too early."""

    def read(self, index: int) -> Episode:
        episode = super().read(index)
        return episode if index < len(self) - 1 else dataclasses.replace(episode, frames=dict.fromkeys(CAMERAS, self.frames))

    @property
    def frames(self) -> FrameBlocks:
        def blocks() -> Iterator[NDArray[np.uint8]]:
            yield np.zeros((300, 8, 8, 3), np.uint8)
            raise FileError("x.mp4: truncated")

        return FrameBlocks((600, 8, 8, 3), blocks)


@pytest.mark.parametrize("drop, workers", [([], 1), ([0], 2), ([0, 1, 2], 1)])
def test_a_file_that_breaks_while_it_is_read_is_told_with_the_way_out(tmp_path: Path, drop: list[int], workers: int) -> None:
    """By the episode's number in the source."""
    settings = SETTINGS.model_copy(update={"drop": drop})
    source = ChosenEpisodes(Cut([make_episode("push", 600, k) for k in range(4)]), settings)
    with refused(r"^x.mp4: truncated; mend episode 3, or leave it out: convert.drop: \[3\]$"):
        convert(source, tmp_path / "out.zarr", settings, 0, workers, tmp_path / "s")


def test_an_episode_of_another_kind_is_told_with_the_way_out(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"drop": [1]})
    odd = make_episode("push", 9, 3, size=6)
    source = ChosenEpisodes(Recorded([*(make_episode("push", 9, k) for k in range(3)), odd]), settings)
    with refused(r"push/3: frames/front differs .*; convert.image_size makes .*; mend episode 3, .* convert.drop: \[3\]$"):
        convert(source, tmp_path / "out.zarr", settings, 0)


def test_large_pictures_are_fewer_in_a_chunk(tmp_path: Path) -> None:
    """A chunk is no larger than a file may be, nor is it empty."""
    for pictures, rows in ((2.5, 2), (0.5, 1)):
        settings = SETTINGS.model_copy(update={"shard_megabytes": pictures * 192 / 2**20})
        source = Recorded([make_episode("push", 7, k) for k in range(3)])
        layout = conversion.Plan.of(source, settings)[0].layouts["frames/front"]
        assert (layout.chunk_rows, layout.shard_rows) == (rows, rows)
        convert(source, tmp_path / "s.zarr", settings, seed=0)
        store = open_store(tmp_path / "s.zarr")
        np.testing.assert_array_equal(store.frames(np.arange(*store.bounds(1)), "front"), source.episodes[1].frames["front"])


@pytest.mark.parametrize("count, message", [(6, "6 frames, expected 9"), (12, "more than 9 frames, expected 9")])
def test_blocks_must_add_up(tmp_path: Path, count: int, message: str) -> None:
    source = two_tasks()
    frames = FrameBlocks((9, 8, 8, 3), lambda: iter([np.zeros((3, 8, 8, 3), np.uint8)] * (count // 3)))
    wrong = source.changed(0, frames=dict.fromkeys(CAMERAS, frames))
    with refused(f"push/0: frames/front: {message}; mend episode 0, or leave it out"):
        convert(wrong, tmp_path / "out.zarr", SETTINGS, 0)


class OneCamera(Recorded):
    """Its episodes hold one more than it describes."""

    def describe(self) -> SourceDescription:
        return super().describe().model_copy(update={"cameras": ["wrist"]})


def test_cameras_are_chosen_and_frames_resized(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"image_size": [4, 2], "crop": "centre"})
    source = OneCamera(two_tasks().episodes)
    convert(source, tmp_path / "s.zarr", settings, seed=0)
    store = open_store(tmp_path / "s.zarr")
    assert store.cameras == ["wrist"] and store.image_size == (4, 2)
    # 8x8 cut to its middle 8x4, then halved: bilinear with full support weighs a 4x4 footprint 1, 3, 3, 1
    wrist = np.asarray(source.episodes[3].frames["wrist"])
    expected = resize_frames(wrist, settings)
    np.testing.assert_array_equal(store.frames(np.arange(*store.bounds(3))), expected)
    flat = np.full((1, 8, 8, 3), 7, np.uint8)
    flat[:, :, :2] = flat[:, :, 6:] = 255  # outside the box: must not bleed in
    assert (resize_frames(flat, settings) == 7).all()
    depth = store.annotation("depth")
    assert depth is not None and depth.values(np.array([0])).shape == (1, 4, 2)
    labels = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
    assert set(resize_labels(labels, settings).ravel().tolist()) <= set(labels[:, :, 2:6].ravel().tolist())


def test_a_store_without_actions_says_what_it_is_for(tmp_path: Path) -> None:
    source = Recorded([make_episode("push", 12, k) for k in range(4)])
    for k in range(4):
        source = source.changed(k, actions=None, expert_actions=None)
    convert(source, tmp_path / "s.zarr", SETTINGS, seed=0)
    store = open_store(tmp_path / "s.zarr")
    assert not store.has("actions") and store.frames(np.arange(3)).shape == (3, 8, 8, 3)
    for ask in (lambda: store.statistics, lambda: store.action_dimensions, lambda: store.vector("actions", np.arange(1))):
        with refused("no actions|no vector 'actions'"):
            ask()


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_truncated_piece_is_noticed(tmp_path: Path, share: float) -> None:
    plan, shapes = conversion.Plan.of(Slow(LENGTHS), SETTINGS)
    work = conversion._Work(plan, tmp_path / plan.key(shapes))
    for name in plan.layouts:
        work.array(name).create()
    for number in range(len(plan.units)):
        work.write_unit(number)
    file = sorted(work.unit(1).glob("*.npy"))[0]
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with refused("cannot be read .*; run the same command again"):
        convert(Slow(LENGTHS), tmp_path / "out.zarr", SETTINGS, 0, 1, tmp_path)
    convert(Slow(LENGTHS), tmp_path / "out.zarr", SETTINGS, 0, 1, tmp_path)


def test_a_set_that_cannot_be_split_costs_nothing(tmp_path: Path) -> None:
    """All episodes are held out by the source itself, which their lengths say before any but the first is read."""
    read: list[int] = []

    class HeldOut(Slow):
        def shape(self, index: int) -> EpisodeShape:
            return EpisodeShape(self.lengths[index], held_out=True)

        def read(self, index: int) -> Episode:
            read.append(index)
            return super().read(index)

    with refused("own split holds out all 3 chosen episodes"):
        convert(HeldOut([9, 9, 9]), tmp_path / "out.zarr", SETTINGS, 0)
    assert read == [0]


def test_vectors_may_be_kept_in_half_precision(tmp_path: Path) -> None:
    source = two_tasks()
    convert(source, tmp_path / "s.zarr", SETTINGS.model_copy(update={"vector_dtype": "float16"}), seed=0)
    store = open_store(tmp_path / "s.zarr")
    actions = np.concatenate([np.asarray(episode.actions) for episode in source.episodes])
    found = store.vector("actions", np.arange(len(store)))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, actions.astype(np.float16).astype(np.float32))
    assert store.statistics.actions.max == [float(found[store.rows("train")][:, d].max()) for d in range(3)]
    with refused("push/0: actions hold 1e.0., too large for convert.vector_dtype float16; set it to float32"):
        large = source.changed(0, actions=np.full((9, 3), 1e6, np.float32))
        convert(large, tmp_path / "t.zarr", SETTINGS.model_copy(update={"vector_dtype": "float16"}), seed=0)


ALONE = """
import sys
sys.modules["svam"] = None  # any import of it fails
import numpy, zarr
group = zarr.open_group(sys.argv[1], mode="r")
assert sorted(group) == ["actions", "annotations", "episode_checksums", "episode_ends", "episode_split", "episode_task",
                         "expert_actions", "frames", "proprioception"]
for name, array in group["frames"].arrays():
    numpy.save(f"{sys.argv[2]}/{name}.npy", array[:])
numpy.save(f"{sys.argv[2]}/actions.npy", group["actions"][:])
"""


@pytest.mark.parametrize("compression", ["zstd", "lz4", "blosc"])
def test_zarr_alone_opens_a_store(tmp_path: Path, compression: str) -> None:
    """In a process that cannot import this package, and from another folder."""
    source = two_tasks()
    convert(source, tmp_path / "s.zarr", SETTINGS.model_copy(update={"compression": compression}), seed=0)
    store = open_store(tmp_path / "s.zarr")
    subprocess.run([sys.executable, "-I", "-c", ALONE, tmp_path / "s.zarr", tmp_path], cwd=tmp_path, check=True)
    for camera in CAMERAS:
        truth = np.concatenate([np.asarray(episode.frames[camera]) for episode in source.episodes])
        np.testing.assert_array_equal(np.load(tmp_path / f"{camera}.npy"), truth)
        np.testing.assert_array_equal(store.frames(np.arange(len(store))[::-1], camera), truth[::-1])
    np.testing.assert_array_equal(np.load(tmp_path / "actions.npy"), np.concatenate([e.actions for e in source.episodes]))


WITH_IMAGECODECS = """
import imagecodecs.numcodecs, zarr.codecs.numcodecs, zarr.registry
imagecodecs.numcodecs.register_codecs(verbose=False)
class Pictures(zarr.codecs.numcodecs.PCodec, codec_name="imagecodecs_NAME"): pass
zarr.registry.register_codec("numcodecs.imagecodecs_NAME", Pictures)
"""


@pytest.mark.parametrize("compression", ["jpegxl", "webp"])
def test_lossy_frames_state_their_error(tmp_path: Path, compression: str) -> None:
    """zarr and imagecodecs alone read them, after the lines that the page on the store gives."""
    pytest.importorskip("imagecodecs")
    lines = WITH_IMAGECODECS.replace("NAME", compression)
    page = (ROOT / "svam/episodes/README.md").read_text()
    assert all(line.replace(compression, "webp") in page for line in lines.strip().splitlines())
    rng = np.random.default_rng(0)
    smooth = (np.linspace(40, 200, 32)[None, :, None, None] + rng.normal(0, 3, (20, 32, 32, 3))).astype(np.uint8)
    source = Recorded([make_episode("push", 20, k, size=32) for k in range(3)])
    for k in range(3):
        source = source.changed(k, frames=dict.fromkeys(CAMERAS, smooth), annotations={})
    found = []
    for quality in (90, 30):
        settings = SETTINGS.model_copy(update={"compression": compression, "quality": quality})
        convert(source, tmp_path / "s.zarr", settings, seed=0)
        store = open_store(tmp_path / "s.zarr")
        frames, stated = store.frames(np.arange(20)), store.attributes.picture_error
        assert stated is not None and stated["quality"] == quality
        error = np.abs(frames.astype(int) - smooth)[0].mean()  # the first of each episode is measured
        assert 0 < stated["front"]["mean_absolute"] == pytest.approx(error, abs=1e-3) and stated["front"]["pictures"] == 3
        found.append(stated["wrist"]["psnr_db"])
        said = f"{compression} of quality {quality}; mean absolute error and PSNR: front {error:.2f} grey levels, "
        said = f"{said}{found[-1]} dB (3 pictures measured); wrist "
        assert said in invoke(app, "inspect", tmp_path / "s.zarr").stdout.replace("\n", " ")
        code = lines + ALONE.replace('"annotations", ', "")
        subprocess.run([sys.executable, "-I", "-c", code, tmp_path / "s.zarr", tmp_path], cwd=tmp_path, check=True)
        np.testing.assert_array_equal(np.load(tmp_path / "front.npy")[:20], frames)
        checks = validate(tmp_path / "s.zarr")
        assert [check.name for check in checks if check.faults] in ([], ["duplicates"])
    assert found[0] > found[1] > 20
