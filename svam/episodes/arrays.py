"""Sharded Zarr v3 arrays, written through zarr with codecs that every Zarr v3 reader has; and groups of them.

Each chunk carries a CRC-32C. Each array's attribute `shard_bytes` states the sizes of its files, since zarr itself reads a
missing one as zeros. `svam.episodes.rows` reads arrays; `svam.episodes.shards` writes them from several processes.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numcodecs import BitRound, blosc
from numpy.typing import DTypeLike, NDArray

from svam.contract import ContractError
from svam.episodes.lossy import LOSSY, picture_codec
from svam.files import FileError, read_json

if TYPE_CHECKING:
    import zarr

ATTRIBUTES_DIGEST = "attributes_sha256"
SHARD_BYTES = "shard_bytes"
ZSTD_LEVEL = 1
"""Of 256-pixel camera frames level 3 takes twice the time for a sixth fewer bytes."""

# Several threads of Blosc write a chunk's blocks in the order in which they get ready, which differs from run to run.
blosc.use_threads = False


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


def codecs_for(compression: str = "zstd") -> list[Any]:
    """What compresses a chunk: `zstd`, `lz4` or `blosc` (Blosc's Zstd, bytes by bit planes); and its checksum."""
    from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

    if compression == "zstd":
        return [ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()]
    if compression == "lz4":
        return [BloscCodec(cname="lz4", clevel=5, shuffle="noshuffle", typesize=1), Crc32cCodec()]
    return [BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"), Crc32cCodec()]


def create_array(
    path: Path, shape: tuple[int, ...], dtype: DTypeLike, chunk_rows: int, shard_rows: int, compression: str = "zstd",
    quality: int = 0, attributes: Mapping[str, Any] | None = None,
) -> zarr.Array[Any]:  # fmt: skip
    """An empty array (n, ...), chunks and shards of whole rows. quality: of `svam.episodes.lossy.LOSSY` pictures alone."""
    import zarr
    from zarr.codecs import Crc32cCodec

    codecs: dict[str, Any] = {"compressors": codecs_for(compression)}
    if compression in LOSSY:
        codecs = {"serializer": picture_codec(compression, quality), "compressors": [Crc32cCodec()]}
    with named_failures(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a codec is not in the specification
        return zarr.create_array(
            path, shape=shape, dtype=dtype, zarr_format=3, fill_value=0, chunks=(chunk_rows, *shape[1:]),
            shards=(shard_rows, *shape[1:]), filters=None, **codecs,
            attributes=None if attributes is None else dict(attributes),
            config={"write_empty_chunks": True},  # so that a missing chunk is always a fault
        )  # fmt: skip


def shard_file(path: Path, shard: int, axes: int) -> Path:
    """Where a shard of an array of so many axes is (Zarr's default name)."""
    return path.joinpath("c", str(shard), *["0"] * (axes - 1))


def state_sizes(array: zarr.Array[Any], path: Path) -> None:
    """Write the sizes of the files of a finished array into its attributes."""
    assert array.shards is not None
    files = [shard_file(path, shard, len(array.shape)) for shard in range(-(-array.shape[0] // array.shards[0]))]
    with named_failures(path):
        array.update_attributes({SHARD_BYTES: [file.stat().st_size for file in files]})


class ArrayWriter:
    """One array (n, *row_shape) that grows by `append`. At most one shard is held in memory. Made by `GroupWriter.array`."""

    def __init__(
        self, path: Path, row_shape: tuple[int, ...], dtype: DTypeLike, chunk_rows: int, shard_rows: int,
        mantissa_bits: int | None = None,
    ) -> None:  # fmt: skip
        if shard_rows % chunk_rows:
            raise ContractError(f"{path.name}: shard_rows ({shard_rows}) must be a multiple of chunk_rows ({chunk_rows})")
        self.path, self.rows = path, 0
        self._bits, self._filled, self._closed = mantissa_bits, 0, False
        self._buffer = np.empty((shard_rows, *row_shape), dtype=dtype)
        # Rounded mantissas are zeros in the same bit planes.
        compression, stated = ("zstd", None) if mantissa_bits is None else ("blosc", {"mantissa_bits": mantissa_bits})
        self._array = create_array(
            path, (0, *row_shape), self._buffer.dtype, chunk_rows, shard_rows, compression, attributes=stated
        )

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
        """Write what is still in memory, and the sizes of the files. May be called again."""
        if not self._closed:
            self._flush()
            state_sizes(self._array, self.path)
            self._closed = True


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
