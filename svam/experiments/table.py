"""The table of a comparison, from the records of its experiments alone: Markdown, CSV and a figure."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from svam.evaluation.scores import PUBLISHED_TIERS, TIERS, rate_of
from svam.experiments.foreseen import section
from svam.experiments.plan import REFERENCE, VARIANTS
from svam.experiments.records import Record, read_records
from svam.experiments.statistics import (
    LEVEL,
    RESAMPLES,
    Pairs,
    difference,
    hierarchical,
    holm,
    interval,
    mcnemar,
    only_one,
    paired,
    reached,
    two_sided,
)
from svam.files import FileError, whole_file, write_text
from svam.report.figures import save
from svam.report.page import Section, divided, rendered
from svam.report.tables import acceptance_sentence, labels_sentence, markdown_table

COSTS = {
    "parameters": "parameters trained with the policy", "policy_steps": "policy steps", "batch": "batch",
    "video_seconds": "video model, s", "distillation_seconds": "distillation, s", "policy_seconds": "policy, s",
    "evaluation_seconds": "evaluation, s", "latency_milliseconds": "latency, ms",
}  # fmt: skip
WHICH = ["variant", "demonstrations a task"]
POINTS = "difference to S-VAM, points"
DIFFERENCE = ("difference", "difference_low", "difference_high")
SEVERAL_PIPELINES = (
    " Where several pipelines are named, each with demonstrations, goals and weights of its own, these are resampled first, "
    "then the training seeds of each drawn one, its goals, and its tasks where they are its own; what was said of few seeds "
    "holds of few pipelines too."
)
HARDER = {*PUBLISHED_TIERS["medium"], *PUBLISHED_TIERS["hard"]}
"""Tasks on which the published difference is largest."""
RunRow = dict[str, Any]
"""A run, with the columns of table.csv; None for what was not compared or not measured."""


def compared(records: Sequence[Record]) -> tuple[list[RunRow], list[RunRow], list[RunRow]]:
    """A row for each run, by size, pipeline, seed, regime and variant, beside the reference's run of the same; a row for each
    variant and size whose seeds were compared on the same goals, or on those of several pipelines: label, size, seeds,
    pipelines, primary, reached (goals of the variant, of the reference, and all there were), `DIFFERENCE`, p (corrected, but
    for primary ones), harder (the number of its tasks in `HARDER`, and `DIFFERENCE` and p of these alone; None without any);
    and one for each regime in which a primary difference was measured too: label, other, size, `DIFFERENCE`, p: of the two
    differences to S-VAM.

    Raises:
        FileError: two runs that belong together had other goals or budgets, or a record is of an unknown variant.
    """
    unknown = [record for record in records if record.variant not in VARIANTS]
    if unknown:
        raise FileError(f"{unknown[0].name}: no variant is called {unknown[0].variant!r} any more; delete its record")
    references = {(r.size, r.seed, r.regime, r.pipeline): r for r in records if r.variant == REFERENCE}
    rows: list[RunRow] = []
    several: dict[Any, dict[tuple[int | None, int], Pairs]] = {}

    def place(record: Record) -> tuple[Any, ...]:
        pipeline = -1 if record.pipeline is None else record.pipeline
        return record.size, pipeline, record.seed, record.regime, list(VARIANTS).index(record.variant)

    for record in sorted(records, key=place):
        row: RunRow = {
            "variant": record.variant, "label": label_of(record.variant, record.regime), "episodes_per_task": record.size,
            "seed": record.seed, "pipeline": record.pipeline, **rate_of([episode.success for episode in record.episodes]),
            **dict.fromkeys(("pairs", *DIFFERENCE, "only_variant", "only_svam", "p_corrected")),
            "verdict": "", "parameters": record.parameters,
            **{key: record.budget[key] for key in ("policy_steps", "batch", "demonstrations")},
            "video_seconds": record.seconds("finetune_video"),
            "distillation_seconds": record.seconds("generate", "cache_teacher", "distill"),
            "policy_seconds": record.seconds("train_policy"), "evaluation_seconds": record.seconds("evaluate"),
            "latency_milliseconds": record.latency, "policy": record.policy,
        }  # fmt: skip
        reference = references.get((record.size, record.seed, record.regime, record.pipeline))
        if record.variant != REFERENCE and reference is not None:
            pairs = paired(record, reference)
            goals: tuple[Any, ...] = tuple((e.task, e.index, e.seed) for e in record.episodes)
            if record.pipeline is not None:  # goals of its own, and perhaps tasks: pooled with those that have as many
                goals = tuple(sorted(Counter(e.task for e in record.episodes).values()))
            key = (record.variant, record.regime, record.primary, record.size, goals)
            several.setdefault(key, {})[record.pipeline, record.seed] = pairs
            row |= zip(DIFFERENCE, difference(pairs), strict=True)
            row |= zip(("only_variant", "only_svam"), only_one(pairs), strict=True)
            row["pairs"] = sum(map(len, pairs.values()))
        rows.append(row)
    tested = [row for row in rows if row["pairs"] is not None]
    for row, p in zip(tested, holm([mcnemar(row["only_variant"], row["only_svam"]) for row in tested]), strict=True):
        ahead = row["label"] if row["difference"] > 0 else VARIANTS[REFERENCE]["label"]
        row |= {"p_corrected": p, "verdict": f"{ahead} ahead" if p < LEVEL else "not distinguishable"}
    pipelines = {key: [pipeline for pipeline, _ in seeds] for key, seeds in several.items() if len(seeds) > 1}
    drawn = {key: pooled(several[key]) for key in pipelines}
    means = [
        {
            "label": label_of(variant, regime), "primary": primary, "size": size,
            "seeds": sorted({seed for _, seed in several[variant, regime, primary, size, goals]}),
            "pipelines": sorted({p for p in pipelines[variant, regime, primary, size, goals] if p is not None}),
            "reached": reached(several[variant, regime, primary, size, goals].values()),
            **resampled_difference(*values),
            "harder": of_harder(several[variant, regime, primary, size, goals]),
        }
        for (variant, regime, primary, size, goals), values in drawn.items()
    ]  # fmt: skip
    correct([mean for mean in means if not mean["primary"]])
    regimes: list[RunRow] = []
    for key, twin in product(drawn, drawn):
        variant, regime, primary, *alike = key
        if not primary or twin[1] == regime or (twin[0], *twin[3:]) != (variant, *alike):
            continue
        common = set(pipelines[key]) & set(pipelines[twin])
        both = [{place: pairs for place, pairs in several[one].items() if place[0] in common} for one in (key, twin)]
        if min(map(len, both)) > 1:
            (value, values), (other, others) = map(pooled, both)
            label = {"label": label_of(variant, regime), "other": twin[1], "size": alike[0]}
            regimes.append(label | resampled_difference(value - other, values - others))
    correct(regimes)
    return rows, means, regimes


def labels_of(records: Sequence[Record]) -> str:
    """`labels_sentence` of the runs, and in which regimes it does not hold; and whether the teachers are accepted."""
    regimes = {record.regime: record.labels for record in records}
    said = labels_sentence(label for labels in regimes.values() for label in labels)
    without = [regime for regime, labels in regimes.items() if not labels]
    said = f"{said} Not so in {', '.join(sorted(without))}." if said and without else said
    judged: dict[str, list[str]] = {}
    for record in records:
        if record.teachers:
            regime = f"{record.regime}{_of([record.pipeline])}".strip()
            judged.setdefault(acceptance_sentence(record.teachers), []).append(regime)
    verdicts = [
        f"As teachers of a comparison{f' in {names}' if (names := ', '.join(sorted(set(found) - {''}))) else ''}, {verdict}."
        for verdict, found in judged.items()
    ]
    return " ".join(filter(None, [said, *verdicts]))


def label_of(variant: str, regime: str) -> str:
    """What tables call a variant in a regime, "" for none."""
    return f"{VARIANTS[variant]['label']}, {regime}" if regime else str(VARIANTS[variant]["label"])


def resampled_difference(value: float, resampled: NDArray[np.float64]) -> RunRow:
    """`DIFFERENCE` and p of a value and its bootstrap values."""
    return dict(zip((*DIFFERENCE, "p"), (value, *interval(resampled), two_sided(resampled)), strict=True))


def pooled(seeds: Mapping[tuple[int | None, int], Pairs]) -> tuple[float, NDArray[np.float64]]:
    """`hierarchical` of outcomes by pipeline and training seed."""
    return hierarchical([*seeds.values()], [pipeline for pipeline, _ in seeds])


def of_harder(seeds: Mapping[tuple[int | None, int], Pairs]) -> RunRow | None:
    """`resampled_difference` of the tasks in `HARDER` alone, and their number; None where there are none.

    Args:
        seeds: by pipeline and training seed.
    """
    chosen = {place: {task: goals for task, goals in pairs.items() if task in HARDER} for place, pairs in seeds.items()}
    tasks = set[str]().union(*chosen.values())
    return {"tasks": len(tasks), **resampled_difference(*pooled(chosen))} if tasks else None


def correct(rows: Sequence[RunRow]) -> None:
    """Make the p-values of rows hold for all of them together."""
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p"] = p


def of_tasks(records: Iterable[Record]) -> list[list[str]]:
    """Head and lines of success by task, and below the tasks of each regime and size their means: of each published tier, of
    all tasks, and of the four `TIERS` where each has a task. A column for each variant, all its runs together."""
    outcomes: dict[tuple[str, int], dict[str, dict[str, list[bool]]]] = {}
    for record in records:
        of_variant = outcomes.setdefault((record.regime, record.size), {}).setdefault(record.variant, {})
        for episode in record.episodes:
            of_variant.setdefault(episode.task, []).append(episode.success)
    variants = [name for name in VARIANTS if any(name in by_variant for by_variant in outcomes.values())]
    regimes = any(regime for regime, _ in outcomes)
    lines = [["task", *(["regime"] if regimes else []), WHICH[1], *(str(VARIANTS[name]["label"]) for name in variants)]]
    for (regime, size), by_variant in sorted(outcomes.items()):
        found = {task for of_variant in by_variant.values() for task in of_variant}
        tiers = {tier: [task for task in tasks if task in found] for tier, tasks in PUBLISHED_TIERS.items()}
        tiers[""] = sorted(found.difference(*tiers.values()))
        lines_of = {f"{task} ({tier})" if tier else task: [[task]] for tier, tasks in tiers.items() for task in tasks}
        lines_of |= {f"mean of {len(tasks)} {tier}": [[t] for t in tasks] for tier, tasks in tiers.items() if tier and tasks}
        lines_of[f"mean of {len(found)} tasks"] = [[task] for task in found]
        if all(found.intersection(tasks) for tasks in TIERS.values()):
            lines_of["mean of 4 groups"] = [[task for task in tasks if task in found] for tasks in TIERS.values()]
        for name, groups in lines_of.items():
            cells = [_mean(by_variant.get(variant, {}), groups) for variant in variants]
            lines.append([name, *([regime] if regimes else []), str(size), *cells])
    return lines


def _mean(successes: Mapping[str, Sequence[bool]], groups: Sequence[Sequence[str]]) -> str:
    """Mean of the means of groups of tasks' rates, "" where not all have been run. Where all count alike, it is the rate of all
    goals together, which has an interval."""
    tasks = [task for group in groups for task in group]
    if not successes.keys() >= {*tasks}:
        return ""
    if len({len(successes[task]) for task in tasks}) > 1 or len({*map(len, groups)}) > 1:
        return f"{100 * fmean(fmean(fmean(successes[task]) for task in group) for group in groups):.0f} %"
    return _success(rate_of([success for task in tasks for success in successes[task]]))


def _success(rate: Mapping[str, Any]) -> str:
    """A rate of `rate_of`, in percent, with its interval and the number of goals."""
    return f"{100 * rate['success']:.0f} % [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}] of {rate['episodes']}"


def _points(row: Mapping[str, Any]) -> str:
    """The difference and its interval, in percentage points."""
    middle, low, high = (100 * row[key] for key in DIFFERENCE)
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


def _of(pipelines: Sequence[int | None]) -> str:
    """After seeds, of which pipelines they are, where the plan names some."""
    named = [str(pipeline) for pipeline in pipelines if pipeline is not None]
    return f" of pipeline {', '.join(named)}" if named else ""


def _half_width(row: Mapping[str, Any]) -> str:
    """Half of the interval's width, in percentage points."""
    return f"{50 * (row['difference_high'] - row['difference_low']):.1f}"


def markdown(
    rows: Sequence[RunRow], means: Sequence[RunRow], regimes: Sequence[RunRow], note: str | None, machines: Sequence[str],
    labels: str = "", tasks: Sequence[Sequence[str]] = (), foreseen: Sequence[str] = (),
) -> str:  # fmt: skip
    """The whole comparison as one Markdown page; the rows are those of `compared`. note: printed above it. machines: on which
    the runs were made. labels: printed below each table of success. tasks: of `of_tasks`. foreseen: of
    `svam.experiments.foreseen.section`."""
    said = [labels] if labels else []
    tested = [row for row in rows if row["pairs"] is not None]
    lines = []
    for row in rows:
        seed = str(row["seed"]) + _of([row["pipeline"]])
        cells = [row["label"], str(row["episodes_per_task"]), seed, _success(row), "", "", "", row["verdict"]]
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
        *said,
    ]
    if means:
        cells = [
            [mean["label"], str(mean["size"]), ", ".join(map(str, mean["seeds"])) + _of(mean["pipelines"]),
             "{} and {} of {}".format(*mean["reached"]), _points(mean), _half_width(mean),
             f"{mean['p']:.3g}" + (" (primary)" if mean["primary"] else ""),
             *((str(h["tasks"]), _points(h), _half_width(h)) if (h := mean["harder"]) else ("0", "", ""))]
            for mean in means
        ]  # fmt: skip
        harder = ["medium and hard tasks", "difference on these alone, points", "half-width"]
        parts += [
            "## Over training seeds",
            "Means of the training seeds. Intervals and p resample training seeds, tasks, and the goals of each drawn task "
            f"({RESAMPLES} times). A comparison that was named primary before anything ran stands by itself; the others' p are "
            f"Holm-corrected for their number ({sum(not mean['primary'] for mean in means)}). Intervals are not corrected; of "
            "few seeds they are too narrow, the part that comes from seeds by a tenth with five and by three tenths with two."
            f"{SEVERAL_PIPELINES if any(len(mean['pipelines']) > 1 for mean in means) else ''} "
            "Half-width: half of an interval. Medium and hard as in the published tables, hard with very hard; resampled in "
            "the same way, and not tested.",
            markdown_table([*WHICH, "seeds", "goals reached, it and S-VAM", POINTS, "half-width", "p", *harder], cells),
            *said,
        ]
    if regimes:
        cells = [[r["label"], str(r["size"]), r["other"], _points(r), f"{r['p']:.3g}"] for r in regimes]
        parts += [
            "## Between regimes",
            "A primary difference to S-VAM minus the same variant's in another regime, on the same goals, of pipelines that "
            f"were run in both; resampled as above, p Holm-corrected ({len(regimes)}).",
            markdown_table([*WHICH, "against regime", "change of the difference, points", "p"], cells),
            *said,
        ]
    if tasks:
        parts += [
            "## By task",
            "All runs of a variant together, with 95 % Wilson intervals, which see goals alone. Tiers as in the published "
            "tables; means are of the tasks' rates, without an interval where these have unequal numbers of goals. The mean of "
            "4 groups, in which a hard task counts more, is LeRobot's: of easy, medium, hard and very hard.",
            markdown_table(tasks[0], tasks[1:]),
            *said,
        ]
    parts += [
        *foreseen,
        "## What can be said",
        "Intervals and tests of single runs are about these policies, on such goals; they carry no claim about training in "
        "general.",
        f"The comparisons rest on {' or '.join(map(str, sorted({row['pairs'] for row in tested}))) or 'no'} pairs each. \"Not "
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
    order = sorted(rows, key=lambda row: list(VARIANTS).index(row["variant"]))
    names = list(dict.fromkeys(row["label"] for row in order))
    tested = [row for row in reversed(rows) if row["pairs"] is not None]
    drawn = Figure(figsize=(13.0, max(4.0, 0.28 * len(rows) + 1.5)), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=[1.0, 1.2])
    point = {"fmt": "o", "capsize": 2, "markersize": 4}
    for number, name in enumerate(names):
        mine = [row for row in rows if row["label"] == name]
        shift = (number - (len(names) - 1) / 2) * 0.8 / len(names)
        places = [sizes.index(row["episodes_per_task"]) + shift + 0.02 * (k % 2) for k, row in enumerate(mine)]
        rates, low, high = np.array([[row[key] for key in ("success", "low", "high")] for row in mine]).T
        left.errorbar(places, rates, [rates - low, high - rates], color=f"C{number}", label=name, **point)
    left.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    left.set(xlim=(-0.5, len(sizes) - 0.5), ylim=(-0.02, 1.02), xlabel=WHICH[1], ylabel="success at any step")
    left.legend(fontsize=7)
    for place, row in enumerate(tested):
        middle, low, high = (100 * row[key] for key in DIFFERENCE)
        colour = f"C{names.index(row['label'])}"
        filled = "white" if row["p_corrected"] >= LEVEL else colour
        right.errorbar(middle, place, None, [[middle - low], [high - middle]], color=colour, markerfacecolor=filled, **point)
    right.axvline(0.0, color="#333333", linewidth=1)
    labels = [f"{row['label']}, {row['episodes_per_task']}, seed {row['seed']}{_of([row['pipeline']])}" for row in tested]
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
    rows, means, regimes = compared(records)
    machines = sorted({record.machine for record in records})
    text = markdown(rows, means, regimes, note, machines, labels_of(records), of_tasks(records), section(records))
    write_text(folder / "table.md", text)
    with whole_file(folder / "table.csv") as file, file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    save(figure(rows), folder / "figure.png", dpi=100)
    title, head, below = divided(text)
    caption = "Success by number of demonstrations, and paired differences to S-VAM, with their 95 % intervals."
    sections = [Section("All runs", pictures=[("figure.png", caption)]), *(Section(*part) for part in below.items())]
    page = rendered(f"{title}: {folder.name}", f"{head}\n\n[All comparisons](../index.html)", sections)
    write_text(folder / "index.html", page)
    return text


def write_overview(folder: Path) -> None:
    """Write index.html, which leads to the page of each comparison in `folder`."""
    links = [f"- [{page.parent.name}]({page.parent.name}/index.html)" for page in sorted(folder.glob("*/index.html"))]
    page = rendered("Comparisons", "\n".join([*links, "- [the run that lies here](../report/index.html)"]), [])
    write_text(folder / "index.html", page)
