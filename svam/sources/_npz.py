"""Reading `.npz` archives of other people by `numpy.load(allow_pickle=False)`: headers before data, so that no false one takes
memory.

Every member is checked against its CRC-32 when it is read to its end. What is absent, damaged or not as expected is a
`FileError`; `missing` ends the sentence of an absent file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple
from zipfile import ZipInfo

import numpy as np
from numpy.typing import NDArray

from svam.contract import FrameBlocks
from svam.files import FileError, refuse_lfs_pointer
from svam.sources._pictures import PictureArray, frames_per_block, needed_pictures

LARGEST_MEMBER = 2 << 30
"""Bytes of an array that is read whole; a small archive can claim far more than any memory holds."""


class Header(NamedTuple):
    """What a member of an archive says of itself."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool = False


@contextmanager
def _opened(file: Path, missing: str = "") -> Iterator[tuple[Any, dict[str, ZipInfo]]]:
    """numpy's `NpzFile` and its members by field name; whatever its bytes make the libraries raise becomes a `FileError`."""
    refuse_lfs_pointer(file)
    try:
        with np.load(file, allow_pickle=False) as archive:
            infos = archive.zip.infolist()
            members = {info.filename.removesuffix(".npy"): info for info in infos}
            if len(members) != len(infos):  # of which readers would choose differently
                raise ValueError("two members of one name")
            yield archive, members
    except FileError:
        raise
    except FileNotFoundError:
        raise FileError(f"{file}: no such file{missing}") from None
    except Exception as error:  # zipfile, the decompressors and numpy's parser of headers raise some twenty types
        raise FileError(f"{file}: truncated, damaged or no .npz archive of plain arrays ({type(error).__name__})") from None


def _header(member: IO[bytes], size: int) -> Header:
    """The header at the start of a member of `size` bytes. ValueError: it is not as long as its header says."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[np.lib.format.read_magic(member)](member)
    if not dtype.hasobject and (min((0, *shape)) < 0 or member.tell() + math.prod(shape) * dtype.itemsize != size):
        raise ValueError("the header and the size differ")
    return Header(tuple(shape), dtype, fortran)


def refuse_objects(file: Path, name: str, dtype: np.dtype[Any]) -> None:
    """Nothing, unless a field is of pickled objects, which is a `FileError`."""
    if dtype.hasobject:
        raise FileError(f"{file}: field {name!r} holds Python objects, which are never unpickled; expected numbers or text")


def headers(file: Path, missing: str = "", unread: Collection[str] = ()) -> dict[str, Header]:
    """The headers of all members, by field name, those of objects too; no data are read. An empty one stands for a field of
    `unread`, at which nothing is looked."""
    known = {}
    with _opened(file, missing) as (archive, members):
        for name, info in members.items():
            if name in unread:
                known[name] = Header((), np.dtype(np.uint8))
                continue
            with archive.zip.open(info) as member:
                known[name] = _header(member, info.file_size)
    return known


def load(file: Path, only: Sequence[str] | None = None, missing: str = "") -> dict[str, NDArray[Any]]:
    """The arrays of an archive (or those of `only` that it has), none larger than `LARGEST_MEMBER`."""
    arrays = {}
    with _opened(file, missing) as (archive, members):
        for name, info in members.items():
            if only is not None and name not in only:
                continue
            if info.file_size > LARGEST_MEMBER:
                raise FileError(
                    f"{file}: field {name!r} has {info.file_size / 2**30:.1f} GiB, expected at most "
                    f"{LARGEST_MEMBER >> 30} GiB; write shorter episodes"
                )
            with archive.zip.open(info) as member:
                refuse_objects(file, name, _header(member, info.file_size).dtype)
            arrays[name] = archive[info.filename]  # a field "a.npy" is not the file "a.npy"
    return arrays


def pictures_of(file: Path, name: str, header: Header) -> PictureArray:
    """How the pictures of a member lie, which must be in an order in which they can be read one by one."""
    refuse_objects(file, name, header.dtype)
    if header.fortran:
        raise FileError(f"{file}: field {name!r} is in Fortran order; save numpy.ascontiguousarray of it")
    return needed_pictures(f"{file}: field {name!r}", header.shape, header.dtype)


def frame_blocks_of(file: Path, name: str, header: Header) -> FrameBlocks:
    """The pictures of a member as frames that are decompressed block by block when they are asked for."""
    return FrameBlocks(pictures_of(file, name, header).shape, partial(_read_blocks, file, name, header))


def _read_blocks(file: Path, name: str, header: Header) -> Iterator[NDArray[np.uint8]]:
    pictures = pictures_of(file, name, header)
    total, step = header.shape[0], frames_per_block(pictures.frame_bytes)
    with _opened(file) as (archive, members), archive.zip.open(members[name]) as member:
        if _header(member, members[name].file_size) != header:
            raise ValueError("changed since it was opened")
        for start in range(0, total, step):
            count = min(step, total - start)
            data = member.read(count * pictures.frame_bytes)  # the CRC-32 is compared with the last of them
            block = np.frombuffer(data, header.dtype).reshape(count, *header.shape[1:])
            yield pictures.rgb(block, f"{file}: field {name!r}", start)
