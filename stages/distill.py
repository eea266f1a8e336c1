"""Train one branch's decoupler on the generated windows and measure it on held-out episodes beside its baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svam.console import one_line_errors
from svam.device import prepare_torch
from svam.params import Branch, load_params
from svam.seeds import seed_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_line_errors
def main(
    branch: Annotated[Branch, typer.Argument(help="Which decoupler.")],
    out: Annotated[Path, typer.Argument(help="Directory to write the decoupler to.")],
    generated: Annotated[Path, typer.Option(help="Windows of the generate stage.")],
    teacher: Annotated[Path, typer.Option(help="Teacher cache of this branch.")],
    episodes: Annotated[Path, typer.Option(help="Episode store that the windows were drawn from.")],
    backbones: Annotated[Path, typer.Option(help="Directory that holds autoencoder/, text/ and the branch's teacher.")],
    video: Annotated[Path, typer.Option(help="Video model that the windows were generated with.")],
    live: Annotated[Path | None, typer.Option(help="Directory for the training curves (DVCLive).")] = None,
    params: Annotated[Path, typer.Option(help="Parameter file.")] = Path("params.yaml"),
) -> None:
    """Write the decoupler and metrics.json: headline metrics of it, of its baselines, and of its ceiling."""
    everything = load_params(params)
    section, seed = everything.distill, seed_of(everything.seed, "distill", branch)

    from svam.episodes.store import EpisodeStore
    from svam.files import whole_directory, write_json
    from svam.resume import unfinished
    from svam.training.distill import DistillationData, distill, print_results
    from svam.training.distill_data import GeneratedWindows, TeacherWindows
    from svam.training.one_step import OneStepFeatures, load_foresight, print_latency

    device = prepare_torch(everything.machine.device, everything.threads, seed)
    windows = GeneratedWindows(generated)
    cache = TeacherWindows(teacher, windows)
    cache.expect(branch=branch, target=section.target)
    model = load_foresight(windows, cache, backbones, video, branch).to(device)
    one_step = OneStepFeatures(windows, EpisodeStore.open(episodes), model)
    data = DistillationData(windows, cache, one_step if windows.features is None else windows.features)
    inputs = [generated, teacher, episodes, *(backbones / part for part in ("autoencoder", "text", branch)), video]
    with unfinished(f"distill-{branch}", everything, ["distill"], inputs, device) as resume:
        decoupler, metrics = distill(data, section, seed, device, f"distill {branch}", live, resume)
        with whole_directory(out) as partial:
            decoupler.save(partial)
            write_json(partial / "metrics.json", metrics)
    print_results(metrics, branch)
    print_latency(one_step, decoupler, branch)


if __name__ == "__main__":
    app()
