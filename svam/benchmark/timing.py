"""Works timed in turn, so that whatever else the machine does falls on all of them alike; a ratio is the median over the
repeats of the ratio within each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svam.code import library_versions
from svam.device import processor

ENDLESS = 10**6
"""Steps that no training which is watched comes to."""


@dataclass(frozen=True)
class Inputs:
    """What parts of the benchmark read and fill. episodes: an episode store. scratch: an empty folder, removed afterwards.
    model: the S-VAM folder of `train_policy`. out: the JSON that becomes of it, which `write` writes, for a part that does so
    before its end; only: what it measures of itself, all by default."""

    episodes: Path
    scratch: Path
    model: Path
    out: Path | None = None
    write: Callable[[dict[str, Any]], None] = lambda _: None
    only: Sequence[str] = ()


class Measured(BaseException):
    """Ends a training that was watched for long enough; no stage takes it for an error."""


def in_turn(works: Mapping[str, Callable[[int], float]], repeats: int, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of each work in each repeat, as the work itself says; every other repeat takes the works in reversed order.

    A work is called with the number of the repeat. `warm`: a round before the first repeat, also with number 0, fills caches
    and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(-1 if warm else 0, repeats):
        for name in list(works) if round_ % 2 == 0 else list(works)[::-1]:
            found = works[name](max(0, round_))
            if round_ >= 0:
                seconds[name].append(found)
    return seconds


def ratio_of(seconds: Mapping[str, Sequence[float]], slow: str, fast: str) -> dict[str, Any]:
    """How many times as long `slow` takes as `fast`, taken within each repeat: the median over the repeats, and the range."""
    found = np.asarray(seconds[slow]) / np.asarray(seconds[fast])
    return {"ratio": round(float(np.median(found)), 3), "range": np.quantile(found, (0.0, 1.0)).round(3).tolist()}


def machine() -> dict[str, Any]:
    """Size, load and versions, without names or paths."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    sizes = {"cores": os.cpu_count(), "memory_gib": round(memory, 1), "load_before": round(os.getloadavg()[0], 2)}
    return {**sizes, "cpu": processor(), "versions": library_versions()}
