"""Stage `collect`: demonstrations of MetaWorld tasks by their scripted experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages._command import stage_command
from svam.code import stage_code
from svam.files import scratch_folder
from svam.params import Params
from svam.simulation.collect import collect


@stage_command
def app(
    params: Params,
    out: Annotated[Path, typer.Argument(help="Folder to write; a previous one is replaced when all episodes are there.")],
) -> None:
    """Collect demonstrations of collect.tasks: pictures, state, actions, and depth and segmentation of some frames."""
    code = stage_code("collect", params.modules)
    collect(out, params.collect, params.seed, params.machine.workers, scratch_folder("collect"), code)


if __name__ == "__main__":
    app()
