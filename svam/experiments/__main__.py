"""`python -m svam.experiments`: print the planned experiments, run those that are not finished, and make their table."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from svam.console import console, one_line_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
Only = Annotated[list[str] | None, typer.Option(help="Only runs of this name, pattern (vpp-*) or variant; may be repeated.")]
RECORDS = Path("data/compare")


@app.command()
@one_line_errors
def plan(only: Only = None) -> None:
    """Print each experiment of plan.yaml as the line that can be run alone."""
    from svam.experiments.plan import load_plan, planned_runs
    from svam.experiments.running import unfinished_runs

    asked = load_plan()
    runs = planned_runs(asked, only or [])
    left = unfinished_runs(runs, RECORDS / asked.collection)
    for run in runs:
        typer.echo(shlex.join(run.command) + ("" if run in left else "   # finished"))
    typer.echo(f"# {len(runs)} runs, {len(runs) - len(left)} finished")


@app.command()
@one_line_errors
def run(only: Only = None) -> None:
    """Run what of plan.yaml is not finished, one after another. What was killed goes on with the same command."""
    from svam.experiments.plan import load_plan, planned_runs
    from svam.experiments.running import run_all, unfinished_runs

    asked = load_plan()
    runs, folder = planned_runs(asked, only or []), RECORDS / asked.collection
    left = unfinished_runs(runs, folder)
    run_all(left, folder)
    console.print(f"{len(runs)} runs finished, {len(left)} of them now", highlight=False)


@app.command()
@one_line_errors
def table(collection: Annotated[str | None, typer.Argument(help="Without it: the plan's.")] = None) -> None:
    """Print and write the paired table of a collection, as Markdown, CSV and a figure, from its records alone."""
    from svam.experiments.plan import load_plan
    from svam.experiments.table import write

    typer.echo(write(RECORDS / (collection or load_plan().collection)))


if __name__ == "__main__":
    app(prog_name="python -m svam.experiments")
