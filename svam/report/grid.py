"""Features and numbers as pictures, and pictures in rows under a time axis: the layout that the foresight figures share.

All pictures stand on one pair of axes, each in a cell one unit wide (an axes object of its own for each costs ten times as
long to draw), and what is drawn over a picture is placed in fractions of its cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

PictureRow = tuple[str, Sequence[NDArray[np.uint8] | None]]
"""A label, and a picture (H, W, 3) uint8 for each column; None leaves the place empty."""
GAP = 0.06
"""Between two cells, in their width."""


def heat(values: NDArray[np.floating], low: float, high: float, colours: str = "viridis") -> NDArray[np.uint8]:
    """(...) numbers to (..., 3) uint8 of a colour map, `low` to `high`; what is beyond is cut, NaN is grey."""
    scaled = np.clip((np.asarray(values, dtype=np.float64) - low) / max(high - low, 1e-12), 0.0, 1.0)
    pictures = np.asarray(np.rint(colormaps[colours](np.nan_to_num(scaled))[..., :3] * 255.0), dtype=np.uint8)
    pictures[np.isnan(scaled)] = 128
    return pictures


def pca_colours(features: NDArray[np.floating]) -> NDArray[np.uint8]:
    """(..., C) features to (..., 3) uint8 colours, with one set of components and one colour scale for all of them.

    The components are computed over every token, so that a colour means the same in every frame of a sequence (S-VAM,
    qualitative figures); components per frame would flicker. Each is scaled from its 1 % to its 99 % quantile. An
    eigenvector's sign is free: its largest entry is made positive.
    """
    values = np.asarray(features, dtype=np.float64).reshape(-1, features.shape[-1])
    centred = values - values.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    components = vectors[:, ::-1][:, :3]
    components = components * np.sign(components[np.abs(components).argmax(axis=0), np.arange(components.shape[1])])
    projected = centred @ components
    low, high = np.quantile(projected, (0.01, 0.99), axis=0)
    scaled = (projected - low) / np.maximum(high - low, 1e-12)
    colours = np.full((len(values), 3), 0.5)
    colours[:, : components.shape[1]] = np.clip(scaled, 0.0, 1.0)
    return np.asarray(np.rint(colours * 255.0), dtype=np.uint8).reshape(*features.shape[:-1], 3)


class PictureGrid:
    """Rows of pictures on the axes `axis`; every picture is stretched to the shape of the first one."""

    def __init__(self, axis: Any, rows: Sequence[PictureRow], titles: Sequence[str]) -> None:
        first = next(picture for _, pictures in rows for picture in pictures if picture is not None)
        self.axis, self.tall = axis, first.shape[0] / first.shape[1]
        for r, (label, pictures) in enumerate(rows):
            axis.text(-GAP, self.at(r, 0, 0.0, 0.5)[1], label, ha="right", va="center", fontsize=7, rotation=0)
            for c, picture in enumerate(pictures):
                if picture is not None:
                    (left, top), (right, bottom) = self.at(r, c, 0.0, 0.0), self.at(r, c, 1.0, 1.0)
                    axis.imshow(picture, extent=(left, right, bottom, top), interpolation="nearest")
        for c, title in enumerate(titles):
            axis.text(self.at(0, c, 0.5, 0.0)[0], -GAP, title, ha="center", va="bottom", fontsize=7)
        axis.set_xlim(-0.2, self.at(0, len(titles) - 1, 1.0, 0.0)[0])
        axis.set_ylim(self.at(len(rows) - 1, 0, 0.0, 1.0)[1], -0.2)
        axis.set_aspect("equal")
        axis.set_axis_off()

    def at(self, row: int, column: int, across: float, down: float) -> tuple[float, float]:
        """Coordinates on the axes of a place in a cell, both in fractions of it, from its upper left corner."""
        return column * (1.0 + GAP) + across, (row * (1.0 + GAP) + down) * self.tall


def picture_grid(rows: Sequence[PictureRow], titles: Sequence[str], heading: str, side: float = 1.1) -> tuple[Any, PictureGrid]:
    """A figure of rows of pictures under column titles; `side`: inches of a picture's width."""
    figure = Figure(
        figsize=(side * len(titles) * (1.0 + GAP) + 0.9, side * len(rows) * (1.0 + GAP) + 0.7), layout="constrained"
    )
    grid = PictureGrid(figure.subplots(), rows, titles)
    figure.suptitle(heading, fontsize=8)
    return figure, grid
