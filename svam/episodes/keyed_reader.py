"""Frames of keyed chunks (`svam.episodes.keyed`), read from the shards they lie in and nothing that they do not rest on."""

from __future__ import annotations

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
        room = out.reshape(-1)
        parts = self.parts(touched)
        if sum(len(part.runs) for part in parts) > 1:  # the disk can fetch all of them at once
            for chunk, part in zip(touched, parts, strict=True):
                chunk.file.announce([(chunk.offset + start, chunk.offset + end) for start, end in part.runs])
        for chunk, part in zip(touched, parts, strict=True):
            try:
                part.decode(chunk.fetch, self._frame_bytes, chunk.targets, room)
            except ValueError as error:
                raise damaged(chunk, error) from None


def damaged(chunk: Touched, error: Exception) -> FileError:
    """One sentence about a chunk that cannot be decoded."""
    return FileError(f"{chunk.file.name}: the chunk at byte {chunk.offset} is damaged ({error})")
