"""What stages cost: seconds that they measured here, also when a run was killed in between, or when another run had them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svam.experiments.keys import digest
from svam.experiments.records import Record, Stage
from svam.files import FileError, read_json, write_json

Seconds = dict[str, float]


def accounts(folder: Path, since: float = 0.0) -> Seconds:
    """Stage -> seconds, of the stages that have ended since (a time of `time.time`); see `svam.machine`."""
    found: Seconds = {}
    for file in sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime):
        if file.stat().st_mtime >= since:
            try:
                found[file.stem] = round(float(read_json(file)["seconds"]), 2)
            except (FileError, KeyError, TypeError, ValueError):
                continue  # an account may be lost
    return found


class Clock:
    """Which stages ran in one run of the loop, and for how long, over several attempts if it was killed.

    A note of when attempts began stays in `folder` until the run is recorded. The first stage that ends in an attempt after a
    kill may have gone on from the middle: its seconds are not the whole, and do not count.
    """

    def __init__(self, folder: Path, times: Path, name: str, key: str) -> None:
        """`times`: where stages write their accounts."""
        self.note, self.times = folder / f"{name}.json", times
        earlier = read_json(self.note) if self.note.is_file() else {}
        self.begins: list[float] = [*(earlier["begins"] if earlier.get("key") == key else []), time.time()]
        write_json(self.note, {"key": key, "begins": self.begins})

    def seconds(self) -> Seconds:
        """Stage -> seconds, of the stages that this run ran as a whole."""
        partial = {next(iter(accounts(self.times, begin)), None) for begin in self.begins[1:]}
        return {stage: seconds for stage, seconds in accounts(self.times, self.begins[0]).items() if stage not in partial}

    def overhead(self) -> float | None:
        """Seconds since the begin outside of stages; None after a kill."""
        if len(self.begins) > 1:
            return None
        return round(max(0.0, time.time() - self.begins[0] - sum(self.seconds().values())), 2)

    def end(self) -> None:
        """The run is recorded."""
        self.note.unlink(missing_ok=True)


def stages_of(
    lock: Mapping[str, Any], measured: Seconds, records: Sequence[Record], workspace: Mapping[str, Any], times: Path
) -> dict[str, Stage]:
    """The stages that an experiment's lock file names, with the seconds of the very same work.

    They come from this run (`measured`); else from another record; else from the account of the project's own last run, if the
    workspace's lock file has the same work and no record of other work claims that account.
    """
    last = accounts(times)
    found: dict[str, Stage] = {}
    for name, entry in lock.items():
        work = digest({key: entry.get(key) for key in ("cmd", "deps", "params")})
        known = [(record.stages[name].work == work, record.stages[name].seconds) for record in records if name in record.stages]
        seconds = measured.get(name) or next((s for same, s in known if same and s is not None), None)
        own = workspace.get(name, {})
        if seconds is None and digest({key: own.get(key) for key in ("cmd", "deps", "params")}) == work:
            seconds = last.get(name) if (False, last.get(name)) not in known else None
        found[name] = Stage(work=work, seconds=seconds)
    return found


def total(stages: Mapping[str, Stage], names: Iterable[str]) -> float | None:
    """Seconds of some stages together; None if one of them was not measured."""
    parts = [stages[name].seconds for name in names]
    return None if any(part is None for part in parts) else sum(part for part in parts if part is not None)
