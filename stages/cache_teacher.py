"""Cache what one teacher sees in the generated clips (targets) and in the current frame (reference)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages._command import stage_command
from svam.console import console
from svam.device import prepare_torch
from svam.params import Branch, Params


@stage_command
def app(
    params: Params,
    branch: Annotated[Branch, typer.Argument(help="Which teacher.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    generated: Annotated[Path, typer.Option(help="Windows of the generate stage.")],
    episodes: Annotated[Path, typer.Option(help="Episode store that the windows were drawn from.")],
    backbones: Annotated[Path, typer.Option(help="Directory that holds the teacher, named as the branch.")],
) -> None:
    """Write targets and references as a folder of arrays; print how good the teacher still is on generated frames."""
    from svam.episodes.joined import open_store
    from svam.models.teachers import Teacher
    from svam.resume import resumable_run
    from svam.training.cache_teacher import cache_windows
    from svam.training.distill_data import GeneratedWindows

    device = prepare_torch(params.machine.device, params.threads, params.seed)
    section, target = params.cache_teacher, params.distill.target
    inputs = [generated, episodes, backbones / branch]
    with (
        resumable_run(f"cache_teacher@{branch}", params, ["cache_teacher", "distill.target"], inputs, device) as resume,
        resume.directory(out) as partial,
    ):
        windows, store = GeneratedWindows(generated), open_store(episodes)
        teacher = Teacher.load(backbones / branch).to(device)
        metrics = cache_windows(partial, windows, store, teacher, branch, section, target, device, resume)
    for kind, values in metrics["reference"].items():
        used = " (used)" if kind == section.reference else ""
        console.print(f"reference on the {kind}{used}: centred cosine to the targets " + _listed(values))
    for view, values in metrics["dense"].items():
        console.print(f"{branch} teacher on {view} frames: " + _listed(values))


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


if __name__ == "__main__":
    app()
