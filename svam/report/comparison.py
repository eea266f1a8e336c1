"""The comparison's table: what was found in the records of finished runs, as Markdown, CSV and a figure."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from svam.evaluation.scores import rate_of
from svam.experiments.plan import REFERENCE, VARIANTS
from svam.experiments.records import Record
from svam.experiments.statistics import LEVEL, RESAMPLES, Pairs, bootstrap, holm, mcnemar, paired
from svam.files import FileError, whole_file
from svam.report.figures import save
from svam.report.latencies import Latency
from svam.report.tables import markdown_table

RANK = {variant: rank for rank, variant in enumerate(VARIANTS)}
NOT_MEASURED = "not measured"
DIFFERENCE = "difference to S-VAM, points"


@dataclass(frozen=True)
class Line:
    """A run beside the reference's run of the same size and seed; without one, or for the reference itself, `pairs` is None.

    difference: of success rates, with a 95 % interval; p: McNemar's, corrected for the number of comparisons.
    """

    record: Record
    pairs: Pairs | None = None
    interval: tuple[float, float] = (0.0, 0.0)
    p: float = 1.0

    @property
    def label(self) -> str:
        """What tables call the variant."""
        return VARIANTS[self.record.variant].label

    @property
    def success(self) -> dict[str, Any]:
        """`scores.rate_of` all its episodes."""
        return rate_of([episode.success for episode in self.record.episodes])

    @property
    def verdict(self) -> str:
        """Which of the two was better, if that can be said."""
        if self.pairs is None:
            return ""
        if self.p >= LEVEL:
            return "not distinguishable"
        return f"{self.label if self.pairs.difference > 0 else VARIANTS[REFERENCE].label} ahead"


def lines_of(records: Sequence[Record]) -> list[Line]:
    """One line for each run, by size, seed and variant.

    Raises:
        FileError: two runs that belong together had other goals or budgets, or a record is of an unknown variant.
    """
    unknown = [record for record in records if record.variant not in VARIANTS]
    if unknown:
        raise FileError(f"{unknown[0].name}: no variant is called {unknown[0].variant!r} any more; delete its record")
    ranked = sorted(records, key=lambda record: (record.size, record.seed, RANK[record.variant]))
    references = {(record.size, record.seed): record for record in records if record.variant == REFERENCE}
    pairs = [
        paired(record, references[record.size, record.seed])
        if record.variant != REFERENCE and (record.size, record.seed) in references
        else None
        for record in ranked
    ]
    corrected = iter(holm([mcnemar(p.only_variant, p.only_reference) for p in pairs if p is not None]))
    return [
        Line(record) if p is None else Line(record, p, bootstrap([p]), next(corrected))
        for record, p in zip(ranked, pairs, strict=True)
    ]


def over_seeds(lines: Sequence[Line]) -> list[tuple[str, int, list[int], float, tuple[float, float]]]:
    """(label, size, seeds, mean difference, its interval) where several seeds of a variant were compared on the same goals."""
    groups: dict[tuple[str, int], list[Line]] = {}
    for line in lines:
        if line.pairs is not None:
            groups.setdefault((line.label, line.record.size), []).append(line)
    found = []
    for (label, size), group in groups.items():
        pairs = [line.pairs for line in group if line.pairs is not None]
        goals = {tuple((e.task, e.index, e.seed) for e in line.record.episodes) for line in group}
        if len(group) > 1 and len(goals) == 1:
            mean = sum(p.difference for p in pairs) / len(pairs)
            found.append((label, size, [line.record.seed for line in group], mean, bootstrap(pairs)))
    return found


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _points(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:+.1f} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def _seconds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{float(np.median(known)):.0f}" if known else NOT_MEASURED


def markdown(lines: Sequence[Line], latency: Mapping[str, Latency], planned: int) -> str:
    """The whole comparison as one Markdown page. `planned`: the runs that `params.yaml` asks for."""
    compared = [line for line in lines if line.pairs is not None]
    success = []
    for line in lines:
        rate, p = line.success, line.pairs
        cells = [line.label, str(line.record.size), str(line.record.seed)]
        cells.append(f"{_percent(rate['success'])} [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}] of {rate['episodes']}")
        if p is None:
            cells += ["", "", "", "" if line.record.variant == REFERENCE else "no S-VAM of this size and seed yet"]
        else:
            only = f"{p.only_variant} : {p.only_reference}"
            cells += [_points(p.difference, line.interval), only, f"{line.p:.3g}", line.verdict]
        success.append(cells)
    which = ["variant", "demonstrations a task"]
    header = [*which, "seed", "success", DIFFERENCE, "only it : only S-VAM", "p, corrected", "verdict"]
    parts = [
        "# Variants compared",
        f"{len(lines)} of {planned} planned runs are finished. Success at any step, on goals that no demonstration has, with "
        "95 % Wilson intervals. Differences are paired by goal; their 95 % intervals resample goals within tasks "
        f"({RESAMPLES} times). p: McNemar's exact test, Holm-corrected for all comparisons here ({len(compared)}); below "
        f"{LEVEL} the one that reached more goals is ahead. Intervals are not corrected.",
        markdown_table(header, success),
    ]
    means = [[label, str(size), ", ".join(map(str, seeds)), _points(m, i)] for label, size, seeds, m, i in over_seeds(lines)]
    if means:
        parts += ["## Mean of the training seeds", markdown_table([*which, "seeds", DIFFERENCE], means)]
    parts += ["## What can be said", *cautions(lines), "## Costs", _costs(lines, latency)]
    return "\n\n".join(parts) + "\n"


def cautions(lines: Sequence[Line]) -> list[str]:
    """What the numbers do not say."""
    seeds = sorted({line.record.seed for line in lines})
    pairs = [len(line.pairs.all) for line in lines if line.pairs is not None]
    text = [
        f"The policies were trained with {len(seeds)} seed{'s' * (len(seeds) > 1)}: intervals and tests are about these "
        "policies on such goals, and so few seeds carry no claim about training in general."
    ]
    if pairs:
        count = f"{min(pairs)} to {max(pairs)}" if min(pairs) < max(pairs) else str(pairs[0])
        text.append(
            f'The comparisons rest on {count} pairs each. "Not distinguishable" is not "equal": 100 pairs '
            "cannot see a difference of 10 points, since chance alone makes one where only one of two reaches a quarter of "
            "the goals."
        )
    return text


def _costs(lines: Sequence[Line], latency: Mapping[str, Latency]) -> str:
    """Parameters, steps, seconds and latency of each variant; seconds are medians over its runs."""
    rows = []
    for variant in dict.fromkeys(line.record.variant for line in lines):
        mine = [line.record for line in lines if line.record.variant == variant]
        first, time = mine[0], latency.get(variant)
        share = f" ({time.share:.2f})" if time is not None and time.share is not None else ""
        rows.append([
            VARIANTS[variant].label, " / ".join(f"{n:,}" for n in sorted({r.parameters for r in mine})),
            f"{first.budget.policy_steps} x {first.budget.batch}", _seconds([r.video for r in mine]),
            _seconds([r.distillation for r in mine]), _seconds([r.policy_training for r in mine]),
            _seconds([r.evaluation for r in mine]),
            NOT_MEASURED if time is None else f"{time.milliseconds:.1f}{share}",
        ])  # fmt: skip
    header = ["variant", "parameters trained with the policy", "policy steps x batch", "video model, s", "distillation, s",
              "policy, s", "evaluation, s", "latency, ms (share)"]  # fmt: skip
    machines = sorted({line.record.machine for line in lines})
    note = (
        f"Seconds are medians of a variant's runs ({'; '.join(machines)}), with whatever else the machine did; video and "
        "distillation are shared by all runs that have them. Latency: one observation to one chunk of actions, all variants in "
        "turn; in brackets the median share of S-VAM's in the same round."
    )
    return f"{markdown_table(header, rows)}\n\n{note}"


POINT: Mapping[str, Any] = {"fmt": "o", "capsize": 2, "markersize": 4}
COLUMNS = (
    "variant", "label", "episodes_per_task", "seed", "successes", "episodes", "success", "low", "high", "pairs", "difference",
    "difference_low", "difference_high", "only_variant", "only_svam", "p_corrected", "verdict", "parameters", "policy_steps",
    "batch", "demonstrations", "video_seconds", "distillation_seconds", "policy_seconds", "evaluation_seconds",
    "latency_milliseconds", "policy",
)  # fmt: skip


def csv_rows(lines: Sequence[Line], latency: Mapping[str, Latency]) -> list[dict[str, Any]]:
    """One row of `COLUMNS` for each run; what was not compared or measured is empty."""
    rows = []
    for line in lines:
        r, rate, p = line.record, line.success, line.pairs
        row: dict[str, Any] = {
            "variant": r.variant, "label": line.label, "episodes_per_task": r.size, "seed": r.seed, **rate,
            "verdict": line.verdict, "parameters": r.parameters, "policy_steps": r.budget.policy_steps, "batch": r.budget.batch,
            "demonstrations": r.budget.demonstrations, "video_seconds": r.video, "distillation_seconds": r.distillation,
            "policy_seconds": r.policy_training, "evaluation_seconds": r.evaluation,
            "latency_milliseconds": latency[r.variant].milliseconds if r.variant in latency else None, "policy": r.policy,
        }  # fmt: skip
        if p is not None:
            row |= {
                "pairs": len(p.all), "difference": p.difference, "difference_low": line.interval[0],
                "difference_high": line.interval[1], "only_variant": p.only_variant, "only_svam": p.only_reference,
                "p_corrected": line.p,
            }  # fmt: skip
        rows.append({name: round(v, 6) if isinstance(v := row.get(name), float) else v for name in COLUMNS})
    return rows


def figure(lines: Sequence[Line]) -> Figure:
    """Success of every run by data size, and paired differences to S-VAM, with their 95 % intervals."""
    variants = sorted({line.record.variant for line in lines}, key=RANK.__getitem__)
    sizes = sorted({line.record.size for line in lines})
    drawn = Figure(figsize=(13.0, max(4.0, 0.28 * len(lines) + 1.5)), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=[1.0, 1.2])
    colours = {variant: f"C{number % 10}" for number, variant in enumerate(variants)}
    for number, variant in enumerate(variants):
        mine = [line for line in lines if line.record.variant == variant]
        rates = np.array([line.success["success"] for line in mine])
        ends = np.abs(np.array([[line.success["low"], line.success["high"]] for line in mine]).T - rates)
        shift = (number - (len(variants) - 1) / 2) * 0.8 / len(variants)
        places = [sizes.index(line.record.size) + shift + 0.02 * (k % 2) for k, line in enumerate(mine)]
        left.errorbar(places, rates, yerr=ends, color=colours[variant], label=VARIANTS[variant].label, **POINT)
    left.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    left.set_xlim(-0.5, len(sizes) - 0.5)
    left.set_xlabel("demonstrations a task")
    left.set_ylabel("success at any step")
    left.set_ylim(-0.02, 1.02)
    left.legend(fontsize=7)
    compared = [line for line in lines if line.pairs is not None]
    for place, line in enumerate(reversed(compared)):
        assert line.pairs is not None
        ends = np.abs(np.array([[end] for end in line.interval]) - line.pairs.difference) * 100
        colour = colours[line.record.variant]
        filled = "white" if line.p >= LEVEL else colour
        right.errorbar([100 * line.pairs.difference], [place], xerr=ends, color=colour, markerfacecolor=filled, **POINT)
    right.axvline(0.0, color="#333333", linewidth=1)
    names = [f"{line.label}, {line.record.size}, seed {line.record.seed}" for line in reversed(compared)]
    right.set_yticks(range(len(compared)), names, fontsize=7)
    right.set_xlabel("difference to S-VAM, points (hollow: not distinguishable)")
    return drawn


def write(folder: Path, lines: Sequence[Line], latency: Mapping[str, Latency], planned: int, dpi: int) -> str:
    """Write table.md, table.csv and figure.png to `folder`; returns the Markdown."""
    text = markdown(lines, latency, planned)
    with whole_file(folder / "table.md") as file:
        file.write_text(text, encoding="utf-8")
    with whole_file(folder / "table.csv") as file, file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(csv_rows(lines, latency))
    save(figure(lines), folder / "figure.png", dpi)
    return text
