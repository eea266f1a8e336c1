"""`python -m svam.report`: tables and figures of more than one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svam.console import console, one_line_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
Folder = Annotated[
    Path,
    typer.Option(help="Records of finished runs, a folder for each collection; tables and figures join them."),
]
Collection = Annotated[str | None, typer.Option(help="Of compare.collections; without it: compare.collection.")]


@app.callback()
def commands() -> None:
    """Tables and figures of more than one run."""


@app.command()
@one_line_errors
def compare(
    folder: Folder = Path("data/compare"),
    collection: Collection = None,
    latency: Annotated[bool, typer.Option(help="Measure latencies, of those policies that are here.")] = True,
) -> None:
    """Print and write the paired table of all finished runs of `python -m svam.experiments run`."""
    from svam.experiments.loop import Plan
    from svam.experiments.records import read_records
    from svam.files import FileError
    from svam.params import load_params

    settings, plan = load_params(), Plan(folder, collection)
    folder = plan.folder
    records = read_records(folder)
    if not records:
        raise FileError(f"{folder}: no finished run; `make compare` runs them")
    other = [record.name for record in records if plan.keys.get(record.name) != record.key]
    if other:
        text = f"of other params or code than are here, or not in the plan: {', '.join(other)}"
        console.print(text, style="yellow", highlight=False, soft_wrap=True)

    from svam.device import prepare_torch
    from svam.report.comparison import lines_of, write
    from svam.report.latencies import kept_in, measured, representatives

    lines, file = lines_of(records), folder / "latency.json"
    if latency:
        milliseconds = measured(records, file, prepare_torch(settings.machine.device, settings.threads, settings.seed))
    else:
        milliseconds = kept_in(file, representatives(records))
    typer.echo(write(folder, lines, milliseconds, len(plan.runs), settings.report.dpi))


@app.command()
@one_line_errors
def trail(
    only: Annotated[list[str] | None, typer.Option(help="Only entries of this name or pattern; may be repeated.")] = None,
    folder: Folder = Path("data/compare"),
    collection: Collection = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Begin no entry after this time; 0: only print.")] = None,
) -> None:
    """What limits foresight: run what of compare.trail is not finished, measure it, and print and write the table."""
    from svam.experiments.loop import alone
    from svam.experiments.trail import Trail, run_trail
    from svam.params import load_params
    from svam.report.trail import measure_experiment, write

    with alone():
        asked = Trail(folder, collection)
        for entry in asked.left(only or []):
            typer.echo(entry.line)
        run_trail(asked, measure_experiment, only or [], minutes)
    typer.echo(write(asked.folder, asked.finished(), len(asked.entries), load_params().foresight.resamples))


if __name__ == "__main__":
    app(prog_name="python -m svam.report")
