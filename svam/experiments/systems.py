"""How a row of each system of the published tables is filled here, and what was measured, as a table for a page."""

from __future__ import annotations

import csv
from pathlib import Path

from svam.experiments.plan import FOLDER, REFERENCE, VARIANTS
from svam.files import FileError, read_json, read_yaml
from svam.report.published import PUBLISHED
from svam.report.readme import MEAN, said_of_labels
from svam.report.tables import markdown_table, percentage

BEGIN, END = "<!-- systems -->", "<!-- /systems -->"


def systems_table(report: Path, compared: Path) -> str:
    """The table, as Markdown, and below it what S-VAM's teachers learn from.

    Args:
        report: of the run whose S-VAM row is shown. compared: folder of the comparison whose variants are, by their first runs;
            one without a table has not been run.

    Raises:
        FileError: the report is missing, or one of the two is no such folder.
    """
    systems = read_yaml(FOLDER / "systems.yaml")
    tables = {"MetaWorld": PUBLISHED["metaworld"]["rows"], "CALVIN": PUBLISHED["calvin"]["rows"]}
    try:
        table = compared / "table.csv"
        lines = csv.DictReader(table.read_text(encoding="utf-8").splitlines() if table.is_file() else [])
        runs = {line["variant"]: line for line in reversed(list(lines))}
        own = next(line for line in read_json(report / "plots/success.json") if (line["name"], line["row"]) == (MEAN, "policy"))
        figures = {
            variant: f"{float(line['success']):.0%} of {line['episodes']} goals, "
            f"{100 * float(line['difference'] or 0):+.1f} points to S-VAM"
            for variant, line in runs.items()
            if variant != REFERENCE
        }
        compared_too = f"; compared: {float(runs[REFERENCE]['success']):.0%}" if REFERENCE in runs else ""
        figures[REFERENCE] = f"{percentage(own)} of {own['episodes']} goals of the default run{compared_too}"
    except (OSError, KeyError, ValueError, StopIteration) as error:
        raise FileError(f"{report}, {compared}: not a report with success rates and a comparison ({error!r})") from None
    rows = []
    for system in dict.fromkeys([*reversed(tables["MetaWorld"]), *tables["CALVIN"]]):
        how, shown = systems[system], ""
        if how in VARIANTS:
            shown = figures.get(how, "not run yet")
            how = f"variant `{how}`" + ("" if how == REFERENCE else f": `{' '.join(VARIANTS[how]['arguments'])}`")
        last = [str(rows_of[system][-1]) if system in rows_of else "" for rows_of in tables.values()]
        rows.append([system, *last, how, shown])
    header = ["system", "MetaWorld, published", "CALVIN, published", "a row here is filled by", "measured here"]
    return "\n\n".join(filter(None, [markdown_table(header, rows), said_of_labels(report)]))
