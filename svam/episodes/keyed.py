"""Keyed LZ4: pictures of which any few can be decoded without the rest of their chunk, though they share what repeats.

The first frame of a chunk is compressed alone: it is a key. The following ones are compressed with a key as LZ4's dictionary
and hold little more than what moved; a frame that the key does not help (the next episode begins, or a camera's noise is all
there is) becomes the next key, compressed alone. After `KEY_EVERY` frames the next one becomes the key too, itself compressed
with the last. So to decode a frame takes a few keys, never the frames beside it.

A chunk of k frames of F bytes, each cut into B bands of ceil(F / B) bytes (LZ4 reaches 64 KB back, B = ceil(F / 65,535)):

    k x (2 + B) uint32, little endian     1 + the frame that is its dictionary (an earlier one), or 0; offset of its bands in
                                          the chunk; stored size of each band
    uint32                                CRC-32C of the above
    bands of all frames                   an LZ4 block, whose dictionary is the same band of the other frame, and its CRC-32C

Frames lie in the order of `_stored_order`: frames at equal distances, which clips with a stride ask for, are neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
from lz4 import block as lz4_block
from numpy.typing import NDArray

from svam.files import FileError

if TYPE_CHECKING:
    from svam.episodes.chunks import ShardFile

CODEC = "svam.keyed_lz4"
"""The codec's name in `zarr.json`."""
KEYED_FRAMES, KEY_EVERY = 64, 16
LEVEL = 5
_HELPS = 0.7
"""A key helps while a frame takes at most this share of what the key's last frame without a dictionary took."""
_MOST_BAND = 65535
_READ_BYTES = 1 << 16
"""Neighbouring frames are read in one call up to this many bytes."""
_DIRECTORIES_BYTES = 4 << 20
"""Of the directories of chunks read last a reader keeps so many bytes: those of 300,000 frames of 128 px."""

Directory = NDArray[np.uint32]


def band_edges(frame_bytes: int) -> list[tuple[int, int]]:
    """(first byte, end) of each band of a frame."""
    count = -(-frame_bytes // _MOST_BAND)
    width = -(-frame_bytes // count)
    return [(start, min(start + width, frame_bytes)) for start in range(0, frame_bytes, width)]


def _stored_order(frames: int) -> list[int]:
    """Frames by their number modulo 8, of which 0, 4, 2, 6, 1, 5, 3, 7 follow one another, then by number: every 2nd, 4th or
    8th frame of a chunk lies in one piece or two, and one read fetches it."""
    return [frame for rest in (0, 4, 2, 6, 1, 5, 3, 7) for frame in range(rest, frames, 8)]


def _pack(band: bytes, dictionary: bytes | None) -> bytes:
    options = {} if dictionary is None else {"dict": dictionary}
    data: bytes = lz4_block.compress(band, mode="high_compression", compression=LEVEL, store_size=False, **options)
    crc: bytes = google_crc32c.value(data).to_bytes(4, "little")
    return data + crc


def encode(frames: NDArray[np.uint8]) -> bytes:
    """One chunk of pictures (k, H, W, C) uint8 as it is stored."""
    k = len(frames)
    edges = band_edges(frames[0].nbytes)
    cut = [[row[start:end].tobytes() for start, end in edges] for row in np.ascontiguousarray(frames).reshape(k, -1)]
    stored: list[list[bytes]] = []
    references = []
    key, alone = -1, 0
    for frame, bands in enumerate(cut):
        packed, reference = [], -1
        if key >= 0:
            packed, reference = [_pack(*pair) for pair in zip(bands, cut[key], strict=True)], key
        if key < 0 or sum(map(len, packed)) > _HELPS * alone:
            packed, reference = [_pack(band, None) for band in bands], -1
            key, alone = frame, sum(map(len, packed))
        elif frame - key >= KEY_EVERY:
            key = frame
        stored.append(packed)
        references.append(reference)
    directory = np.zeros((k, 2 + len(edges)), dtype="<u4")
    order = _stored_order(k)
    offset = directory.nbytes + 4
    for frame in order:
        directory[frame] = [references[frame] + 1, offset, *map(len, stored[frame])]
        offset += sum(map(len, stored[frame]))
    head = directory.tobytes()
    return b"".join([head, google_crc32c.value(head).to_bytes(4, "little"), *itertools.chain(*(stored[f] for f in order))])


def directory_bytes(frames: int, frame_bytes: int) -> int:
    """How many bytes a chunk's directory and its CRC-32C take."""
    return frames * (2 + len(band_edges(frame_bytes))) * 4 + 4


def directory_of(head: bytes, frames: int, frame_bytes: int, chunk_bytes: int) -> Directory:
    """The directory (k, 2 + B), from the `directory_bytes` at a chunk's beginning.

    Raises:
        ValueError: it is damaged, or not that of a chunk of `chunk_bytes` bytes.
    """
    whole_head = len(head) == directory_bytes(frames, frame_bytes)
    if not whole_head or google_crc32c.value(head[:-4]) != int.from_bytes(head[-4:], "little"):
        raise ValueError("the CRC-32C of its directory differs")
    directory = np.frombuffer(head[:-4], dtype="<u4").reshape(frames, -1)
    whole = directory.astype(np.int64)
    earlier = (whole[:, 0] <= np.arange(frames)).all()
    inside = (whole[:, 1] >= len(head)).all() and (whole[:, 1] + whole[:, 2:].sum(axis=1) <= chunk_bytes).all()
    if not earlier or not inside or (whole[:, 2:] < 4).any():
        raise ValueError("its directory contradicts itself")
    return directory


@dataclass(frozen=True)
class Part:
    """What some frames of one chunk take: they and the keys they rest on.

    `order`: frames in the order of decoding, as they are stored but keys first; `runs`: (offset, end) in the chunk of what is
    read in one call; `places`: for each frame its run and where it begins in it; `entries`: the directory's rows as lists.
    """

    entries: list[list[int]]
    order: list[int]
    runs: list[tuple[int, int]]
    places: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, directory: Directory, wanted: Iterable[int]) -> Part:
        """Of the frames `wanted`."""
        entries: list[list[int]] = directory.tolist()
        needed = set(wanted)
        for frame in list(needed):
            while (frame := entries[frame][0] - 1) >= 0 and frame not in needed:
                needed.add(frame)
        stored = sorted(needed, key=lambda frame: entries[frame][1])
        runs: list[tuple[int, int]] = []
        places: dict[int, tuple[int, int]] = {}
        for frame in stored:
            _, offset, *sizes = entries[frame]
            end = offset + sum(sizes)
            if runs and runs[-1][1] == offset and end - runs[-1][0] <= _READ_BYTES:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((offset, end))
            places[frame] = len(runs) - 1, offset - runs[-1][0]
        order: dict[int, None] = {}
        for frame in stored:
            chain = []
            while frame >= 0 and frame not in order:
                chain.append(frame)
                frame = entries[frame][0] - 1
            order.update(dict.fromkeys(reversed(chain)))
        return cls(entries, list(order), runs, places)

    def decode(
        self, read: Callable[[int, int], bytes], frame_bytes: int, targets: Mapping[int, Sequence[int]], out: memoryview
    ) -> None:
        """Decode the frames of `targets` (frame -> its rows) into `out`, rows of `frame_bytes` bytes.

        `read`: gives the bytes of a run, (offset, end) in the chunk; called when the run's first frame is decoded, so that the
        disk goes on meanwhile.

        Raises:
            ValueError: a band is damaged.
        """
        edges = band_edges(frame_bytes)
        keys = {self.entries[frame][0] - 1 for frame in self.order}
        decoded: dict[int, list[bytes]] = {}
        blocks: dict[int, bytes] = {}
        crc, decompress = google_crc32c.value, lz4_block.decompress
        for frame in self.order:
            reference, _, *sizes = self.entries[frame]
            run, at = self.places[frame]
            if (data := blocks.get(run)) is None:
                data = blocks[run] = read(*self.runs[run])
            known = decoded[reference - 1] if reference else None
            bands = []
            for band, ((first, last), size) in enumerate(zip(edges, sizes, strict=True)):
                body, stated = data[at : at + size - 4], data[at + size - 4 : at + size]
                at += size
                if crc(body) != int.from_bytes(stated, "little"):
                    raise ValueError(f"the CRC-32C of frame {frame} differs")
                length = last - first
                try:
                    if known is None:
                        values = decompress(body, uncompressed_size=length)
                    else:
                        values = decompress(body, uncompressed_size=length, dict=known[band])
                except lz4_block.LZ4BlockError as error:
                    raise ValueError(f"frame {frame}: {error}") from None
                if len(values) != length:
                    raise ValueError(f"frame {frame} has {len(values)} bytes in a band, expected {length}")
                for row in targets.get(frame, ()):
                    out[row * frame_bytes + first : row * frame_bytes + last] = values
                bands.append(values)
            if frame in keys:
                decoded[frame] = bands


def decode(data: NDArray[np.uint8], out: NDArray[Any]) -> None:
    """Decode all of a chunk into C-contiguous `out` (k, H, W, C).

    Raises:
        ValueError: it is damaged, or another chunk.
    """
    whole, frame_bytes = data.tobytes(), out[0].nbytes
    directory = directory_of(whole[: directory_bytes(len(out), frame_bytes)], len(out), frame_bytes, len(whole))
    part = Part.of(directory, range(len(out)))
    targets = {frame: [frame] for frame in range(len(out))}
    part.decode(lambda start, end: whole[start:end], frame_bytes, targets, out.reshape(-1).view(np.uint8).data)


@dataclass(frozen=True)
class Touched:
    """Frames to read out of one chunk: its number in the array, the shard it lies in, its offset and size there; `targets`,
    for each frame of the chunk that is asked for the rows of the result."""

    number: int
    file: ShardFile
    offset: int
    size: int
    targets: dict[int, list[int]]

    def read(self, start: int, end: int) -> bytes:
        """The chunk's bytes from `start` to `end`; raises `FileError` where the shard has fewer."""
        return self.file.read(self.offset + start, end - start)


class KeyedReader:
    """Reads frames out of the keyed chunks of one array, and nothing that they do not rest on."""

    def __init__(self, frames: int, frame_bytes: int) -> None:
        self._frames, self._frame_bytes = frames, frame_bytes
        self._head = directory_bytes(frames, frame_bytes)
        self._most = max(16, _DIRECTORIES_BYTES // self._head)
        self._directories: dict[int, Directory] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_directories": {}}

    def _directory(self, chunk: Touched) -> Directory:
        found = self._directories.get(chunk.number)
        if found is None:
            head = chunk.read(0, min(self._head, chunk.size))
            found = directory_of(head, self._frames, self._frame_bytes, chunk.size)
            for oldest in list(itertools.islice(self._directories, max(0, len(self._directories) + 1 - self._most))):
                self._directories.pop(oldest, None)
            self._directories[chunk.number] = found
        return found

    def parts(self, touched: list[Touched]) -> list[Part]:
        """What is to be read of each chunk.

        Raises:
            FileError: a chunk is damaged.
        """
        unknown = [chunk for chunk in touched if chunk.number not in self._directories]
        if len(unknown) > 1:
            for chunk in unknown:
                chunk.file.announce([(chunk.offset, chunk.offset + self._head)])
        found = []
        for chunk in touched:
            try:
                found.append(Part.of(self._directory(chunk), chunk.targets))
            except ValueError as error:
                raise damaged(chunk, error) from None
        return found

    def read(self, touched: list[Touched], out: NDArray[np.uint8]) -> None:
        """Read into C-contiguous `out` (n, H, W, C), whose rows are the targets.

        Raises:
            FileError: a shard is truncated, or a chunk damaged.
        """
        room = out.reshape(-1).data
        parts = self.parts(touched)
        if sum(len(part.runs) for part in parts) > 1:  # the disk can fetch all of them at once
            for chunk, part in zip(touched, parts, strict=True):
                chunk.file.announce([(chunk.offset + start, chunk.offset + end) for start, end in part.runs])
        for chunk, part in zip(touched, parts, strict=True):
            try:
                part.decode(chunk.read, self._frame_bytes, chunk.targets, room)
            except ValueError as error:
                raise damaged(chunk, error) from None


def damaged(chunk: Touched, error: Exception) -> FileError:
    """One sentence about a chunk that cannot be decoded."""
    return FileError(f"{chunk.file.name}: the chunk at byte {chunk.offset} is damaged ({error})")
