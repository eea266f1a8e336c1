"""Keyed chunks: every frame exact in any order, for zarr too (what damage does: `test_reader_faults.py`)."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from svam.contract import ContractError
from svam.episodes import lz4_blocks
from svam.episodes.rows import RowReader
from svam.episodes.shards import Layout
from tests.recorded import write_rows

Pictures = NDArray[np.uint8]


def moving(count: int, height: int, width: int, seed: int = 0) -> Pictures:
    """A still scene with a small square that moves one pixel a frame."""
    rng = np.random.default_rng(seed)
    frames = np.repeat(rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8), count, axis=0)
    for t, frame in enumerate(frames):
        frame[t % (height - 3) : t % (height - 3) + 3, t % (width - 3) : t % (width - 3) + 3] = 255
    return frames


def write(path: Path, frames: Pictures, chunk: int = 64, shard_bytes: float = 2**30) -> RowReader:
    return write_rows(path, frames, Layout.of(frames.shape[1:], np.uint8, chunk, shard_bytes, len(frames), "keyed"))


@pytest.mark.parametrize("decompress", [lz4_blocks.decompress_to, lz4_blocks.decompress_through_bytes])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (96, 96), (145, 150), (128, 171), (256, 256)])
def test_every_frame_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, height: int, width: int, decompress: lz4_blocks.DecompressTo
) -> None:
    """Of scenes that move little, of noise between them, and where the last chunk is not full; in a worker's copy, too."""
    monkeypatch.setattr(lz4_blocks, "decompress_to", decompress)
    noise = np.random.default_rng(1).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    frames = np.concatenate([moving(20, height, width), noise, moving(18, height, width, 2)])
    reader = write(tmp_path / "a", frames, chunk=32)
    rng = np.random.default_rng(0)
    some = rng.integers(0, len(frames), 30)
    for rows in (np.arange(len(frames)), np.arange(40, -1, -3), np.arange(1, 41, 4), some, np.sort(some), np.array([33])):
        np.testing.assert_array_equal(reader.read(rows), frames[rows])
    out = np.empty((5, height, width, 3), np.uint8)
    assert reader.read(np.array([30, 31, 32, 33, 0]), out) is out
    np.testing.assert_array_equal(out, frames[[30, 31, 32, 33, 0]])
    np.testing.assert_array_equal(copy.deepcopy(reader).read(np.arange(40, -1, -1)), frames[::-1])
    with pytest.raises(ContractError, match=r"rows 0\.\.41 asked for, there are 0\.\.40"):
        reader.read(np.array([0, 41]))


def test_zarr_reads_and_writes_it(tmp_path: Path) -> None:
    """In a process that knows nothing of this package but what is installed; the same bytes as ours."""
    frames = moving(70, 40, 24)
    write(tmp_path / "ours", frames, chunk=16, shard_bytes=frames[:32].nbytes)
    np.save(tmp_path / "frames.npy", frames)
    program = (
        "import sys, numpy, zarr\n"
        "folder = sys.argv[1]\n"
        "ours, frames = zarr.open_array(folder + '/ours', mode='r'), numpy.load(folder + '/frames.npy')\n"
        "assert (ours[:] == frames).all() and (ours[3:60:4] == frames[3:60:4]).all()\n"
        "assert not any(name.startswith('svam.episodes.rows') for name in sys.modules)\n"
        "zarr.config.set({'array.write_empty_chunks': True})\n"
        "zarr.create_array(folder + '/zarrs', data=frames, chunks=ours.chunks, shards=ours.shards,\n"
        "                  serializer=ours.metadata.codecs[0].codecs[0], filters=[], compressors=[])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = RowReader(tmp_path / "ours"), RowReader(tmp_path / "zarrs")
    np.testing.assert_array_equal(theirs.read_range(0, 70), frames)
    assert [theirs.encoded(chunk) for chunk in range(5)] == [ours.encoded(chunk) for chunk in range(5)]
