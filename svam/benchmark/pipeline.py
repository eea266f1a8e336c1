"""Where the pipeline's time goes, from the accounts that its stages keep; and what making batches costs its trainings."""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, suppress
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeFloat, PositiveFloat, ValidationError
from ruamel.yaml import YAML

from svam.benchmark.timing import ENDLESS, Inputs, Measured, ratio_of
from svam.console import console
from svam.errors import MachineError
from svam.files import FileError, read_json, read_yaml, scratch_folder
from svam.params import Params
from svam.training import loop

STEPS = 20
"""Steps of a training that are timed together."""
UNACCOUNTED = "other"
"""What no part of a stage's account names: imports, reading params and models, writing outputs, waiting for workers."""


class Account(BaseModel):
    """A stage's account of its time, as `svam.console.one_line_errors` keeps it when DVC runs the stage. spent: by part."""

    seconds: PositiveFloat
    spent: dict[str, NonNegativeFloat]


def _stages() -> list[str]:
    """The stages of the pipeline of the current folder, without those of the benchmark.

    Raises:
        MachineError: this is no DVC project.
    """
    command = [sys.executable, "-m", "dvc", "stage", "list", "--name-only"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachineError(f"`dvc stage list` failed: {' '.join(done.stderr.split())}")
    return [name for name in done.stdout.split() if name.split("@")[0] != "benchmark"]


def read_accounts(folder: Path, stages: list[str]) -> dict[str, Account]:
    """Stage -> its account.

    Raises:
        FileError: one is missing or is no account.
    """
    files = {stage: folder / f"{stage.replace('/', '_')}.json" for stage in stages}
    missing = [stage for stage, file in files.items() if not file.is_file()]
    if missing or not files:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise FileError(
            f"{folder}: no account of the time of {names or 'any stage'}; run `dvc repro` first (`dvc repro --force` where DVC "
            "took results from its cache, which leaves none)"
        )
    accounts = {}
    for stage, file in files.items():
        try:
            accounts[stage] = Account.model_validate(read_json(file))
        except ValidationError:
            raise FileError(
                f"{file}: no account of a stage's time; run the stage again with `dvc repro --force {stage}`"
            ) from None
    return accounts


def shares(accounts: dict[str, Account]) -> dict[str, Any]:
    """Seconds of each stage and share of all; inside a stage, seconds of its parts and share of the stage; and the parts over
    all stages. DVC's own time, between the stages, is in no account."""
    total = sum(account.seconds for account in accounts.values())
    stages: dict[str, Any] = _shares({stage: account.seconds for stage, account in accounts.items()}, total)
    overall: dict[str, float] = {}
    for stage, account in accounts.items():
        spent = account.spent | {UNACCOUNTED: account.seconds - sum(account.spent.values())}
        overall |= {name: overall.get(name, 0.0) + seconds for name, seconds in spent.items()}
        stages[stage] |= {"parts": _shares(spent, account.seconds)}
    return {"total_seconds": round(total, 2), "stages": stages, "parts": _shares(overall, total)}


def _shares(spent: Mapping[str, float], total: float) -> dict[str, dict[str, float]]:
    return {name: {"seconds": round(part, 3), "share": round(part / total, 5)} for name, part in spent.items()}


def times(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Where the time of the last run of each stage went. A stage that was killed and went on counts from where it went on.

    Raises:
        FileError: a stage has left no account.
        MachineError: this is no DVC project.
    """
    found = shares(read_accounts(scratch_folder("times"), _stages()))
    for stage, part in sorted(found["stages"].items(), key=lambda item: -item[1]["seconds"]):
        largest = sorted(part["parts"].items(), key=lambda item: -item[1]["seconds"])[:4]
        inside = ", ".join(f"{name} {value['share']:.0%}" for name, value in largest)
        console.print(f"{stage}: {part['seconds']:.0f} s, {part['share']:.1%} ({inside})", soft_wrap=True)
    console.print(f"all stages: {found['total_seconds']:.0f} s", soft_wrap=True)
    return found


def trainings(lock: Path, scratch: Path) -> dict[str, list[str]]:
    """Stage -> its module and arguments, with its outs below `scratch`, for each stage in `dvc.lock` that writes curves.

    Raises:
        FileError: there is no `dvc.lock`.
    """
    if not lock.is_file():
        raise FileError(f"{lock}: no such file; run `dvc repro` first")
    commands = {}
    for name, stage in read_yaml(lock)["stages"].items():
        words, outs = shlex.split(stage["cmd"]), {out["path"] for out in stage["outs"]}
        if "--live" in words and words[words.index("--live") + 1] in outs:
            commands[name] = [str(scratch / word) if word in outs else word for word in words[2:]]
    return commands


def steps_of(command: list[str], pairs: int) -> tuple[dict[str, list[float]], dict[str, list[float]], float]:
    """Seconds of `STEPS` steps of a stage's training, and seconds that all its threads computed in them, with batches `drawn`
    and one batch `repeated`, in turn, in one run; and the share of the drawn ones' work that makes batches.

    The second pair begins where the first ended, so that a machine that gets slower favours neither. The stage ends after
    `pairs` of each and writes nothing.
    """
    seconds: dict[str, list[float]] = {"drawn": [], "repeated": []}
    work: dict[str, list[float]] = {"drawn": [], "repeated": []}
    making: list[float] = []

    def timed_batch(batch_of: Callable[[int], Any], number: int) -> Any:
        start = time.thread_time()
        batch = batch_of(number)
        making.append(time.thread_time() - start)
        return batch

    def in_turn(batch_of: Callable[[int], Any], numbers: range) -> Generator[Any, None, None]:
        first = batch_of(numbers[0])
        with closing(made_ahead(partial(timed_batch, batch_of), numbers)) as drawn:
            for kind in islice(cycle(("drawn", "repeated", "repeated", "drawn")), 2 * pairs):
                for step in range(loop.AHEAD + STEPS):
                    if step == loop.AHEAD:  # what was made during the turn before is used up
                        start, computed = time.perf_counter(), time.process_time()
                    yield next(drawn) if kind == "drawn" else first
                seconds[kind].append(time.perf_counter() - start)
                work[kind].append(time.process_time() - computed)
        raise Measured

    made_ahead, argv = loop.made_ahead, sys.argv
    loop.made_ahead, sys.argv = in_turn, command
    try:
        with suppress(Measured):
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        loop.made_ahead, sys.argv = made_ahead, argv
    return seconds, work, sum(making) / len(making) * pairs * STEPS / sum(work["drawn"])


def watched(params: Params) -> Any:
    """The values of `params`, of trainings that do not end by themselves and compute in one process, the one that watches."""
    machine = params.machine.model_copy(update={"launch": "local", "processes": 1, "shard": False})
    return _endless(params.model_copy(update={"machine": machine}).model_dump(mode="json"))


def _endless(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: value | {"steps": ENDLESS} if key == "training" else _endless(value) for key, value in values.items()}


def loader(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Steps a second of every training stage of the last `dvc repro` against the same training on one repeated batch: what
    making batches costs it, whether it waits for them or shares the processor with them. `work`: the same of the seconds that
    its threads computed, which a busy machine disturbs less, but which do not see waiting. `making`: the share of those seconds
    that makes batches. In one process, also where `machine.launch` starts several.

    Raises:
        FileError: the pipeline has not run.
    """
    found: dict[str, Any] = {}
    folder, state = inputs.scratch, os.environ.get("DVC_ROOT")
    os.environ["DVC_ROOT"] = str(folder)  # an unfinished run's state is left alone
    try:
        YAML(typ="safe", pure=True).dump(watched(params), folder / "params.yaml")
        for stage, command in trainings(Path("dvc.lock"), folder).items():
            seconds, work, making = steps_of([*command, "--params", str(folder / "params.yaml")], params.benchmark.repeats)
            found[stage] = ratio_of(seconds, "repeated", "drawn") | {"seconds": seconds}
            found[stage] |= {"work": ratio_of(work, "repeated", "drawn") | {"seconds": work}, "making": round(making, 5)}
            said = f"{stage}: {found[stage]['ratio']:.3f} of the steps a second of one repeated batch"
            rest = f"{found[stage]['work']['ratio']:.3f} by processor time, of which making batches takes {making:.2%}"
            console.print(f"{said}, {rest}", soft_wrap=True)
    finally:
        os.environ.pop("DVC_ROOT") if state is None else os.environ.update(DVC_ROOT=state)
    return {"steps": STEPS, "stages": found}
