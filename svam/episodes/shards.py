"""Arrays written in pieces by several processes: each compresses the chunks it holds whole, one process joins them.

The array is the published format that `svam.episodes.rows` reads (Zarr v3, `sharding_indexed`, chunks with a checksum each).
Which rows share a chunk or a shard follows from their number alone, so any cut into pieces gives the same bytes.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import DTypeLike, NDArray

from svam.contract import ContractError
from svam.episodes.arrays import named_failures
from svam.episodes.chunks import Compression, codecs_for, compress, picture_codecs
from svam.episodes.memory import page_aligned
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
        one = cls(tuple(row_shape), np.dtype(dtype), chunk_rows, chunk_rows, pictures)
        chunk_bytes = chunk_rows * max(1, one.row_bytes)
        chunks = max(1, min(-(-int(shard_bytes) // chunk_bytes), -(-rows // chunk_rows), MOST_CHUNKS))
        return replace(one, shard_rows=chunks * chunk_rows)

    @property
    def row_bytes(self) -> int:
        """Uncompressed bytes of one row."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    def room(self) -> NDArray[Any]:
        """Uninitialised memory for the rows of a chunk."""
        return page_aligned((self.chunk_rows, *self.row_shape), self.dtype)

    def encoded(self, chunk: NDArray[Any]) -> bytes:
        """`chunk_rows` rows as their chunk is stored."""
        return compress(chunk, self.pictures)


class DamagedPieceError(FileError):
    """A piece on disk is not as it was written; it has to be made again."""


@dataclass
class Contents:
    """What a piece consists of, in this order: raw rows, the stored sizes of compressed chunks, raw rows."""

    head: int = 0
    chunks: list[int] = field(default_factory=list)
    tail: int = 0

    @classmethod
    def read(cls, piece: Path) -> Contents:
        """Of the finished piece `piece`.

        Raises:
            DamagedPieceError: it is not whole.
        """
        try:
            return cls(**read_json(piece.with_suffix(".json")))
        except (FileError, TypeError) as error:
            raise DamagedPieceError(f"{error}; run the same command again") from None


class Piece:
    """Consecutive rows of one array, from the row `first` on, on their way to disk as `<path>.rows` and `<path>.json`.

    Whole chunks are compressed as they fill; rows before the first chunk's beginning and after the last's end stay raw.
    """

    def __init__(self, path: Path, first: int, layout: Layout) -> None:
        self.path, self.layout = path, layout
        self._lead = -first % layout.chunk_rows
        self._chunk, self._filled = layout.room(), 0
        self._contents = Contents()
        with named_failures(path):
            self._file: BinaryIO = path.with_suffix(".rows").open("wb")

    def append(self, values: NDArray[Any]) -> None:
        """Add rows (k, *row_shape).

        Raises:
            ContractError: another shape or dtype than the array's.
        """
        layout, contents = self.layout, self._contents
        if values.shape[1:] != layout.row_shape or values.dtype != layout.dtype:
            expected = ", ".join(str(size) for size in ("k", *layout.row_shape))
            raise ContractError(f"rows are {values.dtype} {values.shape}, expected {layout.dtype} ({expected})")
        taken = min(len(values), self._lead - contents.head)
        if taken:
            self._write(values[:taken].tobytes())
            contents.head += taken
        while taken < len(values):
            k = min(len(values) - taken, layout.chunk_rows - self._filled)
            self._chunk[self._filled : self._filled + k] = values[taken : taken + k]
            self._filled, taken = self._filled + k, taken + k
            if self._filled == layout.chunk_rows:
                data = layout.encoded(self._chunk)
                self._write(data)
                contents.chunks.append(len(data))
                self._filled = 0

    def _write(self, data: bytes | memoryview) -> None:
        with named_failures(self.path):
            self._file.write(data)

    def close(self) -> None:
        """Write the raw end, then what the piece consists of, so that a piece without that is not whole."""
        self._contents.tail = self._filled
        self._write(_bytes_of(self._chunk[: self._filled]))
        with named_failures(self.path):
            self._file.close()
            self.path.with_suffix(".json").write_text(json.dumps(asdict(self._contents)), encoding="utf-8")

    def abandon(self) -> None:
        """Close the file of a piece that will not be finished; the error that is on its way is the one to report."""
        with suppress(OSError):
            self._file.close()


class ShardJoiner:
    """Writes the array at `path` from its pieces, one chunk in memory at a time. `rows` is the array's length, known before.

    Pieces have to stay on disk until `close`: raw rows are read when all of their chunk's are there.
    """

    def __init__(self, path: Path, rows: int, layout: Layout) -> None:
        import zarr

        self.path, self.layout, self._rows = path, layout, rows
        self._raw: list[tuple[Path, int, int]] = []
        self._held = 0
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

    def join(self, piece: Path) -> None:
        """Append the piece that `Piece` wrote to the path `piece`: it begins where the one before ended.

        Raises:
            DamagedPieceError: it is not as it was written.
        """
        contents, name = Contents.read(piece), piece.with_suffix(".rows")
        self._put_raw(name, 0, contents.head)
        if contents.chunks and self._held:
            raise DamagedPieceError(f"{name}: a piece of {self.path.name} begins inside a chunk; convert again")
        offset = contents.head * self.layout.row_bytes
        with _opened(name) as file:
            file.seek(offset)
            for size in contents.chunks:
                data = bytearray(size)
                _fill(memoryview(data), file)
                self._put(data)
        self._put_raw(name, offset + sum(contents.chunks), contents.tail)

    def _put_raw(self, name: Path, offset: int, rows: int) -> None:
        """Raw rows of a piece's file, fewer than a chunk's from where the last piece ended."""
        while rows:
            k = min(rows, self.layout.chunk_rows - self._held)
            self._raw.append((name, offset, k))
            offset, rows, self._held = offset + k * self.layout.row_bytes, rows - k, self._held + k
            if self._held == self.layout.chunk_rows:
                self._end_chunk()

    def _end_chunk(self) -> None:
        """Compress the raw rows, zeros after them where they are fewer than a chunk's."""
        chunk, at = self.layout.room(), 0
        for name, offset, k in self._raw:
            with _opened(name) as file:
                file.seek(offset)
                _fill(_bytes_of(chunk[at : at + k]), file)
            at += k
        chunk[at:] = 0
        self._put(self.layout.encoded(chunk))
        self._raw, self._held = [], 0

    def _put(self, data: bytes | bytearray) -> None:
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
            self._end_chunk()
        self._end_shard()

    def abandon(self) -> None:
        """Close the open file after an error, which is the one to report."""
        with suppress(OSError):
            if self._file is not None:
                self._file.close()


def _bytes_of(rows: NDArray[Any]) -> memoryview:
    """C-contiguous rows as the bytes that they are in memory."""
    return rows.reshape(-1).view(np.uint8).data


def _opened(name: Path) -> FileIO:
    try:
        return FileIO(name)
    except OSError as error:
        raise _unreadable(name, error) from None


def _fill(room: memoryview, file: FileIO) -> None:
    found = 0
    try:
        while found < len(room) and (count := file.readinto(room[found:])):
            found += count
    except OSError as error:
        raise _unreadable(file.name, error) from None
    if found < len(room):
        raise DamagedPieceError(f"{file.name}: truncated; run the same command again")


def _unreadable(name: object, error: OSError) -> DamagedPieceError:
    return DamagedPieceError(f"{name}: cannot be read ({error.strerror or error}); run the same command again")
