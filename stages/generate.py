"""Generate one-step features and multi-step clips of the chosen windows, from the same initial noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages._command import stage_command
from svam.device import prepare_torch
from svam.params import Params


@stage_command
def app(
    params: Params,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    episodes: Annotated[Path, typer.Option(help="Episode store of the convert stage.")],
    latents: Annotated[Path, typer.Option(help="Latents of the encode stage.")],
    backbones: Annotated[Path, typer.Option(help="Directory that holds autoencoder/ and text/.")],
    video: Annotated[Path, typer.Option(help="Video model of the finetune_video stage.")],
) -> None:
    """Write F, V^ and what the distillation's baselines need as a folder of arrays."""
    section, seed = params.generate, params.seed

    from svam.episodes.joined import open_store
    from svam.files import sha256_tree
    from svam.models.generator import VideoGenerator
    from svam.models.video import SamplerConfig
    from svam.resume import resumable_run
    from svam.training.generate import choose_windows, generate_windows
    from svam.training.latents import open_latents

    device = prepare_torch(params.machine.device, params.threads, seed)
    sampler = SamplerConfig.model_validate(section.model_dump(include=set(SamplerConfig.model_fields)))
    folders = {"autoencoder": backbones / "autoencoder", "text": backbones / "text", "video": video}
    inputs = [episodes, latents, *folders.values()]
    with (
        resumable_run("generate", params, ["encode", "generate"], inputs, device) as resume,
        resume.directory(out) as partial,
    ):
        store = open_store(episodes)
        model = VideoGenerator.load(sampler, folders, params.encode.batch).frozen_on(device, params.machine.compile)
        encoded = open_latents(latents, store, model.frame_autoencoder, folders["autoencoder"])
        windows = choose_windows(store, section, model.video_model.config, seed)
        generate_windows(partial, encoded, model, windows, section, seed, sha256_tree(video), resume)


if __name__ == "__main__":
    app()
