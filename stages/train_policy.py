"""Train the Uni-Perceiver and the action diffusion transformer on foresight; write the whole S-VAM as one folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from stages._command import stage_command
from svam.device import prepare_torch
from svam.params import Params


@stage_command
def app(
    params: Params,
    out: Annotated[Path, typer.Argument(help="Folder of the S-VAM to write.")],
    episodes: Annotated[Path, typer.Option(help="Episode store of the convert stage.")],
    backbones: Annotated[Path, typer.Option(help="Folder that holds autoencoder/, text/, geometric/ and semantic/.")],
    video: Annotated[Path, typer.Option(help="Video model of the finetune_video stage.")],
    decouplers: Annotated[Path, typer.Option(help="Folder of the distill stage that holds one folder per branch.")],
    cache: Annotated[Path, typer.Option(help="Feature cache; relative to the project's root, also in temporary experiments.")],
    live: Annotated[Path | None, typer.Option(help="Folder for DVCLive's curves.")] = None,
) -> None:
    """Load just the frozen parts that `train_policy.context` needs, cache or compute their features, train, write the S-VAM."""
    section = params.train_policy

    from svam.episodes.joined import open_store
    from svam.models.foresight import part_folders
    from svam.resume import resumable_run
    from svam.training.feature_cache import FeatureCache
    from svam.training.train_policy import load_foresight, train

    device = prepare_torch(params.machine.device, params.threads, params.seed)
    store = open_store(episodes)
    folders = part_folders(backbones, video, decouplers)
    foresight = load_foresight(section, params.generate, folders).frozen_on(device, params.machine.compile)
    root = Path(os.environ.get("DVC_ROOT", "."))  # in a temporary experiment: the original project, whose cache is shared
    features = FeatureCache(root / cache, params.machine.cache_gb)
    sections, inputs = ["train_policy", "generate"], [episodes, *folders.values()]
    with resumable_run("train_policy", params, sections, inputs, device) as resume:
        svam = train(store, foresight, folders, section, features, params.seed, device, live, resume, params.machine)
        svam.save(out, folders)


if __name__ == "__main__":
    app()
