"""robomimic and LIBERO: HDF5 files with one demonstration per group `data/demo_<number>`, and usually one task per file.

`convert.path` is such a file, or a folder whose .hdf5 and .h5 files, sub-folders included, are read as several tasks.
From each demonstration:

- `actions` (n, A), and `obs/<camera>_image` (robomimic) or `obs/<camera>_rgb` (LIBERO: agentview, eye_in_hand), (n, H, W, 3)
  uint8 RGB; the camera is named without the ending, in the order of names. `obs/*_depth` is left out, with a note.
- Proprioception, of the keys in `Options`. State: `states` (n, S), the simulator's own, where it is equally wide in all files.

Numbers are cast to float32. Demonstrations come in the order of their numbers, files in that of their names. `mask/train` and
`mask/valid`, lists of demonstrations, become the split. Files with states alone are refused: their pictures must be rendered.

Alignment: row t of `actions` goes with row t of `obs`, as stored; nothing is shifted. In robomimic's files observation t is
what was seen before action t. LIBERO's own `create_dataset.py` stores what was seen after action t beside it, and everyone
trains on it like that; `observations: after` puts picture t and action t + 1 together instead, one step fewer per episode.

Pictures: LIBERO's are stored as OpenGL renders them, upside down (`macros_image_convention` is "opengl"), and robomimic's
upright. `flip: auto` turns those of a file with this attribute, or of a file without it whose pictures are named `*_rgb`, by a
vertical flip, which is the true correction. Models that follow OpenVLA have seen them rotated by 180 degrees, so mirrored too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from svam.contract import EVERYTHING, Choice, ContractError, Episode, EpisodeShape, FrameBlocks, Frozen, SourceDescription
from svam.files import FileError, stamp
from svam.sources._hdf5 import Hdf5File, check_named, hdf5_files, picture_shape

_ENDINGS = ("_image", "_rgb")
_PROPRIOCEPTION = (
    ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"),
    ("ee_states", "gripper_states"),
)
_ROBOSUITE_RATE = 20.0


class Options(Frozen):
    """What `convert.options` may say for `robomimic`.

    instruction: one sentence for all files.
    instructions: file name without ending -> sentence; goes before `instruction`. Where neither says anything, the file's own
        is taken: `lang` of a demonstration's `ep_meta`, or `language_instruction` of the attribute `problem_info` (LIBERO).
    instruction_from_file_name: where there is none either, take it from the name: `KITCHEN_SCENE1_open_the_drawer_demo` becomes
        "open the drawer".
    proprioception: keys in `obs`, joined in this order; empty takes robot0_eef_pos, robot0_eef_quat, robot0_gripper_qpos, and
        the same of robot1 where it is there, or else LIBERO's ee_states and gripper_states, or else none, with a note.
    flip: "none", "vertical", "rotate_180" or "auto"; see the module's text.
    observations: "as_stored", or "after" where observation t shows the result of action t; see the module's text.
    filter_key: read only the demonstrations that `mask/<filter_key>` lists; empty reads all.
    rate_hz: empty takes `control_freq` of the attribute `env_args`, or else robosuite's 20, with a note.
    """

    instruction: str = ""
    instructions: dict[str, str] = Field(default_factory=dict)
    instruction_from_file_name: bool = False
    proprioception: list[str] = Field(default_factory=list)
    flip: Literal["auto", "none", "vertical", "rotate_180"] = "auto"
    observations: Literal["as_stored", "after"] = "as_stored"
    filter_key: str = ""
    rate_hz: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class _File:
    """What is the same for all demonstrations of one file. `rate_hz` is None where it states none."""

    file: Path
    flip: str
    rate_hz: float | None
    depth: bool


@dataclass(frozen=True)
class _Demo:
    """One demonstration without its pictures. `steps`: rows as stored; `state`: width of `states`, 0 without."""

    file: int
    name: str
    steps: int
    cameras: tuple[tuple[str, str], ...]
    proprioception: tuple[str, ...]
    state: int
    sentence: str
    held_out: bool | None = None


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

    def __init__(self, path: Path, options: Options) -> None:
        """See `open_source`."""
        self.path, self.options = Path(path), options
        files = hdf5_files(self.path)
        if not files:
            raise FileError(f"{self.path}: no .hdf5 file in it")
        check_named(self.path, options.instructions, (file.stem for file in files))
        self.notes: list[str] = []
        self._files: list[_File] = []
        self._demos: list[_Demo] = []
        for file in files:
            with Hdf5File(file, "robomimic") as data:
                self._scan(file, data)
        if not self._demos:
            raise FileError(f"{self.path}: mask/{options.filter_key} lists no demonstration")
        first = self._demos[0]
        for demo in self._demos:
            where, there = self._where(demo), self._where(first)
            if [camera for camera, _ in demo.cameras] != [camera for camera, _ in first.cameras]:
                names = ", ".join(camera for camera, _ in demo.cameras)
                raise ContractError(f"{where}: cameras {names}, but {', '.join(c for c, _ in first.cameras)} in {there}")
            if demo.proprioception != first.proprioception:
                raise ContractError(
                    f"{where}: proprioception of {', '.join(demo.proprioception) or 'nothing'}, but of "
                    f"{', '.join(first.proprioception) or 'nothing'} in {there}; set convert.options.proprioception"
                )
        self._keep_state = first.state > 0 and all(demo.state == first.state for demo in self._demos)
        self._rate = self._one_rate()
        self._note(first)

    def _where(self, demo: _Demo) -> str:
        return f"{self._files[demo.file].file}: data/{demo.name}"

    def _one_rate(self) -> float:
        if self.options.rate_hz is not None:
            return self.options.rate_hz
        first = self._files[0]
        for file in self._files:
            if file.rate_hz != first.rate_hz:
                raise ContractError(
                    f"{file.file}: control_freq is {file.rate_hz}, but {first.rate_hz} in {first.file}; "
                    "set convert.options.rate_hz"
                )
        if first.rate_hz is None:
            self.notes.append(f"{self.path}: no control_freq in env_args: robosuite's {_ROBOSUITE_RATE:g} Hz are assumed")
        return first.rate_hz or _ROBOSUITE_RATE

    def _note(self, first: _Demo) -> None:
        if any(file.depth for file in self._files):
            self.notes.append(f"{self.path}: obs/*_depth is left out")
        if not first.proprioception:
            self.notes.append(
                f"{self.path}: no proprioception: none of the default keys is in obs; name some in convert.options"
            )
        if not self._keep_state and any(demo.state for demo in self._demos):
            self.notes.append(f"{self.path}: states, the simulator's own, is left out: it is not equally wide in all files")
        turned = [file for file in self._files if file.flip != "none"]
        if turned and self.options.flip == "auto":
            self.notes.append(f"{self.path}: pictures of {len(turned)} files are stored upside down and are flipped vertically")
        if self.options.observations == "as_stored" and any(key.endswith("_rgb") for _, key in first.cameras):
            self.notes.append(
                f"{self.path}: LIBERO's own files pair each action with the picture after it, and are read as stored; "
                "convert.options.observations 'after' pairs it with the picture before it"
            )

    def _scan(self, file: Path, data: Hdf5File) -> None:
        """Append what one file holds to `_files` and `_demos`."""
        if not data.is_group("data"):
            other = "; convert.source 'aloha' reads its layout" if data.is_group("observations") else ""
            raise FileError(f"{file}: no group data, which robomimic's layout has{other}")
        names = [name for name in data.names("data") if data.is_group(f"data/{name}")]
        if not names:
            raise FileError(f"{file}: no demonstration in data")
        split = {key: set(data.texts(f"mask/{key}")) for key in ("train", "valid") if data.is_dataset(f"mask/{key}")}
        train, valid = split.get("train", set()), split.get("valid", set())
        if train & valid:
            raise FileError(f"{file}: {min(train & valid)} is in mask/train and in mask/valid, expected one of them")
        if absent := sorted((train | valid) - set(names)):
            self.notes.append(f"{file}: mask lists {len(absent)} demonstrations that are not there, the first is {absent[0]!r}")
        chosen = names
        if self.options.filter_key:
            if not data.is_dataset(f"mask/{self.options.filter_key}"):
                keys = ", ".join(data.names("mask")) or "none"
                raise FileError(
                    f"{file}: no mask/{self.options.filter_key}, which convert.options.filter_key names; it has {keys}"
                )
            listed = set(data.texts(f"mask/{self.options.filter_key}"))
            chosen = [name for name in names if name in listed]
        demos = [self._demo(file, data, name) for name in chosen]
        if split and (neither := [name for name in chosen if name not in train | valid]):
            self.notes.append(
                f"{file}: {len(neither)} demonstrations are in no mask, the first is {neither[0]}; they are split anew"
            )
        self._demos += [
            replace(demo, held_out=(demo.name in valid) if demo.name in train | valid else None) for demo in demos
        ]  # fmt: skip
        flip: str = self.options.flip
        if flip == "auto":
            convention = data.text_attribute("data", "macros_image_convention")
            named = any(key.endswith("_rgb") for demo in demos for _, key in demo.cameras)
            flip = "vertical" if convention == "opengl" or (convention is None and named) else "none"
        depth = any(key.endswith("_depth") for name in chosen[:1] for key in data.names(f"data/{name}/obs"))
        self._files.append(_File(file, flip, _control_rate(data), depth))

    def _demo(self, file: Path, data: Hdf5File, name: str) -> _Demo:
        where = f"data/{name}"
        shape, _ = data.layout(f"{where}/actions")
        if len(shape) != 2 or shape[0] == 0:
            raise FileError(f"{file}: {where}/actions is {shape}, expected (steps, dimensions) with at least one step")
        samples = data.attribute(where, "num_samples")
        if isinstance(samples, (int, np.integer)) and samples != shape[0]:
            raise FileError(f"{file}: {where} has num_samples {samples}, but {shape[0]} actions")
        if self.options.observations == "after" and shape[0] < 2:
            raise FileError(f"{file}: {where} has 1 step, and convert.options.observations 'after' needs 2")
        keys = data.names(f"{where}/obs")
        cameras = {key.removesuffix(end): key for end in _ENDINGS for key in keys if key.endswith(end)}
        if len(cameras) != sum(key.endswith(_ENDINGS) for key in keys):
            cameras = {key: key for key in keys if key.endswith(_ENDINGS)}
        if not cameras:
            has = "states" if data.is_dataset(f"{where}/states") else "observations" if keys else "actions"
            raise FileError(
                f"{file}: {where} has {has} but no pictures (obs/<camera>_image or obs/<camera>_rgb): render them first, for "
                "example with robomimic's dataset_states_to_obs.py (for robosuite's own files, convert_robosuite.py before it)"
            )
        for key in cameras.values():
            found, dtype = data.layout(f"{where}/obs/{key}")
            if picture_shape(file, f"{where}/obs/{key}", found, dtype)[0] != shape[0]:
                raise ContractError(f"{file}: {where}/obs/{key} has {found[0]} pictures, but actions has {shape[0]} steps")
        states = data.layout(f"{where}/states")[0] if data.is_dataset(f"{where}/states") else (0, 0)
        return _Demo(
            file=len(self._files), name=name, steps=shape[0], cameras=tuple(sorted(cameras.items())),
            proprioception=self._proprioception(file, where, keys), state=states[1] if len(states) == 2 else 0,
            sentence=self._instruction(file, data, where),
        )  # fmt: skip

    def _proprioception(self, file: Path, where: str, keys: list[str]) -> tuple[str, ...]:
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
        said = self.options.instructions.get(file.stem, self.options.instruction).strip()
        sentence = (
            said
            or _sentence(data, where, where, "ep_meta", "lang")
            or _sentence(data, "data", "data", "problem_info", "language_instruction")
            or (_from_file_name(file) if self.options.instruction_from_file_name else "")
        )
        if not sentence:
            raise FileError(
                f"{file}: no instruction in it (language_instruction in the attribute problem_info of data); set "
                f"convert.options.instruction, or convert.options.instructions with the key {file.stem!r}"
            )
        return sentence

    def describe(self) -> SourceDescription:
        """Rate, cameras and instructions; a task is named by its sentence."""
        return SourceDescription(
            rate_hz=self._rate, cameras=[camera for camera, _ in self._demos[0].cameras],
            instructions={demo.sentence: {"train": [demo.sentence], "held_out": []} for demo in self._demos},
            provenance={
                "source": "robomimic", "options": self.options.model_dump(),
                "files": [self._relative(known.file) for known in self._files],
            },
        )  # fmt: skip

    def _relative(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix() if self.path.is_dir() else file.name

    def __len__(self) -> int:
        return len(self._demos)

    def _late(self) -> int:
        """By how many steps observations are late."""
        return 1 if self.options.observations == "after" else 0

    def shape(self, index: int) -> EpisodeShape:
        """Length and split of one episode."""
        demo = self._demos[index]
        return EpisodeShape(demo.steps - self._late(), held_out=demo.held_out, stamp=stamp(self._files[demo.file].file))

    def _blocks(self, file: _File, name: str, shape: tuple[int, int, int, int]) -> Iterator[NDArray[np.uint8]]:
        """The frames of one camera, upright; `shape` is the one to give, which may be shorter than the stored one."""
        left = shape[0]
        with Hdf5File(file.file, "robomimic") as data:
            for block in data.blocks(name, shape[1] * shape[2] * 3):
                upright = {"vertical": block[:, ::-1], "rotate_180": block[:, ::-1, ::-1]}.get(file.flip, block)[:left]
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
        demo = self._demos[index]
        known = self._files[demo.file]
        file, where, late = known.file, f"data/{demo.name}", self._late()
        with Hdf5File(file, "robomimic") as data:

            def vector(name: str, skip: int, keep: int) -> NDArray[np.float32]:
                values = data.matrix(f"{where}/{name}")
                if len(values) != demo.steps:
                    raise ContractError(f"{file}: {where}/{name} has {len(values)} steps, but actions has {demo.steps}")
                return values[skip:keep]

            steps = demo.steps - late
            # What was observed is late by one step under observations "after"; actions and simulator states are not.
            actions = vector("actions", late, demo.steps)
            state = vector("states", late, demo.steps) if self._keep_state else None
            columns = [vector(f"obs/{key}", 0, steps) for key in demo.proprioception]
            frames = {}
            for camera, key in demo.cameras:
                _, height, width, channels = picture_shape(file, f"{where}/obs/{key}", *data.layout(f"{where}/obs/{key}"))
                frames[camera] = self._frames(known, f"{where}/obs/{key}", (steps, height, width, channels))
        episode = Episode(
            task=demo.sentence, instruction=demo.sentence, rate_hz=self._rate, frames=frames, actions=actions, state=state,
            proprioception=np.hstack(columns) if columns else None,
            provenance={"file": self._relative(file), "demo": demo.name},
        )  # fmt: skip
        try:
            episode.check()
        except ContractError as error:
            raise ContractError(f"{file}: {demo.name}: {error}") from None
        return episode

    def _frames(self, file: _File, name: str, shape: tuple[int, int, int, int]) -> FrameBlocks:
        return FrameBlocks(shape, lambda: self._blocks(file, name, shape))


def open_source(path: Path, options: Options, choice: Choice = EVERYTHING) -> RobomimicSource:
    """Open a file, or a folder of files that are a task each; what every demonstration holds is looked up.

    Raises:
        FileError: no files, or one is damaged, has no pictures or no instruction.
        ContractError: two demonstrations differ in cameras or proprioception, two files in rate.
        MachineError: h5py is not installed.
    """
    return RobomimicSource(path, options)
