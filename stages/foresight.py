"""Stage `foresight`: what foresight holds. Is there a gap to distil, and what do the foreseen features and the policy see?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages._command import stage_command
from svam.console import console
from svam.device import prepare_torch
from svam.params import Params


@stage_command
def app(
    params: Params,
    out: Annotated[Path, typer.Argument(help="Folder for metrics.json, foresight.md, the figures (PNG) and plots/ (JSON).")],
    episodes: Annotated[Path, typer.Option(help="Episode store that the windows were drawn from.")],
    generated: Annotated[Path, typer.Option(help="Windows of the generate stage.")],
    backbones: Annotated[Path, typer.Option(help="Folder that holds the four backbones.")],
    video: Annotated[Path, typer.Option(help="Video model of the finetune_video stage.")],
    decouplers: Annotated[Path, typer.Option(help="Folder of the distill stage that holds one folder per branch.")],
    policy: Annotated[Path, typer.Option(help="The S-VAM folder that train_policy wrote.")],
) -> None:
    """Measure held-out windows and draw what the foresight shows; print the verdict."""
    from svam.analysis.foresight import AnalysisInputs, write_analysis
    from svam.episodes.joined import open_store
    from svam.files import whole_directory
    from svam.models.foresight import BRANCHES, part_folders
    from svam.models.svam import SVAM
    from svam.training.distill_data import GeneratedWindows
    from svam.training.one_step import load_for_windows

    device = prepare_torch(params.machine.device, params.threads, params.seed)
    windows, branches = GeneratedWindows(generated), params.distill.branches
    folders = part_folders(backbones, video, decouplers)
    model = load_for_windows(windows, folders, BRANCHES, branches).frozen_on(device)
    inputs = AnalysisInputs(windows, open_store(episodes), model, branches, params.foresight, params.seed)

    def acting() -> SVAM:
        model.to("meta")  # the policy brings frozen parts of its own: two copies of published ones fill a card
        loaded = SVAM.load(policy)
        loaded.foresight.frozen_on(device)
        return loaded.to(device)

    with whole_directory(out) as folder:
        metrics = write_analysis(folder, inputs, acting)
    for sentence in [*metrics["left_out"], metrics["gap"]["verdict"], f"tables and figures: {out}/foresight.md, {out}/*.png"]:
        console.print(sentence)


if __name__ == "__main__":
    app()
