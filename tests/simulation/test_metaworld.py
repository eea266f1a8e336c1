"""MetaWorld environments: seeding, the goal that the picture shows, cameras, labels, and pictures that stay apart."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from svam.contract import SEGMENTATION_CLASSES
from svam.episodes.instructions import described_tasks, instructions_of
from svam.simulation import rendering
from svam.simulation.metaworld import MAX_STEPS, TaskEnvironment, check_task
from tests.sources.common import refused

GOAL = SEGMENTATION_CLASSES.index("goal")
Make = Callable[..., TaskEnvironment]


def seen_goal(env: TaskEnvironment) -> NDArray[np.float64] | None:
    """The goal marker's position in metres, recovered from the first frame alone: its pixels, their depth, the camera."""
    depth, labels = env.annotate()
    rows, columns = np.nonzero(labels == GOAL)
    if not len(rows):
        return None
    model, data, size = env._env.model, env._env.data, env.image_size
    camera = model.camera("corner2").id
    z = float(np.median(depth[rows, columns])) + 0.01  # the marker is a ball of 2 cm: half of it lies behind its surface
    focal = size / 2 / np.tan(np.deg2rad(model.cam_fovy[camera]) / 2)
    # The picture is turned by 180 degrees: its right is the camera's left, its down the camera's up.
    across, up = -(columns.mean() + 0.5 - size / 2) / focal * z, (rows.mean() + 0.5 - size / 2) / focal * z
    return np.asarray(data.cam_xpos[camera] + data.cam_xmat[camera].reshape(3, 3) @ np.array([across, up, -z]))


def share_recovered(env: TaskEnvironment, reset: Callable[[int], None]) -> float:
    """How often the goal seen in the first frame is within 5 cm, the radius of success, of the one that counts."""
    hits = 0
    for seed in range(25):
        reset(seed)
        seen = seen_goal(env)
        hits += seen is not None and float(np.linalg.norm(seen - env._env._target_pos)) < 0.05
    return hits / 25


def test_the_picture_shows_the_goal_that_counts(make: Make) -> None:
    env = make("reach", 96)

    def plain_reset(seed: int) -> None:
        """MetaWorld's own: the marker stands where the first of its two draws put it, so finding the goal is chance."""
        env._env.seed(seed)
        env._env.reset()

    assert share_recovered(env, env.reset) >= 0.9
    assert share_recovered(env, plain_reset) <= 0.4


def test_the_goal_marker_is_where_the_goal_is_in_other_tasks(make: Make) -> None:
    for task in ("drawer-open", "push", "window-close"):
        env = make(task, 128)
        seen = []
        for seed in range(3):
            env.reset(seed)
            position = seen_goal(env)
            if position is not None:
                seen.append(float(np.linalg.norm(position - env.goal)))
        assert seen and max(seen) < 0.05, (task, seen)


def test_reset_depends_on_the_seed_and_on_nothing_that_was_before(make: Make) -> None:
    for task in ("reach", "basketball"):
        env, other = make(task, 32), make(task, 32)
        env.reset(7)
        other.reset(99)
        for _ in range(25):
            other.step(other.expert_action())
        other.reset(7)
        for _ in range(5):
            np.testing.assert_array_equal(env.state(), other.state())
            np.testing.assert_array_equal(env.observe()["corner2"], other.observe()["corner2"])
            assert env.step(env.expert_action()) == other.step(other.expert_action())
        np.testing.assert_array_equal(env.draw, other.draw)
        other.reset(8)
        assert not np.array_equal(env.draw, other.draw)


def pictures(env: TaskEnvironment, steps: int) -> Iterator[NDArray[np.uint8]]:
    """Drive the expert; after each step yield the colour picture with the labels as a fourth channel."""
    env.reset(3)
    for _ in range(steps):
        env.step(env.expert_action())
        yield np.concatenate([env.observe()["corner2"], env.annotate()[1][..., None]], axis=-1)


def test_environments_side_by_side_draw_what_each_draws_alone() -> None:
    tasks, steps = ("reach", "drawer-open", "coffee-button"), 4
    alone = {}
    for task in tasks:
        env = TaskEnvironment(task, 48)
        alone[task] = list(pictures(env, steps))
        env.close()
    together = {task: TaskEnvironment(task, 48) for task in tasks}
    runs = {task: pictures(env, steps) for task, env in together.items()}
    for step in range(steps):
        if step == 2:  # freeing one must not take the others' buffers with it
            together["reach"].close()
            del runs["reach"]
            together["late"] = TaskEnvironment("push", 48)
            together["late"].reset(0)
            together["late"].observe()
        for task, run in runs.items():
            np.testing.assert_array_equal(next(run), alone[task][step], err_msg=f"{task}, step {step}")
    for env in together.values():
        env.close()
        env.close()


def test_full_rendering_is_the_stock_look_and_fast_is_like_it_without_shadows(make: Make) -> None:
    full, fast = make("drawer-open", 64, render="full"), make("drawer-open", 64)
    for env in (full, fast):
        env.reset(1)
    from gymnasium.envs.mujoco.mujoco_rendering import OffScreenViewer

    stock_model = full._env
    viewer = OffScreenViewer(stock_model.model, stock_model.data, width=64, height=64)
    stock = viewer.render("rgb_array", camera_id=stock_model.model.camera("corner2").id)
    viewer.close()
    a, b = full.observe()["corner2"], fast.observe()["corner2"]
    np.testing.assert_array_equal(a, stock[::-1, ::-1])
    difference = np.abs(a.astype(int) - b.astype(int)).mean()
    assert 0.5 < difference < 40, difference


def test_the_picture_is_upright(make: Make) -> None:
    env = make("reach")
    env.reset(0)
    _, labels = env.annotate()
    table, arm = np.nonzero(labels == 1)[0], np.nonzero(labels == 2)
    assert np.median(table) > 32, "the table is in the lower half"
    assert np.median(arm[1]) < 32, "the robot stands on the left"


def test_labels_and_depth_mean_what_they_say(make: Make) -> None:
    expected = {   # body or site -> class
        "drawer-open": {"tablelink": "table", "right_l3": "arm", "hand": "gripper", "leftpad": "gripper",
                        "drawer_link": "object", "drawercase_link": "fixture", "goal": "goal", "RetainingWall": "background"},
        "assembly": {"peg": "fixture", "asmbly_peg": "object"},
        "peg-insert-side": {"peg": "object", "box": "fixture"},
        "button-press-topdown-wall": {"button": "object", "buttonbox": "fixture", "wall": "fixture"},
        "box-close": {"top_link": "object", "box": "fixture"},
    }  # fmt: skip
    from svam.simulation.metaworld import _body_classes

    for task, names in expected.items():
        env = make(task)
        env.reset(0)
        model = env._env.model
        bodies = {model.body(b).name: SEGMENTATION_CLASSES[c] for b, c in enumerate(_body_classes(model))}
        for name, kind in names.items():
            if kind != "goal":
                assert bodies[name] == kind, (task, name)
        depth, labels = env.annotate()
        assert depth.dtype == np.float32 and labels.dtype == np.uint8 and depth.shape == labels.shape == (64, 64)
        for kind in ("table", "arm", "gripper", "object"):
            assert (labels == SEGMENTATION_CLASSES.index(kind)).any(), (task, kind)
        # Camera and hand positions in metres: the nearest gripper pixel lies within a hand's size of the hand's depth.
        camera, data = model.camera("corner2").id, env._env.data
        along = -(data.cam_xmat[camera].reshape(3, 3)[:, 2] @ (data.body("hand").xpos - data.cam_xpos[camera]))
        assert abs(float(depth[labels == 3].min()) - along) < 0.15, (task, along)


def test_opening_the_faucet_turns_it_the_way_the_instruction_says(make: Make) -> None:
    for task, way in (("faucet-open", 1.0), ("faucet-close", -1.0)):
        env = make(task, 32)
        env.reset(1)
        base = env._env.data.body("faucetBase").xpos[:2].copy()
        before = env.state()[4:6] - base
        for _ in range(60):
            env.step(env.expert_action())
        after = env.state()[4:6] - base
        turned = float(np.sign(before[0] * after[1] - before[1] * after[0]))  # positive: counter-clockwise from above
        assert turned == way, task
        said = " ".join(instructions_of(task)["train"])
        assert ("counter-clockwise" in said) == (way > 0)


def test_actions_are_clipped_and_bad_ones_refused(make: Make) -> None:
    env, other = make("push", 32), make("push", 32)
    for e in (env, other):
        e.reset(0)
    env.step(np.array([5, -5, 0.5, 3], np.float32))
    other.step(np.array([1, -1, 0.5, 1], np.float32))
    np.testing.assert_array_equal(env.state(), other.state())
    assert env.proprioception().shape == (4,) and env.state().shape == (39,) and env.goal.shape == (3,)
    np.testing.assert_allclose(env.state()[36:], env.goal, atol=1e-6)
    with pytest.raises(ValueError, match=r"'push'.*4 finite numbers"):
        env.step(np.array([0, np.nan, 0, 0], np.float32))
    with pytest.raises(ValueError, match="4 finite numbers"):
        env.step(np.zeros(3, np.float32))
    for _ in range(MAX_STEPS - 1):
        env.step(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="at most 500 steps"):
        env.step(np.zeros(4, np.float32))


def test_unknown_names_are_one_sentence_with_what_is_meant() -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert sorted(name.removesuffix("-v3") for name in ALL_V3_ENVIRONMENTS) == described_tasks()
    with refused(r"unknown MetaWorld task 'draw-open'.*drawer-open"):
        check_task("draw-open")
    with refused(r"unknown camera 'corner9'.*corner2"):
        TaskEnvironment("reach", 32, ("corner9",))
    with pytest.raises(RuntimeError, match="call reset"):
        TaskEnvironment("reach", 32).observe()


def test_osmesa_is_taken_where_egl_does_not_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "SVAM_GL_CHECKED"):
        monkeypatch.setenv(name, "")  # so that what the choice writes there is undone
    tried: list[str] = []
    monkeypatch.setattr(rendering, "_works", lambda backend, seconds: tried.append(backend) or backend == "osmesa")
    assert rendering.choose_backend() == "osmesa" and rendering.choose_backend() == "osmesa"
    assert tried == ["egl", "osmesa"], "tried once, then known to this process and its children"


def test_without_a_working_gl_library_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("SVAM_GL_CHECKED", raising=False)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with refused(r"libegl1 libgl1.*libosmesa6"):
        rendering.choose_backend()
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with refused(r"MUJOCO_GL=nonsense does not.*unset"):
        rendering.choose_backend()
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 3000\n")
    hanging.chmod(hanging.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(hanging))
    with refused("MUJOCO_GL"):
        rendering.choose_backend(seconds=0.5)
