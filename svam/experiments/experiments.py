"""DVC's experiments as the comparison needs them: the commit behind a name, its lock file, and files of its outputs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from svam.files import FileError


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise FileError(f"{command[0]} was not found; activate the project's environment (. .venv/bin/activate)") from None


def reference_of(name: str) -> str:
    """The git reference of an experiment on the commit that is checked out.

    Raises:
        FileError: here is no git repository with a commit.
    """
    head = _run("git", "rev-parse", "--verify", "--quiet", "HEAD").stdout.strip()
    if not head:
        raise FileError(f"{Path.cwd()}: no git repository with a commit, which DVC's experiments need")
    return f"refs/exps/{head[:2]}/{head[2:]}/{name}"


def forget(name: str) -> None:
    """Remove the experiment of that name on this commit, if there is one: DVC refuses to use a name twice."""
    _run("git", "update-ref", "-d", reference_of(name))


def revision_of(name: str) -> str:
    """The commit of an experiment.

    Raises:
        FileError: there is no such experiment on the commit that is checked out.
    """
    found = _run("git", "rev-parse", "--verify", "--quiet", reference_of(name)).stdout.strip()
    if not found:
        raise FileError(f"experiment {name!r} is not there; `dvc exp run` ended without keeping it")
    return found


def lock_of(revision: str) -> dict[str, Any]:
    """Stage -> its entry of an experiment's `dvc.lock`.

    Raises:
        FileError: this repository does not have the commit.
    """
    done = _run("git", "show", f"{revision}:dvc.lock")
    if done.returncode:
        raise FileError(f"experiment {revision[:10]}: {_last_line(done.stderr)}")
    stages: dict[str, Any] = YAML(typ="safe", pure=True).load(done.stdout)["stages"]
    return stages


def fetch(path: str, revision: str, out: Path) -> Path:
    """Copy a file or folder of an experiment's outputs from DVC's cache (or remote) to `out`, which must not exist.

    Raises:
        FileError: DVC does not have it; its sentence is kept.
    """
    done = _run("dvc", "get", "--quiet", ".", path, "--rev", revision, "--out", str(out))
    if done.returncode:
        raise FileError(f"{path} of experiment {revision[:10]}: {_last_line(done.stderr)}")
    return out


def hash_of(lock: dict[str, Any], stage: str, out: str) -> str:
    """DVC's hash of an output in a lock file."""
    return next(str(entry["md5"]) for entry in lock[stage]["outs"] if entry["path"] == out)


def _last_line(text: str) -> str:
    return (text.strip() or "no output").splitlines()[-1]
