"""`python -m svam.benchmark.serving MODEL OUT`: what a call over the wire costs against `SVAM.act` in process.

Two figures. `served_call`: how many times as long a call of one client takes as `act` on the same observation. And `clients`:
how many observations a second four clients at once gain on one, as a share of what `act` itself gains from a batch of four.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import typer

from svam.benchmark.timing import in_turn, machine, ratio_of
from svam.console import console, one_line_errors
from svam.contract import Observation
from svam.device import prepare_torch
from svam.files import sha256, write_json
from svam.models.manifest import MANIFEST
from svam.models.svam import SVAM
from svam.serving.client import PolicyClient
from svam.serving.protocol import ServingError

CLIENTS = 4
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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


def measure(model: Path, repeats: int, calls: int, device: str, threads: int) -> dict[str, Any]:
    """Both figures, each a median over `repeats`, within which all works take turns at `calls` calls each."""
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
            for _ in range(calls):
                ask(client, observation)

        def act(batch: Sequence[Observation]) -> Callable[[int], float]:
            return lambda _: _seconds(lambda: svam.act(batch), calls) / len(batch)

        seconds = in_turn({
            "act, 1": act(observations[:1]),
            "served, 1": lambda _: _seconds(lambda: ask(one, observations[0]), calls),
            "act, 4": act(observations),
            "served, 4": lambda _: _seconds(lambda: list(pool.map(together, several, observations)), 1) / calls / CLIENTS,
        }, repeats)  # fmt: skip
    gains = {how: np.asarray(seconds[f"{how}, 1"]) / np.asarray(seconds[f"{how}, 4"]) for how in ("act", "served")}
    share = gains["served"] / gains["act"]
    return {
        "served_call": ratio_of(seconds, "served, 1", "act, 1"),
        "clients": {
            "act_gains": round(float(np.median(gains["act"])), 3), "served_gains": round(float(np.median(gains["served"])), 3),
            "share": round(float(np.median(share)), 3), "range": np.quantile(share, (0.0, 1.0)).round(3).tolist(),
        },
        "seconds_per_observation": seconds, "threads": threads, "calls": calls, "device": str(svam.device),
    }  # fmt: skip


def _seconds(work: Callable[[], object], times: int) -> float:
    """Seconds of doing `work`, the mean over `times`."""
    start = perf_counter()
    for _ in range(times):
        work()
    return (perf_counter() - start) / times


@app.command()
@one_line_errors
def main(
    model: Annotated[Path, typer.Argument(help="The S-VAM folder that train_policy wrote.")],
    out: Annotated[Path, typer.Argument(help="JSON to write.")],
    repeats: Annotated[int, typer.Option(min=1, help="Repeats, whose median counts.")] = 7,
    calls: Annotated[int, typer.Option(min=1, help="Calls in each repeat.")] = 10,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of a CPU; without it: all cores.")] = None,
) -> None:
    """Measure MODEL behind a server against itself in this process, and write OUT."""
    busy = os.getloadavg()[0]
    found = measure(model, repeats, calls, device, threads or os.cpu_count() or 1)
    computer = machine() | {"load_before": round(busy, 2)}
    write_json(out, {"part": "serving", "machine": computer, "model_sha256": sha256(model / MANIFEST)} | found)
    console.print(f"served call {found['served_call']}, clients {found['clients']}", soft_wrap=True)


if __name__ == "__main__":
    app(prog_name="python -m svam.benchmark.serving")
