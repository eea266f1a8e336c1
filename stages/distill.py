"""Train one branch's decoupler on the generated windows and measure it on held-out episodes beside its baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages._command import stage_command
from svam.device import prepare_torch
from svam.params import Branch, Params
from svam.seeds import seed_of


@stage_command
def app(
    params: Params,
    branch: Annotated[Branch, typer.Argument(help="Which decoupler.")],
    out: Annotated[Path, typer.Argument(help="Directory to write the decoupler to.")],
    generated: Annotated[Path, typer.Option(help="Windows of the generate stage.")],
    teacher: Annotated[Path, typer.Option(help="Teacher cache of this branch.")],
    backbones: Annotated[Path, typer.Option(help="Directory that holds autoencoder/ and text/.")],
    video: Annotated[Path, typer.Option(help="Video model that the windows were generated with.")],
    live: Annotated[Path | None, typer.Option(help="Directory for the training curves (DVCLive).")] = None,
) -> None:
    """Write the decoupler and metrics.json: headline metrics of it, of its baselines, and of its ceiling."""
    section, seed = params.distill, seed_of(params.seed, "distill", branch)

    from svam.files import whole_directory, write_json
    from svam.models.foresight import part_folders
    from svam.resume import resumable_run
    from svam.training.distill import DistillationData, distill, print_results
    from svam.training.distill_data import GeneratedWindows, Rows, TeacherWindows
    from svam.training.one_step import OneStepFeatures, load_for_windows

    device = prepare_torch(params.machine.device, params.threads, seed)
    inputs = [generated, teacher, backbones / "autoencoder", backbones / "text", video]
    with resumable_run(f"distill@{branch}", params, ["distill"], inputs, device) as resume:
        windows = GeneratedWindows(generated)
        cache = TeacherWindows(teacher, windows)
        cache.expect(branch=branch, target=section.target)
        features: Rows | None = windows.features
        if features is None:
            model = load_for_windows(windows, part_folders(backbones, video)).frozen_on(device, params.machine.compile)
            features = OneStepFeatures(windows, model)
        data = DistillationData(windows, cache, features)
        decoupler, metrics = distill(data, section, seed, device, f"distill {branch}", live, resume, params.machine)
        with whole_directory(out) as partial:
            decoupler.save(partial)
            write_json(partial / "metrics.json", metrics)
    print_results(metrics, branch)


if __name__ == "__main__":
    app()
