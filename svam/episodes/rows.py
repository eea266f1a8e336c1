"""Rows of arrays that `svam.episodes.arrays` wrote, read by their numbers through zarr.

What zarr itself does not notice is an error here: a shard that is missing (zarr would return zeros) or of another size than the
array states, and an array that is replaced while it is in use.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import ContractError
from svam.episodes.arrays import SHARD_BYTES, shard_file
from svam.episodes.lossy import PREFIX, register
from svam.files import FileError, stamp

_AGAIN = "run the stage that writes it again"


class RowReader:
    """Reads rows of one array. It may be pickled, and threads may share it.

    Attributes: `path`; `shape` (n, ...); `dtype`; `chunk_rows`, `shard_rows`.
    """

    def __init__(self, path: Path) -> None:
        """Read the metadata, which `svam.episodes.arrays.read_attributes` has checked, or that were just written."""
        import zarr

        self.path = Path(path)
        self._stamp = stamp(self.path / "zarr.json")
        if PREFIX.encode() in (self.path / "zarr.json").read_bytes():
            register()
        self._array = zarr.open_array(self.path, mode="r", zarr_format=3)
        self.shape: tuple[int, ...] = self._array.shape
        self.dtype: np.dtype[Any] = np.dtype(self._array.dtype)
        self.chunk_rows, self.shard_rows = self._array.chunks[0], (self._array.shards or self._array.chunks)[0]
        self._sizes: Any = self._array.attrs[SHARD_BYTES]

    def __len__(self) -> int:
        return int(self.shape[0])

    @property
    def row_bytes(self) -> int:
        """Uncompressed bytes of one row."""
        return int(math.prod(self.shape[1:]) * self.dtype.itemsize)

    def check(self) -> None:
        """Look at the existence and size of every shard, without reading it; `FileError` where one is missing or truncated."""
        for shard in range(len(self._sizes)):
            self._check_file(shard)

    def _check_file(self, shard: int) -> Path:
        file, size = shard_file(self.path, shard, len(self.shape)), self._sizes[shard]
        try:
            found = file.stat().st_size
        except FileNotFoundError:
            raise FileError(f"{file}: no such file, though the array has {len(self)} rows; {_AGAIN}") from None
        except OSError as error:
            raise FileError(f"{file}: cannot be read ({error.strerror or error})") from None
        if found != size:
            raise FileError(f"{file}: truncated or damaged: {found} bytes, expected {size}; {_AGAIN}")
        return file

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows (k, ...) by number, in the order asked for; repeats are allowed, each chunk is decoded once.

        Raises:
            ContractError: a row number is outside 0..n - 1.
            FileError: a shard is missing, truncated, damaged or replaced.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.ndim != 1:
            raise ContractError(f"{self.path.name}: row numbers have shape {rows.shape}, expected (k,)")
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if not len(rows):
            return out
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        if ordered[0] < 0 or ordered[-1] >= len(self):
            raise ContractError(f"{self.path.name}: rows {ordered[0]}..{ordered[-1]} asked for, there are 0..{len(self) - 1}")
        # A run of chunks that touch one another within a shard is read as one slice.
        chunks = ordered // self.chunk_rows
        apart = (np.diff(chunks) > 1) | (np.diff(ordered // self.shard_rows) > 0)
        edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(rows)]
        for first, last in pairwise(edges):
            start, end = int(ordered[first]), int(ordered[last - 1]) + 1
            out[order[first:last]] = self._slice(start, end)[ordered[first:last] - start]
        return out

    def read_range(self, start: int, end: int) -> NDArray[Any]:
        """Rows start..end - 1."""
        return self.read(np.arange(start, end, dtype=np.int64))

    def _slice(self, start: int, end: int) -> NDArray[Any]:
        """Rows start..end - 1, which lie in one shard."""
        if stamp(self.path / "zarr.json") != self._stamp:
            raise FileError(f"{self.path}: replaced or changed while it was in use; open it again")
        file = self._check_file(start // self.shard_rows)
        try:
            return np.asarray(self._array[start:end])
        except (ValueError, RuntimeError, OSError, EOFError) as error:
            raise FileError(f"{file}: damaged ({' '.join(str(error).split()) or type(error).__name__}); {_AGAIN}") from None
