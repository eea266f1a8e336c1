"""Demonstrations by MetaWorld's scripted experts: one attempt, clean or disturbed, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.machine import generator, seed_of
from svam.simulation.metaworld import ACTION_DIMENSIONS, MAX_STEPS, TaskEnvironment

BURST_CHANCE, BURST_STEPS = 0.08, 6
"""A disturbance starts with this chance at each quiet step and pushes one way for that many steps (at full action 6 cm),
so that the episode holds errors worth correcting and, between them, the expert's undisturbed corrections."""


@dataclass(frozen=True)
class Demonstration:
    """A successful episode: `arrays` as documented in `collection`, its attempt number, and whether it was disturbed."""

    arrays: dict[str, NDArray[Any]]
    attempt: int
    noisy: bool


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


def rehearse(env: TaskEnvironment, seed: int, noise: NDArray[np.float32], max_steps: int) -> int | None:
    """Run the expert without drawing anything: the step of its first success, or None within `max_steps`."""
    env.reset(seed)
    for step in range(max_steps):
        if env.step(env.expert_action() + noise[step]):
            return step
    return None


def record(
    env: TaskEnvironment, seed: int, noise: NDArray[np.float32], steps: int, annotate_every: int
) -> dict[str, NDArray[Any]]:
    """Run the expert for `steps` steps and keep everything. Frame t is what is seen before action t."""
    env.reset(seed)
    rows: dict[str, list[NDArray[Any]]] = {}
    index = [t for t in range(steps) if t % annotate_every == 0]

    def keep(name: str, value: NDArray[Any]) -> None:
        rows.setdefault(name, []).append(value)

    goal, draw, success = env.goal, env.draw, np.zeros(steps, bool)
    for t in range(steps):
        for camera, frame in env.observe().items():
            keep(f"frames_{camera}", frame)
        if t % annotate_every == 0:
            depth, segmentation = env.annotate()
            keep("depth", depth)
            keep("segmentation", segmentation)
        expert = env.expert_action()
        executed = np.clip(expert + noise[t], -1.0, 1.0)
        keep("state", env.state())
        keep("proprioception", env.proprioception())
        keep("expert_actions", expert)
        keep("actions", executed)
        success[t] = env.step(executed)
    arrays: dict[str, NDArray[Any]] = {name: np.stack(values) for name, values in rows.items()}
    return arrays | {"annotation_index": np.array(index, np.int64), "goal": goal, "draw": draw, "success": success}


def is_noisy(index: int, share: float) -> bool:
    """Whether demonstration `index` is disturbed: `share` of any run of indices, evenly spread."""
    return int((index + 1) * share + 1e-9) > int(index * share + 1e-9)


def demonstrate(
    env: TaskEnvironment, seed: int, index: int, *, noisy_share: float, noise_scale: float, annotate_every: int,
    tail: int, max_steps: int, attempts: int,
) -> Demonstration:  # fmt: skip
    """Demonstration number `index`, a function of `seed`, the task and `index` alone: new goals are tried until one succeeds.

    Recorded from the first frame until `tail` steps after the first success.

    Raises:
        ValueError: no success in `attempts` goals.
    """
    noisy = is_noisy(index, noisy_share)
    for attempt in range(attempts):
        key = (env.task, index, attempt)
        noise = np.zeros((MAX_STEPS, ACTION_DIMENSIONS), np.float32)
        if noisy:
            noise = disturbances(generator(seed, "collect-noise", *key), MAX_STEPS, noise_scale)
        drawn = seed_of(seed, "collect", *key)
        first = rehearse(env, drawn, noise, max_steps)
        if first is None:
            continue
        arrays = record(env, drawn, noise, min(first + 1 + tail, MAX_STEPS), annotate_every)
        if not arrays["success"][first]:
            raise RuntimeError(f"task {env.task!r}, seed {drawn}: drawing the pictures changed the outcome of the episode")
        return Demonstration(arrays, attempt, noisy)
    kind = "disturbed " if noisy else ""
    raise ValueError(
        f"task {env.task!r}: the expert failed {attempts} {kind}goals in a row for demonstration {index}; "
        "raise collect.attempts or collect.max_steps" + (", or lower collect.noise_scale" if noisy else "")
    )
