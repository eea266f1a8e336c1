"""`python -m svam.report.readme`: write the report's results between two marks of README.md, so that nobody copies figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from svam.console import one_line_errors
from svam.files import FileError, read_json, write_text
from svam.report.tables import labels_sentence, markdown_table, measured_labels

BEGIN, END = "<!-- results -->", "<!-- /results -->"
COLUMNS = {"policy": "S-VAM", "random": "random actions", "expert": "scripted expert"}
MEAN = "mean of tasks (macro)"
MOST_TASKS = 8
"""With more tasks the table has a line for each difficulty tier instead."""
SENTENCES = {
    "success_unseen_sentence": "With a sentence that no training saw: {:.0%}.",
    "geometric_explained": "Geometric foresight removes {:.0%} of the error of repeating the current frame's features.",
    "semantic_explained": "Semantic foresight removes {:.0%} of it.",
    "video_error_share": "Generated clips keep {:.1%} of the error of repeating the first frame.",
    "action_error": "Mean absolute error of actions: {:.3f}.",
}


def sentences(flat: Mapping[str, float]) -> str:
    """What the flat metrics say, but for success itself."""
    return " ".join(sentence.format(flat[key]) for key, sentence in SENTENCES.items() if key in flat)


def said_of_labels(report: Path) -> str:
    """`labels_sentence` of the run that a report is of."""
    return labels_sentence(measured_labels(read_json(report / "plots/teachers.json")))


def _cell(line: dict[str, float]) -> str:
    return f"{100 * line['success']:.0f} % [{100 * line['low']:.0f}, {100 * line['high']:.0f}]"


def results(report: Path) -> str:
    """A table of success and a few other figures, as Markdown. Raises `FileError` if the run had no closed loop."""
    lines = {(row["name"], row["row"]): row for row in read_json(report / "plots/success.json")}
    if (MEAN, "policy") not in lines:
        raise FileError(f"{report}: holds no success rates; README's results are those of a run with protocol metaworld")
    policy = [(line["group"], name) for (name, row), line in lines.items() if row == "policy"]
    group = "task" if sum(kind == "task" for kind, _ in policy) <= MOST_TASKS else "tier"
    names = [name for kind, name in policy if kind == group]
    grid = [[name, *(_cell(lines[name, row]) for row in COLUMNS)] for name in (*names, MEAN)]
    header = [f"success on {lines[MEAN, 'policy']['episodes']} unseen goals [95 % Wilson interval]", *COLUMNS.values()]
    said = [said_of_labels(report), sentences(read_json(report / "metrics.json")).replace("%", " %")]
    return f"{markdown_table(header, grid)}\n\n{' '.join(filter(None, said))}"


def replace_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a page. Raises `FileError` where it has none."""
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise FileError(f"{page}: expected the marks {begin} and {end}, each on a line of its own")
    write_text(page, f"{before}{begin}\n{text}\n{end}{after}")


@one_line_errors
def main(
    report: Annotated[Path, typer.Option(help="What the report stage wrote.")] = Path("data/report"),
    readme: Annotated[Path, typer.Option(help="The page to rewrite.")] = Path("README.md"),
) -> None:
    """Replace what stands between the marks."""
    replace_between(readme, BEGIN, END, results(report))


if __name__ == "__main__":
    typer.run(main)
