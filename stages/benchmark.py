"""Stage `benchmark`: what one part of the pipeline costs against its peers, as ratios measured in one run on this machine."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from stages._command import stage_command
from svam.console import console
from svam.files import write_json
from svam.params import BenchmarkPart, Params


@stage_command
def app(
    params: Params,
    part: Annotated[BenchmarkPart, typer.Argument(help="What to measure.")],
    out: Annotated[Path, typer.Argument(help="JSON to write.")],
    episodes: Annotated[Path, typer.Option(help="Episode store whose frames are read.")] = Path("data/episodes.zarr"),
    model: Annotated[Path, typer.Option(help="The S-VAM folder that train_policy wrote.")] = Path("data/svam"),
    scratch: Annotated[Path, typer.Option(help="Folder, on the disk to be measured.")] = Path(".cache/benchmark"),
) -> None:
    """Measure PART and write OUT. Timings differ from run to run; ratios, of pairs that take turns, much less."""
    from svam.benchmark import calvin, gpu, pipeline, policy, serving, store
    from svam.benchmark.timing import Inputs, machine

    parts = {
        "store": store.clips, "conversion": store.conversion, "loader": pipeline.loader, "times": pipeline.times,
        "encode": policy.encode, "features": policy.features, "control": policy.control,
        "evaluation": policy.evaluation, "serving": serving.serving, "calvin": calvin.calvin, "gpu": gpu.gpu,
    }  # fmt: skip
    computer = machine()
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{part}-", dir=scratch) as folder:
        found = parts[part](Inputs(episodes, Path(folder), model), params)
    write_json(out, {"part": part, "machine": computer, "settings": params.benchmark.model_dump(mode="json")} | found)
    console.print(f"{part}: {out}", soft_wrap=True)


if __name__ == "__main__":
    app()
