"""robomimic, LIBERO and Isaac Lab: HDF5 files with one demonstration per group `data/demo_<number>`, usually one task a file.

`convert.path` is such a file, or a folder whose .hdf5 and .h5 files, sub-folders included, are read as several tasks.
From each demonstration:

- `actions` (n, A), and as cameras all pictures in `obs`: `<camera>_image` (robomimic), `<camera>_rgb` (LIBERO: agentview,
  eye_in_hand) or any other uint8 (n, H, W, 3) (Isaac Lab: table_cam; also with alpha, or channels first), in the order of
  names; and those in `camera_obs` beside it (Isaac Lab Arena). A camera is named without those endings; `convert.cameras`
  takes both forms. Others, such as depth, are left out, with a note.
- Proprioception, of the keys in `Options`. State: `states` (n, S), the simulator's own, where it is equally wide in all files.
- The attribute `success` of a demonstration, where it is there, for `convert.success`.

Numbers are cast to float32. Demonstrations come in the order of their numbers, files in that of their names. `mask/train` and
`mask/valid` (or val, validation, test), lists of demonstrations, become the split. Files with states alone are refused: their
pictures must be rendered.
The rate is `control_freq` of the attribute `env_args`, or that of its `sim_args` (Isaac Lab: `decimation` steps of `dt`
seconds), or the attribute `fps`, or else robosuite's 20, with a note; `convert.rate_hz` overrides it.

Alignment: row t of `actions` goes with row t of `obs`, as stored; nothing is shifted. In robomimic's files observation t is
what was seen before action t. LIBERO's own `create_dataset.py` stores what was seen after action t beside it, and everyone
trains on it like that; `observations: after` puts picture t and action t + 1 together instead, one step fewer per episode.

Pictures: LIBERO's are stored as OpenGL renders them, upside down (`macros_image_convention` is "opengl"), and robomimic's
upright. `flip: auto` turns those of a file with this attribute, or of a file without it that has no pictures but LIBERO's
two (whichever are chosen), by a vertical flip, which is the true correction; all others stay as stored. Models that follow
OpenVLA have seen LIBERO's rotated by 180 degrees, so mirrored too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from svam.contract import EVERYTHING, Choice, Frozen
from svam.files import FileError
from svam.sources._hdf5 import HELD_OUT, Hdf5File, Hdf5Source, Recording, Size, hdf5_files, text_of
from svam.sources._pictures import named_pictures, picture_array

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
    steps = [_json_value(data, "data", "env_args", "sim_args", key) for key in ("dt", "decimation")]
    if rate is None and all(isinstance(value, int | float) and 0 < value < 1e6 for value in steps):
        rate = round(1 / (steps[0] * steps[1]), 6)
    if rate is None and isinstance(fps := data.attribute("data", "fps"), np.integer | np.floating) and 0 < fps < 1e6:
        rate = fps
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


class RobomimicSource(Hdf5Source):
    """Demonstrations file by file, then by number."""

    source_name = "robomimic"
    prefix = "obs/"
    usual_rate = (20.0, "no control_freq is in env_args, and robosuite's 20 Hz are assumed")
    remedies = {"proprioception": "set convert.options.proprioception", "control_freq": "set convert.rate_hz"}

    def __init__(self, path: Path, options: Options, choice: Choice = EVERYTHING) -> None:
        """Open a file, or a folder of files that are a task each; what every demonstration holds is looked up.

        Raises:
            FileError: no files, or none of their demonstrations can be read.
            ParamsError: `choice` names a camera that no demonstration has.
            MachineError: h5py is not installed.
        """
        self._late, self._state_widths = int(options.observations == "after"), set[int]()
        super().__init__(path, options, choice, hdf5_files(path))
        demos = self._readable
        if (free := [demo for demo in demos if demo.held_out is None]) and any(demo.held_out for demo in demos):
            self._note(f"{len(free)} demonstrations are in no mask of the split, the first is {free[0]}; they are trained on")
        files = {demo.file for demo in demos}
        if 0 < (failed := sum(file.stem.endswith("_failed") for file in files)) < len(files):
            named = f"{failed} of {len(files)} files are named *_failed, where MimicGen and Isaac Lab put what failed"
            self._note(f"{named}; convert.drop leaves them out, or one file's name in convert.path")
        if self._alike["proprioception"] == "nothing":
            self._note("no proprioception: none of the default keys is in obs; name some in convert.options")
        if len(self._state_widths) > 1:
            self._note("states, the simulator's own, is left out: it is not equally wide in all files")
            for demo in demos:
                demo.vectors["state"] = []
        datasets = {demo.cameras[name][0] for demo in demos for name in self._cameras if name in demo.cameras}
        turned = {demo.file for demo in demos if demo.flip != "none"}
        if options.flip == "auto" and turned:
            self._note(
                f"pictures of {len(turned)} of {len(files)} files are flipped vertically: their "
                "macros_image_convention, or LIBERO's names of cameras, say that they are upside down; "
                "convert.options.flip: none leaves them as stored"
            )
        elif options.flip == "auto" and any(name.endswith("_rgb") for name in datasets):
            self._note(
                "pictures are read as stored, since nothing says that they are upside down, as LIBERO's are; look at one "
                "episode, and set convert.options.flip: vertical if they are"
            )
        if not self._late and not datasets.isdisjoint(_LIBERO):
            self._note(
                "LIBERO's own files pair each action with the picture after it, and are read as stored; "
                "convert.options.observations 'after' pairs it with the picture before it"
            )

    def _key(self, file: Path) -> str:
        return file.stem

    def _scan(self, data: Hdf5File) -> dict[str, bool | None]:
        names = [name for name in data.names("data") if not data.is_dataset(f"data/{name}")]
        if not names:
            raise FileError(f"{data.file}: no group data of demonstrations, robomimic's layout; it has {data.listed('/')}")
        chosen = self.options.filter_key
        keys = [key for key in dict.fromkeys(["train", *HELD_OUT, chosen]) if key and data.is_dataset(f"mask/{key}")]
        masks = {key: {text.removeprefix("data/") for text in data.texts(f"mask/{key}")} for key in keys}
        for key in [key for key in keys if not masks[key] and 0 not in data.layout(f"mask/{key}")[0]]:
            self.notes.append(f"{data.file}: mask/{key} holds no names of demonstrations, and is not used")
        train, valid = masks.get("train", set()), set[str]().union(*(masks.get(key, ()) for key in HELD_OUT))
        if both := sorted(train & valid):
            self.notes.append(f"{data.file}: {len(both)} are in mask/train and one that holds out: held out, such as {both[0]}")
        if absent := sorted(set().union(*masks.values()) - set(names)):
            self.notes.append(f"{data.file}: mask lists {len(absent)} demonstrations that are not there, such as {absent[0]!r}")
        if chosen:
            if chosen not in masks:
                there = ", ".join(data.names("mask")) or "none"
                raise FileError(f"{data.file}: no mask/{chosen}, which convert.options.filter_key names; it has {there}")
            names = [name for name in names if name in masks[chosen]]
        return {f"data/{name}/": name in valid if name in train | valid else None for name in names}

    def _header(self, data: Hdf5File, place: str, held_out: bool | None) -> Recording:
        if names := data.names(f"{place}actions"):
            raise FileError(
                f"{data.file}: {place}actions is a group of {', '.join(names)}, expected one dataset: copy the one to act with "
                "to its place, or bring the set as `raw` (svam/sources/README.md)"
            )
        steps, width = data.vector(f"{place}actions")
        if not self._late and data.text_attribute("data", "obs/sample_phase") == "post_step":
            self._note(
                "the attribute obs/sample_phase says that each action is beside the picture after it, and they are read as "
                "stored; convert.options.observations 'after' pairs it with the picture before it"
            )
        if steps <= self._late:
            raise FileError(f"{data.file}: {place} has 1 step, and convert.options.observations 'after' needs 2")
        keys, name = data.names(f"{place}obs"), place.split("/")[1]
        cameras = self._cameras_of(data, place, keys, steps)
        proprioception = [f"obs/{key}" for key in self._proprioception(data, place, keys)]
        for dataset in proprioception:
            data.vector(place + dataset, steps)
        state_width = data.vector(f"{place}states", steps)[1] if data.is_dataset(f"{place}states") else 0
        flip: str = self.options.flip
        if flip == "auto":
            convention = (data.text_attribute("data", "macros_image_convention") or "").lower()
            pictures = {f"obs/{key}" for key in keys if self._is_camera(data, f"{place}obs/{key}")}
            libero = pictures | {dataset for dataset, _ in cameras.values()} <= _LIBERO  # the same, whichever are chosen
            flip = "vertical" if convention == "opengl" or (not convention and libero) else "none"
        told = ", ".join(key.removeprefix("obs/") for key in proprioception) or "nothing"
        alike: dict[str, Any] = {"proprioception": told, "actions": f"(n, {width})"}
        if not self._choice.rate_hz:
            alike["control_freq"] = _control_rate(data)
        if (said := data.attribute(place, "num_samples")) is not None and np.any(said != steps):
            self._note("num_samples of demonstrations is not the number of their actions; all of these are read")
        success = np.asarray(data.attribute(place, "success"))
        recording = Recording(
            file=data.file, place=place, steps=steps - self._late, late=self._late, cameras=cameras, flip=flip,
            vectors={"actions": ["actions"], "proprioception": proprioception, "state": ["states"] * (state_width > 0)},
            sentences=self._sentences(data, place), alike=alike, facts={"demo": name}, held_out=held_out,
            success=bool(success.item()) if success.size == 1 and success.item() in (0, 1) else None,
        )  # fmt: skip
        self._state_widths.add(state_width)
        return recording

    def _is_camera(self, data: Hdf5File, dataset: str) -> bool:
        """Whether a dataset is a camera, by its name or by what it holds."""
        if dataset.endswith(_ENDINGS) or not data.is_dataset(dataset):
            return dataset.endswith(_ENDINGS)
        try:
            shape, dtype = data.layout(dataset)
        except FileError:
            if not self._choice.cameras:
                raise
            return False  # one that `convert.cameras` leaves out may be anything
        return dtype == np.uint8 and picture_array(shape, dtype) is not None

    def _cameras_of(self, data: Hdf5File, place: str, keys: list[str], steps: int) -> dict[str, tuple[str, Size]]:
        """The cameras of a demonstration (those of `convert.cameras`)."""
        cameras: dict[str, tuple[str, Size]] = {}
        beside = [f"camera_obs/{key}" for key in data.names(f"{place}camera_obs") if key not in keys]
        for dataset in [*(f"obs/{key}" for key in keys), *beside]:
            key, place_of = dataset.partition("/")[2], place + dataset
            name = key.removesuffix("_image").removesuffix("_rgb")
            name = key if name in cameras else name
            if self._asked_for(key, name, dataset) and (self._choice.cameras or self._is_camera(data, place_of)):
                pictures = data.pictures(place_of, steps)
                cameras[name] = dataset, (steps - self._late, *pictures.shape[1:])
                self._note(*pictures.notes(dataset))
            elif not self._choice.cameras and data.is_dataset(place_of) and len((layout := data.layout(place_of))[0]) > 2:
                self._note(f"left out, as no pictures in uint8: {dataset} {layout[1]} {layout[0][1:]}")
        if not cameras and self._choice.cameras:
            raise FileError(f"{data.file}: {place}obs has no camera of convert.cameras; it has {', '.join(keys) or 'nothing'}")
        if not cameras:
            has = "states" if data.is_dataset(f"{place}states") else "observations" if keys else "actions"
            there = f"; obs has {data.listed(f'{place}obs')}" if keys else ""
            remedy = "bring the set as `raw` (svam/sources/README.md)"
            if has == "states":
                remedy = (
                    "render them first, for example with robomimic's dataset_states_to_obs.py (for robosuite's own files, "
                    "convert_robosuite.py before it)"
                )
            datasets = [name for key in keys if data.is_dataset(name := f"{place}obs/{key}")]
            if any(named_pictures(*data.layout(name)) for name in datasets):
                named = "convert.cameras can name one that is grey, or of another type with whole numbers from 0 to 255"
                remedy = f"{named}; of others, {remedy}"
            raise FileError(
                f"{data.file}: {place.rstrip('/')} has {has} but no pictures, uint8 (n, H, W, 3) in obs{there}; {remedy}"
            )
        return dict(sorted(cameras.items()))

    def _proprioception(self, data: Hdf5File, place: str, keys: list[str]) -> list[str]:
        asked: list[str] = self.options.proprioception
        if absent := [key for key in asked if key not in keys]:
            raise FileError(
                f"{data.file}: {place}obs has no {absent[0]!r}, which convert.options.proprioception names; it has {keys}"
            )
        group = next((group for group in _PROPRIOCEPTION if set(group) <= set(keys)), ())
        second = [key.replace("robot0", "robot1") for key in group if "robot0" in key]
        return asked or [*group, *(second if set(second) <= set(keys) else ())]

    def _own_sentences(self, data: Hdf5File, place: str) -> list[str]:
        told = _sentence(data, place.rstrip("/"), "ep_meta", "lang")
        told = told or _sentence(data, "data", "problem_info", "language_instruction")
        if not told and self.options.instruction_from_file_name:
            told = re.sub(r"^[A-Z_]+SCENE\d+_", "", data.file.stem.removesuffix("_demo")).replace("_", " ").strip()
        return [told]


open_source = RobomimicSource
