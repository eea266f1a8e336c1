"""Statistics of actions and proprioception, and the way from physical units to the policy's and back.

Axes: A action dimensions, P proprioception dimensions.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from svam.contract import ContractError, Frozen


class VectorStatistics(Frozen):
    """Per-dimension statistics of a vector over the training episodes, in physical units. Each list has one entry
    per dimension; `q01` and `q99` are the 1 % and 99 % quantiles."""

    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]
    q01: list[float]
    q99: list[float]
    count: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _one_length(self) -> VectorStatistics:
        lengths = {name: len(getattr(self, name)) for name in ("mean", "std", "min", "max", "q01", "q99")}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"statistics of different lengths: {lengths}")
        return self


class ActionConvention(Frozen):
    """What the numbers of an action mean, and how they are normalised for learning."""

    kind: Literal["absolute", "relative"]
    dimensions: Annotated[int, Field(ge=1)]
    binary_dimensions: list[int] = Field(default=[])
    normalisation: Literal["minmax", "quantile", "meanstd"]

    @model_validator(mode="after")
    def _binary_dimensions_exist(self) -> ActionConvention:
        outside = [d for d in self.binary_dimensions if not 0 <= d < self.dimensions]
        if outside:
            raise ValueError(f"binary_dimensions {outside} are outside 0..{self.dimensions - 1}")
        return self


class Statistics(Frozen):
    """Normalisation statistics of a data set. Computed from training episodes only, carried in the policy's checkpoint."""

    convention: ActionConvention
    actions: VectorStatistics
    proprioception: VectorStatistics | None = None

    def _affine(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        """Centre, half-range and "never changes" per action dimension; a constant or binary dimension gets the scale 1.

        A dimension that moves in fewer than 1 % of the steps has equal quantiles: it falls back on its extremes.
        """
        s = self.actions
        low, high = np.asarray(s.min), np.asarray(s.max)
        constant = (high - low) / 2.0 < 1e-6
        if self.convention.normalisation == "meanstd":
            centre, scale = np.asarray(s.mean), np.asarray(s.std)
        else:
            if self.convention.normalisation == "quantile":
                q01, q99 = np.asarray(s.q01), np.asarray(s.q99)
                degenerate = (q99 - q01) / 2.0 < 1e-6
                low, high = np.where(degenerate, low, q01), np.where(degenerate, high, q99)
            centre, scale = (high + low) / 2.0, (high - low) / 2.0
        scale = np.where(constant, 1.0, scale)
        for d in self.convention.binary_dimensions:
            centre[d], scale[d], constant[d] = 0.0, 1.0, False
        return centre.astype(np.float32), scale.astype(np.float32), constant

    def normalise_actions(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        """Physical (..., A) float32 to the policy's units: about [-1, 1] (minmax, quantile) or unit variance (meanstd).

        Constant dimensions become 0.
        """
        centre, scale, _ = self._affine()
        return np.asarray((actions - centre) / scale, dtype=np.float32)

    def denormalise_actions(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        """Inverse of `normalise_actions`, (..., A) float32 in physical units.

        minmax and quantile clip to the range they map to [-1, 1], constant dimensions keep their one value, binary
        dimensions snap to -1 or 1.

        Raises:
            ContractError: a value is not finite (a snap or a clip would hide it).
        """
        centre, scale, constant = self._affine()
        values = np.asarray(actions, dtype=np.float32)
        if not np.isfinite(values).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise ContractError(f"normalised actions: {values[where]} at {where}, expected finite numbers")
        if self.convention.normalisation != "meanstd":
            values = np.clip(values, -1.0, 1.0)
        physical = np.where(constant, centre, values * scale + centre)
        for d in self.convention.binary_dimensions:
            physical[..., d] = np.where(physical[..., d] >= 0.0, 1.0, -1.0)
        return np.asarray(physical, dtype=np.float32)

    def normalise_proprioception(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """(..., P) to zero mean and unit variance; constant dimensions become 0."""
        if self.proprioception is None:
            raise ContractError("proprioception: the data set has none, but it was asked for")
        mean, std = np.asarray(self.proprioception.mean), np.asarray(self.proprioception.std)
        return np.asarray((values - mean) / np.where(std < 1e-6, 1.0, std), dtype=np.float32)
