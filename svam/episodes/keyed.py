"""Keyed LZ4: pictures of which any few can be decoded without the rest of their chunk, though they share what repeats.

Most frames are compressed with another one, their key, as LZ4's dictionary, and hold little more than what moved. Keys are
compressed with keys at a greater distance, and the one in the middle of all of them alone. A frame that has little in common
with those before it (the next episode begins, or a camera's noise is all there is) begins the keys anew. So to decode a frame
takes a few keys, never the frames beside it. `_keys` says which, by the size of the pictures.

A chunk of k frames of F bytes, each cut into B bands of ceil(F / B) bytes (LZ4 reaches 64 KB back, B = ceil(F / 65,535)):

    k x (2 + B) uint32, little endian     in the lower half 1 + the frame that is its dictionary, or 0; in the upper half 1 +
                                          the frame whose bytes follow in the dictionary, or 0 (other than 0 only where two
                                          frames are within reach); offset of its bands in the chunk; stored size of each band
    uint32                                CRC-32C of the above
    bands of all frames                   an LZ4 block, whose dictionary is the same band of the other frames, and its CRC-32C

Frames lie in the order of `_stored_order`: frames at equal distances, which clips with a stride ask for, are neighbours.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from svam.episodes import lz4_blocks
from svam.episodes.memory import page_aligned

CODEC = "svam.keyed_lz4"
"""The codec's name in `zarr.json`."""
MOST_FRAMES = 65534
"""Of a chunk, for their numbers have two bytes."""
LEVEL, LARGE_LEVEL = 5, 9
"""Of LZ4's high compression, for frames of one band and larger ones. Level 9 is read a tenth faster and takes 1 to 3 % fewer
bytes, but compresses at half the speed; of large frames decompressing is nearly all that takes time."""
_ALIKE = 0.35
"""A frame rests on a key that has the same values in this share of its places. Where fewer are the same, a dictionary saves
less than a third of the bytes, and the key would have to be read too."""
_CRC = struct.Struct("<I")
_READ_BYTES = 1 << 17
"""Neighbouring frames are read in one call up to this many bytes."""
_CHUNK_BYTES = 32 << 20
"""Frames of up to this many bytes in all, uncompressed, are kept together, where there is a choice."""
_FARTHEST = 128
"""How far keys are apart that rest on none but the middle frame."""

Directory = NDArray[np.uint32]


def band_edges(frame_bytes: int) -> list[tuple[int, int]]:
    """(first byte, end) of each band of a frame."""
    count = -(-frame_bytes // lz4_blocks.REACH)
    width = -(-frame_bytes // count)
    return [(start, min(start + width, frame_bytes)) for start in range(0, frame_bytes, width)]


def _stored_order(frames: int) -> list[int]:
    """Frames by their number modulo 4, of which 0, 2, 1, 3 follow one another, then by number: every 2nd or 4th frame of a
    chunk lies in one piece or two, which one read fetches, and 16 frames after one another in four."""
    return [frame for rest in (0, 2, 1, 3) for frame in range(rest, frames, 4)]


def frames_of_chunk(frame_bytes: int) -> int:
    """How many frames to keep together, unless somebody says. The more, the fewer clips lie in two chunks, which have keys of
    their own, and the fewer frames are compressed alone; but zarr decodes all of a chunk, and a conversion has it in memory."""
    return 128 if 128 * frame_bytes <= _CHUNK_BYTES else 64


def _paired(frame_bytes: int) -> bool:
    """Whether two frames are within reach."""
    return 2 * frame_bytes <= lz4_blocks.REACH


def _distances(frame_bytes: int) -> tuple[int, ...]:
    """Of keys from one another, the farthest first.

    Fewer levels are fewer keys to decode, more are fewer bytes. Decoding large frames is what takes time; frames of less than
    one band are decoded within microseconds.
    """
    if frame_bytes > lz4_blocks.REACH:
        return (_FARTHEST,)
    return (_FARTHEST, 16, 4) if _paired(frame_bytes) else (_FARTHEST, 16)


def _keys(frame: int, frames: int, frame_bytes: int) -> tuple[int, ...]:
    """The keys that one of `frames` frames, all of them alike, is compressed with.

    The middle frame rests on none, every 128th from there on it. Any other rests on the frame at the next greater distance that
    is nearest to it: every 16th, say, on a 128th. Where two frames are within LZ4's reach it rests on those at both sides of
    it, which takes a sixth fewer bytes and half as many frames again to decode.
    """
    place = frame - frames // 2
    distances = _distances(frame_bytes)
    if place % distances[0] == 0:
        return (frames // 2,) if place else ()
    distance = min(distance for distance in distances if place % distance)
    before = frame - place % distance
    around = [key for key in (before, before + distance) if 0 <= key < frames]
    return tuple(around) if _paired(frame_bytes) else (min(around, key=lambda key: abs(key - frame)),)


def _references(frames: NDArray[np.uint8]) -> list[tuple[int, ...]]:
    """The keys (none, one or two) that each of a chunk's frames (k, H, W, C) is compressed with."""
    flat = frames.reshape(len(frames), -1)
    farthest, *nearer = _distances(flat.shape[1])
    apart = nearer[0] if nearer else farthest // 2  # as far as a frame is from its key, at most
    starts = [0]
    for frame in range(1, len(flat)):
        earlier = frame - 1 - (frame - 1 - starts[-1]) % apart
        if np.count_nonzero(flat[frame] == flat[earlier]) < _ALIKE * flat.shape[1]:
            starts.append(frame)
    found: list[tuple[int, ...]] = []
    for start, end in itertools.pairwise([*starts, len(flat)]):
        alike = (_keys(frame, end - start, flat.shape[1]) for frame in range(end - start))
        found += [tuple(start + key for key in keys) for keys in alike]
    return found


def encode(frames: NDArray[np.uint8]) -> bytes:
    """One chunk of pictures (k, H, W, C) uint8 as it is stored.

    Raises:
        ValueError: there are more than `MOST_FRAMES`.
    """
    k = len(frames)
    if k > MOST_FRAMES:
        raise ValueError(f"{k} frames in a keyed chunk, expected at most {MOST_FRAMES}")
    frames = np.ascontiguousarray(frames)
    edges, flat = band_edges(frames[0].nbytes), frames.reshape(k, -1)
    references, level = _references(frames), LEVEL if len(edges) == 1 else LARGE_LEVEL
    directory = np.zeros((k, 2 + len(edges)), dtype="<u4")
    stored = bytearray(directory.nbytes + 4)
    for frame in _stored_order(k):
        keys, offset, sizes = references[frame], len(stored), []
        for start, end in edges:
            dictionary = b"".join(flat[key, start:end].tobytes() for key in keys)
            block = lz4_blocks.compress(flat[frame, start:end].tobytes(), dictionary, level)
            stored += block
            stored += google_crc32c.value(block).to_bytes(4, "little")
            sizes.append(len(block) + 4)
        directory[frame] = [sum(key + 1 << 16 * i for i, key in enumerate(keys)), offset, *sizes]
    head = directory.tobytes()
    stored[: len(head) + 4] = head + google_crc32c.value(head).to_bytes(4, "little")
    return bytes(stored)


def directory_bytes(frames: int, frame_bytes: int) -> int:
    """How many bytes a chunk's directory and its CRC-32C take."""
    return frames * (2 + len(band_edges(frame_bytes))) * 4 + 4


def keys_of(packed: int) -> tuple[int, ...]:
    """The keys that a directory's first column names."""
    first, second = packed & 0xFFFF, packed >> 16
    return (first - 1, second - 1) if second else (first - 1,) if first else ()


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
    first, second = whole[:, 0] & 0xFFFF, whole[:, 0] >> 16
    itself = np.arange(1, frames + 1)
    there = (np.maximum(first, second) <= frames).all() and (first[second > 0] > 0).all()
    there = there and (first != itself).all() and (second != itself).all()
    paired = (second == 0).all() or _paired(frame_bytes)
    inside = (whole[:, 1] >= len(head)).all() and (whole[:, 1] + whole[:, 2:].sum(axis=1) <= chunk_bytes).all()
    if not there or not paired or not inside or (whole[:, 2:] < 4).any():
        raise ValueError("its directory contradicts itself")
    return directory


Stored = tuple[int, tuple[int, ...], int, int, list[int]]
"""One frame of a chunk: its number; the keys it rests on; the number of the run that has it, and where in all runs together
its bands begin; the bands' stored sizes."""

Fetch = Callable[[int, int, memoryview], None]
"""Puts a chunk's bytes from one offset to another to a place."""


@dataclass(frozen=True)
class Part:
    """What some frames of one chunk take: they and the keys they rest on.

    `frames`: in the order of decoding, as they are stored but keys first; `runs`: (offset, end) in the chunk of what is read in
    one call; `read_bytes`: of all runs.
    """

    frames: list[Stored]
    runs: list[tuple[int, int]]
    read_bytes: int

    @classmethod
    def of(cls, directory: Directory, wanted: Iterable[int]) -> Part:
        """Of the frames `wanted`.

        Raises:
            ValueError: a frame rests on itself, by way of others.
        """
        references: list[int] = directory[:, 0].tolist()
        keys: dict[int, tuple[int, ...]] = {}
        pending = list(wanted)
        for frame in pending:  # which grows meanwhile
            if frame not in keys:
                keys[frame] = found = keys_of(references[frame]) if references[frame] else ()
                pending += found
        numbers = list(keys)
        runs: list[tuple[int, int]] = []
        places: dict[int, Stored] = {}
        at = begin = end = 0
        for (offset, *sizes), frame in sorted(zip(directory[numbers, 1:].tolist(), numbers, strict=True)):
            size = sum(sizes)
            if offset != end or offset + size - begin > _READ_BYTES:
                begin = offset
                runs.append((begin, begin))
            end = offset + size
            runs[-1] = begin, end
            places[frame] = frame, keys[frame], len(runs) - 1, at, sizes
            at += size
        if not any(keys.values()):  # in any order
            return cls(list(places.values()), runs, at)
        order: dict[int, Stored] = {}
        for frame in places:
            path = [] if frame in order else [frame]
            while path:
                for key in keys[path[-1]]:
                    if key not in order:
                        path.append(key)
                        break
                else:
                    order[path[-1]] = places[path[-1]]
                    path.pop()
                if len(path) > len(keys):
                    raise ValueError("its directory contradicts itself")
        return cls(list(order.values()), runs, at)

    def decode(self, fetch: Fetch, frame_bytes: int, targets: Mapping[int, Sequence[int]], out: NDArray[np.uint8]) -> None:
        """Decode the frames of `targets` (frame -> its rows) into C-contiguous `out`, rows of `frame_bytes` bytes.

        `fetch`: asked for a run when its first frame is decoded, so that the disk goes on meanwhile.

        Raises:
            ValueError: a band is damaged.
        """
        # Keys that are a pair lie side by side, the nearest ones as they are decoded, others as copies.
        pairs = sorted({keys for _, keys, *_ in self.frames if len(keys) == 2}, key=lambda pair: abs(pair[1] - pair[0]))
        after: dict[int, int] = {}
        follows: set[int] = set()
        for first, second in pairs:
            if first not in after and second not in follows:
                after[first] = second
                follows.add(second)
        aside = len(self.frames) + len(follows.union(after)) + 2 * len(pairs)
        room: NDArray[np.uint8] = page_aligned((self.read_bytes + aside * frame_bytes,), np.uint8)
        fixed = room[:]
        fixed.flags.writeable = False  # as the checksum wants it
        view, source, result = room.data, room.ctypes.data, out.ctypes.data
        spare = source + self.read_bytes
        decoded: dict[tuple[int, ...], int] = {(): 0}  # keys, one or two -> where they lie
        for first in after.keys() - follows:
            frame: int | None = first
            while frame is not None:
                decoded[(frame,)] = spare
                if frame in after:
                    decoded[(frame, after[frame])] = spare
                frame, spare = after.get(frame), spare + frame_bytes
        bands = [(first, end - first) for first, end in band_edges(frame_bytes)]
        starts = [0, *itertools.accumulate(end - start for start, end in self.runs)]
        fetched: set[int] = set()
        crc, stated, decompress = google_crc32c.value, _CRC.unpack_from, lz4_blocks.decompress_to
        for frame, keys, run, at, sizes in self.frames:
            if run not in fetched:
                fetched.add(run)
                fetch(*self.runs[run], view[starts[run] : starts[run + 1]])
            rows: Sequence[int] = targets.get(frame, ())
            target = decoded.get((frame,))
            if target is None:
                if rows:
                    target, rows = result + rows[0] * frame_bytes, rows[1:]
                else:
                    target, spare = spare, spare + frame_bytes
                decoded[(frame,)] = target
            dictionary = decoded.get(keys)
            if dictionary is None:
                dictionary = decoded[keys] = spare
                for key in keys:
                    ctypes.memmove(spare, decoded[(key,)], frame_bytes)
                    spare += frame_bytes
            for (first, length), size in zip(bands, sizes, strict=True):
                end = at + size - 4
                if crc(fixed[at:end]) != stated(view, end)[0]:
                    raise ValueError(f"the CRC-32C of frame {frame} differs")
                # Of a pair all is the dictionary: its frames have one band.
                made = decompress(source + at, target + first, size - 4, length, dictionary + first, length * len(keys))
                if made != length:
                    found = f"{made} bytes in a band" if made >= 0 else "a band that is damaged or too long"
                    raise ValueError(f"frame {frame} has {found}, expected {length} bytes")
                at = end + 4
            for row in rows:
                ctypes.memmove(result + row * frame_bytes, target, frame_bytes)


def decode(data: NDArray[np.uint8], out: NDArray[Any]) -> None:
    """Decode all of a chunk into C-contiguous `out` (k, H, W, C).

    Raises:
        ValueError: it is damaged, or another chunk.
    """
    whole, frame_bytes = data.tobytes(), out[0].nbytes
    directory = directory_of(whole[: directory_bytes(len(out), frame_bytes)], len(out), frame_bytes, len(whole))
    targets = {frame: [frame] for frame in range(len(out))}

    def fetch(start: int, end: int, into: memoryview) -> None:
        into[:] = whole[start:end]

    Part.of(directory, targets).decode(fetch, frame_bytes, targets, out.reshape(-1).view(np.uint8))
