"""One episode to look at: a contact sheet (PNG) and a film (mp4) of its cameras and curves. Equal episodes, equal bytes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from svam.console import track
from svam.contract import ContractError
from svam.episodes.joined import open_store
from svam.episodes.store import SPLITS, EpisodeStore
from svam.files import whole_file
from svam.films import write_film

Picture = NDArray[np.uint8]
COLUMNS, CELL = 8, 192
"""Pictures in a line of the contact sheet, and their width (pixels)."""
TALL, WIDTHS = 480, (640, 1280)
"""Most height of a film's pictures; least and most width of a film (pixels)."""
CURSOR, MARKS = (214, 39, 40), 205
"""Colour of the present step in the curves, and grey of those that the sheet shows."""
BLOCK = 32
"""Frames held in memory of each camera."""
FASTEST = 30.0


def _resized(frame: Picture, height: float, width: float) -> Picture:
    """(h, w, 3): as large as fits; enlarged pixels stay visible as they are."""
    scale = min(height / frame.shape[0], width / frame.shape[1])
    size = (max(1, int(frame.shape[1] * scale)), max(1, int(frame.shape[0] * scale)))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX))


def _stacked(parts: Sequence[Picture], axis: int) -> Picture:
    """Pictures below (0) or beside (1) one another on white, from the upper left; height and width are even, as H.264 needs."""
    across = max(part.shape[1 - axis] for part in parts)
    missing = [[(0, across - part.shape[side] if side != axis else 0) for side in (0, 1)] for part in parts]
    filled = [np.pad(part, [*own, (0, 0)], constant_values=255) for part, own in zip(parts, missing, strict=True)]
    whole = np.concatenate(filled, axis=axis)
    return np.pad(whole, ((0, whole.shape[0] % 2), (0, whole.shape[1] % 2), (0, 0)), constant_values=255)


def _written(text: str, width: int, size: int) -> Picture:
    """(h, width, 3): text in letters of `size` pixels, on at most four lines."""
    lines = textwrap.wrap(text, width * 7 // (4 * size), max_lines=4, placeholder=" ...")
    image = Image.new("RGB", (width, len(lines) * (size + 5) + 4), "white")
    ImageDraw.Draw(image).text((4, 2), "\n".join(lines), fill="#222222", font=ImageFont.load_default(size=size), spacing=5)
    return np.asarray(image)


class Shown:
    """The episode: its rows in the store (n,), the seconds since its first frame (n,), and what all its pages say."""

    def __init__(self, store: EpisodeStore, episode: int) -> None:
        self.store, self.episode, self.cameras = store, episode, store.cameras
        self.rows = np.arange(*store.bounds(episode), dtype=np.int64)
        stamps = store.timestamps(self.rows)
        self.seconds = np.arange(len(self.rows)) / store.rate_hz if stamps is None else stamps - stamps[0]

    def frames(self, camera: str, steps: Sequence[int]) -> Picture:
        """(k, H, W, 3) of steps of the episode."""
        return self.store.frames(self.rows[np.asarray(steps)], camera)

    def header(self, width: int, note: str = "") -> Picture:
        """(h, width, 3): the instruction, and one line about the episode."""
        store, said = self.store, self.store.episode_instructions[self.episode]
        task, split = store.task_of(self.episode), SPLITS[store.episode_split[self.episode]].replace("_", " ")
        parts = [
            f"episode {self.episode} of {len(store.episode_ends)}", f"task {task}" if task != said else "", split,
            f"{len(self.rows)} frames at {store.rate_hz:g} Hz, {self.seconds[-1]:.1f} s",
            str(store.episode_provenance[self.episode].get("file") or ""), str(store.path), note,
        ]  # fmt: skip
        facts = "  |  ".join(part for part in parts if part)
        return _stacked([_written(f'"{said}"', width, 18), _written(facts, width, 12)], axis=0)

    def curves(self, width: int) -> tuple[Picture, NDArray[np.int64]]:
        """(h, width, 3) with a curve of each dimension of the actions, or without them of proprioception or state, by step; and
        (n,) the column of each step. Nothing where the store has none of them."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        name = next((name for name in ("actions", "proprioception", "state") if self.store.has(name)), None)
        if name is None:
            return np.zeros((0, width, 3), np.uint8), np.zeros(len(self.rows), np.int64)
        values = self.store.vector(name, self.rows)
        tall = min(44, max(16, 600 // values.shape[1]))
        figure = Figure((width / 100, (40 + tall * values.shape[1]) / 100), dpi=100, layout="constrained")
        canvas: Any = FigureCanvasAgg(figure)
        panels = figure.subplots(values.shape[1], sharex=True, squeeze=False)[:, 0]
        for d, axes in enumerate(panels):
            axes.plot(values[:, d], linewidth=1.3, marker="o" if len(values) == 1 else None)
            axes.set_ylabel(f"{name[0]}[{d}]", rotation=0, ha="right", va="center", fontsize=7)
            axes.tick_params(length=0, labelsize=6)
            axes.locator_params(nbins=2, axis="y")
            axes.spines[:].set_visible(False)
            axes.set_xlim(0, max(1, len(values) - 1))
        panels[-1].set_xlabel(f"{name} by step", fontsize=8)
        canvas.draw()
        at = panels[0].transData.transform(np.stack([np.arange(len(values)), np.zeros(len(values))], axis=1))
        strip = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        return strip, np.clip(at[:, 0].round().astype(np.int64), 0, strip.shape[1] - 1)


def contact_sheet(shown: Shown) -> Picture:
    """(h, w, 3): frames evenly spaced in time with number and time, cameras below one another; and the curves."""
    count = min(len(shown.rows), COLUMNS * {1: 3, 2: 2}.get(len(shown.cameras), 1))
    steps = np.unique(np.linspace(0, len(shown.rows) - 1, count).round().astype(np.int64)).tolist()
    width = COLUMNS * (CELL + 4)
    parts = [shown.header(width)]
    for first in range(0, len(steps), COLUMNS):
        line = steps[first : first + COLUMNS]
        for camera in shown.cameras:
            pictures = [_resized(frame, 4 * CELL, CELL) for frame in shown.frames(camera, line)]
            said = [_written(f"{step}  {shown.seconds[step]:.2f} s  {camera}"[:30], CELL + 4, 11) for step in line]
            cells = [_stacked(cell, axis=0) for cell in zip(said, pictures, strict=True)]
            parts.append(_stacked(cells, axis=1))
    strip, columns = shown.curves(width)
    strip[:, columns[steps]] = np.minimum(strip[:, columns[steps]], MARKS)
    return _stacked([*parts, strip], axis=0)


def film(shown: Shown, fps: float) -> Iterator[Picture]:
    """Pages (h, w, 3) of the film, one a step: all cameras, the step and its time, and the curves with a cursor."""
    n, shapes = len(shown.rows), [shown.frames(camera, [0]).shape[1:3] for camera in shown.cameras]
    tall = min(TALL, WIDTHS[1] / sum(width / height for height, width in shapes))
    width = max(WIDTHS[0], int(sum(tall * width / height for height, width in shapes)))
    speed = fps / shown.store.rate_hz
    header = shown.header(width, "" if abs(speed - 1) < 0.005 else f"at {speed:.2g} times its speed")
    strip, columns = shown.curves(width)
    for first in range(0, n, BLOCK):
        steps = range(first, min(first + BLOCK, n))
        blocks = [shown.frames(camera, steps) for camera in shown.cameras]
        for step, *frames in zip(steps, *blocks, strict=True):
            said = f"frame {step} of {n}  {shown.seconds[step]:.2f} s  {', '.join(shown.cameras)}"[: width // 8]
            pictures = _stacked([_resized(frame, tall, WIDTHS[1]) for frame in frames], axis=1)
            now = strip.copy()
            now[:, columns[step]] = CURSOR
            yield _stacked([header, _written(said, width, 12), pictures, now], axis=0)


def show_episode(path: Path, episode: int, out: Path) -> list[Path]:
    """Write `episode_<number>.png` and `.mp4` of one episode into the folder `out`; returns their names.

    The film has the data's rate, at most 30 frames a second, so that fast data can be followed.

    Raises:
        ContractError: there is no such episode. FileError: the store does not open, or its frames are damaged.
    """
    store = open_store(path)
    if not 0 <= episode < len(store.episode_ends):
        raise ContractError(f"{path}: no episode {episode}; there are 0..{len(store.episode_ends) - 1}")
    shown, rate = Shown(store, episode), min(store.rate_hz, FASTEST)
    sheet, video = out / f"episode_{episode:04d}.png", out / f"episode_{episode:04d}.mp4"
    with whole_file(sheet) as temporary:
        Image.fromarray(contact_sheet(shown)).save(temporary)
    write_film(video, track(film(shown, rate), "film", len(shown.rows)), rate)
    return [sheet, video]
