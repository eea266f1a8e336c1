"""What a stage shows a person: progress bars, where its time went, and errors in one line. Nothing here changes a number."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from svam import processes
from svam.errors import SvamError
from svam.files import FileError, scratch_folder, write_json

console = Console(stderr=True, highlight=False)
SECONDS_PER_LINE = 20.0
REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG,
}  # fmt: skip
"""Errors of the operating system that a user can mend."""
_spent: dict[str, float] = {}
P = ParamSpec("P")
Item = TypeVar("Item")


def _pace(task: Task) -> str:
    """Items a second, or of slow ones the seconds that each takes; "-" until two are done."""
    speed = task.finished_speed or task.speed
    return "-" if not speed else f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_pace(task), style="progress.data.speed")


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
        left = "" if task.time_remaining is None else f", {task.time_remaining:.0f} s left"
        line = f"{task.description} {task.completed:.0f}/{task.total:.0f} {_pace(task)}{left} {task.fields.get('note', '')}"
        console.print(line.rstrip())


def progress_bar() -> Progress:
    """A progress bar with count, rate and time left; in a log file a line now and then."""
    return _Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), console=console, refresh_per_second=2, speed_estimate_period=300.0,
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


def _print_account(seconds: float) -> None:
    """Print time, where it went, and the peak memory of this process and of the largest child that has ended. Within DVC the
    same is kept as `.cache/times/<stage>.json`, from which `python -m stages.benchmark times` takes a whole run's shares."""
    import resource

    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    own, child = (resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    shares = [f"{what} {spent / seconds:.0%}" for what, spent in _spent.items() if spent >= 0.005 * seconds]
    memory = f"peak memory {own:.2f} GiB" + (f", of the largest child process {child:.2f} GiB" if child > 0.1 else "")
    console.print("; ".join([f"{seconds:.0f} s", *([", ".join(shares)] if shares else []), memory]), soft_wrap=True)
    stage = os.environ.get("DVC_STAGE")
    if stage is not None:
        record = {"seconds": seconds, "spent": _spent, "peak_gib": own, "peak_gib_of_children": child}
        with suppress(OSError, FileError):  # an account that cannot be kept is no reason to fail
            write_json(scratch_folder("times") / f"{stage.replace('/', '_')}.json", record)


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Decorate a stage command: an error that a user can cause is printed as one sentence and exits with status 1.

    Such errors derive from `SvamError`, or are the operating system's refusals (no space, no permission); anything else is a
    fault of this code and keeps its traceback.
    """

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        start = time.monotonic()
        try:
            command(*args, **kwargs)
            if processes.first():
                _print_account(max(time.monotonic() - start, 1e-6))
        except KeyboardInterrupt as stop:
            # `svam.resume` has noted how to go on.
            note = getattr(stop, "__notes__", ["interrupted; run the same command again to start over"])[0]
            console.print(note, style="red", soft_wrap=True)
            sys.exit(130)
        except Exception as error:
            mendable = isinstance(error, SvamError) or (isinstance(error, OSError) and error.errno in REFUSALS)
            if not (mendable and processes.first()):
                processes.give_way()
            if not mendable:
                raise
            console.quiet = False  # as it is in processes other than the first
            console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            if os.environ.get("SVAM_TRACEBACK"):
                raise
            sys.exit(1)

    return wrapped
