"""Functions that several processes compute together, on the CPU, as `machine.launch` would start them but forked."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from svam import processes
from tests.killing import PROCESSES


def _member(environment: dict[str, str], function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    processes.join(cuda=False)
    function(*arguments)


def _heard(file: Path, environment: dict[str, str], function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    with file.open("wb") as said:
        for descriptor in (1, 2):
            os.dup2(said.fileno(), descriptor)
    function(*arguments)


def heard(file: Path, environment: dict[str, str], function: Callable[..., object], *arguments: Any) -> tuple[int | None, str]:
    """Call `function` in a process of its own, with more `environment`; its exit code, and what it and the processes that it
    starts print, which lies in `file`."""
    process = PROCESSES.Process(target=_heard, args=(file, environment, function, arguments))
    process.start()
    process.join()
    return process.exitcode, file.read_text(encoding="utf-8")


def together(function: Callable[..., object], *arguments: Any, count: int = 2) -> list[int | None]:
    """Call `function` in `count` processes, whatever tests before have set in this one; their exit codes. One that
    fails ends the others, as any launcher does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), processes.STARTED: "1"}
    members = [
        PROCESSES.Process(target=_member, args=(shared | {"RANK": str(n), "LOCAL_RANK": str(n)}, function, arguments))
        for n in range(count)
    ]
    for member in members:
        member.start()
    while running := [member for member in members if member.exitcode is None]:
        wait([member.sentinel for member in running])
        for member in running:
            member.join(0)
        if any(member.exitcode for member in members):
            for member in members:
                member.kill()
                member.join()
    return [member.exitcode for member in members]
