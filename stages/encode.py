"""Encode the frames that training reads, once: latents of the foresight cameras."""

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
    out: Annotated[Path, typer.Argument(help="Folder to write <camera>.npy to.")],
    episodes: Annotated[Path, typer.Option(help="Episode store of the convert stage.")],
    autoencoder: Annotated[Path, typer.Option(help="The prepared autoencoder.")],
) -> None:
    """Write the latents of all frames of the foresight cameras, float16, with the rows of the store."""
    from svam.episodes.joined import open_store
    from svam.files import sha256_tree
    from svam.models.autoencoder import Autoencoder
    from svam.resume import resumable_run
    from svam.training.encode import encode_frames

    device = prepare_torch(params.machine.device, params.threads, params.seed)
    with (
        resumable_run("encode", params, ["encode"], [episodes, autoencoder], device) as resume,
        resume.directory(out) as partial,
    ):
        store, model = open_store(episodes), Autoencoder.load(autoencoder).to(device)
        encode_frames(partial, store, model, sha256_tree(autoencoder), params.encode.batch, device, resume)


if __name__ == "__main__":
    app()
