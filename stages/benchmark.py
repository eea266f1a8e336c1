"""Stage `benchmark`: what one part of the pipeline costs against its peers, as ratios measured in one run on this machine."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from stages._command import stage_command
from svam.console import console
from svam.errors import ParamsError
from svam.files import write_json
from svam.params import BenchmarkPart, Params

PARTS: dict[BenchmarkPart, Callable[[], Any]] = {  # the asked one alone is imported, and needs no other's libraries
    "store": lambda: import_module("svam.benchmark.store").clips,
    "conversion": lambda: import_module("svam.benchmark.store").conversion,
    "loader": lambda: import_module("svam.benchmark.pipeline").loader,
    "times": lambda: import_module("svam.benchmark.pipeline").times,
    "encode": lambda: import_module("svam.benchmark.policy").encode,
    "features": lambda: import_module("svam.benchmark.policy").features,
    "control": lambda: import_module("svam.benchmark.policy").control,
    "evaluation": lambda: import_module("svam.benchmark.policy").evaluation,
    "serving": lambda: import_module("svam.benchmark.serving").serving,
    "calvin": lambda: import_module("svam.benchmark.calvin").calvin,
    "gpu": lambda: import_module("svam.benchmark.gpu").gpu,
}


@stage_command
def app(
    params: Params,
    part: Annotated[BenchmarkPart, typer.Argument(help="What to measure.")],
    out: Annotated[Path, typer.Argument(help="JSON to write.")],
    episodes: Annotated[Path, typer.Option(help="Episode store whose frames are read.")] = Path("data/episodes.zarr"),
    model: Annotated[Path, typer.Option(help="The S-VAM folder that train_policy wrote.")] = Path("data/svam"),
    scratch: Annotated[Path, typer.Option(help="Folder, on the disk to be measured.")] = Path(".cache/benchmark"),
    only: Annotated[list[str] | None, typer.Option(help="Of PART gpu: what to measure, anew; may be repeated.")] = None,
) -> None:
    """Measure PART and write OUT. Timings differ from run to run; ratios, of pairs that take turns, much less."""
    from svam.benchmark.timing import Inputs, machine

    if only and part != "gpu":
        raise ParamsError(f"--only chooses within the part gpu; {part} is measured whole")
    described: dict[str, Any] = {"part": part, "machine": machine(), "settings": params.benchmark.model_dump(mode="json")}
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{part}-", dir=scratch) as folder:
        inputs = Inputs(episodes, Path(folder), model, out, lambda found: write_json(out, described | found), only or ())
        inputs.write(PARTS[part]()(inputs, params))
    console.print(f"{part}: {out}", soft_wrap=True)


if __name__ == "__main__":
    app()
