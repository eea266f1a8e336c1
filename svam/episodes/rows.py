"""Rows of sharded Zarr v3 arrays, read by their numbers.

The reader follows the published format (Zarr v3 core, `sharding_indexed` with a CRC-32C'd index, chunks with a checksum each)
without zarr's asynchronous machinery, whose overhead is several times the cost of decompressing: each touched chunk is read
and decoded once, whatever the order of the rows; of keyed chunks (`svam.episodes.keyed`) only the rows asked for and what they
rest on. A missing shard or chunk is an error here, where zarr would return fill values. Any other Zarr v3 reader opens these
arrays too; the keyed ones where this package is installed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import ContractError
from svam.episodes.chunks import DECODERS, Bytes, ShardFile
from svam.episodes.keyed import CODEC, Part
from svam.episodes.keyed_reader import KeyedReader, Touched
from svam.episodes.memory import page_aligned
from svam.files import FileError, read_json, stamp

_DTYPES = {f"{kind}{8 * size}" for kind in ("int", "uint") for size in (1, 2, 4, 8)} | {"bool", "float16", "float32", "float64"}
_OPEN_SHARDS = 16
"""Shards that one reader keeps open."""
_SHORT_ROW, _KEPT_BYTES, _KEPT_CHUNKS = 1024, 16 << 20, 4096
"""Of arrays with rows up to `_SHORT_ROW` bytes (vectors, never pictures) a reader keeps decoded chunks, at most so many."""


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
                and (codecs != (CODEC,) or (metadata["data_type"] == "uint8" and math.prod(chunk) > 0))
                and shard[0] % chunk[0] == 0
            )
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise FileError(f"{file}: not the metadata of a sharded Zarr v3 array ({error!r})") from None
        if not known:
            raise FileError(f"{file}: expected shards of Zstd, Blosc, keyed or raw chunks that span whole rows, found {codecs}")
        self.dtype = np.dtype(metadata["data_type"])
        self.chunk_rows, self.shard_rows = int(chunk[0]), int(shard[0])
        self._codecs = codecs
        self._interleaved = interleaved and len(chunk) > 1 and self.chunk_rows > 1  # one frame's lines are in its own order
        self._short = len(self.shape) <= 2 and self.row_bytes <= _SHORT_ROW
        self._within = np.arange(self.chunk_rows, dtype=np.int64)
        self._files: dict[int, ShardFile] = {}
        self._kept: dict[int, NDArray[Any]] = {}
        self._keyed = KeyedReader(self.chunk_rows, self.row_bytes) if codecs == (CODEC,) else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}, "_kept": {}}

    def __len__(self) -> int:
        return int(self.shape[0])

    @property
    def compressor(self) -> str:
        """The name of what compresses a chunk: `zstd`, `blosc`, the keyed codec's, or `bytes` where nothing does."""
        return next((name for name in self._codecs if name in ("zstd", "blosc", CODEC)), "bytes")

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
            out: C-contiguous (k, ...) of the array's dtype to read into, and to be returned. Without it the result is
                `page_aligned` memory, which the next result may have when nothing refers to this one any more.

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
        if self._keyed is not None:
            self._keyed.read(self._touched(rows), out)
            return out
        steps = rows[1:] - rows[:-1]
        low, high = (int(steps.min()), int(steps.max())) if k > 1 else (1, 1)
        order = None if low >= 0 else np.argsort(rows, kind="stable")
        ordered = rows if order is None else rows[order]
        self._check_within(int(ordered[0]), int(ordered[-1]))
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
        return out

    def _check_within(self, first: int, last: int) -> None:
        if first < 0 or last >= len(self):
            raise ContractError(f"{self.path.name}: rows {first}..{last} asked for, there are 0..{len(self) - 1}")

    def _touched(self, rows: NDArray[np.int64]) -> list[Touched]:
        """Where the frames `rows` (k,) lie in their keyed chunks, chunk by chunk, and which rows of the result they are."""
        found: dict[int, dict[int, list[int]]] = {}
        wanted = rows.tolist()
        self._check_within(min(wanted), max(wanted))
        for result, row in enumerate(wanted):
            number, frame = divmod(row, self.chunk_rows)
            if (targets := found.get(number)) is None:
                targets = found[number] = {}
            if frame in targets:
                targets[frame].append(result)
            else:
                targets[frame] = [result]
        per_shard = self.shard_rows // self.chunk_rows
        touched = []
        for number in sorted(found):
            file = self._shard(number // per_shard)
            ((offset, size),) = file.places([number % per_shard])
            touched.append(Touched(number, file, offset, size, found[number]))
        return touched

    def _decoded(self, numbers: list[int]) -> Iterator[NDArray[Any]]:
        """Whole chunks (chunk_rows, ...) of an array of short rows, in the order asked for; the ones decoded last are kept."""
        for shard in {number * self.chunk_rows // self.shard_rows for number in numbers}:
            self._shard(shard)  # also where all of it is kept: a replaced array is an error
        known = {number: chunk for number in numbers if (chunk := self._kept.get(number)) is not None}
        missing = self._chunks([number for number in numbers if number not in known])
        most = max(1, min(_KEPT_CHUNKS, _KEPT_BYTES // (self.chunk_rows * max(1, self.row_bytes))))
        for number in numbers:
            if (chunk := known.get(number)) is None:
                stored = self._buffer()
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

    def parts(self, rows: NDArray[np.int64]) -> list[tuple[Touched, Part]]:
        """What reading `rows` (k,) of a keyed array reads and decodes, chunk by chunk.

        Raises:
            FileError: a shard is missing, truncated, damaged or replaced.
        """
        assert self._keyed is not None
        touched = self._touched(rows)
        return list(zip(touched, self._keyed.parts(touched), strict=True))

    def _is_whole(self, inside: NDArray[np.int64], targets: NDArray[np.int64] | None) -> bool:
        """Whether as many rows as a chunk has are the chunk in its own order, so that it can be decoded in place."""
        if self.chunk_rows == 1:
            return True
        return np.array_equal(inside, self._within) and (targets is None or np.array_equal(targets - targets[0], self._within))

    def _buffer(self) -> NDArray[Any]:
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
