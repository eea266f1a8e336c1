"""Latency of every variant, measured in turn within one process, so that whatever else the machine does falls on all alike."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from svam.comparison.experiments import fetch
from svam.comparison.records import Record, machine
from svam.files import FileError, read_json, write_json
from svam.machine import console, track
from svam.models.svam import SVAM
from svam.simulation.latency import measure_latency

ROUNDS = 15


def representatives(records: Sequence[Record]) -> dict[str, Record]:
    """Variant -> its run of the fewest demonstrations and first seed: size and seed do not change what is computed."""
    ordered = sorted(records, key=lambda record: (record.size, record.seed), reverse=True)
    return {record.variant: record for record in ordered}


def in_turn(models: Mapping[str, SVAM], rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Variant -> part -> median milliseconds of one observation; each round measures all, beginning with another one."""
    names = list(models)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in track(range(rounds), "latency", rounds):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            runs[name].append(measure_latency(models[name], 1, repeats=1))
    return {name: {part: median(run[part] for run in found) for part in found[0]} for name, found in runs.items()}


def measured(records: Sequence[Record], file: Path, device: torch.device, rounds: int = ROUNDS) -> dict[str, float]:
    """Variant -> milliseconds of one step with one observation.

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
        "variants": {
            variant: {"policy": wanted[variant].policy, "milliseconds": {part: round(v, 3) for part, v in parts.items()}}
            for variant, parts in found.items()
        },
    })  # fmt: skip
    return {variant: parts["total"] for variant, parts in found.items()}


def kept_in(file: Path, wanted: Mapping[str, Record]) -> dict[str, float]:
    """Variant -> milliseconds, as an earlier call wrote them to `file`, of those policies that are wanted now.

    Raises:
        FileError: the file is damaged.
    """
    if not file.is_file():
        return {}
    try:
        variants: dict[str, Any] = read_json(file)["variants"]
        return {
            name: float(value["milliseconds"]["total"])
            for name, value in variants.items()
            if name in wanted and value["policy"] == wanted[name].policy
        }
    except (KeyError, TypeError, AttributeError, ValueError):
        raise FileError(f"{file}: not the latencies of a comparison; delete it") from None
