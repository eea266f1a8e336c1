"""What a conversion makes of actions, against hand-made numbers, and the way back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.spatial.transform import Rotation

from svam.actions import differences, limited, two_values, undone, unwrapped
from svam.contract import ActionConvention
from svam.conversion import ROTATION_COLUMNS, Difference, Interval
from tests.sources.common import refused

H = np.sqrt(0.5)
ROUND_X = {
    "rotation_vector": [np.pi / 2, 0, 0], "euler_xyz": [np.pi / 2, 0, 0], "quaternion_xyzw": [H, 0, 0, H],
    "quaternion_wxyz": [H, H, 0, 0], "rotation_6d": [1, 0, 0, 0, 0, -1],
}  # fmt: skip
"""A quarter turn about x, by hand."""
THEN_Z = {
    "rotation_vector": [2 * np.pi / 3 / np.sqrt(3)] * 3, "euler_xyz": [np.pi / 2, 0, np.pi / 2],
    "quaternion_xyzw": [0.5] * 4, "quaternion_wxyz": [0.5] * 4, "rotation_6d": [0, 0, 1, 1, 0, 0],
}  # fmt: skip
"""That, and then a quarter turn about the fixed z: x goes to y, y to z, z to x."""
ROUND_Z = {
    "rotation_vector": [0, 0, np.pi / 2], "euler_xyz": [0, 0, np.pi / 2], "quaternion_xyzw": [0, 0, H, H],
    "quaternion_wxyz": [H, 0, 0, H], "rotation_6d": [0, -1, 0, 1, 0, 0],
}  # fmt: skip
ROUND_Y = {
    "rotation_vector": [0, np.pi / 2, 0], "euler_xyz": [0, np.pi / 2, 0], "quaternion_xyzw": [0, H, 0, H],
    "quaternion_wxyz": [H, 0, H, 0], "rotation_6d": [0, 0, 1, 0, 1, 0],
}  # fmt: skip
"""The fixed z, as the tool sees it that was turned about x."""


def float32(*rows: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.asarray(rows, dtype=np.float32)


def convention(dimensions: int, **values: Any) -> ActionConvention:
    return ActionConvention(dimensions=dimensions, normalisation="minmax", **values)


def one(width: int, kind: str, frame: str = "fixed") -> Difference:
    return Difference.model_validate({"columns": [1, 1 + width], "proprioception": [0, width], "kind": kind, "frame": frame})


def test_linear_differences_by_hand() -> None:
    actions, state = float32([9, 1, 2], [8, 3, 5]), float32([0.5, 1], [1, 1])
    assert (differences(actions, state, [one(2, "linear")]) == float32([9, 0.5, 1], [8, 2, 4])).all()
    chunk = undone(convention(3, differences=[one(2, "linear")]), float32([9, 0.5, 1], [8, 2, 4]), float32([0.5, 1])[0])
    assert (chunk == float32([9, 1, 2], [8, 3, 6])).all()  # the second is the way from the first


@pytest.mark.parametrize("kind", ROUND_X)
def test_differences_of_poses_by_hand(kind: str) -> None:
    """From a tool at (1, 2, 3), turned about x, to one further along y, and then turned about z."""
    state, actions = float32([1, 2, 3, *ROUND_X[kind]]), float32([7, 1, 4, 3, *THEN_Z[kind]])
    width = 3 + ROTATION_COLUMNS[kind]
    for frame, way in (("fixed", [0, 2, 0, *ROUND_Z[kind]]), ("tool", [0, 0, -2, *ROUND_Y[kind]])):
        if (kind, frame) == ("euler_xyz", "tool"):
            continue  # a quarter turn about y has no one way to be written
        stored = differences(actions, state, [one(width, kind, frame)])
        np.testing.assert_allclose(stored, float32([7, *way]), atol=1e-6)
        back = undone(convention(width + 1, differences=[one(width, kind, frame)]), stored, state[0])
        np.testing.assert_allclose(back, actions, atol=1e-6)


@pytest.mark.parametrize("frame", ["fixed", "tool"])
@pytest.mark.parametrize("kind", ROTATION_COLUMNS)
def test_a_chunk_of_next_poses_comes_back(kind: str, frame: str) -> None:
    """Actions that are the robot's next poses: all of a chunk is exact, with a position before the rotation and without."""
    rng, n = np.random.default_rng(0), 6
    rotation = Rotation.random(n + 1, rng=rng)
    numbers = {
        "rotation_vector": rotation.as_rotvec(), "euler_xyz": rotation.as_euler("xyz"), "euler_XYZ": rotation.as_euler("XYZ"),
        "quaternion_xyzw": rotation.as_quat(canonical=True),
        "quaternion_wxyz": rotation.as_quat(canonical=True, scalar_first=True),
        "rotation_6d": rotation.as_matrix()[:, :2].reshape(-1, 6),
    }[kind]  # fmt: skip
    for poses in (float32(*np.concatenate([rng.normal(size=(n + 1, 3)), numbers], axis=1)), float32(*numbers)):
        chosen = [one(poses.shape[1], kind, frame)]
        actions = np.concatenate([np.ones((n, 1), np.float32), poses[1:]], axis=1)
        stored = differences(actions, poses[:-1], chosen)
        assert np.abs(stored - actions).max() > 0.1
        back = undone(convention(actions.shape[1], differences=chosen), stored, poses[0])
        np.testing.assert_allclose(back, actions, atol=2e-5)


def test_angles_go_on_by_hand() -> None:
    angle = Interval(columns=[1, 2], low=-180, high=180)
    actions = float32([0, 170], [170, -170], [-170, -150], [0, 170])
    assert (unwrapped(actions, [angle]) == float32([0, 170], [170, 190], [-170, 210], [0, 170])).all()
    assert (undone(convention(2, unwrap=[angle]), unwrapped(actions, [angle]), None) == actions).all()
    with refused(r"actions\[1, 1\] is 200, but convert.unwrap says that it is an angle from -180 to 180"):
        unwrapped(float32([0, 0], [0, 200]), [angle])


def test_two_values_by_hand() -> None:
    actions = float32([0.5, 0], [0.5, 0.04])
    stored = two_values(actions, [1], [0.04, 0.0])
    assert (stored == float32([0.5, 1], [0.5, -1])).all()
    assert (undone(convention(2, binary_dimensions=[1], binary_values=[0.04, 0.0]), stored, None) == actions).all()
    with refused(r"actions\[1, 1\] is 0.04, expected 0 or 1, as convert.binary_dimensions lists 1"):
        two_values(actions, [1], [0, 1])


def test_limits_hold_for_the_policy_too() -> None:
    limit = Interval(columns=[0, 2], low=-1, high=0.5)
    assert (limited(float32([-2, 2, 2]), [limit]) == float32([-1, 0.5, 2])).all()
    assert (undone(convention(3, limits=[limit]), float32([-2, 2, 2]), None) == float32([-1, 0.5, 2])).all()


def test_nothing_is_undone_where_nothing_was_done() -> None:
    actions = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    assert undone(convention(3, binary_dimensions=[2]), actions, None).tobytes() == actions.tobytes()
    assert convention(3).model_dump() == {"dimensions": 3, "binary_dimensions": [], "normalisation": "minmax"}


def test_what_is_no_rotation() -> None:
    with refused("no proprioception, from which the actions of this policy are differences"):
        undone(convention(3, differences=[one(2, "linear")]), float32([0, 0, 0]), None)
    for kind in ("quaternion_xyzw", "rotation_6d"):
        width = ROTATION_COLUMNS[kind]
        with refused(f"numbers that should be a {kind} are no rotation"):
            differences(np.zeros((2, 1 + width), np.float32), np.zeros((2, width), np.float32), [one(width, kind)])


@pytest.mark.parametrize("width, kind, frame, message", [
    (4, "euler_xyz", "fixed", "euler_xyz needs 3, or 6 with a position before it, and as many columns"),
    (3, "linear", "tool", "name position and rotation together"),
])  # fmt: skip
def test_a_wrong_difference(width: int, kind: str, frame: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        one(width, kind, frame)
