"""What a comparison's models foresaw: without it, nobody can say why distillation bought something, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from svam.experiments.plan import REFERENCE
from svam.experiments.records import Record
from svam.report.tables import ACCEPTED, markdown_table

VIEWS = {"real": "recorded frames", "generated": "of many steps", "one_step": "of one step"}
PREDICTED = {
    "decoupler": "decoupler",
    "decoded_one_step": "teacher on one decoded step",
    "other_noise": "another noise's generation",
}


def foreseen_of(video: Mapping[str, Any], decouplers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The part of the metrics of a video model and of its decouplers (by branch) that a record keeps, all of held-out windows;
    empty without decouplers.

    "video" -> what generated clips keep of the squared error of repeating the first frame, in latents and pixels; a key of
    `ACCEPTED` -> `VIEWS` of the future -> what that teacher finds in them, against labels; a branch -> `PREDICTED` -> share of
    the squared error of repeating the current frame's tokens that it removes.
    """
    if not decouplers:
        return {}
    found = {"video": {"latents": video["latent_error_share_of_repeat"], "pixels": video["error_share_of_repeat"]}}
    for metrics in decouplers.values():
        labelled = metrics.get("teacher", {}).get("dense", {})
        views = {view: labelled[view] for view in VIEWS if view in labelled}
        kept = {key: {v: values[key] for v, values in views.items() if key in values} for key in ACCEPTED}
        found |= {key: values for key, values in kept.items() if values}
    found |= {
        branch: {name: metrics[name]["explained"] for name in PREDICTED if name in metrics}
        for branch, metrics in decouplers.items()
    }
    return {name: {key: round(float(value), 4) for key, value in values.items()} for name, values in found.items()}


def section(records: Sequence[Record]) -> list[str]:
    """The table's paragraphs on what S-VAM's runs foresaw; none where no record says."""
    runs = {}
    for record in records:
        if record.variant == REFERENCE and record.foreseen:
            pipeline = f" of pipeline {record.pipeline}" if record.pipeline is not None else ""
            named = [record.regime, f"{record.size} demonstrations a task", f"seed {record.seed}{pipeline}"]
            runs[", ".join(filter(None, named))] = record.foreseen
    if not runs:
        return []
    kept = [[name, *(f"{found['video'][key]:.2f}" for key in ("latents", "pixels"))] for name, found in runs.items()]
    seen = [
        [name, ACCEPTED[key][0], *(f"{found[key][view]:.2f}" if view in found[key] else "" for view in VIEWS)]
        for name, found in runs.items()
        for key in ACCEPTED
        if key in found
    ]
    shares = [
        [name, branch, *(f"{found[branch][key]:.0%}" if key in found[branch] else "" for key in PREDICTED)]
        for name, found in runs.items()
        for branch in ("geometric", "semantic")
        if branch in found
    ]
    parts = [
        "## What was foreseen",
        "On held-out windows. What clips of many steps keep of the squared error of repeating the first frame:",
        markdown_table(["run", "latents", "pixels"], kept),
    ]
    if seen:
        parts += [
            "What the teachers find of the recorded future, against its labels, in its own frames and in generated ones:",
            markdown_table(["run", "measure", *VIEWS.values()], seen),
        ]
    return [
        *parts,
        "The share that is removed of the squared error of repeating the current frame's tokens, where the tokens of the "
        "generation of many steps are to be foreseen. Another noise's generation misses them by what is chance in both; who "
        "predicts the mean, by what is chance in one:",
        markdown_table(["run", "teacher", *PREDICTED.values()], shares),
    ]
