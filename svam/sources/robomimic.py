"""robomimic, LIBERO and Isaac Lab: HDF5 files with one demonstration per group `data/demo_<number>`, usually one task a file.

`convert.path` is such a file, or a folder whose .hdf5 and .h5 files, sub-folders included, are read as several tasks.
From each demonstration:

- `actions` (n, A), and as cameras all pictures in `obs`: `<camera>_image` (robomimic), `<camera>_rgb` (LIBERO: agentview,
  eye_in_hand) or any other uint8 (n, H, W, 3) (Isaac Lab: table_cam; also with alpha, or channels first), in the order of
  names. A camera is named without those endings; `convert.cameras` takes both forms. `obs/*_depth` is left out, with a note.
- Proprioception, of the keys in `Options`. State: `states` (n, S), the simulator's own, where it is equally wide in all files.
- The attribute `success` of a demonstration, where it is there, for `convert.success`.

Numbers are cast to float32. Demonstrations come in the order of their numbers, files in that of their names. `mask/train` and
`mask/valid`, lists of demonstrations, become the split. Files with states alone are refused: their pictures must be rendered.
The rate is `control_freq` of the attribute `env_args`, or else robosuite's 20, with a note; `convert.rate_hz` overrides it.

Alignment: row t of `actions` goes with row t of `obs`, as stored; nothing is shifted. In robomimic's files observation t is
what was seen before action t. LIBERO's own `create_dataset.py` stores what was seen after action t beside it, and everyone
trains on it like that; `observations: after` puts picture t and action t + 1 together instead, one step fewer per episode.

Pictures: LIBERO's are stored as OpenGL renders them, upside down (`macros_image_convention` is "opengl"), and robomimic's
upright. `flip: auto` turns those of a file with this attribute, or of a file without it whose pictures are LIBERO's two, by a
vertical flip, which is the true correction; all others stay as stored. Models that follow OpenVLA have seen LIBERO's rotated by
180 degrees, so mirrored too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svam.contract import EVERYTHING, Choice, ContractError, Episode, EpisodeShape, FrameBlocks, Frozen, SourceDescription
from svam.errors import SvamError
from svam.files import FileError, stamp
from svam.sources._choice import checked, chosen_cameras, chosen_instruction
from svam.sources._hdf5 import Hdf5File, attempted, check_named, hdf5_files, most_common
from svam.sources._picture_arrays import picture_array

_ENDINGS = ("_image", "_rgb")
_LIBERO = {"agentview_rgb", "eye_in_hand_rgb"}
_PROPRIOCEPTION = (
    ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"),
    ("ee_states", "gripper_states"),
)
_ROBOSUITE_RATE = 20.0


class Options(Frozen):
    """What `convert.options` may say for `robomimic`.

    instructions: file name without ending -> sentence of its demonstrations. Where it says nothing, the file's own is taken:
        `lang` of a demonstration's `ep_meta`, or `language_instruction` of the attribute `problem_info` (LIBERO).
    instruction_from_file_name: where there is none either, take it from the name: `KITCHEN_SCENE1_open_the_drawer_demo` becomes
        "open the drawer".
    proprioception: keys in `obs`, joined in this order; empty takes robot0_eef_pos, robot0_eef_quat, robot0_gripper_qpos, and
        the same of robot1 where it is there, or else LIBERO's ee_states and gripper_states, or else none, with a note.
    flip: "none", "vertical", "rotate_180" or "auto"; see the module's text.
    observations: "as_stored", or "after" where observation t shows the result of action t; see the module's text.
    filter_key: read only the demonstrations that `mask/<filter_key>` lists; empty reads all.
    """

    instructions: dict[str, str] = {}
    instruction_from_file_name: bool = False
    proprioception: list[str] = []
    flip: Literal["auto", "none", "vertical", "rotate_180"] = "auto"
    observations: Literal["as_stored", "after"] = "as_stored"
    filter_key: str = ""


@dataclass(frozen=True)
class _Demo:
    """One demonstration without its pictures. `rate_hz`: None where its file states none; `steps`: rows as stored; `cameras`:
    name -> (key in `obs`, (n, H, W, 3)); `state`: width of `states`, 0 without; `notes`: of the pictures."""

    file: Path
    name: str
    flip: str
    rate_hz: float | None
    steps: int
    cameras: dict[str, tuple[str, tuple[int, int, int, int]]]
    proprioception: tuple[str, ...]
    state: int
    sentence: str
    depth: bool
    notes: tuple[str, ...]
    success: bool | None
    held_out: bool | None

    def __str__(self) -> str:
        return f"{self.file}: data/{self.name}"


def _json_attribute(data: Hdf5File, name: str, key: str) -> dict[str, Any]:
    """A JSON object in a string attribute; empty where there is none."""
    text = data.text_attribute(name, key)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{data.file}: attribute {key!r} of {name} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise FileError(f"{data.file}: attribute {key!r} of {name} is {value!r:.60}, expected a JSON object")
    return value


def _control_rate(data: Hdf5File) -> float | None:
    """`env_kwargs.control_freq` of `env_args`, or of robosuite's `env_info`."""
    for key in ("env_args", "env_info"):
        found = _json_attribute(data, "data", key)
        kwargs = found.get("env_kwargs", found)
        rate = kwargs.get("control_freq") if isinstance(kwargs, dict) else None
        if rate is None:
            continue
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1e6:
            raise FileError(
                f"{data.file}: control_freq in attribute {key!r} of data is {rate!r:.40}, expected steps per second"
            )
        return float(rate)
    return None


def _sentence(data: Hdf5File, where: str, holder: str, key: str, field: str) -> str:
    """A sentence in a JSON attribute: a string, or LIBERO's list of words; "" without."""
    value = _json_attribute(data, holder, key).get(field)
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        value = " ".join(value)
    if value is not None and not isinstance(value, str):
        raise FileError(f"{data.file}: {field} in attribute {key!r} of {where} is {value!r:.60}, expected a sentence")
    try:
        (value or "").encode("utf-8")
    except UnicodeError:
        raise FileError(f"{data.file}: {field} in attribute {key!r} of {where} is not valid Unicode") from None
    return (value or "").strip().strip('"').strip()


def _from_file_name(file: Path) -> str:
    """`KITCHEN_SCENE1_open_the_drawer_demo` -> "open the drawer"."""
    stem = re.sub(r"^(?:[A-Z_]+SCENE\d+_)", "", re.sub(r"_demo$", "", file.stem))
    return " ".join(stem.split("_")).strip()


class RobomimicSource:
    """Demonstrations file by file, then by number."""

    def __init__(self, path: Path, options: Options, choice: Choice) -> None:
        """See `open_source`."""
        self.path, self.options, self._choice = Path(path), options, choice
        files = hdf5_files(self.path)
        check_named(self.path, options.instructions, (file.stem for file in files))
        self.notes: list[str] = []
        self._demos: list[_Demo | SvamError] = []
        for file in files:
            scanned = attempted(partial(self._scan, file))
            self._demos += [scanned] if isinstance(scanned, SvamError) else scanned
        readable = [demo for demo in self._demos if isinstance(demo, _Demo)]
        if not readable:
            unread = [demo for demo in self._demos if isinstance(demo, SvamError)]
            raise unread[0] if unread else FileError(f"{self.path}: mask/{options.filter_key} lists no demonstration")
        known = {camera: key for demo in readable for camera, (key, _) in demo.cameras.items()}
        asked = choice.model_copy(update={"cameras": [_camera(name, known) for name in choice.cameras]})
        self._cameras = chosen_cameras(asked, list(known), self.path, "obs/")
        if not choice.cameras:
            self._cameras = list(most_common(tuple(demo.cameras) for demo in readable))
        self._proprioception = most_common(demo.proprioception for demo in readable)
        self._keep_state = readable[0].state > 0 and all(demo.state == readable[0].state for demo in readable)
        self._rate = most_common(demo.rate_hz for demo in readable)
        self._note(readable, [key for camera, key in known.items() if camera not in self._cameras])

    def _note(self, readable: list[_Demo], unread: list[str]) -> None:
        keys = {key for demo in readable for camera, (key, _) in demo.cameras.items() if camera in self._cameras}
        self.notes += dict.fromkeys(note for demo in readable for note in demo.notes)
        self.notes += [f"{self.path}: obs/{key} is left out: most demonstrations do not have it" for key in unread]
        if self._rate is None and self._choice.rate_hz is None:
            self.notes.append(
                f"{self.path}: no control_freq in env_args: robosuite's {_ROBOSUITE_RATE:g} Hz are assumed; set convert.rate_hz"
            )
        if any(demo.depth for demo in readable):
            self.notes.append(f"{self.path}: obs/*_depth is left out")
        if not self._proprioception:
            self.notes.append(
                f"{self.path}: no proprioception: none of the default keys is in obs; name some in convert.options"
            )
        if not self._keep_state and any(demo.state for demo in readable):
            self.notes.append(f"{self.path}: states, the simulator's own, is left out: it is not equally wide in all files")
        turned = {demo.file for demo in readable if demo.flip != "none"}
        if turned and self.options.flip == "auto":
            self.notes.append(
                f"{self.path}: pictures of {len(turned)} files are flipped vertically: their macros_image_convention, or "
                "LIBERO's names of cameras, say that they are upside down; convert.options.flip: none leaves them as stored"
            )
        elif self.options.flip == "auto" and any(key.endswith("_rgb") for key in keys):
            self.notes.append(
                f"{self.path}: pictures are read as stored, since nothing says that they are upside down, as LIBERO's are; "
                "look at one episode, and set convert.options.flip: vertical if they are"
            )
        if self.options.observations == "as_stored" and keys & _LIBERO:
            self.notes.append(
                f"{self.path}: LIBERO's own files pair each action with the picture after it, and are read as stored; "
                "convert.options.observations 'after' pairs it with the picture before it"
            )

    def _scan(self, file: Path) -> list[_Demo | SvamError]:
        """The demonstrations of one file, each as it is or as the reason why it cannot be read."""
        with Hdf5File(file, "robomimic") as data:
            return self._scanned(file, data)

    def _scanned(self, file: Path, data: Hdf5File) -> list[_Demo | SvamError]:
        if not data.is_group("data"):
            raise FileError(f"{file}: no group data, which robomimic's layout has; it has {data.listed('/')}")
        names = [name for name in data.names("data") if data.is_group(f"data/{name}")]
        if not names:
            raise FileError(f"{file}: no demonstration in data; it has {data.listed('data')}")
        split = {key: set(data.texts(f"mask/{key}")) for key in ("train", "valid") if data.is_dataset(f"mask/{key}")}
        train, valid = split.get("train", set()), split.get("valid", set())
        if train & valid:
            raise FileError(f"{file}: {min(train & valid)} is in mask/train and in mask/valid, expected one of them")
        if absent := sorted((train | valid) - set(names)):
            self.notes.append(f"{file}: mask lists {len(absent)} demonstrations that are not there, the first is {absent[0]!r}")
        if self.options.filter_key:
            if not data.is_dataset(f"mask/{self.options.filter_key}"):
                keys = ", ".join(data.names("mask")) or "none"
                raise FileError(
                    f"{file}: no mask/{self.options.filter_key}, which convert.options.filter_key names; it has {keys}"
                )
            listed = set(data.texts(f"mask/{self.options.filter_key}"))
            names = [name for name in names if name in listed]
        if split and (neither := [name for name in names if name not in train | valid]):
            self.notes.append(
                f"{file}: {len(neither)} demonstrations are in no mask, the first is {neither[0]}; they are trained on"
            )
        sides = {name: (name in valid) if name in train | valid else None for name in names}
        return [attempted(partial(self._demo, file, data, name, side)) for name, side in sides.items()]

    def _demo(self, file: Path, data: Hdf5File, name: str, held_out: bool | None) -> _Demo:
        where = f"data/{name}"
        shape, _ = data.layout(f"{where}/actions")
        if len(shape) != 2 or shape[0] == 0:
            raise FileError(f"{file}: {where}/actions is {shape}, expected (steps, dimensions) with at least one step")
        samples = data.attribute(where, "num_samples")
        if isinstance(samples, (int, np.integer)) and samples != shape[0]:
            raise FileError(f"{file}: {where} has num_samples {samples}, but {shape[0]} actions")
        if self.options.observations == "after" and shape[0] < 2:
            raise FileError(f"{file}: {where} has 1 step, and convert.options.observations 'after' needs 2")
        cameras, notes = self._pictures(file, data, where, shape[0])
        states = data.layout(f"{where}/states")[0] if data.is_dataset(f"{where}/states") else (0, 0)
        flip: str = self.options.flip
        if flip == "auto":
            convention = data.text_attribute("data", "macros_image_convention")
            libero = {key for key, _ in cameras.values()} <= _LIBERO
            flip = "vertical" if convention == "opengl" or (convention is None and libero) else "none"
        keys, success = data.names(f"{where}/obs"), data.attribute(where, "success")
        return _Demo(
            file=file, name=name, flip=flip, rate_hz=None if self._choice.rate_hz else _control_rate(data), steps=shape[0],
            cameras=cameras, proprioception=self._keys_of_proprioception(file, where, keys),
            state=states[1] if len(states) == 2 else 0, sentence=self._instruction(file, data, where),
            depth=any(key.endswith("_depth") for key in keys), notes=notes,
            success=bool(success) if isinstance(success, (bool, np.bool_, int, np.integer)) else None, held_out=held_out,
        )  # fmt: skip

    def _pictures(
        self, file: Path, data: Hdf5File, where: str, steps: int
    ) -> tuple[dict[str, tuple[str, tuple[int, int, int, int]]], tuple[str, ...]]:
        """The cameras of a demonstration (those of `convert.cameras`), and notes on how their pictures are stored."""
        asked = {name.removeprefix("obs/") for name in self._choice.cameras}
        keys = [key for key in data.names(f"{where}/obs") if data.is_dataset(f"{where}/obs/{key}")]
        short = {key: key.removesuffix("_image").removesuffix("_rgb") for key in keys}
        names = {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}
        cameras, notes = {}, list[str]()
        for key in sorted(keys, key=lambda key: names[key]):
            if asked and asked.isdisjoint((key, short[key])):
                continue
            shape, dtype = data.layout(f"{where}/obs/{key}")
            if picture_array(shape, dtype) is None and not (asked or key.endswith(_ENDINGS)):
                continue
            pictures = data.pictures(f"{where}/obs/{key}")
            if pictures.dtype.kind == "f" and not (asked or key.endswith(_ENDINGS)):
                continue
            if shape[0] != steps:
                raise ContractError(f"{file}: {where}/obs/{key} has {shape[0]} pictures, but actions has {steps} steps")
            cameras[names[key]] = key, pictures.shape
            notes += pictures.notes(f"{self.path}: obs/{key}")
        if not cameras and asked:
            there = ", ".join(name for key, name in names.items() if len(data.layout(f"{where}/obs/{key}")[0]) == 4) or "none"
            raise FileError(f"{file}: {where}/obs has no camera of convert.cameras; it has {there}")
        if not cameras:
            has = "states" if data.is_dataset(f"{where}/states") else "observations" if keys else "actions"
            there = f"; obs has {data.listed(f'{where}/obs')}" if keys else ""
            raise FileError(
                f"{file}: {where} has {has} but no pictures, uint8 (n, H, W, 3) in obs{there}; render them first, for example "
                "with robomimic's dataset_states_to_obs.py (for robosuite's own files, convert_robosuite.py before it)"
            )
        return cameras, tuple(notes)

    def _keys_of_proprioception(self, file: Path, where: str, keys: list[str]) -> tuple[str, ...]:
        asked = self.options.proprioception
        for key in asked:
            if key not in keys:
                raise FileError(
                    f"{file}: {where}/obs has no {key!r}, which convert.options.proprioception names; it has {keys}"
                )
        if asked:
            return tuple(asked)
        for group in _PROPRIOCEPTION:
            if all(key in keys for key in group):
                second = tuple(key.replace("robot0", "robot1") for key in group)
                return group + (second if second != group and all(key in keys for key in second) else ())
        return ()

    def _instruction(self, file: Path, data: Hdf5File, where: str) -> str:
        own = self._choice.instruction or (
            self.options.instructions.get(file.stem, "").strip()
            or _sentence(data, where, where, "ep_meta", "lang")
            or _sentence(data, "data", "data", "problem_info", "language_instruction")
            or (_from_file_name(file) if self.options.instruction_from_file_name else "")
        )
        return chosen_instruction(self._choice, own, f"{file}: {where}")

    def describe(self) -> SourceDescription:
        """Rate, cameras and instructions; a task is named by its sentence."""
        readable = [demo for demo in self._demos if isinstance(demo, _Demo)]
        return SourceDescription(
            rate_hz=self._choice.rate_hz or self._rate or _ROBOSUITE_RATE, cameras=self._cameras,
            instructions={demo.sentence: {"train": [demo.sentence], "held_out": []} for demo in readable},
            provenance={
                "source": "robomimic", "options": self.options.model_dump(),
                "files": [self._relative(file).as_posix() for file in dict.fromkeys(demo.file for demo in readable)],
            },
        )  # fmt: skip

    def _relative(self, file: Path) -> Path:
        return file.relative_to(self.path) if self.path.is_dir() else Path(file.name)

    def __len__(self) -> int:
        return len(self._demos)

    def _late(self) -> int:
        """By how many steps observations are late."""
        return 1 if self.options.observations == "after" else 0

    def _known(self, index: int) -> _Demo:
        """A demonstration that can be read, with all that the set has."""
        demo = self._demos[index]
        if not isinstance(demo, _Demo):
            raise demo
        if absent := [camera for camera in self._cameras if camera not in demo.cameras]:
            raise ContractError(
                f"{demo}: no camera {absent[0]!r}, which other demonstrations have; it has {', '.join(demo.cameras)}, and "
                "convert.cameras says which to read"
            )
        if demo.proprioception != self._proprioception:
            raise ContractError(
                f"{demo}: proprioception of {', '.join(demo.proprioception) or 'nothing'}, but of "
                f"{', '.join(self._proprioception) or 'nothing'} in most; set convert.options.proprioception"
            )
        if demo.rate_hz != self._rate:
            raise ContractError(f"{demo}: control_freq is {demo.rate_hz}, but {self._rate} in most; set convert.rate_hz")
        return demo

    def shape(self, index: int) -> EpisodeShape:
        """Length, split, name, task and success of one episode.

        Raises:
            FileError, ContractError: it cannot be read, or differs from the others in cameras, proprioception or rate.
        """
        demo = self._known(index)
        within = [*self._relative(demo.file).with_suffix("").parts, demo.name] if self.path.is_dir() else [demo.name]
        return EpisodeShape(
            demo.steps - self._late(), held_out=demo.held_out, stamp=stamp(demo.file), name="/".join(within),
            task=demo.sentence, success=demo.success,
        )  # fmt: skip

    def _blocks(self, demo: _Demo, key: str) -> Iterator[NDArray[np.uint8]]:
        """The frames of one camera, upright."""
        left = demo.steps - self._late()
        with Hdf5File(demo.file, "robomimic") as data:
            for block in data.picture_blocks(f"data/{demo.name}/obs/{key}"):
                upright = {"vertical": block[:, ::-1], "rotate_180": block[:, ::-1, ::-1]}.get(demo.flip, block)[:left]
                left -= len(upright)
                if len(upright):
                    yield np.ascontiguousarray(upright)

    def read(self, index: int) -> Episode:
        """One episode; its frames are read when they are asked for.

        Raises:
            FileError: the file is damaged, lacks a field or changed since the source was opened.
            ContractError: the episode breaks the contract.
            MachineError: a compression filter is not installed.
        """
        demo, late = self._known(index), self._late()
        with Hdf5File(demo.file, "robomimic") as data:

            def vector(name: str, skip: int, end: int) -> NDArray[np.float32]:
                values = data.matrix(f"data/{demo.name}/{name}")
                if len(values) != demo.steps:
                    raise ContractError(f"{demo}/{name} has {len(values)} steps, but actions has {demo.steps}")
                return values[skip:end]

            steps = demo.steps - late
            # What was observed is late by one step under observations "after"; actions and simulator states are not.
            actions = vector("actions", late, demo.steps)
            state = vector("states", late, demo.steps) if self._keep_state else None
            columns = [vector(f"obs/{key}", 0, steps) for key in demo.proprioception]
        frames = {camera: self._frames(demo, *demo.cameras[camera]) for camera in self._cameras}
        episode = Episode(
            task=demo.sentence, instruction=demo.sentence, rate_hz=self._choice.rate_hz or self._rate or _ROBOSUITE_RATE,
            frames=frames, actions=actions, state=state, proprioception=np.hstack(columns) if columns else None,
            provenance={"file": self._relative(demo.file).as_posix(), "demo": demo.name},
        )  # fmt: skip
        return checked(episode, str(demo))

    def _frames(self, demo: _Demo, key: str, shape: tuple[int, int, int, int]) -> FrameBlocks:
        return FrameBlocks((demo.steps - self._late(), *shape[1:]), lambda: self._blocks(demo, key))


def _camera(name: str, known: dict[str, str]) -> str:
    """The camera that `convert.cameras` means, by its name or by its key in `obs`."""
    key = name.removeprefix("obs/")
    return next((camera for camera, its_key in known.items() if key in (camera, its_key)), key)


def open_source(path: Path, options: Options, choice: Choice = EVERYTHING) -> RobomimicSource:
    """Open a file, or a folder of files that are a task each; what every demonstration holds is looked up.

    Raises:
        FileError: no files, or none of their demonstrations can be read.
        ParamsError: `choice` names a camera that no demonstration has.
        MachineError: h5py is not installed.
    """
    return RobomimicSource(path, options, choice)
