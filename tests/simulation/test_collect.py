"""Collection: what an episode holds, the disturbances, and bytes that do not depend on the number of workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from svam.contract import Annotation, Episode
from svam.files import read_json, sha256_tree
from svam.params import Collect
from svam.seeds import generator, seed_of
from svam.simulation.collect import collect
from svam.simulation.experts import BURST_STEPS, demonstrate, disturbances, is_noisy
from svam.simulation.metaworld import TaskEnvironment
from tests.toy import committed

_CHANGES = {"tasks": ["reach"], "episodes": 2, "episodes_of": {}, "noisy_share": 0.5, "annotate_every": 10, "tail": 4}
SMALL = Collect.model_validate(committed("collect", image_size=32, cameras=["corner2", "topview"], attempts=5, **_CHANGES))


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "reach"
    collect("reach", folder, SMALL, 5, 2)
    return folder


def arrays_of(folder: Path, index: int) -> dict[str, NDArray[np.generic]]:
    with np.load(folder / f"episode_{index:04d}.npz") as file:
        return dict(file)


def test_bytes_do_not_depend_on_the_number_of_workers(collected: Path, tmp_path: Path) -> None:
    collect("reach", tmp_path / "alone", SMALL, 5, 1)
    assert sha256_tree(tmp_path / "alone") == sha256_tree(collected)
    assert [p.name for p in tmp_path.iterdir()] == ["alone"], "nothing temporary is left"


def test_an_episode_keeps_the_contract(collected: Path) -> None:
    meta = read_json(collected / "meta.json")
    assert meta["task"] == "reach" and meta["rate_hz"] == 80.0 and meta["cameras"] == ["corner2", "topview"]
    assert meta["instructions"]["held_out"] and len(meta["provenance"]["episodes"]) == SMALL.episodes
    assert not {"scenes", "styles"} & set(meta["provenance"]), "what is MetaWorld's own goes without saying"
    for index, entry in enumerate(meta["provenance"]["episodes"]):
        assert set(entry) == {"attempt", "noisy", "steps", "draw"}
        a = arrays_of(collected, index)
        n, rows = entry["steps"], a["annotation_index"]
        assert a["state"].shape == (n, 39) and a["proprioception"].shape == (n, 4) and a["success"].shape == (n,)
        np.testing.assert_array_equal(a["state"][:, :4], a["proprioception"])
        np.testing.assert_array_equal(rows, np.arange(0, n, SMALL.annotate_every))
        assert a["depth"].shape == a["segmentation"].shape == (len(rows), 32, 32)
        assert np.flatnonzero(a["success"])[0] == n - 1 - SMALL.tail, "recorded until `tail` steps after the first success"
        np.testing.assert_allclose(a["draw"], entry["draw"], atol=1e-5)
        Episode(
            task="reach", instruction="reach the goal", rate_hz=80.0,
            frames={camera: a[f"frames_{camera}"] for camera in SMALL.cameras},
            actions=a["actions"], expert_actions=a["expert_actions"], state=a["state"], proprioception=a["proprioception"],
            annotations={name: Annotation(a[name], rows) for name in ("depth", "segmentation")},
        ).check()  # fmt: skip
        assert np.abs(a["actions"]).max() <= 1 and np.abs(a["expert_actions"]).max() <= 1
        same = bool((a["actions"] == a["expert_actions"]).all())
        assert same is not entry["noisy"] and entry["noisy"] is is_noisy(index, SMALL.noisy_share)


def test_frame_t_is_what_is_seen_before_action_t(collected: Path) -> None:
    entry, a = read_json(collected / "meta.json")["provenance"]["episodes"][0], arrays_of(collected, 0)
    env = TaskEnvironment("reach", 32, SMALL.cameras)
    env.reset(seed_of(5, "collect", "reach", 0, entry["attempt"]))
    for t in range(12):
        np.testing.assert_array_equal(env.observe()["corner2"], a["frames_corner2"][t])
        np.testing.assert_array_equal(env.state(), a["state"][t])
        if t % SMALL.annotate_every == 0:
            np.testing.assert_array_equal(env.annotate()[1], a["segmentation"][t // SMALL.annotate_every])
        env.step(a["actions"][t])
    env.close()


def test_disturbances_come_in_bursts_with_quiet_between() -> None:
    noise = disturbances(generator(0, "n"), 500, 0.6)
    assert noise.shape == (500, 4) and noise.dtype == np.float32 and not noise[:, 3].any()
    pushed = noise.any(axis=1)
    assert 0.15 < pushed.mean() < 0.5
    first = int(np.flatnonzero(pushed)[0])
    assert (noise[first : first + BURST_STEPS] == noise[first]).all() and not noise[first + BURST_STEPS].any()
    assert 0.4 < noise[pushed].std(axis=0)[:3].mean() < 0.8
    assert not disturbances(generator(0, "n"), 500, 0.0).any()


def test_the_share_of_disturbed_episodes_is_exact_and_spread() -> None:
    chosen = [is_noisy(index, 0.3) for index in range(40)]
    assert sum(chosen) == 12 and sum(chosen[:20]) == 6
    assert not any(is_noisy(index, 0.0) for index in range(9)) and all(is_noisy(index, 1.0) for index in range(9))


def test_a_failing_expert_is_tried_on_other_goals_and_then_reported() -> None:
    env = TaskEnvironment("reach", 32)

    def attempts_needed(index: int, max_steps: int, attempts: int) -> int:
        made = demonstrate(
            env, 0, index, noisy_share=0.0, noise_scale=0.0, annotate_every=50, tail=0, max_steps=max_steps, attempts=attempts
        )
        assert made.arrays["success"][-1] and len(made.arrays["actions"]) <= max_steps
        assert env.draw.tobytes() == made.arrays["draw"].tobytes()
        return made.attempt

    # So few steps that only near goals succeed: some demonstrations need several.
    needed = [attempts_needed(index, 40, 20) for index in range(4)]
    assert max(needed) > 0
    with pytest.raises(ValueError, match=r"'reach'.*failed 2 goals in a row for demonstration 0"):
        attempts_needed(0, 3, 2)
    env.close()


def test_errors_are_one_line_and_leave_no_output(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "stages.collect", "draw-open", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "unknown MetaWorld task 'draw-open'" in result.stderr and "drawer-open" in result.stderr
    with pytest.raises(ValueError, match=r"unknown camera 'moon'.*corner2"):
        collect("reach", tmp_path / "out", SMALL.model_copy(update={"cameras": ["moon"]}), 0, 1)
    too_short = SMALL.model_copy(update={"max_steps": 10, "attempts": 1})
    with pytest.raises(ValueError, match=r"raise collect.attempts or collect.max_steps"):
        collect("reach", tmp_path / "out", too_short, 0, 1)
    assert not list(tmp_path.iterdir())
