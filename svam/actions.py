"""From a data set's actions to those that a policy learns, and back to what its robot takes.

The conversion does, in this order: `unwrapped`, (rows are resampled and shifted), `differences`, `two_values`, `limited`. A
policy answers in the same numbers as the store; `undone` leads back to the data set's own. A limit cannot be undone: it holds
for the policy too. Of a shift and of another rate there is nothing to undo: a policy's actions are those of its own steps.

A difference is the way from where the robot is, position p and rotation R, to where the action leads, p' and R'. In the fixed
frame, in which the set states both: p' - p, and R' R^-1, the turn about its axes. In the tool's: R^-1 (p' - p) and R^-1 R'.
A difference of rotations is written as the set writes rotations. Kinds (Difference.kind):

- linear: p' - p alone, of positions or joints.
- rotation_vector: axis times angle, radians. euler_xyz: radians about the fixed axes x, then y, then z (roll, pitch, yaw);
  euler_XYZ: about x, the turned y, the turned z. quaternion_xyzw, quaternion_wxyz: differences have w >= 0.
- rotation_6d: the first two rows of the matrix (Zhou et al. 2019, arXiv 1812.07035, who take columns; rows are what
  PyTorch3D and UMI store).

Axes: n time steps, K actions of a chunk, A action dimensions, P proprioception dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import ActionConvention, ContractError
from svam.conversion import ROTATION_COLUMNS, Difference, Interval
from svam.errors import ParamsError

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

OUTSIDE = 1e-3
"""By this share of its range an angle may leave it: sets round pi."""


def unwrapped(actions: NDArray[np.float32], angles: list[Interval]) -> NDArray[np.float32]:
    """(n, A) with angles that go on where they would jump from one end of their range to the other.

    Raises:
        ParamsError: an angle is outside the range that is stated for it.
    """
    result = actions.copy()
    for interval in angles:
        columns, turn = slice(*interval.columns), interval.high - interval.low
        values = actions[:, columns].astype(np.float64)
        outside = np.argwhere((values < interval.low - OUTSIDE * turn) | (values > interval.high + OUTSIDE * turn))
        if len(outside):
            row, column = outside[0]
            raise ParamsError(
                f"actions[{row}, {interval.columns[0] + column}] is {values[row, column]:g}, but convert.unwrap says that it "
                f"is an angle from {interval.low:g} to {interval.high:g}"
            )
        result[:, columns] = np.unwrap(values, period=turn, axis=0)
    return result


def differences(
    actions: NDArray[np.float32], proprioception: NDArray[np.float32], chosen: list[Difference]
) -> NDArray[np.float32]:
    """(n, A) with the chosen columns as the way to them from `proprioception` (n, P) of the same row.

    Raises:
        ContractError: a rotation is none, for example a quaternion of length 0.
    """
    result = actions.copy()
    for one in chosen:
        target, base = actions[:, slice(*one.columns)], proprioception[:, slice(*one.proprioception)]
        result[:, slice(*one.columns)] = _way(target.astype(np.float64), base.astype(np.float64), one)
    return result


def _way(target: NDArray[np.float64], base: NDArray[np.float64], one: Difference) -> NDArray[np.float64]:
    """(n, columns) from `base` to `target`, both (n, columns)."""
    if one.kind == "linear":
        return target - base
    split = target.shape[1] - ROTATION_COLUMNS[one.kind]  # 3 where a position stands before the rotation, or 0
    way, (here, there) = (
        target[:, :split] - base[:, :split],
        (_rotation(values[:, split:], one.kind) for values in (base, target)),
    )
    if one.frame == "fixed":
        return np.concatenate([way, _numbers(there * here.inv(), one.kind)], axis=1)
    way = here.inv().apply(way) if split else way
    return np.concatenate([way, _numbers(here.inv() * there, one.kind)], axis=1)


def _reached(ways: NDArray[np.float64], base: NDArray[np.float64], one: Difference) -> NDArray[np.float64]:
    """(K, columns) where K ways (K, columns), one after the other, lead from `base` (columns,)."""
    if one.kind == "linear":
        return base + np.cumsum(ways, axis=0)
    split = len(base) - ROTATION_COLUMNS[one.kind]
    place, pose = base[:split], _rotation(base[None, split:], one.kind)
    reached, turns = np.empty_like(ways), _rotation(ways[:, split:], one.kind)
    for k in range(len(ways)):
        if one.frame == "fixed":
            place, pose = place + ways[k, :split], turns[k] * pose
        else:
            place, pose = place + (pose.apply(ways[k, :split])[0] if split else 0.0), pose * turns[k]
        reached[k, :split], reached[k, split:] = place, _numbers(pose, one.kind)[0]
    return reached


def two_values(actions: NDArray[np.float32], dimensions: list[int], values: list[float]) -> NDArray[np.float32]:
    """(n, A) with -1 and 1 for the two values that some dimensions have.

    Raises:
        ParamsError: such a dimension has another value.
    """
    result, (low, high) = actions.copy(), np.asarray(values, dtype=np.float32)
    for d in dimensions:
        other = np.flatnonzero((actions[:, d] != low) & (actions[:, d] != high))
        if len(other):
            raise ParamsError(
                f"actions[{other[0]}, {d}] is {actions[other[0], d]:g}, expected {low:g} or {high:g}, as "
                f"convert.binary_dimensions lists {d}; set convert.binary_values to its two values, or leave it out there"
            )
        result[:, d] = np.where(actions[:, d] == low, -1.0, 1.0)
    return result


def limited(actions: NDArray[np.float32], limits: list[Interval]) -> NDArray[np.float32]:
    """(..., A) with the columns of each limit cut to its range."""
    result = actions.copy()
    for limit in limits:
        columns = slice(*limit.columns)
        result[..., columns] = np.clip(actions[..., columns], np.float32(limit.low), np.float32(limit.high))
    return result


def undone(
    convention: ActionConvention, actions: NDArray[np.float32], proprioception: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """A chunk (K, A) of physical actions as the store has them, in the data set's own numbers, (K, A) float32.

    Differences are added up, from where the robot is: `proprioception` (P,), as the set records it. The first action of a chunk
    is exact. From the second on each is the way from the action before it, which is exact where actions are the robot's next
    poses, and a guess where they are commands that it follows late. Angles return to the range that the set has.

    Raises:
        ContractError: there are differences and no proprioception, or a rotation is none.
    """
    result = limited(actions, convention.limits)
    if convention.binary_values is not None:
        low, high = convention.binary_values
        for d in convention.binary_dimensions:
            result[:, d] = np.where(actions[:, d] < 0, low, high)
    for one in convention.differences:
        if proprioception is None:
            raise ContractError("observation: no proprioception, from which the actions of this policy are differences")
        ways, base = result[:, slice(*one.columns)], proprioception[slice(*one.proprioception)]
        result[:, slice(*one.columns)] = _reached(ways.astype(np.float64), base.astype(np.float64), one)
    for interval in convention.unwrap:
        columns, turn = slice(*interval.columns), interval.high - interval.low
        values = result[:, columns]
        wrapped = interval.low + np.mod(values.astype(np.float64) - interval.low, turn)
        result[:, columns] = np.where((values >= interval.low) & (values <= interval.high), values, wrapped)
    return result


def _rotation(values: NDArray[np.float64], kind: str) -> Rotation:
    """n rotations from their (n, columns) numbers."""
    from scipy.spatial.transform import Rotation

    try:
        if kind == "rotation_vector":
            return Rotation.from_rotvec(values)
        if kind.startswith("euler_"):
            return Rotation.from_euler(kind.removeprefix("euler_"), values)
        if kind.startswith("quaternion_"):
            return Rotation.from_quat(values, scalar_first=kind == "quaternion_wxyz")
        x = _unit(values[:, :3])
        y = _unit(values[:, 3:] - (x * values[:, 3:]).sum(axis=1, keepdims=True) * x)
        return Rotation.from_matrix(np.stack([x, y, np.cross(x, y)], axis=1))
    except ValueError as error:
        raise ContractError(f"numbers that should be a {kind} are no rotation: {error}") from None


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if (lengths < 1e-9).any():
        raise ValueError("a row has no length, or both have one direction")
    return np.asarray(vectors / lengths)


def _numbers(rotation: Rotation, kind: str) -> NDArray[np.float64]:
    """The inverse of `_rotation`."""
    numbers: Any
    if kind == "rotation_vector":
        numbers = rotation.as_rotvec()
    elif kind.startswith("euler_"):
        numbers = rotation.as_euler(kind.removeprefix("euler_"))
    elif kind.startswith("quaternion_"):
        numbers = rotation.as_quat(canonical=True, scalar_first=kind == "quaternion_wxyz")
    else:
        numbers = rotation.as_matrix()[:, :2].reshape(-1, 6)
    return np.asarray(numbers, dtype=np.float64)
