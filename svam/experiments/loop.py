"""The loop of `make compare`: run what has no record of the same key, one `dvc exp run` after the other, and record it."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from safetensors import safe_open

from svam.console import console
from svam.errors import MachineError
from svam.experiments import experiments
from svam.experiments.clock import Clock, accounts, stages_of, total
from svam.experiments.keys import Project, key_of, upstream
from svam.experiments.keys import stages_of as pipeline_stages
from svam.experiments.plan import REFERENCE, Run, compare_of, overridden, pipeline_line, plan_of, settings_of
from svam.experiments.records import Budget, Episode, Record, machine, read_records, write_record
from svam.experiments.workspace import put_back, run_noted
from svam.files import FileError, locked, scratch_folder
from svam.params import Params

PARAMS = Path("params.yaml")
"""The file that `dvc exp run -S` changes."""
WORKSPACE = "workspace.json"
BUFFERS = ("mean_", "std_")
"""Names of the policy's arrays that are statistics of its inputs, not trained."""


class Planned(NamedTuple):
    """A run, its key, and its record where it has one of this key."""

    run: Run
    key: str
    record: Record | None


class Plan:
    """What is asked for and what is finished, in one project folder (the current one)."""

    def __init__(self, folder: Path, collection: str | None = None) -> None:
        """`folder`: of the records, which has one for each collection in it. `collection`: as for `plan_of`.

        Raises:
            ParamsError, FileError: `params.yaml` is wrong, or `dvc.yaml` is missing.
        """
        self.runs, self.raw = plan_of(PARAMS, collection)
        compare = compare_of(PARAMS, collection)
        self.folder, self.pipeline = folder / compare.collection, pipeline_line(compare)
        self.project = Project.read(Path())
        self.keys = {run.name: key_of(self.project, self.values(run)) for run in self.runs}

    def values(self, run: Run) -> dict[str, Any]:
        """All params of a run."""
        return overridden(self.raw, run.arguments)

    def settings(self, run: Run) -> Params:
        """The same, checked."""
        return settings_of(self.raw, run.arguments)

    def state(self, only: Sequence[str] = ()) -> list[Planned]:
        """The runs whose name or variant matches one of the patterns `only` (none: all), with their records.

        Raises:
            FileError: nothing matches, or a record is damaged.
        """
        records = {record.name: record for record in read_records(self.folder)}
        runs = [run for run in self.runs if not only or any(fnmatch(run.name, p) or run.variant == p for p in only)]
        if not runs:
            raise FileError(f"--only {' '.join(only)}: no run of the plan has such a name; `plan` prints them")
        found = []
        for run in runs:
            record, key = records.get(run.name), self.keys[run.name]
            found.append(Planned(run, key, record if record is not None and record.key == key else None))
        return found

    def estimate(self, run: Run, records: Sequence[Record]) -> tuple[float, str] | None:
        """Seconds that a run will take here from its policy on, and what says so; None where nothing was measured.

        Finished runs of the variant on this machine, scaled to its steps and episodes; for S-VAM, as long as no run is finished
        here, the last `dvc repro`, which trained it with the params as they are.
        """
        settings, base = self.settings(run), settings_of(self.raw)
        steps = settings.train_policy.training.steps
        episodes = len(settings.evaluate.tasks) * settings.evaluate.episodes
        here = [record for record in records if record.machine == machine()]
        guesses = [
            record.policy_training * steps / record.budget.policy_steps
            + record.evaluation * episodes / len(record.episodes)
            for record in here
            if record.variant == run.variant and record.policy_training is not None and record.evaluation is not None
        ]  # fmt: skip
        outside = [record.overhead for record in here if record.overhead is not None]
        if guesses:
            return median(guesses) + (median(outside) if outside else 0.0), f"{len(guesses)} finished of this variant"
        last = accounts(scratch_folder("times"))
        if run.variant != REFERENCE or here or not {"train_policy", "evaluate"} <= last.keys():
            return None
        whole = len(base.evaluate.tasks) * (base.evaluate.episodes + base.evaluate.held_out_instruction_episodes)
        seconds = last["train_policy"] * steps / base.train_policy.training.steps + last["evaluate"] * episodes / max(1, whole)
        return seconds, "the last `dvc repro` here"


@contextmanager
def alone() -> Iterator[None]:
    """Be the only loop here, in a workspace that a killed one has not left half-way.

    Raises:
        FileError: another loop, or what it started, is at work.
    """
    scratch = scratch_folder("compare")
    with locked(scratch / "loop.lock"):
        put_back(scratch / WORKSPACE)
        yield


def run_all(plan: Plan, only: Sequence[str] = (), limit: int | None = None, minutes: float | None = None) -> int:
    """Run what is not finished, which the caller must be `alone` to do; returns how many runs were finished now.

    Args:
        only: as `Plan.state`. limit: at most so many. minutes: begin none after this time.

    Raises:
        FileError: DVC does not have what it made.
        MachineError: `dvc` failed; what was finished stays recorded.
    """
    scratch = scratch_folder("compare")
    begin, finished = time.monotonic(), 0
    left = [planned for planned in plan.state(only) if planned.record is None]
    for number, (run, key, _) in enumerate(left[:limit]):
        if minutes is not None and time.monotonic() - begin > 60.0 * minutes:
            break
        console.rule(f"{number + 1} of {len(left)}: {run.name}")
        console.print(run.line, highlight=False, soft_wrap=True, markup=False)
        clock = Clock(scratch, scratch_folder("times"), run.name, key)
        experiments.forget(run.name)
        try:
            succeeded = run_noted(run.command, scratch / WORKSPACE)
        except KeyboardInterrupt as stop:
            stop.add_note(f"interrupted in {run.name}; the same command goes on with it")
            raise
        if not succeeded:
            raise MachineError(f"`{run.line}` failed, see above; the same command goes on with it")
        record = harvest(plan, run, key, clock)
        file = write_record(plan.folder, record)
        clock.end()
        finished += 1
        wins = sum(episode.success for episode in record.episodes)
        console.print(f"{file}: success in {wins} of {len(record.episodes)} episodes", highlight=False, soft_wrap=True)
    return finished


def harvest(plan: Plan, run: Run, key: str, clock: Clock) -> Record:
    """The record of an experiment that has just been run.

    Raises:
        FileError: DVC does not have what the experiment made.
    """
    revision = experiments.revision_of(run.name)
    lock, settings = experiments.lock_of(revision), plan.settings(run)
    names = upstream(pipeline_stages(plan.project.pipeline, plan.values(run)))
    stages = stages_of(
        {name: lock[name] for name in names}, clock.seconds(), [r for r in read_records(plan.folder) if r.machine == machine()],
        plan.project.locked, clock.times,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lines = experiments.fetch("data/results/episodes.jsonl", revision, folder / "episodes.jsonl").read_text("utf-8")
        parameters = trained_parameters(experiments.fetch("data/svam/policy/model.safetensors", revision, folder / "policy"))
        demonstrations = count_demonstrations(
            experiments.fetch("data/episodes.zarr", revision, folder / "episodes.zarr"), run.size
        )
    distilling = [name for name in names if name.startswith(("cache_teacher@", "distill@"))]
    policy, evaluation = settings.train_policy, settings.evaluate
    return Record(
        name=run.name, variant=run.variant, size=run.size, seed=run.seed, arguments=list(run.arguments), key=key,
        revision=revision, machine=machine(), parameters=parameters,
        policy=experiments.hash_of(lock, "train_policy", "data/svam"),
        budget=Budget(
            policy_steps=policy.training.steps, batch=policy.training.batch, learning_rate=policy.training.learning_rate,
            episodes_per_task=run.size, demonstrations=demonstrations,
            data=experiments.hash_of(lock, "convert", "data/episodes.zarr"),
            max_steps=evaluation.max_steps, execute=evaluation.execute,
        ),
        video=0.0 if policy.context == ["observation"] else total(stages, ["finetune_video"]),
        distillation=total(stages, ["generate", *distilling]) if distilling else 0.0,
        policy_training=stages["train_policy"].seconds, evaluation=stages["evaluate"].seconds, overhead=clock.overhead(),
        stages=stages, episodes=episodes_of(lines),
    )  # fmt: skip


def episodes_of(lines: str) -> list[Episode]:
    """The policy's episodes of an `episodes.jsonl`, which also holds experts and random actions."""
    values: list[Mapping[str, Any]] = [json.loads(line) for line in lines.splitlines()]
    return [Episode(**{key: v[key] for key in Episode.model_fields}) for v in values if v["row"] == "policy"]


def trained_parameters(file: Path) -> int:
    """How many numbers training decides in a policy's `model.safetensors`."""
    with safe_open(file, framework="numpy") as arrays:
        names = [name for name in arrays.keys() if not name.startswith(BUFFERS)]  # noqa: SIM118
        return sum(math.prod(arrays.get_slice(name).get_shape()) for name in names)


def count_demonstrations(store: Path, size: int) -> int:
    """How many episodes train a policy that may use `size` of each task."""
    from svam.episodes.store import EpisodeStore

    episodes = EpisodeStore.open(store)
    tasks = [episodes.task_of(int(episode)) for episode in episodes.episodes("train")]
    return sum(min(size, tasks.count(task)) for task in set(tasks))
