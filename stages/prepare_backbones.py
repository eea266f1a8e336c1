"""Stage: one frozen backbone (autoencoder, text, geometric or semantic), trained in-domain or imported."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import typer

from stages._command import stage_command
from svam.device import prepare_torch
from svam.episodes.joined import open_store
from svam.files import whole_directory, write_json
from svam.params import Params
from svam.resume import resumable_run
from svam.seeds import seed_of

Part = Literal["autoencoder", "text", "geometric", "semantic"]
"""The four backbones, as the keys of `prepare_backbones` in the params."""


@stage_command
def app(
    params: Params,
    part: Annotated[Part, typer.Argument(help="Which backbone to prepare.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: published layout, svam.json and metrics.json.")],
    episodes: Annotated[Path, typer.Option(help="Episode store of the convert stage; read for in-domain training only.")],
    autoencoder: Annotated[Path | None, typer.Option(help="The prepared autoencoder; in-domain teachers need it.")] = None,
    live: Annotated[Path | None, typer.Option(help="Directory for the training curves (DVCLive).")] = None,
) -> None:
    """Prepare one frozen backbone: train a small one on the episodes, or import published weights, as the params say."""
    seed = seed_of(params.seed, "prepare_backbones", part)
    device = prepare_torch(params.machine.device, params.threads, seed)
    # One module per kind, so that a change to the teachers' training does not re-run the autoencoder's.
    kind = "teacher" if part in ("geometric", "semantic") else part
    module = import_module(f"svam.training.prepare_backbones.{kind}")
    section = getattr(params.prepare_backbones, part)
    if live is not None:
        live.mkdir(parents=True, exist_ok=True)  # an output of the stage, also where nothing is trained
    inputs = [episodes, *([autoencoder] if autoencoder else [])]
    stage = f"prepare_backbones_{kind}" + ("" if kind == part else f"@{part}")
    own = [part, autoencoder, params.encode.batch] if kind == "teacher" else []
    with resumable_run(stage, params, [f"prepare_backbones.{part}", *["encode"] * bool(own)], inputs, device) as resume:
        if section.source == "pretrained":
            backbone, metrics = module.published(section, f"prepare_backbones.{part}"), {}
        else:
            backbone, metrics = module.train(section, open_store(episodes), seed, device, live, resume, *own)
        with whole_directory(out) as folder:
            backbone.save(folder)
            write_json(folder / "metrics.json", metrics)


if __name__ == "__main__":
    app()
