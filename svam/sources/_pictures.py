"""Pictures of an RLDS episode, JPEG, PNG or raw, decoded in blocks."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from svam.contract import FrameBlocks
from svam.files import FileError
from svam.sources._tfds import Feature, unpacked

_BLOCK_FRAMES, _BLOCK_BYTES = 64, 2**26
_MAX_PIXELS = 2**26
# What Pillow raises on damaged pictures.
_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    LookupError,
    TypeError,
    OverflowError,
    MemoryError,
)
_MODES = ("RGB", "RGBA", "L", "P")
"""What becomes RGB as TensorFlow does it: grey repeated, a palette looked up, transparency dropped."""


def picture_blocks(pictures: Sequence[memoryview], feature: Feature, where: str) -> FrameBlocks:
    """(n, H, W, 3) uint8 of at least one picture. A size that the feature leaves open is that of the first one.

    Raises:
        FileError: the first picture's size is needed and cannot be read; while decoding, one is damaged or of another size.
    """
    height, width = feature.shape[:2]
    if height is None or width is None:
        height, width = _size(pictures[0], f"{where}, step 0")
    if not 0 < height * width <= _MAX_PIXELS:
        raise FileError(f"{where}: {height} x {width} pixels, expected 1 to {_MAX_PIXELS}")
    size = (height, width)
    count = max(1, min(_BLOCK_FRAMES, _BLOCK_BYTES // (height * width * 3)))

    def blocks() -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(pictures), count):
            chosen = enumerate(pictures[start : start + count], start)
            yield np.stack([_decode(picture, feature, size, f"{where}, step {step}") for step, picture in chosen])

    return FrameBlocks((len(pictures), height, width, 3), blocks)


def _size(picture: memoryview, where: str) -> tuple[int, int]:
    """(H, W), of the header alone."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(picture), formats=("JPEG", "PNG")) as image:
            return image.height, image.width
    except (*_ERRORS, Image.DecompressionBombError) as error:
        raise FileError(f"{where}: no readable JPEG or PNG picture of {len(picture)} bytes ({type(error).__name__})") from None


def _decode(picture: memoryview, feature: Feature, size: tuple[int, int], where: str) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of exactly the expected size, which is checked before anything is decoded."""
    from PIL import Image

    if feature.kind == "tensor":
        return np.frombuffer(unpacked(picture, feature, where), dtype=np.uint8).reshape(*size, 3)
    try:
        with Image.open(io.BytesIO(picture), formats=("JPEG", "PNG")) as image:
            found, mode = (image.height, image.width), image.mode
            if found == size and mode in _MODES:
                return np.asarray(image.convert("RGB"), dtype=np.uint8)
    except (*_ERRORS, Image.DecompressionBombError) as error:
        raise FileError(f"{where}: no readable JPEG or PNG picture of {len(picture)} bytes ({type(error).__name__})") from None
    raise FileError(f"{where}: a picture of {found[0]} x {found[1]} in mode {mode}, expected {size[0]} x {size[1]} in RGB")
