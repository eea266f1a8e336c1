"""What a screening says: the tasks of a study that could tell nothing, since nearly all or nearly no episodes succeed, and the
tasks that take their place.

A plan's regime `screening` has data, goals and weights of its own, on the study's tasks and, after them, on replacements in the
order in which they are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svam.errors import ParamsError
from svam.evaluation.scores import PUBLISHED_TIERS, rate_of
from svam.experiments.plan import expanded, load_plan, planned_runs, with_arguments
from svam.experiments.records import read_records
from svam.files import FileError
from svam.report.tables import markdown_table

REGIME = "screening"
LOW, HIGH = 0.1, 0.9
"""A task is kept, and may replace another, where success lies between, both included."""


def replacements(tasks: Sequence[str], rates: Mapping[str, float]) -> dict[str, str]:
    """Task -> the one that takes its place, by the rule that `data/compare/registered/README.md` states; a task for which
    there is none stays.

    Args:
        tasks: of the study. rates: success of these and, in their order, of those that may replace one of their tier.
    """
    free = [task for task in rates if task not in tasks and LOW <= rates[task] <= HIGH]
    taken: dict[str, str] = {}
    for task in tasks:
        other = next((other for other in free if published_tier(other) == published_tier(task)), None)
        if other is not None and not LOW <= rates[task] <= HIGH:
            taken[task] = other
            free.remove(other)
    return taken


def published_tier(task: str) -> str:
    """The tier of one of MetaWorld's fifty tasks in the published tables."""
    return next(tier for tier, tasks in PUBLISHED_TIERS.items() if task in tasks)


def screened(file: Path, compared: Path = Path("data/compare"), params: Path = Path("params.yaml")) -> str:
    """The rates of a plan's screening, what is replaced, and the list that results, in Markdown.

    Raises:
        ParamsError: the plan has no screening. FileError: it has not run, or on other tasks than the plan has now.
    """
    plan = load_plan(file)
    if REGIME not in plan.regimes:
        raise ParamsError(f"{file}: has no regime {REGIME!r}, whose runs would be the screening; name another --plan")
    folder, runs = compared / plan.collection, planned_runs(plan, [f"*-{REGIME}"], params)
    records = {record.name: record for record in read_records(folder)[1]}
    outcomes: dict[str, list[bool]] = {task: [] for task in runs[0].params["evaluate"]["metaworld"]["tasks"]}
    for run in runs:
        again = f"`python -m svam.experiments run --plan {file} --only {run.name}` makes one"
        if run.name not in records:
            raise FileError(f"{folder}: no record of {run.name}; {again}")
        if {episode.task for episode in records[run.name].episodes} != set(outcomes):
            raise FileError(f"{folder}: the record of {run.name} is of other tasks than {file} screens now; {again}")
        for episode in records[run.name].episodes:
            outcomes[episode.task].append(episode.success)
    rates = {task: rate_of(successes) for task, successes in outcomes.items()}
    tasks: list[str] = with_arguments(params, expanded(plan.arguments))["collect"]["tasks"]
    taken = replacements(tasks, {task: rate["success"] for task, rate in rates.items()})
    return markdown(tasks, rates, taken)


def markdown(tasks: Sequence[str], rates: Mapping[str, Mapping[str, Any]], taken: Mapping[str, str]) -> str:
    """A line for each task; `taken` as `replacements`."""
    lines = []
    for task, rate in rates.items():
        fate = "kept" if task in tasks else "not needed"
        if task in taken.values():
            fate = "taken"
        elif task in taken:
            fate = f"replaced by {taken[task]}"
        elif not LOW <= rate["success"] <= HIGH:
            fate = "stays, none is left" if task in tasks else "no replacement"
        interval = f"{rate['success']:.0%} [{rate['low']:.0%}, {rate['high']:.0%}] of {rate['episodes']}"
        lines.append([task, published_tier(task), interval, fate])
    said = "; ".join(f"{task} by {other}" for task, other in taken.items()) or "none"
    return "\n\n".join([
        markdown_table(["task", "tier", "success [95 %]", "it is"], lines),
        f"Replaced: {said}.",
        f"collect.tasks: [{', '.join(taken.get(task, task) for task in tasks)}]",
    ])  # fmt: skip
