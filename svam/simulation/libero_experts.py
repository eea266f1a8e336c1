"""Scripts that solve some of LIBERO's tasks from the simulator's state: proof that success can be reached through the adapter.

A script reads the task's goal, predicates `on` or `in`, and for each picks the thing up from above and puts it over its place.
Things that are taller than the hand is deep, that lie in a drawer, or whose place is under a roof are beyond it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

EXPERT_TASKS: Mapping[str, tuple[int, ...]] = {
    "libero_spatial": (0, 1, 3, 5, 6, 7),
    "libero_object": (0, 4, 5, 6, 7, 8, 9),
    "libero_goal": (1, 6),
    "libero_10": (0, 7),
}
"""Suite -> numbers of the tasks that a script solves from each of the first ten initial states."""
_OPEN, _CLOSED = -1.0, 1.0
_GAIN = 30.0
"""Action by metre of distance: the controller goes 5 cm a step at an action of 1."""
_GRASPS = {"akita_black_bowl": (0.0, 0.048, 0.02)}
"""Kind of thing -> where the fingers close, metres from its origin: a bowl's rim. Others are grasped in their middle."""
_CLEAR, _HIGH = np.array([0.0, 0.0, 0.12]), np.array([0.0, 0.0, 0.24])
"""Metres above a grasp: free of the thing, and of what stands around."""

Position = NDArray[np.float64]


class World(Protocol):
    """What a script sees of `svam.simulation.libero.LiberoEnvironment`."""

    task: str

    @property
    def simulation(self) -> Any: ...
    def hand(self) -> tuple[Position, NDArray[np.float64]]: ...


def _act(direction: Position, gripper: float) -> NDArray[np.float32]:
    return np.array([*np.clip(direction, -1.0, 1.0), 0.0, 0.0, 0.0, gripper], np.float32)


def _move(env: World, to: Position, gripper: float, near: float, steps: int = 100) -> Iterator[NDArray[np.float32]]:
    """Straight to `to`, until it is `near` metres or `steps` have passed."""
    for _ in range(steps):
        way = to - env.hand()[0]
        if float(np.linalg.norm(way)) < near:
            return
        yield _act(_GAIN * way, gripper)


def _hold(gripper: float, steps: int) -> Iterator[NDArray[np.float32]]:
    for _ in range(steps):
        yield _act(np.zeros(3), gripper)


def _place_of(simulation: Any, name: str) -> Position:
    """(3,) metres: of a thing, or of a region on or in one."""
    if name in simulation.obj_body_id:
        return np.array(simulation.sim.data.body_xpos[simulation.obj_body_id[name]])
    return np.array(simulation.sim.data.get_site_xpos(name))


def _pick_and_place(env: World, thing: str, place: str) -> Iterator[NDArray[np.float32]]:
    offset = np.array(_GRASPS.get(thing.rsplit("_", 1)[0], (0.0, 0.0, 0.0)))
    grasp = _place_of(env.simulation, thing) + offset
    yield from _move(env, grasp + _CLEAR, _OPEN, 0.008)
    yield from _move(env, grasp, _OPEN, 0.005, 60)
    yield from _hold(_CLOSED, 12)
    yield from _move(env, grasp + _HIGH, _CLOSED, 0.02)
    target = _place_of(env.simulation, place) + offset
    yield from _move(env, np.array([target[0], target[1], grasp[2] + _HIGH[2]]), _CLOSED, 0.015)
    yield from _move(env, target + 0.6 * _CLEAR, _CLOSED, 0.015, 60)
    yield from _hold(_OPEN, 10)
    yield from _move(env, target + _HIGH, _OPEN, 0.02, 40)


def expert_actions(env: World) -> Iterator[NDArray[np.float32]]:
    """Actions (7,) of the task's script from now on, each to be executed before the next is asked for; at the end, rest.

    Raises:
        ValueError: the task's goal has a predicate that no script knows.
    """
    for predicate, *what in env.simulation.parsed_problem["goal_state"]:
        if predicate not in ("on", "in"):
            raise ValueError(
                f"no script solves {env.task}: its goal has the predicate {predicate!r}, scripts know 'on' and 'in'"
            )
        yield from _pick_and_place(env, *what)
    while True:
        yield _act(np.zeros(3), _OPEN)
