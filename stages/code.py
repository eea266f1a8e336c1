"""Stage `code`: the modules that decide each stage's numbers, with digests, so that DVC re-runs what an edit can change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages._command import stage_command
from svam.code import code_text, stage_code, stage_names
from svam.files import write_text
from svam.params import Params


@stage_command
def app(
    params: Params,
    out: Annotated[Path, typer.Argument(help="Folder to write <stage>.txt to.")],
) -> None:
    """Write a line `<digest> <module>` for each module that a stage runs, a file for each stage."""
    for stage in stage_names():
        write_text(out / f"{stage}.txt", code_text(stage_code(stage, params.modules)))


if __name__ == "__main__":
    app()
