"""Stage `collect`: demonstrations of one MetaWorld task by its scripted expert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svam.console import one_line_errors
from svam.params import load_params
from svam.resume import unfinished
from svam.simulation.collect import collect

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_line_errors
def main(
    task: Annotated[str, typer.Argument(help="MetaWorld task without its version, for example drawer-open.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; a previous one is replaced when all episodes are there.")],
    params: Annotated[Path, typer.Option(help="Parameter file: `collect`, `machine`, `seed`.")] = Path("params.yaml"),
) -> None:
    """Collect demonstrations of TASK: pictures, state, actions, and depth and segmentation of some frames."""
    settings = load_params(params)
    with unfinished(f"collect-{task}", settings, ["collect"], []) as resume:
        collect(task, out, settings.collect, settings.seed, settings.machine.workers, resume)


if __name__ == "__main__":
    app()
