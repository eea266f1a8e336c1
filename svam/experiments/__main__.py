"""`python -m svam.experiments`: print the planned experiments, run those that are not finished, and make their table."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from ruamel.yaml import YAML

from svam.console import console, one_line_errors
from svam.experiments.plan import FOLDER, Run, expanded, load_plan, planned_runs, with_arguments
from svam.experiments.running import run_all, unfinished_runs

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
Only = Annotated[list[str] | None, typer.Option(help="Only runs of this name, pattern (vpp-*) or variant; may be repeated.")]
PlanFile = Annotated[Path, typer.Option("--plan", help="Which study.")]
PLAN = FOLDER / "plan.yaml"


def _planned(only: list[str] | None, file: Path) -> tuple[list[Run], list[Run], Path]:
    """The runs of a plan, those of them that are not finished, and the folder of their records."""
    chosen = load_plan(file)
    runs, folder = planned_runs(chosen, only or []), Path("data/compare", chosen.collection)
    return runs, unfinished_runs(runs, folder), folder


@app.command()
@one_line_errors
def plan(only: Only = None, file: PlanFile = PLAN) -> None:
    """Print each experiment of a plan as the line that can be run alone."""
    runs, unfinished, _ = _planned(only, file)
    for run in runs:
        typer.echo(shlex.join(run.command) + ("" if run in unfinished else "   # finished"))
    typer.echo(f"# {len(runs)} runs, {len(runs) - len(unfinished)} finished")


@app.command()
@one_line_errors
def run(only: Only = None, file: PlanFile = PLAN) -> None:
    """Run what of a plan is not finished, one after another. What was killed goes on with the same command."""
    runs, unfinished, folder = _planned(only, file)
    if unfinished:
        run_all(unfinished, folder)
    console.print(f"{len(runs)} runs finished, {len(unfinished)} of them now")


@app.command()
@one_line_errors
def table(
    collection: Annotated[str | None, typer.Argument(help="Without it: that of the plan.")] = None, file: PlanFile = PLAN
) -> None:
    """Print and write the paired table of a collection, as Markdown, CSV, a figure and a page, from its records alone."""
    from svam.experiments.table import write, write_overview

    typer.echo(write(Path("data/compare", collection or load_plan(file).collection)))
    write_overview(Path("data/compare"))


@app.command()
@one_line_errors
def screening(file: PlanFile = FOLDER / "registered.yaml") -> None:
    """Print success by task in the screening of a study, from its record, and which tasks others replace."""
    from svam.experiments.screening import screened

    typer.echo(screened(file))


@app.command()
@one_line_errors
def params(
    changes: Annotated[list[str], typer.Argument(help="key=value, as for -S, or the name of a preset.")],
    file: Annotated[Path, typer.Option("--params", help="Parameter file to begin with.")] = Path("params.yaml"),
) -> None:
    """Print a parameter file with changes, checked: for a stage's --params."""
    YAML(typ="safe", pure=True).dump(with_arguments(file, expanded(changes)), sys.stdout)


@app.command()
@one_line_errors
def systems(
    report: Annotated[Path, typer.Option(help="What the report stage wrote.")] = Path("data/report"),
    compared: Annotated[Path, typer.Option(help="A comparison's folder.")] = Path("data/compare/mt50"),
    page: Annotated[Path, typer.Option(help="The page to rewrite.")] = Path("svam/evaluation/README.md"),
) -> None:
    """Write into a page how each system of the published tables fills a row here, and what was measured."""
    from svam.experiments.systems import BEGIN, END, systems_table
    from svam.report.readme import replace_between

    replace_between(page, BEGIN, END, systems_table(report, compared))


if __name__ == "__main__":
    app(prog_name="python -m svam.experiments")
