"""Pictures of data sets as 8-bit RGB: JPEG, PNG and kin through Pillow, raw arrays, and their blocks of bounded size.

Grey is repeated, a palette looked up, transparency dropped.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import FrameBlocks
from svam.files import FileError

LARGEST_PICTURE = 2**26
"""Pixels of a picture; a damaged header can claim any size."""
_BLOCK_FRAMES, _BLOCK_BYTES = 64, 2**25
# What Pillow raises on damaged pictures.
_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, LookupError, TypeError, OverflowError, MemoryError,
)  # fmt: skip
_COLOUR = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
_ORIENTATION = 0x0112
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")


class NoColourError(FileError):
    """A picture is of a kind that holds no 8-bit colours or greys; depth is often stored so."""


def in_blocks(frames: Iterator[NDArray[np.uint8]], what: str) -> Iterator[NDArray[np.uint8]]:
    """(H, W, 3) frames of one size as (k, H, W, 3) blocks of at most 64 frames and about 32 MiB.

    Raises:
        FileError: a frame has another size than the first.
    """
    block, size, count = np.empty(0, dtype=np.uint8), None, 0
    for frame in frames:
        size = size or frame.shape
        if frame.shape != size:
            raise FileError(f"{what} changes its picture size from {size[:2]} to {frame.shape[:2]}")
        if count == 0:
            block = np.empty((min(_BLOCK_FRAMES, max(1, _BLOCK_BYTES // frame.nbytes)), *size), dtype=np.uint8)
        block[count] = frame
        count += 1
        if count == len(block):
            yield block
            count = 0
    if count:
        yield block[:count]


@contextmanager
def _opened(data: bytes | memoryview, where: str, formats: tuple[str, ...] = _FORMATS) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if not 0 < image.height * image.width <= LARGEST_PICTURE:
                raise FileError(f"{where}: {image.height} x {image.width} pixels, expected 1 to {LARGEST_PICTURE}")
            if image.mode not in _COLOUR:
                raise NoColourError(f"{where}: a picture in mode {image.mode}, expected 8-bit colour or grey; is it depth?")
            yield image
    except FileError:
        raise
    except (*_ERRORS, Image.DecompressionBombError) as error:
        kinds = " or ".join(formats if len(formats) < 3 else ("PNG", "JPEG"))
        raise FileError(f"{where}: no readable {kinds} picture of {len(data)} bytes ({type(error).__name__})") from None


def picture_rgb(data: bytes | memoryview, where: str) -> tuple[NDArray[np.uint8], bool]:
    """((H, W, 3) uint8, whether EXIF asked to turn or mirror it) of an encoded picture, turned as viewers show it.

    Raises:
        FileError: it is damaged. NoColourError: it holds no colours.
    """
    from PIL import ImageOps

    with _opened(data, where) as image:
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
        return np.asarray((ImageOps.exif_transpose(image) if turned else image).convert("RGB")), turned


def array_rgb(values: NDArray[Any], shape: Sequence[int], where: str) -> NDArray[np.uint8]:
    """(n, H, W, 3) uint8 of n pictures of 1, 3 or 4 channels, last or first, of whole numbers 0 to 255.

    shape: of one picture, where `values` are flat, (n, H * W * C).

    Raises:
        NoColourError: they are no such pictures.
    """
    if values.ndim < 4 and len(shape) in (2, 3) and values[0].size == np.prod(shape):
        values = values.reshape(-1, *shape)
    if values.ndim == 3:
        values = values[..., None]
    if values.ndim == 4 and values.shape[-1] not in (1, 3, 4) and values.shape[1] in (1, 3, 4):
        values = np.moveaxis(values, 1, -1)
    if values.ndim != 4 or values.shape[-1] not in (1, 3, 4) or not np.isin(values.dtype.kind, ("u", "i")):
        raise NoColourError(f"{where}: pictures are {values.dtype} {values.shape[1:]}, expected uint8 of 1, 3 or 4 channels")
    if values.dtype != np.uint8 and (values.min() < 0 or values.max() > 255):
        raise NoColourError(f"{where}: pictures hold {values.min()} to {values.max()}, expected 0 to 255; is it depth?")
    values = values[..., :3].astype(np.uint8)
    return np.repeat(values, 3, axis=-1) if values.shape[-1] == 1 else values


def picture_blocks(pictures: Sequence[memoryview], shape: Sequence[int | None], where: str) -> FrameBlocks:
    """(n, H, W, 3) uint8 of at least one JPEG or PNG picture, as TensorFlow reads them (EXIF turns none). A size that `shape`
    leaves open is the first one's.

    Raises:
        FileError: the first picture's size is needed and cannot be read; while decoding, one is damaged or of another size.
    """
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
                    raise FileError(
                        f"{here}: a picture of {image.height} x {image.width} in mode {image.mode}, "
                        f"expected {height} x {width} in RGB"
                    )
                yield np.asarray(image.convert("RGB"))

    return FrameBlocks((len(pictures), height, width, 3), lambda: in_blocks(decoded(), where))
