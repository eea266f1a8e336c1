"""What is planned, and what `dvc exp run` will make of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from svam.agreement import check_agreement
from svam.episodes.instructions import described_tasks
from svam.errors import ParamsError
from svam.experiments.__main__ import app
from svam.experiments.plan import FOLDER, VARIANTS, load_plan, planned_runs
from svam.experiments.screening import published_tier, screened
from svam.files import read_yaml
from svam.params import Params, load_params
from svam.simulation.scenes import scene_of
from tests import ROOT

PLAN: dict[str, Any] = read_yaml(FOLDER / "plan.yaml")
CORE = PLAN["runs"][0]["variants"]
PARAMS = ROOT / "params.yaml"


def write_plan(folder: Path, **changes: Any) -> Path:
    YAML(typ="safe", pure=True).dump(PLAN | changes, folder / "plan.yaml")
    return folder / "plan.yaml"


def test_the_readme_states_variants_of_ours() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    stated = [re.findall("`(.*)`", line)[0].split() for line in lines if re.match(r"\| .* \| `(train_policy|distill)\.", line)]
    assert stated and all(arguments in [v["arguments"] for v in VARIANTS.values()] for arguments in stated)


def test_the_plan_is_of_equal_budgets_on_shared_goals(tmp_path: Path) -> None:
    runs = planned_runs(load_plan(FOLDER / "plan.yaml"), params=PARAMS)
    assert len({run.name for run in runs}) == len(runs) == 2 * 3 * 3 + 9
    assert runs[1].command[:7] == ["dvc", "exp", "run", "-n", "vpp-5-seed1-several_futures", "-S", runs[1].arguments[0]]
    for run in runs:
        policy, collect = run.params["train_policy"], run.params["collect"]
        assert policy["training"]["steps"] == read_yaml(PARAMS)["train_policy"]["training"]["steps"]
        assert (policy["seed"], policy["episodes_per_task"]) == (run.seed, run.size)
        assert run.params["evaluate"]["metaworld"]["episodes"] == (34 if run.variant in PLAN["runs"][0]["variants"] else 17)
        assert run.params["evaluate"]["metaworld"]["tasks"] == collect["tasks"] and collect["scenes"] == "shared"
        assert run.size < collect["episodes"] * (1 - run.params["convert"]["held_out"]), "fewer than the video model sees"
        for task in collect["tasks"]:
            assert set(scene_of(task).tasks) <= set(collect["tasks"]), "both sides of each scene"
    control = next(run for run in runs if run.variant == "vpp_frame").params
    assert control["train_policy"]["context"] == ["one_step", "observation"]
    assert control["train_policy"]["observation_encoder"] == "frozen" and control["distill"]["branches"] == []


def test_the_registered_comparison_is_what_its_page_says() -> None:
    """Every regime has S-VAM and both primary opponents. Four differ in how F is made alone, one is `published` with teachers
    that see no labels."""
    plan = load_plan(FOLDER / "registered.yaml")
    asked = {(v, r.regime, s) for r in plan.runs for v in r.variants for s in r.seeds}
    primary = {(v, r.regime, s) for r in plan.runs if r.primary for v in r.variants for s in r.seeds}
    assert primary == {(v, "published", s) for v in ("vpp", "vpp_frame") for s in (1, 2, 3, 4, 5)}
    regimes = [name for name in plan.regimes if name != "screening"]
    assert {(v, r, s) for v in ("svam", "vpp", "vpp_frame") for r in regimes for s in (1, 2)} <= asked
    assert {one for one in asked if one[1] == "screening"} == {("vpp", "screening", 101)}

    screening, *svam = planned_runs(plan, ["svam-*-seed1-*", "*-screening"], PARAMS)
    params = {run.regime: run.params for run in svam}
    assert set(params) == {"published", "published_levels", "published_noise", "ours", "self_supervised"} == set(regimes)
    unlabelled = params.pop("self_supervised")
    teachers = unlabelled["prepare_backbones"]
    assert {teachers[branch]["objective"] for branch in ("geometric", "semantic")} == {"self_supervised"}
    seen = {branch: params["published"]["prepare_backbones"][branch] for branch in ("geometric", "semantic")}
    others = {branch: teachers[branch] | {k: seen[branch][k] for k in ("objective", "family")} for branch in seen}
    assert unlabelled | {"prepare_backbones": teachers | others} == params["published"]
    made = {regime: values["finetune_video"] for regime, values in params.items()}
    draws = {regime: values["train_policy"].pop("feature_draws") for regime, values in params.items()}
    assert {regime: (m["first_sigma_share"], m["noise"], draws[regime]) for regime, m in made.items()} == {
        "published": (0.0, "fresh", 4), "published_levels": (0.0, "fixed", 1), "published_noise": (0.3, "fresh", 4),
        "ours": (0.3, "fixed", 1),
    }  # fmt: skip
    assert made["published"] | {"noise": "fixed"} == made["published_levels"]
    assert made["ours"] | {"noise": "fresh"} == made["published_noise"]
    assert all(values | {"finetune_video": made["ours"]} == params["ours"] for values in params.values())
    tasks, screened = params["ours"]["collect"]["tasks"], screening.params["collect"]["tasks"]
    assert len(tasks) == 12 and screened[:12] == tasks and len(set(screened)) == 18
    assert all(task in (ROOT / "data/compare/registered/README.md").read_text(encoding="utf-8") for task in screened)
    assert not params["ours"]["train_policy"]["proprioception"] and screening.params["seed"] != params["ours"]["seed"]


def test_the_published_table_is_planned_whole_and_in_parts() -> None:
    """All fifty tasks with as many goals each; a part is one pipeline of all variants, of fewer steps and else the same."""
    whole, parts = (load_plan(FOLDER / f"{name}.yaml") for name in ("mt50", "mt50_parts"))
    for plan in (whole, parts):
        assert {v: r.primary for r in plan.runs for v in r.variants} == {"svam": False, "vpp": True, "diffusion_policy": False}
        assert all((r.episodes, r.episodes_per_task) == (25, [50]) for r in plan.runs)
    assert len({tuple(r.pipelines) for r in whole.runs}) == 1 and len(whole.runs[0].pipelines) > 1

    (large,) = planned_runs(whole, ["svam-*-seed1-mt50-pipeline2"], PARAMS)
    part = planned_runs(parts, ["*-pipeline3"], PARAMS)
    assert [run.variant for run in part] == ["svam", "vpp", "diffusion_policy"]
    assert {run.params["seed"] for run in part} == {3} and large.params["seed"] == 2
    small = part[0].params
    assert small["evaluate"] == large.params["evaluate"] and small["collect"] == large.params["collect"]
    assert small["evaluate"]["metaworld"]["tasks"] == small["collect"]["tasks"] == described_tasks()
    sizes = [params["finetune_video"]["unet"] | params["train_policy"]["transformer"] for params in (small, large.params)]
    assert sizes[0] == sizes[1]
    assert small["finetune_video"]["training"]["steps"] * 0.092 < 540 / 2, "at the rate that was measured on an H200"


def test_the_shift_of_looks_has_actions_in_three_and_is_evaluated_in_the_fourth() -> None:
    runs = planned_runs(load_plan(FOLDER / "looks.yaml"), params=PARAMS)
    assert {run.variant for run in runs} == {"svam", "vpp", "vpp_frame", "frame_tokens", "diffusion_policy"} and len(runs) == 10
    for run in runs:
        params = Params.model_validate(run.params)
        check_agreement(params)
        acting, video = params.convert.sets
        looks = params.collect.looks
        assert (acting.policy, acting.convert["options"]["looks"]) == (True, looks[:3])
        assert (video.policy, video.convert["options"]["looks"]) == (False, params.collect.unlabelled)
        assert params.collect.unlabelled == [params.evaluate.metaworld.look] == looks[3:]
        (episodes,) = {params.collect.episodes_for(task) for task in params.collect.tasks}
        demonstrations = sum(looks[k % 4] != "D" for k in range(episodes))
        assert run.size <= demonstrations - round(params.convert.held_out * demonstrations)


def test_the_registered_comparison_on_two_cores_asks_the_same() -> None:
    """In parts, of other sizes and four tasks each; tasks (after its screening), regimes and what decides are the same."""
    plans = [load_plan(FOLDER / f"{name}.yaml") for name in ("registered", "registered_cpu")]
    registered, cpu = plans
    assert (cpu.collection, cpu.arguments, cpu.regimes) == ("registered_cpu", ["mt12-cpu"], registered.regimes)
    whole, *_ = planned_runs(registered, ["svam-50-seed1-*-published"], PARAMS)
    runs = [run for run in planned_runs(cpu, params=PARAMS) if run.regime != "screening"]
    for regime in registered.regimes.keys() - {"screening"}:
        pipelines = range(1, 7) if regime == "published" else range(1, 4)
        found = {(run.variant, run.pipeline) for run in runs if run.regime == regime}
        assert found == {(v, p) for v in ("svam", "vpp_frame", "vpp") for p in pipelines}, regime
    assert {(run.variant, run.regime) for run in runs if run.primary} == {(v, "published") for v in ("vpp", "vpp_frame")}
    tasks = dict[int | None, list[str]]()
    for run in runs:
        own = run.params["evaluate"]["metaworld"]
        assert run.pipeline == run.params["seed"] and tasks.setdefault(run.pipeline, own["tasks"]) == own["tasks"]
        assert own == whole.params["evaluate"]["metaworld"] | {"tasks": own["tasks"], "episodes": 40}
        same = ("episodes", "episodes_of", "tail", "max_steps", "noisy_share")
        assert [run.params["collect"][key] for key in same] == [whole.params["collect"][key] for key in same]
        assert run.params["collect"]["tasks"] == own["tasks"] and run.params["machine"]["device"] == "cpu"
    left = screened(FOLDER / "registered_cpu.yaml", ROOT / "data/compare", PARAMS).splitlines()[-1]
    for once in ((1, 2, 3), (4, 5, 6)):
        assert sorted(task for p in once for task in tasks[p]) == sorted(re.findall("[a-z-]+", left.partition("[")[2]))
    assert all([published_tier(task) for task in own] == ["medium"] * 2 + ["hard"] * 2 for own in tasks.values())


def test_arguments_of_a_pipeline_that_is_not_run_are_refused(tmp_path: Path) -> None:
    file = write_plan(tmp_path, arguments_of={5: ["threads=1"]})
    with pytest.raises(ParamsError, match=r"plan\.yaml: .*arguments_of names the pipelines \[5\], which no runs have"):
        load_plan(file)


def test_a_part_of_the_registered_comparison_is_a_pipeline_of_all_that_decides() -> None:
    parts = load_plan(FOLDER / "registered_parts.yaml")
    part = planned_runs(parts, ["*-published-pipeline3"], PARAMS)
    assert [(run.variant, run.primary) for run in part] == [("svam", False), ("vpp_frame", True), ("vpp", True)]
    (large,) = planned_runs(load_plan(FOLDER / "registered.yaml"), ["svam-50-seed1-*-published"], PARAMS)
    for run in part:
        assert run.params["seed"] == 3 and run.params["evaluate"] == large.params["evaluate"]
        assert run.params["collect"] == large.params["collect"]
        assert run.params["finetune_video"]["noise"] == "fresh" and run.params["train_policy"]["feature_draws"] == 4
        assert run.params["finetune_video"]["training"]["steps"] * 0.092 < 540 / 2, "at the rate that was measured on an H200"
    (screening,) = planned_runs(parts, ["*-screening"], PARAMS)
    assert (screening.variant, screening.params["seed"]) == ("vpp", 101)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("- a list\n", r"base\.yaml: .*expected"),
        ("extends: plan.yaml\n", r"base\.yaml: .*extends"),
        ("wrong: 1\n", r"base\.yaml: .*wrong"),
    ],
)
def test_a_plan_that_extends_what_is_no_plan_names_that_file(tmp_path: Path, base: str, message: str) -> None:
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "plan.yaml").write_text("extends: base.yaml\ncollection: mine\n")
    with pytest.raises(ParamsError, match=message):
        load_plan(tmp_path / "plan.yaml")


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
    core, others = ({"variants": v, "seeds": [1], "episodes_per_task": [5], "episodes": 3} for v in (CORE, ["goal_frame"]))
    runs = [core, others | {"regime": "wide"}]
    changes = {"collection": "mine", "arguments": ["quick"], "steps": 99, "regimes": {"wide": ["distill.width=192"]}}
    plan = load_plan(write_plan(tmp_path, runs=runs, **changes))
    chosen = planned_runs(plan, ["diff*", "goal_frame"], PARAMS)
    assert [run.name for run in chosen] == ["diffusion_policy-5-seed1-mine", "goal_frame-5-seed1-mine-wide"]
    assert [run.params["distill"]["width"] for run in chosen] == [96, 192] and [run.regime for run in chosen] == ["", "wide"]
    assert chosen[0].params["collect"]["episodes"] == 8, "a preset, but for what a comparison fixes"
    assert chosen[0].params["train_policy"]["training"]["steps"] == 99
    with pytest.raises(ParamsError, match="--only vppp: no planned run is called so"):
        planned_runs(plan, ["vppp"], PARAMS)


def test_a_pipeline_is_a_seed_of_all_but_the_policy(tmp_path: Path) -> None:
    asked = {"variants": ["vpp"], "seeds": [1, 2], "episodes_per_task": [5], "episodes": 3}
    runs = planned_runs(load_plan(write_plan(tmp_path, runs=[asked | {"pipelines": [7, 8]}])), params=PARAMS)
    assert [(run.pipeline, run.params["seed"], run.seed) for run in runs] == [(7, 7, 1), (7, 7, 2), (8, 8, 1), (8, 8, 2)]
    assert [run.name for run in runs[1:3]] == ["vpp-5-seed2-several_futures-pipeline7", "vpp-5-seed1-several_futures-pipeline8"]
    (without,) = planned_runs(load_plan(write_plan(tmp_path, runs=[asked])), ["*-seed1-*"], PARAMS)
    assert without.pipeline is None and without.params["seed"] == read_yaml(PARAMS)["seed"]


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"runs": [PLAN["runs"][0] | {"variants": ["vppp"]}]}, "runs.0.variants.0 is 'vppp'; expected"),
    ({"runs": [PLAN["runs"][0] | {"regime": "wide"}]}, "runs are of the regimes ..wide.., and regimes describes .."),
    ({"arguments": ["quik"]}, "'quik' is no preset; did you mean 'quick'"),
    ({"size": 1}, "unknown key 'size'"),
    (["train_policy.contxt=[one_step]"], "contxt.*with -S train_policy.contxt=.one_step."),
    (["evaluate.batch=many"], "params.yaml: evaluate.batch is 'many'.*with -S evaluate.batch=many"),
    (["distill.target=ground_truth"], "variants change S-VAM's params, and these are not: expected train_policy.context="),
])  # fmt: skip
def test_a_wrong_plan_is_one_sentence(tmp_path: Path, changes: dict[str, Any] | list[str], sentence: str) -> None:
    if isinstance(changes, list):
        changes = {"arguments": changes}
    with pytest.raises(ParamsError, match=sentence):
        planned_runs(load_plan(write_plan(tmp_path, **changes)), params=PARAMS)
