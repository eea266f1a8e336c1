"""Films of rollouts: the camera beside what the policy foresaw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from svam.files import FileError
from svam.films import write_film
from svam.npy import read_arrays
from svam.report.grid import pca_colours

TITLE_HEIGHT = 16
"""Pixels above each panel."""
SLOWED = 4.0
"""Films of rollouts play this many times slower than the robot moves."""


def enlarge(frames: NDArray[np.uint8], size: int, views: int = 1) -> NDArray[np.uint8]:
    """(n, h, w, 3) uint8 to (n, views * size, size, 3), nearest neighbour: every feature cell or pixel stays visible."""
    rows = np.arange(views * size) * frames.shape[1] // (views * size)
    columns = np.arange(size) * frames.shape[2] // size
    return np.ascontiguousarray(frames[:, rows][:, :, columns])


def side_by_side(panels: Mapping[str, NDArray[np.uint8]], size: int) -> NDArray[np.uint8]:
    """Panels title -> (n, h, w, 3) uint8, all of one length n, to (n, size + TITLE_HEIGHT, panels * size, 3) uint8; several
    times as high where several cameras' pictures lie below one another."""
    views = max(1, *(round(frames.shape[1] / frames.shape[2]) for frames in panels.values()))
    title = Image.new("RGB", (size * len(panels), TITLE_HEIGHT), "white")
    draw = ImageDraw.Draw(title)
    for i, name in enumerate(panels):
        draw.text((i * size + 4, 2), name, fill="black", font=ImageFont.load_default(size=11))
    pictures = np.concatenate([enlarge(frames, size, views) for frames in panels.values()], axis=2)
    strip = np.broadcast_to(np.asarray(title), (len(pictures), *np.asarray(title).shape))
    return np.concatenate([strip, pictures], axis=1)


def rollout_film(
    frames: NDArray[np.uint8], calls: NDArray[np.int64], foresight: Mapping[str, NDArray[np.floating]], size: int = 192
) -> NDArray[np.uint8]:
    """The camera beside what was foreseen, one picture for each simulation step.

    Args:
        frames: (n, H, W, 3) uint8, one after each step, the first before any.
        calls: the steps at which the policy was called, increasing from 0.
        foresight: context entry -> (calls, T, h, w, C) features, encoded at those steps.

    Returns:
        (n, size + TITLE_HEIGHT, (1 + entries) * size, 3) uint8. Between two calls a panel plays its T foreseen frames from
        the first to the last, that is the whole horizon in the time of one executed chunk. Components are computed over the
        entry's whole sequence.
    """
    step = np.arange(len(frames))
    call = np.searchsorted(calls, step, side="right") - 1
    since = step - calls[call]
    # Every chunk but the last was executed whole; the last may have ended in success.
    spans = np.diff(calls)
    chunk = int(spans.max()) if len(spans) else max(1, len(frames) - 1)
    panels = {"camera": frames}
    for name, features in foresight.items():
        colours = pca_colours(features)
        t = np.minimum(since * features.shape[1] // chunk, features.shape[1] - 1)
        panels[f"{name.replace('_', '-')} foresight (PCA)"] = colours[call, t]
    return side_by_side(panels, size)


def draw_films(folder: Path, results: Path, rate_hz: float) -> dict[str, NDArray[np.uint8]]:
    """A film `<task>_<index>.mp4` of every recorded rollout of `results`, `SLOWED` times slower than the robot's `rate_hz`
    steps a second. Returns the middle picture (h, w, 3) uint8 of each, by its name without the ending.

    Raises:
        FileError: an array is missing or damaged.
    """
    pictures = {}
    for rollout in sorted(results.glob("rollouts/*")):
        arrays = read_arrays(rollout)
        if not {"frames", "calls"} <= set(arrays):
            raise FileError(f"{rollout}: frames.npy or calls.npy is missing; run evaluate again")
        foresight = {
            name.removeprefix("foresight_"): values for name, values in arrays.items() if name.startswith("foresight_")
        }
        film = rollout_film(arrays["frames"], arrays["calls"], foresight)
        write_film(folder / f"{rollout.name}.mp4", film, rate_hz / SLOWED)
        pictures[rollout.name] = film[len(film) // 2]
    return pictures
