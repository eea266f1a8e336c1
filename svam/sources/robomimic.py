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
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svam.contract import EVERYTHING, Choice, Frozen
from svam.files import FileError
from svam.sources._hdf5 import Hdf5File, Hdf5Source, Recording, Size, hdf5_files, text_of
from svam.sources._pictures import picture_array

_ENDINGS = ("_image", "_rgb")
_LIBERO = {"obs/agentview_rgb", "obs/eye_in_hand_rgb"}
_PROPRIOCEPTION = (
    ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"),
    ("ee_states", "gripper_states"),
)


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


@dataclass(frozen=True, kw_only=True)
class _Demo(Recording):
    """`state`: width of `states`, 0 without; `proprioception`: keys in `obs`; `depth`: whether there is any."""

    flip: str
    proprioception: list[str]
    state: int
    depth: bool


def _json_value(data: Hdf5File, name: str, key: str, *fields: str) -> Any:
    """A value in a JSON attribute, None where there is none."""
    try:
        value = json.loads(data.text_attribute(name, key) or "null")
    except (ValueError, RecursionError) as error:
        raise FileError(f"{data.file}: attribute {key!r} of {name} is not valid JSON ({error})") from None
    for field in fields:
        value = value.get(field) if isinstance(value, dict) else None
    return value


def _control_rate(data: Hdf5File) -> float | None:
    rate = _json_value(data, "data", "env_args", "env_kwargs", "control_freq")
    if rate is not None and (not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate < 1e6):
        raise FileError(f"{data.file}: control_freq in attribute 'env_args' of data is {rate!r:.40}, expected steps per second")
    return None if rate is None else float(rate)


def _sentence(data: Hdf5File, holder: str, key: str, field: str) -> str:
    """A sentence in a JSON attribute: a string, or LIBERO's list of words; "" without."""
    value = _json_value(data, holder, key, field)
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        value = " ".join(value)
    where = f"{data.file}: {field} in attribute {key!r} of {holder}"
    text = text_of(value or "", where)
    if text is None:
        raise FileError(f"{where} is {value!r:.60}, expected a sentence")
    return text.strip('" ')


def _from_file_name(file: Path) -> str:
    """`KITCHEN_SCENE1_open_the_drawer_demo` -> "open the drawer"."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", file.stem.removesuffix("_demo")).replace("_", " ").strip()


class RobomimicSource(Hdf5Source[_Demo]):
    """Demonstrations file by file, then by number."""

    source = "robomimic"
    prefix = "obs/"
    usual_rate = (20.0, "no control_freq is in env_args, and robosuite's 20 Hz are assumed")
    remedies = {"proprioception": "set convert.options.proprioception", "control_freq": "set convert.rate_hz"}

    def __init__(self, path: Path, options: Options, choice: Choice) -> None:
        """See `open_source`."""
        self._late = int(options.observations == "after")
        super().__init__(path, options, choice, hdf5_files(path))
        demos = self._readable
        widths = {demo.state for demo in demos}
        self._keep_state = len(widths) == 1 and 0 not in widths
        self._note({demo.cameras[name][0] for demo in demos for name in self._cameras if name in demo.cameras})

    def _note(self, datasets: set[str]) -> None:
        flip, turned = self.options.flip, {demo.file for demo in self._readable if demo.flip != "none"}
        notes = {
            "obs/*_depth is left out": any(demo.depth for demo in self._readable),
            "no proprioception: none of the default keys is in obs; name some in convert.options": (
                self._alike["proprioception"] == "nothing"
            ),
            "states, the simulator's own, is left out: it is not equally wide in all files": (
                not self._keep_state and any(demo.state for demo in self._readable)
            ),
            f"pictures of {len(turned)} files are flipped vertically: their macros_image_convention, or LIBERO's names of "
            "cameras, say that they are upside down; convert.options.flip: none leaves them as stored": (
                flip == "auto" and bool(turned)
            ),
            "pictures are read as stored, since nothing says that they are upside down, as LIBERO's are; look at one episode, "
            "and set convert.options.flip: vertical if they are": (
                flip == "auto" and not turned and any(name.endswith("_rgb") for name in datasets)
            ),
            "LIBERO's own files pair each action with the picture after it, and are read as stored; "
            "convert.options.observations 'after' pairs it with the picture before it": (
                not self._late and not datasets.isdisjoint(_LIBERO)
            ),
        }
        self.notes += [f"{self.path}: {note}" for note, holds in notes.items() if holds]

    def _key(self, file: Path) -> str:
        return file.stem

    def _scan(self, data: Hdf5File) -> dict[str, bool | None]:
        names = [name for name in data.names("data") if not data.is_dataset(f"data/{name}")]
        if not names:
            raise FileError(f"{data.file}: no group data of demonstrations, robomimic's layout; it has {data.listed('/')}")
        train, valid = (set(data.texts(f"mask/{key}") if data.is_dataset(f"mask/{key}") else ()) for key in ("train", "valid"))
        if train & valid:
            raise FileError(f"{data.file}: {min(train & valid)} is in mask/train and in mask/valid, expected one of them")
        if absent := sorted((train | valid) - set(names)):
            self.notes.append(
                f"{data.file}: mask lists {len(absent)} demonstrations that are not there, the first is {absent[0]!r}"
            )
        if key := self.options.filter_key:
            if not data.is_dataset(f"mask/{key}"):
                keys = ", ".join(data.names("mask")) or "none"
                raise FileError(f"{data.file}: no mask/{key}, which convert.options.filter_key names; it has {keys}")
            listed = set(data.texts(f"mask/{key}"))
            names = [name for name in names if name in listed]
        if (train or valid) and (neither := [name for name in names if name not in train | valid]):
            self.notes.append(
                f"{data.file}: {len(neither)} demonstrations are in no mask, the first is {neither[0]}; they are trained on"
            )
        return {f"data/{name}/": name in valid if name in train | valid else None for name in names}

    def _header(self, data: Hdf5File, place: str, held_out: bool | None) -> _Demo:
        steps, _ = data.vector(f"{place}actions")
        if steps <= self._late:
            raise FileError(f"{data.file}: {place} has 1 step, and convert.options.observations 'after' needs 2")
        keys, name = data.names(f"{place}obs"), place.split("/")[1]
        cameras, notes = self._camera_datasets(data, place, keys, steps)
        flip: str = self.options.flip
        if flip == "auto":
            convention = data.text_attribute("data", "macros_image_convention")
            libero = {dataset for dataset, _ in cameras.values()} <= _LIBERO
            flip = "vertical" if convention == "opengl" or (convention is None and libero) else "none"
        proprioception = self._proprioception(data, place, keys)
        for key in proprioception:
            data.vector(f"{place}obs/{key}", steps)
        alike: dict[str, Any] = {"proprioception": ", ".join(proprioception) or "nothing"}
        success = data.attribute(place, "success")
        return _Demo(
            file=data.file, place=place, steps=steps - self._late, cameras=cameras, notes=notes,
            name="/".join([*self._relative(data.file).with_suffix("").parts, name] if self.path.is_dir() else [name]),
            sentences=self._sentences(data.file, f"{data.file}: {place.rstrip('/')}", lambda: self._own_sentence(data, place)),
            alike=alike if self._choice.rate_hz else alike | {"control_freq": _control_rate(data)}, facts={"demo": name},
            held_out=held_out, success=bool(success) if isinstance(success, bool | np.bool_ | int | np.integer) else None,
            flip=flip, proprioception=proprioception, depth=any(key.endswith("_depth") for key in keys),
            state=data.vector(f"{place}states", steps)[1] if data.is_dataset(f"{place}states") else 0,
        )  # fmt: skip

    def _camera_datasets(
        self, data: Hdf5File, place: str, keys: list[str], steps: int
    ) -> tuple[dict[str, tuple[str, Size]], list[str]]:
        """The cameras of a demonstration (those of `convert.cameras`), and notes on how their pictures are stored."""
        cameras: dict[str, tuple[str, Size]] = {}
        others, notes = [], list[str]()
        for key in keys:
            name, dataset = key.removesuffix("_image").removesuffix("_rgb"), f"{place}obs/{key}"
            name = key if name in cameras else name
            holds = picture_array(*data.layout(dataset)) if data.is_dataset(dataset) else None
            by_name = key.endswith(_ENDINGS)
            if not self._asked_for(key, name):
                others += [name] if holds else []
            elif by_name or self._choice.cameras or (holds and holds.dtype == np.uint8):
                pictures = data.pictures(dataset, steps)
                cameras[name] = f"obs/{key}", (steps - self._late, *pictures.shape[1:])
                notes += pictures.notes(f"{self.path}: obs/{key}")
        if not cameras and self._choice.cameras:
            there = ", ".join(others) or "none"
            raise FileError(f"{data.file}: {place}obs has no camera of convert.cameras; it has {there}")
        if not cameras:
            has = "states" if data.is_dataset(f"{place}states") else "observations" if keys else "actions"
            there = f"; obs has {data.listed(f'{place}obs')}" if keys else ""
            raise FileError(
                f"{data.file}: {place.rstrip('/')} has {has} but no pictures, uint8 (n, H, W, 3) in obs{there}; render them "
                "first, for example with robomimic's dataset_states_to_obs.py (for robosuite's own files, "
                "convert_robosuite.py before it)"
            )
        return dict(sorted(cameras.items())), notes

    def _proprioception(self, data: Hdf5File, place: str, keys: list[str]) -> list[str]:
        asked: list[str] = self.options.proprioception
        if absent := [key for key in asked if key not in keys]:
            raise FileError(
                f"{data.file}: {place}obs has no {absent[0]!r}, which convert.options.proprioception names; it has {keys}"
            )
        group = next((group for group in _PROPRIOCEPTION if set(group) <= set(keys)), ())
        second = [key.replace("robot0", "robot1") for key in group if "robot0" in key]
        return asked or [*group, *(second if set(second) <= set(keys) else ())]

    def _own_sentence(self, data: Hdf5File, place: str) -> list[str]:
        return [
            _sentence(data, place.rstrip("/"), "ep_meta", "lang")
            or _sentence(data, "data", "problem_info", "language_instruction")
            or (_from_file_name(data.file) if self.options.instruction_from_file_name else "")
        ]

    def _blocks(self, recording: _Demo, dataset: str) -> Iterator[NDArray[np.uint8]]:
        left = recording.steps
        with Hdf5File(recording.file, self.source) as data:
            for block in data.picture_blocks(dataset):
                upright = {"vertical": block[:, ::-1], "rotate_180": block[:, ::-1, ::-1]}.get(recording.flip, block)[:left]
                left -= len(upright)
                if len(upright):
                    yield np.ascontiguousarray(upright)

    def _vectors(self, recording: _Demo, data: Hdf5File) -> dict[str, NDArray[np.float32]]:
        # What was observed is late by one step under observations "after"; actions and simulator states are not.
        names = {"actions": "actions"} | ({"state": "states"} if self._keep_state else {})
        vectors = {name: data.matrix(f"{recording.place}{dataset}")[self._late :] for name, dataset in names.items()}
        if recording.proprioception:
            parts = [data.matrix(f"{recording.place}obs/{key}")[: recording.steps] for key in recording.proprioception]
            vectors["proprioception"] = np.hstack(parts)
        return vectors


def open_source(path: Path, options: Options, choice: Choice = EVERYTHING) -> RobomimicSource:
    """Open a file, or a folder of files that are a task each; what every demonstration holds is looked up.

    Raises:
        FileError: no files, or none of their demonstrations can be read.
        ParamsError: `choice` names a camera that no demonstration has.
        MachineError: h5py is not installed.
    """
    return RobomimicSource(Path(path), options, choice)
