"""What a call over the wire costs against `SVAM.act` in process.

Two figures. `served_call`: how many times as long a call of one client takes as `act` on the same observation. And `clients`:
how many observations a second four clients at once gain on one, as a share of what `act` itself gains from a batch of four.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from svam.benchmark.timing import Inputs, in_turn, ratio_of
from svam.console import console
from svam.contract import Observation
from svam.device import prepare_torch
from svam.files import sha256
from svam.models.manifest import MANIFEST
from svam.models.svam import SVAM
from svam.params import Params
from svam.serving.client import PolicyClient
from svam.serving.protocol import ServingError

CLIENTS = 4
CALLS = 10
"""Of each work in each repeat."""


@contextmanager
def served(model: Path, batch: int, device: str, threads: int) -> Iterator[str]:
    """The address of a server of `model` in a process of its own, which ends with the block."""
    command = [sys.executable, "-m", "svam.serving", str(model), "--port", "0", "--batch", str(batch), "--device", device]
    process = subprocess.Popen([*command, "--threads", str(threads)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise ServingError(f"the server of {model} did not start; its own message is above")
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait()


def serving(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Both figures, each a median over the repeats, within which all works take turns at `CALLS` calls each.

    Raises:
        ServingError: a server did not start, or computes one request at a time on this machine.
    """
    model, device, threads = inputs.model, params.machine.device, params.threads
    svam = SVAM.load(model, prepare_torch(device, threads, seed=0))
    observations = [svam.example(number) for number in range(CLIENTS)]
    with ExitStack() as stack:
        alone, shared = (stack.enter_context(served(model, batch, device, threads)) for batch in (1, CLIENTS))
        one = stack.enter_context(PolicyClient(alone))
        several = [stack.enter_context(PolicyClient(shared)) for _ in range(CLIENTS)]
        if several[0].metadata["batch"] != CLIENTS:
            raise ServingError("on this machine the server computes one request at a time, so there is nothing to compare")
        pool = stack.enter_context(ThreadPoolExecutor(CLIENTS))

        def ask(client: PolicyClient, observation: Observation) -> None:
            client.actions({**observation.frames, "state": observation.proprioception, "prompt": observation.instruction})

        def together(client: PolicyClient, observation: Observation) -> None:
            for _ in range(CALLS):
                ask(client, observation)

        def act(batch: Sequence[Observation]) -> Callable[[int], float]:
            return lambda _: _seconds(lambda: svam.act(batch), CALLS) / len(batch)

        seconds = in_turn({
            "act, 1": act(observations[:1]),
            "served, 1": lambda _: _seconds(lambda: ask(one, observations[0]), CALLS),
            "act, 4": act(observations),
            "served, 4": lambda _: _seconds(lambda: list(pool.map(together, several, observations)), 1) / CALLS / CLIENTS,
        }, params.benchmark.repeats)  # fmt: skip
    gains = {how: np.asarray(seconds[f"{how}, 1"]) / np.asarray(seconds[f"{how}, 4"]) for how in ("act", "served")}
    share = gains["served"] / gains["act"]
    found = {
        "served_call": ratio_of(seconds, "served, 1", "act, 1"),
        "clients": {
            "act_gains": round(float(np.median(gains["act"])), 3), "served_gains": round(float(np.median(gains["served"])), 3),
            "share": round(float(np.median(share)), 3), "range": np.quantile(share, (0.0, 1.0)).round(3).tolist(),
        },
    }  # fmt: skip
    console.print(f"serving: {found}", soft_wrap=True)
    return found | {
        "policy_sha256": sha256(model / MANIFEST), "device": str(svam.device), "threads": threads, "calls": CALLS,
        "seconds_per_observation": seconds,
    }  # fmt: skip


def _seconds(work: Callable[[], object], times: int) -> float:
    """Seconds of doing `work`, the mean over `times`."""
    start = perf_counter()
    for _ in range(times):
        work()
    return (perf_counter() - start) / times
