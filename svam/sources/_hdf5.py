"""Reading HDF5 files that may be damaged: every failure is a `FileError` that names the file and the place in it.

Most HDF5 files carry no checksums, so a flipped byte can make the library report absurd shapes: what is allocated is bounded
by what the file can hold. A flipped pixel in an unchecked file cannot be noticed by anyone.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from svam.errors import MachineError, SvamError
from svam.files import FileError, refuse_lfs_pointer
from svam.sources._choice import contents
from svam.sources._picture_arrays import PictureArray, frames_per_block, needed_pictures

T = TypeVar("T")
# What h5py is known to raise on damaged files, on missing names and on values that it cannot convert.
_ERRORS = (
    OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError, EOFError,
)  # fmt: skip
MAX_VECTOR_BYTES = 2**30
"""Largest vector dataset of one episode, as stored and as read."""
MAX_CHUNK_BYTES = 2**30
"""Largest HDF5 chunk: the library holds one decompressed."""
# Per dataset: compressed chunks across a block's edge are needed twice, and the library's 1 MiB would decompress them twice.
_CACHE_BYTES = 2**27


@contextmanager
def guarded(file: Path, what: str) -> Iterator[None]:
    """Turn the HDF5 library's exceptions into a `FileError`."""
    try:
        yield
    except FileError:
        raise
    except _ERRORS as error:
        reason = " ".join(str(error).split())[:160]
        raise FileError(f"{file}: {what} is missing, truncated or damaged ({type(error).__name__}: {reason})") from None


def h5py_for(source: str) -> Any:
    """The h5py module, for `convert.source` = `source`.

    Raises:
        MachineError: h5py is not installed.
    """
    try:
        return importlib.import_module("h5py")
    except ImportError:
        raise MachineError(f"convert.source is {source!r}, which needs h5py: pip install -e \".[hdf5]\"") from None  # fmt: skip


def hdf5_files(path: Path) -> list[Path]:
    """`path` itself, or all .hdf5 and .h5 files under it, hidden ones left out, sorted with numbers as numbers.

    Raises:
        FileError: there is no such path, or no such file in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileError(f"{path}: no such file or directory")
    found = [
        file
        for file in path.rglob("*")
        if file.suffix in (".hdf5", ".h5")
        and file.is_file()
        and not any(p.startswith(".") for p in file.relative_to(path).parts)
    ]
    if not found:
        raise FileError(f"{path}: no .hdf5 or .h5 file in it or below it; it has {contents(path)}")
    return sorted(found, key=lambda file: [by_number(part) for part in file.relative_to(path).parts])


def most_common(values: Iterable[T]) -> T:
    """That of most files, by which the others are judged; of equals the first."""
    return Counter(values).most_common(1)[0][0]


def attempted(read: Callable[[], T]) -> T | SvamError:
    """What is read, or why it cannot be. A missing library is raised: it is no fault of one file."""
    try:
        return read()
    except MachineError:
        raise
    except SvamError as error:
        return error


def check_named(path: Path, named: Iterable[str], there: Iterable[str]) -> None:
    """That `convert.options.instructions` names only what there is: a misspelt key would silently say nothing.

    Raises:
        FileError: it names something else.
    """
    known = sorted(set(there))
    if absent := sorted(set(named) - set(known)):
        names = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
        raise FileError(f"{path}: convert.options.instructions names {absent[0]!r}, which is not there; it has {names}")


def by_number(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts `demo_2` before `demo_10`."""
    # ASCII digits only: isdigit() also admits characters that int() refuses.
    return [(0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]+)", name)]


def text_of(value: Any) -> str | None:
    """A string attribute or one row of a string dataset as str, stripped; None where it is no text.

    Raises:
        UnicodeError: the bytes are not UTF-8.
    """
    if isinstance(value, np.ndarray):
        if value.size != 1:
            return None
        value = value.reshape(-1)[0]
    if isinstance(value, bytes):  # numpy's fixed-length strings are bytes too
        value = value.decode("utf-8")
    if not isinstance(value, str):
        return None
    value.encode("utf-8")  # h5py hides undecodable bytes of a variable-length string as lone surrogates
    return value.strip(" \t\r\n\0")


class Hdf5File:
    """An HDF5 file open for reading; use it in a `with` statement.

    Raises:
        FileError: it is missing or no readable HDF5 file.
        MachineError: h5py is not installed.
    """

    def __init__(self, file: Path, source: str) -> None:
        """`source` is the value of `convert.source`, for messages."""
        self.file, self._h5py = file, h5py_for(source)
        if not file.is_file():
            raise FileError(f"{file}: no such file")
        refuse_lfs_pointer(file)
        try:
            self._root = self._h5py.File(file, "r", locking="best-effort", rdcc_nbytes=_CACHE_BYTES)
        except _ERRORS as error:
            reason = " ".join(str(error).split())[:160]
            raise FileError(f"{file}: truncated, damaged or no HDF5 file ({reason})") from None
        self._size = file.stat().st_size
        self._checked: set[str] = set()

    def __enter__(self) -> Hdf5File:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with guarded(self.file, "the end of the file"):
            self._root.close()

    def names(self, group: str) -> list[str]:
        """Members of a group, numbers sorted as numbers; nothing where there is no such group."""
        with guarded(self.file, group):
            found = self._root.get(group) if group != "/" else self._root
            if not isinstance(found, self._h5py.Group):
                return []
            names = sorted(found, key=by_number)
        for name in names:
            if not re.fullmatch(r"[\w .+-]+", name):
                raise FileError(f"{self.file}: {group} has a member named {name!r}, expected letters, digits and _.-")
        return names

    def is_group(self, name: str) -> bool:
        """Whether there is a group of this name."""
        with guarded(self.file, name):
            return isinstance(self._root.get(name), self._h5py.Group)

    def is_dataset(self, name: str) -> bool:
        """Whether there is a dataset of this name."""
        with guarded(self.file, name):
            return isinstance(self._root.get(name), self._h5py.Dataset)

    def attribute(self, name: str, key: str) -> Any:
        """The value of an attribute of `name`, None where there is none."""
        with guarded(self.file, f"attribute {key!r} of {name}"):
            holder = self._root[name]
            if key not in holder.attrs:
                return None
            return holder.attrs[key]

    def text_attribute(self, name: str, key: str) -> str | None:
        """A string attribute, stripped; None where there is none or where it is no string."""
        value = self.attribute(name, key)
        try:
            return text_of(value)
        except UnicodeError:
            raise FileError(f"{self.file}: attribute {key!r} of {name} is not valid UTF-8") from None

    def _dataset(self, name: str) -> Any:
        found = self._root.get(name)
        if not isinstance(found, self._h5py.Dataset):
            raise FileError(f"{self.file}: {name} is {'missing' if found is None else 'a group'}, expected a dataset")
        return found

    def layout(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of a dataset, as the file states them."""
        with guarded(self.file, name):
            found = self._dataset(name)
            if found.shape is None:
                raise FileError(f"{self.file}: {name} is an empty dataset")
            return tuple(int(size) for size in found.shape), found.dtype

    def listed(self, group: str) -> str:
        """What lies in a group, for messages."""
        names = self.names(group)
        parts = []
        for name in names[:12]:
            shape, dtype = self.layout(f"{group}/{name}") if self.is_dataset(f"{group}/{name}") else ("group", "")
            parts.append(f"{name} {dtype} {shape}".replace("  ", " "))
        return (", ".join(parts) or "nothing") + ", ..." * (len(names) > 12)

    def pictures(self, name: str) -> PictureArray:
        """How the pictures of a dataset lie.

        Raises:
            FileError: it holds none, or absurdly large ones.
        """
        pictures = needed_pictures(f"{self.file}: {name}", *self.layout(name))
        if pictures.dtype != np.uint8 and pictures.shape[0]:  # numbers in 0..1, which are no pictures of bytes, are told here
            pictures.rgb(self.rows(name, 0, 1), f"{self.file}: {name}", 0)
        return pictures

    def picture_blocks(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """All pictures of a dataset, as (k, H, W, 3) blocks; errors as `rows`."""
        pictures, row = self.pictures(name), 0
        for block in self.blocks(name, pictures.frame_bytes):
            yield pictures.rgb(block, f"{self.file}: {name}", row)
            row += len(block)

    def is_variable_bytes(self, name: str) -> bool:
        """Whether the rows are byte strings of any length."""
        with guarded(self.file, name):
            dtype = self._dataset(name).dtype
            string = self._h5py.check_string_dtype(dtype)
            return self._h5py.check_vlen_dtype(dtype) == np.uint8 or (string is not None and string.length is None)

    def _check_stored(self, name: str, found: Any) -> None:
        """That the values of a dataset are in this file, whole and readable, and no larger than it can hold."""
        if name in self._checked:
            return
        where = f"{self.file}: {name}"
        if found.is_virtual or found.external:
            raise FileError(f"{where} keeps its values in other files; copy it into one (h5repack), then convert that")
        creation = found.id.get_create_plist()
        filters = [creation.get_filter(i) for i in range(creation.get_nfilters())]
        for code, _, _, title in filters:
            if not self._h5py.h5z.filter_avail(code):
                self._load_plugins(where, code, title.decode("ascii", "replace"))
        expected = math.prod(found.shape) * found.dtype.itemsize
        if found.chunks is None:
            stored = found.id.get_storage_size()
            # A compact or contiguous dataset that nobody wrote reads as zeros; objects are pointers of another size.
            if not stored <= self._size or (stored < expected and not found.dtype.hasobject) or (expected and not stored):
                raise FileError(f"{where} claims {expected} bytes, of which {stored} are stored: damaged or never written")
        else:
            if math.prod(found.chunks) * found.dtype.itemsize > MAX_CHUNK_BYTES:
                raise FileError(
                    f"{where} has chunks of {found.chunks}, too large to read piece by piece; rechunk it (h5repack)"
                )
            chunks = math.prod(-(-size // chunk) for size, chunk in zip(found.shape, found.chunks, strict=True))
            # A chunk is at least some bytes of file, so an absurd shape is found before the library counts its chunks.
            stored = found.id.get_num_chunks() if chunks <= self._size else 0
            if stored < chunks:
                raise FileError(f"{where} has {stored} of its {chunks} chunks: damaged, or the recorder stopped early")
            if not filters and found.id.get_storage_size() > self._size:
                raise FileError(f"{where} claims {found.id.get_storage_size()} bytes in a file of {self._size}")
        self._checked.add(name)

    def _load_plugins(self, where: str, code: int, title: str) -> None:
        """Make the filters of hdf5plugin known, if it is installed."""
        with suppress(ImportError):  # said below
            importlib.import_module("hdf5plugin")
        if not self._h5py.h5z.filter_avail(code):
            raise MachineError(f"{where} is compressed with HDF5 filter {code} ({title}), which needs: pip install hdf5plugin")

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop - 1 as they are stored.

        Raises:
            FileError: they are not whole in this file.
            MachineError: they need a compression filter that is not installed.
        """
        with guarded(self.file, name):
            found = self._dataset(name)
            self._check_stored(name, found)
            values = np.asarray(found[start:stop])
            if len(values) != stop - start:
                raise FileError(f"{self.file}: {name} gives {len(values)} rows for {start}..{stop}")
            return values

    def blocks(self, name: str, row_bytes: int) -> Iterator[NDArray[Any]]:
        """All rows, at most 64 at a time and 64 MiB, unless one row of `row_bytes` is larger; in whole chunks if possible."""
        (steps, *_), _ = self.layout(name)
        with guarded(self.file, name):
            chunks = self._dataset(name).chunks
        count = frames_per_block(row_bytes)
        if chunks and 1 <= chunks[0] <= count:
            count -= count % chunks[0]
        for start in range(0, steps, count):
            yield self.rows(name, start, min(start + count, steps))

    def matrix(self, name: str) -> NDArray[np.float32]:
        """A vector per step as (n, d) float32; (n,) becomes (n, 1); float64 and integers are cast.

        Raises:
            FileError: it is no array of numbers, or too large to be a vector.
        """
        (shape, dtype) = self.layout(name)
        if dtype.kind not in "fiub" or len(shape) not in (1, 2):
            raise FileError(f"{self.file}: {name} is {dtype} {shape}, expected numbers (steps, dimensions)")
        if math.prod(shape) * max(dtype.itemsize, 4) > MAX_VECTOR_BYTES:
            raise FileError(f"{self.file}: {name} claims {shape} values, more than {MAX_VECTOR_BYTES} bytes")
        if shape[0] == 0:
            raise FileError(f"{self.file}: {name} has no time steps")
        values = self.rows(name, 0, shape[0])
        with np.errstate(over="ignore", invalid="ignore"):  # an infinity is refused by the contract's check
            return values.reshape(len(values), -1).astype(np.float32)

    def texts(self, name: str) -> list[str]:
        """The strings of a dataset of at most 100,000, stripped; none where it holds something else.

        Raises:
            FileError: they are not UTF-8 or too many.
        """
        shape, dtype = self.layout(name)
        if dtype.kind not in "SO" or len(shape) > 1:
            return []
        if math.prod(shape) > 100_000 or math.prod(shape) * dtype.itemsize > MAX_VECTOR_BYTES:
            raise FileError(
                f"{self.file}: {name} claims {shape} strings of {dtype.itemsize} bytes, expected at most 100,000 short ones"
            )
        with guarded(self.file, name):
            found = self._dataset(name)
            self._check_stored(name, found)
            values = np.asarray(found[()], dtype=object).reshape(-1)
            try:
                texts = [text_of(value) for value in values]
            except UnicodeError:
                raise FileError(f"{self.file}: {name} is not valid UTF-8") from None
        return [text for text in texts if text is not None]
