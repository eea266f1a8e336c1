"""Where the pipeline's time goes, from the accounts that its stages keep, and what DVC takes when there is nothing to do."""

from __future__ import annotations

import pstats
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from svam.benchmark.inputs import Inputs, fresh_folder
from svam.console import console
from svam.errors import MachineError
from svam.files import FileError, read_json
from svam.params import Params

STEP = ("data", "forward", "backward", "optimiser")
"""What a step of the training loop consists of; loading frozen parts, evaluating and saving are no step."""
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


def waits(accounts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The share of its steps' time that each training stage waits for data: `share`; the largest, and that of all together."""
    stages: dict[str, Any] = {}
    total = dict.fromkeys(STEP, 0.0)
    for stage, account in accounts.items():
        spent = {part: account["spent"].get(part, 0.0) for part in STEP}
        if spent["forward"] > 0.0:  # others than trainings make no step
            total = {part: total[part] + spent[part] for part in STEP}
            step = sum(spent.values())
            stages[stage] = {
                "share": round(spent["data"] / step, 6),
                "step_seconds": round(step, 3),
                "parts": _parts(spent, step),
            }
    if not stages:
        raise FileError("no account of a training: no stage has made a step; run `dvc repro` first")
    largest = max(stages, key=lambda stage: stages[stage]["share"])
    return {
        "stages": stages, "largest": {"stage": largest, "share": stages[largest]["share"]},
        "share": round(total["data"] / sum(total.values()), 6),
    }  # fmt: skip


def loader(inputs: Inputs, params: Params) -> dict[str, Any]:
    """How long training waits for data, in every training stage of the last run.

    Raises:
        FileError: a stage has left no account.
        MachineError: this is no DVC project.
    """
    found = waits(read_accounts(inputs.times, _stages()))
    for stage, wait in found["stages"].items():
        said = f"{stage}: waits {wait['share']:.2%} of {wait['step_seconds']:.0f} s of steps"
        console.print(said, highlight=False, soft_wrap=True)
    return found


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
