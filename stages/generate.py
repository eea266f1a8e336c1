"""Generate one-step features and multi-step clips of the chosen windows, from the same initial noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages._command import stage_command
from svam.device import prepare_torch
from svam.params import Params


def main(
    params: Params,
    out: Annotated[Path, typer.Argument(help="Zarr group to write.")],
    episodes: Annotated[Path, typer.Option(help="Episode store of the convert stage.")],
    backbones: Annotated[Path, typer.Option(help="Directory that holds autoencoder/ and text/.")],
    video: Annotated[Path, typer.Option(help="Video model of the finetune_video stage.")],
) -> None:
    """Write F, V^ and what the distillation's baselines need to a sharded Zarr group."""
    section, seed = params.generate, params.seed

    from svam.episodes.store import EpisodeStore
    from svam.files import sha256_tree, whole_directory
    from svam.models.generator import VideoGenerator
    from svam.models.video import SamplerConfig
    from svam.resume import resumable_run
    from svam.training.generate import choose_windows, generate_windows

    device = prepare_torch(params.machine.device, params.threads, seed)
    store = EpisodeStore.open(episodes)
    sampler = SamplerConfig.model_validate(section.model_dump(include=set(SamplerConfig.model_fields)))
    folders = {"autoencoder": backbones / "autoencoder", "text": backbones / "text", "video": video}
    model = VideoGenerator.load(sampler, folders).to(device)
    windows = choose_windows(store, section, model.video_model.config, seed)
    with (
        resumable_run("generate", params, ["generate"], [episodes, *folders.values()], device) as resume,
        whole_directory(out) as partial,
    ):
        generate_windows(partial, store, model, windows, section, seed, sha256_tree(video), resume)


app = stage_command(main)

if __name__ == "__main__":
    app()
