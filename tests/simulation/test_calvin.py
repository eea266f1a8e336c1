"""CALVIN's adapter: what can be said without the simulator, and, where a checkout is named, the simulator itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from svam.contract import ContractError
from svam.errors import MachineError, ParamsError
from svam.simulation import calvin
from svam.simulation.calvin import CalvinEnvironment, fnv1_32, initial_state, open_checkout
from tests import ROOT
from tests.calvin import checkout, needs_calvin

SCENE: dict[str, str | int] = {
    "led": 0, "lightbulb": 1, "slider": "left", "drawer": "open", "red_block": "slider_right", "blue_block": "table",
    "pink_block": "table", "grasped": 0,
}  # fmt: skip


def test_the_hash_is_that_of_pyhash() -> None:
    assert fnv1_32("") == 0
    assert fnv1_32("test") == 3910690890  # pyhash's own test of a text


def test_a_start_says_what_its_scene_says() -> None:
    robot, scene = initial_state(SCENE)
    assert robot.shape == (15,) and scene.shape == (24,) and robot[14] == 1.0
    assert scene[:6].tolist() == [0.28, 0.22, 0.0, 0.088, 1.0, 0.0]
    assert scene[6] == pytest.approx(0.0703, abs=1e-4)  # red, on the right shelf
    assert {round(scene[12], 2), round(scene[18], 2)} == {0.05, 0.23}  # blue and pink, on the table
    assert (np.abs(scene[[11, 17, 23]] - np.pi / 2) < np.pi / 8).all() and len(set(scene[[11, 17, 23]])) == 3
    assert not np.array_equal(initial_state(SCENE | {"led": 1})[1][11], scene[11]), "the values must seed what is random"
    with pytest.raises(ValueError, match="led, lightbulb, slider"):
        initial_state(dict(reversed(SCENE.items())))


def repository(folder: Path) -> str:
    """A git repository that looks like a checkout of the simulator; its commit."""
    (folder / "calvin_env/envs").mkdir(parents=True)
    (folder / "calvin_env/envs/play_table_env.py").write_text("")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def test_a_wrong_checkout_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParamsError, match="path is null"):
        open_checkout(None, "797142c")
    with pytest.raises(ParamsError, match="neither calvin_env nor"):
        open_checkout(str(tmp_path), "797142c")
    commit = repository(tmp_path / "calvin_env")
    with pytest.raises(ParamsError, match=rf"commit is 797142c, but .* is at {commit}"):
        open_checkout(str(tmp_path), "797142c")
    monkeypatch.setattr(calvin, "_MODULES", ("no_such_library",))
    with pytest.raises(MachineError, match=r"no_such_library: pip install .*\[calvin\]"):
        open_checkout(str(tmp_path), commit)
    monkeypatch.setattr(calvin, "_MODULES", ())
    with pytest.raises(ParamsError, match="evaluation's sentences; git clone"):
        open_checkout(str(tmp_path / "calvin_env"), commit[:7])
    file = tmp_path / "calvin_models/conf/annotations/new_playtable_validation.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("open_drawer: [open it]\n")
    with pytest.raises(ParamsError, match="expected the official"):
        open_checkout(str(tmp_path), commit)
    (tmp_path / "calvin_env/calvin_env/envs/play_table_env.py").write_text("x = 1")
    with pytest.raises(ParamsError, match="play_table_env.py is changed since commit"):
        open_checkout(str(tmp_path), commit)


@pytest.fixture(scope="module")
def environment() -> Iterator[CalvinEnvironment]:
    made = CalvinEnvironment(folder=checkout().folder, cameras=("static", "gripper"), states=[SCENE, SCENE | {"lightbulb": 0}])
    yield made
    made.close()


def actions(count: int, seed: int = 0) -> list[Any]:
    return list(np.random.default_rng(seed).uniform(-1, 1, (count, 7)).astype(np.float32))


@needs_calvin
def test_starts_are_the_official_ones() -> None:
    """Beside the benchmark's own function, taken out of its file, whose imports cannot be installed any more."""
    repository = next(
        f for f in (checkout().folder.parent, checkout().folder.parent / "calvin") if (f / "calvin_models").is_dir()
    )
    tree = ast.parse((repository / "calvin_models/calvin_agent/evaluation/utils.py").read_text())
    names = ("temp_seed", "get_env_state_for_initial_condition")
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    official = ModuleType("official")
    exec("import contextlib\nimport numpy as np\nfrom numpy import pi", official.__dict__)
    official.__dict__["hasher"] = fnv1_32
    exec(compile(tree, "utils.py", "exec"), official.__dict__)
    places = ("table", "slider_left", "slider_right")
    for values in product((0, 1), (0, 1), ("right", "left"), ("closed", "open"), places, places, places, (0,)):
        scene: dict[str, Any] = dict(zip(SCENE, values, strict=True))
        for ours, theirs in zip(initial_state(scene), official.get_env_state_for_initial_condition(scene), strict=True):
            assert np.array_equal(ours, theirs), scene


@needs_calvin
def test_an_episode_does_not_depend_on_those_before(environment: CalvinEnvironment) -> None:
    def play(seed: int) -> list[Any]:
        environment.reset(0)
        places = [environment.robot_obs()]
        for action in actions(60, seed):
            environment.step(action)
            places.append(np.concatenate([environment.robot_obs(), environment.scene_obs()]))
        return [place.tolist() for place in places]

    first = play(0)
    assert first[0][14] == 1.0 and play(1) != first
    assert environment.robot_obs()[14] in (-1.0, 1.0)
    assert play(0) == first
    environment.reset(0)
    # One step of physics has passed, in which blocks settle.
    assert np.allclose(environment.scene_obs(), initial_state(SCENE)[1], atol=5e-3)
    assert np.array_equal(environment.draw, initial_state(SCENE)[1].astype(np.float32))


@needs_calvin
def test_only_looking_draws(environment: CalvinEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    import pybullet

    drawn: list[int] = []
    draw = pybullet.getCameraImage

    def counted(**arguments: Any) -> Any:
        drawn.append(1)
        return draw(**arguments)

    monkeypatch.setattr(pybullet, "getCameraImage", counted)
    environment.reset(0)
    environment.begin("open_drawer")
    for action in actions(3):
        environment.step(action)
    assert not drawn
    frames = environment.observe()
    assert len(drawn) == 2
    assert {name: frame.shape for name, frame in frames.items()} == {"static": (200, 200, 3), "gripper": (84, 84, 3)}
    assert all(frame.dtype == np.uint8 and frame.std() > 10 for frame in frames.values())


@needs_calvin
def test_the_first_pictures_of_a_process_are_as_later_ones() -> None:
    """EGL lights its first one otherwise. In a process of its own, since there is an environment in this one."""
    code = """
import sys
from svam.simulation.calvin import CalvinEnvironment
from tests.calvin import checkout
from tests.simulation.test_calvin import SCENE
environment = CalvinEnvironment(folder=checkout().folder, renderer="egl", cameras=("static", "gripper"), states=[SCENE])
pictures = []
for _ in range(2):
    environment.reset(0)
    pictures.append({name: frame.tobytes() for name, frame in environment.observe().items()})
sys.exit(0 if pictures[0] == pictures[1] else 3)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_calvin
def test_the_oracle_sees_what_changes(environment: CalvinEnvironment) -> None:
    environment.reset(1)
    environment.begin("move_slider_right")
    still = np.array([0, 0, 0, 0, 0, 0, 0.3], np.float32)
    assert not environment.step(still)
    door = environment.simulator.scene.doors[0]
    assert door.name == "base__slide"
    door.reset(0.05)  # from 0.28: pushed by hand
    assert environment.step(still)
    environment.begin("move_slider_right")
    assert not environment.step(still), "from now on, it has not moved"
    with pytest.raises(ParamsError, match="did you mean 'open_drawer'"):
        environment.begin("open_drawr")


@needs_calvin
def test_actions_are_relative_and_the_gripper_is_a_sign(environment: CalvinEnvironment) -> None:
    environment.reset(0)
    start = environment.robot_obs()
    for _ in range(10):
        environment.step(np.array([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -0.2], np.float32))
    end = environment.robot_obs()
    assert end[2] - start[2] == pytest.approx(10 * 0.02, abs=0.05) and end[14] == -1.0
    assert end[6] < 0.5 * start[6], "the gripper has closed"
    with pytest.raises(ContractError, match="expected 7 finite numbers"):
        environment.step(np.full(7, np.nan, np.float32))
