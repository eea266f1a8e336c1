"""README's results come from the report's files and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from svam.files import FileError, write_json
from svam.report.readme import BEGIN, END, main, results
from tests import ROOT


def write_report(folder: Path, tasks: int, *measures: str) -> Path:
    """A report of so many tasks, whose teachers are measured so on real frames."""
    names = [("task", f"task-{i}") for i in range(tasks)] + [("tier", "easy"), ("average", "mean of tasks (macro)")]
    rate = {"success": 0.5, "low": 0.254, "high": 0.746, "episodes": 12}
    rows: list[dict[str, Any]] = [
        {"group": group, "name": name, "row": row, **rate} for row in ("policy", "random", "expert") for group, name in names
    ]
    write_json(folder / "plots/success.json", rows if tasks else [])
    write_json(folder / "metrics.json", {"success": 0.5, "action_error": 0.0726})
    write_json(folder / "plots/teachers.json", [{"view": "real", "measure": measure} for measure in measures])
    return folder


def test_only_what_stands_between_the_marks_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, page = write_report(tmp_path / "report", 2), tmp_path / "README.md"
    page.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    before, after = page.read_text().split(BEGIN)[0], page.read_text().split(END)[1]
    for _ in range(2):
        main(report, page)
        assert page.read_text() == f"{before}{BEGIN}\n{results(report)}\n{END}{after}"
    assert results(report).splitlines()[0].startswith("| success on 12 unseen goals")
    assert "| task-1 | 50 % [25, 75] | 50 % [25, 75] | 50 % [25, 75] |" in results(report)
    assert results(report).endswith("\n\nMean absolute error of actions: 0.073.")
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(report, page)
    assert "expected the marks" in capsys.readouterr().err and page.read_text() == "no marks"


def test_what_the_teachers_learn_from_is_said_where_they_learn_from_labels(tmp_path: Path) -> None:
    for measures, learnt in (
        (("depth error / deviation", "mean IoU"), "depth and segmentation"), (("pixel error", "mean IoU"), "segmentation"),
    ):  # fmt: skip
        said = f"S-VAM's teachers learn from the simulator's {learnt}, which the inputs of VPP and Diffusion Policy do not see."
        text = results(write_report(tmp_path / str(len(learnt)), 2, *measures))
        assert text.splitlines()[-1] == f"{said} Mean absolute error of actions: 0.073."
    assert "teachers" not in results(write_report(tmp_path / "none", 2, "pixel error", "pixel error"))


def test_many_tasks_are_shown_by_tier_and_a_run_without_closed_loop_is_refused(tmp_path: Path) -> None:
    table = results(write_report(tmp_path / "many", 9))
    assert "| easy |" in table and "task-1" not in table
    with pytest.raises(FileError, match="holds no success rates"):
        results(write_report(tmp_path / "none", 0))
