"""How long one step of the policy takes, part by part. Timings differ from run to run: they belong in no hashed output."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch

from svam.console import console
from svam.contract import Observation
from svam.models.svam import SVAM

PARTS = {
    "prepare": "autoencoder_and_text",
    "one_step": "video_model",
    "generate": "video_model",
    "reference_features": "teachers",
    "decouple": "decouplers",
}
"""Methods of the foresight model, and the component each is counted under (as in the published latency table)."""


@contextmanager
def timed_components(model: SVAM, times: dict[str, float]) -> Iterator[None]:
    """Within the block, add each component's seconds to `times`."""
    foresight: Any = model.foresight
    synchronise: Callable[[], object] = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None

    def wrap(method: Callable[..., Any], component: str) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            synchronise()
            start = time.perf_counter()
            result = method(*args, **kwargs)
            synchronise()
            times[component] = times.get(component, 0.0) + time.perf_counter() - start
            return result

        return measured

    for name, component in PARTS.items():
        setattr(foresight, name, wrap(getattr(foresight, name), component))
    try:
        yield
    finally:
        for name in PARTS:
            delattr(foresight, name)


def measure_latency(model: SVAM, batch: int, repeats: int = 5) -> dict[str, float]:
    """Median milliseconds of one call of `act` on `batch` observations: component -> ms, `total`, and what is in no
    component (the decoding of generated frames, copies) as `other`."""
    height, width = model.config.image_size
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    proprioception = np.zeros(model.config.proprioception or 0, np.float32) if model.needs_proprioception else None
    observations = [Observation({model.camera: frame}, "", proprioception)] * batch
    runs: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        times: dict[str, float] = {}
        with timed_components(model, times):
            start = time.perf_counter()
            inputs = model.encode(observations, list(range(batch)))
            encoded = time.perf_counter()
            model.sample(inputs, list(range(batch)))
            times["policy"] = time.perf_counter() - encoded
            times["total"] = time.perf_counter() - start
        times["other"] = times["total"] - sum(value for name, value in times.items() if name != "total")
        runs.append(times)
    # The first call warms up caches and is left out.
    return {name: 1000.0 * median(run[name] for run in runs[1:]) for name in runs[0]}


def print_latencies(model: SVAM, batch: int) -> None:
    """Print `measure_latency` of one observation, as on a robot, and of `batch`."""
    for size in sorted({1, batch}):
        times = ", ".join(f"{name} {value:.1f}" for name, value in measure_latency(model, size).items())
        console.print(f"latency in ms, batch {size}: {times}", highlight=False)
