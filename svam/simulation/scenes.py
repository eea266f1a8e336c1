"""Shared scenes: pairs of MetaWorld's tasks that start from one and the same picture, so that only the sentence tells.

The stock tasks of one model give themselves away before anything moves: a window to be closed starts open, in another range
of places, and a marker stands where the handle should go. In a shared scene both tasks draw object places from one range by one
rule, what slides or turns starts in its middle (half open), and the markers of goals are hidden: the end of the way is where
the drawer, window or faucet can go no further, and the mug's is below the machine's spout. Success and the scripted
experts are MetaWorld's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from svam.errors import ParamsError

HIDDEN_GROUP = 5
"""Sites of this group are in no picture and under no label: MuJoCo draws groups 0 to 2 unless told otherwise."""
_MOUTH = np.array([0.0, 0.22, 0.0])
"""Metres from where a mug stands under the coffee machine to the machine's own place, as MetaWorld has it."""


@dataclass(frozen=True)
class Scene:
    """What the tasks of one scene have in common.

    tasks: MetaWorld names. low, high: bounds of the uniform draw, in metres; the place of the object, or of the mug and of the
    goal below the machine. part, start: the body whose one joint starts at `start`, in metres or radians; "": nothing does.
    """

    tasks: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    part: str = ""
    start: float = 0.0


SCENES: tuple[Scene, ...] = (
    Scene(("faucet-open", "faucet-close"), (-0.05, 0.80, 0.0), (0.05, 0.85, 0.0), "faucet_link2", 0.0),
    Scene(("window-open", "window-close"), (-0.05, 0.75, 0.2), (0.05, 0.90, 0.2), "windowb_a", 0.1),
    Scene(("drawer-open", "drawer-close"), (-0.1, 0.9, 0.0), (0.1, 0.9, 0.0), "drawer_link", -0.08),
    Scene(("coffee-button", "coffee-push"), (-0.1, 0.50, 0.0, -0.05, 0.70, 0.0), (0.1, 0.54, 0.0, 0.05, 0.75, 0.0)),
)
"""Ranges lie where both tasks' experts are reliable. A mug and its goal are at least 16 cm apart, where MetaWorld never draws
again. Neither expert solves the other's task, which is why a handle half down is no such pair: pulling it up solves pressing it
in a quarter of the goals, on the way."""


def scene_of(task: str) -> Scene:
    """The shared scene of `task`.

    Raises:
        ValueError: it has none; the message lists the tasks that have.
    """
    for scene in SCENES:
        if task in scene.tasks:
            return scene
    expected = ", ".join(task for scene in SCENES for task in scene.tasks)
    raise ParamsError(f"collect.scenes is 'shared', but task {task!r} has no shared scene; expected {expected}")


def check_scenes(scenes: str, tasks: Sequence[str]) -> None:
    """Raise ValueError, as `scene_of`, unless each of `tasks` can be had in these `scenes` (stock or shared)."""
    for task in tasks if scenes == "shared" else ():
        scene_of(task)


def prepare_shared_scene(env: Any, task: str) -> None:
    """Once, before any reset: let MetaWorld's `env` of `task` draw as its shared scene says, and hide the markers of goals."""
    from gymnasium.spaces import Box

    scene = scene_of(task)
    env._random_reset_space = Box(np.array(scene.low), np.array(scene.high), dtype=np.float64)
    if task == "coffee-button":
        # MetaWorld draws this task's machine alone and puts the mug below it. Here the draw is coffee-push's.
        drawn = env._get_state_rand_vec
        env._get_state_rand_vec = lambda: drawn()[3:] + _MOUTH
    for site in range(env.model.nsite):
        if "goal" in env.model.site(site).name:
            env.model.site_group[site] = HIDDEN_GROUP


def reset_shared_scene(env: Any, task: str) -> None:
    """After each reset of `env`: put what moves where the shared scene has it. The caller runs `mj_forward`."""
    scene = scene_of(task)
    if scene.part:
        joint = int(env.model.body(scene.part).jntadr[0])
        env.data.qpos[env.model.jnt_qposadr[joint]] = scene.start
        env.data.qvel[env.model.jnt_dofadr[joint]] = 0.0
    else:
        env._set_obj_xyz(np.array(env._last_rand_vec[:3]))
