"""The table of a comparison, from the records of its experiments alone: Markdown, CSV and a figure."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from svam.evaluation.scores import rate_of
from svam.experiments.plan import REFERENCE, VARIANTS
from svam.experiments.records import Record, read_records
from svam.experiments.statistics import LEVEL, RESAMPLES, Pairs, difference, holm, mcnemar, only_one, paired
from svam.files import FileError, whole_file
from svam.report.figures import save
from svam.report.page import Section, divided, rendered
from svam.report.tables import markdown_table

COSTS = {
    "parameters": "parameters trained with the policy", "policy_steps": "policy steps", "batch": "batch",
    "video_seconds": "video model, s", "distillation_seconds": "distillation, s", "policy_seconds": "policy, s",
    "evaluation_seconds": "evaluation, s", "latency_milliseconds": "latency, ms",
}  # fmt: skip
WHICH = ["variant", "demonstrations a task"]
POINTS = "difference to S-VAM, points"
DIFFERENCE = ("difference", "difference_low", "difference_high")
RunRow = dict[str, Any]
"""A run, with the columns of table.csv; None for what was not compared or not measured."""


def compared(records: Sequence[Record]) -> tuple[list[RunRow], list[RunRow]]:
    """A row for each run, by size, seed and variant, beside the reference's run of the same size and seed; and a row for each
    variant and size whose seeds were compared on the same goals: label, size, seeds, `DIFFERENCE`.

    Raises:
        FileError: two runs that belong together had other goals or budgets, or a record is of an unknown variant.
    """
    unknown = [record for record in records if record.variant not in VARIANTS]
    if unknown:
        raise FileError(f"{unknown[0].name}: no variant is called {unknown[0].variant!r} any more; delete its record")
    references = {(record.size, record.seed): record for record in records if record.variant == REFERENCE}
    rows: list[RunRow] = []
    several: dict[Any, dict[int, Pairs]] = {}
    for record in sorted(records, key=lambda record: (record.size, record.seed, list(VARIANTS).index(record.variant))):
        row: RunRow = {
            "variant": record.variant, "label": VARIANTS[record.variant]["label"], "episodes_per_task": record.size,
            "seed": record.seed, **rate_of([episode.success for episode in record.episodes]),
            **dict.fromkeys(("pairs", *DIFFERENCE, "only_variant", "only_svam", "p_corrected")),
            "verdict": "", "parameters": record.parameters,
            **{key: record.budget[key] for key in ("policy_steps", "batch", "demonstrations")},
            "video_seconds": record.seconds("finetune_video"),
            "distillation_seconds": record.seconds("generate", "cache_teacher", "distill"),
            "policy_seconds": record.seconds("train_policy"), "evaluation_seconds": record.seconds("evaluate"),
            "latency_milliseconds": record.latency, "policy": record.policy,
        }  # fmt: skip
        reference = references.get((record.size, record.seed))
        if record.variant != REFERENCE and reference is not None:
            pairs = paired(record, reference)
            goals = tuple((episode.task, episode.index, episode.seed) for episode in record.episodes)
            several.setdefault((row["label"], record.size, goals), {})[record.seed] = pairs
            row |= zip(DIFFERENCE, difference([pairs]), strict=True)
            row |= zip(("only_variant", "only_svam"), only_one(pairs), strict=True)
            row["pairs"] = sum(map(len, pairs.values()))
        rows.append(row)
    tested = [row for row in rows if row["pairs"] is not None]
    for row, p in zip(tested, holm([mcnemar(row["only_variant"], row["only_svam"]) for row in tested]), strict=True):
        ahead = row["label"] if row["difference"] > 0 else VARIANTS[REFERENCE]["label"]
        row |= {"p_corrected": p, "verdict": f"{ahead} ahead" if p < LEVEL else "not distinguishable"}
    means = [
        {"label": label, "size": size, "seeds": [*seeds], **dict(zip(DIFFERENCE, difference([*seeds.values()]), strict=True))}
        for (label, size, _), seeds in several.items()
        if len(seeds) > 1
    ]
    return rows, means


def _points(row: Mapping[str, Any]) -> str:
    """The difference and its interval, in percentage points."""
    middle, low, high = (100 * row[key] for key in DIFFERENCE)
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


def markdown(rows: Sequence[RunRow], means: Sequence[RunRow], note: str | None, machines: Sequence[str]) -> str:
    """The whole comparison as one Markdown page. note: printed above it. machines: on which the runs were made."""
    tested = [row for row in rows if row["pairs"] is not None]
    lines = []
    for row in rows:
        interval = f"{100 * row['success']:.0f} % [{100 * row['low']:.0f}, {100 * row['high']:.0f}] of {row['episodes']}"
        cells = [row["label"], str(row["episodes_per_task"]), str(row["seed"]), interval, "", "", "", row["verdict"]]
        if row["pairs"] is not None:
            cells[4:7] = [_points(row), f"{row['only_variant']} : {row['only_svam']}", f"{row['p_corrected']:.3g}"]
        lines.append(cells)
    header = [*WHICH, "seed", "success", POINTS, "only it : only S-VAM", "p, corrected", "verdict"]
    parts = [
        "# Variants compared",
        *([note] if note else []),
        f"{len(rows)} runs. Success at any step, on goals that no demonstration has, with 95 % Wilson intervals. Differences "
        f"are paired by goal; their 95 % intervals resample goals within tasks ({RESAMPLES} times). p: McNemar's exact test, "
        f"Holm-corrected for all comparisons here ({len(tested)}); below {LEVEL} the one that reached more goals is ahead. "
        "Intervals are not corrected.",
        markdown_table(header, lines),
    ]
    if means:
        cells = [[mean["label"], str(mean["size"]), ", ".join(map(str, mean["seeds"])), _points(mean)] for mean in means]
        parts += ["## Mean of the training seeds", markdown_table([*WHICH, "seeds", POINTS], cells)]
    parts += [
        "## What can be said",
        f"Intervals and tests are about these policies, of {len({row['seed'] for row in rows})} training seeds, on such goals; "
        "so few seeds carry no claim about training in general.",
        f"The comparisons rest on {' or '.join(map(str, sorted({row['pairs'] for row in tested})))} pairs each. \"Not "
        "distinguishable\" is not \"equal\": 100 pairs cannot see a difference of 10 points, since chance alone makes one "
        "where only one of two reaches a quarter of the goals.",
        "## Costs",
        markdown_table(["variant", *COSTS.values()], _costs(rows)),
        f"Medians of a variant's runs ({'; '.join(machines)}), with whatever else the machine did; video and distillation are "
        "shared by all runs that have them. Latency: one observation to one chunk of actions.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _costs(rows: Sequence[RunRow]) -> list[list[str]]:
    lines = []
    for label in dict.fromkeys(row["label"] for row in rows):
        known = {key: [row[key] for row in rows if row["label"] == label and row[key] is not None] for key in COSTS}
        formats = {key: "{:,.1f}" if key == "latency_milliseconds" else "{:,.0f}" for key in COSTS}
        lines.append([label, *(formats[key].format(median(v)) if v else "not measured" for key, v in known.items())])
    return lines


def figure(rows: Sequence[RunRow]) -> Figure:
    """Success of every run by data size, and paired differences to S-VAM, with their 95 % intervals."""
    sizes = sorted({row["episodes_per_task"] for row in rows})
    names = [variant for variant in VARIANTS if any(row["variant"] == variant for row in rows)]
    tested = [row for row in reversed(rows) if row["pairs"] is not None]
    drawn = Figure(figsize=(13.0, max(4.0, 0.28 * len(rows) + 1.5)), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=[1.0, 1.2])
    point = {"fmt": "o", "capsize": 2, "markersize": 4}
    for number, name in enumerate(names):
        mine = [row for row in rows if row["variant"] == name]
        shift = (number - (len(names) - 1) / 2) * 0.8 / len(names)
        places = [sizes.index(row["episodes_per_task"]) + shift + 0.02 * (k % 2) for k, row in enumerate(mine)]
        rates, low, high = np.array([[row[key] for key in ("success", "low", "high")] for row in mine]).T
        left.errorbar(places, rates, [rates - low, high - rates], color=f"C{number}", label=VARIANTS[name]["label"], **point)
    left.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    left.set(xlim=(-0.5, len(sizes) - 0.5), ylim=(-0.02, 1.02), xlabel=WHICH[1], ylabel="success at any step")
    left.legend(fontsize=7)
    for place, row in enumerate(tested):
        middle, low, high = (100 * row[key] for key in DIFFERENCE)
        colour = f"C{names.index(row['variant'])}"
        filled = "white" if row["p_corrected"] >= LEVEL else colour
        right.errorbar(middle, place, None, [[middle - low], [high - middle]], color=colour, markerfacecolor=filled, **point)
    right.axvline(0.0, color="#333333", linewidth=1)
    labels = [f"{row['label']}, {row['episodes_per_task']}, seed {row['seed']}" for row in tested]
    right.set_yticks(range(len(tested)), labels, fontsize=7)
    right.set_xlabel(f"{POINTS} (hollow: not distinguishable)")
    return drawn


def write(folder: Path) -> str:
    """Write table.md, table.csv, figure.png and index.html beside the records of `folder`; returns the Markdown.

    Raises:
        FileError: there are no records, or they cannot be compared.
    """
    note, records = read_records(folder)
    if not records:
        raise FileError(f"{folder}: no records of finished experiments; `make compare` makes them")
    rows, means = compared(records)
    text = markdown(rows, means, note, sorted({record.machine for record in records}))
    with whole_file(folder / "table.md") as file:
        file.write_text(text, encoding="utf-8")
    with whole_file(folder / "table.csv") as file, file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    save(figure(rows), folder / "figure.png", dpi=100)
    title, head, below = divided(text)
    caption = "Success by number of demonstrations, and paired differences to S-VAM, with their 95 % intervals."
    sections = [Section("All runs", pictures=[("figure.png", caption)]), *(Section(*part) for part in below.items())]
    write_html(folder, f"{title}: {folder.name}", f"{head}\n\n[All comparisons](../index.html)", sections)
    return text


def write_overview(folder: Path) -> None:
    """Write index.html, which leads to the page of each comparison in `folder`."""
    links = [f"- [{page.parent.name}]({page.parent.name}/index.html)" for page in sorted(folder.glob("*/index.html"))]
    write_html(folder, "Comparisons", "\n".join([*links, "- [the run that lies here](../report/index.html)"]), [])


def write_html(folder: Path, title: str, introduction: str, sections: Sequence[Section]) -> None:
    with whole_file(folder / "index.html") as file:
        file.write_text(rendered(title, introduction, sections), encoding="utf-8")
