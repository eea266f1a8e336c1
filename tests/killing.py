"""Runs that are killed by SIGKILL at a chosen moment of saving their state."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from svam.resume import Resume

# Forked from a process that has imported everything and started no thread: as quick as a fork, and as clean as a new process.
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload([
    "accelerate", "dvc.repo", "tests.evaluation.test_rollout", "tests.simulator", "tests.test_processes",
])  # fmt: skip


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
