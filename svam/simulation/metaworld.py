"""MetaWorld's 50 tasks as environments that are seeded, cheap to reset, and drawn fast and without interference.

Conventions of the field: camera `corner2` moved to [0.75, 0.075, 0.7], pictures turned by 180 degrees, 80 steps a second,
at most 500 steps an episode, success at any step of the episode counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svam.contract import SEGMENTATION_CLASSES, ContractError
from svam.episodes.instructions import described_tasks, likely_task
from svam.errors import ParamsError
from svam.simulation.looks import STOCK, put_on
from svam.simulation.rendering import Renderer, choose_backend
from svam.simulation.scenes import prepare_shared_scene, reset_shared_scene

RATE_HZ = 80.0
MAX_STEPS = 500
ACTION_DIMENSIONS = 4
"""Hand displacement x, y, z (1 is 1 cm a step) and gripper effort, each in [-1, 1]."""
FAR_METRES = 3.0
"""Depth is cut off here: the arm and the table are nearer, and the sky would be at 113 m."""

_MOVED_CAMERAS = {"corner2": (0.75, 0.075, 0.7)}
_TURNED_CAMERAS = frozenset({"corner", "corner2", "corner3", "corner4"})
_VERSION = "-v3"


def check_task(task: str) -> None:
    """Raise `ParamsError`, naming the closest matches, unless MetaWorld has `task`."""
    if task not in described_tasks():
        raise ParamsError(f"unknown MetaWorld task {task!r}: {likely_task(task)}")


def _body_classes(model: Any) -> NDArray[np.uint8]:
    """(bodies,) uint8 class number of each body.

    The robot, the table and its surroundings are known by name. Of the rest, what can move is the object (a puck, a drawer,
    a button, a door) and what cannot is a fixture (a drawer's case, a wall, a shelf): this holds for all 50 tasks.
    """
    number = {name: k for k, name in enumerate(SEGMENTATION_CLASSES)}
    classes = np.zeros(model.nbody, np.uint8)
    for body in range(model.nbody):
        name, root, parent = model.body(body).name, model.body(model.body_rootid[body]).name, int(model.body_parentid[body])
        if body == 0 or root == "RetainingWall":
            kind = "background"
        elif root == "tablelink":
            kind = "table"
        elif name == "hand" or classes[parent] == number["gripper"]:
            kind = "gripper"
        elif root in ("base", "mocap"):
            kind = "arm"
        else:
            kind = "fixture" if model.body_weldid[body] == 0 else "object"
        classes[body] = number[kind]
    return classes


def _drawn_classes(model: Any) -> dict[int, NDArray[np.uint8]]:
    """Kind of drawn thing (mjtObj of geom and site) -> (things,) uint8 class number."""
    import mujoco

    number = {name: k for k, name in enumerate(SEGMENTATION_CLASSES)}
    bodies = _body_classes(model)
    geoms, sites = bodies[model.geom_bodyid], bodies[model.site_bodyid]
    for geom in range(model.ngeom):
        if model.geom_bodyid[geom] == 0 and model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_PLANE:
            geoms[geom] = number["table"]  # pick-out-of-hole: a table top with a hole, of unnamed boxes
    for site in range(model.nsite):
        if "goal" in model.site(site).name.lower():
            sites[site] = number["goal"]
    return {int(mujoco.mjtObj.mjOBJ_GEOM): geoms, int(mujoco.mjtObj.mjOBJ_SITE): sites}


class TaskEnvironment:
    """One MetaWorld task, to be reset many times. Any number may live in one process.

    task: one of `described_tasks()`. image_size: side of the square pictures in pixels. cameras: MuJoCo camera names.
    render: "fast" has no shadows and reflections, "full" is the stock look at a tenth of the speed. scenes: "stock" is
    MetaWorld's own start of each task, "shared" one start for the tasks of a scene (see `svam.simulation.scenes`). look: any
    name, see `svam.simulation.looks`.

    Raises:
        ValueError: unknown task or camera, or a task without a shared scene; the message lists what there is.
        MachineError: no GL library draws on this machine.
    """

    def __init__(
        self, task: str, image_size: int, cameras: Sequence[str] = ("corner2",), render: Literal["fast", "full"] = "fast",
        scenes: Literal["stock", "shared"] = "stock", look: str = STOCK,
    ) -> None:  # fmt: skip
        check_task(task)
        choose_backend()  # before anything imports mujoco, which fails with a traceback where GL is missing
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        self.task, self.cameras, self.image_size, self.scenes = task, tuple(cameras), image_size, scenes
        env: Any = ALL_V3_ENVIRONMENTS[task + _VERSION]()
        # The state shall hold the goal, for the experts; goals come from the environment's own generator.
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)
        env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, True, True
        expert: Any = ENV_POLICY_MAP[task + _VERSION]
        self._env, self._expert = env, expert()
        if scenes == "shared":
            prepare_shared_scene(env, task)
        names = [env.model.camera(k).name for k in range(env.model.ncam)]
        for camera in self.cameras:
            if camera not in names:
                raise ParamsError(f"unknown camera {camera!r}: MetaWorld has {', '.join(names)}")
            if camera in _MOVED_CAMERAS:
                env.model.camera(camera).pos[:] = _MOVED_CAMERAS[camera]
        self._camera_numbers = {camera: names.index(camera) for camera in self.cameras}
        self._classes = _drawn_classes(env.model)
        put_on(env.model, look, self._classes)
        self._renderer = Renderer(env.model, image_size, render)
        self._state: NDArray[np.float64] | None = None
        self._goal = np.zeros(3, np.float32)

    def reset(self, seed: int) -> None:
        """Start an episode whose goal and object positions are a function of `seed` (any non-negative integer) alone."""
        import mujoco

        env = self._env
        env.seed(seed)
        env.reset()
        if self.scenes == "shared":
            reset_shared_scene(env, self.task)
        # `reset` draws the goal twice and leaves positions, the goal marker's among them, as the first draw set them:
        # without this the picture shows another goal than the one that counts, and the state a stale arm.
        mujoco.mj_forward(env.model, env.data)
        state = env._get_obs()
        state[18:36] = env._prev_obs = state[:18].copy()  # no previous step: both halves show this one
        self._state = state
        self._goal = np.array(env._target_pos, dtype=np.float32)

    def _started(self) -> NDArray[np.float64]:
        if self._state is None:
            raise RuntimeError(f"environment {self.task!r}: call reset before anything else")
        return self._state

    @property
    def goal(self) -> NDArray[np.float32]:
        """(3,) float32 target position in metres, as it was at reset. Some tasks have one fixed target: see `draw`."""
        return self._goal

    @property
    def draw(self) -> NDArray[np.float32]:
        """(d,) float32, what `seed` decided: object and goal positions in metres. Episodes differ where this differs."""
        self._started()
        return np.array(self._env._last_rand_vec, dtype=np.float32)

    def observe(self) -> dict[str, NDArray[np.uint8]]:
        """Camera name -> (H, W, 3) uint8 RGB of the present moment, upright."""
        self._started()
        return {
            camera: self._upright(self._renderer.colour(self._env.data, number), camera)
            for camera, number in self._camera_numbers.items()
        }

    def annotate(self) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Depth (H, W) float32 in metres, at most `FAR_METRES`, and class (H, W) uint8 (`SEGMENTATION_CLASSES`), both as the
        first camera sees them."""
        self._started()
        camera = self.cameras[0]
        depth, what = self._renderer.annotations(self._env.data, self._camera_numbers[camera])
        labels = np.zeros(depth.shape, np.uint8)
        for kind, classes in self._classes.items():
            mask = what[..., 0] == kind
            labels[mask] = classes[what[mask][:, 1]]
        return self._upright(np.minimum(depth, np.float32(FAR_METRES)), camera), self._upright(labels, camera)

    @staticmethod
    def _upright(image: NDArray[Any], camera: str) -> NDArray[Any]:
        """GL's rows from the bottom up to an upright picture: the corner cameras hang upside down."""
        return np.ascontiguousarray(image[:, ::-1] if camera in _TURNED_CAMERAS else image[::-1])

    def state(self) -> NDArray[np.float32]:
        """(39,) float32: hand, gripper and objects now, the same a step ago, and the goal."""
        return self._started().astype(np.float32)

    def proprioception(self) -> NDArray[np.float32]:
        """(4,) float32: hand position in metres and gripper opening in [0, 1]."""
        return self.state()[:4]

    def expert_action(self) -> NDArray[np.float32]:
        """(4,) float32 in [-1, 1]: what the scripted expert does now. It sees the state, not the picture."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Constant(s) may be too high": clipping is what we do
            action = self._expert.get_action(self._started())
        return np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)

    def step(self, action: NDArray[np.float32]) -> bool:
        """Execute `action` (4,) in physical units, clipped to [-1, 1]; returns whether the task is solved right now.

        Raises:
            ContractError: a wrong shape, or a value that is not finite.
            ValueError: a step beyond the 500th of an episode.
        """
        self._started()
        values = np.asarray(action, dtype=np.float32)
        if values.shape != (ACTION_DIMENSIONS,) or not np.isfinite(values).all():
            raise ContractError(
                f"action of task {self.task!r} is {values.tolist()}, expected {ACTION_DIMENSIONS} finite numbers"
            )
        if self._env.curr_path_length >= MAX_STEPS:
            raise ValueError(f"task {self.task!r}: an episode has at most {MAX_STEPS} steps")
        self._state, _, _, _, info = self._env.step(np.clip(values, -1.0, 1.0))
        return bool(info["success"] > 0.5)

    def close(self) -> None:
        self._renderer.close()
