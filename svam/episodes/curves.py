"""Curves of an episode's vectors, drawn once; moving a cursor over them is a matter of a few pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GUTTER, _RIGHT, _TITLE, _AXIS, _GAP = 58, 14, 22, 24, 6
"""Pixels: left of a column for names and ranges, right of it, above and below all panels, between panels."""
_LINE, _BACK, _CURSOR = "#1f77b4", "#b8b8b8", (214, 39, 40)
_DPI = 100


@dataclass(frozen=True)
class Curves:
    """A drawn picture (h, w, 3) uint8, and where step t of each panel is in it.

    x: (panels, n) and y: (panels, n) int64 pixels. top, bottom: (panels,) int64, the panels' vertical extent.
    """

    picture: NDArray[np.uint8]
    x: NDArray[np.int64]
    y: NDArray[np.int64]
    top: NDArray[np.int64]
    bottom: NDArray[np.int64]

    def at(self, step: int) -> NDArray[np.uint8]:
        """A copy with a cursor at one step and a dot on every curve."""
        picture = self.picture.copy()
        for panel in range(len(self.x)):
            x, y = int(self.x[panel, step]), int(self.y[panel, step])
            picture[self.top[panel] : self.bottom[panel], x : x + 1] = _CURSOR
            picture[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = _CURSOR
        return picture


def _steps_of(n: int, width: int) -> list[int]:
    """Round step numbers to label, at least 50 pixels apart."""
    raw = max(1.0, (n - 1) * 50 / max(1, width))
    power = 10 ** int(np.floor(np.log10(raw)))
    step = next(int(factor * power) for factor in (1, 2, 5, 10) if factor * power >= raw)
    return list(range(0, n, step))


def draw_curves(
    name: str, values: NDArray[np.float32], behind: NDArray[np.float32] | None, width: int, marks: NDArray[np.int64],
    caption: str,
) -> Curves:  # fmt: skip
    """Draw each dimension of `values` (n, D) in a panel of its own, `behind` (n, D) in grey below it, on `width` pixels.

    `marks` are steps to mark with a thin line; `caption` stands above. Up to seven dimensions stand in one column, more in up
    to four.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n, dimensions = values.shape
    columns = min(4, max(1, width // 250), -(-dimensions // 7))
    lines = -(-dimensions // columns)
    panel_h = int(np.clip(320 / lines - _GAP, 26, 64))
    panel_w = width // columns - _GUTTER - _RIGHT
    height = _TITLE + lines * (panel_h + _GAP) + _AXIS
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    canvas: Any = FigureCanvasAgg(figure)
    figure.text(14 / width, 1 - 4 / height, caption, va="top", fontsize=8.5, color="#333333")
    steps = np.arange(n)
    xs, ys = np.zeros((dimensions, n), np.int64), np.zeros((dimensions, n), np.int64)
    tops, bottoms = np.zeros(dimensions, np.int64), np.zeros(dimensions, np.int64)
    for d in range(dimensions):
        column, line = divmod(d, lines)
        left = column * (width // columns) + _GUTTER
        top = _TITLE + line * (panel_h + _GAP)
        axes = figure.add_axes((left / width, 1 - (top + panel_h) / height, panel_w / width, panel_h / height))
        low, high = float(values[:, d].min()), float(values[:, d].max())
        if behind is not None:
            low, high = min(low, float(behind[:, d].min())), max(high, float(behind[:, d].max()))
        room = 0.08 * (high - low) or max(1e-3, 0.1 * abs(high))
        axes.set(xlim=(0, max(1, n - 1)), ylim=(low - room, high + room), facecolor="#f6f7f9")
        for mark in marks:
            axes.axvline(mark, color="#d5d8de", linewidth=0.8, zorder=1)
        if low < 0 < high:
            axes.axhline(0, color="#c3c7cf", linewidth=0.7, zorder=1)
        if behind is not None:
            axes.plot(steps, behind[:, d], color=_BACK, linewidth=1.0, zorder=2)
        axes.plot(steps, values[:, d], color=_LINE, linewidth=1.3, zorder=3, marker="o" if n == 1 else None, markersize=3)
        for side in axes.spines.values():
            side.set_visible(False)
        last = line == lines - 1 or d == dimensions - 1
        ticks = _steps_of(n, panel_w)
        axes.set_xticks(ticks if last else [], [str(t) for t in ticks] if last else [])
        axes.set_yticks([])
        axes.tick_params(length=0, pad=3, labelsize=7, labelcolor="#777777")
        axes.text(-0.006, 0.5, f"{name}[{d}]", transform=axes.transAxes, ha="right", va="center", fontsize=7, color="#333333")
        if panel_h >= 36:
            for place, number, va in ((1.0, high, "top"), (0.0, low, "bottom"))[: 2 if high > low else 0]:
                axes.text(
                    -0.006, place, f"{number:.3g}", transform=axes.transAxes, ha="right", va=va, fontsize=5.5, color="#999999"
                )  # fmt: skip
        points = axes.transData.transform(np.column_stack([steps, values[:, d]]))
        xs[d], ys[d] = points[:, 0].round(), height - points[:, 1].round()
        tops[d], bottoms[d] = top, top + panel_h
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return Curves(picture, xs.clip(0, picture.shape[1] - 1), ys.clip(0, picture.shape[0] - 1), tops, bottoms)
