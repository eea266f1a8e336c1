"""Stage `benchmark`: what one part of the pipeline costs against its peers, as ratios measured in one run on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from stages._command import stage_command
from svam.benchmark.inputs import Inputs
from svam.benchmark.parts import PARTS, part_named
from svam.benchmark.timing import machine
from svam.console import console
from svam.errors import ParamsError
from svam.files import scratch_folder, write_json
from svam.params import Params


@stage_command
def app(
    params: Params,
    part: Annotated[str, typer.Argument(help=f"What to measure: {', '.join(PARTS)}.")],
    out: Annotated[Path, typer.Argument(help="JSON to write.")],
    episodes: Annotated[Path, typer.Option(help="Episode store whose frames are read.")] = Path("data/episodes.zarr"),
    model: Annotated[Path, typer.Option(help="The S-VAM folder that train_policy wrote.")] = Path("data/svam"),
    videos: Annotated[Path | None, typer.Option(help="Folder of mp4 files to be read as well; else benchmark.videos.")] = None,
    times: Annotated[Path | None, typer.Option(help="Folder of the stages' accounts of time; else .cache/times.")] = None,
    scratch: Annotated[Path, typer.Option(help="Folder, on the disk to be measured.")] = Path(".cache/benchmark"),
) -> None:
    """Measure PART and write OUT. Timings differ from run to run; ratios, of pairs that take turns, much less."""
    if part not in PARTS:
        raise ParamsError(f"benchmark.parts names {part!r}; available: {', '.join(PARTS)}")
    if videos is None and params.benchmark.videos is not None:
        videos = Path(params.benchmark.videos)
    busy = os.getloadavg()[0]
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{part}-", dir=scratch) as folder:
        inputs = Inputs(episodes, videos, Path(folder), model, times or scratch_folder("times"))
        found = part_named(part)(inputs, params)
    computer = machine() | {"load_before": round(busy, 2)}
    write_json(out, {"part": part, "machine": computer, "settings": params.benchmark.model_dump(mode="json")} | found)
    console.print(f"{part}: {out}", soft_wrap=True)


if __name__ == "__main__":
    app()
