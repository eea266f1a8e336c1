"""The record of a finished run: one small JSON file, kept by git, from which tables are made without any data."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

from pydantic import ValidationError

from svam.contract import Frozen
from svam.files import FileError, read_json, whole_file

PATTERN = "*-seed*.json"
"""Names of records, as `plan.Run` makes them."""


class Episode(Frozen):
    """One evaluation episode of the policy. `seed` decides the goal; `steps`: until the first success or the limit."""

    task: str
    index: int
    seed: int
    success: bool
    steps: int


class Budget(Frozen):
    """What must be equal where variants are compared. demonstrations: used in training, of all tasks together;
    data: DVC's hash of the episode store; max_steps, execute: of an evaluation episode."""

    policy_steps: int
    batch: int
    learning_rate: float
    episodes_per_task: int
    demonstrations: int
    data: str
    max_steps: int
    execute: int


class Stage(Frozen):
    """A stage that costs time. work: a hash of its command, params, code and data; seconds: None where not measured."""

    work: str
    seconds: float | None


class Record(Frozen):
    """A finished run.

    key: see `svam.experiments.keys`. revision: the experiment's commit, which only repositories that have the experiment know.
    machine: cores and processor. parameters: trained with the policy. policy: DVC's hash of the S-VAM folder.
    video, distillation, policy_training, evaluation: seconds of those stages, 0 where the variant does without, None where not
    measured; overhead: seconds of the experiment outside stages. vouched: commits whose code the key was of, before somebody
    vouched that what changed since decides no number (`svam.experiments.vouch`).
    """

    name: str
    variant: str
    size: int
    seed: int
    arguments: list[str]
    key: str
    revision: str
    machine: str
    parameters: int
    policy: str
    budget: Budget
    video: float | None
    distillation: float | None
    policy_training: float | None
    evaluation: float | None
    overhead: float | None
    stages: dict[str, Stage]
    vouched: tuple[str, ...] = ()
    episodes: list[Episode]


def machine() -> str:
    """Cores and processor, without names of computers."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {models[0] if models else platform.machine()}"


def write_record(folder: Path, record: Record) -> Path:
    """Write `<name>.json`, an episode a line, so that git shows what changed."""
    values = record.model_dump(mode="json")
    episodes = ",\n  ".join(json.dumps(episode) for episode in values.pop("episodes"))
    text = json.dumps(values, indent=1, allow_nan=False).removesuffix("\n}")
    path = folder / f"{record.name}.json"
    with whole_file(path) as file:
        file.write_text(f'{text},\n "episodes": [\n  {episodes}\n ]\n}}\n', encoding="utf-8")
    return path


def read_record(file: Path) -> Record:
    """One record.

    Raises:
        FileError: the file is missing or no record.
    """
    value = read_json(file)
    try:
        return Record.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the whole file"
        raise FileError(f"{file}: not the record of a run: {where}: {problem['msg']}; delete it and run it again") from None


def read_records(folder: Path) -> list[Record]:
    """All records of a folder, by name; none where there is no folder."""
    return [read_record(file) for file in sorted(folder.glob(PATTERN)) if not file.name.startswith(".")]
