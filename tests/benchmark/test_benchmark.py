"""The benchmark measures what it says, and its JSON has the figures; times are not asserted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from stages.benchmark import app
from svam.benchmark.store import repeated
from svam.contract import frame_blocks
from svam.episodes.convert import convert
from svam.files import FileError
from svam.params import load_params
from tests import ROOT
from tests.benchmark.common import check_ratio, measured, refused
from tests.recorded import SETTINGS, Recorded, make_episode

SMALL = {"frames": 60, "conversion_frames": 90, "image_sizes": [16], "clips": 3, "clip_frames": 4, "repeats": 2}


def video(path: Path, frames: NDArray[np.uint8]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_random_clips(tmp_path: Path) -> None:
    path = tmp_path / "episodes.zarr"
    convert(Recorded([make_episode("push", 20 + k, k, size=32) for k in range(4)]), path, SETTINGS, seed=0)
    found = measured("store", tmp_path / "run", {"benchmark": SMALL}, "--episodes", str(path))
    check_ratio(found["ratio"], found["seconds"], "store", "npy")
    text = json.dumps(found["machine"])
    assert re.search(r'"memory_gib": [0-9.]+', text) and str(Path.home()) not in text


def test_conversion_against_decoding(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "videos").mkdir()
    rng = np.random.default_rng(0)
    frames = [np.repeat(rng.integers(0, 256, (n, 1, 1, 3), dtype=np.uint8), 32, 1).repeat(32, 2) for n in (30, 15)]
    for k, film in enumerate(frames):
        video(tmp_path / "videos" / f"{k}.mp4", film)
    video(tmp_path / "videos" / "larger.mp4", np.zeros((5, 48, 64, 3), np.uint8))
    videos = repeated(tmp_path / "videos", tmp_path / "links", 90)
    assert [videos.shape(number).steps for number in range(len(videos))] == [30, 15, 30, 15]
    for number, film in enumerate(frames):
        seen = np.concatenate(list(frame_blocks(videos.read(number).frames["video"])))
        assert np.abs(seen.astype(int) - film).mean() < 3.0  # colours as the video keeps them
    found = measured("conversion", tmp_path / "run", {"benchmark": SMALL | {"videos": str(tmp_path / "videos")}})
    assert found["videos"]["frames"] == 90 and found["videos"]["size"] == [32, 32]
    assert set(found["ratios"]) == {"convert", "convert_16"}
    for name, ratio in found["ratios"].items():
        check_ratio(ratio, found["seconds"], "decode", name)
    assert "expected a folder of mp4 files" in refused("conversion", tmp_path / "none", {"benchmark": SMALL}, capfd)


def test_what_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no mp4 file with a frame below it"):
        repeated(tmp_path, tmp_path / "links", 10)
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    with pytest.raises(FileError, match=r"a\.mp4: truncated, damaged or no video") as error:
        repeated(tmp_path, tmp_path / "links", 10)
    assert "\n" not in str(error.value)


def test_a_part_that_is_none(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["nothing", str(tmp_path / "out.json"), "--params", str(ROOT / "params.yaml")])
    assert done.exit_code == 2 and "'nothing' is not one of 'store'" in done.output and not (tmp_path / "out.json").exists()
    assert load_params(ROOT / "params.yaml").benchmark.parts == []
