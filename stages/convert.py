"""Stage `convert`: a recorded data set of any supported format to one episode store, split and with statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages._command import stage_command
from svam.console import console
from svam.episodes.convert import convert
from svam.episodes.options import open_named_source
from svam.episodes.sets import convert_sets
from svam.files import scratch_folder
from svam.params import Params


@stage_command
def app(
    params: Params,
    source_path: Annotated[Path, typer.Argument(help="The recorded data, in the format that convert.source names.")],
    out: Annotated[Path, typer.Argument(help="Store to write, a folder; replaces a previous one when it is whole.")],
) -> None:
    """Convert the data at SOURCE_PATH, or the sets of convert.sets, to the episode store OUT."""
    if params.convert.sets:
        convert_sets(params, out, scratch_folder("convert"), scratch_folder("sets"))
        return
    source = open_named_source(source_path, params)
    for note in source.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    convert(source, out, params.convert, params.seed, params.machine.workers, scratch_folder("convert"))
    files = [file for file in out.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    console.print(f"{out}: {len(source)} episodes, {size:.1f} MB in {len(files)} files", soft_wrap=True)


if __name__ == "__main__":
    app()
