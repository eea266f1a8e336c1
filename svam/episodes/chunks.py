"""Chunks of sharded arrays: the open shard files they lie in, and their decoding. `svam.episodes.rows` reads rows with it.

A shard ends with its index: for each of its chunks offset and size, 2 x uint64, and a CRC-32C of all of them. A chunk carries
a checksum of its own, so that a damaged one is an error and never other values.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
from numcodecs import blosc
from numcodecs.blosc import Blosc
from numcodecs.blosc import decompress as blosc_decompress
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from svam.episodes import keyed
from svam.files import FileError

_EMPTY = 2**64 - 1
"""What a shard's index holds, as offset and as size, for a chunk that was never written."""
ZSTD_LEVEL = 3
_RAW_BYTES = 4 << 20
_PIECE_BYTES = 1 << 19
"""A raw chunk is read and checked in pieces that stay in the processor's cache between the two."""
_GAP_BYTES = 1 << 13
"""What lies between two ranges of a shard that are fetched as one."""
_READ_BYTES = 1 << 16
"""Neighbouring chunks are read in one call up to this many bytes, so that decoding begins before all of them are there."""

Bytes = NDArray[np.uint8]
Decode = Callable[[Bytes, NDArray[Any]], None]
"""Decodes one chunk into a C-contiguous array of its size. Raises ValueError or RuntimeError where it holds anything else."""

Compression = Literal["lz4", "zstd", "keyed"]
"""How pictures are kept: whole chunks by LZ4 or Zstd, their lines interleaved, or `svam.episodes.keyed`."""

# Several threads of Blosc write a chunk's blocks in the order in which they get ready, which differs from run to run; and
# readers are processes, which share the cores already.
blosc.use_threads = False
_PICTURE_BLOCK = 1 << 19
"""Blosc compresses a chunk in blocks; small ones would cut off the earlier frames that a later one repeats."""
CHUNK_FRAMES, CHUNK_ROOM, CHUNK_BYTES = (2, 4, 8, 16), 1.1, 1 << 14
_PICTURE_CODECS: dict[str, Blosc | Zstd] = {
    "lz4": Blosc(cname="lz4hc", clevel=3, shuffle=Blosc.NOSHUFFLE, blocksize=_PICTURE_BLOCK),
    "zstd": Zstd(level=ZSTD_LEVEL, checksum=True),
}

_zstd = Zstd()


def compress(rows: NDArray[Any], compression: Compression | None = None) -> bytes:
    """One chunk (k, ...) as it is stored: pictures (k, H, W, 3) uint8 as `picture_codecs(compression)` have zarr write them,
    any other array (None) as `codecs_for` do.
    """
    if compression == "keyed":
        return keyed.encode(rows)
    if compression is None:
        return bytes(_PICTURE_CODECS["zstd"].encode(rows))
    rows = interleaved(rows)
    data = bytes(_PICTURE_CODECS[compression].encode(rows))
    return data + google_crc32c.value(data).to_bytes(4, "little") if compression == "lz4" else data


def interleaved(frames: NDArray[Any]) -> NDArray[Any]:
    """Frames (k, H, ...) as they are stored, (H, k, ...): the same line of all frames side by side, then the next.

    A camera that stands still repeats its lines from frame to frame. Side by side they lie within LZ4's reach of 64 KB, and
    in the processor's nearest cache, which frames of 49 or 196 KB after one another do not.
    """
    return np.ascontiguousarray(frames.swapaxes(0, 1))


def frames_together(sample: NDArray[np.uint8], compression: Compression) -> int:
    """How many frames to compress together, by a sample (k, H, W, 3) of a camera's: the fewest of `CHUNK_FRAMES` that take at
    most `CHUNK_ROOM` times the bytes of the most, and are not less than `CHUNK_BYTES`.

    Frames of a simulated camera repeat each other, and take nearly half the bytes with every doubling. What most of a real
    camera's bytes hold is its noise, which no neighbour repeats; and the fewer frames have to be decoded beside those of a
    clip, the faster it is read. Keyed chunks need not be decoded whole; see `keyed.frames_of_chunk`.
    """
    if compression == "keyed":
        return keyed.frames_of_chunk(math.prod(sample.shape[1:]))
    most = CHUNK_FRAMES[-1]
    sample = sample[: len(sample) // most * most]
    if not len(sample):
        return most  # too short to tell

    def bytes_of(count: int) -> int:
        return sum(len(compress(sample[i : i + count], compression)) for i in range(0, len(sample), count))

    large = [count for count in CHUNK_FRAMES if sample[:count].nbytes >= CHUNK_BYTES]
    enough = CHUNK_ROOM * bytes_of(most)
    return next((count for count in large if bytes_of(count) <= enough), most)


def picture_codecs(compression: Compression, axes: int) -> dict[str, Any]:
    """The codecs of an array of pictures with `axes` axes in all, as `zarr.create_array` takes them."""
    if compression == "keyed":
        from svam.episodes.zarr_codec import KeyedLz4

        return {"filters": [], "serializer": KeyedLz4(), "compressors": []}
    from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec, ZstdCodec

    filters = [TransposeCodec(order=(1, 0, *range(2, axes)))]
    if compression == "zstd":
        return {"filters": filters, "compressors": [ZstdCodec(level=ZSTD_LEVEL, checksum=True)]}
    lz4 = BloscCodec(cname="lz4hc", clevel=3, shuffle="noshuffle", typesize=1, blocksize=_PICTURE_BLOCK)
    return {"filters": filters, "compressors": [lz4, Crc32cCodec()]}


def zstd_content_size(header: bytes) -> int:
    """The uncompressed size that the beginning of a Zstd frame states; -1 where it states none (RFC 8878, section 3.1.1)."""
    if len(header) < 6 or header[:4] != b"\x28\xb5\x2f\xfd":
        raise ValueError("no Zstd frame begins there")
    flags = header[4]
    single, kind = flags >> 5 & 1, flags >> 6
    if kind == 0 and not single:
        return -1
    start = 6 - single + (0, 1, 2, 4)[flags & 3]
    return int.from_bytes(header[start : start + (1, 2, 4, 8)[kind]], "little") + (256 if kind == 1 else 0)


def _decode_zstd(data: Bytes, out: NDArray[Any]) -> None:
    # The library compares the frame's checksum, but is content with a frame that is shorter than the array.
    if (size := zstd_content_size(data[:18].tobytes())) != out.nbytes:
        raise ValueError(f"{size} bytes when decompressed, expected {out.nbytes}")
    _zstd.decode(data, out=out)


def _without_crc(data: Bytes) -> Bytes:
    """`data` without the CRC-32C at its end, compared."""
    if len(data) < 4 or google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:].tobytes(), "little"):
        raise ValueError("its CRC-32C differs")
    return data[:-4]


def _decode_blosc(data: Bytes, out: NDArray[Any]) -> None:
    body = _without_crc(data)
    if len(body) < 16 or int.from_bytes(body[4:8].tobytes(), "little") != out.nbytes:
        raise ValueError(f"no Blosc frame of {out.nbytes} bytes")
    blosc_decompress(body, out)


DECODERS: dict[tuple[str, ...], Decode | None] = {
    ("bytes", "zstd"): _decode_zstd, ("bytes", "blosc", "crc32c"): _decode_blosc, ("bytes", "crc32c"): None,
    (keyed.CODEC,): keyed.decode,
}  # fmt: skip
"""Names of a chunk's codecs -> how it is decoded; None: it is the values, see `ShardFile.read_raw`. Each has a checksum (Zstd
its own), and any Zarr v3 reader knows all but the keyed one."""


def codecs_for(rounded: bool, chunk_bytes: int) -> list[Any]:
    """What compresses an array's chunks, as zarr takes it.

    Pictures and exact numbers: Zstd. Floats with rounded mantissas hardly compress, but Blosc's bit planes make them smaller
    than Zstd does and are read 1.7 times as fast; from `_RAW_BYTES` on, where a raw file would be read at the speed of memory
    and any decoding several times as slowly, they stay as they are.
    """
    from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

    if not rounded:
        return [ZstdCodec(level=ZSTD_LEVEL, checksum=True)]
    if chunk_bytes >= _RAW_BYTES:
        return [Crc32cCodec()]
    return [BloscCodec(cname="lz4hc", clevel=5, shuffle="bitshuffle"), Crc32cCodec()]


class ShardFile:
    """An open shard and its index; the file is closed when nothing refers to this any more.

    Reads state their position, so that threads, and processes after a fork, may share it.
    """

    def __init__(self, name: Path, chunks: int, used: int, rows: int) -> None:
        """Open `name`, a shard of `chunks` chunks, the first `used` of which must be there. `rows`: the array's, for messages.

        Raises:
            FileError: it is missing, truncated, damaged or incomplete.
        """
        self.name, self._name, self._file = name, str(name), -1
        try:
            self._file = os.open(name, os.O_RDONLY)
            found = os.fstat(self._file)
            self._identity = (found.st_ino, found.st_mtime_ns, found.st_size)
            length = chunks * 16 + 4
            tail = os.pread(self._file, length, found.st_size - length) if found.st_size >= length else b""
        except FileNotFoundError:
            raise FileError(f"{name}: no such file, though the array has {rows} rows") from None
        except OSError as error:
            raise FileError(f"{name}: cannot be read ({error.strerror or error})") from None
        if len(tail) != length or google_crc32c.value(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
            raise FileError(f"{name}: truncated or damaged (the shard's index of {chunks} chunks is not at its end)")
        self._index = np.frombuffer(tail[:-4], dtype="<u8").reshape(chunks, 2)[:used]
        room = found.st_size - length
        if (self._index == _EMPTY).any() or (self._index > room).any() or (self._index.sum(axis=1) > room).any():
            raise FileError(f"{name}: incomplete (a chunk of rows below {rows} is missing)")

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def unchanged(self) -> bool:
        """Whether the name still leads to the file that was opened, as it was then."""
        try:
            found = os.stat(self._name)  # noqa: PTH116 - several times as fast, and done for every read
        except OSError:
            return False
        return self._identity == (found.st_ino, found.st_mtime_ns, found.st_size)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; raises `FileError` where there are fewer."""
        try:
            data = os.pread(self._file, size, offset)
        except OSError as error:
            raise FileError(f"{self.name}: cannot be read ({error.strerror or error})") from None
        if len(data) != size:
            raise FileError(f"{self.name}: truncated or damaged ({len(data)} of {size} bytes at byte {offset})")
        return data

    def read_into(self, offset: int, into: memoryview) -> None:
        """The bytes from `offset` on, as many as `into` has; raises `FileError` where there are fewer."""
        try:
            count = os.preadv(self._file, [into], offset)
        except OSError as error:
            raise FileError(f"{self.name}: cannot be read ({error.strerror or error})") from None
        if count != len(into):
            raise FileError(f"{self.name}: truncated or damaged ({count} of {len(into)} bytes at byte {offset})")

    def read_raw(self, offset: int, size: int, out: NDArray[Any]) -> None:
        """Read the values of an uncompressed chunk into a C-contiguous array.

        Raises:
            ValueError: the chunk is of another size, or its CRC-32C differs.
        """
        view: Bytes = out.reshape(-1).view(np.uint8)
        if size != len(view) + 4:
            raise ValueError(f"{size - 4} bytes, expected {len(view)}")
        fixed, crc = view.view(), 0
        fixed.flags.writeable = False
        for start in range(0, len(view), _PIECE_BYTES):
            end = min(start + _PIECE_BYTES, len(view))
            try:
                count = os.preadv(self._file, [view[start:end].data], offset + start)
            except OSError as error:
                raise ValueError(f"it cannot be read: {error.strerror or error}") from None
            if count != end - start:
                raise ValueError("the file ends within it")
            crc = google_crc32c.extend(crc, fixed[start:end])
        if self.read(offset + len(view), 4) != crc.to_bytes(4, "little"):
            raise ValueError("its CRC-32C differs")

    def places(self, numbers: list[int]) -> list[list[int]]:
        """[offset, size] of some of the shard's chunks."""
        found: list[list[int]] = self._index[numbers].tolist()
        return found

    def chunks(self, numbers: list[int]) -> Iterator[tuple[list[int], Bytes]]:
        """[offset, size] and bytes of some of the chunks, in the order asked for; small neighbours are read together."""
        places = self.places(numbers)
        reads = _neighbours(places, _READ_BYTES)
        if len(reads) > 1:
            self.announce([(offset, offset + size) for offset, size in places])
        for first, end in reads:
            start = places[first][0]
            block = np.frombuffer(self.read(start, sum(places[end - 1]) - start), dtype=np.uint8)
            for offset, size in places[first:end]:
                yield [offset, size], block[offset - start : offset - start + size]

    def announce(self, ranges: list[tuple[int, int]]) -> None:
        """Let the system fetch all of these (offset, end) from the disk at once, while the first ones are decoded.

        A range takes the system and the disk as long as some kilobytes do: near ones are one, up to `_GAP_BYTES` apart.
        """
        if hasattr(os, "posix_fadvise"):  # Linux
            joined: list[tuple[int, int]] = []
            for start, end in ranges:
                if joined and 0 <= start - joined[-1][1] <= _GAP_BYTES:
                    joined[-1] = (joined[-1][0], end)
                else:
                    joined.append((start, end))
            for start, end in joined:
                os.posix_fadvise(self._file, start, end - start, os.POSIX_FADV_WILLNEED)


def _neighbours(places: list[list[int]], most: int) -> list[tuple[int, int]]:
    """(first, end) of runs of chunks, given as [offset, size], that follow one another without a gap: of at most `most` bytes,
    or of one chunk."""
    runs, first = [], 0
    for i in range(1, len(places) + 1):
        apart = i == len(places) or places[i][0] != sum(places[i - 1])
        if apart or sum(places[i]) - places[first][0] > most:
            runs.append((first, i))
            first = i
    return runs
