"""Stage `benchmark`: what one part of the pipeline costs against its peers, as ratios measured in one run on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from svam.benchmark.inputs import Inputs
from svam.benchmark.parts import PARTS, part_named
from svam.benchmark.timing import machine
from svam.console import console, one_line_errors
from svam.files import scratch_folder, write_json
from svam.params import ParamsError, load_params

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_line_errors
def main(
    part: Annotated[str, typer.Argument(help=f"What to measure: {', '.join(PARTS)}.")],
    out: Annotated[Path, typer.Argument(help="JSON to write.")],
    episodes: Annotated[Path, typer.Option(help="Episode store whose frames are read.")] = Path("data/episodes.zarr"),
    model: Annotated[Path, typer.Option(help="The S-VAM folder that train_policy wrote.")] = Path("data/svam"),
    videos: Annotated[Path | None, typer.Option(help="Folder of mp4 files to be read as well; else benchmark.videos.")] = None,
    times: Annotated[Path | None, typer.Option(help="Folder of the stages' accounts of time; else .cache/times.")] = None,
    scratch: Annotated[Path, typer.Option(help="Folder, on the disk to be measured.")] = Path(".cache/benchmark"),
    params: Annotated[Path, typer.Option(help="Parameter file: `benchmark`, and the section of what is measured.")] = Path(
        "params.yaml"
    ),
) -> None:
    """Measure PART and write OUT. Timings differ from run to run; ratios, of pairs that take turns, much less."""
    settings = load_params(params)
    if part not in PARTS:
        raise ParamsError(f"benchmark.parts names {part!r}; available: {', '.join(PARTS)}")
    if videos is None and settings.benchmark.videos is not None:
        videos = Path(settings.benchmark.videos)
    busy = os.getloadavg()[0]
    found = part_named(part)(Inputs(episodes, videos, scratch, model, times or scratch_folder("times")), settings)
    computer = machine() | {"load_before": round(busy, 2)}
    write_json(out, {"part": part, "machine": computer, "settings": settings.benchmark.model_dump(mode="json")} | found)
    console.print(f"{part}: {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
