"""Steps per second of CALVIN's simulator: drawn where a policy is called, against drawn at every step, as it does itself."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np

from svam.benchmark.timing import Inputs, in_turn, ratio_of
from svam.console import console
from svam.params import Params
from svam.seeds import generator
from svam.simulation.calvin import ACTION_DIMENSIONS, CAMERAS, CalvinEnvironment, open_checkout

STEPS, LOOK_EVERY = 60, 10
START: dict[str, str | int] = {
    "led": 0, "lightbulb": 0, "slider": "right", "drawer": "closed", "red_block": "table", "blue_block": "slider_left",
    "pink_block": "slider_right", "grasped": 0,
}  # fmt: skip


def calvin(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Steps per second over `STEPS` random actions from an official start, others in each repeat, with both cameras drawn at
    every step or at every `LOOK_EVERY`-th, in turn in one environment.

    Raises:
        ParamsError: evaluate.calvin names no checkout of its commit.
        MachineError: the simulator does not run here.
    """
    section, repeats = params.evaluate.calvin, params.benchmark.repeats
    checkout = open_checkout(section.path, section.commit)
    environment = CalvinEnvironment(folder=checkout.folder, renderer=section.renderer, cameras=tuple(CAMERAS), states=[START])

    def play(every: int, number: int) -> float:
        actions = generator(params.seed, "benchmark calvin", number).uniform(-1, 1, (STEPS, ACTION_DIMENSIONS))
        environment.reset(0)
        start = time.perf_counter()
        for step, action in enumerate(actions.astype(np.float32)):
            if step % every == 0:
                environment.observe()
            environment.step(action)
        return time.perf_counter() - start

    works = {"every_step": partial(play, 1), "where_looked": partial(play, LOOK_EVERY)}
    seconds = in_turn(works, repeats)
    environment.close()
    rates = {name: round(STEPS / float(np.median(found)), 1) for name, found in seconds.items()}
    ratio = ratio_of(seconds, "every_step", "where_looked")
    console.print(f"CALVIN: {rates} steps/s; {ratio}", highlight=False, soft_wrap=True)
    return {
        "steps": STEPS, "look_every": LOOK_EVERY, "cameras": list(CAMERAS), "renderer": section.renderer,
        "commit": checkout.commit, "steps_per_second": rates, "ratio": ratio, "seconds": seconds,
    }  # fmt: skip
