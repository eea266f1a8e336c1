"""The `libero` protocol: rates by hand, what a policy must fit, and the stage on the real simulator where it is installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stages.evaluate import app
from svam.agreement import check_agreement
from svam.contract import ContractError, Observation
from svam.episodes.joined import open_store
from svam.errors import MachineError, ParamsError
from svam.evaluation.libero import check_policy, chosen_tasks, run, suite_scores
from svam.evaluation.rollout import Outcome, PlannedEpisode
from svam.files import read_json
from svam.models.svam import SVAM
from svam.protocols import Evaluate
from tests.libero import INSTALLED, needs_libero
from tests.toy import invoke, write_toy_params

BOWL, SOUP = "put_the_bowl_on_the_stove", "pick_up_the_alphabet_soup_and_place_it_in_the_basket"


def write_params(path: Path, policy: str = "svam", **libero: Any) -> Evaluate:
    section = {"suites": ["libero_goal"], "tasks": [BOWL], "episodes": 2, "max_steps": 12, "drawn": 64, "render": "fast"}
    evaluate = {"protocols": ["libero"], "policy": policy, "execute": 4, "batch": 3, "videos": 1, "libero": section | libero}
    return write_toy_params(path, {"evaluate": evaluate}).evaluate


class ByPicture:
    """Actions from the picture, the sentence and the noise."""

    def act(self, observations: list[Observation], noise_seeds: list[int]) -> NDArray[np.float32]:
        rows = []
        for observation, seed in zip(observations, noise_seeds, strict=True):
            assert observation.instruction == "put the bowl on the stove" and observation.proprioception is not None
            mean = np.concatenate([picture.mean(axis=(0, 1)) / 255 for picture in observation.frames.values()])
            rows.append(np.random.default_rng(seed).normal(np.resize(mean, 7) - 0.4, 0.1, (4, 7)))
        return np.array(rows, np.float32)


def test_rates_of_suites_and_their_mean() -> None:
    """The mean counts suites alike, whatever their number of tasks."""
    solved = {"a": [True, True], "b": [True, False], "c": [False, False]}
    outcomes = [
        Outcome(PlannedEpisode("policy", task, i, i), (), success, 9)
        for task, group in solved.items()
        for i, success in enumerate(group)
    ]
    scores = suite_scores(outcomes, {"a": "libero_goal", "b": "libero_goal", "c": "libero_10"})
    assert {suite: (rate["successes"], rate["episodes"]) for suite, rate in scores["suites"].items()} == {
        "libero_goal": (3, 4), "libero_10": (0, 2)
    }  # fmt: skip
    assert scores["mean_of_suites"] == 0.375 and scores["tasks"]["b"]["success"] == 0.5
    # 0 of 2, by the formula: z^2 / (2 + z^2) with z = 1.959964
    assert scores["suites"]["libero_10"]["high"] == pytest.approx(0.657620, abs=1e-6)


def test_a_policy_of_other_demonstrations_is_refused(evaluated: Path) -> None:
    store = open_store(evaluated / "episodes.zarr")
    with pytest.raises(ContractError, match="rate is 80 Hz, but the libero protocol needs 20 Hz; convert LIBERO's"):
        check_policy(SVAM.load(evaluated / "svam"), store, [])


@pytest.mark.skipif(INSTALLED, reason="LIBERO is installed")
def test_without_the_library_params_are_refused_before_anything_runs(tmp_path: Path) -> None:
    params = write_toy_params(tmp_path / "p.yaml", {"evaluate": {"protocols": ["libero"]}})
    with pytest.raises(MachineError, match=r"LIBERO is not installed: pip install -c constraints.txt -e '\.\[libero\]'"):
        check_agreement(params)


@needs_libero
def test_tasks_are_chosen_by_name(tmp_path: Path) -> None:
    params = write_params(tmp_path / "p.yaml", suites=["libero_goal", "libero_object"], tasks=[SOUP, BOWL]).libero
    assert [(task.suite, task.sentence) for task in chosen_tasks(params)] == [
        ("libero_goal", "put the bowl on the stove"),
        ("libero_object", "pick up the alphabet soup and place it in the basket"),
    ]
    assert len(chosen_tasks(write_params(tmp_path / "p.yaml", tasks=[]).libero)) == 10
    with pytest.raises(
        ParamsError, match=f"evaluate.libero.tasks names '{SOUP}', which no suite of evaluate.libero.suites has"
    ):
        chosen_tasks(write_params(tmp_path / "p.yaml", tasks=[SOUP]).libero)


@needs_libero
@pytest.mark.slow
def test_workers_change_no_outcome(tmp_path: Path) -> None:
    """Success, steps and calls are one bit each of a long story; what the last observation was is more, so it is compared."""
    params = write_params(tmp_path / "p.yaml", episodes=3)
    seen: list[dict[tuple[int, ...], bytes]] = []

    class Recording(ByPicture):
        def act(self, observations: list[Observation], noise_seeds: list[int]) -> NDArray[np.float32]:
            actions = super().act(observations, noise_seeds)
            for observation, seed, chunk in zip(observations, noise_seeds, actions, strict=True):
                frames = b"".join(picture.tobytes() for picture in observation.frames.values())
                seen[-1][seed,] = frames + np.asarray(observation.proprioception).tobytes() + chunk.tobytes()
            return actions

    outcomes = []
    for workers in (1, 3):
        seen.append({})
        outcomes.append(run(
            chosen_tasks(params.libero), Recording(), params, cameras=("agentview", "eye_in_hand"), image_size=(32, 32),
            proprioception=True, seed=0, workers=workers,
        ))  # fmt: skip
    films = [played["policy"][0].recorded for played in outcomes]
    assert films[0] is not None and films[1] is not None and films[0].frames.shape == (13, 2 * 32, 32, 3)
    assert (films[0].frames == films[1].frames).all()
    plain = [{row: [replace(o, recorded=None) for o in group] for row, group in played.items()} for played in outcomes]
    assert plain[0] == plain[1] and seen[0] == seen[1]
    assert len(seen[0]) == 3 * 3  # episodes and calls
    assert {row: [o.success for o in group] for row, group in outcomes[0].items()} == {
        "policy": [False] * 3, "random": [False] * 3, "expert": [False] * 3
    }  # fmt: skip  # twelve steps are too few for anybody


@needs_libero
@pytest.mark.slow
def test_the_stage_writes_a_scripted_row(evaluated: Path, tmp_path: Path) -> None:
    write_params(tmp_path / "params.yaml", policy="expert", max_steps=None)
    options = ["--episodes", evaluated / "episodes.zarr", "--params", tmp_path / "params.yaml"]
    result = invoke(app, tmp_path / "results", *options)
    assert result.exit_code == 0, result.output
    assert "LIBERO, mean of suites: expert 100.0%" in result.output
    metrics = read_json(tmp_path / "results/metrics.json")["libero"]
    assert metrics["rows"]["expert"]["suites"]["libero_goal"]["successes"] == 2 and metrics["max_steps"] == {"libero_goal": 300}
    lines = [json.loads(line) for line in (tmp_path / "results/libero.jsonl").read_text().splitlines()]
    assert [(line["task"], line["initial_state"], line["success"]) for line in lines] == [(BOWL, 0, True), (BOWL, 1, True)]
