"""Collection: what an episode holds, the disturbances, and bytes that do not depend on the number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from stages.collect import app
from svam.contract import Annotation, Choice, Episode
from svam.errors import ParamsError
from svam.files import read_json, sha256_tree
from svam.params import Collect
from svam.resume import OLD_STATES
from svam.seeds import generator, seed_of
from svam.simulation.collect import collect
from svam.simulation.experts import BURST_STEPS, demonstrate, disturbances, is_noisy
from svam.simulation.metaworld import TaskEnvironment
from svam.sources.metaworld import Options, open_source
from tests.toy import committed, invoke, write_toy_params

_CHANGES = {"tasks": ["reach"], "episodes": 2, "episodes_of": {}, "noisy_share": 0.5, "annotate_every": 10, "tail": 4}
SMALL = Collect.model_validate(committed("collect", image_size=32, cameras=["corner2", "topview"], attempts=5, **_CHANGES))


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("collected")
    collect(root / "raw", SMALL, 5, 2, root / "scratch", "")
    return root / "raw/reach"


def arrays_of(folder: Path, index: int) -> dict[str, Any]:
    """All arrays of an episode, its frames as the source of the convert stage reads them."""
    frames = open_source(folder.parent, Options()).read(index).frames
    name = f"episode_{index:04d}.safetensors"
    return load_file(folder / name) | {f"frames_{camera}": np.asarray(values) for camera, values in frames.items()}


def test_bytes_do_not_depend_on_the_number_of_workers(collected: Path, tmp_path: Path) -> None:
    collect(tmp_path / "alone", SMALL, 5, 1, tmp_path / "scratch", "")
    assert sha256_tree(tmp_path / "alone/reach") == sha256_tree(collected)
    assert {p.name for p in tmp_path.iterdir()} == {"alone", "scratch"}, "nothing temporary is left"


def test_only_what_is_new_is_collected(started: list[tuple[str, int]], tmp_path: Path) -> None:
    """Another task, more episodes, a damaged file; other params, other code and another seed begin anew."""

    def run(out: str, seed: int = 5, code: str = "", **changes: Any) -> list[tuple[str, int]]:
        started.clear()
        params = Collect.model_validate(SMALL.model_dump() | {"cameras": ["corner2"], "annotate_every": 100} | changes)
        collect(tmp_path / out, params, seed, 1, tmp_path / "scratch", code)
        return sorted(started)

    assert run("one") == [("reach", 0), ("reach", 1)]
    before = sha256_tree(tmp_path / "one")
    assert run("one") == [] and sha256_tree(tmp_path / "one") == before
    assert run("two", tasks=["window-close", "reach"], episodes_of={"reach": 3}) == [
        ("reach", 2), ("window-close", 0), ("window-close", 1),
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["reach", "window-close"]
    (damaged,) = (tmp_path / "scratch/reach").glob("*/episode_0001.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert run("one") == [("reach", 1)] and sha256_tree(tmp_path / "one") == before, "the third episode is left out again"
    assert len(run("one", seed=6)) == len(run("one", code="edited")) == len(run("one", tail=0)) == 2
    assert len(list((tmp_path / "scratch/reach").iterdir())) == 1 + OLD_STATES, "older ones are deleted"
    assert run("one", tail=0) == []


def test_frames_stand_from_left_to_right_in_a_picture(collected: Path) -> None:
    """The files are read by any program: a PNG for each camera, the rest as safetensors."""
    frames = arrays_of(collected, 1)["frames_topview"]
    picture = np.asarray(Image.open(collected / "episode_0001.topview.png"))
    assert picture.shape == (32, 32 * len(frames), 3)
    np.testing.assert_array_equal(picture[:, 32 * 7 : 32 * 8], frames[7])


def test_labels_of_the_first_camera_stay_with_it(collected: Path) -> None:
    source = open_source(collected.parent, Options(), Choice(cameras=["topview"]))
    assert not source.shape(0).annotated and not source.read(0).annotations
    assert "depth and segmentation are of the camera 'corner2', with which" in source.notes[-1]


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
        np.testing.assert_array_equal(env.expert_action(), a["expert_actions"][t])  # in its own style, undisturbed
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
        changes = {"noisy_share": 0.0, "annotate_every": 50, "tail": 0, "max_steps": max_steps, "attempts": attempts}
        made = demonstrate(env, 0, index, SMALL.model_copy(update=changes))
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
    params, out, scratch = tmp_path / "params.yaml", tmp_path / "out", tmp_path / "scratch"
    write_toy_params(params, {"collect": {"tasks": ["draw-open"], "episodes_of": {}}})
    result = invoke(app, out, "--params", params)
    assert result.exit_code == 1 and len(result.output.strip().splitlines()) == 1, result.output
    assert "unknown MetaWorld task 'draw-open'" in result.output and "drawer-open" in result.output
    with pytest.raises(ParamsError, match=r"unknown camera 'moon'.*corner2"):
        collect(out, SMALL.model_copy(update={"cameras": ["moon"]}), 0, 1, scratch, "")
    too_short = SMALL.model_copy(update={"max_steps": 10, "attempts": 1})
    with pytest.raises(ParamsError, match=r"raise collect.attempts or collect.max_steps"):
        collect(out, too_short, 0, 1, scratch, "")
    assert not out.exists() and not [file for file in scratch.rglob("*") if file.is_file()]
