"""Which tasks a screening replaces: the registered rule, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from svam.errors import ParamsError
from svam.experiments.plan import FOLDER, load_plan, planned_runs
from svam.experiments.records import EpisodeOutcome, Record, write_records
from svam.experiments.screening import replacements, screened
from svam.files import FileError
from tests import ROOT
from tests.experiments.test_table import make_record

REGISTERED, PARAMS = FOLDER / "registered.yaml", ROOT / "params.yaml"


def record(wins: dict[str, int]) -> Record:
    """The screening's record: of each task the first so many of 20 episodes succeeded; ten, where nothing is said."""
    (run,) = planned_runs(load_plan(REGISTERED), ["*-screening"], PARAMS)
    episodes = [
        EpisodeOutcome(task=task, index=k, seed=k, success=k < wins.get(task, 10), steps=9)
        for task in run.params["evaluate"]["metaworld"]["tasks"] for k in range(20)
    ]  # fmt: skip
    return make_record("vpp", 50, 101, name=run.name, regime="screening", episodes=episodes)


def test_the_rule() -> None:
    """In the order of both lists, within a tier, each replacement once; at the bounds a task is kept and may be taken."""
    tasks, others = ["hammer", "push-wall", "coffee-pull", "push"], ["sweep", "sweep-into", "box-close", "disassemble"]
    rates = dict.fromkeys([*tasks, *others], 0.5)
    assert replacements(tasks, rates) == {}
    assert replacements(tasks, rates | {"hammer": 0.1, "push": 0.9}) == {}
    assert replacements(tasks, rates | {"push-wall": 0.05, "push": 0.95}) == {"push-wall": "sweep", "push": "disassemble"}
    assert replacements(tasks, rates | {"hammer": 0.0, "sweep": 0.05, "sweep-into": 0.9, "coffee-pull": 1.0}) == {
        "hammer": "sweep-into", "coffee-pull": "box-close",
    }  # fmt: skip
    assert replacements(tasks, rates | {"push": 0.0, "disassemble": 0.0}) == {}, "a hard task stays where no hard one is left"


def test_the_page_of_a_screening(tmp_path: Path) -> None:
    (tmp_path / "registered").mkdir()
    wins = {"hammer": 19, "assembly": 1, "pick-place-wall": 0, "push-back": 2, "sweep": 18, "push": 0, "disassemble": 0}
    write_records(tmp_path / "registered", [record(wins)])
    page = screened(REGISTERED, tmp_path, PARAMS)
    assert "| hammer | medium | 95% [76%, 99%] of 20 | replaced by sweep |" in page
    assert "| sweep | medium | 90% [70%, 97%] of 20 | taken |" in page
    assert "| assembly | hard | 5% [1%, 24%] of 20 | replaced by push-back |" in page
    assert "| push | hard | 0% [0%, 16%] of 20 | stays, none is left |" in page
    assert "| stick-push | hard | 50% [30%, 70%] of 20 | kept |" in page and "| disassemble | hard | 0%" in page
    assert "Replaced: hammer by sweep; assembly by push-back.\n" in page
    assert page.endswith(
        "collect.tasks: [basketball, bin-picking, coffee-pull, coffee-push, sweep, push-wall, push-back, hand-insert, "
        "pick-out-of-hole, pick-place, push, stick-push]"
    )


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"plan\.yaml: has no regime 'screening', .* name another --plan"):
        screened(FOLDER / "plan.yaml", tmp_path, PARAMS)
    run = "vpp-50-seed101-registered-screening"
    with pytest.raises(FileError, match=rf"registered: no record of {run}; `python -m svam.experiments run --plan .* --only"):
        screened(REGISTERED, tmp_path, PARAMS)
    (tmp_path / "registered").mkdir()
    write_records(tmp_path / "registered", [make_record("vpp", name=run)])
    with pytest.raises(FileError, match=rf"the record of {run} is of other tasks than .* screens now; `python -m"):
        screened(REGISTERED, tmp_path, PARAMS)
