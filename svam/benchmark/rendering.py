"""Frames per second of our renderer and of gymnasium's, which MetaWorld's own environments draw with, on the same episodes."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from svam.benchmark.timing import Inputs, in_turn, ratio_of
from svam.console import console
from svam.device import become_worker
from svam.params import Params
from svam.seeds import seed_of
from svam.simulation.metaworld import TaskEnvironment, check_task
from svam.simulation.rendering import choose_backend

STYLES = ("fast", "full", "gymnasium")


class StockEnvironment(TaskEnvironment):
    """The same task and camera, drawn by what `render_mode="rgb_array"` gives: gymnasium's renderer with MuJoCo's settings."""

    def __init__(self, task: str, image_size: int, camera: str) -> None:
        super().__init__(task, image_size, (camera,))
        self._renderer.close()  # one GL context: gymnasium's renderer does not make its own current
        ours = self._env
        env = type(ours)(render_mode="rgb_array", camera_name=camera, width=image_size, height=image_size)
        for name in ("_partially_observable", "_freeze_rand_vec", "seeded_rand_vec", "_set_task_called"):
            setattr(env, name, getattr(ours, name))
        env.__dict__.pop("sawyer_observation_space", None)
        env.model.camera(camera).pos[:] = ours.model.camera(camera).pos
        self._env = env

    def observe(self) -> dict[str, NDArray[np.uint8]]:
        """As of `TaskEnvironment`: the same picture, upright."""
        return {self.cameras[0]: self._upright(self._env.render()[::-1], self.cameras[0])}


class Drawn(NamedTuple):
    """A drawn episode: seconds of the drawing alone, the last picture (H, W, 3) uint8, upright, and the state (39,) there."""

    seconds: float
    picture: NDArray[np.uint8]
    state: NDArray[np.float32]


_open: list[TaskEnvironment] = []


def _begin(style: str, task: str, size: int, camera: str) -> None:
    become_worker()
    if style == "gymnasium":
        _open.append(StockEnvironment(task, size, camera))
    else:
        _open.append(TaskEnvironment(task, size, (camera,), style))  # type: ignore[arg-type]


def _draw(seed: int, frames: int) -> Drawn:
    """Draw the first `frames` steps of the scripted expert's episode of `seed`."""
    environment = _open[0]
    environment.reset(seed)
    seconds = 0.0
    for _ in range(frames):
        environment.step(environment.expert_action())
        start = time.perf_counter()
        pictures = environment.observe()
        seconds += time.perf_counter() - start
    return Drawn(seconds, pictures[environment.cameras[0]], environment.state())


def rendering(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Frames per second at each of `rendered_sizes`, of the first `rendered_frames` steps of an expert's episode, another one
    in each repeat. Every renderer has a process of its own, since gymnasium's does not share one; they draw in turn.

    Raises:
        ValueError: MetaWorld has no such task or camera.
        MachineError: no GL library draws on this machine.
    """
    settings, camera = params.benchmark, params.collect.cameras[0]
    task, frames = settings.rendered_task, settings.rendered_frames
    check_task(task)
    backend = choose_backend()  # which the processes below inherit
    results = [_of_size(task, size, camera, frames, settings.repeats, params.seed) for size in settings.rendered_sizes]
    return {
        "task": task, "camera": camera, "frames": frames, "gl": backend, "gymnasium": version("gymnasium"), "results": results,
    }  # fmt: skip


def _of_size(task: str, size: int, camera: str, frames: int, repeats: int, seed: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    drawn: dict[str, list[Drawn]] = {style: [] for style in STYLES}
    with ExitStack() as stack:
        pools = {
            style: stack.enter_context(ProcessPoolExecutor(1, context, _begin, (style, task, size, camera))) for style in STYLES
        }
        for ready in [pool.submit(int) for pool in pools.values()]:  # all start at the same time
            ready.result()

        def one(style: str, number: int) -> float:
            drawn[style].append(pools[style].submit(_draw, seed_of(seed, "benchmark rendering", number), frames).result())
            return drawn[style][-1].seconds

        seconds = in_turn({style: partial(one, style) for style in STYLES}, repeats)
    stock = drawn["gymnasium"]
    rates = {style: round(frames / float(np.median(found)), 2) for style, found in seconds.items()}
    ratios = {style: ratio_of(seconds, "gymnasium", style) for style in ("fast", "full")}
    console.print(f"rendering at {size}: {rates} frames/s; {ratios}", soft_wrap=True)
    return {
        "image_size": size, "frames_per_second": rates, "ratios": ratios, "seconds": seconds,
        "difference_in_grey_levels": {style: round(_difference(drawn[style], stock, "picture"), 3) for style in ratios},
        "difference_in_state": {style: _difference(drawn[style], stock, "state") for style in ratios},
    }  # fmt: skip


def _difference(ours: list[Drawn], stock: list[Drawn], what: str) -> float:
    pairs = [(getattr(a, what), getattr(b, what)) for a, b in zip(ours, stock, strict=True)]
    return float(np.mean([np.abs(a.astype(np.float64) - b).mean() for a, b in pairs]))
