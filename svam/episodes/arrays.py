"""Time-chunked, sharded Zarr v3 arrays: written row block by row block, each shard once; read by row numbers.

Writing goes through zarr. Reading follows the same published format (Zarr v3 core, `sharding_indexed` with a CRC-32C'd
index, chunks with a checksum each) without zarr's asynchronous machinery, whose overhead is several times the cost of
decompressing: each touched chunk is read and decoded once, whatever the order of the rows. A missing shard or chunk is
an error here, where zarr would return fill values. Any other Zarr v3 reader opens these arrays too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numcodecs import BitRound
from numpy.typing import DTypeLike, NDArray

from svam.contract import ContractError
from svam.episodes.chunks import DECODERS, Bytes, ShardFile, codecs_for
from svam.files import FileError, read_json, stamp

ATTRIBUTES_DIGEST = "attributes_sha256"
_DTYPES = {f"{kind}{8 * size}" for kind in ("int", "uint") for size in (1, 2, 4, 8)} | {"bool", "float16", "float32", "float64"}
_OPEN_SHARDS = 16
"""Shards that one reader keeps open."""
_SPARE_BYTES = 8 << 20
"""A buffer for chunks up to this size is kept between reads."""
_SHORT_ROW, _KEPT_BYTES, _KEPT_CHUNKS = 1024, 16 << 20, 4096
"""Of arrays with rows up to `_SHORT_ROW` bytes (vectors, never pictures) a reader keeps decoded chunks, at most so many."""
_PAGE, _ALIGNED_FROM = 4096, 1 << 16


def page_aligned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Uninitialised memory that begins on a page, as a file's contents do in the page cache.

    Copying between places whose addresses differ by a few bytes modulo 4096, as those of numpy's own large arrays do, takes
    twice the time: each read waits for a write that looks like its own address.
    """
    found = np.dtype(dtype)
    size = math.prod(shape) * found.itemsize
    if size < _ALIGNED_FROM:
        return np.empty(shape, found)
    room = np.empty(size + _PAGE, np.uint8)
    start = -room.ctypes.data % _PAGE
    return room[start : start + size].view(found).reshape(shape)


def round_mantissa(values: NDArray[Any], bits: int) -> NDArray[Any]:
    """Round floats to `bits` explicit mantissa bits (nearest, ties to even), so that they compress; same shape and dtype.

    The codec of numcodecs is applied before writing instead of being named in the array's metadata: its decoding does
    nothing, it is not in the Zarr v3 core specification, and other readers would refuse the array.
    """
    if bits >= np.finfo(values.dtype).nmant:
        return values
    rounded = np.asarray(BitRound(keepbits=bits).encode(np.ascontiguousarray(values)))
    return rounded.view(values.dtype).reshape(values.shape)


def attributes_digest(attributes: Mapping[str, Any]) -> str:
    """SHA-256 of a group's attributes as sorted JSON, which `GroupWriter` keeps among them: no shard's checksum covers them."""
    stated = {key: value for key, value in attributes.items() if key != ATTRIBUTES_DIGEST}
    return hashlib.sha256(json.dumps(stated, sort_keys=True, allow_nan=False).encode()).hexdigest()


@contextmanager
def named_failures(path: Path) -> Iterator[None]:
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

        if shard_rows % chunk_rows:
            raise ContractError(f"{path.name}: shard_rows ({shard_rows}) must be a multiple of chunk_rows ({chunk_rows})")
        self.path, self.rows = path, 0
        self._bits, self._filled = mantissa_bits, 0
        self._buffer = np.empty((shard_rows, *row_shape), dtype=dtype)
        with named_failures(path):
            self._array = zarr.create_array(
                path, shape=(0, *row_shape), dtype=self._buffer.dtype, zarr_format=3, fill_value=0,
                chunks=(chunk_rows, *row_shape), shards=self._buffer.shape, filters=None,
                compressors=codecs_for(mantissa_bits is not None, self._buffer[:chunk_rows].nbytes),
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
        with named_failures(self.path):
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
        self._adopted: list[str] = []

    def array(
        self, name: str, row_shape: tuple[int, ...], dtype: DTypeLike, chunk_rows: int, shard_rows: int,
        mantissa_bits: int | None = None,
    ) -> ArrayWriter:  # fmt: skip
        """Create the array `name` ("frames/front" makes the group "frames" as well) of rows of `row_shape`.

        `chunk_rows` rows are compressed together, `shard_rows` (a multiple) share a file; `mantissa_bits` rounds floats.
        """
        self._arrays[name] = ArrayWriter(self.path / name, row_shape, dtype, chunk_rows, shard_rows, mantissa_bits)
        return self._arrays[name]

    def adopt(self, name: str) -> Path:
        """Where an array of this group is to be written by other means; its parent groups are made with the others'."""
        self._adopted.append(name)
        return self.path / name

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
        folders = {parent for name in [*self._arrays, *self._adopted] for parent in Path(name).parents}
        for folder in folders | {Path()}:
            attributes = self.attributes if folder == Path() else {}
            if attributes:
                attributes = attributes | {ATTRIBUTES_DIGEST: attributes_digest(attributes)}
            text = json.dumps(
                {"attributes": attributes, "node_type": "group", "zarr_format": 3}, indent=1, sort_keys=True, allow_nan=False
            )
            with named_failures(self.path / folder):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
                (self.path / folder / "zarr.json").write_text(text + "\n", encoding="utf-8")


def read_attributes(path: Path) -> dict[str, Any]:
    """The attributes of the Zarr v3 group at `path`, which `GroupWriter` wrote.

    Raises:
        FileError: it is missing, or no Zarr v3 group, or its attributes are not those that were written.
    """
    path = Path(path)
    if not path.exists():
        raise FileError(f"{path}: no such directory")
    if not (path / "zarr.json").is_file():
        raise FileError(f"{path}: not a Zarr v3 group (it has no zarr.json)")
    metadata = read_json(path / "zarr.json")
    if not isinstance(metadata, dict) or metadata.get("node_type") != "group" or metadata.get("zarr_format") != 3:
        raise FileError(f"{path / 'zarr.json'}: not the metadata of a Zarr v3 group")
    attributes = dict(metadata.get("attributes", {}))
    try:
        same = attributes.pop(ATTRIBUTES_DIGEST, None) == attributes_digest(attributes)
    except ValueError:  # NaN, which no writer of ours leaves
        same = False
    if attributes and not same:
        raise FileError(f"{path / 'zarr.json'}: its attributes are damaged or were edited; run the stage that writes it again")
    return attributes


class RowReader:
    """Reads rows of one array that `ArrayWriter` wrote. It keeps the shards it read last open; threads may share it.

    It may be pickled: the copy opens files of its own. An array that is replaced or changed while a reader is in use is an
    error, since rows of two arrays would mix.

    Attributes: `path`; `shape` (n, ...); `dtype`; `chunk_rows`, `shard_rows`; `attributes`.
    """

    def __init__(self, path: Path) -> None:
        """Read the metadata.

        Raises:
            FileError: no array is there, or its layout is not that of `ArrayWriter`.
        """
        self.path = Path(path)
        file = self.path / "zarr.json"
        if not file.is_file():
            raise FileError(f"{self.path}: no such array")
        self._stamp, metadata = stamp(file), read_json(file)
        try:
            self.shape: tuple[int, ...] = tuple(metadata["shape"])
            self.attributes: Mapping[str, Any] = metadata["attributes"]
            (sharding,) = metadata["codecs"]
            inner = sharding["configuration"]
            shard, chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"], inner["chunk_shape"]
            first = inner["codecs"][0]
            interleaved = first["name"] == "transpose" and first["configuration"]["order"] == [1, 0, *range(2, len(chunk))]
            codecs = tuple(codec["name"] for codec in inner["codecs"][1 if interleaved else 0 :])
            every = [sharding, *inner["codecs"], *inner["index_codecs"]]
            known = (
                codecs in DECODERS
                and [codec["name"] for codec in (sharding, *inner["index_codecs"])] == ["sharding_indexed", "bytes", "crc32c"]
                and all((codec.get("configuration") or {}).get("endian", "little") == "little" for codec in every)
                and inner.get("index_location", "end") == "end"
                and metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
                and (metadata["zarr_format"], metadata["node_type"]) == (3, "array")
                and metadata["data_type"] in _DTYPES
                and all(type(size) is int and size >= 0 for size in (*self.shape, *shard, *chunk))
                and tuple(shard[1:]) == tuple(chunk[1:]) == self.shape[1:]
                and 0 < chunk[0] <= shard[0]
                and shard[0] % chunk[0] == 0
            )
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise FileError(f"{file}: not the metadata of a sharded Zarr v3 array ({error!r})") from None
        if not known:
            raise FileError(f"{file}: expected shards of Zstd, Blosc or raw chunks that span whole rows, found {codecs}")
        self.dtype = np.dtype(metadata["data_type"])
        self.chunk_rows, self.shard_rows = int(chunk[0]), int(shard[0])
        self._codecs = codecs
        self._interleaved = interleaved and len(chunk) > 1 and self.chunk_rows > 1  # one frame's lines are in its own order
        self._short = len(self.shape) <= 2 and self.row_bytes <= _SHORT_ROW
        self._within = np.arange(self.chunk_rows, dtype=np.int64)
        self._files: dict[int, ShardFile] = {}
        self._spare: list[NDArray[Any]] = []
        self._kept: dict[int, NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}, "_spare": [], "_kept": {}}

    def __len__(self) -> int:
        return int(self.shape[0])

    @property
    def compressor(self) -> str:
        """The name of what compresses a chunk: `zstd`, `blosc`, or `bytes` where nothing does."""
        return next((name for name in self._codecs if name in ("zstd", "blosc")), "bytes")

    @property
    def row_bytes(self) -> int:
        """Uncompressed bytes of one row."""
        return int(math.prod(self.shape[1:]) * self.dtype.itemsize)

    def _open(self, shard: int) -> ShardFile:
        if stamp(self.path / "zarr.json") != self._stamp:
            raise FileError(f"{self.path}: replaced or changed while it was in use; open it again")
        name = self.path.joinpath("c", str(shard), *("0" for _ in self.shape[1:]))
        used = -(-min(self.shard_rows, len(self) - shard * self.shard_rows) // self.chunk_rows)
        return ShardFile(name, self.shard_rows // self.chunk_rows, used, len(self))

    def _shard(self, shard: int) -> ShardFile:
        file = self._files.get(shard)
        if file is None:
            file = self._open(shard)
            for old in list(self._files)[: max(0, len(self._files) + 1 - _OPEN_SHARDS)]:
                self._files.pop(old, None)
            self._files[shard] = file
        elif not file.unchanged():
            raise FileError(f"{file.name}: replaced or changed while it was in use; open it again")
        return file

    def check(self) -> None:
        """Look at the existence, size and index of every shard, without decompressing.

        Raises:
            FileError: a shard is missing, truncated or incomplete.
        """
        for shard in range(-(-len(self) // self.shard_rows)):
            self._open(shard)

    def read(self, rows: NDArray[np.int64], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows (k, ...) by number, in the order asked for; repeats are allowed, each touched chunk is decoded once.

        Args:
            out: C-contiguous (k, ...) of the array's dtype to read into, and to be returned. Large rows are read at twice the
                speed into a buffer that is used again (the system has to clear new memory) and is `page_aligned`.

        Raises:
            ContractError: a row number is outside 0..n - 1, or `out` does not fit.
            FileError: a shard is missing, truncated, damaged or replaced.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.ndim != 1:
            raise ContractError(f"{self.path.name}: row numbers have shape {rows.shape}, expected (k,)")
        k = len(rows)
        if out is None:
            out = page_aligned((k, *self.shape[1:]), self.dtype)
        elif out.shape != (k, *self.shape[1:]) or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ContractError(
                f"{self.path.name}: out is {out.dtype} {out.shape}, expected {self.dtype} {(k, *self.shape[1:])}"
            )
        if not k:
            return out
        steps = rows[1:] - rows[:-1]
        low, high = (int(steps.min()), int(steps.max())) if k > 1 else (1, 1)
        order = None if low >= 0 else np.argsort(rows, kind="stable")
        ordered = rows if order is None else rows[order]
        if ordered[0] < 0 or ordered[-1] >= len(self):
            raise ContractError(f"{self.path.name}: rows {ordered[0]}..{ordered[-1]} asked for, there are 0..{len(self) - 1}")
        step = low if low == high and low > 0 else None  # rows at equal distances, the usual clip, are copied as a slice
        chunks = ordered // self.chunk_rows
        edges = [0, *(np.flatnonzero(chunks[1:] != chunks[:-1]) + 1).tolist(), k]
        numbers: list[int] = chunks[edges[:-1]].tolist()
        if self._short:
            for i, chunk in enumerate(self._decoded(numbers)):
                inside = ordered[edges[i] : edges[i + 1]] - numbers[i] * self.chunk_rows
                out[slice(edges[i], edges[i + 1]) if order is None else order[edges[i] : edges[i + 1]]] = chunk[inside]
            return out

        scratch: NDArray[Any] | None = None
        for i, (file, where, data) in enumerate(self._chunks(numbers)):
            first, last = edges[i], edges[i + 1]
            inside = ordered[first:last] - numbers[i] * self.chunk_rows
            at = first if order is None else int(order[first])
            whole = not self._interleaved and last - first == self.chunk_rows
            if whole and self._is_whole(inside, None if order is None else order[first:last]):
                self._decode(file, where, data, out[at : at + self.chunk_rows])
                continue
            scratch = self._buffer() if scratch is None else scratch
            self._decode(file, where, data, scratch)
            decoded = scratch.swapaxes(0, 1) if self._interleaved else scratch
            if step is not None:
                start = int(inside[0])
                out[first:last] = decoded[start : start + (last - first - 1) * step + 1 : step]
            elif order is None and not self._interleaved:
                np.take(decoded, inside, axis=0, out=out[first:last], mode="clip")
            else:
                out[slice(first, last) if order is None else order[first:last]] = decoded[inside]
        if scratch is not None and scratch.nbytes <= _SPARE_BYTES:
            self._spare[:] = [scratch]
        return out

    def _decoded(self, numbers: list[int]) -> Iterator[NDArray[Any]]:
        """Whole chunks (chunk_rows, ...) of an array of short rows, in the order asked for; the ones decoded last are kept."""
        for shard in {number * self.chunk_rows // self.shard_rows for number in numbers}:
            self._shard(shard)  # also where all of it is kept: a replaced array is an error
        known = {number: chunk for number in numbers if (chunk := self._kept.get(number)) is not None}
        missing = self._chunks([number for number in numbers if number not in known])
        most = max(1, min(_KEPT_CHUNKS, _KEPT_BYTES // (self.chunk_rows * max(1, self.row_bytes))))
        for number in numbers:
            if (chunk := known.get(number)) is None:
                stored = self._new_buffer()
                self._decode(*next(missing), stored)
                chunk = self._kept[number] = stored.swapaxes(0, 1) if self._interleaved else stored
                for oldest in list(itertools.islice(self._kept, max(0, len(self._kept) - most))):
                    self._kept.pop(oldest, None)
            yield chunk

    def read_range(self, start: int, end: int) -> NDArray[Any]:
        """Rows start..end - 1."""
        return self.read(np.arange(start, end, dtype=np.int64))

    def encoded(self, chunk: int) -> bytes:
        """The bytes of chunk `chunk` as they are stored, of an array with a codec.

        Raises:
            FileError: its shard is missing, truncated, damaged or replaced.
        """
        ((_, _, data),) = self._chunks([chunk])
        assert data is not None
        return data.tobytes()

    def _is_whole(self, inside: NDArray[np.int64], targets: NDArray[np.int64] | None) -> bool:
        """Whether as many rows as a chunk has are the chunk in its own order, so that it can be decoded in place."""
        if self.chunk_rows == 1:
            return True
        return np.array_equal(inside, self._within) and (targets is None or np.array_equal(targets - targets[0], self._within))

    def _buffer(self) -> NDArray[Any]:
        """Room for one chunk as it is stored, which no other thread uses."""
        try:
            return self._spare.pop()
        except IndexError:
            return self._new_buffer()

    def _new_buffer(self) -> NDArray[Any]:
        """Room for one chunk as it is stored."""
        stored = (self.chunk_rows, *self.shape[1:])
        return page_aligned((stored[1], stored[0], *stored[2:]) if self._interleaved else stored, self.dtype)

    def _chunks(self, numbers: list[int]) -> Iterator[tuple[ShardFile, list[int], Bytes | None]]:
        """Shard, [offset, size] and encoded bytes of each chunk; raw chunks are not read yet: they go where they belong."""
        per_shard = self.shard_rows // self.chunk_rows
        for shard, members in itertools.groupby(numbers, lambda number: number // per_shard):
            file = self._shard(shard)
            inside = [number - shard * per_shard for number in members]
            if DECODERS[self._codecs] is None:
                yield from ((file, where, None) for where in file.places(inside))
            else:
                yield from ((file, where, data) for where, data in file.chunks(inside))

    def _decode(self, file: ShardFile, where: list[int], data: Bytes | None, out: NDArray[Any]) -> None:
        decode = DECODERS[self._codecs]
        try:
            if decode is None or data is None:
                file.read_raw(where[0], where[1], out)
            else:
                decode(data, out)
        except (RuntimeError, ValueError) as error:
            raise FileError(f"{file.name}: the chunk at byte {where[0]} is damaged ({error})") from None
