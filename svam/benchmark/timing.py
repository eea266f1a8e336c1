"""Readers of one set of samples, timed in turn, so that whatever else the machine does falls on all of them alike.

A repeat reads every sample once with each reader; a ratio is the median over the repeats of the ratio within each.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from svam.device import processor
from svam.seeds import generator

BARRIER_SECONDS = 600.0
LIBRARIES = ("numpy", "numcodecs", "zarr", "av")

_barrier: threading.Barrier | None = None


class Reader(Protocol):
    """One way to have samples on disk. It is sent to worker processes and opened there."""

    @property
    def name(self) -> str:
        """What the figures call it."""
        ...

    def open(self) -> Callable[[int], Any]:
        """A function that reads one sample by number; what it opens may stay open, as in a data loader's worker."""
        ...

    def files(self, sample: int) -> list[Path]:
        """The files that hold a sample: these leave the page cache before a cold read."""
        ...


def forget(files: Sequence[Path]) -> None:
    """Ask the kernel to drop files from the page cache (they must be on disk: only clean pages go)."""
    for name in files:
        file = os.open(name, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def _take_barrier(barrier: threading.Barrier) -> None:
    global _barrier
    _barrier = barrier


def _work(readers: Sequence[Reader], samples: int, repeats: int, cold: bool, worker: int) -> list[list[float]]:
    """Seconds per sample, by reader and repeat, of one worker; all workers use the same reader at the same time."""
    assert _barrier is not None
    try:
        opened = [reader.open() for reader in readers]
        for read in opened:  # imports, first touches, and the page cache
            for sample in range(samples):
                read(sample)
        seconds: list[list[float]] = [[] for _ in readers]
        for repeat in range(repeats):
            order = generator("benchmark", worker, repeat).permutation(samples).tolist()
            for turn in range(len(readers)):
                at = (turn + repeat) % len(readers)
                _barrier.wait(BARRIER_SECONDS)
                total = 0.0
                for sample in order:
                    if cold:
                        forget(readers[at].files(sample))
                    start = time.perf_counter()
                    opened[at](sample)
                    total += time.perf_counter() - start
                seconds[at].append(total / samples)
        return seconds
    except BaseException:
        _barrier.abort()
        raise


def measure(readers: Sequence[Reader], samples: int, repeats: int, workers: int, cold: bool) -> dict[str, list[float]]:
    """Reader -> seconds per sample in each repeat, of `workers` processes together (half as long where two do not disturb
    each other). Cold: before each sample, outside the time, its files leave the page cache.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers)
    os.sync()
    with ProcessPoolExecutor(workers, context, _take_barrier, (barrier,)) as pool:
        running = [pool.submit(_work, readers, samples, repeats, cold, worker) for worker in range(workers)]
        found = np.asarray([job.result() for job in running])
    together = 1.0 / (1.0 / found).sum(axis=0)
    return {reader.name: together[i].tolist() for i, reader in enumerate(readers)}


def summary(seconds: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """Median milliseconds per sample of each reader, and how many times as long as `ours` each takes (paired)."""
    mine = np.asarray(seconds[ours])
    times = {name: float(np.median(np.asarray(values) / mine)) for name, values in seconds.items() if name != ours}
    spread = {name: np.quantile(np.asarray(values) / mine, (0.0, 1.0)).round(3).tolist() for name, values in seconds.items()}
    return {
        "milliseconds": {name: round(1e3 * float(np.median(values)), 4) for name, values in seconds.items()},
        "times_as_long": {name: round(value, 3) for name, value in times.items()},
        "times_as_long_range": {name: spread[name] for name in times},
    }


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


def rounded(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Seconds as they are written down, by work and repeat."""
    return {name: [round(value, 6) for value in values] for name, values in seconds.items()}


def peak_bytes() -> int:
    """Largest resident memory of this process since it began (its own: not what a parent had before it)."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine() -> dict[str, Any]:
    """Size and versions, without names or paths."""
    return {
        "cores": os.cpu_count(), "cpu": processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(), "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
    }  # fmt: skip
