"""One episode to look at: a contact sheet (PNG) and a film (mp4) of its cameras and curves. Equal episodes, equal bytes."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.console import track
from svam.contract import ContractError
from svam.episodes.store import SPLITS, EpisodeStore
from svam.files import whole_file
from svam.films import write_film

Picture = NDArray[np.uint8]
_INK, _PALE, _CURSOR = "#222222", "#777777", "#d62728"
_DPI = 100
_COLUMNS, _CELL, _MARGIN, _GAP = 8, 192, 40, 24
"""Pictures in a line of the contact sheet and their width; space around all, and between lines for what is said (pixels)."""
_FILM_WIDTHS, _WIDE = (640, 1280), 1040
"""Least and most width of a film (pixels), and the least of one with more than `_COLUMN_OF_CURVES` curves."""
_COLUMN_OF_CURVES, _CURVE_HEIGHT = 7, 44
_BLOCK = 32
"""Frames held in memory of each camera."""
_FASTEST = 30.0


@dataclass(frozen=True)
class Shown:
    """The episode and what is said about it."""

    store: EpisodeStore
    episode: int
    cameras: list[str]

    @property
    def steps(self) -> int:
        start, end = self.store.bounds(self.episode)
        return end - start

    def frames(self, camera: str, steps: Sequence[int]) -> Picture:
        """(k, H, W, 3) of steps of the episode."""
        return self.store.frames(np.asarray(steps, dtype=np.int64) + self.store.bounds(self.episode)[0], camera)

    def shape(self, camera: str) -> NDArray[np.int64]:
        """(2,) height and width of its pictures."""
        return np.array(self.frames(camera, [0]).shape[1:3])

    def seconds(self) -> NDArray[np.float64]:
        """(n,) since the first frame."""
        stamps = self.store.timestamps(np.arange(*self.store.bounds(self.episode), dtype=np.int64))
        return np.arange(self.steps) / self.store.rate_hz if stamps is None else stamps - stamps[0]

    def facts(self) -> str:
        """One line about the episode."""
        store, task = self.store, self.store.task_of(self.episode)
        file = store.episode_provenance[self.episode].get("file")
        parts = [
            f"episode {self.episode} of {len(store.episode_ends)}",
            f"task {task}" if task != store.episode_instructions[self.episode] else "",
            SPLITS[int(store.episode_split[self.episode])].replace("_", " "),
            f"{self.steps} frames at {store.rate_hz:g} Hz, {self.seconds()[-1]:.1f} s", str(file or ""), str(store.path),
        ]  # fmt: skip
        return "   ·   ".join(part for part in parts if part)

    def vectors(self) -> dict[str, NDArray[np.float32]]:
        """What the curves show, first: the actions, or without them the proprioception or state, (n, D); then what the
        demonstrator wanted, where that differs from what was executed. Empty without any."""
        rows = np.arange(*self.store.bounds(self.episode), dtype=np.int64)
        name = next((name for name in ("actions", "proprioception", "state") if self.store.has(name)), None)
        names = [] if name is None else [name, "expert_actions"] if name == "actions" else [name]
        values = {name: self.store.vector(name, rows) for name in names if self.store.has(name)}
        if len(values) == 2 and np.array_equal(values["actions"], values["expert_actions"]):
            del values["expert_actions"]
        return values


class Page:
    """A figure: the instruction and facts, lines of pictures, and the curves. `pictures` are its (lines, columns) of axes."""

    def __init__(self, shown: Shown, width: int, heights: Sequence[int], columns: int, note: str, marks: Sequence[int]) -> None:
        """heights: of the lines of pictures (pixels). marks: steps to mark in the curves with a thin line."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        title = textwrap.wrap(
            f"“{shown.store.episode_instructions[shown.episode]}”", width // 11, max_lines=4, placeholder=" …"
        )
        facts = textwrap.wrap(shown.facts() + note, width // 7, max_lines=4, placeholder=" …")
        vectors = shown.vectors()
        dimensions = next(iter(vectors.values())).shape[1] if vectors else 0
        curve_columns = min(4, max(1, width // 250), -(-dimensions // _COLUMN_OF_CURVES))
        lines = -(-dimensions // max(1, curve_columns))
        header = 16 + 24 * len(title) + 17 * len(facts) + 2 * _GAP
        pictures, curves = sum(heights) + _GAP * (len(heights) - 1), 2 * _GAP + _CURVE_HEIGHT * lines if lines else 8
        height = header + pictures + curves
        height += height % 2  # as H.264 needs it
        self.figure: Any = Figure((width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
        self.canvas: Any = FigureCanvasAgg(self.figure)
        texts: dict[str, Any] = {"ha": "left", "va": "top", "parse_math": False}
        self.figure.text(_MARGIN / width, 1 - 12 / height, "\n".join(title), fontsize=13, weight="bold", color=_INK, **texts)
        below = 1 - (16 + 24 * len(title)) / height
        self.figure.text(_MARGIN / width, below, "\n".join(facts), fontsize=8.5, color=_PALE, **texts)
        sides = {"left": _MARGIN / width, "right": 1 - 12 / width}
        grid = self.figure.add_gridspec(
            len(heights), columns, height_ratios=heights, **sides, top=1 - header / height, bottom=curves / height,
            hspace=_GAP * len(heights) / sum(heights), wspace=6 * columns / width,
        )  # fmt: skip
        self.pictures: NDArray[Any] = grid.subplots(squeeze=False)
        for axes in self.pictures.flat:
            axes.axis("off")
        self.moving: list[tuple[Any, Any, NDArray[np.float32]]] = []
        """Cursor, dot and values of each curve, which are drawn by `at` alone."""
        if lines:
            grid = self.figure.add_gridspec(
                lines, curve_columns, **sides, top=(curves - _GAP) / height, bottom=20 / height, hspace=0.15,
                wspace=(_MARGIN + 12) * curve_columns / width,
            )  # fmt: skip
            self._draw_curves(list(grid.subplots(sharex=True, squeeze=False).T.flat), vectors, marks)

    def _draw_curves(self, panels: list[Any], vectors: dict[str, NDArray[np.float32]], marks: Sequence[int]) -> None:
        """Each dimension in a panel of its own, by step."""
        (name, values), *behind = vectors.items()
        panels[0].set_title(
            f"{name} by step" + (", in grey what the demonstrator wanted" if behind else ""), loc="left", fontsize=8.5
        )
        for d, axes in enumerate(panels):
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0, labelsize=6, labelcolor=_PALE)
            axes.locator_params(nbins=2, axis="y")
            if d >= values.shape[1]:
                axes.axis("off")
                continue
            axes.set(facecolor="#f6f7f9", xlim=(0, max(1, len(values) - 1)))
            axes.text(0.004, 0.94, f"{name[0]}[{d}]", transform=axes.transAxes, va="top", fontsize=7, color=_INK)
            for mark in marks:
                axes.axvline(mark, color="#d5d8de", linewidth=0.8)
            for _, wanted in behind:
                axes.plot(wanted[:, d], color="#b8b8b8", linewidth=1.0)
            axes.plot(values[:, d], color="#1f77b4", linewidth=1.3, marker="o" if len(values) == 1 else None, markersize=3)
            cursor = axes.axvline(0, color=_CURSOR, linewidth=0.8, animated=True)
            self.moving.append((cursor, axes.plot([], [], "o", color=_CURSOR, markersize=3, animated=True)[0], values[:, d]))

    def drawn(self) -> Picture:
        """(h, w, 3) of all that does not move."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the font lacks a letter of the instruction
            self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()


def contact_sheet(shown: Shown) -> Picture:
    """(h, w, 3): frames evenly spaced in time with number and time, cameras below one another; and the curves."""
    lines = {1: 3, 2: 2}.get(len(shown.cameras), 1)
    count = min(shown.steps, _COLUMNS * lines)
    steps = np.unique(np.linspace(0, shown.steps - 1, count).round().astype(np.int64)).tolist()
    shapes = [shown.shape(camera) for camera in shown.cameras]
    heights = [int(min(4 * _CELL, _CELL * height / width)) for height, width in shapes] * -(-len(steps) // _COLUMNS)
    page = Page(shown, _MARGIN + 12 + _COLUMNS * (_CELL + 6), heights, _COLUMNS, "", steps)
    seconds = shown.seconds()
    for number, camera in enumerate(shown.cameras):
        for k, (step, frame) in enumerate(zip(steps, shown.frames(camera, steps), strict=True)):
            axes = page.pictures[k // _COLUMNS * len(shown.cameras) + number, k % _COLUMNS]
            axes.imshow(frame)
            if number == 0:
                axes.set_title(f"{step}   {seconds[step]:.2f} s", fontsize=8, loc="left", pad=3)
            if k % _COLUMNS == 0:
                axes.text(-0.03, 0.5, camera[-30:], transform=axes.transAxes, rotation=90, ha="right", va="center", fontsize=7)
    return page.drawn()


def film(shown: Shown, fps: float) -> Iterator[Picture]:
    """Pages (h, w, 3) of the film, one a step: all cameras, the step and its time, and the curves with a cursor."""
    cameras = len(shown.cameras)
    columns = cameras if cameras <= 3 else -(-cameras // 2) if cameras <= 6 else 4
    tall, most_width = {1: 480, 2: 400, 3: 400}.get(cameras, 280), (_FILM_WIDTHS[1] - _MARGIN - 12) // columns - 6
    sizes = [shape * min(tall / shape[0], most_width / shape[1]) for shape in map(shown.shape, shown.cameras)]
    many = any(values.shape[1] > 2 * _COLUMN_OF_CURVES for values in shown.vectors().values())
    width = max(_WIDE if many else _FILM_WIDTHS[0], _MARGIN + 12 + columns * (int(max(w for _, w in sizes)) + 6))
    heights = [int(max(h for h, _ in sizes[i : i + columns])) for i in range(0, cameras, columns)]
    speed = fps / shown.store.rate_hz
    note = "" if abs(speed - 1) < 0.005 else f"   ·   at {speed:.2g} times its speed"
    page = Page(shown, width + width % 2, heights, columns, note, [])
    images = {}
    for axes, camera in zip(page.pictures.flat, shown.cameras, strict=False):
        images[camera] = axes.imshow(shown.frames(camera, [0])[0], animated=True)
        axes.set_title(camera, fontsize=8, color=_PALE, pad=3)
    top = page.pictures[0, 0].get_subplotspec().get_position(page.figure).y1 + 1.9 * _GAP / _DPI / page.figure.get_figheight()
    label = page.figure.text(_MARGIN / width, top, "", fontsize=9, color=_INK, va="top", animated=True)
    page.drawn()
    background, renderer = page.canvas.copy_from_bbox(page.figure.bbox), page.canvas.get_renderer()
    seconds = shown.seconds()
    for first in range(0, shown.steps, _BLOCK):
        steps = range(first, min(first + _BLOCK, shown.steps))
        blocks = {camera: shown.frames(camera, steps) for camera in shown.cameras}
        for k, step in enumerate(steps):
            page.canvas.restore_region(background)
            label.set_text(f"frame {step} of {shown.steps}    {seconds[step]:.2f} s")
            for camera, image in images.items():
                image.set_data(blocks[camera][k])
            for cursor, dot, values in page.moving:
                cursor.set_xdata([step, step])
                dot.set_data([step], [values[step]])
            for artist in [label, *images.values(), *(part for moving in page.moving for part in moving[:2])]:
                artist.draw(renderer)
            yield np.asarray(page.canvas.buffer_rgba())[..., :3].copy()


def show_episode(path: Path, episode: int, out: Path, cameras: Sequence[str], fps: float | None) -> list[Path]:
    """Write `episode_<number>.png` and `.mp4` of one episode into the folder `out`; returns their names.

    `cameras` empty means all. `fps` None means the data's rate, at most 30, so that fast data can be followed.

    Raises:
        ContractError: there is no such episode or camera. FileError: the store does not open, or its frames are damaged.
    """
    from PIL import Image

    store = EpisodeStore.open(path)
    if not 0 <= episode < len(store.episode_ends):
        raise ContractError(f"{path}: no episode {episode}; there are 0..{len(store.episode_ends) - 1}")
    for camera in cameras:
        if camera not in store.cameras:
            raise ContractError(f"{path}: no camera {camera!r}; there are {', '.join(store.cameras)}")
    shown = Shown(store, episode, list(dict.fromkeys(cameras)) or store.cameras)
    rate = min(store.rate_hz, _FASTEST) if fps is None else fps
    sheet, video = out / f"episode_{episode:04d}.png", out / f"episode_{episode:04d}.mp4"
    with whole_file(sheet) as temporary:
        Image.fromarray(contact_sheet(shown)).save(temporary)
    write_film(video, track(film(shown, rate), "film", shown.steps), rate)
    return [sheet, video]
