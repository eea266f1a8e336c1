"""CALVIN's simulator as an environment: the user's own checkout, official starts, relative actions, its own task oracle.

The checkout is of `calvin_env`; the evaluation's sentences are in the repository of the benchmark, mees/calvin, which holds
`calvin_env` as a submodule, or lies beside it. Actions are (7,), 30 a second: the hand's displacement in the world's frame over
0.02 m, its turn in Euler angles over 0.05 rad, and the gripper, open above 0, else closed. Scene D, as all evaluations have it.

Here a reset builds the world anew. The official evaluation puts bodies back into a world that remembers contacts, a button's
state and the last gripper action (`robot_obs[14]`), so that its chains depend on those before them: by a millimetre after a
hundred steps. Here every chain goes as the official one does where it is the first.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from ruamel.yaml import YAML

from svam.contract import ContractError
from svam.episodes.frames import resize_frames
from svam.errors import MachineError, ParamsError, did_you_mean
from svam.params import Convert
from svam.simulation.calvin_experts import Expert

RATE_HZ = 30.0
ACTION_DIMENSIONS = 7
CAMERAS: Mapping[str, tuple[int, int]] = {"static": (200, 200), "gripper": (84, 84)}
"""(H, W) pixels of the cameras, by the names that converted demonstrations have."""

Renderer = Literal["cpu", "egl"]
_MODULES = ("pybullet", "hydra", "omegaconf", "cv2", "gym", "git", "quaternion", "scipy")
_SENTENCES = Path("calvin_models/conf/annotations/new_playtable_validation.yaml")
_SENTENCES_SHA256 = "3ecfa3a622a7c9e69535e65b770a9a8d4d204e23571ca7cc1a20fcda7c4e9513"
"""Of the official sentences as JSON: subtask -> sentences, sorted, no spaces."""

# The official start: hand, gripper and joints at rest, and the places of blocks, in metres and radians.
_ROBOT_START = (
    0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963,
    -1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1.0,
)  # fmt: skip
_SHELVES = {
    "slider_left": (-2.40851662e-01, 9.24044687e-02, 4.60990009e-01),
    "slider_right": (7.03416330e-02, 9.24044687e-02, 4.60990009e-01),
}
_ON_TABLE = (
    (5.00000896e-02, -1.20000177e-01, 4.59990009e-01),
    (2.29995412e-01, -1.19995140e-01, 4.59990010e-01),
)
_KEYS = ("led", "lightbulb", "slider", "drawer", "red_block", "blue_block", "pink_block", "grasped")


def fnv1_32(text: str) -> int:
    """FNV-1 of 32 bits over the text as UTF-16 (little endian), from 0 on: what `pyhash.fnv1_32()` gives for a text."""
    value = 0
    for byte in text.encode("utf-16-le"):
        value = (value * 0x01000193 & 0xFFFFFFFF) ^ byte
    return value


def initial_state(scene: Mapping[str, str | int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`robot_obs` (15,) and `scene_obs` (24,) float64 with which the official evaluation starts a chain.

    Args:
        scene: led and lightbulb 0 or 1, slider "left" or "right", drawer "open" or "closed", each block's place ("table",
            "slider_left", "slider_right"), grasped 0; in this order, which with the values seeds what is random: which of two
            places on the table is whose, and how the blocks are turned.
    """
    if tuple(scene) != _KEYS:
        raise ValueError(f"the keys of a scene are {', '.join(scene)}, expected {', '.join(_KEYS)} in this order")
    random = np.random.RandomState(fnv1_32(f"dict_values({list(scene.values())})"))
    on_table = list(_ON_TABLE)
    random.shuffle(on_table)
    obs = np.zeros(24)
    obs[0] = 0.28 if scene["slider"] == "left" else 0.0
    obs[1] = 0.22 if scene["drawer"] == "open" else 0.0
    obs[3] = 0.088 if scene["lightbulb"] == 1 else 0.0  # its switch
    obs[4], obs[5] = scene["lightbulb"], scene["led"]
    # The second place is the pink block's, and the blue one's where the red one has the first.
    places = {"red_block": 0, "blue_block": int(scene["red_block"] == "table"), "pink_block": 1}
    for start, (block, place) in zip((6, 12, 18), places.items(), strict=True):
        obs[start : start + 3] = _SHELVES.get(str(scene[block]), on_table[place])
        obs[start + 5] = random.uniform(np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
    return np.array(_ROBOT_START), obs


@dataclass(frozen=True)
class Checkout:
    """A verified checkout of `calvin_env`: its folder, its commit, and the evaluation's sentence of each subtask."""

    folder: Path
    commit: str
    sentences: Mapping[str, str]


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ParamsError(f"evaluate.calvin.path: {folder} is no git checkout: {done.stderr.strip()}")
    return done.stdout.strip()


def open_checkout(path: str | None, commit: str) -> Checkout:
    """Find and verify the simulator, and that it can run here; nothing of it is imported.

    Args:
        path: of a checkout of `calvin_env` with mees/calvin around or beside it, or of mees/calvin.
        commit: of `calvin_env`, or its first characters.

    Raises:
        ParamsError: there is no such checkout, or it is of another commit, or changed.
        MachineError: a library that the simulator needs is missing.
    """
    if not path:
        raise ParamsError(
            "evaluate.calvin.path is null; name a checkout: git clone --recurse-submodules https://github.com/mees/calvin"
        )
    given = Path(path).expanduser().resolve()
    folder = next((f for f in (given, given / "calvin_env") if (f / "calvin_env/envs/play_table_env.py").is_file()), None)
    if folder is None:
        raise ParamsError(
            f"evaluate.calvin.path is {path}, where neither calvin_env nor calvin_env/calvin_env has envs/play_table_env.py; "
            "name a checkout of mees/calvin_env, or one of mees/calvin with its submodules"
        )
    found = _git(folder, "rev-parse", "HEAD")
    if len(commit) < 7 or not found.startswith(commit):
        raise ParamsError(
            f"evaluate.calvin.commit is {commit}, but {folder} is at {found}; check out the commit that you mean "
            f"(git -C {folder} checkout {commit}), or name this one in seven characters or more"
        )
    if changed := _git(folder, "status", "--porcelain", "--untracked-files=no"):
        file = changed.splitlines()[0].split()[-1]
        raise ParamsError(f"evaluate.calvin.path: {folder / file} is changed since commit {found[:7]}; restore or commit it")
    if missing := [name for name in _MODULES if find_spec(name) is None]:
        python = "" if sys.version_info < (3, 12) else " (pybullet has no wheel for Python 3.12: use 3.11)"
        raise MachineError(f"CALVIN needs {missing[0]}: pip install -c constraints.txt -e '.[calvin]'{python}")
    return Checkout(folder, found, _sentences(folder))


def _sentences(folder: Path) -> dict[str, str]:
    places = [folder.parent / _SENTENCES, folder.parent / "calvin" / _SENTENCES]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ParamsError(
            f"evaluate.calvin.path: neither {places[0]} nor {places[1]} is there, which has the evaluation's sentences; "
            f"git clone https://github.com/mees/calvin {folder.parent / 'calvin'}"
        )
    sentences = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    text = json.dumps(sentences, sort_keys=True, separators=(",", ":"))
    if (found := hashlib.sha256(text.encode()).hexdigest()) != _SENTENCES_SHA256:
        raise ParamsError(f"{file}: SHA-256 of its sentences is {found}, expected the official {_SENTENCES_SHA256}; restore it")
    return {subtask: choices[0] for subtask, choices in sentences.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The simulator and what it is built on tell of versions, deprecations and closed connections."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class CalvinEnvironment:
    """CALVIN's table and robot; one in a process, since the simulator names no client in all of its calls.

    task: of no meaning; all tasks are in one scene. folder: of the checkout. cameras: those that `observe` draws, nothing else
    draws. image_size: (H, W) that their pictures are resized to, as a conversion does; None leaves their own. states: those
    that `reset` counts. `simulator` is CALVIN's own object, for what this class does not tell.

    Raises:
        MachineError: the EGL renderer does not start.
    """

    def __init__(
        self, task: str = "calvin", *, folder: Path, renderer: Renderer = "cpu", cameras: Sequence[str] = ("static",),
        image_size: tuple[int, int] | None = None, states: Sequence[Mapping[str, str | int]] = (),
    ) -> None:  # fmt: skip
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        with _quiet():
            import calvin_env
            import hydra
            from omegaconf import OmegaConf

            if folder not in Path(calvin_env.__file__).resolve().parents:
                raise MachineError(f"{calvin_env.__file__} is imported instead of {folder}: pip uninstall calvin_env")

            def load(name: str) -> Any:
                config: Any = OmegaConf.load(folder / "conf" / f"{name}.yaml")
                config.pop("defaults", None)
                return config

            robot = OmegaConf.merge(load("robot/panda"), load("robot/panda_longer_finger"))
            config = OmegaConf.create({
                "data_path": "data", "use_vr": False, "env": load("env/play_table_env"), "robot": robot,
                "scene": load("scene/calvin_scene_D"),
                "cameras": {camera: load(f"cameras/cameras/{camera}") for camera in cameras},
            })  # fmt: skip
            try:
                simulator: Any = hydra.utils.instantiate(config.env, use_egl=renderer == "egl", use_scene_info=True)
            except SystemExit:
                raise MachineError("CALVIN's EGL renderer does not load here; use evaluate.calvin.renderer: cpu") from None
            self._oracle = hydra.utils.instantiate(load("tasks/new_playtable_tasks"))
        self.simulator, self.cameras, self.states, self._image_size = simulator, tuple(cameras), tuple(states), image_size
        self._cameras = {camera.name: camera for camera in simulator.cameras}
        simulator.cameras = []  # else every step draws
        self.observe()  # the first pictures of an EGL process are lit otherwise than all others
        self.subtask: str | None = None
        self._start: Any = None
        self._expert: Expert | None = None
        self._draw = np.zeros(0, np.float32)

    def reset(self, seed: int) -> None:
        """Start where state number `seed` of `states` does."""
        self.reset_to(*initial_state(self.states[seed]))

    def reset_to(self, robot_obs: NDArray[np.float64], scene_obs: NDArray[np.float64]) -> None:
        """Start at `robot_obs` (15,) and `scene_obs` (24,), in a new world."""
        simulator = self.simulator
        simulator.seed(0)
        simulator.scene.np_random = simulator.np_random
        simulator.load()
        simulator.robot.gripper_action = int(robot_obs[14])
        simulator.reset(robot_obs=robot_obs, scene_obs=scene_obs)
        self.subtask, self._draw = None, scene_obs.astype(np.float32)

    def begin(self, goal: str) -> None:
        """From now on `step` tells whether this subtask is solved, compared with the present moment."""
        if goal not in self._oracle.tasks:
            raise ParamsError(f"CALVIN has no subtask {goal!r}{did_you_mean(goal, self._oracle.tasks)}")
        self.subtask, self._start, self._expert = goal, self.simulator.get_info(), None

    @property
    def draw(self) -> NDArray[np.float32]:
        """(24,) float32, the scene at the start."""
        return self._draw

    def robot_obs(self) -> NDArray[np.float64]:
        """(15,) float64: hand's place (m) and Euler angles (rad), gripper's width (m), seven joints (rad), last gripper
        action."""
        return np.asarray(self.simulator.robot.get_observation()[0], dtype=np.float64)

    def scene_obs(self) -> NDArray[np.float64]:
        """(24,) float64: slider, drawer, button, switch, light bulb, LED, then of the red, blue and pink block the place
        (m) and Euler angles (rad)."""
        return np.asarray(self.simulator.scene.get_obs(), dtype=np.float64)

    def proprioception(self) -> NDArray[np.float32]:
        """`robot_obs` in float32, as demonstrations have it."""
        return self.robot_obs().astype(np.float32)

    def observe(self) -> dict[str, NDArray[np.uint8]]:
        """Camera name -> (H, W, 3) uint8 RGB of the present moment."""
        frames = {name: np.ascontiguousarray(self._cameras[name].render()[0], np.uint8) for name in self.cameras}
        if self._image_size is None:
            return frames
        size = Convert.model_construct(crop="none", image_size=list(self._image_size))
        return {name: resize_frames(frame[None], size)[0] for name, frame in frames.items()}

    def expert_action(self) -> NDArray[np.float32]:
        """(7,) float32: what the scripted expert of the subtask does now, which sees the state and not the picture. To be
        called once at each step.

        Raises:
            ParamsError: no script solves the subtask.
        """
        if self._expert is None:
            self._expert = Expert(self, str(self.subtask))
        return self._expert.action()

    def step(self, action: NDArray[np.float32]) -> bool:
        """Execute a relative action (7,), as it is but for the gripper's sign; returns whether the subtask is solved now.

        Raises:
            ContractError: a wrong shape, or a value that is not finite.
        """
        values = np.array(action, np.float32)
        if values.shape != (ACTION_DIMENSIONS,) or not np.isfinite(values).all():
            raise ContractError(f"an action of CALVIN is {values.tolist()}, expected {ACTION_DIMENSIONS} finite numbers")
        values[6] = 1.0 if values[6] > 0 else -1.0
        info = self.simulator.step(values)[3]
        return self.subtask is not None and bool(self._oracle.get_task_info_for_set(self._start, info, {self.subtask}))

    def close(self) -> None:
        """Disconnect from the simulator."""
        with _quiet():
            self.simulator.close()
        self.simulator.close = lambda: None  # which its destructor calls once more, with a line on the console
