"""Pictures in rows under a time axis: the layout that the foresight figures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

Row = tuple[str, Sequence[NDArray[np.uint8] | None]]
"""A label, and a picture (H, W, 3) uint8 for each column; None leaves the place empty."""


def heat(values: NDArray[np.floating], low: float, high: float, colours: str = "viridis") -> NDArray[np.uint8]:
    """(...) numbers to (..., 3) uint8 of a colour map, `low` to `high`; what is beyond is cut, NaN is grey."""
    scaled = np.clip((np.asarray(values, dtype=np.float64) - low) / max(high - low, 1e-12), 0.0, 1.0)
    pictures = np.asarray(np.rint(colormaps[colours](np.nan_to_num(scaled))[..., :3] * 255.0), dtype=np.uint8)
    pictures[np.isnan(scaled)] = 128
    return pictures


def draw_rows(axes: NDArray[Any], rows: Sequence[Row]) -> None:
    """Put the rows' pictures on axes (rows, columns), labels at the left."""
    for line, (label, pictures) in zip(axes, rows, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
            if picture is not None:
                axis.imshow(picture, interpolation="nearest")
        line[0].set_ylabel(label, fontsize=7)


def picture_grid(rows: Sequence[Row], titles: Sequence[str], heading: str, side: float = 1.1) -> tuple[Any, NDArray[Any]]:
    """A figure of rows of pictures and its axes (rows, columns); `side`: inches of a picture."""
    size = (side * len(titles) + 0.8, side * len(rows) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    draw_rows(axes, rows)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=7)
    figure.suptitle(heading, fontsize=8)
    return figure, axes
