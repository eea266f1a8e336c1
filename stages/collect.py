"""Stage `collect`: demonstrations of one MetaWorld task by its scripted expert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages._command import stage_command
from svam.params import Params
from svam.resume import unfinished
from svam.simulation.collect import collect


def main(
    params: Params,
    task: Annotated[str, typer.Argument(help="MetaWorld task without its version, for example drawer-open.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; a previous one is replaced when all episodes are there.")],
) -> None:
    """Collect demonstrations of TASK: pictures, state, actions, and depth and segmentation of some frames."""
    with unfinished(f"collect-{task}", params, ["collect"], []) as resume:
        collect(task, out, params.collect, params.seed, params.machine.workers, resume)


app = stage_command(main)

if __name__ == "__main__":
    app()
