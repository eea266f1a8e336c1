"""Latency of every variant, measured in turn within one process, so that whatever else the machine does falls on all alike."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from svam.console import console, track
from svam.evaluation.latency import measure_latency
from svam.experiments.experiments import fetch
from svam.experiments.plan import REFERENCE
from svam.experiments.records import Record, machine
from svam.files import FileError, read_json, write_json
from svam.models.svam import SVAM

ROUNDS = 15


class Latency(NamedTuple):
    """Milliseconds of one step, and what share that is of the reference's in the same rounds."""

    milliseconds: float
    share: float | None


def representatives(records: Sequence[Record]) -> dict[str, Record]:
    """Variant -> its run of the fewest demonstrations and first seed: size and seed do not change what is computed."""
    ordered = sorted(records, key=lambda record: (record.size, record.seed), reverse=True)
    return {record.variant: record for record in ordered}


def in_turn(models: Mapping[str, SVAM], rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """Variant -> {milliseconds: part -> median, share: of the reference's total, or None without the reference}.

    Each round measures one observation with every model, beginning with another one; a share is the median over the rounds of
    the share within each.
    """
    names = list(models)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in track(range(rounds), "latency", rounds):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            runs[name].append(measure_latency(models[name], 1, repeats=1))

    def share(name: str) -> float | None:
        pairs = zip(runs[name], runs.get(REFERENCE, ()), strict=False)
        shares = [ours["total"] / theirs["total"] for ours, theirs in pairs]
        return round(median(shares), 3) if shares else None

    return {
        name: {
            "milliseconds": {part: round(median(run[part] for run in found), 3) for part in found[0]}, "share": share(name),
        }
        for name, found in runs.items()
    }  # fmt: skip


def measured(records: Sequence[Record], file: Path, device: torch.device, rounds: int = ROUNDS) -> dict[str, Latency]:
    """Variant -> the latency of one step with one observation.

    Models come from DVC's cache, by the revision of their experiments. What was measured before stands in `file`, for the
    policies that it names; it is replaced as a whole, and only if no variant is lost by that, so that all numbers are of one
    process.
    """
    wanted = representatives(records)
    kept = kept_in(file, wanted)
    with tempfile.TemporaryDirectory() as scratch:
        models: dict[str, SVAM] = {}
        for variant, record in wanted.items():
            try:
                models[variant] = SVAM.load(fetch("data/svam", record.revision, Path(scratch, variant)), device)
            except FileError as error:
                console.print(f"latency of {variant}: {error}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        if not models or not kept.keys() <= models.keys():
            return kept
        found = in_turn(models, rounds)
    write_json(file, {
        "machine": machine(), "device": str(device), "threads": torch.get_num_threads(), "observations": 1, "rounds": rounds,
        "variants": {variant: {"policy": wanted[variant].policy, **latency} for variant, latency in found.items()},
    })  # fmt: skip
    return kept_in(file, wanted)


def kept_in(file: Path, wanted: Mapping[str, Record]) -> dict[str, Latency]:
    """Variant -> latency, as an earlier call wrote them to `file`, of those policies that are wanted now.

    Raises:
        FileError: the file is damaged.
    """
    if not file.is_file():
        return {}
    try:
        variants: dict[str, Any] = read_json(file)["variants"]
        return {
            name: Latency(float(value["milliseconds"]["total"]), value["share"])
            for name, value in variants.items()
            if name in wanted and value["policy"] == wanted[name].policy
        }
    except (KeyError, TypeError, AttributeError, ValueError):
        raise FileError(f"{file}: not the latencies of a comparison; delete it") from None
