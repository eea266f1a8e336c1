"""Keyed chunks: exact, of any few frames, reading nothing else; for zarr too; and never other values."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from svam.contract import ContractError
from svam.episodes import keyed, keyed_reader, lz4_blocks
from svam.episodes.chunks import ShardFile
from svam.episodes.rows import RowReader
from svam.episodes.shards import Layout
from svam.files import FileError
from tests.recorded import write_rows

Pictures = NDArray[np.uint8]


def moving(count: int, height: int, width: int, seed: int = 0) -> Pictures:
    """A still scene with a small square that moves one pixel a frame."""
    rng = np.random.default_rng(seed)
    frames = np.repeat(rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8), count, axis=0)
    for t, frame in enumerate(frames):
        frame[t % (height - 3) : t % (height - 3) + 3, t % (width - 3) : t % (width - 3) + 3] = 255
    return frames


def noise(count: int, height: int, width: int) -> Pictures:
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write(path: Path, frames: Pictures, chunk: int = 64, shard_bytes: float = 2**30) -> RowReader:
    layout = Layout.of(frames.shape[1:], np.uint8, chunk, shard_bytes, len(frames), "keyed")
    return write_rows(path, frames, layout)


SIZES = pytest.mark.parametrize(
    ("height", "width"), [(8, 8), (96, 96), (145, 150), (128, 171), (256, 256)],
    ids=["small", "27,648 bytes", "65,250 bytes", "65,664 bytes", "256 px"],
)  # fmt: skip
WAYS = pytest.mark.parametrize("decompress", [lz4_blocks.decompress_to, lz4_blocks.decompress_through_bytes])


@WAYS
@SIZES
def test_every_frame_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, height: int, width: int, decompress: lz4_blocks.DecompressTo
) -> None:
    """Whether a frame rests on none, one or two, is cut into bands or not; and where the last chunk is not full."""
    monkeypatch.setattr(lz4_blocks, "decompress_to", decompress)
    frames = np.concatenate([moving(20, height, width), noise(3, height, width), moving(18, height, width, 2)])
    reader = write(tmp_path / "a", frames, chunk=32)
    rng = np.random.default_rng(0)
    some = rng.integers(0, len(frames), 30)
    for rows in (np.arange(len(frames)), np.arange(40, -1, -3), np.arange(1, 41, 4), some, np.sort(some), np.array([33])):
        np.testing.assert_array_equal(reader.read(rows), frames[rows])
    out = np.empty((5, height, width, 3), np.uint8)
    assert reader.read(np.array([30, 31, 32, 33, 0]), out) is out
    np.testing.assert_array_equal(out, frames[[30, 31, 32, 33, 0]])
    with pytest.raises(ContractError, match=r"rows 0\.\.41 asked for, there are 0\.\.40"):
        reader.read(np.array([0, 41]))


def test_the_extension_exports_the_function_of_lz4() -> None:
    """Else frames of this machine are read more slowly than they could be."""
    assert lz4_blocks.decompress_to is not lz4_blocks.decompress_through_bytes


def test_bands_stay_within_the_reach_of_lz4() -> None:
    for size in (1, 65535, 65536, 131070, 131071, 196608):
        edges = keyed.band_edges(size)
        assert edges[0][0] == 0 and edges[-1][1] == size and all(0 < end - start <= 65535 for start, end in edges)
        assert [end for _, end in edges[:-1]] == [start for start, _ in edges[1:]]
    assert len(keyed.band_edges(65535)) == 1 and len(keyed.band_edges(65536)) == 2


def rests_on(frames: Pictures) -> list[tuple[int, ...]]:
    """The keys that each frame is decoded with."""
    data = keyed.encode(frames)
    head = data[: keyed.directory_bytes(len(frames), frames[0].nbytes)]
    return [keyed.keys_of(int(row[0])) for row in keyed.directory_of(head, len(frames), frames[0].nbytes, len(data))]


def test_a_frame_rests_on_few_keys() -> None:
    """Small frames on two, others on the nearest; where a scene is cut, the next one has keys of its own."""
    small = rests_on(np.concatenate([moving(40, 24, 24), moving(24, 24, 24, seed=5)]))
    assert small[20] == () and small[4] == small[36] == (20,)
    assert small[8] == small[12] == (4, 20) and small[0] == (4,) and small[24] == (20, 36)
    assert small[1] == small[3] == (0, 4) and small[21] == small[23] == (20, 24) and small[39] == (36,)
    assert small[52] == () and small[40] == small[48] == (52,) and small[41] == small[43] == (40, 44)

    middle = rests_on(moving(280, 110, 110))
    assert middle[140] == () and middle[12] == middle[268] == (140,)
    assert middle[28] == middle[60] == (12,) and middle[92] == middle[188] == (140,) and middle[220] == (268,)
    assert middle[35] == (28,) and middle[37] == (44,) and middle[133] == (140,) and middle[279] == (268,)

    large = rests_on(moving(90, 150, 150))
    assert large[45] == () and {keys for frame, keys in enumerate(large) if frame != 45} == {(45,)}
    for size in (24, 110, 150):
        assert rests_on(noise(20, size, size)) == [()] * 20


def test_a_clip_reads_its_frames_and_their_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of still scenes that is less than half of the chunk for every 4th frame; of noise not a byte of another frame."""
    asked: list[int] = []
    read_into = ShardFile.read_into

    def counted(self: ShardFile, offset: int, into: memoryview) -> None:
        asked.append(len(into))
        read_into(self, offset, into)

    monkeypatch.setattr(ShardFile, "read_into", counted)
    for name, frames in (("still", moving(64, 110, 110)), ("noise", noise(64, 48, 48))):
        reader = write(tmp_path / name, frames)
        head = keyed.directory_bytes(64, frames[0].nbytes)
        size = len(reader.encoded(0))
        for rows in (np.arange(1, 62, 4), np.arange(3, 19)):
            ((_, part),) = reader.parts(rows)  # reads the directory, the first time
            asked.clear()
            np.testing.assert_array_equal(reader.read(rows), frames[rows])
            assert sum(asked) == sum(sum(sizes) for *_, sizes in part.frames) == part.read_bytes < size - head
            needed = {frame for frame, *_ in part.frames}
            assert needed - set(rows.tolist()) <= ({0, 16, 32, 48} if name == "still" else set())
        asked.clear()
        reader.read(np.arange(1, 62, 4))
        assert len(asked) <= 5  # frames at equal distances lie side by side


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), side=st.sampled_from([12, 110]))
def test_whatever_frames_rest_on(seed: int, side: int) -> None:
    """Another version may choose other keys: on none, one or, where they are small, two, earlier or later."""
    rng = np.random.default_rng(seed)
    frames = moving(20, side, side, seed)
    references: list[tuple[int, ...]] = [()] * 20
    order = rng.permutation(20).tolist()
    for i, frame in enumerate(order):
        most = min(i, 2 if side == 12 else 1)
        references[frame] = tuple(rng.choice(order[:i], rng.integers(0, most + 1), replace=False).tolist()) if i else ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keyed, "_references", lambda _: references)
        data = keyed.encode(frames)
    out = np.empty_like(frames)
    keyed.decode(np.frombuffer(data, np.uint8), out)
    np.testing.assert_array_equal(out, frames)


def test_near_ranges_are_fetched_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = write(tmp_path / "a", moving(8, 8, 8))
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, __: asked.append((start, start + size)))
    reader._shard(0).announce([(0, 10), (10, 20), (20 + 8192, 9000), (9000 + 8193, 20000), (100, 200)])
    assert asked == [(0, 9000), (9000 + 8193, 20000), (100, 200)]


@pytest.mark.parametrize("large", [False, True])
def test_the_disk_is_asked_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    """For all of a small clip at once, for a large one part after part; each byte once, before it is read."""
    frames = noise(30, 256, 256) if large else moving(30, 48, 48)
    reader = write(tmp_path / "a", frames, chunk=15)
    reader.read(np.array([0, 20]))  # directories
    asked: list[tuple[int, int]] = []
    read: list[tuple[int, int]] = []
    waiting: list[int] = []

    def read_into(file: ShardFile, offset: int, into: memoryview) -> None:
        into[:] = file.read(offset, len(into))
        assert any(start <= offset and offset + len(into) <= end for start, end in asked)
        read.append((offset, offset + len(into)))
        waiting.append(size_of(asked) - size_of(read))

    def size_of(ranges: list[tuple[int, int]]) -> int:
        return sum(end - start for start, end in ranges)

    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, __: asked.append((start, start + size)))
    monkeypatch.setattr(ShardFile, "read_into", read_into)
    rows = np.arange(3, 27)
    np.testing.assert_array_equal(reader.read(rows), frames[3:27])
    assert size_of(asked) >= size_of(read) and len(set(read)) == len(read) > 1
    if large:
        limits = keyed_reader._FIRST_BYTES, 2 * keyed_reader._AHEAD_BYTES
        assert waiting[0] <= limits[0] and max(waiting) <= limits[1] + frames[0].nbytes < size_of(read)
        assert size_of(asked) == size_of(read)
    else:
        assert waiting == [size_of(asked) - size_of(read[: n + 1]) for n in range(len(read))]


def test_long_chunks_of_many_keys(tmp_path: Path) -> None:
    """More than a thousand keys: nothing here is as deep as they are many."""
    frames = moving(keyed.frames_of_chunk(192) * 70, 8, 8)
    reader = write(tmp_path / "a", frames, chunk=len(frames))
    np.testing.assert_array_equal(reader.read(np.arange(0, len(frames), 7)), frames[::7])
    with pytest.raises(ValueError, match="65535 frames in a keyed chunk, expected at most 65534"):
        keyed.encode(np.zeros((65535, 1, 1, 3), np.uint8))


def test_directories_that_are_kept_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed_reader, "_DIRECTORIES_BYTES", 1)
    frames = moving(80, 8, 8)
    reader = write(tmp_path / "a", frames, chunk=4)
    np.testing.assert_array_equal(reader.read(np.arange(80)), frames)
    assert reader._keyed is not None and len(reader._keyed._directories) == 16
    np.testing.assert_array_equal(reader.read(np.arange(79, 0, -5)), frames[79:0:-5])


def test_a_copied_reader_opens_its_own_files(tmp_path: Path) -> None:
    """As a data loader's worker gets it."""
    frames = moving(70, 8, 8)
    reader = write(tmp_path / "a", frames)
    reader.read(np.arange(70))
    other = copy.deepcopy(reader)
    assert other._keyed is not None and not other._keyed._directories and not other._files
    np.testing.assert_array_equal(other.read(np.arange(69, -1, -1)), frames[::-1])


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


@WAYS
@settings(deadline=None, max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_chunk_is_an_error(decompress: lz4_blocks.DecompressTo, share: float, bit: int, cut: bool) -> None:
    frames = moving(20, 12, 12)
    data = bytearray(keyed.encode(frames))
    out = np.empty_like(frames)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lz4_blocks, "decompress_to", decompress)
        keyed.decode(np.frombuffer(bytes(data), np.uint8), out)
        np.testing.assert_array_equal(out, frames)
        at = int(share * len(data))
        if cut:
            del data[at:]
        else:
            data[at] ^= 1 << bit
        with pytest.raises(ValueError, match=r"CRC-32C|contradicts itself|damaged"):
            keyed.decode(np.frombuffer(bytes(data), np.uint8), out)


@pytest.mark.parametrize(
    ("frame", "column", "value"),
    [
        (3, 0, 4), (3, 0, 99), (0, 0, 1), (3, 0, 99 << 16 | 1), (3, 0, 1 << 16), (4, 0, 4), (4, 0, 2), (2, 1, 2**32 - 1),
        (2, 1, 0), (5, 2, 2**31), (5, 2, 3),
    ],
    ids=[
        "on itself", "on none", "a key on itself", "a second on none", "a second without a first", "a key on what rests on it",
        "a key on what rests on what rests on it", "behind the chunk", "in the directory", "too large", "too small",
    ],
)  # fmt: skip
def test_a_directory_that_contradicts_itself(tmp_path: Path, frame: int, column: int, value: int) -> None:
    """With a right CRC-32C, as a faulty writer would leave it."""
    frames = moving(8, 12, 12)
    reader = write(tmp_path / "a", frames, chunk=8)
    file = tmp_path / "a" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    head = keyed.directory_bytes(8, 432)
    directory = np.frombuffer(bytes(data[: head - 4]), "<u4").reshape(8, 3).copy()
    directory[frame, column] = value
    data[: head - 4] = directory.tobytes()
    data[head - 4 : head] = google_crc32c.value(directory.tobytes()).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(FileError, match="the chunk at byte 0 is damaged .its directory contradicts itself"):
        RowReader(tmp_path / "a").read(np.arange(8))
    with pytest.raises(FileError, match="the chunk at byte 0 is damaged .its directory contradicts itself"):
        reader.read(np.arange(8))


def test_two_keys_that_are_out_of_reach() -> None:
    frames = moving(8, 110, 110)
    data = bytearray(keyed.encode(frames))
    head = keyed.directory_bytes(8, frames[0].nbytes)
    directory = np.frombuffer(bytes(data[: head - 4]), "<u4").reshape(8, 3).copy()
    directory[0, 0] |= 2 << 16
    data[: head - 4] = directory.tobytes()
    data[head - 4 : head] = google_crc32c.value(directory.tobytes()).to_bytes(4, "little")
    with pytest.raises(ValueError, match="contradicts itself"):
        keyed.decode(np.frombuffer(bytes(data), np.uint8), np.empty_like(frames))


@WAYS
def test_a_band_of_another_length(monkeypatch: pytest.MonkeyPatch, decompress: lz4_blocks.DecompressTo) -> None:
    """A right CRC-32C over an LZ4 block of too few bytes or too many: the frame is not what its shape says."""
    monkeypatch.setattr(lz4_blocks, "decompress_to", decompress)
    data = np.frombuffer(keyed.encode(moving(4, 12, 12)), np.uint8)
    with pytest.raises(ValueError, match="frame 2 has 432 bytes in a band, expected 864 bytes"):
        keyed.decode(data, np.empty((4, 12, 24, 3), np.uint8))
    with pytest.raises(ValueError, match="frame 2 has a band that is damaged or too long, expected 216 bytes"):
        keyed.decode(data, np.empty((4, 12, 6, 3), np.uint8))
