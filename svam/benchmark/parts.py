"""The parts of the benchmark by name. Each is imported when it is asked for: few need a simulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from svam.benchmark.inputs import Inputs
from svam.params import BenchmarkPart, Params

PARTS: tuple[str, ...] = get_args(BenchmarkPart)


def part_named(name: str) -> Callable[[Inputs, Params], dict[str, Any]]:
    """The function that measures the part `name`, one of `PARTS`, and returns its figures as JSON."""
    if name in ("store", "conversion"):
        from svam.benchmark import store

        return {"store": store.clips, "conversion": store.conversion}[name]
    if name in ("encode", "features", "evaluation"):
        from svam.benchmark import policy

        return {"encode": policy.encode, "features": policy.features, "evaluation": policy.evaluation}[name]
    if name == "rendering":
        from svam.benchmark import rendering

        return rendering.rendering
    if name == "calvin":
        from svam.benchmark import calvin

        return calvin.calvin
    from svam.benchmark import pipeline

    return {"loader": pipeline.loader, "times": pipeline.times}[name]
