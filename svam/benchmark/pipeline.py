"""Where the pipeline's time goes, from the accounts that its stages keep, and what DVC takes when there is nothing to do."""

from __future__ import annotations

import os
import pstats
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from svam.benchmark.inputs import Inputs, fresh_folder
from svam.benchmark.timing import ratio_of, rounded
from svam.console import console
from svam.errors import MachineError
from svam.files import FileError, read_json
from svam.params import Params
from svam.training import loop

STEPS = 20
"""Steps of a training that are timed together."""
ENDLESS = 10**6
"""Steps that no training which is watched comes to."""
UNACCOUNTED = "other"
"""What no part of a stage's account names: imports, reading params and models, writing outputs, waiting for workers."""
MOST_REPEATS = 3
SHOWN_PACKAGES = 8


def _dvc(*arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run DVC in the project of the current folder; `options` are Python's.

    Raises:
        MachineError: it failed.
    """
    command = [sys.executable, *options, "-m", "dvc", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [*done.stderr.splitlines(), ""]
        raise MachineError(f"`dvc {' '.join(arguments)}` failed: {said[0]}")
    return done


def _stages() -> list[str]:
    """The stages of the pipeline, without those of the benchmark."""
    return [name for name in _dvc("stage", "list", "--name-only").stdout.split() if name.split("@")[0] != "benchmark"]


def read_accounts(folder: Path, stages: list[str]) -> dict[str, dict[str, Any]]:
    """Stage -> its account, as `svam.machine.one_line_errors` keeps it when DVC runs a stage: `seconds`, and `spent` by part.

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
    accounts = {stage: read_json(file) for stage, file in files.items()}
    for stage, account in accounts.items():
        if not _is_account(account):
            raise FileError(
                f"{files[stage]}: no account of a stage's time; run the stage again with `dvc repro --force {stage}`"
            )
    return accounts


def _is_account(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("spent"), dict):
        return False
    seconds, spent = value.get("seconds"), value["spent"].values()
    return isinstance(seconds, float) and seconds > 0.0 and all(isinstance(part, float) and part >= 0.0 for part in spent)


def shares(accounts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Seconds of each stage and share of all; inside a stage, seconds of its parts and share of the stage; and the parts over
    all stages. DVC's own time, between the stages, is in no account."""
    total = sum(account["seconds"] for account in accounts.values())
    stages: dict[str, Any] = {}
    overall: dict[str, float] = {}
    for stage, account in accounts.items():
        spent = account["spent"] | {UNACCOUNTED: account["seconds"] - sum(account["spent"].values())}
        overall |= {name: overall.get(name, 0.0) + seconds for name, seconds in spent.items()}
        stages[stage] = {**_part(account["seconds"], total), "parts": _parts(spent, account["seconds"])}
    return {"total_seconds": round(total, 2), "stages": stages, "parts": _parts(overall, total)}


def _part(seconds: float, total: float) -> dict[str, float]:
    return {"seconds": round(seconds, 3), "share": round(seconds / total, 5)}


def _parts(spent: dict[str, float], total: float) -> dict[str, dict[str, float]]:
    return {name: _part(seconds, total) for name, seconds in spent.items()}


def times(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Where the time of the last run of each stage went. A stage that was killed and went on counts from where it went on.

    Raises:
        FileError: a stage has left no account.
        MachineError: this is no DVC project.
    """
    found = shares(read_accounts(inputs.times, _stages()))
    for stage, part in sorted(found["stages"].items(), key=lambda item: -item[1]["seconds"]):
        largest = sorted(part["parts"].items(), key=lambda item: -item[1]["seconds"])[:4]
        inside = ", ".join(f"{name} {value['share']:.0%}" for name, value in largest)
        console.print(f"{stage}: {part['seconds']:.0f} s, {part['share']:.1%} ({inside})", highlight=False, soft_wrap=True)
    console.print(f"all stages: {found['total_seconds']:.0f} s", highlight=False, soft_wrap=True)
    return found


class _Measured(BaseException):
    """Ends a training that was watched for long enough; no stage takes it for an error."""


def trainings(lock: Path, scratch: Path) -> dict[str, list[str]]:
    """Stage -> its module and arguments, with its outs below `scratch`, for each stage in `dvc.lock` that writes curves.

    Raises:
        FileError: there is no `dvc.lock`.
    """
    if not lock.is_file():
        raise FileError(f"{lock}: no such file; run `dvc repro` first")
    commands = {}
    for name, stage in YAML(typ="safe", pure=True).load(lock.read_text(encoding="utf-8"))["stages"].items():
        words, outs = shlex.split(stage["cmd"]), {out["path"] for out in stage["outs"]}
        if "--live" in words and words[words.index("--live") + 1] in outs:
            commands[name] = [str(scratch / word) if word in outs else word for word in words[2:]]
    return commands


def steps_of(command: list[str], pairs: int) -> dict[str, list[float]]:
    """Seconds of `STEPS` steps of a stage's training, with batches `drawn` and one batch `repeated`, in turn, in one run. The
    stage ends after `pairs` of each and writes nothing."""
    seconds: dict[str, list[float]] = {"drawn": [], "repeated": []}

    def in_turn(batch_of: Callable[[int], Any], numbers: range) -> Generator[Any, None, None]:
        first = batch_of(numbers[0])
        with closing(made_ahead(batch_of, numbers)) as drawn:
            for kind in ("drawn", "repeated") * pairs:
                for step in range(loop.AHEAD + STEPS):
                    if step == loop.AHEAD:  # what was made during the turn before is used up
                        start = time.perf_counter()
                    yield next(drawn) if kind == "drawn" else first
                seconds[kind].append(time.perf_counter() - start)
        raise _Measured

    made_ahead, argv = loop.made_ahead, sys.argv
    loop.made_ahead, sys.argv = in_turn, command
    try:
        with suppress(_Measured):
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        loop.made_ahead, sys.argv = made_ahead, argv
    return seconds


def _endless(values: Any) -> Any:
    """Params whose trainings do not end by themselves."""
    if not isinstance(values, dict):
        return values
    return {key: value | {"steps": ENDLESS} if key == "training" else _endless(value) for key, value in values.items()}


def loader(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Steps a second of every training stage of the last `dvc repro` against the same training on one repeated batch: what
    making batches costs it, whether it waits for them or shares the processor with them.

    Raises:
        FileError: the pipeline has not run.
    """
    found: dict[str, Any] = {}
    with fresh_folder(inputs.scratch / "loader") as folder:
        state = os.environ.get("DVC_ROOT")
        os.environ["DVC_ROOT"] = str(folder)  # an unfinished run's state is left alone
        try:
            long = folder / "params.yaml"
            YAML(typ="safe", pure=True).dump(_endless(params.model_dump(mode="json")), long)
            for stage, command in trainings(Path("dvc.lock"), folder).items():
                seconds = steps_of([*command, "--params", str(long)], params.benchmark.repeats)
                found[stage] = ratio_of(seconds, "repeated", "drawn") | {"seconds": rounded(seconds)}
                said = f"{stage}: {found[stage]['ratio']:.3f} of the steps a second of one repeated batch"
                console.print(said, highlight=False, soft_wrap=True)
        finally:
            os.environ.pop("DVC_ROOT") if state is None else os.environ.update(DVC_ROOT=state)
    return {"steps": STEPS, "stages": found}


def package_of(file: str) -> str:
    """The top-level package of a module's file; "python" for the standard library and what has no file."""
    parts = Path(file).parts
    if "site-packages" not in parts or parts[-1] == "site-packages":
        return "python"
    return parts[parts.index("site-packages") + 1].removesuffix(".py")


def own_shares(stats: pstats.Stats) -> dict[str, float]:
    """Top-level package -> share of the time in its own functions, largest first. Functions without a file (those written in C)
    count for the package that calls them."""
    spent: dict[str, float] = {}
    for (file, _, _), (_, _, own, _, callers) in stats.stats.items():  # type: ignore[attr-defined]
        called = {(file, 0, ""): own} if file != "~" else {caller: value[2] for caller, value in callers.items()}
        for (origin, _, _), seconds in called.items():
            spent[package_of(origin)] = spent.get(package_of(origin), 0.0) + seconds
    total = sum(spent.values())
    return {name: seconds / total for name, seconds in sorted(spent.items(), key=lambda item: -item[1])}


def repro(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Seconds of a `dvc repro` that has nothing to do, start of Python included: the median of (at most) three. The profile of
    one more run, not counted, says where they go, by package: it slows small functions down, so these shares are rough.

    Raises:
        MachineError: something is left to do, or this is no DVC project.
    """
    changed = _dvc("status", "--json").stdout.strip()
    if changed != "{}":
        raise MachineError("`dvc status` finds changes, so `dvc repro` has something to do; run it first")
    seconds = []
    for _ in range(min(MOST_REPEATS, params.benchmark.repeats)):
        start = time.perf_counter()
        done = _dvc("repro")
        seconds.append(time.perf_counter() - start)
        if "Running stage" in done.stdout:
            raise MachineError("`dvc repro` ran a stage although `dvc status` found no change; run it again until nothing runs")
    with fresh_folder(inputs.scratch / "repro") as folder:
        _dvc("repro", options=("-m", "cProfile", "-o", str(folder / "profile")))
        found = own_shares(pstats.Stats(str(folder / "profile")))
    packages = {name: round(share, 4) for name, share in list(found.items())[:SHOWN_PACKAGES]}
    typical = float(np.median(seconds))
    inside = ", ".join(f"{name} {share:.0%}" for name, share in list(packages.items())[:4])
    console.print(f"no-op `dvc repro`: {typical:.2f} s (about {inside})", highlight=False, soft_wrap=True)
    return {
        "median_seconds": round(typical, 3), "seconds": [round(value, 3) for value in seconds], "stages": len(_stages()),
        "profiled_share_by_package": packages,
    }  # fmt: skip
