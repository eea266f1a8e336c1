"""Stage `code`: the modules that decide each stage's numbers, with digests, so that DVC re-runs what an edit can change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages._command import stage_command
from svam.code import code_text, stage_code, stage_names
from svam.files import whole_file
from svam.params import Params


@stage_command
def app(
    params: Params,
    out: Annotated[Path, typer.Argument(help="Folder to write <stage>.txt to.")],
) -> None:
    """Write a line `<digest> <module>` for each module that a stage runs, a file for each stage."""
    for stage in stage_names():
        with whole_file(out / f"{stage}.txt") as file:
            file.write_text(code_text(stage_code(stage, params.modules)), encoding="utf-8")


if __name__ == "__main__":
    app()
