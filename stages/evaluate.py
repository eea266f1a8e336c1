"""Stage `evaluate`: the policy in simulation, or offline on held-out episodes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from stages._command import stage_command
from svam.files import whole_directory, write_json
from svam.params import Params

REMOTE = ("url", "weights", "image_size", "cameras")
"""What of evaluate.remote decides the result; the rest is how it is waited for."""


@stage_command
def app(
    params: Params,
    out: Annotated[Path, typer.Argument(help="Folder for metrics.json, episodes.jsonl, and arrays: foresight/, rollouts/.")],
    episodes: Annotated[Path, typer.Option(help="Episode store: instructions, held-out episodes, the demonstrations' goals.")],
    model: Annotated[Path | None, typer.Option(help="The S-VAM folder, if that is the policy.")] = None,
) -> None:
    """Evaluate evaluate.policy with every protocol of evaluate.protocols; print how long S-VAM takes to act."""
    section = params.evaluate

    # Within the function: worker processes import this module too, and need neither torch nor models.
    from svam.episodes.joined import open_store
    from svam.evaluation.latency import print_latencies
    from svam.evaluation.policies import acting_in, evaluated_policy
    from svam.models.svam import SVAM
    from svam.resume import resumable_run

    store = open_store(episodes)
    metrics: dict[str, Any] = {"protocols": list(section.protocols), "policy": section.policy}
    with evaluated_policy(params, model) as (policy, computed_by):
        deciding = [name for name in type(section).model_fields if name != "remote"] + [f"remote.{name}" for name in REMOTE]
        sections, inputs = [f"evaluate.{name}" for name in deciding], [episodes, *([model] if model and policy else [])]
        with resumable_run("evaluate", params, sections, inputs, computed_by) as resume, whole_directory(out) as folder:
            for protocol in sorted(section.protocols):
                write = getattr(import_module(f"svam.evaluation.{protocol}"), f"write_{protocol}")
                metrics[protocol] = write(folder, *acting_in(protocol, store, policy), params, resume)
            write_json(folder / "metrics.json", metrics)
        if isinstance(policy, SVAM) and "recorded" not in policy.config.context:  # it cannot act
            print_latencies(policy, section.batch)


if __name__ == "__main__":
    app()
