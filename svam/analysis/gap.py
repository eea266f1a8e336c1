"""Is there anything to distil? Multi-step generations against the decoded one-step prediction, on held-out windows.

Squared error favours the mean of all futures, and so the blur of one step. The other measures here do not: where a
segmentation teacher sees robot and object, what changes from frame to frame, which patches move, and how sharp the picture is.
Every measure is a ratio of two sums over windows, so it can be resampled by episode. Pure functions on arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from svam.contract import SEGMENTATION_CLASSES
from svam.report.tables import markdown_table
from svam.seeds import generator
from svam.training.foresight_metrics import moved_patches

CONFIDENCE = 0.95
"""Of the intervals of all measures together: each one is as wide as Bonferroni's correction requires."""
FEWEST_EPISODES = 8
"""With fewer held-out episodes a bootstrap's intervals are far too narrow, and nothing is concluded from them."""


@dataclass(frozen=True)
class Measure:
    """What a number is called, and when it is good: `one` means the nearer to 1 the better."""

    title: str
    better: Literal["higher", "lower", "one"]

    def badness(self, value: NDArray[np.float64]) -> NDArray[np.float64]:
        """The value turned so that less is better."""
        return {"higher": -value, "lower": value, "one": np.abs(value - 1.0)}[self.better]


MEASURES = {
    "error": Measure("squared error, share of repeating the first frame", "lower"),
    "change_error": Measure("squared error of frame-to-frame differences, share of repeating", "lower"),
    "motion_found": Measure("of the patches that move in truth, share that moves", "higher"),
    "motion_false": Measure("of the patches that do not move in truth, share that moves", "lower"),
    "sharpness": Measure("gradient energy, of the reconstructed truth's", "one"),
    "sharpness_moved": Measure("the same on patches that move in truth", "one"),
    "iou_robot": Measure("IoU of arm and gripper, against the simulator", "higher"),
    "iou_gripper": Measure("IoU of the gripper alone, against the simulator", "higher"),
    "iou_object": Measure("IoU of the object, against the simulator", "higher"),
    "agree_robot": Measure("IoU of arm and gripper, against the teacher on the true frame", "higher"),
    "agree_gripper": Measure("IoU of the gripper alone, against the teacher on the true frame", "higher"),
    "agree_object": Measure("IoU of the object, against the teacher on the true frame", "higher"),
}
"""By name, in the order of the table. `iou_*` counts frames that the simulator annotated, `agree_*` all others."""
PREDICTORS = {
    "multi_step": "multi-step",
    "one_step": "one step, decoded",
    "repeat": "repeat the first frame",
    "reconstruction": "truth through the autoencoder",
    "seed_to_seed": "multi-step against another seed's",
}
"""Clips that are measured against the truth, and last, the ceiling: one multi-step generation against another."""
REGIONS = {"robot": ("arm", "gripper"), "gripper": ("gripper",), "object": ("object",)}
"""Region -> segmentation classes that it unites."""


FINDINGS = {"better": "#1f77b4", "worse": "#d6604d", "not distinguishable": "#999999"}
"""What is found of a difference, and its colour."""


class Sums(NamedTuple):
    """A measure before it is divided: numerator and denominator (W,) float64, one entry per window."""

    numerator: NDArray[np.float64]
    denominator: NDArray[np.float64]


def joined(parts: Sequence[Mapping[str, Sums]]) -> dict[str, Sums]:
    columns = {name: zip(*(part[name] for part in parts), strict=True) for name in parts[0]}
    return {name: Sums(*(np.concatenate(column) for column in pair)) for name, pair in columns.items()}


def per_window(values: NDArray[Any]) -> NDArray[np.float64]:
    """(k, ...) to the sum of each window (k,)."""
    return np.asarray(values.reshape(len(values), -1).sum(axis=1, dtype=np.float64))


def gradient_energy(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Squared forward differences of the mean grey of (..., H, W, 3) uint8: (..., H, W) float32, 0 past the border."""
    grey = frames.mean(axis=-1, dtype=np.float32)
    energy: NDArray[np.float32] = np.zeros_like(grey)
    energy[..., :-1] += np.square(np.diff(grey, axis=-1))
    energy[..., :-1, :] += np.square(np.diff(grey, axis=-2))
    return energy


def to_pixels(patches: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """(..., g, g) values of patches to (..., height, width), as `moved_patches` cuts the frame."""
    grid = patches.shape[-1]
    rows, columns = (np.searchsorted(np.arange(grid) * n // grid, np.arange(n), "right") - 1 for n in (height, width))
    return np.asarray(patches[..., rows[:, None], columns])


def pixel_sums(predicted: NDArray[np.uint8], truth: NDArray[np.uint8], sharp: NDArray[np.uint8], grid: int) -> dict[str, Sums]:
    """Measures that need no teacher.

    Args:
        predicted, truth: clips (k, T, H, W, 3) uint8; frame 0 is the observed one and counts for none of them.
        sharp: clips whose gradient energy is the unit of sharpness: the reconstructed truth, since nothing that comes out of
            the autoencoder is sharper.
        grid: patches along one side.

    Raises:
        ValueError: the shapes differ, or H or W is smaller than the grid.
    """
    if not predicted.shape == truth.shape == sharp.shape:
        raise ValueError(f"clips differ in shape: predicted {predicted.shape}, truth {truth.shape}, sharp {sharp.shape}")
    a, b = predicted.astype(np.float32), truth.astype(np.float32)
    difference = a - b
    moves, moved = moved_patches(predicted, grid)[:, 1:], moved_patches(truth, grid)[:, 1:]
    energy, unit = gradient_energy(predicted[:, 1:]), gradient_energy(sharp[:, 1:])
    where = to_pixels(moved, *truth.shape[2:4])
    return {
        "error": Sums(per_window(np.square(difference[:, 1:])), per_window(np.square(b[:, 1:] - b[:, :1]))),
        "change_error": Sums(per_window(np.square(np.diff(difference, axis=1))), per_window(np.square(np.diff(b, axis=1)))),
        "motion_found": Sums(per_window(moves & moved), per_window(moved)),
        "motion_false": Sums(per_window(moves & ~moved), per_window(~moved)),
        "sharpness": Sums(per_window(energy), per_window(unit)),
        "sharpness_moved": Sums(per_window(energy * where), per_window(unit * where)),
    }


def label_sums(predicted: NDArray[Any], truth: NDArray[Any], counted: NDArray[np.bool_], prefix: str) -> dict[str, Sums]:
    """Intersection over union of `REGIONS`, as `<prefix>_<region>`.

    Args:
        predicted, truth: (k, n, H, W) integer labels of `SEGMENTATION_CLASSES`. counted: (k, n) the frames that count.
    """
    sums = {}
    for region, names in REGIONS.items():
        classes = [SEGMENTATION_CLASSES.index(name) for name in names]
        a, b = (np.isin(labels, classes) & counted[..., None, None] for labels in (predicted, truth))
        sums[f"{prefix}_{region}"] = Sums(per_window(a & b), per_window(a | b))
    return sums


class EpisodeBootstrap:
    """Bootstrap over held-out episodes, each with all its windows: windows of one episode overlap and are no independent
    draws. The same resamples serve all measures and predictors, so differences are paired."""

    def __init__(self, episodes: NDArray[np.int64], resamples: int, seed: int) -> None:
        """`episodes`: (W,) the episode of each window."""
        names, self.group = np.unique(episodes, return_inverse=True)
        self.count = len(names)
        draws = generator(seed, "foresight", "bootstrap")
        self.weights = draws.multinomial(self.count, np.full(self.count, 1.0 / self.count), resamples).astype(np.float64)

    def ratios(self, sums: Sums) -> NDArray[np.float64]:
        """(resamples,) the measure of each resample; NaN where its denominator is 0."""
        top, bottom = (self.weights @ np.bincount(self.group, values, self.count) for values in sums)
        return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan)

    def interval(self, values: NDArray[np.float64], comparisons: int) -> tuple[float, float]:
        """The two ends between which all but (1 - CONFIDENCE) / comparisons of the resampled values lie."""
        tail = (1.0 - CONFIDENCE) / comparisons / 2.0
        low, high = np.nanquantile(values, (tail, 1.0 - tail))
        return float(low), float(high)


def value_of(sums: Sums) -> float | None:
    """The measure over all windows; None where nothing was there to count."""
    total = float(sums.denominator.sum())
    return float(sums.numerator.sum()) / total if total > 0 else None


def summary(sums: Mapping[str, Mapping[str, Sums]], episodes: NDArray[np.int64], resamples: int, seed: int) -> dict[str, Any]:
    """Every measure of every predictor, and multi-step minus one step with its interval.

    Args:
        sums: predictor -> measure -> `Sums` over the same windows. episodes: (W,) the episode of each window.

    Returns:
        {windows, episodes, level, values: {predictor: {measure: value}}, difference: {measure: {value, low, high, finding}},
        verdict}. A difference is that of the measures, but for those that should be near 1, where it is that of the distances
        from 1. `finding`: better, worse or not distinguishable; multi-step is meant.
    """
    values = {
        row: {name: v for name, s in measures.items() if (v := value_of(s)) is not None} for row, measures in sums.items()
    }
    compared = [name for name in MEASURES if name in values["multi_step"] and name in values["one_step"]]
    boot = EpisodeBootstrap(episodes, resamples, seed)
    difference = {}
    for name in compared:
        measure, pair = MEASURES[name], [sums[row][name] for row in ("multi_step", "one_step")]
        # Badness of a "higher" measure is its negative: the sign goes back, so that the table shows plain differences.
        sign = -1.0 if measure.better == "higher" else 1.0
        many, one = (measure.badness(np.asarray(values[row][name])) for row in ("multi_step", "one_step"))
        spread = measure.badness(boot.ratios(pair[0])) - measure.badness(boot.ratios(pair[1]))
        low, high = boot.interval(spread, len(compared))
        finding = "not distinguishable"
        if boot.count >= FEWEST_EPISODES and (high < 0 or low > 0):
            finding = "better" if high < 0 else "worse"
        ends = sorted((sign * low, sign * high))
        difference[name] = {"value": sign * float(many - one), "low": ends[0], "high": ends[1], "finding": finding}
    result: dict[str, Any] = {
        "windows": len(episodes), "episodes": boot.count, "level": CONFIDENCE, "values": values, "difference": difference,
    }  # fmt: skip
    return result | {"verdict": verdict(result)}


def verdict(result: Mapping[str, Any]) -> str:
    """One line: in what multi-step generation is better or worse than one step, by the intervals alone."""
    if result["episodes"] < FEWEST_EPISODES:
        return (
            f"No verdict: {result['episodes']} held-out episodes are too few to tell multi-step from one step "
            f"({FEWEST_EPISODES} are needed)."
        )
    findings = {name: line["finding"] for name, line in result["difference"].items()}
    named = {finding: [name for name, own in findings.items() if own == finding] for finding in FINDINGS}
    parts = [f"{finding} in {', '.join(names)}" for finding, names in named.items() if names]
    return f"Multi-step, against one decoded step, is {'; '.join(parts)}."


def table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each measure, multi-step and one step, for the DVC plots: {what, measure, predictor, value}."""
    return [
        {"what": f"{name}, {PREDICTORS[row]}", "measure": name, "predictor": row, "value": value}
        for name in MEASURES
        for row in ("multi_step", "one_step")
        if (value := result["values"][row].get(name)) is not None
    ]


def draw(axis: Any, result: Mapping[str, Any]) -> None:
    """Multi-step minus one step, every measure turned so that the right is better."""
    for place, (name, line) in enumerate(result["difference"].items()):
        sign = 1.0 if MEASURES[name].better == "higher" else -1.0
        ends = (sign * line["low"], sign * line["high"])
        axis.plot(ends, [place, place], color=FINDINGS[line["finding"]], linewidth=2.0)
        axis.plot(sign * line["value"], place, "o", color=FINDINGS[line["finding"]], markersize=4)
    axis.axvline(0.0, color="black", linewidth=0.5)
    axis.set_yticks(range(len(result["difference"])), list(result["difference"]))
    axis.invert_yaxis()
    axis.set_title("Multi-step against one step: right of 0 is better", fontsize=8)


def markdown(result: Mapping[str, Any]) -> str:
    values, rows = result["values"], [row for row in PREDICTORS if row in result["values"]]
    directions = {"higher": "more is better", "lower": "less is better", "one": "1 is best"}
    header = ["", *(PREDICTORS[row] for row in rows), "multi-step minus one step", "multi-step is"]
    lines = []
    for name, line in result["difference"].items():
        cells = [f"{values[row][name]:.3f}" if name in values[row] else "" for row in rows]
        title = f"`{name}`: {MEASURES[name].title}; {directions[MEASURES[name].better]}"
        interval = f"{line['value']:+.3f} ({line['low']:+.3f} to {line['high']:+.3f})"
        lines.append([title, *cells, interval, line["finding"]])
    text = (
        f"{result['windows']} held-out windows of {result['episodes']} episodes, frames after the observed one. "
        f"Intervals are bootstrapped over episodes and hold for all measures together at {result['level']:.0%}; for measures "
        "that should be 1 the difference is that of the distances from 1."
    )
    return "\n\n".join(["## Is there a gap to distil?", f"**{result['verdict']}**", text, markdown_table(header, lines)])
