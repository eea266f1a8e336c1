"""How long one step of the policy takes, part by part. Timings differ from run to run: they belong in no hashed output."""

from __future__ import annotations

from statistics import median

from svam.console import console
from svam.models.svam import SVAM
from svam.models.timing import timed, timed_components


def measure_latency(model: SVAM, batch: int, repeats: int = 5) -> dict[str, float]:
    """Median milliseconds of one call of `act` on `batch` observations: component -> ms, `total`, and what is in no
    component (the decoding of generated frames, copies; on a GPU all foresight, see `svam.models.control`) as `other`."""
    observations = [model.example()] * batch
    runs: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        times: dict[str, float] = {}
        with timed_components(model.foresight, times), timed(times, "total"):
            inputs = model.encode(observations, list(range(batch)))
            with timed(times, "policy"):
                model.sample(inputs, list(range(batch)))
        times["other"] = times["total"] - sum(value for name, value in times.items() if name != "total")
        runs.append(times)
    # The first call warms up caches and is left out.
    return {name: 1000.0 * median(run[name] for run in runs[1:]) for name in runs[0]}


def print_latencies(model: SVAM, batch: int) -> None:
    """Print `measure_latency` of `batch` observations, and on a CPU of one, as on a robot; a GPU is ready for `batch` alone."""
    for size in sorted({batch} if model.device.type == "cuda" else {1, batch}):
        times = ", ".join(f"{name} {value:.1f}" for name, value in measure_latency(model, size).items())
        console.print(f"latency in ms, batch {size}: {times}", highlight=False)
