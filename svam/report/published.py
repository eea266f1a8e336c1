"""The published tables, and this run's rows in the one of MetaWorld, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from svam.evaluation.scores import PUBLISHED_TIERS
from svam.files import read_yaml
from svam.report.tables import RunMetrics, has_four_groups, markdown_table, percentage

ROWS = ("policy", "random", "expert")
"""Of a run, which stand beside published ones."""
TASKS = {**PUBLISHED_TIERS, "mean": tuple(task for tasks in PUBLISHED_TIERS.values() for task in tasks)}
"""Column of the published table of MetaWorld -> its tasks."""
PUBLISHED: Mapping[str, Any] = read_yaml(Path(__file__).with_suffix(".yaml"))


def beside_published(run: RunMetrics) -> str:
    """This run by the tiers of the published table of MetaWorld, above the published rows. A mean over fewer than all tasks
    says of how many it is."""
    lines = []
    for row in (row for row in ROWS if row in run.success):
        summary = run.success[row]
        cells = []
        for column, tasks in TASKS.items():
            line = summary["macro"] if column == "mean" else summary["published_tiers"].get(column)
            done = sum(task in summary["tasks"] for task in tasks)
            few = "" if done == len(tasks) else f", {done} of {len(tasks)} tasks"
            cells.append("" if line is None else percentage(line) + few)
        groups = f"{summary['mean_of_tiers']['success']:.0%}" if has_four_groups(summary) else ""
        lines.append([f"{run.row_name(row)}, this run", *cells, groups])
    table = PUBLISHED["metaworld"]
    lines += [
        [f"{name}, published", *(f"{value:.1f}%" for value in (*values, fmean(values[:3])))]
        for name, values in table["rows"].items()
    ]
    header = ["", "easy", "medium", "hard and very hard", "mean of tasks", "mean of groups"]
    return (
        f"Published rows are of another setting: {table['setting']} ({PUBLISHED['source']}). The mean of groups is another "
        "average, in which a hard task counts more: LeRobot's, over easy, medium, hard and very hard; for published rows over "
        f"the three groups that they give.\n\n{markdown_table(header, lines)}"
    )


def published_table(name: str) -> str:
    """One of the other published tables, with its setting."""
    table = PUBLISHED[name]
    lines = [[row, *map(str, values)] for row, values in table["rows"].items()]
    return f"{table['setting']} ({PUBLISHED['source']}).\n\n{markdown_table(table['header'], lines)}"
