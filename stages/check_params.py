"""Check all of `params.yaml`, so that a wrong value stops the pipeline before DVC deletes the outputs it would replace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages._command import stage_command
from svam.agreement import check_agreement, lacking, notes
from svam.console import console
from svam.errors import MachineError
from svam.files import write_text
from svam.params import Params


@stage_command
def app(
    params: Params,
    out: Annotated[Path | None, typer.Argument(help="Write this file once all is well; always the same bytes.")] = None,
) -> None:
    """Check every key of the parameters, the options of the chosen data source, what sections demand of one another, that
    tasks have the chosen scenes, and that weights, libraries, launcher and GPU are there; exit with a line for each that is
    wrong.

    In the pipeline, `collect` and `convert`, with which everything starts, depend on OUT. Its content never changes, so a
    changed parameter re-runs this check, and then only the stages that list that parameter.
    """
    check_agreement(params)
    if lacks := lacking(params):
        raise MachineError("\n".join(lacks))
    for note in notes(params):
        console.print(f"NOTE {note}", style="yellow", soft_wrap=True)
    if out is not None:
        write_text(out, "params.yaml was checked\n")


if __name__ == "__main__":
    app()
