"""What `convert.options` says about an RLDS data set, and which of its features become cameras, vectors and instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from svam.contract import Choice, Frozen
from svam.errors import ParamsError
from svam.files import FileError
from svam.sources._choice import chosen_cameras
from svam.sources._pictures import LEAVE_OUT, depth_doubts
from svam.sources._tfds import Feature

_INSTRUCTIONS = (
    "language_instruction", "natural_language_instruction", "observation/natural_language_instruction",
    "observation/language_instruction", "observation/instruction", "instruction",
)  # fmt: skip
_PROPRIOCEPTION = ("observation/state", "observation/proprio", "observation/proprioception", "observation/robot_state")
_SUCCESS = "episode_metadata/success"


class Options(Frozen):
    """`convert.options` of this source. Features are named as in `features.json`, without the leading `steps/`.

    version: which of several data sets in the folder, for example "1.0.0" or "<name>/1.0.0".
    splits: splits to read. held_out_splits: those that are held out from training; they need not be in `splits` too. When
        empty, `convert.held_out` draws a share.
    missing_shards: "leave_out" reads what is there of a partial download.
    action, proprioception, state: names of the numeric features that are joined in this order. Null chooses `action`, and
        `observation/state` or `observation/proprio` for the proprioception; an empty list means none.
    instruction_key: the feature with the instruction; empty chooses the first known name that is there.
    without_instruction: "leave_out" leaves out episodes without an instruction.
    changing_instruction: "first" takes an episode's first non-empty instruction where its steps have several; empty ones do
        not count. convert.segments: true cuts the episode instead.
    paraphrases: the sentences of `<instruction>_2` and `_3`, which DROID has, are further ones of the episode; else they only
        replace an empty one.
    last_step: "keep" keeps the step that `is_last` marks, for data sets that record a valid action there.
    """

    version: str = ""
    splits: list[str] = Field(["train"], min_length=1)
    held_out_splits: list[str] = Field([])
    missing_shards: Literal["refuse", "leave_out"] = "refuse"
    action: list[str] | None = None
    proprioception: list[str] | None = None
    state: list[str] = Field([])
    instruction_key: str = ""
    without_instruction: Literal["refuse", "leave_out"] = "refuse"
    changing_instruction: Literal["refuse", "first"] = "refuse"
    paraphrases: bool = False
    last_step: Literal["drop", "keep"] = "drop"


@dataclass(frozen=True)
class Chosen:
    """Full names of the features that are used.

    cameras: camera -> feature. action, proprioception, state: features to join, none where there is no such vector.
    instructions: the feature with the sentence, and those that replace it where it is empty. is_last, success: "" where none is
    used. counter: the feature whose length gives the number of steps.
    """

    cameras: Mapping[str, str]
    action: Sequence[str]
    proprioception: Sequence[str]
    state: Sequence[str]
    instructions: Sequence[str]
    is_last: str
    success: str
    counter: str
    notes: Sequence[str]

    @property
    def read(self) -> list[str]:
        """What every record must have."""
        return [*self.cameras.values(), *self.action, *self.proprioception, *self.state]


def choose(features: Mapping[str, Feature], options: Options, choice: Choice, file: Path) -> Chosen:
    """Which features of `file`, a `features.json`, become what."""
    notes: list[str] = []
    cameras = _cameras(features, choice, file, notes)
    numeric = {name.removeprefix("steps/"): f for name, f in features.items() if name.startswith("steps/") and f.size}
    there = ", ".join(f"{name} ({feature.size})" for name, feature in numeric.items()) or "none"

    def vector(option: str, named: Sequence[str] | None, known: Sequence[str]) -> list[str]:
        """The features to join; none where there is no such vector."""
        if named is None:
            named = [name for name in known if name in numeric][:1]
            if not named and option == "action":
                raise ParamsError(
                    f"convert.options.action: {file} has no numeric feature 'action' of fixed shape; list some to join, or [] "
                    f"for none: {there}"
                )
            if not named:
                notes.append(f"no {option}: none of {', '.join(known)}; convert.options.{option} can list some of: {there}")
        named = [name.removeprefix("steps/") for name in named]
        if wrong := [name for name in named if name not in numeric]:
            raise ParamsError(
                f"convert.options.{option} names {wrong[0]!r}, which is {features.get(f'steps/{wrong[0]}', 'not there')}, "
                f"expected a numeric tensor of fixed shape, such as: {there}"
            )
        return [f"steps/{name}" for name in named]

    action = vector("action", options.action, ("action",))
    proprioception = vector("proprioception", options.proprioception, _PROPRIOCEPTION)
    state = vector("state", options.state, ())
    instructions = _instructions(features, options.instruction_key, choice, file)
    is_last = "steps/is_last" if "steps/is_last" in features and options.last_step == "drop" else ""
    if is_last and features[is_last].size != 1:
        raise FileError(f"{file}: steps/is_last is {features[is_last]}, expected a scalar")
    success = _SUCCESS if _SUCCESS in features and features[_SUCCESS].size == 1 else ""
    smallest = [f"steps/{name}" for name in sorted(numeric, key=lambda name: (numeric[name].size, name))]
    texts = [name for name in instructions if name.startswith("steps/")]
    counter = is_last or [*smallest, *texts, *cameras.values()][0]  # a scan reads it: the smaller, the better
    return Chosen(cameras, action, proprioception, state, instructions, is_last, success, counter, notes)


def _cameras(features: Mapping[str, Feature], choice: Choice, file: Path, notes: list[str]) -> dict[str, str]:
    """Camera -> feature, sorted by name, or as `convert.cameras` says, which may name a camera or its feature."""
    cameras: dict[str, str] = {}
    twice: dict[str, str] = {}
    left_out = []
    for name, feature in sorted(features.items()):
        camera = name.removeprefix("steps/observation/").replace("/", "_")
        inside = name.startswith("steps/observation/")
        if "image" not in feature.kind and not feature.colour and not (inside and len(feature.shape) == 3):
            continue
        named = any(asked in (camera, name) or name.endswith(f"/{asked}") for asked in choice.cameras)
        if not (feature.colour or (feature.grey and named)) or not inside:
            left_out.append(
                f"{name} ({feature}) is no 8-bit RGB picture of known size under steps/observation: left out"
                + "; convert.cameras may name it" * (feature.grey and inside)
            )
        elif camera in cameras:
            twice[camera] = name
        else:
            cameras[camera] = name
    if not cameras:
        there = "; ".join(left_out) or f"it has {', '.join(features)[:200]}"
        raise FileError(f"{file}: no RGB image under steps/observation ({there})")
    notes += [] if choice.cameras else [*left_out, *depth_doubts(cameras.values())]
    forms = {name.removeprefix(prefix): c for c, name in cameras.items() for prefix in ("", "steps/", "steps/observation/")}
    chosen = chosen_cameras(choice, list(cameras), file, forms=forms)
    if both := [camera for camera in chosen if camera in twice]:
        names = f"{cameras[both[0]]} and {twice[both[0]]}"
        raise FileError(f"{file}: {names} both give the camera {both[0]!r}; {LEAVE_OUT}")
    return {camera: cameras[camera] for camera in chosen}


def _instructions(features: Mapping[str, Feature], key: str, choice: Choice, file: Path) -> list[str]:
    """The feature with the sentence, then those that DROID has beside it, `<name>_2` and `<name>_3`."""

    def usable(name: str) -> bool:
        feature = features.get(name, Feature("other"))
        return feature.kind == "text" or (feature.size > 0 and "int" in feature.dtype and len(feature.shape) == 1)

    for name in [f"steps/{key}", key] if key else [f"steps/{known}" for known in _INSTRUCTIONS]:
        if usable(name):
            return [name, *(other for other in (f"{name}_2", f"{name}_3") if usable(other))]
    if choice.instruction or (not key and choice.missing_instruction):
        return []
    there = [name.removeprefix("steps/") for name, feature in features.items() if feature.kind == "text"]
    wrong = f"convert.options.instruction_key is {key!r}, which is no text" if key else "no instruction under a known name"
    raise ParamsError(
        f"{file}: {wrong}; set convert.instruction, or convert.options.instruction_key to one of: {', '.join(there) or 'none'}"
    )
