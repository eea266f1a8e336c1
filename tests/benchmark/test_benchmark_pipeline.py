"""Where the pipeline's time goes: accounts that stages keep, in a project of two commands; and a training that is watched."""

from __future__ import annotations

import json
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo

from svam import console as machine
from svam.benchmark.pipeline import ENDLESS, Account, read_accounts, shares, steps_of, trainings, watched
from svam.files import FileError
from tests.benchmark.common import measured, refused
from tests.toy import write_toy_params

PIPELINE = """
stages:
  train:
    matrix:
      part: [one, two]
    cmd: echo ${item.part} > ${item.part}
    outs:
      - ${item.part}
  benchmark:
    matrix:
      part: [times]
    cmd: echo times > times
    outs: [times]
"""
STAGE = """
import torch
from svam.training.loop import fit
from tests.toy import optimiser

module, settings = torch.nn.Linear(3, 1), optimiser(steps=1000, batch=2, learning_rate=0.001)
fit(module, lambda batch: module(batch).mean(), lambda number: torch.ones(2, 3), settings, torch.device("cpu"), "endless")
raise AssertionError("nobody stopped it")
"""
TRAINED = {"seconds": 10.0, "spent": {"data": 0.1, "forward": 3.0, "backward": 4.5, "optimiser": 0.4, "saving": 1.0}}
WAITED = {"seconds": 30.0, "spent": {"data": 2.0, "forward": 3.0, "backward": 4.0, "optimiser": 1.0, "statistics": 15.0}}
CONVERTED = {"seconds": 60.0, "spent": {"join": 45.0}}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pipeline, with an account of each stage."""
    root = tmp_path_factory.mktemp("project")
    (root / "dvc.yaml").write_text(PIPELINE)
    with chdir(root):
        Repo.init(no_scm=True).close()
        with Repo() as repo:
            repo.reproduce()
    write_accounts(root / ".cache/times", {"train@one": TRAINED, "train@two": WAITED})
    return root


def write_accounts(folder: Path, accounts: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stage, account in accounts.items():
        (folder / f"{stage}.json").write_text(json.dumps(account))
    return folder


def test_times_of_a_project(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    found = measured("times", tmp_path / "there", {})
    assert found["total_seconds"] == 40.0 and set(found["stages"]) == {"train@one", "train@two"}
    monkeypatch.chdir(tmp_path)
    assert refused("times", tmp_path / "none", {}, capfd).startswith("`dvc stage list` failed: ERROR: you are not inside")


def test_shares_by_hand() -> None:
    found = shares({stage: Account.model_validate(a) for stage, a in {"a": TRAINED, "b": WAITED, "c": CONVERTED}.items()})
    assert {stage: part["share"] for stage, part in found["stages"].items()} == {"a": 0.1, "b": 0.3, "c": 0.6}
    assert found["total_seconds"] == 100.0
    assert found["stages"]["a"]["parts"]["backward"] == {"seconds": 4.5, "share": 0.45}
    assert found["stages"]["b"]["parts"]["other"] == {"seconds": 5.0, "share": pytest.approx(1 / 6, abs=1e-5)}
    assert found["parts"]["forward"] == {"seconds": 6.0, "share": 0.06}
    assert found["parts"]["other"] == {"seconds": 21.0, "share": 0.21}


def test_a_training_is_timed_with_and_without_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own stage, which is stopped before it writes; its outs are elsewhere."""
    (tmp_path / "endless_stage.py").write_text(STAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    *measured_twice, making = steps_of(["endless_stage"], 2)
    for found in measured_twice:
        assert {kind: len(seconds) for kind, seconds in found.items()} == {"drawn": 2, "repeated": 2}
    assert 0 < making < 1
    lock = tmp_path / "dvc.lock"
    lock.write_text(
        "stages:\n  train:\n    cmd: python -m stages.train data/x --live data/live\n"
        "    outs:\n    - path: data/x\n    - path: data/live\n"
        "  report:\n    cmd: python -m stages.report data/report --live data/live\n    outs:\n    - path: data/report\n"
    )
    out = tmp_path / "scratch/data"
    assert trainings(lock, tmp_path / "scratch") == {"train": ["stages.train", str(out / "x"), "--live", str(out / "live")]}


def test_a_training_of_several_processes_is_watched_in_one(tmp_path: Path) -> None:
    several = {"machine": {"launch": "torchrun", "processes": 2, "shard": True}}
    alone, params = (write_toy_params(tmp_path / "params.yaml", changes) for changes in ({}, several))
    values = watched(params)
    assert values["distill"].pop("training")["steps"] == values["train_policy"].pop("training")["steps"] == ENDLESS
    expected = alone.model_dump(mode="json")
    assert values["machine"] == expected["machine"]
    assert values["distill"] == {key: value for key, value in expected["distill"].items() if key != "training"}


def test_accounts_are_those_that_stages_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("DVC_STAGE", "train@one")
    monkeypatch.setattr(machine, "_spent", {})

    @machine.one_line_errors
    def stage() -> None:
        for part in ("data", "forward", "backward", "optimiser"):
            with machine.timed(part):
                sum(range(1000))

    stage()
    accounts = read_accounts(machine.scratch_folder("times"), ["train@one"])
    assert set(shares(accounts)["stages"]["train@one"]["parts"]) == {"data", "forward", "backward", "optimiser", "other"}


def test_missing_or_broken_accounts_are_one_sentence(tmp_path: Path) -> None:
    folder = write_accounts(
        tmp_path / "times", {"a": TRAINED, "b": {"seconds": 1.0}, "c": [1], "d": {"seconds": 0.0, "spent": {}}}
    )
    with pytest.raises(FileError, match=r"times: no account of the time of x, y, z and 2 more; run `dvc repro` first"):
        read_accounts(folder, ["a", "x", "y", "z", "v", "w"])
    for stage in "bcd":
        with pytest.raises(FileError, match=rf"{stage}\.json: no account of a stage's time"):
            read_accounts(folder, ["a", stage])
    assert read_accounts(folder, ["a"])["a"].model_dump() == TRAINED
