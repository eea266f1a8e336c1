"""Pictures kept with a loss, for cameras whose noise no lossless codec makes small: JPEG XL and WebP of imagecodecs.

A chunk is one picture. Zarr v3 names no such codec; the names here are those by which zarr calls numcodecs' codecs, with which
imagecodecs registers its own. So zarr and imagecodecs read the arrays after the few lines of `register`, without this package.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.errors import MachineError

_SETTINGS: dict[str, dict[str, Any]] = {
    "jpegxl": {"effort": 3, "lossless": False, "numthreads": 1},
    "webp": {"method": 2, "lossless": False, "hasalpha": False},
}
"""Of each codec; `level` is the quality, 1 to 100."""
LOSSY = tuple(_SETTINGS)
PREFIX = "numcodecs.imagecodecs_"
_registered: dict[str, Any] = {}


def register() -> None:
    """Have zarr know the codecs; `MachineError` where imagecodecs is not installed."""
    warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3 specification")
    if _registered:
        return
    try:
        import imagecodecs.numcodecs as imagecodecs
    except ImportError:
        raise MachineError(
            f"convert.compression {' and '.join(LOSSY)} need the library imagecodecs: pip install -c constraints.txt '.[lossy]'"
        ) from None
    from zarr.codecs.numcodecs import PCodec  # any of zarr's wrappers of codecs from arrays to bytes
    from zarr.registry import register_codec

    names = [f"imagecodecs_{name}" for name in LOSSY]
    imagecodecs.register_codecs(names, verbose=False)
    for name in names:
        _registered[name] = type(name, (PCodec,), {}, codec_name=name)
        register_codec(f"numcodecs.{name}", _registered[name])


def picture_codec(compression: str, quality: int) -> Any:
    """The codec of an array's chunks, as `zarr.create_array` takes its serializer."""
    register()
    return _registered[f"imagecodecs_{compression}"](level=quality, **_SETTINGS[compression])


@dataclass
class PictureError:
    """The error of pictures that were kept, against the pictures of the source, in grey levels."""

    pictures: int = 0
    values: int = 0
    absolute: int = 0
    squared: int = 0

    def measure(self, codec: Any, picture: NDArray[np.uint8]) -> None:
        """Add the error that a codec of `picture_codec` makes in a picture (H, W, 3)."""
        self.add(codec._codec.decode(codec._codec.encode(picture)), picture)

    def add(self, kept: NDArray[np.uint8], picture: NDArray[np.uint8]) -> None:
        """Add the difference of a picture (H, W, 3) as it is kept to what it was."""
        difference = np.abs(kept.astype(np.int64) - picture)
        self.pictures, self.values = self.pictures + 1, self.values + picture.size
        self.absolute, self.squared = self.absolute + int(difference.sum()), self.squared + int(np.square(difference).sum())


def stated_error(errors: Sequence[Mapping[str, int]]) -> dict[str, float | int | None]:
    """Mean absolute error, and PSNR in dB (None where there is no error), of several `PictureError`s' fields."""
    total = {name: sum(error[name] for error in errors) for name in vars(PictureError())}
    squared = total["squared"] / total["values"]
    return {
        "pictures": total["pictures"], "mean_absolute": round(total["absolute"] / total["values"], 4),
        "psnr_db": round(float(10 * np.log10(255**2 / squared)), 2) if squared else None,
    }  # fmt: skip
