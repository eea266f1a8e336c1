"""From physical units to the policy's and back. A change here retrains the policy and nothing before it, hence its own module.

Axes: A action dimensions, P proprioception dimensions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from svam.contract import ContractError, Statistics


def _affine(statistics: Statistics) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Centre, half-range and "never changes" per action dimension; a constant or binary dimension gets the scale 1.

    A dimension that moves in fewer than 1 % of the steps has equal quantiles: it falls back on its extremes.
    """
    s = statistics.actions
    low, high = np.asarray(s.min), np.asarray(s.max)
    constant = (high - low) / 2.0 < 1e-6
    if statistics.convention.normalisation == "meanstd":
        centre, scale = np.asarray(s.mean), np.asarray(s.std)
    else:
        if statistics.convention.normalisation == "quantile":
            q01, q99 = np.asarray(s.q01), np.asarray(s.q99)
            degenerate = (q99 - q01) / 2.0 < 1e-6
            low, high = np.where(degenerate, low, q01), np.where(degenerate, high, q99)
        centre, scale = (high + low) / 2.0, (high - low) / 2.0
    scale = np.where(constant, 1.0, scale)
    for d in statistics.convention.binary_dimensions:
        centre[d], scale[d], constant[d] = 0.0, 1.0, False
    return centre.astype(np.float32), scale.astype(np.float32), constant


def normalise_actions(statistics: Statistics, actions: NDArray[np.float32]) -> NDArray[np.float32]:
    """Physical (..., A) float32 to the policy's units: about [-1, 1] (minmax, quantile) or unit variance (meanstd).

    Constant dimensions become 0.
    """
    centre, scale, _ = _affine(statistics)
    return np.asarray((actions - centre) / scale, dtype=np.float32)


def denormalise_actions(statistics: Statistics, actions: NDArray[np.float32]) -> NDArray[np.float32]:
    """Inverse of `normalise_actions`, (..., A) float32 in physical units.

    minmax and quantile clip to the range they map to [-1, 1], constant dimensions keep their one value, binary
    dimensions snap to -1 or 1.

    Raises:
        ContractError: a value is not finite (a snap or a clip would hide it).
    """
    centre, scale, constant = _affine(statistics)
    values = np.asarray(actions, dtype=np.float32)
    if not np.isfinite(values).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise ContractError(f"normalised actions: {values[where]} at {where}, expected finite numbers")
    if statistics.convention.normalisation != "meanstd":
        values = np.clip(values, -1.0, 1.0)
    physical = np.where(constant, centre, values * scale + centre)
    for d in statistics.convention.binary_dimensions:
        physical[..., d] = np.where(physical[..., d] >= 0.0, 1.0, -1.0)
    return np.asarray(physical, dtype=np.float32)


def normalise_proprioception(statistics: Statistics, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(..., P) to zero mean and unit variance; constant dimensions become 0."""
    if statistics.proprioception is None:
        raise ContractError("proprioception: the data set has none, but it was asked for")
    mean, std = np.asarray(statistics.proprioception.mean), np.asarray(statistics.proprioception.std)
    return np.asarray((values - mean) / np.where(std < 1e-6, 1.0, std), dtype=np.float32)
