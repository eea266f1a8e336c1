"""Arrays of pictures as recorders store them: colour channels last or first, three or four of them, bytes or whole numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.files import FileError

MAX_PIXELS = 2**26
"""Largest picture, in pixels: a damaged header can claim any size."""
BLOCK_FRAMES = 64
_BLOCK_BYTES = 2**26


def frames_per_block(frame_bytes: int) -> int:
    """How many frames a block has: at most `BLOCK_FRAMES`, fewer where frames are large, at least one."""
    return max(1, min(BLOCK_FRAMES, _BLOCK_BYTES // max(1, frame_bytes)))


@dataclass(frozen=True)
class PictureArray:
    """How the pictures of an array lie. `shape`: (n, H, W, 3), as they are read; `channels`: 3, or 4, whose last is dropped;
    `first`: the channels stand before the pixels, (n, C, H, W)."""

    shape: tuple[int, int, int, int]
    channels: int
    first: bool
    dtype: np.dtype[Any]

    @property
    def frame_bytes(self) -> int:
        """Of one picture as stored."""
        return self.shape[1] * self.shape[2] * self.channels * self.dtype.itemsize

    def notes(self, where: str) -> list[str]:
        """What a person should know of the way to RGB bytes."""
        notes = [f"{where} has four channels: the last, alpha, is dropped"] if self.channels == 4 else []
        if self.dtype != np.uint8:
            notes.append(f"{where} is {self.dtype}; its whole numbers become uint8, any others are refused")
        return notes

    def rgb(self, stored: NDArray[Any], where: str, row: int) -> NDArray[np.uint8]:
        """(k, H, W, 3) uint8 of k stored pictures, the first of which is number `row` of the array.

        Raises:
            FileError: a number is none of 0..255.
        """
        pictures = (np.moveaxis(stored, 1, -1) if self.first else stored)[..., :3]
        if pictures.dtype == np.uint8:
            return np.ascontiguousarray(pictures)
        with np.errstate(invalid="ignore"):
            converted: NDArray[np.uint8] = np.ascontiguousarray(pictures.astype(np.uint8))
        if (different := converted != pictures).any():
            at = tuple(int(part) for part in np.argwhere(different)[0])
            raise FileError(f"{where} is {pictures[at]:g} in row {row + at[0]}, expected whole numbers in 0..255")
        return converted


def picture_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> PictureArray | None:
    """How pictures lie in an array (n, H, W, C) or (n, C, H, W) with 3 or 4 channels; None where it holds none."""
    if len(shape) != 4 or dtype.kind not in "uf" or 0 in shape[1:] or {shape[3], shape[1]}.isdisjoint((3, 4)):
        return None
    first = shape[3] not in (3, 4)
    height, width = shape[2:] if first else shape[1:3]
    if height * width > MAX_PIXELS:
        return None
    return PictureArray((shape[0], height, width, 3), shape[1] if first else shape[3], first, dtype)


def needed_pictures(where: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> PictureArray:
    """The same, where pictures are asked for.

    Raises:
        FileError: it holds none; or absurdly large ones.
    """
    if (pictures := picture_array(shape, dtype)) is not None:
        return pictures
    large = f", no more than {MAX_PIXELS} pixels each" if math.prod(shape[1:]) > MAX_PIXELS else ""
    raise FileError(f"{where} is {dtype} {shape}, expected uint8 pictures (steps, height, width, 3){large}")
