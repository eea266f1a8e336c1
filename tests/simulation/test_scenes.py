"""Shared scenes, whose tasks start from one picture, and evaluation in the scenes that were recorded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from svam.contract import SEGMENTATION_CLASSES, ContractError, Observation
from svam.episodes.convert import convert
from svam.episodes.joined import open_store
from svam.evaluation import metaworld
from svam.files import read_json
from svam.params import Collect
from svam.protocols import Evaluate
from svam.simulation.collect import collect
from svam.simulation.experts import first_success
from svam.simulation.metaworld import TaskEnvironment
from svam.simulation.scenes import SCENES, Scene
from svam.sources.metaworld import Options, open_source
from tests.recorded import SETTINGS
from tests.toy import committed

Make = Callable[..., TaskEnvironment]
QUIET = np.zeros((500, 4), np.float32)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.tasks[0])
def test_tasks_of_a_scene_start_from_the_same_bytes_and_part(scene: Scene, make: Make) -> None:
    envs = [make(task, scenes="shared") for task in scene.tasks]
    for seed in range(3):
        for env in envs:
            env.reset(seed)
        first, *others = envs
        for other in others:
            np.testing.assert_array_equal(first.observe()["corner2"], other.observe()["corner2"])
            for one, two in zip(first.annotate(), other.annotate(), strict=True):
                np.testing.assert_array_equal(one, two)
            np.testing.assert_array_equal(first.draw, other.draw)
            assert np.linalg.norm(first.goal - other.goal) > 0.05, "one picture, two ends"
        assert not (first.annotate()[1] == SEGMENTATION_CLASSES.index("goal")).any()
    seen = [env.observe()["corner2"] for env in envs]
    assert all(first_success(env, 2, QUIET, 300) is not None for env in envs)
    assert not np.array_equal(envs[0].observe()["corner2"], envs[1].observe()["corner2"])
    envs[0].reset(3)
    assert not np.array_equal(envs[0].observe()["corner2"], seen[0]), "another seed is another picture"


def test_a_task_without_a_shared_scene_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"collect.scenes is 'shared', but task 'reach' .* expected faucet-open, faucet-close"):
        TaskEnvironment("reach", 32, scenes="shared")
    with pytest.raises(ValueError, match="task 'reach' has no shared scene"):
        collect(tmp_path / "raw", small("reach", scenes="shared"), 0, 1, tmp_path / "scratch", "")
    assert not list(tmp_path.iterdir())


def small(*tasks: str, **changes: Any) -> Collect:
    base = {"episodes": 2, "episodes_of": {}, "noisy_share": 0.0, "image_size": 32, "annotate_every": 50, "tail": 0}
    return Collect.model_validate(committed("collect", tasks=list(tasks), **base, **changes))


class Still:
    """A policy that does not move."""

    def act(self, observations: list[Observation], noise_seeds: list[int]) -> NDArray[np.float32]:
        return np.zeros((len(observations), 4, 4), np.float32)


@pytest.mark.usefixtures("started", "forked_workers")
def test_evaluation_meets_the_scenes_of_the_store(tmp_path: Path) -> None:
    tasks = ["coffee-button", "coffee-push"]
    for task, scenes in zip(tasks, ("shared", "stock"), strict=True):
        collect(tmp_path / scenes, small(task, scenes=scenes), 5, 1, tmp_path / "scratch", "")
        shutil.copytree(tmp_path / scenes, tmp_path / "raw", dirs_exist_ok=True)
    assert read_json(tmp_path / "raw/coffee-button/meta.json")["provenance"]["scenes"] == "shared"
    assert "scenes" not in read_json(tmp_path / "raw/coffee-push/meta.json")["provenance"]
    convert(open_source(tmp_path / "raw", Options(tasks=tasks)), tmp_path / "episodes.zarr", SETTINGS, 0)
    store = open_store(tmp_path / "episodes.zarr")
    assert metaworld.render_settings(store, tasks[1:])["scenes"] == "stock"
    with pytest.raises(ContractError, match=r"tasks recorded in scenes shared, stock; .* in one kind"):
        metaworld.render_settings(store, tasks)
    assert metaworld.render_settings(store, tasks[:1]) == {"image_size": 32, "render": "fast", "scenes": "shared"}

    closed_loop = {"tasks": tasks[:1], "episodes": 1, "held_out_instruction_episodes": 0, "max_steps": 60}
    changed = committed("evaluate", protocols=["metaworld"], execute=4, batch=1, metaworld=closed_loop)
    asked = Evaluate.model_validate(changed)
    outcomes = metaworld.run(store, Still(), asked, cameras=("corner2",), proprioception=False, seed=0, workers=1)
    assert outcomes["expert"][0].success
    (outcome,) = outcomes["policy"]
    env = TaskEnvironment("coffee-button", 32, scenes="shared")
    env.reset(outcome.plan.seed)
    assert env.draw.shape == (6,), "of the mug and the machine; the stock task draws the machine alone"
    np.testing.assert_array_equal(env.draw, np.asarray(outcome.draw, np.float32))
    assert outcome.recorded is not None
    np.testing.assert_array_equal(env.observe()["corner2"], outcome.recorded.frames[0])
    env.close()


def test_every_shared_task_has_one_scene() -> None:
    assert len({task for scene in SCENES for task in scene.tasks}) == 2 * len(SCENES)
