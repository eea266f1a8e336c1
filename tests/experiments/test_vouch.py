"""Records that somebody vouches for over a change of code."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path

import pytest
from typer.testing import CliRunner

from svam.experiments.__main__ import app
from svam.experiments.loop import Plan
from svam.experiments.records import read_records, write_record
from svam.experiments.trail import Trail, read, write
from svam.experiments.vouch import vouch
from svam.files import FileError
from tests.experiments.test_comparison import make_record
from tests.experiments.test_trail import make_record as make_entry
from tests.project import make_project, run

COMPARE = {"collection": "default", "collections": {"default": []}, "seeds": [1], "episodes_per_task": [1], "ablations": []}
TRAIL = {"trail": {"as_it_is": [], "smaller": ["distill.width=16"]}, "trail_policies": []}


def test_a_change_that_decides_no_number(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", {"compare": COMPARE | TRAIL})
    with chdir(root):
        plan, entries = Plan(Path("records")), Trail(Path("records"))
        first, second, third = plan.runs
        for planned, key in ((first, plan.keys[first.name]), (second, "of other work"), (third, plan.keys[third.name])):
            write_record(plan.folder, make_record(planned.variant, planned.size, planned.seed, name=planned.name, key=key))
        write(entries.folder, make_entry(key=entries.keys["as_it_is"]))
        write(entries.folder, make_entry("smaller", key="of other work"))
        assert vouch(plan, entries, "HEAD") == ([], [])

        with Path("svam/training/finetune_video.py").open("a", encoding="utf-8") as file:
            file.write("# a comment\n")
        assert not [p for p in Plan(Path("records")).state() if p.record] and not Trail(Path("records")).finished()
        done = CliRunner().invoke(app, ["vouch", "HEAD", "--records", "records"])
        assert done.exit_code == 0, done.output
        assert done.stdout.splitlines() == [
            "code that differs from HEAD: svam/training/finetune_video.py",
            f"records that count as made by the code that is here now: {third.name}, {first.name}, trail/as_it_is",
        ]
        finished = [p.run.name for p in Plan(Path("records")).state() if p.record]
        assert sorted(finished) == sorted([first.name, third.name])
        commit = run(root, "git", "rev-parse", "HEAD").strip()
        states = {record.name: record.vouched for record in read_records(plan.folder)}
        assert states == {first.name: (commit,), second.name: (), third.name: (commit,)}
        assert read(entries.folder / "as_it_is.json").vouched == (commit,)
        assert [record.name for record in Trail(Path("records")).finished()] == ["as_it_is"]
        with pytest.raises(FileError, match="revision 'nothing': "):
            vouch(Plan(Path("records")), None, "nothing")
