"""Say whether `dvc.lock` belongs to the code and params that are here. Needs neither DVC's cache nor a remote.

The stage `code` runs first: it costs a second and turns an edit into changed digests, or, for a comment, into none. Then a
dry `repro` that forgives missing data must run nothing, and `status` must report nothing but missing data. (Either alone is
not enough: the dry run stops at the first stage that would run, `status` misses what follows.)
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

MISSING = {"deleted", "not in cache"}


def dvc(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run DVC and return what it printed."""
    return subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, check=False)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Why a DVC command failed."""
    return (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]


def real_changes(changes: list[str | dict[str, str | dict[str, str]]]) -> list[str]:
    """What a stage's entry of `dvc status --json` reports, apart from data that is merely not here."""
    lines = []
    for change in changes:
        for kind, what in ({change: ""} if isinstance(change, str) else change).items():
            states = what if isinstance(what, dict) else {what: ""}
            lines += [f"{kind} {path} {state}".strip() for path, state in states.items() if state not in MISSING]
    return lines


def main() -> int:
    """Print the finding; exit status 0 when dvc.lock belongs."""
    if not Path("dvc.lock").is_file():
        print("there is no dvc.lock here: `dvc repro` has not run")
        return 1
    commands = [("repro", "code"), ("repro", "--dry", "--allow-missing"), ("status", "--json")]
    runs = [dvc(*command) for command in commands]
    problems = [
        f"`dvc {' '.join(command)}` failed: {last_line(done)}"
        for command, done in zip(commands, runs, strict=True)
        if done.returncode
    ]
    running = [line for line in runs[1].stdout.splitlines() if line.startswith("Running stage")]
    problems += [f"would run: {line.split()[-1].strip(chr(39) + ':')}" for line in running]
    if not runs[2].returncode:
        for stage, changes in json.loads(runs[2].stdout).items():
            problems += [f"{stage}: {change}" for change in real_changes(changes)]
    if problems:
        print("dvc.lock does NOT belong to the code and params that are here:", *problems, sep="\n  ")
        return 1
    print("dvc.lock belongs to the code and params that are here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
