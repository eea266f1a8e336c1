"""Arrays written in pieces by several processes: each compresses the chunks it holds whole, one process joins them.

The array is the published format that `svam.episodes.rows` reads (Zarr v3, `sharding_indexed`, chunks with a checksum each).
Which rows share a chunk or a shard follows from their number alone, so any cut into pieces gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import DTypeLike, NDArray

from svam.contract import ContractError
from svam.episodes.arrays import named_failures
from svam.episodes.chunks import Compression, codecs_for, compress, picture_codecs
from svam.files import FileError, read_json

_EMPTY = 2**64 - 1
MOST_CHUNKS = 16384
"""Chunks of a shard, whatever their size: every reader reads a shard's whole index, 16 bytes a chunk."""


@dataclass(frozen=True)
class Layout:
    """One array's rows: `row_shape`, `dtype`, `chunk_rows` compressed together, `shard_rows` (a multiple) in a file.

    pictures: how rows (H, W, 3) are compressed; None for anything else, which Zstd compresses.
    """

    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_rows: int
    shard_rows: int
    pictures: Compression | None = None

    @classmethod
    def of(
        cls, row_shape: tuple[int, ...], dtype: DTypeLike, chunk_rows: int, shard_bytes: float, rows: int,
        pictures: Compression | None = None,
    ) -> Layout:  # fmt: skip
        """Shards of at least `shard_bytes` uncompressed, in whole chunks; smaller where `rows` or `MOST_CHUNKS` are reached."""
        found = np.dtype(dtype)
        row_bytes = max(1, int(np.prod(row_shape, dtype=np.int64)) * found.itemsize)
        chunks = max(1, min(-(-int(shard_bytes) // (row_bytes * chunk_rows)), -(-rows // chunk_rows), MOST_CHUNKS))
        return cls(tuple(row_shape), found, chunk_rows, chunks * chunk_rows, pictures)

    def empty(self, rows: int) -> NDArray[Any]:
        """Zeroed rows."""
        return np.zeros((rows, *self.row_shape), dtype=self.dtype)

    def encoded(self, chunk: NDArray[Any]) -> bytes:
        """`chunk_rows` rows as their chunk is stored."""
        return compress(chunk, self.pictures)


class Piece:
    """Consecutive rows of one array, from the row `first` on, on their way to disk as `<path>.*`.

    Whole chunks are compressed as they fill; rows before the first chunk's beginning and after the last's end stay raw.
    """

    def __init__(self, path: Path, first: int, layout: Layout) -> None:
        self.path, self.layout = path, layout
        self._sizes: list[int] = []
        self._lead = -first % layout.chunk_rows
        self._head, self._chunk = layout.empty(self._lead), layout.empty(layout.chunk_rows)
        self._in_head = self._filled = self.rows = 0
        with named_failures(path):
            self._file: BinaryIO = path.with_suffix(".chunks").open("wb")

    def append(self, values: NDArray[Any]) -> None:
        """Add rows (k, *row_shape).

        Raises:
            ContractError: another shape or dtype than the array's.
        """
        layout = self.layout
        if values.shape[1:] != layout.row_shape or values.dtype != layout.dtype:
            expected = ", ".join(str(size) for size in ("k", *layout.row_shape))
            raise ContractError(f"rows are {values.dtype} {values.shape}, expected {layout.dtype} ({expected})")
        self.rows += len(values)
        taken = min(len(values), self._lead - self._in_head)
        self._head[self._in_head : self._in_head + taken] = values[:taken]
        self._in_head += taken
        while taken < len(values):
            k = min(len(values) - taken, layout.chunk_rows - self._filled)
            self._chunk[self._filled : self._filled + k] = values[taken : taken + k]
            self._filled, taken = self._filled + k, taken + k
            if self._filled == layout.chunk_rows:
                data = layout.encoded(self._chunk)
                with named_failures(self.path):
                    self._file.write(data)
                self._sizes.append(len(data))
                self._filled = 0

    def close(self) -> None:
        """Write the raw ends and the chunks' sizes, last, so that a piece without them is not whole."""
        with named_failures(self.path):
            self._file.close()
            np.save(self.path.with_suffix(".head.npy"), self._head[: self._in_head])
            np.save(self.path.with_suffix(".tail.npy"), self._chunk[: self._filled])
            self.path.with_suffix(".json").write_text(json.dumps(self._sizes), encoding="utf-8")

    def abandon(self) -> None:
        """Close the file of a piece that will not be finished; the error that is on its way is the one to report."""
        with suppress(OSError):
            self._file.close()


class DamagedPieceError(FileError):
    """A piece on disk is not as it was written; it has to be made again."""


@dataclass(frozen=True)
class WholePiece:
    """A finished piece on disk. Its methods raise `DamagedPieceError` where it is not."""

    path: Path

    def ends(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Raw rows before its first chunk, and after its last."""
        try:
            return np.load(self.path.with_suffix(".head.npy")), np.load(self.path.with_suffix(".tail.npy"))
        except (ValueError, EOFError, FileNotFoundError) as error:
            raise DamagedPieceError(f"{self.path}.*.npy: damaged ({error}); run the same command again") from None

    def chunks(self) -> Iterator[bytes]:
        """Its compressed chunks, in order."""
        try:
            sizes = read_json(self.path.with_suffix(".json"))
        except FileError as error:
            raise DamagedPieceError(f"{error}; run the same command again") from None
        with self.path.with_suffix(".chunks").open("rb") as file:
            for size in sizes:
                data = file.read(size)
                if len(data) != size:
                    raise DamagedPieceError(f"{file.name}: truncated; run the same command again")
                yield data


class ShardJoiner:
    """Writes the array at `path` from its pieces, one chunk in memory at a time. `rows` is the array's length, known before."""

    def __init__(self, path: Path, rows: int, layout: Layout) -> None:
        import zarr

        self.path, self.layout, self._rows = path, layout, rows
        self._carry, self._held = layout.empty(layout.chunk_rows), 0
        self._per_shard = layout.shard_rows // layout.chunk_rows
        self._chunk = 0
        self._file: BinaryIO | None = None
        self._index = np.full((self._per_shard, 2), _EMPTY, dtype="<u8")
        self._offset = 0
        codecs: dict[str, Any] = {"filters": None, "compressors": codecs_for(False, 0)}
        if layout.pictures is not None:
            codecs = picture_codecs(layout.pictures, 1 + len(layout.row_shape))
        with named_failures(path):
            zarr.create_array(
                path, shape=(rows, *layout.row_shape), dtype=layout.dtype, zarr_format=3, fill_value=0,
                chunks=(layout.chunk_rows, *layout.row_shape), shards=(layout.shard_rows, *layout.row_shape),
                **codecs,
            )  # fmt: skip

    def join(self, piece: WholePiece) -> None:
        """Append a piece: it begins where the one before ended."""
        head, tail = piece.ends()
        self.append(head)
        for data in piece.chunks():
            if self._held:
                raise DamagedPieceError(f"{piece.path}: a piece of {self.path.name} begins inside a chunk; convert again")
            self._put(data)
        self.append(tail)

    def append(self, values: NDArray[Any]) -> None:
        """Append raw rows (k, *row_shape), fewer than a chunk's from where the last piece ended."""
        taken = 0
        while taken < len(values):
            k = min(len(values) - taken, self.layout.chunk_rows - self._held)
            self._carry[self._held : self._held + k] = values[taken : taken + k]
            self._held, taken = self._held + k, taken + k
            if self._held == self.layout.chunk_rows:
                self._put(self.layout.encoded(self._carry))
                self._held = 0

    def _put(self, data: bytes) -> None:
        with named_failures(self.path):
            if self._file is None:
                number = self._chunk // self._per_shard
                name = self.path.joinpath("c", str(number), *["0"] * len(self.layout.row_shape))
                name.parent.mkdir(parents=True, exist_ok=True)
                self._file, self._offset = name.open("wb"), 0
                self._index[:] = _EMPTY
            self._file.write(data)
        self._index[self._chunk % self._per_shard] = self._offset, len(data)
        self._offset += len(data)
        self._chunk += 1
        if self._chunk % self._per_shard == 0:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._file is None:
            return
        with named_failures(self.path):
            index = self._index.tobytes()
            self._file.write(index + google_crc32c.value(index).to_bytes(4, "little"))
            self._file.close()
        self._file = None

    def close(self) -> None:
        """Write the last, padded chunk and the last shard's index.

        Raises:
            ContractError: other than the announced number of rows arrived.
        """
        arrived = self._chunk * self.layout.chunk_rows + self._held
        if arrived != self._rows:
            raise ContractError(f"{self.path.name}: {arrived} rows arrived, {self._rows} were announced")
        if self._held:
            self._carry[self._held :] = 0
            self._put(self.layout.encoded(self._carry))
        self._end_shard()

    def abandon(self) -> None:
        """Close the open file after an error, which is the one to report."""
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
