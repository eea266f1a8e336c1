"""The benchmark measures what it says: every reader returns the clip, and its JSON has the figures; times are not asserted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from typer.testing import CliRunner

from stages.benchmark import app
from svam.benchmark import peers, recordings
from svam.benchmark.parts import PARTS, part_named
from svam.benchmark.timing import summary
from svam.contract import ContractError
from svam.episodes.convert import convert
from svam.files import FileError
from svam.params import Benchmark, load_params
from tests import ROOT
from tests.benchmark.common import check_ratio, measured, refused
from tests.recorded import SETTINGS, Recorded, make_episode

SMALL = {
    "frames": 60, "conversion_frames": 90, "image_sizes": [32], "clips": 3, "clip_frames": 4, "strides": [2], "repeats": 2,
    "workers": [1, 2],
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "episodes.zarr"
    convert(Recorded([make_episode("push", 20 + k, k, size=32) for k in range(4)]), path, SETTINGS, seed=0)
    return path


@pytest.fixture(scope="module")
def recording(store: Path, tmp_path_factory: pytest.TempPathFactory) -> recordings.Recording:
    return recordings.from_store(store, tmp_path_factory.mktemp("recording"), 60, 32)[0]


def run(part: str, store: Path, folder: Path) -> dict[str, Any]:
    found = measured(part, folder, {"benchmark": SMALL}, "--episodes", str(store))
    text = json.dumps(found["machine"])
    assert re.search(r'"memory_gib": [0-9.]+', text) and str(Path.home()) not in text
    return found


def test_clips(store: Path, tmp_path: Path) -> None:
    found = run("store", store, tmp_path)
    assert len(found["results"]) == 4
    for result in found["results"]:
        assert result["data"]["image_size"] == [32, 32] and result["stride"] == 2
        floors = {"floor_decompress", "floor_decompress_lz4", "floor_zstd", "floor_read", "floor_read_lz4", "floor_memcpy"}
        peers = {"store_lz4", "zarr_on_store", "zarr_v2_blosc", "mp4_h264", "mp4_av1", "npy_per_sample", *floors}
        assert set(result["times_as_long"]) == peers and set(result["milliseconds"]) == {"store", *peers}
        assert set(result["data"]["megabytes"]) == {"store"} | {n for n in peers - floors if n != "zarr_on_store"}
        exact = {name: value == 0 for name, value in result["difference"].items()}
        assert exact == {name: not name.startswith("mp4") for name in exact} and "store" in exact
    assert {(r["workers"], r["cache"]) for r in found["results"]} == {(n, c) for n in (1, 2) for c in ("warm", "cold")}


def test_memory_and_conversion(store: Path, tmp_path: Path) -> None:
    found = run("memory", store, tmp_path)
    assert [r["what"] for r in found["results"]] == ["convert", "read"]
    assert all(r["ratio"] > 0 and len(r["mebibytes"]) == 2 for r in found["results"])
    found = run("conversion", store, tmp_path)
    assert set(found["results"][0]["frames_per_second"]) == {"1", "2"}


@pytest.mark.parametrize("stride", [1, 3])
def test_every_reader_gives_the_recorded_clip(recording: recordings.Recording, tmp_path: Path, stride: int) -> None:
    rows = recordings.draw_clips(recording, 5, 4, stride)
    frames, actions, ends = recording.whole(), recording.whole_actions(), recording.ends
    samples = peers.Samples(tmp_path / "samples", tuple(ends.tolist()), 6)
    recordings.write_samples(recording, rows, 6, samples.folder)
    convert(recording, tmp_path / "store", SETTINGS, seed=0)
    readers: list[Any] = [
        peers.ReplayBuffer(tmp_path / "replay", samples), peers.VideoFiles(tmp_path / "video", samples, "libx264", crf=1),
        peers.StoreClips(tmp_path / "store", samples), peers.ZarrClips(tmp_path / "store", samples), peers.RawFiles(samples),
        peers.Copying(samples),
    ]  # fmt: skip
    for reader in readers:
        if hasattr(reader, "write"):
            reader.write(recording)
        read = reader.open()
        for i in range(5):
            clip, chunk = read(i)
            assert reader.name.startswith("floor") or all(file.is_file() for file in reader.files(i))
            episode = int(np.searchsorted(ends, rows[i, 0], side="right"))
            expected = actions[np.minimum(np.arange(rows[i, 0], rows[i, 0] + 6), ends[episode] - 1)]
            np.testing.assert_array_equal(chunk, expected)
            if reader.name.startswith("mp4"):  # noise survives no video codec: the right frame is the nearest one
                error = np.abs(clip[:, None].astype(np.float32) - frames[None, :]).mean(axis=(2, 3, 4))
                np.testing.assert_array_equal(error.argmin(axis=1), rows[i])
            else:
                np.testing.assert_array_equal(clip, frames[rows[i]])


def test_clips_stay_within_their_episodes(recording: recordings.Recording) -> None:
    rows = recordings.draw_clips(recording, 200, 4, 3)
    first, last = (np.searchsorted(recording.ends, rows[:, i], side="right") for i in (0, -1))
    np.testing.assert_array_equal(first, last)
    assert (np.diff(rows, axis=1) == 3).all() and len(np.unique(first)) == len(recording.steps)
    with pytest.raises(ContractError, match="the longest episode has 22 steps"):
        recordings.draw_clips(recording, 1, 16, 2)


def test_real_video(tmp_path: Path) -> None:
    folder = ROOT.parent / "shared/realdata/lerobot_v2.1/cr5_grasp_cube"
    if not folder.is_dir():
        pytest.skip("shared/realdata is not beside this checkout")
    recording, described = recordings.from_videos(folder, tmp_path / "recording", 10, 96)
    assert described["name"] == "cr5_grasp_cube, decoded from libdav1d" and described["image_size"] == [96, 96]
    assert described["episodes"] == 1 and recording.whole().std() > 10


def test_what_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no mp4 file below it"):
        recordings.from_videos(tmp_path, tmp_path / "recording", 10, 96)
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    with pytest.raises(FileError, match=r"a\.mp4: cannot be decoded as video") as error:
        recordings.from_videos(tmp_path, tmp_path / "recording", 10, 96)
    assert "\n" not in str(error.value)


def test_ratios_are_paired() -> None:
    found = summary({"store": [1.0, 2.0, 4.0], "peer": [2.0, 4.0, 4.0]}, "store")
    assert found["times_as_long"] == {"peer": 2.0} and found["times_as_long_range"] == {"peer": [1.0, 2.0]}
    assert found["milliseconds"] == {"store": 2000.0, "peer": 4000.0}


def test_a_part_that_is_none(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["nothing", str(tmp_path / "out.json"), "--params", str(ROOT / "params.yaml")])
    assert done.exit_code == 1 and not (tmp_path / "out.json").exists()
    assert load_params(ROOT / "params.yaml").benchmark.parts == []


def test_every_part_can_be_asked_for() -> None:
    assert len({part_named(name) for name in PARTS}) == len(PARTS)
    (listed,) = get_args(Benchmark.model_fields["parts"].annotation)
    assert set(get_args(listed)) == set(PARTS) - {"repro"}  # which is no stage


def test_every_renderer_draws_the_same_episodes(tmp_path: Path) -> None:
    benchmark = {"rendered_task": "window-close", "rendered_sizes": [32], "rendered_frames": 2, "repeats": 1}
    found = measured("rendering", tmp_path, {"benchmark": benchmark})
    (result,) = found["results"]
    assert result["image_size"] == 32 and found["camera"] == "corner2" and found["task"] == "window-close"
    assert result["difference_in_state"] == {"fast": 0.0, "full": 0.0}
    assert result["difference_in_grey_levels"]["full"] < 1.0  # the same look, but for how edges are smoothed
    assert 0.0 < result["difference_in_grey_levels"]["fast"] < 30.0  # no shadows
    for style in ("fast", "full"):
        check_ratio(result["ratios"][style], result["seconds"], "gymnasium", style)
    rates = {style: 2 / seconds[0] for style, seconds in result["seconds"].items()}
    assert result["frames_per_second"] == pytest.approx(rates, rel=0.01)


def test_an_unknown_task_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = refused("rendering", tmp_path, {"benchmark": {"rendered_task": "window-clothes"}}, capfd)
    assert said.startswith("unknown MetaWorld task 'window-clothes': did you mean window-close")
