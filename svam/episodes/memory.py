"""Memory that clips are read into: it begins on a page, and is used again as soon as no array refers to it.

Memory that the system has just handed out is cleared page by page when it is first written, which can take longer than
decoding a clip into it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_PAGE, _ALIGNED_FROM = 4096, 1 << 16
_KEPT_BYTES = 32 << 20
"""At most so much memory waits for its next use, in a process."""

_waiting: dict[int, list[NDArray[np.uint8]]] = {}
"""By size."""


class _Lease:
    """Owns some memory for as long as an array shows it, then puts it back."""

    def __init__(self, room: NDArray[np.uint8]) -> None:
        self.room = room
        self.__array_interface__ = room.__array_interface__

    def __del__(self) -> None:
        if sum(size * len(rooms) for size, rooms in tuple(_waiting.items())) + self.room.nbytes > _KEPT_BYTES:
            _waiting.clear()  # other sizes than the ones in use
        if self.room.nbytes <= _KEPT_BYTES:
            _waiting.setdefault(self.room.nbytes, []).append(self.room)


def _taken(size: int) -> NDArray[np.uint8]:
    try:
        return _waiting[size].pop()
    except (KeyError, IndexError):
        return np.empty(size, np.uint8)


def page_aligned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Uninitialised memory that begins on a page, as a file's contents do in the page cache; used before, where it can be.

    Copying between places whose addresses differ by a few bytes modulo 4096, as those of numpy's own large arrays do, takes
    twice the time: each read waits for a write that looks like its own address.
    """
    found = np.dtype(dtype)
    size = math.prod(shape) * found.itemsize
    if size < _ALIGNED_FROM:
        return np.empty(shape, found)
    room = np.asarray(_Lease(_taken(1 << (size + _PAGE - 1).bit_length())))
    start = -room.ctypes.data % _PAGE
    return room[start : start + size].view(found).reshape(shape)
