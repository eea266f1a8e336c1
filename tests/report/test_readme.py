"""README's results come from the report's files and nowhere else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from svam.files import FileError, read_json, write_json
from svam.report.readme import BEGIN, END, main, results

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "data/report"


def test_the_page_has_a_place_for_them() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)


def test_only_what_stands_between_the_marks_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        main(REPORT, page)
        assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}\n{results(REPORT)}\n{END}\nafter\n"
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(REPORT, page)
    assert "expected the marks" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "no marks"


def test_many_tasks_are_shown_by_tier_and_no_closed_loop_is_refused(tmp_path: Path) -> None:
    shutil.copytree(REPORT, tmp_path / "report")
    table = tmp_path / "report/plots/success.json"
    lines = read_json(table)
    tasks = [{**line, "name": f"{line['name']}-{i}"} for line in lines if line["group"] == "task" for i in range(3)]
    write_json(table, tasks + [line for line in lines if line["group"] != "task"])
    assert "| easy |" in results(tmp_path / "report") and "reach" not in results(tmp_path / "report")
    write_json(table, [])
    with pytest.raises(FileError, match="holds no success rates"):
        results(tmp_path / "report")
