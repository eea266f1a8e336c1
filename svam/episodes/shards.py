"""Arrays whose shards several processes write through zarr, each shard once and whole.

A process has some consecutive rows of an array. The shards that lie in them it writes; what it has of the others it saves raw,
until all who share the shard have done so, and then one process writes it. Which rows share a chunk or a shard follows from
their number alone, so any cut into rows gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from svam.episodes.arrays import create_array, shard_file, state_sizes
from svam.episodes.lossy import LOSSY, register
from svam.files import FileError

if TYPE_CHECKING:
    import zarr


@dataclass(frozen=True)
class Layout:
    """One array: `rows` of `row_shape` and `dtype`, `chunk_rows` compressed together, `shard_rows` (a multiple) in a file."""

    rows: int
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_rows: int
    shard_rows: int
    compression: str = "zstd"
    quality: int = 0

    @classmethod
    def of(
        cls, rows: int, row_shape: tuple[int, ...], dtype: DTypeLike, chunk_rows: int, shard_bytes: float,
        compression: str = "zstd", quality: int = 0,
    ) -> Layout:  # fmt: skip
        """Shards of at most `shard_bytes` uncompressed, but of a chunk at least."""
        chunk_bytes = chunk_rows * max(1, math.prod(row_shape) * np.dtype(dtype).itemsize)
        chunks = max(1, min(int(shard_bytes) // chunk_bytes, -(-rows // chunk_rows)))
        return cls(rows, tuple(row_shape), np.dtype(dtype), chunk_rows, chunks * chunk_rows, compression, quality)

    def bounds(self, shard: int) -> tuple[int, int]:
        """First row of a shard and the row after its last."""
        return shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows)


class DamagedPieceError(FileError):
    """A piece on disk is not as it was written; it has to be made again."""


class ShardedArray:
    """The array at `path` while it is written. It holds no open file, and may be sent to other processes."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.layout = path, layout

    def create(self) -> None:
        """Its metadata, unless they are there."""
        if not (self.path / "zarr.json").is_file():
            shape, layout = (self.layout.rows, *self.layout.row_shape), self.layout
            create_array(
                self.path, shape, layout.dtype, layout.chunk_rows, layout.shard_rows, layout.compression, layout.quality
            )

    def has(self, shard: int) -> bool:
        """Whether a shard is there; zarr gives it its name when it is whole."""
        return shard_file(self.path, shard, 1 + len(self.layout.row_shape)).is_file()

    def shards(self, start: int, end: int) -> range:
        """Those that the rows start..end - 1 touch."""
        return range(start // self.layout.shard_rows, -(-end // self.layout.shard_rows) if end > start else 0)

    def within(self, shard: int, start: int, end: int) -> bool:
        """Whether a shard lies in the rows start..end - 1."""
        first, last = self.layout.bounds(shard)
        return start <= first and last <= end

    def write(self, shard: int, values: NDArray[Any]) -> None:
        """All rows of a shard."""
        first, last = self.layout.bounds(shard)
        self._opened().with_config({"write_empty_chunks": True})[first:last] = values

    def join(self, shard: int, pieces: Sequence[Path]) -> None:
        """Write a shard from the pieces of all who share it, in the order of their rows, and remove those; `DamagedPieceError`
        where one is not as it was written."""
        first, last = self.layout.bounds(shard)
        values, at = np.empty((last - first, *self.layout.row_shape), self.layout.dtype), 0
        for piece in pieces:
            try:
                part = np.load(piece)
                values[at : at + len(part)] = part
            except (OSError, ValueError, EOFError) as error:
                raise DamagedPieceError(f"{piece}: cannot be read ({error}); run the same command again") from None
            at += len(part)
        if at != last - first:
            raise DamagedPieceError(f"{self.path}: {at} rows of shard {shard}, expected {last - first}; run again")
        self.write(shard, values)
        for piece in pieces:
            piece.unlink()

    def close(self) -> None:
        """State the sizes of the files, which are all there."""
        state_sizes(self._opened(), self.path)

    def _opened(self) -> zarr.Array[Any]:
        import zarr

        if self.layout.compression in LOSSY:
            register()
        return zarr.open_array(self.path, mode="r+")


class Rows:
    """The rows start..end - 1 of an array on their way to disk: whole shards into it, pieces as `<prefix><shard>.npy`."""

    def __init__(self, array: ShardedArray, start: int, end: int, prefix: Path) -> None:
        self.array, self._end, self._prefix = array, end, prefix
        self._row = self._from = start
        self._buffer = np.empty((min(array.layout.shard_rows, end - start), *array.layout.row_shape), array.layout.dtype)

    def append(self, values: NDArray[Any]) -> None:
        """Add rows (k, *row_shape) of the array's dtype, `end - start` in all."""
        layout = self.array.layout
        while len(values):
            shard = self._row // layout.shard_rows
            last = min(self._end, layout.bounds(shard)[1])
            part = values[: last - self._row]
            self._buffer[self._row - self._from : self._row - self._from + len(part)] = part
            self._row, values = self._row + len(part), values[len(part) :]
            if self._row == last:
                self._put(shard)

    def _put(self, shard: int) -> None:
        held = self._buffer[: self._row - self._from]
        if self.array.within(shard, self._from, self._row):
            self.array.write(shard, held)
        else:
            np.save(self._prefix.with_name(f"{self._prefix.name}{shard}.npy"), held)
        self._from = self._row
