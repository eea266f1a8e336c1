"""How good predicted teacher features are. Plain cosine flatters every baseline, since most of a scene stays where it is:
the headline looks at what is left after the training mean of each position, on patches that moved.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import ContractError

MOVED_LEVELS = 8.0
"""A patch has moved when its pixels differ from the same patch of the clip's first frame by more than this many of the 255
grey levels, on average over its pixels and colours: about what a dark edge crossing a tenth of the patch changes."""


def moved_patches(frames: NDArray[np.uint8], grid: int, views: int = 1) -> NDArray[np.bool_]:
    """Which patches of a clip (B, T, H, W, 3), or of `views` pictures below one another, moved against its own first frame:
    (B, T, views * grid, grid) bool.

    The definition looks at pixels of the frames that the targets are computed on, so that all teachers share it.

    Raises:
        ValueError: H or W is smaller than the grid.
    """
    height, width = frames.shape[2:4]
    if height < views * grid or width < grid:
        raise ContractError(f"frames of {height} x {width} pixels cannot be cut into {grid} x {grid} patches")
    change = np.abs(frames.astype(np.int16) - frames[:, :1].astype(np.int16)).mean(axis=-1, dtype=np.float32)
    rows, columns = np.arange(views * grid) * height // (views * grid), np.arange(grid) * width // grid
    sums = np.add.reduceat(np.add.reduceat(change, rows, axis=2), columns, axis=3)
    pixels = np.outer(np.diff(np.append(rows, height)), np.diff(np.append(columns, width)))
    return np.asarray(sums / pixels > MOVED_LEVELS)


def centred_cosine(
    prediction: NDArray[np.float32], target: NDArray[np.float32], centre: NDArray[np.float32], patches: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Cosine of prediction and target (B, T, h, w, C) after subtracting `centre` (h, w, C), for each of the `patches`
    (B, T, h, w) that are true."""
    p, t = (prediction - centre)[patches].astype(np.float64), (target - centre)[patches].astype(np.float64)
    norms = np.linalg.norm(p, axis=-1) * np.linalg.norm(t, axis=-1)
    return np.asarray((p * t).sum(axis=-1) / np.maximum(norms, 1e-12))


class ChannelMoments:
    """Mean and deviation per channel of values (..., C) that come in parts."""

    def __init__(self, channels: int) -> None:
        self.count, self.sums = 0, np.zeros((2, channels))

    def add(self, values: NDArray[Any]) -> None:
        """Add values (..., C) of any float type."""
        flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
        self.sums += np.stack([flat.sum(axis=0), np.square(flat).sum(axis=0)])
        self.count += len(flat)

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(C,) mean and (C,) deviation; a constant channel gets deviation 1."""
        mean = self.sums[0] / self.count
        std = np.sqrt(np.maximum(self.sums[1] / self.count - mean**2, 0.0))
        return mean.astype(np.float32), np.where(std < 1e-6, 1.0, std).astype(np.float32)


class ForesightScore:
    """Running sums of one predictor's errors, batch by batch.

    Args:
        centre: (h, w, C) the training mean of the targets at each position, which the cosine is taken around.
        scale: (C,) the training deviation of the targets per channel, the unit of the squared error.
    """

    def __init__(self, centre: NDArray[np.float32], scale: NDArray[np.float32]) -> None:
        self.centre, self.scale = centre, scale
        self.error = self.error_moved = self.cosine_moved = 0.0
        self.patches = self.moved = 0

    def add(self, prediction: NDArray[np.float32], target: NDArray[np.float32], moved: NDArray[np.bool_]) -> None:
        """Add a batch: both (B, T, h, w, C) in the teacher's units, `moved` (B, T, h, w). Leave the observed frame out."""
        errors = np.square((prediction - target) / self.scale).mean(axis=-1, dtype=np.float64)
        self.error += float(errors.sum())
        self.patches += errors.size
        self.moved += int(moved.sum())
        self.error_moved += float(errors[moved].sum())
        self.cosine_moved += float(centred_cosine(prediction, target, self.centre, moved).sum())

    def result(self, repeat: ForesightScore) -> dict[str, float]:
        """`mse` (in units of the targets' variance per channel), `mse_moved`, `cosine_moved` (centred), and the explained
        shares 1 - MSE / MSE(repeat) against `repeat`, "repeat the reference": `explained`, `explained_moved`.

        Without any moved patch the values on moved patches are 0.
        """
        moved = max(1, self.moved)
        return {
            "mse": self.error / max(1, self.patches),
            "mse_moved": self.error_moved / moved,
            "cosine_moved": self.cosine_moved / moved,
            "explained": 1.0 - self.error / max(repeat.error, 1e-12),
            "explained_moved": 1.0 - self.error_moved / max(repeat.error_moved, 1e-12) if self.moved else 0.0,
        }
