"""Fine-tune the video diffusion model on the training episodes and measure it on held-out ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages._command import stage_command
from svam.console import console
from svam.device import prepare_torch
from svam.params import Params

SAMPLES = 8
"""Held-out clips that are written for the report's figure, (n, 2, T, H, W, 3) uint8: the decoded truth, and the generation."""


@stage_command
def app(
    params: Params,
    out: Annotated[Path, typer.Argument(help="Directory to write the video model to.")],
    episodes: Annotated[Path, typer.Option(help="Episode store of the convert stage.")],
    backbones: Annotated[Path, typer.Option(help="Directory that holds autoencoder/ and text/.")],
    latents: Annotated[Path, typer.Option(help="Latents of the encode stage.")],
    live: Annotated[Path | None, typer.Option(help="Directory for the training curves (DVCLive).")] = None,
) -> None:
    """Train the spatio-temporal U-Net; write it with held-out metrics (metrics.json) and held-out clips (samples/clips.npy)."""
    from svam.episodes.joined import open_store
    from svam.episodes.store import SPLITS
    from svam.files import whole_directory, write_json
    from svam.models.autoencoder import Autoencoder
    from svam.models.text import TextEncoder
    from svam.npy import write_arrays
    from svam.resume import resumable_run
    from svam.training.finetune_video import TextTable, evaluate_video, new_video_model, train_video
    from svam.training.latents import LatentClips, open_latents

    section, seed = params.finetune_video, params.seed
    device = prepare_torch(params.machine.device, params.threads, seed)
    inputs = [episodes, latents, backbones / "autoencoder", backbones / "text"]
    with resumable_run("finetune_video", params, ["encode", "finetune_video"], inputs, device) as resume:
        store = open_store(episodes)
        autoencoder = Autoencoder.load(backbones / "autoencoder", params.encode.batch).to(device)
        encoded = open_latents(latents, store, autoencoder, backbones / "autoencoder")
        text = TextEncoder.load(backbones / "text").to(device)
        model = new_video_model(section, store, autoencoder, text, seed).to(device)
        table = TextTable.build(store, text)
        train, held_out = (LatentClips(store, s, encoded, section.frames, model.config.stride) for s in SPLITS)
        train_video(model, section, train, held_out, autoencoder, table, seed, device, live, resume, params.machine)
        metrics, pictures = evaluate_video(model, section, held_out, autoencoder, table, seed, device)
        with whole_directory(out) as partial:
            model.save(partial)
            write_json(partial / "metrics.json", metrics)
            write_arrays(partial / "samples", {"clips": pictures[:SAMPLES]})
    console.print({key: round(value, 4) for key, value in metrics.items()})


if __name__ == "__main__":
    app()
