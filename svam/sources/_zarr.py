"""Zarr arrays of other people, v2 and v3, a folder or a zip archive, through zarr-python.

Zarr itself runs whatever codec a header names and believes the lengths in Blosc chunks: both are looked at first here. It gives
the fill value where a chunk is absent, and its writers leave out chunks of nothing else: `left_out` counts them.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.errors import MachineError
from svam.files import FileError, refuse_lfs_pointer

_CODECS = {
    "blosc", "zstd", "zlib", "gzip", "lz4", "bz2", "lzma", "delta", "shuffle", "bitround", "crc32", "crc32c", "adler32",
    "fletcher32", "bytes", "transpose", "sharding_indexed",
}  # fmt: skip
_LARGEST_CHUNK = 2 << 30
_MOST_CHUNKS = 20_000_000
_LFS = b"version https://git-lfs"
_HEADERS = (".zarray", "zarr.json")


@dataclass(frozen=True)
class ZarrArray:
    """The facts of an array's header that decide what is read. `chunks`: what is stored as one file (a shard, where there are
    any); `left_out`: how many of those are absent; `blosc`: bytes that a Blosc chunk must have inside, 0 for other codecs."""

    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    left_out: int
    blosc: int

    @property
    def row(self) -> int:
        """Numbers of one row."""
        return math.prod(self.shape[1:])


class ZarrFolder:
    """One Zarr group; opened anew for every read, so that it can be sent to workers."""

    def __init__(self, path: Path) -> None:
        self.path, self.zipped = path, path.is_file()
        if self.zipped:
            refuse_lfs_pointer(path)
            with self._damage("the archive"), zipfile.ZipFile(path) as archive:
                keys = archive.namelist()
                if len(set(keys)) != len(keys):
                    raise FileError(f"{path}: holds two members of one name; write the buffer anew")
        else:
            keys = [file.relative_to(path).as_posix() for end in _HEADERS for file in path.glob(f"*/*/{end}")]
        self._headers = {key for key in keys if key.endswith(_HEADERS) and key.count("/") == 2}

    @contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        try:
            yield
        except (FileError, MachineError):
            raise
        except Exception as error:  # zarr, the codecs, zipfile and numpy raise some twenty types on damaged bytes
            raise FileError(f"{self.path}: {what} is truncated, damaged or not Zarr ({type(error).__name__})") from None

    def names(self) -> list[str]:
        """The arrays of `data`."""
        return sorted({key.split("/")[1] for key in self._headers if key.startswith("data/")})

    def _meta(self, name: str) -> dict[str, Any]:
        key = next((key for key in (f"{name}/{end}" for end in _HEADERS) if key in self._headers), None)
        if key is None:
            raise FileError(f"{self.path}: array {name} is missing; data has {', '.join(self.names()) or 'none'}")
        with self._damage(key):
            if self.zipped:
                with zipfile.ZipFile(self.path) as archive:
                    text = archive.read(key)
            else:
                refuse_lfs_pointer(self.path / key)
                text = (self.path / key).read_bytes()
            meta: dict[str, Any] = json.loads(text)
            if meta.get("node_type", "array") != "array":
                raise FileError(f"{self.path}: {name} is a group, expected an array")
            return meta

    @contextmanager
    def _array(self, name: str, blosc: int) -> Iterator[Any]:
        """The array, opened by zarr; of its chunks, what their first bytes say is checked."""
        import zarr
        from zarr.storage import LocalStore, WrapperStore, ZipStore

        class Checked(WrapperStore[Any]):
            async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
                value = await super().get(key, prototype, byte_range)
                if value is not None and byte_range is None and not key.endswith((".zarray", ".zattrs", "zarr.json")):
                    _check_chunk(key, value.as_numpy_array()[:32].tobytes(), len(value), blosc)
                return value

        inner: Any = ZipStore(self.path, mode="r") if self.zipped else LocalStore(self.path, read_only=True)
        store = Checked(inner)
        try:
            yield zarr.open_array(store, path=name, mode="r")
        finally:
            store.close()

    def array(self, name: str) -> ZarrArray:
        """The header of an array, such as `data/img`.

        Raises:
            FileError: it is missing, damaged, or holds anything but numbers; or its chunks are absent and are no fill value.
            MachineError: a codec's library is missing.
        """
        meta = self._meta(name)
        with self._damage(f"the header of {name}"):
            if meta["zarr_format"] == 2 and (not isinstance(meta["dtype"], str) or np.dtype(meta["dtype"]).kind not in "uifb"):
                raise FileError(f"{self.path}: {name} is of dtype {str(meta['dtype'])[:60]!r}, expected numbers")
            codecs = [meta["compressor"], *(meta.get("filters") or [])] if meta["zarr_format"] == 2 else meta["codecs"]
            ids = [self._checked_codec(name, codec) for codec in _flat(codecs)]
            with self._array(name, 0) as opened:
                shape, chunks, dtype = opened.shape, opened.shards or opened.chunks, np.dtype(opened.dtype)
                if dtype.kind not in "uifb" or not shape:
                    raise FileError(f"{self.path}: {name} is {dtype} {shape}, expected numbers, a row a time step")
                size = math.prod(chunks) * dtype.itemsize
                if min(chunks) < 1 or size > _LARGEST_CHUNK:
                    raise FileError(f"{self.path}: {name} has chunks of {chunks}, expected less than 2 GiB each")
                total = math.prod(-(-length // chunk) for length, chunk in zip(shape, chunks, strict=True))
                if total > _MOST_CHUNKS:
                    raise FileError(f"{self.path}: {name} claims {total} chunks, more than {_MOST_CHUNKS}; rechunk it")
                present = opened.nchunks_initialized * total // max(1, opened.nchunks)
            if present < total and self.zipped:
                with zipfile.ZipFile(self.path) as archive:
                    for info in archive.infolist():  # each stands in the archive's list too: damaged, chunks seem absent
                        archive.open(info).close()
            if total and not present:
                raise FileError(f"{self.path}: {name} has none of its {total} chunks: was the whole folder copied?")
            if present < total and meta.get("fill_value") is None:
                raise FileError(
                    f"{self.path}: {name} has {present} of its {total} chunks and states no fill value for the rest"
                )
            plain = ids in (["blosc"], ["bytes", "blosc"])
            return ZarrArray(name, shape, chunks, dtype, total - present, size if plain else 0)

    def _checked_codec(self, name: str, codec: Any) -> str:
        """The name of a codec that may be run."""
        known: str = (codec.get("id") or codec["name"]).removeprefix("numcodecs.")
        if known.startswith("imagecodecs_"):  # the pictures of Universal Manipulation Interface buffers: JPEG XL
            try:
                import_module("imagecodecs.numcodecs").register_codecs(verbose=False)
            except ImportError:
                raise MachineError(
                    f"{self.path}: {name} is compressed by {known!r}, which needs imagecodecs: pip install imagecodecs"
                ) from None
        elif known not in _CODECS:
            raise FileError(f"{self.path}: {name} is compressed by {known!r}, expected one of {', '.join(sorted(_CODECS))}")
        return known

    def rows(self, array: ZarrArray, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of an array; its fill value where a chunk is left out.

        Raises:
            FileError: a chunk is damaged.
        """
        if start == stop:
            return np.empty((0, *array.shape[1:]), array.dtype)
        with self._damage(f"{array.name}, rows {start} to {stop},"), self._array(array.name, array.blosc) as opened:
            values = np.asarray(opened[start:stop])
            if values.shape != (stop - start, *array.shape[1:]) or values.dtype != array.dtype:
                raise ValueError("changed since it was opened")
            return values


def _flat(codecs: Any) -> Iterator[Any]:
    """All codecs of a header, those inside of shards too."""
    for codec in codecs:
        if codec is not None:
            yield codec
            inside = codec.get("configuration") or {}
            yield from _flat([*inside.get("codecs", []), *inside.get("index_codecs", [])])


def _check_chunk(key: str, head: bytes, stored: int, blosc: int) -> None:
    """That a chunk is one, and as long as it says: Blosc's decoder would read on behind a truncated one."""
    if head.startswith(_LFS):
        raise FileError(f"{key}: a Git LFS pointer, not the file itself; run git lfs pull in the data set's repository")
    if blosc:  # header: versions, flags, item size; then bytes of content, of a block, of this chunk
        content, _, compressed = struct.unpack("<III", head[4:16])
        if content != blosc or compressed != stored:
            raise ValueError("lengths")
