"""Zarr arrays of other people, v2 and v3, a folder or a zip archive, through zarr-python.

Zarr itself runs whatever codec a header names and believes the lengths in Blosc chunks: both are looked at first here. It gives
the fill value where a chunk is absent, zero where a header of v2 states none, and its writers leave out chunks of nothing else:
`left_out` counts them.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore, WrapperStore, ZipStore

from svam.errors import MachineError
from svam.files import FileError, refuse_lfs_pointer
from svam.sources._choice import contents

_CODECS = {
    "blosc", "zstd", "zlib", "gzip", "lz4", "bz2", "lzma", "delta", "shuffle", "bitround", "crc32", "crc32c", "adler32",
    "fletcher32", "bytes", "transpose", "sharding_indexed",
}  # fmt: skip
_NUMBERS = re.compile(r"[<>|][uifb][1248]|u?int\d+|float\d+|bool")
"""Data types as headers of v2 and of v3 spell them."""
_LARGEST_CHUNK = 2 << 30
_MOST_CHUNKS = 20_000_000
_HEADERS = (".zarray", "zarr.json")


@dataclass(frozen=True)
class ZarrArray:
    """The facts of an array's header that decide what is read. `chunks`: what is stored as one file (a shard, where there are
    any); `left_out`: how many of those are absent; `empty`: whether all are; `blosc`: bytes that a Blosc chunk must have
    inside, 0 for other codecs."""

    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    left_out: int
    empty: bool
    blosc: int

    @property
    def row(self) -> int:
        """Numbers of one row."""
        return math.prod(self.shape[1:])


class ZarrFolder:
    """One Zarr group, whose arrays of `data` are `names`; opened anew for every read, so that it can be sent to workers."""

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
        self._headers = {key.rpartition("/")[0]: key for key in keys if key.endswith(_HEADERS) and key.count("/") == 2}
        self.names = sorted(name.removeprefix("data/") for name in self._headers if name.startswith("data/"))
        tops = ", ".join(sorted({key.partition("/")[0] for key in keys})[:5]) if self.zipped else contents(path)
        inner = "; zip what is in that folder, without the folder" * any("/data/" in key for key in keys)
        self._there = f"it has {', '.join(sorted(self._headers)) or tops}{inner}"

    @contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        try:
            yield
        except (FileError, MachineError):
            raise
        except Exception as error:  # zarr, the codecs, zipfile and numpy raise some twenty types on damaged bytes
            raise FileError(f"{self.path}: {what} is truncated, damaged or not Zarr ({type(error).__name__})") from None

    def _header(self, name: str) -> dict[str, Any]:
        if (key := self._headers.get(name)) is None:
            raise FileError(f"{self.path}: array {name} is missing; {self._there}")
        refuse_lfs_pointer(self.path / key)
        with self._damage(key):
            if self.zipped:
                with zipfile.ZipFile(self.path) as archive:
                    content = archive.read(key)
            else:
                content = (self.path / key).read_bytes()
            header: dict[str, Any] = json.loads(content)
            if header.get("node_type", "array") != "array":
                raise FileError(f"{self.path}: {name} is a group, expected an array")
            return header

    @contextmanager
    def _opened(self, name: str, blosc: int = 0) -> Iterator[Any]:
        """The array in zarr's hands, each of whose chunks is looked at before it is decoded."""
        path = self.path

        class Checked(WrapperStore[Any]):
            async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
                value = await super().get(key, prototype, byte_range)
                if value is not None and byte_range is None and not key.endswith((*_HEADERS, ".zattrs")):
                    head = value.as_numpy_array()[:16].tobytes()
                    if head.startswith(b"version "):
                        refuse_lfs_pointer(path / key)
                    if blosc:  # header: versions, flags, item size; then bytes of content, of a block, of this chunk
                        content, _, compressed = struct.unpack("<III", head[4:16])
                        if content != blosc or compressed != len(value):  # Blosc's decoder would read on behind its end
                            raise ValueError("lengths")
                return value

        store = Checked(ZipStore(path, mode="r") if self.zipped else LocalStore(path, read_only=True))
        try:
            yield zarr.open_array(store, path=name, mode="r")
        finally:
            store.close()

    def array(self, name: str) -> ZarrArray:
        """The header of an array, such as `data/img`.

        Raises:
            FileError: it is missing, damaged, or holds anything but numbers.
            MachineError: a codec's library is missing.
        """
        header = self._header(name)
        with self._damage(f"the header of {name}"):
            if header["zarr_format"] == 2:
                dtype, codecs = header["dtype"], [header["compressor"], *(header.get("filters") or [])]
            else:
                dtype, codecs = header["data_type"], header["codecs"]
            if not isinstance(dtype, str) or not _NUMBERS.fullmatch(dtype):
                raise FileError(f"{self.path}: {name} is of dtype {str(dtype)[:60]!r}, expected numbers")
            codecs = list(_codec_names(codecs))
            self._check_codecs(name, codecs)
            with self._opened(name) as opened:
                shape, chunks, dtype = opened.shape, opened.shards or opened.chunks, np.dtype(opened.dtype)
                if not shape:
                    raise FileError(f"{self.path}: {name} is a single number, expected a row a time step")
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
            plain = codecs in (["blosc"], ["bytes", "blosc"])
            return ZarrArray(name, shape, chunks, dtype, total - present, 0 == present < total, size if plain else 0)

    def _check_codecs(self, name: str, codecs: list[str]) -> None:
        """That all may be run."""
        pictures = {codec for codec in codecs if codec.startswith("imagecodecs_")}
        if unknown := sorted(set(codecs) - _CODECS - pictures):
            known = ", ".join(sorted(_CODECS))
            raise FileError(f"{self.path}: {name} is compressed by {unknown[0]!r}, expected one of {known}")
        if pictures:  # JPEG XL, of Universal Manipulation Interface buffers
            try:
                import_module("imagecodecs.numcodecs").register_codecs(verbose=False)
            except ImportError:
                needed = f"{min(pictures)!r}, which needs imagecodecs: pip install imagecodecs"
                raise MachineError(f"{self.path}: {name} is compressed by {needed}") from None

    def rows(self, array: ZarrArray, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of an array; its fill value where a chunk is left out, `FileError` where one is damaged."""
        if start == stop:
            return np.empty((0, *array.shape[1:]), array.dtype)
        with self._damage(f"{array.name}, rows {start} to {stop},"), self._opened(array.name, array.blosc) as opened:
            values = np.asarray(opened[start:stop])
            if values.shape != (stop - start, *array.shape[1:]) or values.dtype != array.dtype:
                raise ValueError("changed since it was opened")
            return values


def _codec_names(codecs: Any) -> Iterator[str]:
    """Of all codecs of a header, those inside of shards too."""
    for codec in filter(None, codecs):
        yield (codec.get("id") or codec["name"]).removeprefix("numcodecs.")
        inside = codec.get("configuration") or {}
        yield from _codec_names([*inside.get("codecs", []), *inside.get("index_codecs", [])])
