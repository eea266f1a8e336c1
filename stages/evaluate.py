"""Stage `evaluate`: the policy in simulation, or offline on held-out episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stages._command import stage_command
from svam.device import prepare_torch
from svam.files import whole_directory, write_json
from svam.params import Params


def main(
    params: Params,
    out: Annotated[Path, typer.Argument(help="Folder for metrics.json, episodes.jsonl, and arrays: foresight/, rollouts/.")],
    model: Annotated[Path, typer.Option(help="The S-VAM folder that train_policy wrote.")],
    episodes: Annotated[Path, typer.Option(help="Episode store: instructions, held-out episodes, the demonstrations' goals.")],
) -> None:
    """Evaluate the policy MODEL with every protocol of evaluate.protocols, and print how long it takes to act."""
    section = params.evaluate

    # Within the function: worker processes import this module too, and need neither torch nor models.
    from svam.episodes.store import EpisodeStore
    from svam.evaluation.latency import print_latencies
    from svam.evaluation.metaworld import check_tasks, write_metaworld
    from svam.evaluation.offline import write_offline
    from svam.models.svam import SVAM
    from svam.resume import resumable_run

    store = EpisodeStore.open(episodes)
    if "metaworld" in section.protocols:
        check_tasks(section.metaworld.tasks, store)
    device = prepare_torch(params.machine.device, params.threads, params.seed)
    svam = SVAM.load(model, device)
    write = {"offline": write_offline, "metaworld": write_metaworld}
    metrics: dict[str, Any] = {"protocols": list(section.protocols)}
    with resumable_run("evaluate", params, ["evaluate"], [model, episodes], device) as resume:
        with whole_directory(out) as folder:
            for protocol in (name for name in write if name in section.protocols):
                metrics[protocol] = write[protocol](folder, store, svam, params, resume)
            write_json(folder / "metrics.json", metrics)
        print_latencies(svam, section.batch)


app = stage_command(main)

if __name__ == "__main__":
    app()
