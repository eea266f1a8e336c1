"""Averages and intervals by hand-computed numbers; the protocols and the stage on a tiny S-VAM and the real simulator."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stages.evaluate import app
from svam.contract import ContractError
from svam.episodes.export import open_recording
from svam.episodes.instructions import described_tasks
from svam.episodes.joined import open_store
from svam.episodes.store import EpisodeStore
from svam.evaluation import metaworld, offline
from svam.evaluation.rollout import Outcome
from svam.evaluation.scores import PUBLISHED_TIERS, TIERS, rate_of, summary, tier_of
from svam.files import read_json
from svam.models.svam import SVAM
from svam.npy import read_arrays
from svam.params import Params
from svam.simulation.metaworld import TaskEnvironment
from tests import ROOT
from tests.tiny import TASKS
from tests.tiny_foresight import FRAMES, GRID, SIZE
from tests.toy import invoke, merged, write_toy_params
from tests.warm import executable


def test_wilson_against_published_values() -> None:
    # 8 of 10: 0.4902 to 0.9433 (Brown, Cai & DasGupta 2001's formula, computed by hand); 0 of 25 and 25 of 25 mirror.
    rate = rate_of([True] * 8 + [False] * 2)
    assert (rate["low"], rate["high"]) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    none, all_ = rate_of([False] * 25), rate_of([True] * 25)
    assert none["low"] == 0.0 and none["high"] == pytest.approx(3.841458820694124 / (25 + 3.841458820694124), abs=1e-9)
    assert all_["high"] == 1.0 and all_["low"] == pytest.approx(1.0 - none["high"], abs=1e-9)


def test_tiers_partition_the_fifty_tasks() -> None:
    assert [len(TIERS[t]) for t in ("easy", "medium", "hard", "very_hard")] == [28, 11, 6, 5]
    assert sorted(t for tasks in TIERS.values() for t in tasks) == described_tasks()
    assert [len(tasks) for tasks in PUBLISHED_TIERS.values()] == [28, 11, 11]
    assert tier_of("reach") == "easy" and tier_of("stick-pull") == "very_hard" and tier_of("somewhere") is None


def test_averages_of_tasks() -> None:
    averages = summary({"reach": [True, False], "push": [True, True], "shelf-place": [False, False]})
    assert averages["micro"]["success"] == averages["macro"]["success"] == 0.5
    assert averages["micro"]["episodes"] == 6 and averages["macro"]["tasks"] == 3
    assert (averages["macro"]["low"], averages["macro"]["high"]) == (averages["micro"]["low"], averages["micro"]["high"])
    assert set(averages["tiers"]) == {"easy", "hard", "very_hard"}
    assert averages["published_tiers"]["hard"] == rate_of([True] * 2 + [False] * 2)
    assert averages["tasks"]["reach"]["success"] == 0.5
    with pytest.raises(ValueError, match="tasks of .1, 2. episodes, expected equally many"):
        summary({"reach": [True], "push": [True, False]})
    with pytest.raises(ValueError, match="tasks of .0. episodes, .* at least one"):
        summary({"reach": []})


def write_params(path: Path, **changes: Any) -> Params:
    evaluate = {
        "metaworld": {"tasks": TASKS, "episodes": 2, "held_out_instruction_episodes": 1, "max_steps": 10},
        "execute": 3, "batch": 3, "videos": 1, "offline": {"windows": 8, "samples": 3},
    }  # fmt: skip
    return write_toy_params(path, {"train_policy": {"chunk": 4}, "evaluate": merged(evaluate, changes)})


@pytest.fixture(scope="module")
def store(evaluated: Path) -> EpisodeStore:
    return open_store(evaluated / "episodes.zarr")


def run_stage(evaluated: Path, out: Path, **changes: Any) -> Any:
    write_params(out.parent / "params.yaml", **changes)
    options = ["--model", evaluated / "svam", "--episodes", evaluated / "episodes.zarr", "--params", out.parent / "params.yaml"]
    return invoke(app, out, *options)


def test_the_stage_writes_both_protocols(evaluated: Path, tmp_path: Path) -> None:
    """That other workers, another folder and a kill change no byte is seen in `test_dag_killed.py`."""
    out = tmp_path / "results"
    result = run_stage(evaluated, out, record_actions=True)
    assert result.exit_code == 0, result.output
    assert re.search(r"latency in ms, batch 3: .*video_model .*policy .*total ", result.output.replace("\n", " "))
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    entries = {"geometric", "semantic", "one_step"}
    pictured = {"frames", *(f"foresight_{entry}" for entry in entries), "truth_geometric", "truth_semantic"}
    recorded = {"frames", "calls", "actions", "proprioception", *(f"foresight_{entry}" for entry in entries)}
    assert names == {"metrics.json", "episodes.jsonl"} | {f"foresight/{name}.npy" for name in pictured} | {
        f"rollouts/{task}_0/{name}.npy" for task in TASKS for name in recorded
    }

    rollout = read_arrays(out / "rollouts/reach_0")
    shape = (len(rollout["calls"]), FRAMES, GRID, GRID)
    assert all(rollout[f"foresight_{e}"].shape[:4] == shape and rollout[f"foresight_{e}"].dtype == np.float16 for e in entries)

    metrics = read_json(out / "metrics.json")
    rows = metrics["metaworld"]["rows"]
    assert set(rows) == {"policy", "held_out_instruction", "same_goals", "random", "expert"}
    assert rows["policy"]["micro"]["episodes"] == 4 and rows["held_out_instruction"]["micro"]["episodes"] == 2
    lines = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 4 + 2
    by_row = {row: [line for line in lines if line["row"] == row] for row in metaworld.ROWS}
    keys = [[(line["task"], line["index"], line["seed"], tuple(line["draw"])) for line in by_row[r]] for r in metaworld.ROWS]
    assert keys[0] == keys[2] == keys[3] and set(keys[1]) < set(keys[0])
    assert {line["instruction"] for line in by_row["held_out_instruction"]} == {f"{task} c" for task in TASKS}
    assert all(line["instruction"][-1] in "ab" for line in by_row["policy"])
    assert "not success" in metrics["offline"]["notice"]

    exported = open_recording(out)
    episode, goal = exported.read(0), by_row["policy"][0]
    assert (exported.count, exported.rate_hz, episode.task, episode.instruction) == (2, 80, "reach", goal["instruction"])
    environment = TaskEnvironment("reach", SIZE)  # what was recorded happens again
    environment.reset(goal["seed"])
    assert episode.proprioception is not None and episode.actions is not None and len(episode.actions) == goal["steps"]
    for frame, state, action in zip(episode.frames["corner2"], episode.proprioception, episode.actions, strict=True):
        assert (environment.observe()["corner2"] == frame).all() and (environment.proprioception() == state).all()
        environment.step(action)
    environment.close()


def test_rows_that_are_compared_have_the_same_goals(store: EpisodeStore, tmp_path: Path) -> None:
    """Also where more episodes with a held-out sentence are named than episodes; fewer is the usual case."""
    for paraphrased, expected in ((5, 2), (1, 1)):
        params = write_params(tmp_path / "p.yaml", metaworld={"episodes": 2}).evaluate
        tasks = params.metaworld.model_copy(update={"held_out_instruction_episodes": paraphrased})
        params = params.model_copy(update={"metaworld": tasks})
        outcomes = {
            row: [Outcome(plan, (0.0,), True, 1) for plan in metaworld.plan_episodes(row, store, params, 0)]
            for row in metaworld.ROWS
        }
        goals = {row: {(o.plan.task, o.plan.seed) for o in played} for row, played in outcomes.items()}
        assert goals["held_out_instruction"] <= goals["policy"] == goals["expert"]
        rows = metaworld.metaworld_metrics(outcomes, params)["rows"]
        counts = [rows[row]["tasks"]["reach"]["episodes"] for row in ("held_out_instruction", "same_goals", "policy")]
        assert counts == [expected, expected, 2]


def test_pictures_of_another_size_than_the_demonstrations_are_refused(store: EpisodeStore) -> None:
    assert metaworld.render_settings(store, TASKS) == {"image_size": SIZE, "render": "fast", "scenes": "stock"}
    tasks = {task: {"render": "fast", "image_size": size} for task, size in zip(TASKS, (SIZE, 2 * SIZE), strict=True)}
    other = copy.copy(store)
    other.provenance = {"tasks": tasks}
    assert metaworld.render_settings(other, TASKS[:1])["image_size"] == SIZE
    with pytest.raises(ContractError, match=f"window-close was rendered at {2 * SIZE} pixels and converted to {SIZE}"):
        metaworld.render_settings(other, TASKS)


def test_offline_needs_no_simulator(evaluated: Path, tmp_path: Path) -> None:
    write_params(tmp_path / "params.yaml", protocols=["offline"], metaworld={"tasks": []})
    code = f"""
import sys
refused = ("mujoco", "metaworld", "OpenGL", "glfw")
for name in [name for name in sys.modules if name.split(".")[0] in refused]:
    del sys.modules[name]
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise AssertionError(name + " was imported")
sys.meta_path.insert(0, Refuse())
from stages.evaluate import app
options = ["--model", "{evaluated}/svam", "--episodes", "{evaluated}/episodes.zarr", "--params", "{tmp_path}/params.yaml"]
app(["{tmp_path}/results", *options])
"""
    done = subprocess.run([executable(), "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(read_json(tmp_path / "results/metrics.json")) == {"protocols", "policy", "offline"}


def test_offline_errors_by_hand(evaluated: Path, store: EpisodeStore, tmp_path: Path) -> None:
    class Fixed(SVAM):
        """Always the same chunk: 0.5 everywhere, and 1.5 in the first dimension of odd samples."""

        count = 0

        def sample(self, inputs: Any, noise_seeds: Any) -> NDArray[np.float32]:
            chunk = np.full((len(noise_seeds), 4, 4), 0.5, np.float32)
            chunk[..., 0] += self.count % 2
            self.count += 1
            return chunk

    svam = SVAM.load(evaluated / "svam")
    params = write_params(tmp_path / "p.yaml", offline={"samples": 2, "windows": 1000}).evaluate
    fixed = Fixed(svam.config, svam.statistics, svam.foresight, svam.network)
    metrics, pictures = offline.evaluate_offline(store, fixed, params, 0)
    held_out = [int(e) for e in store.episodes("held_out")]
    assert metrics["windows"] == 11 * len(held_out) and metrics["target"] == "expert_actions"
    total, last, count = np.zeros(4), np.zeros(4), 0
    for e in held_out:
        start, end = store.bounds(e)
        actions = store.vector("actions", np.arange(start, end)).astype(np.float64)
        for t in range(1, end - start):
            for k in range(min(4, end - start - t)):
                low, high = np.abs(0.5 - actions[t + k]), np.abs(np.array([1.5, 0.5, 0.5, 0.5]) - actions[t + k])
                total += (low + high) / 2
                last += np.abs(actions[t - 1] - actions[t + k])
                count += 1
    assert metrics["policy"]["mae_per_dimension"] == pytest.approx(total / count)
    assert metrics["hold_last"]["mae_per_dimension"] == pytest.approx(last / count)
    assert metrics["sample_spread_per_dimension"] == pytest.approx([0.5, 0, 0, 0])
    assert metrics["best_sample"]["mae"] < metrics["policy"]["mae"]
    assert set(metrics["foresight"]) == {"geometric", "semantic"}
    assert pictures["frames"].shape[1:] == (FRAMES, SIZE, SIZE, 3)
    assert pictures["foresight_geometric"].shape == pictures["truth_geometric"].shape


def test_feature_errors_by_hand() -> None:
    errors = offline.FeatureErrors()
    truth = np.array([[0.0, 10.0], [2.0, 30.0]], np.float32)  # variances 1 and 100
    errors.add(truth + np.float32([1.0, 0.0]), truth + np.float32([2.0, 20.0]), truth)
    assert errors.summary() == pytest.approx({"mse": 0.5, "repeat_reference_mse": 4.0, "explained": 0.875})


def test_a_demonstrations_goal_is_refused(store: EpisodeStore, tmp_path: Path) -> None:
    plan = metaworld.plan_episodes("policy", store, write_params(tmp_path / "p.yaml").evaluate, 0)[0]
    environment = TaskEnvironment("reach", SIZE)
    try:
        environment.reset(plan.seed)
        fresh = tuple(float(value) for value in environment.draw)
    finally:
        environment.close()
    assert metaworld.assert_unseen([Outcome(plan, fresh, True, 1)], store) == 3
    seen = tuple(store.episode_provenance[1]["draw"])
    near = tuple(value + 1e-6 for value in seen)
    assert metaworld.assert_unseen([Outcome(plan, near, True, 1)], store) == 3
    with pytest.raises(ValueError, match=r"evaluation episode 0 of 'reach' draws .* demonstration 1 of"):
        metaworld.assert_unseen([Outcome(plan, fresh, True, 1), Outcome(plan, seen, True, 1)], store)


def test_tasks_that_cannot_be_evaluated_are_one_sentence(evaluated: Path, tmp_path: Path) -> None:
    for tasks, sentence in (
        (["reech"], "evaluate.metaworld.tasks: unknown MetaWorld task 'reech': did you mean reach"),
        (["drawer-open"], "no episode of 'drawer-open' in"),
        ([], "evaluate.metaworld.tasks is empty"),
    ):
        result = run_stage(evaluated, tmp_path / "results", metaworld={"tasks": tasks})
        device, said = result.output.strip().splitlines()
        assert result.exit_code == 1 and sentence in said and device.startswith("device: ")
        assert not (tmp_path / "results").exists()
