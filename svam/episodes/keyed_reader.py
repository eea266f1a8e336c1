"""Frames of keyed chunks (`svam.episodes.keyed`), read from the shards they lie in and nothing that they do not rest on."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.episodes.chunks import ShardFile
from svam.episodes.keyed import Directory, Part, directory_bytes, directory_of
from svam.files import FileError

_DIRECTORIES_BYTES = 4 << 20
"""Of the directories of chunks read last a reader keeps so many bytes: those of 300,000 frames of 128 px."""
_AT_ONCE_BYTES = 352 << 10
"""So much is asked of the disk at once; of more, which is worth the trouble, a part after the other."""
_FIRST_BYTES, _AHEAD_BYTES = 128 << 10, 512 << 10
"""What the disk is asked for before anything is decoded, and then ahead of what is decoded; see `_Ahead`."""


@dataclass(frozen=True)
class Touched:
    """Frames to read out of one chunk: its number in the array, the shard it lies in, its offset and size there; `targets`,
    for each frame of the chunk that is asked for the rows of the result."""

    number: int
    file: ShardFile
    offset: int
    size: int
    targets: dict[int, list[int]]

    def fetch(self, start: int, end: int, into: memoryview) -> None:
        """Put the chunk's bytes from `start` to `end` to a place; raises `FileError` where the shard has fewer."""
        self.file.read_into(self.offset + start, into)

    def announce(self, ranges: list[tuple[int, int]]) -> None:
        """Let the system fetch some (offset, end) of the chunk from the disk."""
        self.file.announce([(self.offset + start, self.offset + end) for start, end in ranges])


class _Ahead:
    """What some parts of chunks need, which the disk is asked for while what came before is decoded.

    A disk that is asked for much at once may answer all of it at the end. So it is asked for little first, that decoding can
    begin, and for the rest meanwhile; never for all of it, since memory that is short takes back what is not used soon.
    """

    def __init__(self, touched: list[Touched], parts: list[Part]) -> None:
        self._ranges: list[tuple[Touched, tuple[int, int]]] = []
        for chunk, part in zip(touched, parts, strict=True):
            for run in dict.fromkeys([run for _, _, run, *_ in part.frames]):  # as they are decoded
                self._ranges.append((chunk, part.runs[run]))
        self._asked = self._ahead = 0  # ranges that were asked for, and their bytes that were not fetched yet
        self._ask(_FIRST_BYTES)

    def _ask(self, enough: int) -> None:
        """Ask for the next ranges, until `enough` bytes are under way."""
        ranges: list[tuple[int, int]] = []
        while self._asked < len(self._ranges) and self._ahead < enough:
            chunk, (start, end) = self._ranges[self._asked]
            ranges.append((start, end))
            self._ahead += end - start
            self._asked += 1
            if self._asked == len(self._ranges) or self._ranges[self._asked][0] is not chunk:
                chunk.announce(ranges)
                ranges = []
        if ranges:
            chunk.announce(ranges)

    def fetch(self, chunk: Touched, start: int, end: int, into: memoryview) -> None:
        """As `Touched.fetch`."""
        chunk.fetch(start, end, into)
        self._ahead -= end - start
        if self._ahead < _AHEAD_BYTES and self._asked < len(self._ranges):
            self._ask(2 * _AHEAD_BYTES)


class KeyedReader:
    """Reads frames out of the keyed chunks of one array."""

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
            head = chunk.file.read(chunk.offset, min(self._head, chunk.size))
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
                chunk.announce([(0, self._head)])
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
        room = out.reshape(-1)
        parts = self.parts(touched)
        ahead = None
        if sum([part.read_bytes for part in parts]) > _AT_ONCE_BYTES:
            ahead = _Ahead(touched, parts)
        elif len(parts) > 1 or len(parts[0].runs) > 1:
            for chunk, part in zip(touched, parts, strict=True):
                chunk.announce(part.runs)
        for chunk, part in zip(touched, parts, strict=True):
            try:
                fetch = chunk.fetch if ahead is None else functools.partial(ahead.fetch, chunk)
                part.decode(fetch, self._frame_bytes, chunk.targets, room)
            except ValueError as error:
                raise damaged(chunk, error) from None


def damaged(chunk: Touched, error: Exception) -> FileError:
    """One sentence about a chunk that cannot be decoded."""
    return FileError(f"{chunk.file.name}: the chunk at byte {chunk.offset} is damaged ({error})")
