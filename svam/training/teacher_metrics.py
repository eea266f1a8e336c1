"""How good a dense prediction is: depth error and intersection over union. Pure functions on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import SEGMENTATION_CLASSES
from svam.models.teachers import FARTHEST


def valid_depth(depth: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a depth map (metres) measures the scene: finite, positive (sensors mark holes by 0 or NaN), below FARTHEST."""
    return np.asarray(np.isfinite(depth) & (depth > 0) & (depth < FARTHEST))


def depth_error(predicted: NDArray[Any], truth: NDArray[Any], std: float) -> dict[str, float]:
    """Depth error over the pixels whose truth is valid.

    Args:
        predicted, truth: (m, H, W) metres. std: metres, the depth's standard deviation over the training annotations.

    Returns:
        `rmse_m`, root of the mean square, in metres; `rmse_std`, the same in units of `std`; `abs_rel`, the mean of the
        absolute error over the true depth, as depth benchmarks report it.

    Raises:
        ValueError: different shapes, no valid pixel, or a non-positive `std`.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"depth_error: predicted {predicted.shape} and true depth {truth.shape} differ in shape")
    valid = valid_depth(truth)
    if not valid.any() or std <= 0:
        raise ValueError(f"depth_error: {int(valid.sum())} valid pixels, std {std}; both must be positive")
    difference = predicted.astype(np.float64)[valid] - truth.astype(np.float64)[valid]
    rmse = float(np.sqrt(np.mean(difference**2)))
    relative = float(np.mean(np.abs(difference) / truth.astype(np.float64)[valid]))
    return {"rmse_m": rmse, "rmse_std": rmse / std, "abs_rel": relative}


def annotation_error(objective: str, predicted: NDArray[Any], truth: NDArray[Any], std: float) -> dict[str, float]:
    """What `depth_error` or `intersection_over_union` says of annotations (m, H, W) that a teacher gives; `std` of depth."""
    if objective == "depth":
        return depth_error(predicted, truth, std)
    return intersection_over_union(confusion(predicted, truth, len(SEGMENTATION_CLASSES)), SEGMENTATION_CLASSES)


def confusion(predicted: NDArray[Any], truth: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """(classes, classes) int64 pixel counts: row = true class, column = predicted one. Sums over batches add up."""
    if predicted.shape != truth.shape:
        raise ValueError(f"confusion: predicted {predicted.shape} and true labels {truth.shape} differ in shape")
    pairs = truth.astype(np.int64).ravel() * classes + predicted.astype(np.int64).ravel()
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def intersection_over_union(counts: NDArray[np.int64], names: Sequence[str]) -> dict[str, float]:
    """IoU per class that occurs in truth or prediction, by name, their `mean`, and `accuracy`, the share of right pixels."""
    both = np.diag(counts).astype(np.float64)
    either = counts.sum(axis=0) + counts.sum(axis=1) - np.diag(counts)
    result = {name: float(both[k] / either[k]) for k, name in enumerate(names) if either[k] > 0}
    result["mean"] = float(np.mean(list(result.values())))
    result["accuracy"] = float(both.sum() / max(1, counts.sum()))
    return result
