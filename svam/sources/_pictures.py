"""Pictures of data sets as 8-bit RGB, in blocks of bounded size: JPEG, PNG and kin through Pillow, and arrays of numbers.

Grey is repeated, a palette looked up, transparency dropped. What is damaged, or no picture, is a `FileError`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import FrameBlocks, Frames, frame_blocks
from svam.files import FileError

LARGEST_PICTURE = 2**26
"""Pixels of a picture; a damaged header can claim any size."""
LEAVE_OUT = "to leave it out, name the other cameras in convert.cameras"
"""What to do about a camera that holds no colours."""
_BLOCK_FRAMES, _BLOCK_BYTES = 64, 2**25
_COLOUR = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
_ORIENTATION = 0x0112
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")


class NoColourError(FileError):
    """Pictures are of a kind that holds no 8-bit colours or greys; depth is often stored so."""


def without_it(error: Exception, others: Sequence[str]) -> str:
    """What an error says, and what `convert.cameras` must be for the others of its camera; none: what it says."""
    said = str(error).removesuffix(LEAVE_OUT).rstrip("; ")
    return f"{said}; to leave this camera out, set convert.cameras: [{', '.join(others)}]" if others else said


def depth_doubts(names: Iterable[str]) -> list[str]:
    """A note on each camera that is called depth, and whose pictures are of 8 bits."""
    return [f"{name} is read as colours; is it depth? {LEAVE_OUT}" for name in names if "depth" in name.lower()]


def frames_per_block(frame_bytes: int) -> int:
    """How many frames a block has: at most 64 and 32 MiB, at least one."""
    return max(1, min(_BLOCK_FRAMES, _BLOCK_BYTES // max(1, frame_bytes)))


def in_blocks(frames: Iterator[NDArray[np.uint8]], what: str) -> Iterator[NDArray[np.uint8]]:
    """(H, W, 3) frames of one size as (k, H, W, 3) blocks of `frames_per_block`."""
    block, size, count = np.empty(0, dtype=np.uint8), None, 0
    for frame in frames:
        size = size or frame.shape
        if frame.shape != size:
            raise FileError(f"{what} changes its picture size from {size[:2]} to {frame.shape[:2]}")
        if count == 0:
            block = np.empty((frames_per_block(frame.nbytes), *size), dtype=np.uint8)
        block[count] = frame
        count += 1
        if count == len(block):
            yield block
            count = 0
    if count:
        yield block[:count]


def one_coloured(frames: Mapping[str, Frames]) -> list[str]:
    """The cameras whose first pictures hold one value alone."""
    return [camera for camera, images in frames.items() if not np.ptp(next(frame_blocks(images)))]


@contextmanager
def _opened(data: bytes | memoryview, where: str, formats: tuple[str, ...] = _FORMATS) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if not 0 < image.height * image.width <= LARGEST_PICTURE:
                raise FileError(f"{where}: {image.height} x {image.width} pixels, expected 1 to {LARGEST_PICTURE}")
            if image.mode not in _COLOUR:
                found = f"{where}: a picture in mode {image.mode}"
                raise NoColourError(f"{found}, expected 8-bit colour or grey; is it depth? {LEAVE_OUT}")
            yield image
    except FileError:
        raise
    except Exception as error:  # Pillow and its decoders raise a dozen types on damaged pictures
        kinds = " or ".join(formats[:2])
        raise FileError(f"{where}: no readable {kinds} picture of {len(data)} bytes ({type(error).__name__})") from None


def picture_rgb(data: bytes | memoryview, where: str) -> tuple[NDArray[np.uint8], str]:
    """((H, W, 3) uint8, what a person should know of the way there or "") of an encoded picture, turned as viewers show it."""
    from PIL import ImageOps

    with _opened(data, where) as image:
        deep = any(";16" in str(tile) for tile in image.tile)  # of which Pillow keeps the upper byte
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
        done = ["are turned as their EXIF asks"] * turned + ["have 16 bits a channel, of which the upper 8 are kept"] * deep
        return np.asarray((ImageOps.exif_transpose(image) if turned else image).convert("RGB")), " and ".join(done)


@dataclass(frozen=True)
class PictureArray:
    """How the pictures of an array lie. `shape`: (n, H, W, 3), as they are read; `channels`: those of a stored picture;
    `first`: they stand before the pixels, (n, C, H, W)."""

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
        said = {1: "is grey: repeated as red, green and blue", 4: "has four channels: the last, alpha, is dropped"}
        notes = [f"{where} {said[self.channels]}"] if self.channels in said else []
        if self.dtype != np.uint8:
            notes.append(f"{where} is {self.dtype}; its whole numbers become uint8, any others are refused")
        return notes

    def rgb(self, stored: NDArray[Any], where: str, row: int) -> NDArray[np.uint8]:
        """(k, H, W, 3) uint8 of k stored pictures of whole numbers 0 to 255, else `NoColourError`; the first is `row`."""
        stored = stored.reshape(*stored.shape, 1) if stored.ndim == 3 else stored
        pictures = (np.moveaxis(stored, 1, -1) if self.first else stored)[..., :3]
        with np.errstate(invalid="ignore"):
            rgb: NDArray[np.uint8] = np.ascontiguousarray(pictures, dtype=np.uint8)
        if pictures.dtype != np.uint8 and (different := rgb != pictures).any():
            at = np.unravel_index(different.argmax(), different.shape)
            found = f"{where} is {pictures[at]:g} in row {row + at[0]}"
            raise NoColourError(f"{found}, expected whole numbers in 0..255; is it depth? {LEAVE_OUT}")
        return np.repeat(rgb, 3, axis=-1) if self.channels == 1 else rgb


def picture_array(shape: tuple[int, ...], dtype: np.dtype[Any], channels: Sequence[int] = (3, 4)) -> PictureArray | None:
    """How pictures lie in an array (n, H, W, C) or (n, C, H, W), where C is one of `channels`, or (n, H, W), where that may be
    1; None where it holds none."""
    shape = (*shape, 1) if len(shape) == 3 and 1 in channels else shape
    if len(shape) != 4 or dtype.kind not in "uif" or 0 in shape[1:]:
        return None
    first = shape[3] not in channels
    count, height, width = shape[1:] if first else (shape[3], *shape[1:3])
    fewest = 1 if dtype == np.uint8 else 32  # rotation matrices of whole numbers are no pictures
    if count not in channels or not fewest <= height * width <= LARGEST_PICTURE:
        return None
    return PictureArray((shape[0], height, width, 3), count, first, dtype)


def named_pictures(shape: tuple[int, ...], dtype: np.dtype[Any]) -> PictureArray | None:
    """The same of what is said to be a camera, so that bytes of one channel are grey and no labels."""
    return picture_array(shape, dtype, (1, 3, 4) if dtype == np.uint8 else (3, 4))


def needed_pictures(where: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> PictureArray:
    """The same, where pictures must be; `NoColourError` where there are none, or absurdly large ones."""
    if (pictures := named_pictures(shape, dtype)) is not None:
        return pictures
    large = f", no more than {LARGEST_PICTURE} pixels each" if math.prod(shape[1:]) > LARGEST_PICTURE else ""
    expected = f"expected uint8 pictures (steps, height, width, 3){large}"
    raise NoColourError(f"{where} is {dtype} {shape}, {expected}; {LEAVE_OUT}")


def array_rgb(values: NDArray[Any], shape: Sequence[int], where: str, row: int = 0) -> NDArray[np.uint8]:
    """(n, H, W, 3) uint8 of n pictures of 1, 3 or 4 channels, last or first, of whole numbers 0 to 255; else `NoColourError`.
    `shape`: of one picture, where `values` are flat, (n, H * W * C). row: the number of the first, for messages."""
    if values.ndim < 4 and len(shape) in (2, 3) and values[0].size == np.prod(shape):
        values = values.reshape(-1, *shape)
    pictures = picture_array(values.shape, np.dtype(np.uint8), channels=(1, 3, 4))
    if pictures is None or values.dtype.kind not in "uif":
        found = f"{where}: pictures are {values.dtype} {values.shape[1:]}"
        raise NoColourError(f"{found}, expected uint8 of 1, 3 or 4 channels; is it depth? {LEAVE_OUT}")
    return pictures.rgb(values, where, row)


def picture_blocks(pictures: Sequence[memoryview], shape: Sequence[int | None], where: str) -> FrameBlocks:
    """(n, H, W, 3) uint8 of at least one JPEG or PNG picture, as TensorFlow reads them (EXIF turns none). A size that `shape`
    leaves open is the first one's; all must have it."""
    height, width = shape[:2]
    if height is None or width is None:
        with _opened(pictures[0], f"{where}, step 0", ("JPEG", "PNG")) as image:
            height, width = image.height, image.width
    if not 0 < height * width <= LARGEST_PICTURE:
        raise FileError(f"{where}: {height} x {width} pixels, expected 1 to {LARGEST_PICTURE}")

    def decoded() -> Iterator[NDArray[np.uint8]]:
        for step, picture in enumerate(pictures):
            here = f"{where}, step {step}"
            with _opened(picture, here, ("JPEG", "PNG")) as image:
                if (image.height, image.width) != (height, width):
                    raise FileError(f"{here}: a picture of {image.height} x {image.width}, expected {height} x {width}")
                yield np.asarray(image.convert("RGB"))

    return FrameBlocks((len(pictures), height, width, 3), lambda: in_blocks(decoded(), where))
