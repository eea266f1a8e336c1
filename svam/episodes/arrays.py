"""Time-chunked, sharded Zarr v3 arrays: written row block by row block, each shard once; read by row numbers.

Writing goes through zarr. Reading follows the same published format (Zarr v3 core, `sharding_indexed` with a CRC-32C'd
index, Zstd with a content checksum) without zarr's asynchronous machinery, whose overhead is several times the cost of
decompressing: each touched chunk is read and decoded once, whatever the order of the rows. A missing shard or chunk is
an error here, where zarr would return fill values. Any other Zarr v3 reader opens these arrays too.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import BitRound
from numcodecs.zstd import Zstd
from numpy.typing import DTypeLike, NDArray

from svam.contract import ContractError
from svam.files import FileError, read_json

ZSTD_LEVEL = 3
_EMPTY = 2**64 - 1
"""What a shard's index holds, as offset and as size, for a chunk that was never written."""


def round_mantissa(values: NDArray[Any], bits: int) -> NDArray[Any]:
    """Round floats to `bits` explicit mantissa bits (nearest, ties to even), so that they compress; same shape and dtype.

    The codec of numcodecs is applied before writing instead of being named in the array's metadata: its decoding does
    nothing, it is not in the Zarr v3 core specification, and other readers would refuse the array.
    """
    if bits >= np.finfo(values.dtype).nmant:
        return values
    rounded = np.asarray(BitRound(keepbits=bits).encode(np.ascontiguousarray(values)))
    return rounded.view(values.dtype).reshape(values.shape)


@contextmanager
def _named_failures(path: Path) -> Iterator[None]:
    """Turn a failing file system (disk full, no permission) into one sentence that names `path`."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{path}: writing failed: {error.strerror or error}; nothing was kept") from error


class ArrayWriter:
    """One array (n, *row_shape) that grows by `append`. At most one shard is held in memory. Made by `GroupWriter.array`."""

    def __init__(
        self, path: Path, row_shape: tuple[int, ...], dtype: DTypeLike, chunk_rows: int, shard_rows: int,
        mantissa_bits: int | None = None,
    ) -> None:  # fmt: skip
        import zarr
        from zarr.codecs import ZstdCodec

        if shard_rows % chunk_rows:
            raise ContractError(f"{path.name}: shard_rows ({shard_rows}) must be a multiple of chunk_rows ({chunk_rows})")
        self.path, self.rows = path, 0
        self._bits, self._filled = mantissa_bits, 0
        self._buffer = np.empty((shard_rows, *row_shape), dtype=dtype)
        with _named_failures(path):
            self._array = zarr.create_array(
                path, shape=(0, *row_shape), dtype=self._buffer.dtype, zarr_format=3, fill_value=0,
                chunks=(chunk_rows, *row_shape), shards=self._buffer.shape, filters=None,
                compressors=ZstdCodec(level=ZSTD_LEVEL, checksum=True),
                attributes=None if mantissa_bits is None else {"mantissa_bits": mantissa_bits},
                config={"write_empty_chunks": True},  # so that a missing chunk is always a fault
            )  # fmt: skip

    def append(self, values: NDArray[Any]) -> None:
        """Add rows (k, *row_shape). Floats are cast to the array's float type and, if asked for, rounded.

        Raises:
            ContractError: the shape or dtype does not fit, or a value is not finite (after the cast).
            FileError: the file system refuses.
        """
        row_shape, dtype = self._buffer.shape[1:], self._buffer.dtype
        floats = values.dtype.kind == "f" and dtype.kind == "f"
        if values.shape[1:] != row_shape or (values.dtype != dtype and not floats):
            expected = ", ".join(str(size) for size in ("k", *row_shape))
            raise ContractError(f"{self.path.name}: rows are {values.dtype} {values.shape}, expected {dtype} ({expected})")
        if floats:
            with np.errstate(over="ignore"):
                values = values.astype(dtype, copy=False)
            if self._bits is not None:
                values = round_mantissa(values, self._bits)
            if not np.isfinite(values).all():
                where = np.argwhere(~np.isfinite(values))[0]
                at = ", ".join(str(i) for i in (self.rows + self._filled + where[0], *where[1:]))
                raise ContractError(f"{self.path.name}[{at}] is {values[tuple(where)]} as {dtype}, expected a finite number")
        taken = 0
        while taken < len(values):
            k = min(len(values) - taken, len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + k] = values[taken : taken + k]
            self._filled, taken = self._filled + k, taken + k
            if self._filled == len(self._buffer):
                self._flush()

    def _flush(self) -> None:
        if not self._filled:
            return
        end = self.rows + self._filled
        with _named_failures(self.path):
            self._array.resize((end, *self._buffer.shape[1:]))
            self._array[self.rows : end] = self._buffer[: self._filled]
        self.rows, self._filled = end, 0

    def close(self) -> None:
        """Write what is still in memory."""
        self._flush()


class GroupWriter:
    """A Zarr v3 group of arrays, written under `path` (which the caller makes whole, see `svam.files.whole_directory`).

    Use as a context manager; leaving it without an error flushes all arrays and writes `attributes`.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.attributes: dict[str, Any] = {}
        self._arrays: dict[str, ArrayWriter] = {}

    def array(
        self, name: str, row_shape: tuple[int, ...], dtype: DTypeLike, chunk_rows: int, shard_rows: int,
        mantissa_bits: int | None = None,
    ) -> ArrayWriter:  # fmt: skip
        """Create the array `name` ("frames/front" makes the group "frames" as well) of rows of `row_shape`.

        `chunk_rows` rows are compressed together, `shard_rows` (a multiple) share a file; `mantissa_bits` rounds floats.
        """
        self._arrays[name] = ArrayWriter(self.path / name, row_shape, dtype, chunk_rows, shard_rows, mantissa_bits)
        return self._arrays[name]

    def write(self, name: str, values: NDArray[Any], shard_rows: int = 65536) -> None:
        """Write a whole small array."""
        self.array(name, values.shape[1:], values.dtype, min(1024, shard_rows), shard_rows).append(values)

    def __enter__(self) -> GroupWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            return
        for writer in self._arrays.values():
            writer.close()
        folders = {parent for name in self._arrays for parent in Path(name).parents}
        for folder in folders | {Path()}:
            attributes = self.attributes if folder == Path() else {}
            text = json.dumps(
                {"attributes": attributes, "node_type": "group", "zarr_format": 3}, indent=1, sort_keys=True, allow_nan=False
            )
            with _named_failures(self.path / folder):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
                (self.path / folder / "zarr.json").write_text(text + "\n", encoding="utf-8")


def read_attributes(path: Path) -> dict[str, Any]:
    """The attributes of the Zarr v3 group at `path`.

    Raises:
        FileError: it is missing, or no Zarr v3 group.
    """
    path = Path(path)
    if not path.exists():
        raise FileError(f"{path}: no such directory")
    if not (path / "zarr.json").is_file():
        raise FileError(f"{path}: not a Zarr v3 group (it has no zarr.json)")
    metadata = read_json(path / "zarr.json")
    if not isinstance(metadata, dict) or metadata.get("node_type") != "group" or metadata.get("zarr_format") != 3:
        raise FileError(f"{path / 'zarr.json'}: not the metadata of a Zarr v3 group")
    return dict(metadata.get("attributes", {}))


class RowReader:
    """Reads rows of one array that `ArrayWriter` wrote. Holds no open file, so it may be pickled and used in any process.

    Attributes: `path`; `shape` (n, ...); `dtype`; `chunk_rows`, `shard_rows`; `attributes`.
    """

    def __init__(self, path: Path) -> None:
        """Read the metadata.

        Raises:
            FileError: no array is there, or its layout is not that of `ArrayWriter`.
        """
        self.path = Path(path)
        if not (self.path / "zarr.json").is_file():
            raise FileError(f"{self.path}: no such array")
        metadata = read_json(self.path / "zarr.json")
        try:
            self.shape: tuple[int, ...] = tuple(metadata["shape"])
            self.dtype = np.dtype(metadata["data_type"])
            self.attributes: Mapping[str, Any] = metadata["attributes"]
            (sharding,) = metadata["codecs"]
            inner = sharding["configuration"]
            shard, chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"], inner["chunk_shape"]
            names = [sharding["name"], *(codec["name"] for codec in inner["codecs"] + inner["index_codecs"])]
            known = (
                names == ["sharding_indexed", "bytes", "zstd", "bytes", "crc32c"]
                and inner.get("index_location", "end") == "end"
                and metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
                and all(codec.get("configuration", {}).get("endian", "little") == "little" for codec in inner["codecs"])
                and tuple(shard[1:]) == tuple(chunk[1:]) == self.shape[1:]
                and shard[0] % chunk[0] == 0
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{self.path / 'zarr.json'}: not the metadata of a sharded Zarr v3 array ({error!r})") from None
        if not known:
            raise FileError(f"{self.path / 'zarr.json'}: expected shards of Zstd chunks that span whole rows, found {names}")
        self.chunk_rows, self.shard_rows = int(chunk[0]), int(shard[0])
        self._index: dict[int, NDArray[np.uint64]] = {}
        self._zstd = Zstd()

    def __len__(self) -> int:
        return int(self.shape[0])

    @property
    def row_bytes(self) -> int:
        """Uncompressed bytes of one row."""
        return int(math.prod(self.shape[1:]) * self.dtype.itemsize)

    def _shard_file(self, shard: int) -> Path:
        return self.path.joinpath("c", str(shard), *("0" for _ in self.shape[1:]))

    def _read_index(self, shard: int, file: int, name: Path) -> NDArray[np.uint64]:
        """(chunks of the shard, 2) offsets and sizes, from the end of the file; cached."""
        if shard in self._index:
            return self._index[shard]
        chunks, size = self.shard_rows // self.chunk_rows, os.fstat(file).st_size
        length = chunks * 16 + 4
        tail = os.pread(file, length, size - length) if size >= length else b""
        if len(tail) != length or google_crc32c.value(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
            raise FileError(f"{name}: truncated or damaged (the shard's index of {chunks} chunks is not at its end)")
        index = np.frombuffer(tail[:-4], dtype="<u8").reshape(chunks, 2)
        used = index[: -(-min(self.shard_rows, len(self) - shard * self.shard_rows) // self.chunk_rows)]
        if (used == _EMPTY).any() or (used.sum(axis=1) > size - length).any():
            raise FileError(f"{name}: incomplete (a chunk of rows below {len(self)} is missing)")
        if len(self._index) >= 4096:  # bounds the memory of very long arrays
            self._index.clear()
        self._index[shard] = index
        return index

    def check(self) -> None:
        """Look at the existence, size and index of every shard, without decompressing.

        Raises:
            FileError: a shard is missing, truncated or incomplete.
        """
        for shard in range(-(-len(self) // self.shard_rows)):
            with self._opened(shard) as (file, name):
                self._read_index(shard, file, name)

    @contextmanager
    def _opened(self, shard: int) -> Iterator[tuple[int, Path]]:
        name = self._shard_file(shard)
        try:
            file = os.open(name, os.O_RDONLY)
        except FileNotFoundError:
            raise FileError(f"{name}: no such file, though the array has {len(self)} rows") from None
        try:
            yield file, name
        finally:
            os.close(file)

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows (k, ...) by number, in the order asked for; repeats are allowed, each touched chunk is decoded once.

        Raises:
            ContractError: a row number is outside 0..n - 1.
            FileError: a shard is missing, truncated or damaged.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.ndim != 1:
            raise ContractError(f"{self.path.name}: row numbers have shape {rows.shape}, expected (k,)")
        out = np.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        if not len(rows):
            return out
        if rows.min() < 0 or rows.max() >= len(self):
            raise ContractError(f"{self.path.name}: rows {rows.min()}..{rows.max()} asked for, there are 0..{len(self) - 1}")
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        chunks = ordered // self.chunk_rows
        edges = [0, *(np.flatnonzero(np.diff(chunks)) + 1).tolist(), len(rows)]
        spans = list(itertools.pairwise(edges))
        scratch = np.empty((self.chunk_rows, *self.shape[1:]), dtype=self.dtype)
        per_shard, i = self.shard_rows // self.chunk_rows, 0
        while i < len(spans):
            shard = int(chunks[spans[i][0]]) // per_shard
            with self._opened(shard) as (file, name):
                index = self._read_index(shard, file, name)
                while i < len(spans) and int(chunks[spans[i][0]]) // per_shard == shard:
                    first, last = spans[i]
                    chunk = int(chunks[first])
                    at, target = int(order[first]), order[first:last]
                    inside = ordered[first:last] - chunk * self.chunk_rows
                    # A whole chunk in its own order (the common case of long reads) is decompressed in place.
                    whole = last - first == self.chunk_rows and bool(
                        (inside == np.arange(self.chunk_rows)).all() and (target == np.arange(at, at + self.chunk_rows)).all()
                    )
                    self._decode(file, name, index[chunk % per_shard], out[at : at + self.chunk_rows] if whole else scratch)
                    if not whole:
                        out[target] = scratch[inside]
                    i += 1
        return out

    def read_range(self, start: int, end: int) -> NDArray[Any]:
        """Rows start..end - 1."""
        return self.read(np.arange(start, end, dtype=np.int64))

    def _decode(self, file: int, name: Path, place: NDArray[np.uint64], out: NDArray[Any]) -> None:
        offset, size = int(place[0]), int(place[1])
        data = os.pread(file, size, offset)
        try:
            self._zstd.decode(data, out=out)
        except (RuntimeError, ValueError) as error:
            raise FileError(f"{name}: the chunk at byte {offset} is damaged ({error})") from None
