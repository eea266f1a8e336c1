"""`records.jsonl`, kept by git: a line for each finished experiment, from which tables are made without data or DVC's cache."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, ValidationError

from svam.contract import Frozen
from svam.files import FileError, write_text


class EpisodeOutcome(Frozen):
    """One evaluation episode of the policy. `seed` decides the goal; `steps`: until the first success or the limit."""

    task: str
    index: int
    seed: int
    success: bool
    steps: int


class StageCost(Frozen):
    """A stage that an experiment rests on. work: tells whether two experiments share it; seconds: None where not measured, such
    as where it was killed and went on; code: DVC's hash of the digests of its code, `data/code/<stage>.txt` at the experiment's
    commit; params: SHA-256 of the params that it lists, as `dvc.lock` has them. Both are "" in older records, and where a stage
    has none."""

    work: str
    seconds: float | None
    code: str = ""
    params: str = ""


class Record(Frozen):
    """A finished experiment. regime: of its plan, "" where it has none; pipeline: the seed of all but the policy, such as
    demonstrations, other weights and goals, None where the plan names none; primary: whether the plan says that the study's
    claim rests on its difference to the reference; arguments: of `-S`; revision: its commit, which only repositories that have
    the experiment know; parameters: trained with the policy; policy: DVC's hash of the S-VAM folder; budget: what must be
    equal where variants are compared (demonstrations: of all tasks together; data: DVC's hash of the episode store; max_steps,
    execute: of an evaluation episode); latency: milliseconds from one observation to one chunk of actions; stages: those that
    the variant uses; labels: what the teachers that its pipeline trains learn from, as `learnt_labels` has it; both wherever it
    was not yet recorded; teachers: whether each that labels can judge lies within the bounds for a comparison, as
    `svam.report.tables.accepted` has it; foreseen: of a variant that distils, as `svam.experiments.foreseen` has it;
    both are empty where they were not yet recorded."""

    name: str
    variant: str
    size: int
    seed: int
    regime: str = ""
    pipeline: int | None = None
    primary: bool = False
    arguments: list[str]
    revision: str
    machine: str
    parameters: int
    policy: str
    budget: dict[str, str | int | float]
    latency: float | None
    stages: dict[str, StageCost]
    episodes: list[EpisodeOutcome]
    labels: tuple[str, ...] = ("depth", "segmentation")
    teachers: dict[str, bool] = Field(default_factory=dict)
    foreseen: dict[str, dict[str, float]] = Field(default_factory=dict)

    def seconds(self, *beginnings: str) -> float | None:
        """Of all stages together whose name begins so; 0 where there is none, None where one was not measured."""
        parts = [stage.seconds for name, stage in self.stages.items() if name.startswith(beginnings)]
        return None if None in parts else sum((part for part in parts if part is not None), 0.0)


def read_records(folder: Path) -> tuple[str | None, list[Record]]:
    """The note of a finished study, which a reader must know before any number, None if it goes on; and all records.

    Raises:
        FileError: a line is no record, or two are of one run.
    """
    file = folder / "records.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    note = json.loads(lines.pop(0))["note"] if lines and lines[0].startswith('{"note"') else None
    try:  # a line that begins with "trail" holds what trail/trail.md was made of, which no code reads any more
        records = [Record.model_validate_json(line) for line in lines if not line.startswith('{"trail"')]
    except ValidationError as error:
        raise FileError(f"{file}: not records of experiments: {error.errors()[0]['msg']}; restore the file by git") from None
    names = [record.name for record in records]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise FileError(f"{file}: {names.count(twice)} lines are of the run {twice}, expected one; keep the one that counts")
    return note, records


def write_records(folder: Path, records: Iterable[Record]) -> None:
    """Write all records of a study that goes on, by name."""
    lines = [record.model_dump_json() + "\n" for record in sorted(records, key=lambda record: record.name)]
    write_text(folder / "records.jsonl", "".join(lines))
