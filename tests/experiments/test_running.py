"""The loop for real: DVC's experiments of the toy pipeline, one killed in the middle and gone on with, and their table."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from svam.experiments.records import read_records
from svam.experiments.running import digests_of, run_all
from tests.project import attempt, begin_git, commit, ran, run, running
from tests.sources.common import refused

PLAN = """\
collection: small
arguments: []
regimes: {}
steps: 4
runs: [{variants: [svam, vpp], seeds: [1], episodes_per_task: [1], episodes: 2}]
"""
LOOP = (sys.executable, "-m", "svam.experiments", "run")


def workspace(root: Path) -> tuple[str, ...]:
    """What a person sees of the project, and what git keeps aside."""
    status = run(root, "git", "status", "--porcelain", "--branch")
    return status, run(root, "git", "rev-parse", "HEAD"), run(root, "git", "stash", "list"), (root / "params.yaml").read_text()


def kill_in_stage(root: Path, stage: str, skip: int) -> str:
    """Start the loop, and kill it when DVC has begun that stage once more than `skip` times and something of it is saved; what
    was printed."""
    log, states = root / ".cache/loop.log", root / ".cache/experiments/project/.ckpt" / stage
    with running(root, log, *LOOP) as loop:
        while ran(log.read_text()).count(stage) <= skip or not any(states.glob("*/*.json")):
            assert loop.poll() is None, log.read_text()[-6000:]
            time.sleep(0.05)
    return log.read_text()


def test_who_commits_is_asked_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    begin_git(tmp_path)
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    monkeypatch.chdir(tmp_path)
    with refused("made of the last commit, from which these files differ: params.yaml; commit them first"):
        run_all([], tmp_path / "records")
    run(tmp_path, "git", "config", "--unset", "user.email")
    for place in ("GLOBAL", "SYSTEM"):
        monkeypatch.setenv(f"GIT_CONFIG_{place}", os.devnull)
    with refused("first run `git config user.name NAME` and `git config user.email ADDRESS`"):
        run_all([], tmp_path / "records")
    assert not (tmp_path / ".cache").exists()


def test_digests_are_of_code_and_params() -> None:
    """Those that the lock file has; the order of params is none of it, and a stage may have neither."""
    entry = {
        "deps": [{"path": "data/svam", "md5": "a"}, {"path": "data/code/evaluate.txt", "md5": "b"}],
        "params": {"params.yaml": {"seed": 1, "threads": 2}},
    }  # fmt: skip
    found = digests_of(entry)
    assert found["code"] == "b" and len(found["params"]) == 64
    assert digests_of(entry | {"params": {"params.yaml": {"threads": 2, "seed": 1}}}) == found
    assert digests_of(entry | {"params": {"params.yaml": {"threads": 2, "seed": 2}}})["params"] != found["params"]
    assert digests_of({}) == {"code": "", "params": ""}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_loop(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(finished, root)
    (root / "svam/experiments/plan.yaml").write_text(PLAN, encoding="utf-8")
    before, folder = workspace(root), root / "data/compare/small"
    log = kill_in_stage(root, "evaluate", 1)  # of the second experiment
    assert not {"finetune_video", "distill@geometric"} & set(ran(log)), "`dvc repro` has run them"
    assert ran(log)[-1] == "evaluate" and workspace(root)[1:] == before[1:]
    (first,) = read_records(folder)[1]
    assert first.name == "svam-1-seed1-small"

    log_file = root / ".cache/second.log"
    with running(root, log_file, *LOOP) as loop:
        while "evaluate" not in ran(log_file.read_text()):
            assert loop.poll() is None, log_file.read_text()[-6000:]
            time.sleep(0.05)
        (root / "README.md").write_text("Written meanwhile.\n", encoding="utf-8")
        commit(root)
        assert loop.wait() == 0, log_file.read_text()[-6000:]
    run(root, "git", "reset", "--quiet", "HEAD^")
    assert "train_policy" not in ran(log_file.read_text())
    assert workspace(root)[1:] == before[1:] and not (root / ".cache/experiments/project").exists()
    svam, vpp = read_records(folder)[1]
    assert svam == first and vpp.name == "vpp-1-seed1-small"
    for record in (svam, vpp):
        assert record.budget["policy_steps"] == 4 and record.budget["demonstrations"] == 2
        assert record.labels == ("depth", "segmentation")
        assert [(e.task, e.index) for e in record.episodes] == [("button-press-topdown", 0), ("button-press-topdown", 1)]
        assert record.revision in run(root, "git", "for-each-ref", "refs/exps")
    assert [e.seed for e in svam.episodes] == [e.seed for e in vpp.episodes] and svam.budget == vpp.budget
    assert svam.policy != vpp.policy and svam.parameters > vpp.parameters and svam.latency and vpp.latency
    assert all(record.seconds("train_policy") for record in (svam, vpp)) and svam.seconds("evaluate")
    assert "evaluate: goes on from what an earlier run saved" in log_file.read_text()
    # What went on measured a part of its time; both policies may fail alike, and then the other's whole time stands for both.
    assert vpp.seconds("evaluate") in (None, svam.seconds("evaluate"))
    assert vpp.seconds("distill", "generate") == 0.0
    assert {"video", "geometric", "semantic", "rmse_std", "gripper", "object"} == svam.foreseen.keys() and not vpp.foreseen
    ours, theirs = svam.stages, vpp.stages
    assert all(stage.code and stage.params for name, stage in ours.items() if name != "code")
    assert ours["finetune_video"] == theirs["finetune_video"] and ours["train_policy"].code == theirs["train_policy"].code
    assert ours["train_policy"].params != theirs["train_policy"].params

    # Nothing is left to do. After a commit DVC decides: with the same work all comes from its run cache, and stays recorded.
    assert "2 runs finished, 0 of them now" in attempt(root, *LOOP).stderr
    page = run(root, sys.executable, "-m", "svam.experiments", "table")
    assert page.count("not distinguishable |") == 1
    commit(root)
    again = attempt(root, *LOOP)
    assert "2 runs finished, 2 of them now" in again.stderr and not {"train_policy", "evaluate"} & set(ran(again.stdout))
    later = read_records(folder)[1]
    assert [r.model_copy(update={"revision": ""}) for r in later] == [
        r.model_copy(update={"revision": ""}) for r in (svam, vpp)
    ]

    # A clone without data or experiments makes the same table.
    run(tmp_path, "git", "clone", "--quiet", str(root), str(tmp_path / "clone"))
    assert run(tmp_path / "clone", sys.executable, "-m", "svam.experiments", "table") == page
