"""The whole pipeline at a toy configuration: real classes, simulator and DVC, from nothing to the report and a remote."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from tests import ROOT
from tests.project import attempt, locked_stages, ran, run
from tests.warm import executable

pytestmark = pytest.mark.timeout(900)

KEPT_BY_GIT = ("data/report/", "data/foresight/", "data/code/")
REPORTED = {"success", "video_error_share", "geometric_cosine", "semantic_cosine", "action_error"}


@pytest.fixture(scope="module")
def project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, which tests may change."""
    root = tmp_path_factory.mktemp("dag") / "project"
    shutil.copytree(finished, root, symlinks=True)
    return root


def test_everything_is_made(finished: Path) -> None:
    metrics = json.loads((finished / "data/report/metrics.json").read_text())
    assert set(metrics) >= REPORTED
    assert all(isinstance(value, float) and np.isfinite(value) for value in metrics.values())
    results = json.loads((finished / "data/results/metrics.json").read_text())
    assert set(results["metaworld"]["rows"]) >= {"policy", "random", "expert", "held_out_instruction"}
    assert list((finished / "data/films").glob("*.mp4"))
    assert len(list((finished / "data/report").glob("*.png"))) >= 5
    foresight = json.loads((finished / "data/foresight/metrics.json").read_text())
    assert foresight["left_out"] == [] and {"gap", "depth", "attention"} <= set(foresight)


def test_nothing_is_left_to_do(project: Path) -> None:
    """Git has the reports and dvc.lock; no weights, data or scratch, and DVC scattered no .gitignore."""
    assert ran(run(project, "dvc", "repro")) == []
    assert run(project, "git", "status", "--porcelain") == ""
    tracked = run(project, "git", "ls-files").splitlines()
    assert "data/report/metrics.json" in tracked
    assert all(name.startswith(KEPT_BY_GIT) for name in tracked if name.startswith("data/"))
    assert [name for name in tracked if name.endswith(".gitignore")] == [".dvc/.gitignore", ".gitignore"]
    assert not list((project / "data").rglob("*.partial-*"))


def test_the_table_shows_results_also_of_a_single_run(project: Path) -> None:
    """Where all rows agree DVC would hide every column."""
    table = run(project, "make", "--file", str(ROOT / "Makefile"), "--assume-old", ".venv/.installed", "COLUMNS=240", "table")
    metrics = json.loads((project / "data/report/metrics.json").read_text())
    assert all(name in table for name in metrics)
    assert "threads" not in table and "svam/" not in table


def test_the_saved_policy_acts_without_dvc(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder works elsewhere on its own, by the code that README shows."""
    shutil.copytree(finished / "data/svam", tmp_path / "data/svam")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec((ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0], names)
    assert names["actions"].shape == (1, names["svam"].chunk, 4)
    assert names["actions"].dtype == np.float32
    assert np.isfinite(names["actions"]).all()


def test_a_wrong_param_costs_no_output(project: Path) -> None:
    """A bad value stops `dvc repro`, as users start it, with one sentence, and every output is still there."""
    params = project / "params.yaml"
    before = params.read_text()
    outputs = sorted(p for p in (project / "data").rglob("*") if p.is_file() and p.name != "params_checked.txt")
    try:
        yaml = YAML(typ="safe", pure=True)
        values = yaml.load(before)
        values["collect"]["episodes"] = "many"
        yaml.dump(values, params)
        done = attempt(project, sys.executable, "-m", "dvc", "repro")
        assert done.returncode != 0
        assert "collect.episodes is 'many'" in done.stdout + done.stderr
        assert all(file.is_file() for file in outputs)
    finally:
        params.write_text(before)


def test_damaged_outputs_are_made_again(project: Path) -> None:
    """DVC notices a flipped bit and a cut file in what stages wrote, and puts the same bytes back before they are used."""
    before = locked_stages(project)
    weights = project / "data/backbones/text/model.safetensors"
    shard = project / "data/generated/frames.npy"
    whole = {file: file.read_bytes() for file in (weights, shard)}
    weights.write_bytes(whole[weights][:-3] + bytes([whole[weights][-3] ^ 1]) + whole[weights][-2:])
    shard.write_bytes(whole[shard][: len(whole[shard]) // 2])
    assert ran(run(project, "dvc", "repro")) == [], "computed again, though the cache has it"
    assert {file: file.read_bytes() for file in whole} == whole
    assert locked_stages(project) == before


def test_results_are_shared_through_a_remote(project: Path, tmp_path: Path) -> None:
    """`dvc push`; then a clone knows without any data that its lock belongs, and needs to run nothing to have the results."""
    run(project, "dvc", "remote", "add", "--default", "shared", str(tmp_path / "remote"))
    run(project, "git", "commit", "--quiet", "--all", "--message", "remote")
    run(project, "dvc", "push", "--quiet")
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "--quiet", str(project), str(clone))
    belongs = (executable(), str(ROOT / ".ci/lock_belongs.py"))
    assert ran(run(clone, "dvc", "repro", "--pull", "--allow-missing")) == []
    assert not (clone / "data/svam").exists()

    # Edited code is noticed, without data; a comment is none.
    module = clone / "svam/report/figures.py"
    module.write_text("# A comment\n" + module.read_text())
    assert "belongs to the code" in run(clone, *belongs)
    edited = clone / "stages/generate.py"
    before = edited.read_text()
    edited.write_text(before + "LIMIT = 1\n")
    done = attempt(clone, *belongs)
    assert done.returncode == 1
    assert "generate" in done.stdout and "report" not in done.stdout
    edited.write_text(before)

    # Another figure size: only the report runs, on data that are pulled; first those in folders that a matrix fills, since DVC
    # does not find them by itself.
    params = clone / "params.yaml"
    params.write_text(params.read_text().replace("dpi: 100", "dpi: 60"))
    run(clone, "dvc", "pull", "finetune_video", "distill", "train_policy")
    assert ran(run(clone, "dvc", "repro", "--pull", "--allow-missing")) == ["code", "check_params", "report"]
    assert not (clone / "data/generated").exists()
