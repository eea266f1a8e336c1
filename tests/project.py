"""A project of its own for a test: the code as it is here, toy params, git and DVC."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from svam.files import read_yaml
from tests import ROOT, warm
from tests.toy import write_toy_params

PAUSE = 0.002  # seconds between two looks at a run


def environment() -> dict[str, str]:
    """This interpreter first on the path, as in the activated environment. It keeps what it compiles for the next process."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": ""}


def attempt(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the project. `dvc`, and the stages that it runs, are forked, as `tests/warm.py` says; as users start it,
    it is `sys.executable, "-m", "dvc"`."""
    if command[0] == "dvc":
        command = (warm.executable(), "-m", *command)
    return subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, check=False)


def run(root: Path, *command: str) -> str:
    """Run a command in the project; its output. A failure fails the test."""
    done = attempt(root, *command)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def ran(output: str) -> list[str]:
    """The stages that a `dvc repro` ran."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


@contextmanager
def running(root: Path, log: Path, *command: str) -> Iterator[subprocess.Popen[bytes] | warm.Process]:
    """A command, as `attempt` has it, in a process group of its own, printing to `log`. What of it still runs when the block
    ends is killed by SIGKILL: DVC, the stage, and the stage's workers."""
    unbuffered = {**environment(), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out, Path(os.devnull).open("rb") as none:
        process: subprocess.Popen[bytes] | warm.Process
        if command[0] == "dvc":
            files = {0: none.fileno(), 1: out.fileno(), 2: out.fileno()}
            process = warm.start(("-m", *command), root, unbuffered, files)
        else:
            process = subprocess.Popen(
                command, cwd=root, env=unbuffered, stdin=none, stdout=out, stderr=out, start_new_session=True
            )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            await_end(process.pid)


def await_end(group: int, seconds: float = 60.0) -> None:
    """Wait until no process of the group is left, not even one that nobody has asked about since it died: until then its
    number counts as taken, and what it left half written as somebody's."""
    end = time.monotonic() + seconds
    with suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.02)


def found(root: Path, pattern: str) -> list[Path]:
    """Files below the project, but not those that begin with a dot, which what is half written does. (`Path.glob` would fail
    where a folder goes while it looks.)"""
    return [root / name for name in sorted(glob(pattern, root_dir=root))]  # noqa: PTH207


def mend(root: Path) -> None:
    """What the README says to do about a file that DVC was killed in the middle of writing."""
    rwlock, lock = root / ".dvc/tmp/rwlock", root / "dvc.lock"
    for file, parse in ((rwlock, json.loads), (lock, YAML(typ="safe", pure=True).load)):
        try:
            if file.exists():
                parse(file.read_text(encoding="utf-8"))
        except (ValueError, YAMLError):
            file.unlink()


def locked_stages(root: Path) -> dict[str, Any]:
    """What `dvc.lock` says of each stage: its command, and the hashes of its dependencies, params and outputs."""
    return dict(read_yaml(root / "dvc.lock")["stages"])


def make_project(root: Path, changes: dict[str, Any] | None = None) -> Path:
    """A git repository with the code as it is here, small params (with further `changes`), and nothing that has run."""
    root.mkdir(parents=True)
    for folder in ("svam", "stages", ".dvc"):
        ignored = shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local")
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    for file in (".dvcignore", ".gitignore", "dvc.yaml"):
        shutil.copy(ROOT / file, root / file)
    write_toy_params(root / "params.yaml", changes)
    begin_git(root)
    return root


def begin_git(root: Path) -> None:
    """A repository of what is there."""
    run(root, "git", "init", "--quiet", ".")
    run(root, "git", "config", "user.email", "test@example.org")
    run(root, "git", "config", "user.name", "test")
    commit(root)


def commit(root: Path) -> None:
    run(root, "git", "add", ".")
    run(root, "git", "commit", "--quiet", "--message", "all")


def make_finished(root: Path) -> None:
    """Such a project after an uninterrupted `dvc repro`, committed."""
    make_project(root)
    expected = run(root, "dvc", "stage", "list", "--name-only").split()
    assert sorted(ran(run(root, "dvc", "repro"))) == sorted(expected)
    assert len(expected) == 19  # two branches; every other stage once
    commit(root)
