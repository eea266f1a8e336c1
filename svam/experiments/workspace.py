"""The workspace, which `dvc exp run --temp` borrows for the seconds in which it takes up an experiment.

In that time it stashes uncommitted changes, detaches HEAD, and writes the experiment's params to params.yaml; then it puts all
back. A DVC that is killed there leaves it as it stands, so the loop notes how it was, and the next loop puts it back.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from svam.console import console
from svam.files import FileError, read_json

STASHED = "left by a `dvc exp run` that was killed"


def git(*arguments: str) -> str:
    """What git prints; empty where it fails."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def state() -> dict[str, str]:
    """The commit, the branch (empty if HEAD is detached) and the latest stash (empty if there is none)."""
    return {
        "commit": git("rev-parse", "--verify", "--quiet", "HEAD"), "branch": git("symbolic-ref", "--quiet", "HEAD"),
        "stash": git("rev-parse", "--verify", "--quiet", "refs/stash"),
    }  # fmt: skip


def run_noted(command: Sequence[str], note: Path) -> bool:
    """Run a command, whose output is shown, with the workspace's state in `note`; whether it succeeded.

    The command holds the note locked for as long as it lives, also if this process is killed.
    """
    note.parent.mkdir(parents=True, exist_ok=True)
    with note.open("w", encoding="utf-8") as file:
        json.dump(state(), file)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            process = subprocess.Popen(command, pass_fds=[file.fileno()])
        except FileNotFoundError:
            raise FileError(f"{command[0]} was not found; activate the project's environment") from None
        try:
            process.wait()
        finally:
            process.wait()  # Ctrl-C reaches DVC too, which needs a while to stop in good order
    note.unlink()
    return process.returncode == 0


def put_back(note: Path) -> None:
    """If the last command was killed while it had the workspace, put that back as it was. What stands there now goes to a git
    stash, so that nothing is lost.

    Raises:
        FileError: the command is still alive, or git cannot put the uncommitted changes back.
    """
    if not note.is_file():
        return
    with note.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileError(f"{note}: the experiment of a loop that was killed still runs; wait for it or end it") from None
    before, now = read_json(note), state()
    if before["commit"] == now["commit"] and before != now:
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        if dirty:
            git("stash", "push", "--message", STASHED)
        if before["branch"]:
            git("symbolic-ref", "HEAD", before["branch"])
        if before["stash"] != now["stash"]:
            done = subprocess.run(
                ["git", "stash", "pop", "--quiet", "--index", f"stash@{{{int(dirty)}}}"],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise FileError(f"git stash pop failed ({done.stderr.strip()}); uncommitted changes are in `git stash list`")
        text = (
            f"a `dvc exp run` was killed while it had the workspace, which is now as it was before{'; git stash list' * dirty}"
        )
        console.print(text, highlight=False, soft_wrap=True)
    note.unlink()
