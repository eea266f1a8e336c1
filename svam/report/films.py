"""Films: pictures side by side under their titles, and mp4 files whose bytes are the same every time."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from svam.files import whole_file
from svam.report.pca import pca_colours

TITLE_HEIGHT = 16
"""Pixels above each panel."""
SLOWED = 4.0
"""Films of rollouts play this many times slower than the robot moves."""


def enlarge(frames: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(n, h, w, 3) uint8 to (n, size, size, 3), nearest neighbour: every feature cell or pixel stays visible as it is."""
    rows = np.arange(size) * frames.shape[1] // size
    columns = np.arange(size) * frames.shape[2] // size
    return np.ascontiguousarray(frames[:, rows][:, :, columns])


def side_by_side(panels: Mapping[str, NDArray[np.uint8]], size: int) -> NDArray[np.uint8]:
    """Panels title -> (n, h, w, 3) uint8, all of one length n, to (n, size + TITLE_HEIGHT, panels * size, 3) uint8."""
    title = Image.new("RGB", (size * len(panels), TITLE_HEIGHT), "white")
    draw = ImageDraw.Draw(title)
    for i, name in enumerate(panels):
        draw.text((i * size + 4, 2), name, fill="black", font=ImageFont.load_default(size=11))
    pictures = np.concatenate([enlarge(frames, size) for frames in panels.values()], axis=2)
    strip = np.broadcast_to(np.asarray(title), (len(pictures), *np.asarray(title).shape))
    return np.concatenate([strip, pictures], axis=1)


def rollout_film(
    frames: NDArray[np.uint8], calls: tuple[int, ...], foresight: Mapping[str, NDArray[np.floating]], size: int = 192
) -> NDArray[np.uint8]:
    """The camera beside what was foreseen, one picture for each simulation step.

    Args:
        frames: (n, H, W, 3) uint8, one after each step, the first before any.
        calls: the steps at which the policy looked, increasing from 0.
        foresight: context entry -> (calls, T, h, w, C) features, encoded at those steps.

    Returns:
        (n, size + TITLE_HEIGHT, (1 + entries) * size, 3) uint8. Between two calls a panel plays its T foreseen frames from
        the first to the last, that is the whole horizon in the time of one executed chunk. Components are computed over the
        entry's whole sequence.
    """
    step = np.arange(len(frames))
    call = np.searchsorted(np.asarray(calls), step, side="right") - 1
    since = step - np.asarray(calls)[call]
    # Every chunk but the last was executed whole; the last may have ended in success.
    spans = np.diff(np.asarray(calls))
    chunk = int(spans.max()) if len(spans) else max(1, len(frames) - 1)
    panels = {"camera": frames}
    for name, features in foresight.items():
        colours = pca_colours(features)
        t = np.minimum(since * features.shape[1] // chunk, features.shape[1] - 1)
        panels[f"{name.replace('_', '-')} foresight (PCA)"] = colours[call, t]
    return side_by_side(panels, size)


def write_film(path: Path, frames: NDArray[np.uint8], rate_hz: float) -> None:
    """Write (n, H, W, 3) uint8 RGB (H and W even) as H.264 in mp4 at `rate_hz` frames a second.

    One encoder thread and no time of creation: equal frames are equal bytes (with more threads they are not).
    """
    import av

    with whole_file(path) as temporary, av.open(str(temporary), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(rate_hz).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": "20", "preset": "medium", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def film_rollout(
    path: Path, frames: NDArray[np.uint8], calls: tuple[int, ...], foresight: Mapping[str, NDArray[np.floating]], rate_hz: float
) -> None:
    """`rollout_film` of one episode at `path`, `SLOWED` times slower than the robot's `rate_hz` steps a second."""
    write_film(path, rollout_film(frames, calls, foresight), rate_hz / SLOWED)
