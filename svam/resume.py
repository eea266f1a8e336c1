"""What an unfinished run leaves for the next one: kill a stage at any moment, and the same command goes on where it was.

The state lies outside all outputs, in `$DVC_ROOT/.ckpt/<stage>/<key>/` (without DVC: `.ckpt` here). The key is a hash of the
params, the code, the libraries, the inputs, the device and the number of processes, so that changed work never meets stale
state. A folder holds records, each a JSON file and perhaps one data file (safetensors); the JSON file is renamed into place
last and states the checksum of both, so that a record is whole or is not there. The folder goes when the run succeeds.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
from pydantic import BaseModel
from safetensors import SafetensorError

from svam import processes
from svam.code import library_versions, stage_code
from svam.console import console
from svam.files import (
    FileError,
    locked,
    read_json,
    replace_directory,
    sha256_of_json,
    sha256_tree,
    whole_directory,
    whole_file,
    write_text,
)
from svam.params import Params

COST_SHARE = 0.01
"""Most of a run's time that saving may take: after a save of s seconds the next waits at least s / COST_SHARE."""
CONTENT_BYTES = 256 << 20
"""Inputs up to this size are recognised by their content, larger ones by the names, sizes and times of their files."""
OLD_STATES = 2
"""States of the same stage under other keys that stay (a variant that one goes back to); older ones are deleted."""


class Record(NamedTuple):
    """Something saved: its JSON value, and its data file where it has one."""

    value: Any
    file: Path | None


class Resume:
    """The records of one run. Without a folder nothing is saved and nothing loaded, so that callers need no second way."""

    def __init__(self, folder: Path | None, seconds: float = 60.0) -> None:
        """`seconds`: time between two saves of what is saved as a whole; 0 saves at every opportunity."""
        self.folder, self.seconds = folder, seconds
        self._last, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time to save: `seconds` have passed, and enough for saving to cost little."""
        if self.folder is None or not self.seconds:
            return self.folder is not None
        return time.monotonic() - self._last >= max(self.seconds, self._cost / COST_SHARE)

    def save_record(self, name: str, value: Any, write: Callable[[Path], None] | None = None) -> None:
        """Save a record in place of one of the same name. `write` writes its data file to the path that it is given.

        Raises:
            FileError: the file system refuses; what was saved before stays.
        """
        if self.folder is None:
            return
        start = time.monotonic()
        place = self.folder / f"{name}.json"
        # Two names in turn: what the JSON file states is never overwritten, and what it does not state is.
        old = _data_file(place)
        data = self.folder / f"{name}.data-{1 if old and old.name.endswith('-0') else 0}" if write else None
        try:
            if write and data:
                with whole_file(data) as temporary:
                    write(temporary)
            record = {"value": value, "file": data.name if data else None, "crc32c": _checksum(data) if data else 0}
            write_text(place, json.dumps({**record, "check": _check(record)}))
        except (OSError, SafetensorError, FileError) as error:
            if data is not None:
                data.unlink(missing_ok=True)
            reason = getattr(error.__cause__ or error, "strerror", None) or error
            raise FileError(
                f"{self.folder}: saving the state of the run failed: {reason}; what was saved before is whole, so make room "
                "and run the same command again"
            ) from None
        if old is not None:
            old.unlink(missing_ok=True)
        self._last, self._cost = time.monotonic(), time.monotonic() - start

    def load_record(self, name: str) -> Record | None:
        """The record of that name, or None; a damaged one is deleted with a sentence: that work is done again."""
        if self.folder is None or not (place := self.folder / f"{name}.json").is_file():
            return None
        with suppress(FileError, OSError, KeyError, TypeError, AttributeError):
            record = read_json(place)
            file = self.folder / record["file"] if record["file"] else None
            if record.pop("check") == _check(record) and (file is None or _checksum(file) == record["crc32c"]):
                return Record(record["value"], file)
        message = f"{place}: truncated or damaged; it is ignored, and the work that it stood for starts over"
        console.print(message, style="yellow", soft_wrap=True)
        place.unlink(missing_ok=True)
        return None

    @contextmanager
    def directory(self, out: Path) -> Iterator[Path]:
        """Yield a folder that becomes `out` when the block ends without an error; after one, the next run finds it again.

        Raises `FileError` if the file system refuses."""
        if self.folder is None:
            with whole_directory(out) as temporary:
                yield temporary
            return
        folder = self.folder / "out"
        folder.mkdir(exist_ok=True)
        yield folder
        replace_directory(folder, out)


NO_RESUME = Resume(None)
"""For callers that have no run to resume."""


def _data_file(place: Path) -> Path | None:
    """The data file that a record's JSON file states; None where there is no record, or a damaged one."""
    with suppress(FileError, KeyError, TypeError, ValueError):  # that of no file is none
        return place.with_name(read_json(place)["file"])
    return None


def _checksum(file: Path) -> int:
    """CRC-32C of a file: it finds damage at the speed of memory, which is all that is needed here."""
    value = 0
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            value = int(google_crc32c.extend(value, block))
    return value


def _check(record: Mapping[str, Any]) -> int:
    return int(google_crc32c.value(json.dumps(record).encode()))


@contextmanager
def resumable_run(
    stage: str, params: Params, sections: Iterable[str], inputs: Iterable[Path], device: object = "any"
) -> Iterator[Resume]:
    """Open the state of this run, an earlier one's or new; delete it when the block ends without an error. Of several processes
    the first does both, and how many there are is part of what tells this run from others.

    Args:
        stage: as DVC calls it, with the part after "@" where `dvc.yaml` has a matrix.
        sections: dotted keys of the params that decide the result; `seed` and `threads` always count.
        inputs: files and folders that are read.
        device: what computes.

    Raises:
        FileError: another process is doing the same work.
    """

    def key() -> str:
        deciding = {
            "params": {key: _param(params, key) for key in ("seed", "threads", *sections)},
            "code": stage_code(stage.partition("@")[0], params.modules),
            "libraries": library_versions(),
            "inputs": [identity(Path(path)) for path in inputs],
            "device": str(device),
            "processes": processes.count(),
        }
        return sha256_of_json(deciding)[:32]

    states = Path(os.environ.get("DVC_ROOT", ".")) / ".ckpt" / stage
    folder = states / processes.from_first(key)
    resume = Resume(folder, params.machine.checkpoint_seconds)
    if not processes.first():
        processes.wait()
        yield resume
        return
    try:
        with held(folder):
            processes.wait()
            if any(folder.glob("*.json")):
                console.print(f"{stage}: goes on from what an earlier run saved in {folder}", soft_wrap=True)
            try:
                yield resume
                shutil.rmtree(folder)
            except BaseException as error:
                if not any(folder.glob("*.json")):
                    shutil.rmtree(folder, ignore_errors=True)
                elif isinstance(error, KeyboardInterrupt):
                    error.add_note(f"interrupted; run the same command again to go on from the last checkpoint, in {folder}")
                raise
    finally:
        for empty in (states, states.parent):
            with suppress(OSError):
                empty.rmdir()


def _param(params: Params, key: str) -> Any:
    value = reduce(getattr, key.split("."), params)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def identity(path: Path) -> str:
    """What tells one input from another: its content, or for a large one the names, sizes and times of its files."""
    if not path.exists():
        return "absent"
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
    if sum(stat.st_size for _, stat in stats) <= CONTENT_BYTES:
        return sha256_tree(path)
    return sha256_of_json([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder of unfinished work, made if need be, for this process alone. Of those beside it, which are of other params,
    code or inputs, the newest few stay, and those in use.

    Raises:
        FileError: another process holds it.
    """
    with locked(_lock_of(folder)):
        others = [other for other in folder.parent.iterdir() if other.is_dir() and other != folder]
        for old in sorted(others, key=lambda other: other.stat().st_mtime, reverse=True)[OLD_STATES:]:
            with suppress(FileError), locked(_lock_of(old)):
                shutil.rmtree(old, ignore_errors=True)
                console.print(f"{old}: deleted, it was of other params, code or inputs", soft_wrap=True)
        folder.mkdir(exist_ok=True)
        folder.touch()
        for half_written in folder.glob(".*.partial-*"):
            half_written.unlink()
        yield


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
