"""Zarr v2 arrays of other people, read through zarr, but only after their headers and chunks were looked at.

Zarr itself gives the fill value for an absent chunk, runs whatever filter a header names, and trusts lengths.
"""

from __future__ import annotations

import json
import lzma
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.errors import MachineError
from svam.files import FileError

_COMPRESSORS = ("blosc", "zstd", "zlib", "gzip", "lz4", "bz2", "lzma")
_LARGEST_CHUNK = 2 << 30
# What zarr, the codecs, zipfile and numpy raise on damaged bytes.
_DAMAGE = (
    OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RuntimeError, MemoryError,
    NotImplementedError, SyntaxError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip


@contextmanager
def _damage_as_file_error(file: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (FileError, MachineError):
        raise
    except _DAMAGE as error:
        raise FileError(f"{file}: {what} is truncated, damaged or not Zarr v2 ({type(error).__name__})") from None


@dataclass(frozen=True)
class ZarrArray:
    """The facts of `.zarray` that decide what is read."""

    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    separator: str
    blosc: bool

    @property
    def row(self) -> int:
        """Numbers of one row."""
        return math.prod(self.shape[1:])


class ZarrFolder:
    """One Zarr v2 group, a folder or a zip archive; opened anew for every read, so that it can be sent to workers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.zipped = path.is_file()
        self._names: set[str] = set()
        if self.zipped:
            with _damage_as_file_error(path, "the archive"), zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
                self._names = {info.filename for info in infos}
                if len(self._names) != len(infos):
                    raise FileError(f"{path}: holds two members of one name; write the buffer anew")

    def names(self) -> list[str]:
        """The arrays of `data`."""
        if self.zipped:
            found = (re.fullmatch(r"data/([^/]+)/\.zarray", name) for name in self._names)
            return sorted(match[1] for match in found if match)
        return sorted(file.parent.name for file in self.path.glob("data/*/.zarray"))

    def _start(self, key: str, length: int) -> tuple[bytes, int]:
        """The first bytes of a member and its size."""
        if not self.zipped:
            file = self.path / key
            with file.open("rb") as opened:
                return opened.read(length), file.stat().st_size
        with zipfile.ZipFile(self.path) as archive, archive.open(key) as member:
            return member.read(length), archive.getinfo(key).file_size

    def _has(self, key: str) -> bool:
        return key in self._names if self.zipped else (self.path / key).is_file()

    def array(self, name: str) -> ZarrArray:
        """The header of an array, such as `data/img`.

        Raises:
            FileError: it is missing, damaged, or holds anything but numbers.
        """
        key = f"{name}/.zarray"
        if not self._has(key):
            raise FileError(f"{self.path}: array {name} is missing; data has {', '.join(self.names()) or 'none'}")
        with _damage_as_file_error(self.path, key):
            raw = self._start(key, 1 << 20)[0]
            try:
                meta = json.loads(raw.decode("utf-8"))
            except RecursionError:
                raise ValueError("nested too deeply") from None
            if meta["zarr_format"] != 2:
                raise FileError(f"{self.path}: {name} is of zarr_format {meta['zarr_format']!r}, expected 2")
            if not isinstance(meta["dtype"], str) or np.dtype(meta["dtype"]).kind not in "uifb":
                raise FileError(f"{self.path}: {name} is of dtype {str(meta['dtype'])[:60]!r}, expected numbers")
            dtype = np.dtype(meta["dtype"])
            if meta.get("filters"):
                raise FileError(f"{self.path}: {name} has filters, which are not read; expected a compressor alone")
            shape, chunks = (tuple(int(length) for length in meta[part]) for part in ("shape", "chunks"))
            if len(shape) != len(chunks) or not shape or min(chunks) < 1 or min(shape) < 0:
                raise ValueError("shape and chunks")
            if math.prod(chunks) * dtype.itemsize > _LARGEST_CHUNK:
                raise FileError(
                    f"{self.path}: {name} has chunks of {chunks}, expected less than {_LARGEST_CHUNK >> 30} GiB each"
                )
            compressor = meta["compressor"]
            codec = None if compressor is None else compressor["id"]
            self._check_codec(name, codec)
            separator = meta.get("dimension_separator", ".")
            if separator not in (".", "/"):
                raise ValueError("dimension_separator")
            return ZarrArray(name, shape, chunks, dtype, separator, codec == "blosc")

    def _check_codec(self, name: str, codec: str | None) -> None:
        if codec is None or codec in _COMPRESSORS:
            return
        if codec.startswith("imagecodecs_"):  # the pictures of Universal Manipulation Interface buffers: JPEG XL
            try:
                codecs = import_module("imagecodecs.numcodecs")
            except ImportError:
                raise MachineError(
                    f"{self.path}: {name} is compressed by {codec!r}, which needs imagecodecs: pip install imagecodecs"
                ) from None
            codecs.register_codecs(verbose=False)
            return
        raise FileError(f"{self.path}: {name} is compressed by {codec!r}, expected one of {', '.join(_COMPRESSORS)}")

    def _check_chunks(self, array: ZarrArray, start: int, stop: int) -> None:
        """All chunks of these rows are there and as long as they say."""
        size = math.prod(array.chunks) * array.dtype.itemsize
        rest = [range(-(-length // chunk)) for length, chunk in zip(array.shape[1:], array.chunks[1:], strict=True)]
        for place in product(range(start // array.chunks[0], -(-stop // array.chunks[0])), *rest):
            key = f"{array.name}/{array.separator.join(str(part) for part in place)}"
            if not self._has(key):
                raise FileError(f"{self.path}: chunk {key} is missing")
            with _damage_as_file_error(self.path, f"chunk {key}"):
                head, stored = self._start(key, 16)
                if stored > size + size // 8 + 65536:
                    raise ValueError("larger than its array allows")
                if array.blosc:  # header: versions, flags, item size; then bytes of content, of a block, of this chunk
                    content, _, compressed = struct.unpack("<III", head[4:16])
                    if content != size or compressed != stored:
                        raise ValueError("lengths")

    def rows(self, array: ZarrArray, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of an array.

        Raises:
            FileError: a chunk is missing or damaged.
        """
        import zarr
        from zarr.storage import LocalStore, ZipStore

        if start == stop:
            return np.empty((0, *array.shape[1:]), array.dtype)
        self._check_chunks(array, start, stop)
        with _damage_as_file_error(self.path, f"{array.name}, rows {start} to {stop},"):
            store: Any = ZipStore(self.path, mode="r") if self.zipped else LocalStore(self.path, read_only=True)
            try:
                opened = zarr.open_array(store, path=array.name, mode="r", zarr_format=2)
                values = np.asarray(opened[start:stop])
            finally:
                store.close()
            if values.shape != (stop - start, *array.shape[1:]) or values.dtype != array.dtype:
                raise ValueError("changed since it was opened")
            return values
