"""The comparison before its statistics: the plan, keys, records, what stages cost, and what counts as finished."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML
from typer.testing import CliRunner

from svam.experiments import clock
from svam.experiments.__main__ import app
from svam.experiments.clock import Clock, accounts, total
from svam.experiments.keys import Project, key_of, stages_of, upstream
from svam.experiments.loop import Plan
from svam.experiments.plan import CORE, VARIANTS, compare_of, overridden, pipeline_line, plan_of, settings_of
from svam.experiments.records import Budget, Episode, Record, Stage, machine, read_record, read_records, write_record
from svam.experiments.workspace import put_back, run_noted
from svam.files import FileError, write_json
from svam.params import ParamsError
from svam.simulation.scenes import scene_of
from tests.project import run as run_in
from tests.stage_deps import ROOT

PROJECT = Project.read(ROOT)
RAW: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
BUDGET = Budget(
    policy_steps=4, batch=2, learning_rate=0.1, episodes_per_task=5, demonstrations=20, data="d.dir", max_steps=500, execute=8
)


def make_record(variant: str = "svam", size: int = 5, seed: int = 1, wins: str = "1010", **changes: Any) -> Record:
    """A finished run whose episodes of one task succeeded as `wins` says."""
    episodes = [Episode(task="reach", index=i, seed=100 + i, success=c == "1", steps=9) for i, c in enumerate(wins)]
    values: dict[str, Any] = {
        "name": f"{variant}-{size}-seed{seed}", "variant": variant, "size": size, "seed": seed, "arguments": [], "key": "k",
        "revision": "r", "machine": machine(), "parameters": 7, "policy": "p.dir",
        "budget": BUDGET.model_copy(update={"episodes_per_task": size}), "video": 1.0, "distillation": 2.0,
        "policy_training": 30.0, "evaluation": 40.0, "overhead": 5.0, "stages": {}, "episodes": episodes,
    }  # fmt: skip
    return Record(**(values | changes))


def write_params(folder: Path, **compare: Any) -> Path:
    """The project's params with changes to `compare`."""
    YAML(typ="safe", pure=True).dump(RAW | {"compare": RAW["compare"] | compare}, folder / "params.yaml")
    return folder / "params.yaml"


def readme_variants() -> dict[str, tuple[str, ...]]:
    """Label -> `-S` arguments, as the README's table of variants states them."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| variant | `-S` arguments of `dvc exp run` |")
    rows = [line.strip("| ").split(" | ") for line in lines[start + 2 :][: lines[start:].index("") - 2]]
    return {label: tuple(part for text in re.findall("`(.*)`", cell) for part in text.split()) for label, cell in rows}


def test_variants_are_those_of_the_readme() -> None:
    stated = list(readme_variants().values())
    assert len(VARIANTS) == 10
    for variant in VARIANTS.values():
        assert variant.arguments in stated, variant.label


def test_the_plan(tmp_path: Path) -> None:
    compare = {
        "seeds": [3, 4], "episodes_per_task": [2, 6], "ablations": ["multi_step"], "ablation_size": 6, "ablation_seed": 4,
        "episodes": 9, "ablation_episodes": 8, "steps": 123, "collections": {"default": ["evaluate.tasks=[reach]"]},
        "collection": "default",
    }  # fmt: skip
    runs, raw = plan_of(write_params(tmp_path, **compare))
    expected = [f"{variant}-{size}-seed{seed}" for seed in (3, 4) for size in (2, 6) for variant in CORE]
    assert [run.name for run in runs] == [*expected, "multi_step-6-seed4"]
    for run in runs:
        assert run.line.startswith(f"dvc exp run --temp -n {run.name} -S ")
        assert shlex.split(run.line) == run.command
        settings = settings_of(raw, run.arguments)
        assert (settings.train_policy.seed, settings.train_policy.episodes_per_task) == (run.seed, run.size)
        assert settings.train_policy.training.steps == 123
        assert settings.evaluate.tasks == ["reach"]
        assert settings.evaluate.episodes == (8 if run.variant == "multi_step" else 9)
    assert settings_of(raw, runs[1].arguments).train_policy.context == ["one_step"]


def test_equal_steps_by_default(tmp_path: Path) -> None:
    runs, raw = plan_of(ROOT / "params.yaml", "default")
    assert len({run.name for run in runs}) == len(runs) == 25
    assert {settings_of(raw, run.arguments).train_policy.training.steps for run in runs} == {RAW["compare"]["steps"]}
    unsaid, raw = plan_of(write_params(tmp_path, steps=None))
    own = RAW["train_policy"]["training"]["steps"]
    assert {settings_of(raw, run.arguments).train_policy.training.steps for run in unsaid} == {own}
    core = [settings_of(raw, run.arguments).evaluate for run in runs if run.variant in CORE]
    assert {section.episodes for section in core} == {RAW["compare"]["episodes"]}
    core = [settings_of(raw, run.arguments).evaluate for run in plan_of(ROOT / "params.yaml")[0] if run.variant in CORE]
    assert all(len(section.tasks) * section.episodes >= 200 for section in core)


@pytest.mark.parametrize(
    ("compare", "sentence"),
    [
        ({"ablation_size": 7}, "compare.ablation_size is 7 and ablation_seed 1; expected one of episodes_per_task .5"),
        ({"ablation_episodes": 51, "episodes": 50}, "compare.ablation_episodes is 51, expected at most episodes .50."),
        ({"seeds": [1, 1]}, "compare.seeds is .1, 1., expected at least one, and each once"),
        ({"collection": "none"}, "compare.collection is 'none', expected one of compare.collections: ambiguous, default"),
        (["evaluate.tasks=[]"], "evaluate.tasks is .. in collection 'mine', expected at least one"),
        (["train_policy.contxt=[one_step]"], "'train_policy.contxt=.one_step.', expected key=value"),
        (["collect.episodes_of={}"], "'collect.episodes_of=..' sets a mapping, which DVC would merge.*or null"),
        (["evaluate.batch=many"], "evaluate.batch is 'many'"),
        (["distill.target=ground_truth"], "distill.target is 'ground_truth'; the comparison needs S-VAM"),
    ],
)
def test_a_wrong_plan_is_one_sentence(tmp_path: Path, compare: dict[str, Any] | list[str], sentence: str) -> None:
    if isinstance(compare, list):
        compare = {"collections": {"mine": compare}, "collection": "mine"}
    with pytest.raises(ParamsError, match=sentence):
        plan_of(write_params(tmp_path, **compare))


def test_collections_differ_in_names_data_and_folder(tmp_path: Path) -> None:
    runs, raw = plan_of(ROOT / "params.yaml", "ambiguous")
    other, _ = plan_of(ROOT / "params.yaml", "default")
    assert not {run.name for run in runs} & {run.name for run in other}
    for run in runs:
        assert run.name == f"{run.variant}-{run.size}-seed{run.seed}-ambiguous"
        settings = settings_of(raw, run.arguments)
        collected = settings.collect
        assert collected.scenes == "shared" and len(collected.styles) > 1 and not collected.episodes_of
        assert settings.evaluate.tasks == collected.tasks
        assert run.size < collected.episodes * (1 - settings.convert.held_out), "fewer labels than the video model sees"
        for task in collected.tasks:
            assert set(scene_of(task).tasks) <= set(collected.tasks), "both sides of each scene"
    with chdir(ROOT):
        plan = Plan(tmp_path, "ambiguous")
        assert (plan.folder, Plan(tmp_path, "default").folder) == (tmp_path / "ambiguous", tmp_path / "default")
        assert not set(plan.keys.values()) & set(Plan(tmp_path, "default").keys.values())
        printed = CliRunner().invoke(
            app, ["plan", "--records", str(tmp_path), "--collection", "ambiguous", "--only", "vpp-5-*"]
        )
    assert f"# the whole pipeline on this collection: {plan.pipeline}" in printed.stdout
    assert plan.pipeline.startswith("dvc exp run --temp -n ambiguous -S ")
    assert pipeline_line(compare_of(ROOT / "params.yaml", "default")) == "dvc repro"


def test_arguments_mean_to_dvc_what_they_mean_here(tmp_path: Path) -> None:
    arguments = RAW["compare"]["collections"]["ambiguous"]
    file = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", file)
    apply_overrides(file, arguments)
    assert settings_of(YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))) == settings_of(RAW, arguments)


def test_stages_are_read_as_dvc_reads_them() -> None:
    with chdir(ROOT), Repo() as repo:
        theirs = {
            stage.addressing: (
                {dep.def_path for dep in stage.deps if dep.def_path != "params.yaml"},
                {o.def_path for o in stage.outs},
            )
            for stage in repo.index.stages
        }
    ours = {name: (set(s.deps), set(s.outs)) for name, s in stages_of(PROJECT.pipeline, RAW).items()}
    assert ours == theirs


def test_what_a_policy_without_decouplers_rests_on() -> None:
    every = upstream(stages_of(PROJECT.pipeline, RAW))
    assert {"collect@reach", "generate", "distill@geometric", "cache_teacher@semantic", "evaluate"} <= set(every)
    assert not {"report", "check_params"} & set(every)
    without = upstream(stages_of(PROJECT.pipeline, overridden(RAW, VARIANTS["vpp"].arguments)))
    assert set(every) - set(without) == {
        f"{s}@{b}" for s in ("cache_teacher", "distill") for b in ("geometric", "semantic")
    } | {"generate"}


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (["distill.width=64"], {"svam"}),
        (["train_policy.chunk=9"], {"svam", "vpp"}),
        (["evaluate.max_steps=400"], {"svam", "vpp"}),
        (["collect.tail=4"], {"svam", "vpp"}),
        (["report.dpi=90", "machine.workers=1", "compare.episodes=51"], set()),
    ],
)
def test_keys_follow_the_params_that_matter(change: list[str], changed: set[str]) -> None:
    found = set()
    for variant in ("svam", "vpp"):
        before, after = (overridden(raw, VARIANTS[variant].arguments) for raw in (RAW, overridden(RAW, change)))
        if key_of(PROJECT, before) != key_of(PROJECT, after):
            found.add(variant)
    assert found == changed


@pytest.mark.parametrize(
    ("module", "changed"),
    [
        ("svam/training/distill.py", {"svam"}),
        ("svam/models/policy.py", {"svam", "vpp"}),
        ("svam/report/tables.py", set()),
        ("svam/experiments/loop.py", set()),
    ],
)
def test_keys_follow_the_code_that_matters(tmp_path: Path, module: str, changed: set[str]) -> None:
    for folder in ("svam", "stages"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    before = Project.read(tmp_path)
    with (tmp_path / module).open("a", encoding="utf-8") as file:
        file.write("# edited\n")
    after = Project.read(tmp_path)
    values = {variant: overridden(RAW, VARIANTS[variant].arguments) for variant in ("svam", "vpp")}
    assert {variant for variant, v in values.items() if key_of(before, v) != key_of(after, v)} == changed


def test_data_from_outside_counts_by_its_hash_in_the_lock_file() -> None:
    values = overridden(RAW, ["collect.tasks=[]", "collect.episodes_of=null", "convert.depends_on=elsewhere"])
    keys = []
    for md5 in ("one", "other"):
        locked = {"convert": {"deps": [{"path": "elsewhere", "md5": md5}]}}
        keys.append(key_of(Project(PROJECT.pipeline, locked, PROJECT.code), values))
    assert keys[0] != keys[1]


def test_a_record_comes_back(tmp_path: Path) -> None:
    record = make_record(wins="110", stages={"evaluate": Stage(work="w", seconds=None)})
    file = write_record(tmp_path, record)
    write_json(tmp_path / "latency.json", {})
    assert file.name == "svam-5-seed1.json"
    assert read_records(tmp_path) == [record]
    assert sum('"task"' in line for line in file.read_text(encoding="utf-8").splitlines()) == 3
    file.write_text(file.read_text(encoding="utf-8").replace('"revision"', '"version"'), encoding="utf-8")
    with pytest.raises(FileError, match="svam-5-seed1.json: not the record of a run: revision"):
        read_record(file)


def test_finished_is_what_has_a_record_of_the_same_key(tmp_path: Path) -> None:
    with chdir(ROOT):
        plan = Plan(tmp_path, "default")
        assert all(planned.record is None for planned in plan.state())
        write_record(plan.folder, make_record("vpp", key=plan.keys["vpp-5-seed1"]))
        write_record(plan.folder, make_record("svam", key="of other params"))
        assert {run.name for run, _, record in plan.state() if record is not None} == {"vpp-5-seed1"}
        assert {run.name for run, *_ in plan.state(["vpp-*"])} == {f"vpp-{n}-seed{s}" for n in (5, 10, 30) for s in (1, 2)}
        assert {run.name for run, *_ in plan.state(["vpp-*"])} == {run.name for run, *_ in plan.state(["vpp"])}
        with pytest.raises(FileError, match="--only vppp: no run of the plan"):
            plan.state(["vppp"])


def test_times_are_measured_or_not_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run of 4 steps and 4 episodes; the planned ones have episodes and steps as the params say."""
    episodes = 4 * RAW["compare"]["episodes"]
    share = RAW["compare"]["steps"] / RAW["train_policy"]["training"]["steps"]
    seconds = 30.0 * RAW["compare"]["steps"] / 4 + 40.0 * episodes / 4 + 5.0
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(ROOT)
    plan = Plan(tmp_path, "default")
    runs = {run.name: run for run in plan.runs}
    assert plan.estimate(runs["svam-10-seed1"], read_records(plan.folder)) is None
    write_json(tmp_path / ".cache/times/train_policy.json", {"seconds": 600.0})
    write_json(tmp_path / ".cache/times/evaluate.json", {"seconds": 140.0})
    # The default evaluation has 4 x (25 + 10) = 140 episodes.
    assert plan.estimate(runs["svam-10-seed1"], read_records(plan.folder)) == (
        600.0 * share + 140.0 * episodes / 140,
        "the last `dvc repro` here",
    )
    assert plan.estimate(runs["vpp-10-seed1"], read_records(plan.folder)) is None
    write_record(plan.folder, make_record("vpp"))
    write_record(plan.folder, make_record("diffusion_policy", machine="another computer"))
    assert plan.estimate(runs["vpp-30-seed2"], read_records(plan.folder)) == (seconds, "1 finished of this variant")
    assert plan.estimate(runs["diffusion_policy-30-seed2"], read_records(plan.folder)) is None
    printed = (
        CliRunner().invoke(app, ["plan", "--records", str(tmp_path), "--collection", "default", "--only", "*-30-seed2"]).stdout
    )
    minutes = round(seconds / 60)
    time = f"about {minutes // 60} h {minutes % 60} min"
    assert "-n vpp-30-seed2" in printed and f"# {time} (by 1 finished of this variant)" in printed
    assert f"# 3 runs, 0 finished; the other 3: {time} and 2 whose variant was not measured here" in printed


def account(folder: Path, stage: str, seconds: float, ended: float) -> None:
    """What a stage leaves in `.cache/times` when it ends."""
    write_json(folder / f"{stage}.json", {"seconds": seconds})
    os.utime(folder / f"{stage}.json", (ended, ended))


def test_a_killed_run_counts_whole_stages_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    account(tmp_path / "times", "train_policy", 1.0, now - 1000)  # of another run
    account(tmp_path / "times", "report", 1.0, now - 1000)
    monkeypatch.setattr(clock.time, "time", lambda: now)
    first = Clock(tmp_path / "notes", tmp_path / "times", "svam-5-seed1", "key")
    assert first.seconds() == {}
    account(tmp_path / "times", "distill@semantic", 20.0, now + 20)  # then killed within train_policy
    monkeypatch.setattr(clock.time, "time", lambda: now + 50)
    second = Clock(tmp_path / "notes", tmp_path / "times", "svam-5-seed1", "key")
    account(tmp_path / "times", "train_policy", 5.0, now + 55)
    account(tmp_path / "times", "evaluate", 7.0, now + 62)
    assert second.seconds() == {"distill@semantic": 20.0, "evaluate": 7.0}
    assert second.overhead() is None
    # Killed once more, within the report; what the second attempt went on with is still not the whole.
    monkeypatch.setattr(clock.time, "time", lambda: now + 70)
    third = Clock(tmp_path / "notes", tmp_path / "times", "svam-5-seed1", "key")
    account(tmp_path / "times", "report", 3.0, now + 75)
    assert third.seconds() == {"distill@semantic": 20.0, "evaluate": 7.0}
    # A note of changed work, or of a run that was recorded, is none of this run.
    assert Clock(tmp_path / "notes", tmp_path / "times", "svam-5-seed1", "other key").begins == [now + 70]
    third.end()
    assert Clock(tmp_path / "notes", tmp_path / "times", "svam-5-seed1", "key").begins == [now + 70]


def test_an_uninterrupted_run_knows_the_time_outside_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(clock.time, "time", lambda: now)
    running = Clock(tmp_path / "notes", tmp_path / "times", "svam-5-seed1", "key")
    account(tmp_path / "times", "evaluate", 7.0, now + 8)
    (tmp_path / "times/generate.json").write_text("{")
    monkeypatch.setattr(clock.time, "time", lambda: now + 10)
    assert running.seconds() == {"evaluate": 7.0}
    assert running.overhead() == 3.0


def test_seconds_are_of_the_same_work(tmp_path: Path) -> None:
    """Own measurement; another record's of the same work; the workspace's last account, unless it is another run's."""
    entries = {name: {"cmd": name, "deps": [], "params": {}} for name in ("video", "distill", "policy")}
    changed = entries | {"distill": {"cmd": "distill", "deps": [], "params": {"width": 1}}}
    account(tmp_path, "video", 10.0, 1.0)
    account(tmp_path, "distill", 20.0, 1.0)
    first = clock.stages_of(entries, {"policy": 5.0}, [], entries, tmp_path)
    assert {name: stage.seconds for name, stage in first.items()} == {"video": 10.0, "distill": 20.0, "policy": 5.0}
    account(tmp_path, "distill", 33.0, 2.0)
    record = make_record(stages=first)
    second = clock.stages_of(changed, {"distill": 33.0}, [record], entries, tmp_path)
    assert {name: stage.seconds for name, stage in second.items()} == {"video": 10.0, "distill": 33.0, "policy": 5.0}
    assert second["video"].work == first["video"].work and second["distill"].work != first["distill"].work
    third = clock.stages_of(entries, {}, [make_record(stages=second)], entries, tmp_path)
    assert third["distill"].seconds is None
    assert total(second, ["video", "distill"]) == 43.0 and total(third, ["video", "distill"]) is None
    assert list(accounts(tmp_path)) == ["video", "distill"]


def borrowed(root: Path, note: Path) -> None:
    """Leave the workspace as a DVC does that is killed while it takes up an experiment: the same steps, and no end."""
    steps = (
        "git stash push --quiet; git checkout --quiet --detach; git stash apply --quiet; echo changed > params.yaml; git add ."
    )
    with chdir(root), pytest.raises(FileNotFoundError):
        run_noted(["bash", "-c", f"{steps}; cp {note} {note}.kept; rm {note}"], note)
    Path(f"{note}.kept").rename(note)


@pytest.mark.parametrize("dirty", [False, True])
def test_a_workspace_that_a_killed_dvc_had_is_put_back(tmp_path: Path, dirty: bool) -> None:
    root, note = tmp_path / "project", tmp_path / "workspace.json"
    root.mkdir()
    for name in ("params.yaml", "code.py"):
        (root / name).write_text("committed\n")
    for command in (
        "init --quiet --initial-branch work",
        "config user.email a@b.c",
        "config user.name t",
        "add .",
        "commit -qm all",
    ):
        run_in(root, "git", *command.split())
    if dirty:
        (root / "code.py").write_text("edited\n")
    status = run_in(root, "git", "status", "--porcelain", "--branch")
    borrowed(root, note)
    assert (root / "params.yaml").read_text() == "changed\n"
    assert run_in(root, "git", "status", "--porcelain", "--branch") != status
    with chdir(root):
        put_back(note)
        assert run_in(root, "git", "status", "--porcelain", "--branch") == status
        assert (root / "params.yaml").read_text() == "committed\n"
        assert (root / "code.py").read_text() == ("edited\n" if dirty else "committed\n")
        (stash,) = run_in(root, "git", "stash", "list").splitlines()
        assert "killed" in stash and not note.exists()
        put_back(note)
        assert run_noted(["true"], note) and not run_noted(["false"], note) and not note.exists()


def test_an_experiment_that_outlives_its_loop_is_waited_for(tmp_path: Path) -> None:
    note = tmp_path / "workspace.json"
    code = "import sys, pathlib, svam.experiments.workspace as w; w.run_noted(['sleep', '60'], pathlib.Path(sys.argv[1]))"
    loop = subprocess.Popen([sys.executable, "-c", code, str(note)], cwd=ROOT, start_new_session=True)
    try:
        while not (note.is_file() and note.stat().st_size and children(loop.pid)):
            assert loop.poll() is None
            time.sleep(0.05)
        loop.kill()
        loop.wait()
        with pytest.raises(FileError, match="of a loop that was killed still runs"):
            put_back(note)
    finally:
        os.killpg(loop.pid, signal.SIGKILL)


def children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


def test_the_makefile_has_both_halves() -> None:
    up_to_date = ("--assume-old", ".venv/.installed", "--assume-old", ".venv/.renders")
    printed = run_in(ROOT, "make", "--dry-run", "--no-print-directory", *up_to_date, "compare", "COMPARE_ARGS=--limit 1")
    assert printed.splitlines()[-2:] == ["python -m svam.experiments run --limit 1", "python -m svam.report compare"]
