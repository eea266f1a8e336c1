"""Stage `evaluate`: the policy in simulation, or offline on held-out episodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from svam.files import whole_directory, write_json
from svam.machine import console, one_line_errors, prepare_torch
from svam.params import load_params

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_line_errors
def main(
    out: Annotated[Path, typer.Argument(help="Folder for metrics.json, episodes.jsonl, foresight.npz and films/.")],
    model: Annotated[Path, typer.Option(help="The S-VAM folder that train_policy wrote.")],
    episodes: Annotated[Path, typer.Option(help="Episode store: instructions, held-out episodes, the demonstrations' goals.")],
    latency: Annotated[Path | None, typer.Option(help="File for timings, which differ from run to run.")] = None,
    params: Annotated[Path, typer.Option(help="Parameter file: `evaluate`, `seed`, `threads`.")] = Path("params.yaml"),
) -> None:
    """Evaluate the policy MODEL with every protocol of evaluate.protocols."""
    everything = load_params(params)
    section, seed = everything.evaluate, everything.seed

    # Within the function: worker processes import this module too, and need neither torch nor models.
    import numpy as np

    from svam.episodes.store import EpisodeStore
    from svam.models.svam import SVAM
    from svam.simulation.latency import measure_latency
    from svam.simulation.offline import evaluate_offline, mean_errors

    store = EpisodeStore.open(episodes)
    if "metaworld" in section.protocols:
        from svam.report.films import film_rollout
        from svam.simulation.closed_loop import check_tasks, foresight_of, metrics_of, record_of, run

        check_tasks(section.tasks, store)
    device = prepare_torch(everything.machine.device, everything.threads, seed)
    svam = SVAM.load(model, device)
    metrics: dict[str, Any] = {"protocols": list(section.protocols)}
    with whole_directory(out) as folder:
        if "offline" in section.protocols:
            metrics["offline"], pictures = evaluate_offline(store, svam, section, seed)
            np.savez_compressed(folder / "foresight.npz", **pictures)  # type: ignore[arg-type]
            console.print(f"offline, mean absolute action error: {mean_errors(metrics['offline'])}", highlight=False)
        if "metaworld" in section.protocols:
            outcomes = run(
                store, svam, section, camera=svam.camera, proprioception=svam.needs_proprioception, seed=seed,
                workers=everything.machine.workers,
            )  # fmt: skip
            metrics["metaworld"] = metrics_of(outcomes, section)
            lines = [json.dumps(record_of(o), sort_keys=True) for rows in outcomes.values() for o in rows]
            (folder / "episodes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            for played in outcomes["policy"]:
                if played.frames is not None:
                    film = folder / "films" / f"{played.plan.task}_{played.plan.index}.mp4"
                    foreseen = foresight_of(svam, played, seed, section.batch)
                    film_rollout(film, played.frames, played.calls, foreseen, store.rate_hz)
            macro = {row: f"{value['macro']['success']:.0%}" for row, value in metrics["metaworld"]["rows"].items()}
            console.print(f"mean success over tasks: {macro}", highlight=False)
        write_json(folder / "metrics.json", metrics)
    times = {f"batch {size}": measure_latency(svam, size) for size in sorted({1, section.batch})}
    for name, parts in times.items():
        console.print(f"latency in ms, {name}: " + ", ".join(f"{k} {v:.1f}" for k, v in parts.items()), highlight=False)
    if latency is not None:
        write_json(latency, {"device": str(device), "threads": everything.threads, "milliseconds": times})


if __name__ == "__main__":
    app()
