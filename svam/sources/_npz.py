"""Reading `.npz` archives of other people: headers before data, nothing unpickled, no more memory than a header admits to.

Every member is checked against its CRC-32 when it is read to its end.
"""

from __future__ import annotations

import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import FrameBlocks
from svam.files import FileError

LARGEST_MEMBER = 2 << 30
"""Bytes of an array that is read whole; a small archive can claim far more than any memory holds."""
BLOCK_FRAMES = 64
_BLOCK_BYTES = 64 << 20
# What zipfile, the decompressors and numpy's header parser raise on damaged bytes.
_DAMAGE = (
    OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, SyntaxError, OverflowError, RecursionError,
    NotImplementedError, RuntimeError, MemoryError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
    lzma.LZMAError,
)  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What a member of an archive says of itself: `shape`, `dtype`, whether it lies in Fortran order."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool = False


@contextmanager
def _damage_as_file_error(file: Path, missing: str) -> Iterator[None]:
    try:
        yield
    except FileError:
        raise
    except FileNotFoundError:
        raise FileError(f"{file}: no such file{missing}") from None
    except _DAMAGE as error:
        message = f"{file}: truncated, damaged or no .npz archive of plain arrays ({type(error).__name__})"
        raise FileError(message) from None


def _read_header(member: IO[bytes], size: int) -> Header:
    """The header at the start of a member of `size` bytes. ValueError: no plain array, or not as long as its header says."""
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"format version {version}")
    shape, fortran, dtype = read(member)
    if dtype.hasobject or any(length < 0 for length in shape):
        raise ValueError("no plain array")
    count = 1
    for length in shape:  # Python's integers do not overflow
        count *= length
    if member.tell() + count * dtype.itemsize != size:
        raise ValueError("the header and the size differ")
    return Header(tuple(shape), dtype, fortran)


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Field name -> member. ValueError: two members of one name, of which readers would choose differently."""
    infos = archive.infolist()
    found = {info.filename.removesuffix(".npy"): info for info in infos}
    if len(found) != len(infos):
        raise ValueError("two members of one name")
    return found


def headers(file: Path, missing: str = "") -> dict[str, Header]:
    """The headers of all members, by field name, without reading their data. `missing` ends the sentence of an absent file.

    Raises:
        FileError: the file is absent, damaged, or holds anything but plain arrays.
    """
    found = {}
    with _damage_as_file_error(file, missing), zipfile.ZipFile(file) as archive:
        for name, info in _members(archive).items():
            with archive.open(info) as member:
                found[name] = _read_header(member, info.file_size)
    return found


def load(file: Path, only: Sequence[str] | None = None, missing: str = "") -> dict[str, NDArray[Any]]:
    """The arrays of an archive (or those of `only` that it has), each checked against its CRC-32.

    Raises:
        FileError: as `headers`; or an array is larger than `LARGEST_MEMBER`.
    """
    arrays = {}
    with _damage_as_file_error(file, missing), zipfile.ZipFile(file) as archive:
        for name, info in _members(archive).items():
            if only is not None and name not in only:
                continue
            with archive.open(info) as member:
                _read_header(member, info.file_size)
            if info.file_size > LARGEST_MEMBER:
                raise FileError(
                    f"{file}: field {name!r} has {info.file_size / 2**30:.1f} GiB, expected at most "
                    f"{LARGEST_MEMBER >> 30} GiB; write shorter episodes"
                )
            with archive.open(info) as member:
                arrays[name] = np.lib.format.read_array(member)
                if member.read(1):  # also reads on to where the CRC-32 is compared
                    raise ValueError("bytes after the array")
    return arrays


def field(
    file: Path, arrays: Mapping[str, NDArray[Any]] | Mapping[str, Header], name: str, dtypes: Sequence[str], dimensions: int
) -> Any:
    """One array (or header) of an archive, of one of `dtypes` and with `dimensions` axes.

    Raises:
        FileError: it is missing, or of another kind.
    """
    if name not in arrays:
        raise FileError(f"{file}: field {name!r} is missing; it has {', '.join(sorted(arrays))}")
    values = arrays[name]
    if values.dtype.name not in dtypes or len(values.shape) != dimensions:
        raise FileError(
            f"{file}: field {name!r} is {values.dtype} {values.shape}, expected {' or '.join(dtypes)} with {dimensions} axes"
        )
    return values


def frame_blocks_of(file: Path, name: str, header: Header) -> FrameBlocks:
    """The member `name`, uint8 (n, H, W, 3), as frames that are decompressed block by block when they are asked for.

    Raises:
        FileError: it is not that, or (while reading) damaged.
    """
    if header.dtype != np.uint8 or len(header.shape) != 4 or header.shape[-1] != 3:
        raise FileError(f"{file}: field {name!r} is {header.dtype} {header.shape}, expected uint8 (n, H, W, 3)")
    if header.fortran:
        raise FileError(f"{file}: field {name!r} is in Fortran order; save numpy.ascontiguousarray of it")
    count, height, width, _ = header.shape
    return FrameBlocks((count, height, width, 3), partial(_read_blocks, file, name, header))


def frames_per_block(frame_bytes: int) -> int:
    """How many frames a block has: at most `BLOCK_FRAMES`, fewer where frames are large, at least one."""
    return max(1, min(BLOCK_FRAMES, _BLOCK_BYTES // max(1, frame_bytes)))


def _read_blocks(file: Path, name: str, header: Header) -> Iterator[NDArray[np.uint8]]:
    total, *frame = header.shape
    frame_bytes = int(np.prod(frame, dtype=np.int64))
    step = frames_per_block(frame_bytes)
    with _damage_as_file_error(file, ""), zipfile.ZipFile(file) as archive:
        info = _members(archive)[name]
        with archive.open(info) as member:
            if _read_header(member, info.file_size) != header:
                raise ValueError("changed since it was opened")
            for start in range(0, total, step):
                count = min(step, total - start)
                data = member.read(count * frame_bytes)  # the CRC-32 is compared with the last of them
                if len(data) != count * frame_bytes:
                    raise EOFError
                yield np.frombuffer(data, dtype=np.uint8).reshape(count, *frame)
