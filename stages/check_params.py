"""Check all of `params.yaml`, so that a wrong value stops the pipeline before DVC deletes the outputs it would replace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svam.console import one_line_errors
from svam.episodes.options import source_options
from svam.files import whole_file
from svam.params import load_params
from svam.simulation.scenes import check_scenes

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_line_errors
def main(
    out: Annotated[Path | None, typer.Argument(help="Write this file once all is well; always the same bytes.")] = None,
    params: Annotated[Path, typer.Option(help="The parameters to check.")] = Path("params.yaml"),
) -> None:
    """Check every key of the parameters, the options of the chosen data source, and that tasks have the scenes that are asked
    for; exit with one line for each that is wrong.

    In the pipeline, `collect` and `convert`, with which everything starts, depend on OUT. Its content never changes, so a
    changed parameter re-runs this check, and then only the stages that list that parameter.
    """
    settings = load_params(params)
    source_options(settings, params)
    check_scenes(settings.collect.scenes, settings.collect.tasks)
    if out is not None:
        with whole_file(out) as file:
            file.write_text("params.yaml was checked\n", encoding="utf-8")


if __name__ == "__main__":
    app()
