"""Demonstrations by MetaWorld's scripted experts: one attempt, in one of several styles, clean or disturbed, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.errors import ParamsError
from svam.params import Collect, Style
from svam.seeds import generator, seed_of
from svam.simulation.metaworld import ACTION_DIMENSIONS, MAX_STEPS, TaskEnvironment

BURST_CHANCE, BURST_STEPS = 0.08, 6
"""A disturbance starts with this chance at each quiet step and pushes one way for that many steps (at full action 6 cm),
so that the episode holds errors worth correcting and, between them, the expert's undisturbed corrections."""

DETOUR_METRES, ARRIVED_METRES, DETOUR_STEPS = 0.15, 0.04, 60
"""A detour goes this far off the middle of the way from hand to object, and ends this near to its turning point, or after that
many steps: a disturbance may hold it up, and at full action the hand moves 1 cm a step."""
_GAIN = 10.0


@dataclass(frozen=True)
class Demonstration:
    """A successful episode: `arrays` as documented in `svam.simulation.collect`, with the frames as `frames_<camera>`; its
    attempt number, whether it was disturbed, its style."""

    arrays: dict[str, NDArray[Any]]
    attempt: int
    noisy: bool
    style: Style = "direct"


def turning_point(style: Style, state: NDArray[np.float32]) -> NDArray[np.float32]:
    """(3,) metres, where a detour turns towards the object, for the (39,) state at reset.

    Beside the middle of the way for `left` and `right` (as the robot sees it), at the hand's height; above it for `high`.
    """
    hand, target = state[:3], state[4:7]
    way = target[:2] - hand[:2]
    forward = way / max(float(np.linalg.norm(way)), 1e-6)
    aside = {"left": (-forward[1], forward[0]), "right": (forward[1], -forward[0])}.get(style, (0.0, 0.0))
    x, y = hand[:2] + way / 2 + DETOUR_METRES * np.array(aside)
    return np.array([x, y, hand[2] + (DETOUR_METRES if style == "high" else 0.0)], np.float32)


class Expert:
    """The scripted expert of `env`, which was just reset, in one style: by way of a detour, unless that is `direct`."""

    def __init__(self, env: TaskEnvironment, style: Style) -> None:
        self._env = env
        self._steps_left = 0 if style == "direct" else DETOUR_STEPS
        self._turn = turning_point(style, env.state())

    def action(self) -> NDArray[np.float32]:
        """(4,) float32 in [-1, 1]: what this expert does now. To be called once at each step."""
        action = self._env.expert_action()
        way = self._turn - self._env.state()[:3]
        if self._steps_left and float(np.linalg.norm(way)) < ARRIVED_METRES:
            self._steps_left = 0
        if self._steps_left:
            self._steps_left -= 1
            action[:3] = np.clip(_GAIN * way, -1.0, 1.0)
        return action


def style_of(styles: Sequence[Style], seed: int, task: str, index: int) -> Style:
    """The style of demonstration `index`: each run of as many demonstrations as there are styles has every style once, in an
    order that `seed` and `task` draw."""
    turn, place = divmod(index, len(styles))
    return styles[int(generator(seed, "collect-style", task, turn).permutation(len(styles))[place])]


def disturbances(random: np.random.Generator, steps: int, scale: float) -> NDArray[np.float32]:
    """(steps, 4) float32 to add to the expert's actions: bursts of one Gaussian displacement each, zero in between.

    `scale` is the standard deviation in action units. The gripper is left alone: a dropped object is mostly past recovery.
    """
    noise = np.zeros((steps, ACTION_DIMENSIONS), np.float32)
    step = 0
    while step < steps:
        if random.random() < BURST_CHANCE:
            noise[step : step + BURST_STEPS, :3] = random.normal(0.0, scale, 3)
            step += BURST_STEPS
        step += 1
    return noise


def first_success(
    env: TaskEnvironment, seed: int, noise: NDArray[np.float32], max_steps: int, style: Style = "direct"
) -> int | None:
    """The step at which the expert first succeeds, or None where it does not within `max_steps`. Nothing is rendered."""
    env.reset(seed)
    expert = Expert(env, style)
    for step in range(max_steps):
        if env.step(expert.action() + noise[step]):
            return step
    return None


def record(
    env: TaskEnvironment, seed: int, noise: NDArray[np.float32], steps: int, annotate_every: int, style: Style = "direct"
) -> dict[str, NDArray[Any]]:
    """Run the expert for `steps` steps and record everything. Frame t is what is seen before action t."""
    env.reset(seed)
    expert = Expert(env, style)
    rows: dict[str, list[NDArray[Any]]] = {}
    goal, draw, success = env.goal, env.draw, np.zeros(steps, bool)
    for t in range(steps):
        step: dict[str, NDArray[Any]] = {f"frames_{camera}": frame for camera, frame in env.observe().items()}
        if t % annotate_every == 0:
            step["depth"], step["segmentation"] = env.annotate()
        step |= {"state": env.state(), "proprioception": env.proprioception(), "expert_actions": expert.action()}
        step["actions"] = np.clip(step["expert_actions"] + noise[t], -1.0, 1.0)
        for name, value in step.items():
            rows.setdefault(name, []).append(value)
        success[t] = env.step(step["actions"])
    arrays: dict[str, NDArray[Any]] = {name: np.stack(values) for name, values in rows.items()}
    index = np.arange(0, steps, annotate_every, dtype=np.int64)
    return arrays | {"annotation_index": index, "goal": goal, "draw": draw, "success": success}


def is_noisy(index: int, share: float) -> bool:
    """Whether demonstration `index` is disturbed: `share` of any run of indices, evenly spread."""
    return int((index + 1) * share + 1e-9) > int(index * share + 1e-9)


def demonstrate(env: TaskEnvironment, seed: int, index: int, params: Collect) -> Demonstration:
    """Demonstration number `index`, a function of `seed`, the task and `index` alone: new goals are tried until one succeeds.

    Its goals do not depend on its style, which is one of `params.styles` (see `style_of`).

    Recorded from the first frame until `params.tail` steps after the first success.

    Raises:
        ParamsError: no success in `params.attempts` goals.
    """
    noisy, style = is_noisy(index, params.noisy_share), style_of(params.styles, seed, env.task, index)
    for attempt in range(params.attempts):
        key = (env.task, index, attempt)
        noise = np.zeros((MAX_STEPS, ACTION_DIMENSIONS), np.float32)
        if noisy:
            noise = disturbances(generator(seed, "collect-noise", *key), MAX_STEPS, params.noise_scale)
        goal_seed = seed_of(seed, "collect", *key)
        # First without a picture, which is far cheaper: most attempts of a difficult task fail.
        first = first_success(env, goal_seed, noise, params.max_steps, style)
        if first is None:
            continue
        steps = min(first + 1 + params.tail, MAX_STEPS)
        arrays = record(env, goal_seed, noise, steps, params.annotate_every, style)
        if not arrays["success"][first]:
            raise RuntimeError(f"task {env.task!r}, seed {goal_seed}: rendering changed the outcome of the episode")
        return Demonstration(arrays, attempt, noisy, style)
    kind = ("disturbed " if noisy else "") + (f"{style} " if style != "direct" else "")
    less_noise = ", or lower collect.noise_scale" if noisy else ""
    raise ParamsError(
        f"task {env.task!r}: the expert failed {params.attempts} {kind}goals in a row for demonstration {index}; "
        f"raise collect.attempts or collect.max_steps{less_noise}"
    )
