"""The computer as stages see it: device, threads, seeds, progress bars, and errors that end as one line."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    import torch

console = Console(stderr=True)
SECONDS_PER_LINE = 20.0
_spent: dict[str, float] = {}
P = ParamSpec("P")
Item = TypeVar("Item")


class MachineError(RuntimeError):
    """The computer lacks something that a parameter asks for; the message says what and how to get it."""


class _Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("-" if speed is None else f"{speed:.1f}/s", style="progress.data.speed")


class _Bar(Progress):
    """Where the output is no terminal (a log file), a bar cannot be redrawn: a line every `SECONDS_PER_LINE` replaces it."""

    def start(self) -> None:
        self._printed = time.monotonic()
        super().start()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._print_line(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._print_line(task_id)

    def _print_line(self, task_id: TaskID) -> None:
        now = time.monotonic()
        if console.is_terminal or now - self._printed < SECONDS_PER_LINE:
            return
        self._printed = now
        task = next(t for t in self.tasks if t.id == task_id)
        speed, left = task.finished_speed or task.speed or 0.0, task.time_remaining or 0.0
        note = task.fields.get("note", "")
        line = f"{task.description} {task.completed:.0f}/{task.total:.0f} {speed:.1f}/s, {left:.0f} s left {note}"
        console.print(line.rstrip(), highlight=False)


def progress_bar() -> Progress:
    """A progress bar with count, rate and time left; in a log file a line now and then."""
    return _Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), console=console, refresh_per_second=2,
    )  # fmt: skip


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Add the seconds spent inside to the stage's account, see `one_line_errors`. On a GPU, work that is still queued counts
    where it is waited for."""
    start = time.perf_counter()
    try:
        yield
    finally:
        _spent[what] = _spent.get(what, 0.0) + time.perf_counter() - start


def track(items: Iterable[Item], description: str, total: int) -> Generator[Item, None, None]:
    """Iterate with a progress bar that shows rate and time left; what is done with the items is `timed`."""
    with progress_bar() as bar:
        task = bar.add_task(description, total=total, note="")
        for item in items:
            with timed(description):
                yield item
            bar.advance(task)


def scratch_folder(name: str) -> Path:
    """`.cache/<name>` in the project (in the original one where DVC runs an experiment in a copy): what may be lost."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".cache" / name


def seed_of(*parts: object) -> int:
    """A 63-bit seed from what it is for, e.g. `seed_of(params.seed, "collect", task, index, attempt)`."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(*parts: object) -> np.random.Generator:
    """A numpy generator seeded by `seed_of`."""
    return np.random.default_rng(seed_of(*parts))


def become_worker() -> None:
    """In a worker process: leave Ctrl-C to the parent, and end with it. A parent that is killed closes nothing: its workers
    would wait for work, and hold their memory, for ever."""
    import multiprocessing
    import signal
    import threading

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def prepare_torch(device: str, threads: int, seed: int) -> torch.device:
    """Set threads and seeds, choose the device, print it, and return it.

    Raises:
        MachineError: `device` is "cuda" and torch sees no CUDA GPU.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            f"machine.device is 'cuda', but torch {torch.__version__} sees no CUDA GPU; use 'auto' or 'cpu', "
            "or install a CUDA build of torch"
        )
    chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if chosen.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    # On CPUs torch's fused attention is slower than the plain one at these lengths; its bf16 backward takes half of a
    # training step of the video model (182 against 84 ms a clip on one core).
    torch.backends.cuda.enable_flash_sdp(chosen.type == "cuda")
    torch.backends.cuda.enable_mem_efficient_sdp(chosen.type == "cuda")
    name = torch.cuda.get_device_name() if chosen.type == "cuda" else f"{threads} threads"
    console.print(f"device: {chosen.type} ({name})", highlight=False)
    return chosen


def _print_account(seconds: float) -> None:
    """Print time, where it went, and the peak memory of this process and of the largest child that has ended. Within DVC the
    same is kept as `.cache/times/<stage>.json`, from which `python -m stages.benchmark times` takes a whole run's shares."""
    import resource

    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    own, child = (resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    shares = [f"{what} {spent / seconds:.0%}" for what, spent in _spent.items() if spent >= 0.005 * seconds]
    memory = f"peak memory {own:.2f} GiB" + (f", of the largest child process {child:.2f} GiB" if child > 0.1 else "")
    console.print(
        "; ".join([f"{seconds:.0f} s", *([", ".join(shares)] if shares else []), memory]), highlight=False, soft_wrap=True
    )
    stage = os.environ.get("DVC_STAGE")
    if stage is not None:
        record = {"seconds": seconds, "spent": _spent, "peak_gib": own, "peak_gib_of_children": child}
        with suppress(OSError):  # an account that cannot be kept is no reason to fail
            folder = scratch_folder("times")
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(record, indent=1, sort_keys=True)
            (folder / f"{stage.replace('/', '_')}.json").write_text(text + "\n", encoding="utf-8")


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Decorate a stage command: an error that a user can cause is printed as one sentence and exits with status 1.

    Expected errors derive from ValueError or OSError, or are MachineError; anything else is a fault of ours and keeps its
    traceback.
    """

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        start = time.monotonic()
        try:
            command(*args, **kwargs)
            _print_account(max(time.monotonic() - start, 1e-6))
        except KeyboardInterrupt as stop:
            # Whoever keeps the state of an unfinished run has noted how to go on.
            note = getattr(stop, "__notes__", ["interrupted; run the same command again to start over"])[0]
            console.print(note, style="red", highlight=False, soft_wrap=True)
            sys.exit(130)
        except (ValueError, OSError, MachineError) as error:
            console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
            if os.environ.get("SVAM_TRACEBACK"):
                raise
            sys.exit(1)

    return wrapped
