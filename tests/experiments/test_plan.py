"""What is planned, and what `dvc exp run` will make of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from svam.episodes.instructions import described_tasks
from svam.errors import ParamsError
from svam.experiments.__main__ import app
from svam.experiments.plan import FOLDER, VARIANTS, load_plan, planned_runs
from svam.files import read_yaml
from svam.params import load_params
from svam.simulation.scenes import scene_of
from tests import ROOT

PLAN: dict[str, Any] = read_yaml(FOLDER / "plan.yaml")
PARAMS = ROOT / "params.yaml"


def write_plan(folder: Path, **changes: Any) -> Path:
    YAML(typ="safe", pure=True).dump(PLAN | changes, folder / "plan.yaml")
    return folder / "plan.yaml"


def test_the_readme_states_variants_of_ours() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    stated = [re.findall("`(.*)`", line)[0].split() for line in lines if re.match(r"\| .* \| `(train_policy|distill)\.", line)]
    assert stated and all(arguments in [v["arguments"] for v in VARIANTS.values()] for arguments in stated)


def test_the_plan_is_of_equal_budgets_on_shared_goals(tmp_path: Path) -> None:
    runs = planned_runs(load_plan(), params=PARAMS)
    assert len({run.name for run in runs}) == len(runs) == 2 * 3 * 3 + 9
    assert runs[1].command[:7] == ["dvc", "exp", "run", "-n", "vpp-5-seed1-several_futures", "-S", runs[1].arguments[0]]
    for run in runs:
        policy, collect = run.params["train_policy"], run.params["collect"]
        assert policy["training"]["steps"] == read_yaml(PARAMS)["train_policy"]["training"]["steps"]
        assert (policy["seed"], policy["episodes_per_task"]) == (run.seed, run.size)
        assert run.params["evaluate"]["metaworld"]["episodes"] == (34 if run.variant in PLAN["core"] else 17)
        assert run.params["evaluate"]["metaworld"]["tasks"] == collect["tasks"] and collect["scenes"] == "shared"
        assert run.size < collect["episodes"] * (1 - run.params["convert"]["held_out"]), "fewer than the video model sees"
        for task in collect["tasks"]:
            assert set(scene_of(task).tasks) <= set(collect["tasks"]), "both sides of each scene"
    control = next(run for run in runs if run.variant == "vpp_frame_tokens").params
    assert control["train_policy"]["context"] == ["one_step", "observation"]
    assert control["train_policy"]["observation_encoder"] == "frozen" and control["distill"]["branches"] == []


def test_a_parameter_file_of_a_preset_and_changes(tmp_path: Path) -> None:
    """What is printed is a whole parameter file; a preset may have lists over several lines."""
    done = CliRunner().invoke(app, ["params", "metaworld-50", "evaluate.protocols=[metaworld]", "evaluate.policy=expert"])
    assert done.exit_code == 0, done.output
    (tmp_path / "params.yaml").write_text(done.stdout, encoding="utf-8")
    params = load_params(tmp_path / "params.yaml")
    assert params.evaluate.metaworld.tasks == params.collect.tasks == described_tasks() and params.evaluate.policy == "expert"
    done = CliRunner().invoke(app, ["params", "metaworld"])
    assert done.exit_code == 1 and "'metaworld' is no preset; did you mean 'metaworld-50'?; those are" in done.output


def test_some_runs_of_a_plan(tmp_path: Path) -> None:
    plan = load_plan(
        write_plan(tmp_path, collection="default", steps=99, seeds=[1], episodes_per_task=[5], others=["goal_frame"])
    )
    runs = planned_runs(plan, ["diff*", "goal_frame"], PARAMS)
    assert [run.name for run in runs] == ["diffusion_policy-5-seed1-default", "goal_frame-5-seed1-default"]
    assert runs[0].params["train_policy"]["training"]["steps"] == 99
    with pytest.raises(ParamsError, match="--only vppp: no planned run is called so"):
        planned_runs(plan, ["vppp"], PARAMS)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"others": ["vppp"]}, "others.0 is 'vppp'; expected"),
    ({"collection": "none"}, "collection is 'none', expected one of collections: default, several_futures"),
    ({"size": 1}, "unknown key 'size'"),
    (["train_policy.contxt=[one_step]"], "contxt.*with -S train_policy.contxt=.one_step."),
    (["evaluate.batch=many"], "params.yaml: evaluate.batch is 'many'.*with -S evaluate.batch=many"),
    (["distill.target=ground_truth"], "variants change S-VAM's params, and these are not: expected train_policy.context="),
])  # fmt: skip
def test_a_wrong_plan_is_one_sentence(tmp_path: Path, changes: dict[str, Any] | list[str], sentence: str) -> None:
    if isinstance(changes, list):
        changes = {"collections": {"mine": changes}, "collection": "mine"}
    with pytest.raises(ParamsError, match=sentence):
        planned_runs(load_plan(write_plan(tmp_path, **changes)), params=PARAMS)
