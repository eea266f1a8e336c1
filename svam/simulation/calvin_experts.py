"""Scripted experts for CALVIN: the LED and the light bulb, the drawer, the slider, and blocks that are pushed or lifted.

An expert reads the simulator's state and not its pictures: when its subtask begins it lays its way by points in the world,
from the places of the blocks and of the table's moving parts, and follows it in relative actions. It can start wherever another
subtask ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from svam.errors import ParamsError, did_you_mean

METRES, RADIANS = 0.02, 0.05
"""What an action of 1 asks for in a step."""

_BLOCKS = ("red_block", "blue_block", "pink_block")
EXPERT_TASKS = (
    "turn_on_lightbulb", "turn_off_lightbulb", "turn_on_led", "turn_off_led", "open_drawer", "close_drawer",
    "move_slider_left", "move_slider_right", *(f"push_{block}_{side}" for block, side in product(_BLOCKS, ("left", "right"))),
    *(f"lift_{block}_table" for block in _BLOCKS),
)  # fmt: skip
"""What these experts can do."""

_OPEN, _CLOSED = 1.0, -1.0
_SPEED = 0.75
"""Of the largest action: the hand follows without lagging far behind what it is asked for."""
_ARRIVED, _ALIGNED, _PATIENCE = 0.012, 0.1, 10
"""A point is reached this near (metres, radians), or this many steps after it was asked for: a button is to be in the way."""
_HIGH, _FREE = 0.57, -0.08
"""Metres: above everything on the table (z), and before all that sticks out of the cabinet (y)."""
_REST_YAW = 1.5
"""Of the hand at the official start, radians: its fingers close along x."""
_SCALE = 0.8
_POINTS = {
    "button": ("button_link", (0.0, 0.03, 0.0)),
    "switch": ("switch_link", (0.0, 0.0725, -0.01)),
    "slider": ("slide_link", (0.175, 0.0, 0.0825)),
    "drawer": ("drawer_link", (0.0, 0.05, 0.3075)),
}
"""Middle of the part that the hand moves: a link of the table, and the place in its frame in units of its mesh, which the
simulator scales by `_SCALE`."""
_TILT = -0.6
"""Pitch of the hand in radians: fingers forward, since the switch is beyond the upright hand's reach when the bulb is on."""
_UP_SLOPE = np.array([0.0, 0.5, 0.866])
"""How the switch slides when it turns the light bulb on: the cabinet's front leans back."""


class World(Protocol):
    """What an expert sees of `svam.simulation.calvin.CalvinEnvironment`."""

    simulator: Any

    def robot_obs(self) -> NDArray[np.float64]: ...
    def scene_obs(self) -> NDArray[np.float64]: ...


@dataclass(frozen=True)
class _Point:
    """Where to go next, (3,) metres; how the gripper is on the way; the hand's yaw and pitch there, radians; steps to stay."""

    place: NDArray[np.float64]
    gripper: float = _CLOSED
    yaw: float = _REST_YAW
    pitch: float = 0.0
    stay: int = 0

    def reached(self, pose: NDArray[np.float64]) -> bool:
        """Whether this pose, (6,) metres and Euler angles, is the point's."""
        turn = np.abs(np.array([self.pitch, self.yaw]) - pose[4:6])
        return float(np.linalg.norm(self.place - pose[:3])) < _ARRIVED and bool((turn < _ALIGNED).all())


def _by(place: NDArray[np.float64], x: float, y: float, z: float) -> NDArray[np.float64]:
    """The place so many metres further."""
    further: NDArray[np.float64] = place + np.array([x, y, z])
    return further


def _part(env: World, name: str) -> NDArray[np.float64]:
    """(3,) metres, where a part of the table is now."""
    simulator, (link, offset) = env.simulator, _POINTS[name]
    table = simulator.scene.fixed_objects[0]
    place, turn = simulator.p.getLinkState(table.uid, table.info_dict["links"][link], physicsClientId=simulator.cid)[4:6]
    scaled = [_SCALE * value for value in offset]
    return np.array(simulator.p.multiplyTransforms(place, turn, scaled, (0, 0, 0, 1))[0])


def _block_poses(env: World) -> dict[str, NDArray[np.float64]]:
    """Block -> (6,) metres and Euler angles."""
    return dict(zip(_BLOCKS, env.scene_obs()[6:].reshape(len(_BLOCKS), 6), strict=True))


def _grasp_yaw(pose: NDArray[np.float64], others: Sequence[NDArray[np.float64]], turned: bool) -> float:
    """The hand's yaw to take the block at `pose` across its narrow side; or, where that side is blocked by one of the `others`
    and the block may be taken `turned`, along it."""
    straight = _REST_YAW + pose[5] % np.pi - np.pi / 2

    def clearance(yaw: float) -> float:
        finger = 0.055 * np.array([np.sin(yaw), -np.cos(yaw)])
        return min(float(np.linalg.norm(pose[:2] + side * finger - other[:2])) for side in (-1, 1) for other in others)

    free = not turned or clearance(straight) > 0.045
    return float(straight if free else max(straight, straight - np.pi / 2, key=clearance))


def _way(env: World, subtask: str) -> list[_Point]:
    """The points after the hand is free of where it was."""
    names = subtask.split("_")
    if "led" in names:
        button = _part(env, "button")
        return [_Point(_by(button, 0, 0, 0.06)), _Point(_by(button, 0, 0, -0.03)), _Point(_by(button, 0, 0, 0.06))]
    if "lightbulb" in names:
        switch, side = _part(env, "switch"), 1 if "on" in names else -1
        before = switch - side * 0.05 * _UP_SLOPE
        points = (_by(before, 0, -0.13, 0), before, before + side * 0.15 * _UP_SLOPE)
        return [_Point(point, pitch=_TILT if side < 0 else 0.0) for point in points]
    if "slider" in names:
        handle, side = _part(env, "slider"), -1 if "left" in names else 1
        before = _by(handle, -side * 0.06, -0.01, -0.03)
        return [_Point(_by(before, 0, -0.06, 0.03)), _Point(before), _Point(_by(before, side * 0.3, 0, 0))]
    if "drawer" in names:
        handle = _part(env, "drawer")
        if "open" in names:
            slot = _by(handle, 0, 0.032, 0)
            return [_Point(_by(slot, 0, 0, 0.12)), _Point(slot), _Point(_by(slot, 0, -0.24, 0))]
        front = _by(handle, 0, -0.05, 0)
        return [_Point(_by(front, 0, 0, 0.12)), _Point(front), _Point(_by(front, 0, 0.24, 0))]
    name, poses = "_".join(names[1:3]), _block_poses(env)
    block = poses[name][:3]
    if "lift" in names:
        others = [_part(env, "button"), *(pose[:3] for other, pose in poses.items() if other != name)]
        yaw = _grasp_yaw(poses[name], others, turned=name != "pink_block")
        return [
            _Point(_by(block, 0, 0, 0.08), _OPEN, yaw), _Point(block, _OPEN, yaw), _Point(block, _CLOSED, yaw, stay=8),
            _Point(_by(block, 0, 0, 0.12), _CLOSED, yaw),
        ]  # fmt: skip
    side = -1 if "left" in names else 1
    before = _by(block, -side * 0.08, 0, 0)
    return [_Point(_by(before, 0, 0, 0.08)), _Point(before), _Point(_by(before, side * 0.22, 0, 0))]


class Expert:
    """The scripted expert of `env` for a subtask that begins now.

    Raises:
        ParamsError: there is no expert for this subtask.
    """

    def __init__(self, env: World, subtask: str) -> None:
        if subtask not in EXPERT_TASKS:
            raise ParamsError(f"CALVIN's subtask {subtask!r} has no scripted expert{did_you_mean(subtask, EXPERT_TASKS)}")
        self._env, self._asked = env, 0
        self._points = [*self._leave(), *_way(env, subtask)]

    def _leave(self) -> list[_Point]:
        """Up and out of whatever the hand is in or behind, where it is low or would go sideways through something."""
        x, y, z = self._env.robot_obs()[:3]
        if y < _FREE and z > _HIGH - 0.05:
            return []
        return [_Point(np.array([x, min(y, _FREE), height])) for height in (z, _HIGH)]

    def action(self) -> NDArray[np.float32]:
        """(7,) float32 relative action, in [-1, 1]: what to do now. To be called once at each step."""
        robot = self._env.simulator.robot  # adds actions up to a pose that it then makes for
        asked = self._points[0].reached(np.append(robot.target_pos, robot.target_orn))
        there = self._points[0].reached(self._env.robot_obs()[:6])
        self._asked += asked
        if len(self._points) > 1 and self._asked > self._points[0].stay and (there or self._asked > _PATIENCE):
            self._points.pop(0)
            self._asked = 0
        point = self._points[0]
        way = (point.place - robot.target_pos) / METRES
        turn = (np.array([robot.target_orn[0], point.pitch, point.yaw]) - robot.target_orn) / RADIANS
        action = np.zeros(7, np.float32)
        action[:3] = way * min(1.0, _SPEED / max(float(np.abs(way).max()), 1e-9))  # straight
        action[3:6], action[6] = np.clip(turn, -_SPEED, _SPEED), point.gripper
        return action
