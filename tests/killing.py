"""Runs that are killed by SIGKILL at a chosen moment of saving their state."""

from __future__ import annotations

import copyreg
import os
import signal
from collections.abc import Callable
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from svam.resume import Resume
from tests.toy import invoke

# Forked from a process that has imported everything and started no thread: as quick as a fork, and as clean as a new process.
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.killing", "svam.training.finetune_video"])


def _app_of(module: str) -> typer.Typer:
    app: typer.Typer = import_module(module).app
    return app


# A stage's command reaches the process by its module's name: it is no function of that module which pickle could find.
copyreg.pickle(typer.Typer, lambda app: (_app_of, (app.registered_commands[0].callback.__module__,)))


def _torch_settings() -> tuple[int, bool, bool]:
    """What decides the last bits of sums, and what a stage that an earlier test ran in this process may have set."""
    cuda = torch.backends.cuda
    return torch.get_num_threads(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()


def _die(
    environment: dict[str, str], settings: tuple[int, bool, bool], after: int, while_writing: bool, run: Callable[..., object],
    *arguments: Any,
) -> None:  # fmt: skip
    """Within its own process: call `run`; saving a record kills the process at the right moment."""
    os.environ.update(environment)
    torch.set_num_threads(settings[0])
    torch.backends.cuda.enable_flash_sdp(settings[1])
    torch.backends.cuda.enable_mem_efficient_sdp(settings[2])
    save, count = Resume.save_record, 0

    def counting(self: Resume, name: str, value: Any, write: Callable[[Path], None] | None = None) -> None:
        nonlocal count
        count += 1

        def half(file: Path) -> None:
            assert write is not None
            write(file)
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        save(self, name, value, half if while_writing and count == after else write)
        if count == after:
            os.kill(os.getpid(), signal.SIGKILL)

    Resume.save_record = counting  # type: ignore[method-assign]
    run(*arguments)


def kill(after: int, run: Callable[..., object], *arguments: Any, while_writing: bool = False) -> None:
    """Call `run` in a process that is killed when its `after`-th record has been saved, or when half of it has been written."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("DVC_")}
    process = PROCESSES.Process(target=_die, args=(environment, _torch_settings(), after, while_writing, run, *arguments))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"


def run_stage(app: typer.Typer, *arguments: object) -> None:
    """Run a stage's command in this process; it must succeed. (What DVC has recorded of its code is the project's, not the
    test's.)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages._command._check_code", lambda source: None)
        result = invoke(app, *arguments)
    assert result.exit_code == 0, result.output
