"""`python -m svam.experiments`: print the plan of the comparison, or run what of it is not finished."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svam.console import console, one_line_errors
from svam.files import scratch_folder

if TYPE_CHECKING:
    from svam.experiments.loop import Plan

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
Records = Annotated[Path, typer.Option(help="Folder of the records of finished runs, one within it for each collection.")]
Collection = Annotated[str | None, typer.Option(help="Of compare.collections; without it: compare.collection.")]
Only = Annotated[list[str] | None, typer.Option(help="Only runs of this name, pattern (vpp-*) or variant; may be repeated.")]


@app.command()
@one_line_errors
def plan(only: Only = None, collection: Collection = None, records: Records = Path("data/compare")) -> None:
    """Print each run as the line that can be run alone, and how long it will take here as far as that was measured."""
    from svam.experiments.loop import Plan

    _print(Plan(records, collection), only or [])


@app.command()
@one_line_errors
def run(
    only: Only = None,
    collection: Collection = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many runs.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Begin no run after this time.")] = None,
    records: Records = Path("data/compare"),
) -> None:
    """Run what is not finished, one experiment after the other. A loop that was killed goes on with the same command."""
    from svam.experiments.loop import Plan, alone, run_all

    with alone():
        asked = Plan(records, collection)
        _print(asked, only or [])
        done = run_all(asked, only or [], limit, minutes)
    left = sum(planned.record is None for planned in asked.state(only or []))
    console.print(f"{done} runs finished now, {left} left", highlight=False)


@app.command()
@one_line_errors
def vouch(
    revision: Annotated[str, typer.Argument(help="Commit whose code made the records.")],
    collection: Collection = None,
    records: Records = Path("data/compare"),
) -> None:
    """Keep records valid over a change of code: you vouch that what changed since that commit decides no number of theirs."""
    from svam.experiments.loop import PARAMS, Plan, alone
    from svam.experiments.plan import compare_of
    from svam.experiments.trail import Trail
    from svam.experiments.vouch import vouch as take

    with alone():
        trail = Trail(records, collection) if compare_of(PARAMS, collection).trail else None
        changed, taken = take(Plan(records, collection), trail, revision)
    typer.echo(f"code that differs from {revision}: {', '.join(changed) or 'none'}")
    typer.echo(f"records that count as made by the code that is here now: {', '.join(taken) or 'none'}")


def _print(asked: Plan, only: list[str]) -> None:
    """The plan, a run a line, and what it will take."""
    from svam.experiments.clock import accounts
    from svam.experiments.records import read_records

    state, finished = asked.state(only), read_records(asked.folder)
    guesses = {run.name: asked.estimate(run, finished) for run, _, record in state if record is None}
    known = [guess[0] for guess in guesses.values() if guess is not None]
    for run, _, record in state:
        guess = guesses.get(run.name)
        time = "not measured here" if guess is None else f"about {_time(guess[0])} (by {guess[1]})"
        typer.echo(f"{run.line}   # {'finished' if record is not None else time}")
    text = f"{len(state)} runs, {len(state) - len(guesses)} finished"
    if guesses:
        text += f"; the other {len(guesses)}: " + (f"about {_time(sum(known))}" if known else "nothing was measured here")
        if 0 < len(known) < len(guesses):
            text += f" and {len(guesses) - len(known)} whose variant was not measured here"
    typer.echo(f"# {text}")
    typer.echo(f"# the whole pipeline on this collection: {asked.pipeline}")
    own = ("train_policy", "evaluate", "report")
    common = sum(seconds for stage, seconds in accounts(scratch_folder("times")).items() if stage not in own)
    if guesses and common:
        typer.echo(f"# stages before the policy run once, where DVC's cache lacks them; last time here: {_time(common)}")


def _time(seconds: float) -> str:
    """3 h 20 min."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


if __name__ == "__main__":
    app(prog_name="python -m svam.experiments")
