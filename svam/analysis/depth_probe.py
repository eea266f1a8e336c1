"""Depth read out of frozen features by a linear head, on frames of the future (S-VAM, qualitative figures).

The head is the smallest dense one: a 1x1 convolution from a token to its patch's pixels, and a bias per position, since the
camera hardly moves and a map of mean depths would otherwise be most of what is learnt. It is fitted in closed form on
training windows, so it has no budget to argue about, and every kind of feature gets the same one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.analysis.gap import EpisodeBootstrap, Sums, per_window, to_pixels
from svam.models.teachers import FARTHEST
from svam.report.grid import PictureRow, heat, picture_grid
from svam.report.tables import markdown_table
from svam.training.distill_data import annotated_frames
from svam.training.teacher_metrics import depth_error, valid_depth

RIDGE = 1e-3
"""Of the head, per token and in units of the features' variance."""
SOURCES = {
    "geometric": "geometric foresight",
    "repeat": "reference, repeated",
    "one_step": "one-step features",
    "generated": "teacher on the generation",
    "truth": "teacher on the real future",
    "mean": "mean depth of the position",
}
"""What depth is read from, in the order of the tables. The last sees nothing: it is the head's bias alone."""
Features = Callable[[NDArray[np.int64], NDArray[np.int64]], Mapping[str, NDArray[np.float32]]]
"""Window numbers (n,) and frames within them (n,) -> source -> tokens (n, h, w, C) float32, the same sources every time."""
Frames = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]
"""Window numbers (n,), frames within them (n,), and the simulator's depth there (n, H, W) float32 metres."""


def to_patches(depth: NDArray[np.float32], grid: int) -> NDArray[np.float32]:
    """(n, H, W) to (n, grid * grid, pixels of a patch); the sizes need not divide (the nearest pixel is taken)."""
    (rows, p), (columns, q) = (_samples(size, grid) for size in depth.shape[1:])
    cut = depth[:, rows[:, None], columns].reshape(len(depth), grid, p, grid, q)
    return np.asarray(cut.transpose(0, 1, 3, 2, 4).reshape(len(depth), grid * grid, p * q))


def from_patches(patches: NDArray[np.float32], grid: int, height: int, width: int) -> NDArray[np.float32]:
    """The other way: (n, grid * grid, pixels) to (n, height, width)."""
    p, q = (_samples(size, grid)[1] for size in (height, width))
    joined = patches.reshape(len(patches), grid, grid, p, q).transpose(0, 1, 3, 2, 4).reshape(len(patches), grid * p, grid * q)
    rows, columns = (np.arange(n) * (grid * k) // n for n, k in ((height, p), (width, q)))
    return np.asarray(joined[:, rows[:, None], columns])


def _samples(size: int, grid: int) -> tuple[NDArray[np.int64], int]:
    """Pixels along one side that stand for grid * k places, and k."""
    k = max(1, size // grid)
    return np.arange(grid * k, dtype=np.int64) * size // (grid * k), k


class DepthHead:
    """Tokens (n, P, C) to inverse depths (n, P, D): a linear map of what differs from the mean of each position P.

    Inverse depth weighs what is near, as the geometric teacher's own head does. Where a sensor saw nothing, or sky, the
    target is the position's mean.
    """

    def __init__(self, depth: NDArray[np.float32]) -> None:
        """`depth`: (n, P, D) metres, of all training frames."""
        valid = valid_depth(depth)
        self.y_mean = np.where(valid, _inverse(depth), 0.0).sum(axis=0) / np.maximum(valid.sum(axis=0), 1)
        self._x: NDArray[np.float64] | float = 0.0
        self._gram: NDArray[np.float64] | float = 0.0
        self._cross: NDArray[np.float64] | float = 0.0
        self._count = 0

    def add(self, tokens: NDArray[np.float32], depth: NDArray[np.float32]) -> None:
        """Add training frames: tokens (n, P, C), depth (n, P, D) metres. Each frame that `__init__` saw, once."""
        x = tokens.astype(np.float64)
        residual = np.where(valid_depth(depth), _inverse(depth) - self.y_mean, 0.0)
        flat = x.reshape(-1, x.shape[-1])
        self._x = self._x + x.sum(axis=0)
        self._gram = self._gram + flat.T @ flat
        self._cross = self._cross + flat.T @ residual.reshape(len(flat), -1)
        self._count += len(x)

    def fit(self) -> None:
        """Solve for the weights."""
        self.x_mean = np.asarray(self._x) / self._count
        # Residuals sum to 0 at each position, so the cross product needs no centring.
        gram = np.asarray(self._gram) - self._count * self.x_mean.T @ self.x_mean
        penalty = RIDGE * np.maximum(np.diag(gram), 1e-12 * max(float(np.trace(gram)), 1.0))
        self.weight = np.linalg.solve(gram + np.diag(penalty), np.asarray(self._cross))

    def predict(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """Depth (n, P, D) in metres, at most FARTHEST, of tokens (n, P, C)."""
        inverse = self.y_mean + (tokens.astype(np.float64) - self.x_mean) @ self.weight
        return np.asarray(1.0 / np.maximum(inverse, 1.0 / FARTHEST), dtype=np.float32)

    def mean(self, frames: int) -> NDArray[np.float32]:
        """The bias alone, (frames, P, D) metres."""
        depth = np.asarray(1.0 / np.maximum(self.y_mean, 1.0 / FARTHEST), dtype=np.float32)
        return np.broadcast_to(depth, (frames, *depth.shape))


def _inverse(depth: NDArray[np.float32]) -> NDArray[np.float64]:
    return 1.0 / np.where(depth > 0, depth, 1.0).astype(np.float64)


def choose_frames(
    rows: NDArray[np.int64], numbers: NDArray[np.int64], labelled: NDArray[np.int64], most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Window numbers and frames (n,), (n,) of annotated frames of the future, at most `most`, evenly spread.

    Args:
        rows: (W, T) of all windows. numbers: those to choose from. labelled: annotated store rows, increasing.
    """
    places = annotated_frames(rows[numbers], labelled)
    chosen = np.unique(np.linspace(0, max(0, len(places) - 1), min(most, len(places))).astype(np.int64))
    return numbers[places[chosen, 0]], places[chosen, 1]


def _blocks(features: Features, frames: Frames, block: int) -> Iterator[tuple[slice, dict[str, NDArray[np.float32]]]]:
    """The frames block by block, each with its tokens (n, P, C) by source."""
    for start in range(0, len(frames[0]), block):
        part = slice(start, start + block)
        tokens = features(frames[0][part], frames[1][part])
        yield part, {name: values.reshape(len(values), -1, values.shape[-1]) for name, values in tokens.items()}


def fit_heads(features: Features, frames: Frames, grid: int, block: int) -> dict[str, DepthHead]:
    """A head for every source, fitted on training frames; `block`: frames computed at a time."""
    targets = to_patches(frames[2], grid)
    heads = defaultdict[str, DepthHead](lambda: DepthHead(targets))
    for part, tokens in _blocks(features, frames, block):
        for name, values in tokens.items():
            heads[name].add(values, targets[part])
    for head in heads.values():
        head.fit()
    return heads


def read_depth(
    heads: Mapping[str, DepthHead], features: Features, frames: Frames, grid: int, block: int
) -> dict[str, NDArray[np.float32]]:
    """Source -> predicted depth (n, H, W) metres of the frames, and `mean`, which no feature informs."""
    parts: dict[str, list[NDArray[np.float32]]] = {}
    for _, tokens in _blocks(features, frames, block):
        for name, values in tokens.items():
            parts.setdefault(name, []).append(heads[name].predict(values))
    patches = {name: np.concatenate(blocks) for name, blocks in parts.items()}
    patches["mean"] = next(iter(heads.values())).mean(len(frames[0]))
    return {name: from_patches(patches[name], grid, *frames[2].shape[1:]) for name in SOURCES if name in patches}


def score_depth(
    predicted: Mapping[str, NDArray[np.float32]], frames: Frames, moved: NDArray[np.bool_], std: float, boot: EpisodeBootstrap
) -> dict[str, Any]:
    """Errors of every source, over all pixels and over patches that moved since the observed frame.

    Args:
        predicted: source -> (n, H, W) metres. moved: (n, g, g) patches. std: metres, the training depths' deviation.
        boot: over the episodes of the n frames.

    Returns:
        {frames, sources: {source: {rmse_m, rmse_std, abs_rel, moved_rmse_m}}, difference: {source: {value, low, high}}}: how
        much larger the source's error on moved patches is than that of geometric foresight, in metres, with intervals that
        hold for all sources together. No `moved_rmse_m` and no difference where nothing moved.
    """
    truth = frames[2]
    where = to_pixels(moved, *truth.shape[1:]) & valid_depth(truth)
    sources: dict[str, dict[str, float]] = {}
    errors: dict[str, Sums] = {}
    for name, depth in predicted.items():
        sources[name] = depth_error(depth, truth, std)
        square = np.square(depth.astype(np.float64) - np.where(where, truth, 0.0))
        errors[name] = Sums(per_window(square * where), per_window(where))
        if where.any():
            sources[name]["moved_rmse_m"] = float(np.sqrt(errors[name].numerator.sum() / errors[name].denominator.sum()))
    result: dict[str, Any] = {"frames": len(truth), "sources": sources, "difference": {}}
    others = [name for name in predicted if name != "geometric"]
    if "geometric" in predicted and where.any():
        base = np.sqrt(boot.ratios(errors["geometric"]))
        for name in others:
            low, high = boot.interval(np.sqrt(boot.ratios(errors[name])) - base, len(others))
            value = sources[name]["moved_rmse_m"] - sources["geometric"]["moved_rmse_m"]
            result["difference"][name] = {"value": value, "low": low, "high": high}
    return result


def markdown(result: Mapping[str, Any]) -> str:
    header = ["depth read from", "RMSE, m", "of deviation", "relative", "RMSE where it moved, m", "more than geometric's"]
    lines = []
    for name in (name for name in SOURCES if name in result["sources"]):
        values, gap = result["sources"][name], result["difference"].get(name)
        cells = [f"{values[key]:.3f}" if key in values else "" for key in ("rmse_m", "rmse_std", "abs_rel", "moved_rmse_m")]
        interval = f"{gap['value']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})" if gap else ""
        lines.append([SOURCES[name], *cells, interval])
    text = (
        "A linear head (1x1, with a bias per position) on frozen features, fitted on training windows, read on "
        f"{result['frames']} annotated frames of held-out ones, one to T - 1 frames ahead. Intervals: 95 % for all rows "
        "together, over resampled episodes."
    )
    return "\n\n".join(["## Depth of the future", text, markdown_table(header, lines)])


def table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each source, for the DVC plots: {what, rmse_m, moved_rmse_m}."""
    sources = {title: result["sources"][name] for name, title in SOURCES.items() if name in result["sources"]}
    keys = ("rmse_m", "moved_rmse_m")
    return [{"what": title, **{k: values[k] for k in keys if k in values}} for title, values in sources.items()]


def draw(axis: Any, result: Mapping[str, Any]) -> None:
    """Root mean squared error by source, where something moved if anything did."""
    shown = [name for name in SOURCES if name in result["sources"]]
    key = "moved_rmse_m" if all("moved_rmse_m" in result["sources"][name] for name in shown) else "rmse_m"
    colours = ["#1f77b4" if name == "geometric" else "#bbbbbb" for name in shown]
    axis.barh([SOURCES[name] for name in shown], [result["sources"][name][key] for name in shown], color=colours)
    axis.invert_yaxis()
    axis.set_title(f"Depth of the future, error in m{' where it moved' if key != 'rmse_m' else ''}", fontsize=8)


def depth_figure(
    observed: NDArray[np.uint8], future: NDArray[np.uint8], truth: NDArray[np.float32],
    predicted: Mapping[str, NDArray[np.float32]], ahead: Sequence[int],
) -> Any:  # fmt: skip
    """Columns: held-out examples. Rows: the observed frame, the future one, its depth, and for each of geometric foresight,
    repeated reference and one-step features the depth read and its absolute error.

    Args:
        observed, future: (n, H, W, 3) uint8. truth: (n, H, W) metres. predicted: source -> (n, H, W) metres.
        ahead: (n,) how many frames the future one is ahead.
    """
    valid = valid_depth(truth)
    low, high = np.quantile(truth[valid], (0.01, 0.99))
    known = np.where(valid, truth, np.nan)
    shown = [name for name in ("geometric", "repeat", "one_step") if name in predicted]
    error = {name: np.abs(predicted[name] - known) for name in shown}
    worst = float(np.nanquantile(np.stack(list(error.values())), 0.99))
    rows: list[PictureRow] = [("observed", list(observed)), ("future", list(future))]
    rows.append(("its depth", list(heat(known, low, high))))
    for name in shown:
        title = SOURCES[name].replace(" ", "\n", 1)
        rows += [(title, list(heat(predicted[name], low, high))), ("error", list(heat(error[name], 0.0, worst, "magma")))]
    heading = f"Depth of the future by a linear head, {low:.2f} to {high:.2f} m; errors from 0 (black) to {worst:.2f} m"
    return picture_grid(rows, [f"+{t}" for t in ahead], heading)[0]
