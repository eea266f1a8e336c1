"""Say whether `dvc.lock` belongs to the code and params that are here. Needs neither DVC's cache nor a remote.

Two DVC calls show it: a dry `repro` that forgives missing data must run nothing, and `status` must report nothing but
missing data. (Either alone is not enough: the dry run stops at the first stage that would run, `status` misses what follows.)
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


def real_changes(changes: object) -> list[str]:
    """What a stage's entry of `dvc status --json` reports, apart from data that is merely not here."""
    found: list[str] = []
    for change in changes if isinstance(changes, list) else []:
        if isinstance(change, str):
            found.append(change)
        else:
            for kind, what in change.items():
                entries = what if isinstance(what, dict) else {str(what): ""}
                found += [f"{kind}: {path} {state}".strip() for path, state in entries.items() if state not in MISSING]
    return found


def main() -> int:
    """Print the finding; exit status 0 when dvc.lock belongs."""
    if not Path("dvc.lock").is_file():
        print("there is no dvc.lock here: `dvc repro` has not run")
        return 1
    problems: list[str] = []
    dry = dvc("repro", "--dry", "--allow-missing")
    if dry.returncode:
        last = (dry.stderr.strip() or dry.stdout.strip() or "no output").splitlines()[-1]
        problems.append(f"`dvc repro --dry --allow-missing` failed: {last}")
    running = [line for line in dry.stdout.splitlines() if line.startswith("Running stage")]
    problems += [f"would run: {line.split()[-1].strip(chr(39) + ':')}" for line in running]
    status = dvc("status", "--json")
    try:
        for stage, changes in json.loads(status.stdout or "null").items():
            problems += [f"{stage}: {change}" for change in real_changes(changes)]
    except (json.JSONDecodeError, AttributeError):
        problems.append(f"`dvc status --json` failed: {(status.stderr.strip() or 'no output').splitlines()[-1]}")
    if problems:
        print("dvc.lock does NOT belong to the code and params that are here:", *problems, sep="\n  ")
        return 1
    print("dvc.lock belongs to the code and params that are here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
