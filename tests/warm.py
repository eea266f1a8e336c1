"""`python` for tests, forked from one process that has imported the libraries: started as users start it, most commands would
spend more seconds on that than on their work. The project's own code each imports anew, from where it runs.

`Process` starts one from here; the script `executable()` does for whoever starts an interpreter by its name. Nothing is
imported that takes time, since the script runs this file.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from select import select
from types import ModuleType
from typing import Any, NoReturn

VARIABLE = "SVAM_TEST_PYTHON"
"""The script, where the process from which others are forked has been started."""
LIBRARIES: dict[str, list[str]] = {
    "accelerate": [], "dvc.cli": [], "dvc.repo": [], "dvc.stage.run": [], "dvclive": [], "matplotlib.pyplot": [],
    "multiprocessing.spawn": [], "torchmetrics.functional.image": [], "zarr": [],
    "diffusers": ["AutoencoderKLTemporalDecoder", "UNetSpatioTemporalConditionModel"],
    "transformers": ["CLIPTextModel", "CLIPTokenizer", "DepthAnythingForDepthEstimation", "Dinov2WithRegistersModel"],
}  # fmt: skip
"""And what of them is imported only when it is named."""
SIMULATOR = ["metaworld.env_dict", "metaworld.policies", "mujoco"]
"""Imported where something draws, which the environment says then."""
FREE = 512
"""No command here has as many open files."""


class Process:
    """A command, forked, with what tests use of `subprocess.Popen`. It leads a process group, which is killed where the process
    that has started it ends before."""

    def __init__(
        self, address: str, arguments: Sequence[str], cwd: str, environment: Mapping[str, str], files: Mapping[int, int]
    ) -> None:
        """`arguments`: those of `python`. `files`: number of an open file within the command -> its number here."""
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(address)
        request = [list(arguments), cwd, dict(environment), list(files)]
        socket.send_fds(self._connection, [json.dumps(request).encode()], list(files.values()))
        self.pid = int(self._connection.recv(20))

    def poll(self) -> int | None:
        return self.wait() if self.returncode is None and select([self._connection], [], [], 0)[0] else self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = int(self._connection.recv(20))
        return self.returncode


_started: list[Any] = []


def executable() -> str:
    """The script, which takes the arguments of `python`. The process from which it forks is started when it is first asked for,
    and ends with the one that has started it."""
    if VARIABLE not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="svam-python-")
        address, script = f"{folder.name}/socket", Path(folder.name) / "python"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(address)
            listener.listen(100)
            command = [sys.executable, __file__, "serve", str(listener.fileno())]
            _started[:] = folder, subprocess.Popen(  # both are kept: with the pipe's end the process ends
                command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True,
                env={**os.environ, VARIABLE: str(script)},
            )  # fmt: skip
        script.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", __file__, "start", address])} "$@"\n')
        script.chmod(0o755)
        os.environ[VARIABLE] = str(script)
    return os.environ[VARIABLE]


def start(arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], files: Mapping[int, int]) -> Process:
    return Process(str(Path(executable()).parent / "socket"), arguments, str(cwd), environment, files)


def _stand_for(address: str, arguments: Sequence[str]) -> NoReturn:
    """Within the script: start the command with all files that are open, hand on what asks it to end, and end as it does."""
    files = [int(number) for number in os.listdir("/proc/self/fd")]  # noqa: PTH208  (quicker)
    opened = {number: number for number in files if Path(f"/proc/self/fd/{number}").exists() or number < 3}
    process = Process(address, arguments, os.getcwd(), os.environ, opened)  # noqa: PTH109
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(process.pid, number))
    code = process.wait()
    if code < 0:
        with suppress(OSError):  # of SIGKILL
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


PARSED: dict[str, Any] = {}
"""Text of YAML -> its content."""


def parse_once() -> None:
    """From now on each text of YAML is parsed once: in pure Python params.yaml takes a sixth of a second, and tests read it
    hundreds of times; DVC reads it again for every stage, and dvc.lock after each, most of the time that it takes."""
    from ruamel.yaml import YAML

    load = YAML.load

    def once(self: YAML, stream: Any) -> Any:
        if self.typ != ["safe"] or not self.pure or self.version is not None or not isinstance(stream, str):
            return load(self, stream)  # as nothing here but an edit that keeps comments asks for it
        if stream not in PARSED:
            PARSED[stream] = load(self, stream)
        return deepcopy(PARSED[stream])

    YAML.load = once  # type: ignore[method-assign]


# --- within the process from which commands are forked -------------------------------------------------------------------


def _serve(listener: socket.socket) -> None:
    """Fork, until standard input ends."""
    for library, names in LIBRARIES.items():
        for name in [*names, "__name__"]:
            getattr(import_module(library), name)
    if "MUJOCO_GL" in os.environ:
        for library in SIMULATOR:
            import_module(library)
    if sys.dont_write_bytecode:  # nothing is to lie beside the sources, but the next command need not compile them again
        sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(os.environ[VARIABLE]).parent)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while 0 not in select([0, listener], [], [])[0]:
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            _mind(connection)
        connection.close()


def _mind(connection: socket.socket) -> NoReturn:
    """Fork the command that is asked for, say its number, and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, received, _, _ = socket.recv_fds(connection, 2**20, 250)
    arguments, cwd, environment, numbers = json.loads(message)
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        moved = [fcntl.fcntl(file, fcntl.F_DUPFD, FREE) for file in received]
        connection.detach()
        os.closerange(0, FREE)
        for number, file in zip(numbers, moved, strict=True):
            os.dup2(file, number)
            os.close(file)
        _end(_python, arguments, cwd, environment)
    with suppress(PermissionError):  # it has done so, and more
        os.setpgid(child, child)
    for file in received:
        os.close(file)
    with suppress(OSError):
        connection.send(str(child).encode())
    if connection in select([connection, os.pidfd_open(child)], [], [])[0]:
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(OSError):
        connection.send(str(code).encode())
    os._exit(0)


def _end(function: Callable[..., object], *arguments: object) -> NoReturn:
    """Call `function`, and end the process as an interpreter would."""
    code = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]  # waits for its threads
    sys.modules["multiprocessing.util"]._exit_function()  # type: ignore[attr-defined]
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


def _python(arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """What `python` with these arguments does."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    if environment.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if VARIABLE in environment:  # what it starts is forked too
        sys.executable = environment[VARIABLE]
        sys.modules["multiprocessing.spawn"].set_executable(sys.executable)
    while arguments[0] in ("-B", "-u"):
        del arguments[0]
    first, *sys.argv = arguments
    assert first in ("-m", "-c") or first.endswith(".py"), arguments
    if first == "-m":
        sys.path[0] = cwd
        if sys.argv[0] == "dvc":
            sys.modules["dvc.stage.run"]._run = _forked_stage  # type: ignore[attr-defined]
            parse_once()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0], code, sys.argv[0] = "", sys.argv[0], "-c"
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(code, main.__dict__)
    else:
        sys.path[0], sys.argv = str(Path(first).parent), [first, *sys.argv]
        runpy.run_path(first, run_name="__main__")


def _forked_stage(_: str, command: str, cwd: str, env: dict[str, str], **__: object) -> None:
    """In place of DVC's own function, which starts a shell."""
    from dvc.stage.exceptions import StageCmdFailedError

    python, *arguments = shlex.split(command)
    assert python == "python", command
    sys.stdout.flush()
    process = os.fork()
    if not process:
        _end(_python, arguments, cwd, env)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code:
        raise StageCmdFailedError(command, code)


if __name__ == "__main__":
    role, where, *rest = sys.argv[1:]
    if role == "serve":
        _serve(socket.socket(fileno=int(where)))
    else:
        _stand_for(where, rest)
