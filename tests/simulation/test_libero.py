"""LIBERO's tasks: official initial states, robosuite's own physics and pictures, episodes that scripts solve."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from svam.contract import frame_blocks
from svam.errors import MachineError, ParamsError
from svam.simulation.libero import (
    CAMERAS,
    RATE_HZ,
    RESTING,
    SETTLING_STEPS,
    SUITES,
    LiberoEnvironment,
    find_task,
    initial_states,
    libero_version,
    tasks_of,
    turned,
)
from svam.simulation.libero_experts import EXPERT_TASKS
from svam.sources.robomimic import Options, open_source
from tests.libero import INSTALLED, needs_libero

TASK = "put_the_bowl_on_the_stove"
STATES_SHA256 = {
    "libero_spatial": "8150b6164ded4fda969ab2249e20bf3a63bbd2a047642d50dda500dc98280663",
    "libero_object": "a0f7cf41302192070b69c5dc9416e31723e1bf8ac81d7e5cf155e4f00f239dcb",
    "libero_goal": "be96ab6d4cf535bb2e3b2226195755ea42382fea441390505a3c9a1654ca8c7a",
    "libero_10": "7bcdaabe8eab820930435a10dd3a7c57ba623c44f4ccfdcbee5534a4a5ec1e78",
    "libero_90": "fa48715df31b49de22c8116298b4d34804dbda35a09ae9b073db206ae0c69bff",
}
"""Of the arrays of a suite, in the order of its tasks, as LIBERO's authors published them (repository at 8f1084e)."""


@pytest.fixture(scope="module")
def environment() -> Iterator[LiberoEnvironment]:
    made = LiberoEnvironment(TASK, 64, (64, 64), tuple(CAMERAS))
    yield made
    made.close()


def play(env: LiberoEnvironment, seed: int, actions: NDArray[np.float64]) -> NDArray[np.float64]:
    env.reset(seed)
    states = [env._env.get_sim_state()]
    for action in actions:
        env.step(action.astype(np.float32))
        states.append(env._env.get_sim_state())
    return np.array(states)


def actions_of(seed: int, steps: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).uniform(-1.0, 1.0, (steps, 7)).astype(np.float32).astype(np.float64)


@pytest.mark.skipif(INSTALLED, reason="LIBERO is installed")
def test_without_the_library_one_sentence_has_the_line_that_installs_it() -> None:
    with pytest.raises(MachineError, match=r"LIBERO is not installed: pip install -c constraints.txt -e '\.\[libero\]'"):
        libero_version()
    with pytest.raises(MachineError, match="LIBERO is not installed"):
        LiberoEnvironment(TASK, 64, (64, 64), ("agentview",))


def test_pictures_are_turned_as_the_converter_turns_them() -> None:
    """OpenGL's first row is the lowest."""
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    a, b, c, d = picture.reshape(4, 3)
    for flip, rows in (("none", [[a, b], [c, d]]), ("vertical", [[c, d], [a, b]]), ("rotate_180", [[d, c], [b, a]])):
        assert np.array_equal(turned(picture, flip), np.array(rows)), flip  # type: ignore[arg-type]


@needs_libero
def test_suites_and_initial_states_are_the_published_ones() -> None:
    for suite, digest in STATES_SHA256.items():
        states = [initial_states(task.name) for task in tasks_of(suite)]
        assert {len(array) for array in states} == {50}
        assert hashlib.sha256(b"".join(array.tobytes() for array in states)).hexdigest() == digest, suite
    assert [len(tasks_of(suite)) for suite in SUITES] == [10, 10, 10, 10, 90]
    assert find_task(TASK)[0] == "libero_goal"
    with pytest.raises(
        ParamsError, match="unknown LIBERO task 'put_the_bowl_on_the_stov'.*did you mean 'put_the_bowl_on_the_stove'"
    ):
        find_task("put_the_bowl_on_the_stov")


def play_in_robosuite(number: int, actions: NDArray[np.float64]) -> tuple[list[NDArray[np.float64]], dict[str, Any]]:
    """States of the whole scene from the end of settling on, and the last picture of each camera, as robosuite's own renderer
    gives it; in a process of its own, since one renderer spoils another's pictures when it is freed."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # robosuite's renderer reads a number in it
    from libero.libero import benchmark
    from libero.libero.envs.env_wrapper import OffScreenRenderEnv

    suite = benchmark.get_benchmark("libero_goal")()
    task = suite.get_task_names().index(TASK)
    stock: Any = OffScreenRenderEnv(bddl_file_name=suite.get_task_bddl_file_path(task))
    stock.seed(number)
    stock.reset()
    stock.set_init_state(suite.get_task_init_states(task)[number])
    assert np.array_equal(stock.get_sim_state(), initial_states(TASK)[number])
    for _ in range(SETTLING_STEPS):
        stock.step(RESTING)
    states = [stock.get_sim_state()]
    for action in actions:
        stock.step(action)
        states.append(stock.get_sim_state())
    pictures = {camera: stock.sim.render(camera_name=name, width=64, height=64)[::-1] for camera, name in CAMERAS.items()}
    return states, {camera: np.ascontiguousarray(picture) for camera, picture in pictures.items()}


@needs_libero
@pytest.mark.slow
def test_an_episode_is_robosuites_own(environment: LiberoEnvironment) -> None:
    """From the shipped state on, bit for bit: states of the whole scene, and the last picture of each camera."""
    assert not environment.simulation.has_offscreen_renderer
    actions = actions_of(0, 15)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        states, pictures = pool.submit(play_in_robosuite, 3, actions).result()
    assert np.array_equal(play(environment, 3, actions), states)
    for camera, picture in environment.observe().items():
        assert np.array_equal(picture, pictures[camera]) and picture.std() > 10, camera


@needs_libero
@pytest.mark.slow
def test_an_episode_does_not_depend_on_those_before_it(environment: LiberoEnvironment) -> None:
    first = play(environment, 0, actions_of(1, 12))
    other = play(environment, 1, actions_of(2, 12))
    assert np.array_equal(play(environment, 0, actions_of(1, 12)), first) and not np.array_equal(first, other)
    assert environment.draw.tolist() == [0.0] and environment.proprioception().shape == (8,)
    with pytest.raises(ValueError, match="initial state 50 of put_the_bowl_on_the_stove: there are 50"):
        environment.reset(50)
    with pytest.raises(ValueError, match="expected 7 finite numbers"):
        environment.step(np.full(7, np.nan, np.float32))


@needs_libero
@pytest.mark.slow
def test_a_recorded_demonstration_is_read_as_the_policy_meets_it(environment: LiberoEnvironment, tmp_path: Path) -> None:
    """A script's first steps in the layout of LIBERO's create_dataset.py, pictures as robosuite gives them: upside down."""
    import h5py

    environment.reset(0)
    met, rows = [], []
    for _ in range(6):
        action = environment.expert_action()
        met.append(environment.observe() | {"proprioception": environment.proprioception(), "actions": action})
        raw = [environment._renderer.colour(environment._data, number) for number in environment._cameras.values()]
        rows.append((*raw, met[-1]["proprioception"][:6], met[-1]["proprioception"][6:], action))
        environment.step(action)
    names = ("obs/agentview_rgb", "obs/eye_in_hand_rgb", "obs/ee_states", "obs/gripper_states", "actions")
    with h5py.File(tmp_path / f"{TASK}_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
        data.attrs["problem_info"] = json.dumps({"language_instruction": "put the bowl on the stove"})
        for name, values in zip(names, zip(*rows, strict=True), strict=True):
            data[f"demo_0/{name}"] = np.stack(values)
    source = open_source(tmp_path, Options())
    described, episode = source.describe(), source.read(0)
    assert (described.rate_hz, described.cameras) == (RATE_HZ, sorted(CAMERAS))
    assert episode.actions is not None and episode.proprioception is not None
    assert episode.instruction == "put the bowl on the stove"
    assert np.array_equal(episode.actions, [step["actions"] for step in met])
    assert np.array_equal(episode.proprioception, [step["proprioception"] for step in met])
    for camera in CAMERAS:
        assert np.array_equal(np.concatenate(list(frame_blocks(episode.frames[camera]))), [step[camera] for step in met])


@needs_libero
@pytest.mark.slow
@pytest.mark.parametrize("suite", EXPERT_TASKS)
def test_a_script_solves_a_task_of_the_suite(suite: str) -> None:
    """Success is the simulator's; nothing is drawn."""
    task = tasks_of(suite)[EXPERT_TASKS[suite][0]]
    env = LiberoEnvironment(task.name, 64, (64, 64), ())
    env.reset(0)
    steps = next((step for step in range(1, SUITES[suite] + 1) if env.step(env.expert_action())), None)
    env.close()
    print(f"{suite}: {task.name} solved after {steps} steps")
    assert steps is not None


@needs_libero
@pytest.mark.slow
def test_an_arm_at_rest_solves_nothing(environment: LiberoEnvironment) -> None:
    environment.reset(0)
    assert not any(environment.step(np.array(RESTING, np.float32)) for _ in range(40))
