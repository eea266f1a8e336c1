"""Where the Uni-Perceiver looks in each foreseen frame (S-VAM, qualitative figures): head-averaged weights of its last
cross-attention, their maximum in each frame, and the 3 x 3 neighbourhood around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.models.svam import SVAM, Inputs
from svam.report.grid import PictureGrid, PictureRow, heat, picture_grid
from svam.report.tables import markdown_table
from svam.training.foresight_metrics import moved_patches

QUERY_COLOURS = ("#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")


def attention_weights(model: SVAM, inputs: Inputs) -> NDArray[np.float32] | None:
    """Weights (B, T, N, h, w), each map summing to 1, of the policy's aggregator over frames of foresight; None where it has
    no Uni-Perceiver, or one that sees a single frame only. Of several groups of entries, the first with several frames."""
    groups = model.network.attention(inputs)
    weights = next((weights for weights in groups.values() if weights.shape[1] > 1), None)
    return None if weights is None else weights.float().cpu().numpy()


def peaks(weights: NDArray[np.floating]) -> NDArray[np.int64]:
    """(..., h, w) to the row and column (..., 2) of the largest weight."""
    flat = weights.reshape(*weights.shape[:-2], -1).argmax(axis=-1)
    return np.stack(np.unravel_index(flat, weights.shape[-2:]), axis=-1).astype(np.int64)


def around_peak(weights: NDArray[np.floating]) -> NDArray[np.float64]:
    """(..., h, w) weights, 0 but in the 3 x 3 cells around the largest one; at the border in those that exist."""
    rows, columns = weights.shape[-2:]
    at = peaks(weights)[..., None, None, :]
    near = (np.abs(np.arange(rows)[:, None] - at[..., 0]) <= 1) & (np.abs(np.arange(columns) - at[..., 1]) <= 1)
    return np.asarray(weights * near, dtype=np.float64)


def score_attention(weights: NDArray[np.floating], frames: NDArray[np.uint8]) -> list[dict[str, float]]:
    """A line for each frame: how much of the attention (mean over queries) lies where the truth has moved.

    Args:
        weights: (B, T, N, V w, w), of V cameras. frames: (B, T, V H, W, 3) uint8, the recorded clip.

    Returns:
        {frame, on_moved, moved, neighbourhood}: the share of attention on patches that moved since the observed frame, the
        share of patches that did (what uniform attention would give), over clips in which any did, and the attention within
        the neighbourhood of the maximum. Frame 0, where nothing has moved yet, is left out, and so is a frame in which no clip
        moves.
    """
    mean = weights.mean(axis=2, dtype=np.float64)
    moved = moved_patches(frames, weights.shape[-1], weights.shape[-2] // weights.shape[-1])
    lines = []
    for t in range(1, weights.shape[1]):
        some = moved[:, t].any(axis=(1, 2))
        if some.any():
            on = (mean[some, t] * moved[some, t]).sum(axis=(1, 2)).mean()
            near = around_peak(mean[some, t]).sum(axis=(1, 2)).mean()
            lines.append({
                "frame": t, "on_moved": float(on), "moved": float(moved[some, t].mean()), "neighbourhood": float(near),
            })  # fmt: skip
    return lines


def overlay(frames: NDArray[np.uint8], weights: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Clips (..., H, W, 3) uint8 under the heat of weights (..., h, w), each scaled to its own maximum; where there is no
    attention the frame stays as it is."""
    height, width = frames.shape[-3:-1]
    rows, columns = (np.arange(n) * k // n for n, k in zip((height, width), weights.shape[-2:], strict=True))
    large = weights[..., rows[:, None], columns]
    scaled = large / np.maximum(large.max(axis=(-2, -1), keepdims=True), 1e-12)
    cover = 0.8 * np.sqrt(scaled)[..., None]
    return np.asarray(np.rint((1.0 - cover) * frames + cover * heat(scaled, 0.0, 1.0, "autumn")), dtype=np.uint8)


def mark(grid: PictureGrid, row: int, weights: NDArray[np.floating]) -> None:
    """On the first T cells of one row of pictures, for weights (T, N, h, w): the 3 x 3 cells around the maximum of the queries'
    mean, and a dot at each query's own maximum."""
    rows, columns = weights.shape[-2:]
    centre, single = peaks(weights.mean(axis=1)), peaks(weights)
    for t, (r, c) in enumerate(centre):
        top, bottom, left, right = max(0, r - 1), min(rows, r + 2), max(0, c - 1), min(columns, c + 2)
        corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        x, y = zip(*(grid.at(row, t, x / columns, y / rows) for x, y in corners), strict=True)
        grid.axis.plot(x, y, color="#00e5ff", linewidth=1.0)
        for n, (r, c) in enumerate(single[t]):
            place = grid.at(row, t, (c + 0.5) / columns, (r + 0.5) / rows)
            style = {"markersize": 3, "markeredgecolor": "white", "markeredgewidth": 0.4}
            grid.axis.plot(*place, "o", color=QUERY_COLOURS[n % len(QUERY_COLOURS)], **style)


def attention_path(weights: NDArray[np.floating]) -> NDArray[np.float64]:
    """Weights (T, N, h, w) to the place (T, 2) of the queries' mean attention in each frame, as fractions (across, down): the
    mean place within the 3 x 3 cells around the maximum, so the path is finer than the grid."""
    near = around_peak(weights.mean(axis=1, dtype=np.float64))
    rows, columns = near.shape[1:]
    across = near.sum(axis=1) @ (np.arange(columns) + 0.5) / columns
    down = near.sum(axis=2) @ (np.arange(rows) + 0.5) / rows
    return np.asarray(np.stack([across, down], axis=1) / np.maximum(near.sum(axis=(1, 2)), 1e-12)[:, None])


def attention_figure(frames: NDArray[np.uint8], weights: NDArray[np.floating], instructions: list[str]) -> Any:
    """Clips (n, T, H, W, 3) uint8 of the recorded future under the attention (n, T, N, h, w) on the foreseen one, and at the
    right the path of its maximum, dark to bright, on the observed frame."""
    count, steps = frames.shape[:2]
    seen = overlay(frames, weights.mean(axis=2))
    rows: list[PictureRow] = [(f"clip {i}", [*seen[i], frames[i, 0]]) for i in range(count)]
    titles = ["observed", *(f"+{t}" for t in range(1, steps)), "path"]
    heading = (
        "Attention of the Uni-Perceiver on the foreseen frames, drawn on the recorded ones: maximum and its 3 x 3 cells; a dot "
        "for each query\n" + "; ".join(f"{i}: {text}" for i, text in enumerate(instructions))
    )
    figure, grid = picture_grid(rows, titles, heading, side=1.3)
    for i in range(count):
        mark(grid, i, weights[i])
        x, y = zip(*(grid.at(i, steps, *place) for place in attention_path(weights[i])), strict=True)
        grid.axis.plot(x, y, color="white", linewidth=1.0)
        colours = np.arange(steps)
        grid.axis.scatter(x, y, c=colours, cmap="plasma", s=14, edgecolors="white", linewidths=0.4, zorder=3)
    return figure


def draw(axis: Any, lines: list[Mapping[str, float]]) -> None:
    """Attention on patches that moved, beside their share, by frame."""
    frames = [line["frame"] for line in lines]
    axis.plot(frames, [line["on_moved"] for line in lines], color="#1f77b4", marker="o", markersize=3, label="attention")
    axis.plot(frames, [line["moved"] for line in lines], color="#bbbbbb", marker="o", markersize=3, label="patches (uniform)")
    axis.set_ylim(0.0, 1.0)
    axis.set_xlabel("frames ahead", fontsize=7)
    axis.legend(fontsize=7)
    axis.set_title("Share on patches that moved", fontsize=8)


def markdown(lines: list[Mapping[str, float]]) -> str:
    header = ["frames ahead", "attention on patches that moved", "share of patches that moved", "within 3 x 3 of the maximum"]
    cells = [[str(x["frame"]), *(f"{x[k]:.3f}" for k in ("on_moved", "moved", "neighbourhood"))] for x in lines]
    return "\n\n".join(["## Attention of the policy", markdown_table(header, cells)])
