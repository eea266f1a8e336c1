"""Episodes on their way into a store: the chosen cameras, cut and resized, and vectors in the asked precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import VECTORS, Annotation, Episode, FrameBlocks, Frames, frame_blocks
from svam.errors import ParamsError
from svam.params import Convert


def _cut(images: NDArray[Any], params: Convert) -> NDArray[Any]:
    """(k, H, W, ...) to the largest centred box of the aspect of `convert.image_size`, where asked for."""
    if params.crop == "none" or params.image_size is None:
        return images
    scale = min(side / new for side, new in zip(images.shape[1:3], params.image_size, strict=True))
    height, width = (max(1, round(new * scale)) for new in params.image_size)
    top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
    return images[:, top : top + height, left : left + width]


def resize_frames(images: NDArray[np.uint8], params: Convert) -> NDArray[np.uint8]:
    """(k, H, W, 3) uint8 to `convert.image_size`: each pixel the mean of the area that it covers, so that nothing aliases;
    bilinear where a side grows."""
    from PIL import Image

    images = _cut(images, params)
    if params.image_size is None or list(images.shape[1:3]) == params.image_size:
        return images
    (old_height, old_width), (height, width) = images.shape[1:3], params.image_size
    filter_ = Image.Resampling.BOX if height <= old_height and width <= old_width else Image.Resampling.BILINEAR
    whole = (old_width // width, old_height // height) if old_width % width == old_height % height == 0 else None
    out = np.empty((len(images), height, width, 3), dtype=np.uint8)
    for k, array in enumerate(images):
        image = Image.fromarray(np.ascontiguousarray(array))
        out[k] = np.asarray(image.reduce(whole) if whole else image.resize((width, height), filter_))
    return out


def resize_labels(values: NDArray[Any], params: Convert) -> NDArray[Any]:
    """(m, H, W) depth or classes to `convert.image_size`: the nearest pixel, since neither may be mixed across an edge."""
    values = _cut(values, params)
    if params.image_size is None or list(values.shape[1:3]) == params.image_size:
        return values
    sides = zip(params.image_size, values.shape[1:3], strict=True)
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in sides)
    return np.ascontiguousarray(values[:, rows[:, None], columns])


def _resized_blocks(source: Frames, params: Convert) -> Iterator[NDArray[np.uint8]]:
    for block in frame_blocks(source):
        for first in range(0, len(block), 64):
            yield resize_frames(block[first : first + 64], params)


def _resized(source: Frames, params: Convert) -> FrameBlocks:
    """Frames of `convert.image_size`, by their reader where it can."""
    height, width = params.image_size or source.shape[1:3]
    cut = _cut(np.empty((0, *source.shape[1:3])), params).shape[1:3]
    whole = cut == source.shape[1:3] and source.shape[1] % height == source.shape[2] % width == 0 and cut != (height, width)
    if whole and isinstance(source, FrameBlocks) and source.smaller is not None:
        return source.smaller(height, width)
    return FrameBlocks((len(source), height, width, 3), partial(_resized_blocks, source, params))


def prepared(episode: Episode, cameras: list[str], params: Convert) -> Episode:
    """The episode with just `cameras`, in that order, with frames and labels of the asked size, and vectors of the asked
    precision (still float32); `ParamsError` where that cannot hold them."""
    frames = {camera: episode.frames[camera] for camera in cameras}
    if params.vector_dtype == "float16":
        vectors = {name: values for name in VECTORS if (values := getattr(episode, name)) is not None}
        with np.errstate(over="ignore"):
            rounded = {name: values.astype(np.float16).astype(np.float32) for name, values in vectors.items()}
        for name, values in vectors.items():
            if (lost := np.isinf(rounded[name]) & np.isfinite(values)).any():
                found = f"{name} hold {values[lost][0]:g}, too large for convert.vector_dtype float16; set it to float32"
                raise ParamsError(f"{episode.provenance.get('file', episode.task)}: {found}")
        episode = dataclasses.replace(episode, **rounded)
    if params.image_size is None:
        return dataclasses.replace(episode, frames=frames)
    resized = {camera: _resized(source, params) for camera, source in frames.items()}
    annotations = {
        name: Annotation(resize_labels(labels.values, params), labels.index) for name, labels in episode.annotations.items()
    }
    return dataclasses.replace(episode, frames=resized, annotations=annotations)
