"""What `convert.options` says about an RLDS data set, and which of its features become cameras, vectors and instructions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from svam.contract import Frozen
from svam.errors import ParamsError
from svam.files import FileError
from svam.sources._tfds import Feature

_INSTRUCTIONS = (
    "language_instruction", "natural_language_instruction", "observation/natural_language_instruction",
    "observation/language_instruction", "observation/instruction", "instruction",
)  # fmt: skip
_PROPRIOCEPTION = ("observation/state", "observation/proprio", "observation/proprioception", "observation/robot_state")


class Options(Frozen):
    """`convert.options` of this source. Features are named as in `features.json`, without the leading `steps/`.

    rate_hz: steps per second; required, as the format does not record it.
    version: which of several data sets in the folder, for example "1.0.0" or "<name>/1.0.0".
    splits: splits to read. held_out_splits: those that are held out from training; they need not be in `splits` too. When
        empty, `convert.held_out` draws a share.
    missing_shards: "leave_out" reads what is there of a partial download.
    action, proprioception, state: names of the numeric features that are joined in this order. Null chooses `action`, and
        `observation/state` or `observation/proprio` for the proprioception; an empty list means none.
    instruction_key: the feature with the instruction; empty chooses the first known name that is there.
    instruction: the sentence for episodes without one, because the feature is missing or empty.
    without_instruction: "leave_out" leaves out episodes without an instruction.
    changing_instruction: "first" takes an episode's first non-empty instruction where its steps have several; empty ones do
        not count.
    last_step: "keep" keeps the step that `is_last` marks, for data sets that record a valid action there.
    """

    rate_hz: Annotated[float, Field(validate_default=True)] = 0.0
    version: str = ""
    splits: list[str] = Field(["train"], min_length=1)
    held_out_splits: list[str] = Field([])
    missing_shards: Literal["refuse", "leave_out"] = "refuse"
    action: list[str] | None = None
    proprioception: list[str] | None = None
    state: list[str] = Field([])
    instruction_key: str = ""
    instruction: str = ""
    without_instruction: Literal["refuse", "leave_out"] = "refuse"
    changing_instruction: Literal["refuse", "first"] = "refuse"
    last_step: Literal["drop", "keep"] = "drop"

    @field_validator("rate_hz")
    @classmethod
    def _stated(cls, value: float) -> float:
        if not 0.0 < value < math.inf:
            raise ValueError(
                f"{value:g}, expected steps per second, which RLDS does not record: for example 5 for bridge, 3 for "
                "fractal20220817_data (RT-1), 15 for droid"
            )
        return value


@dataclass(frozen=True)
class Chosen:
    """Full names of the features that are used.

    cameras: camera -> feature, sorted. action, proprioception, state: features to join, none where there is no such vector.
    instruction, is_last: "" where none is used. counter: the feature whose length gives the number of steps.
    """

    cameras: Mapping[str, str]
    action: Sequence[str]
    proprioception: Sequence[str]
    state: Sequence[str]
    instruction: str
    is_last: str
    counter: str
    notes: Sequence[str]


def choose(features: Mapping[str, Feature], options: Options, file: Path) -> Chosen:
    """Which features of `file`, a `features.json`, become what.

    Raises:
        FileError: there is no RGB image, or `is_last` is no scalar.
        ParamsError: an option names what is not there, or must name what cannot be guessed.
    """
    notes: list[str] = []
    cameras = _cameras(features, file, notes)
    action = _vectors(features, "action", options.action, ("action",), file, notes)
    proprioception = _vectors(features, "proprioception", options.proprioception, _PROPRIOCEPTION, file, notes)
    state = _vectors(features, "state", options.state, (), file, notes)
    instruction = _instruction(features, options, file)
    is_last = "steps/is_last" if "steps/is_last" in features and options.last_step == "drop" else ""
    if is_last and features[is_last].size != 1:
        raise FileError(f"{file}: steps/is_last is {features[is_last]}, expected a scalar")
    sizes = {name: f.size for name, f in features.items() if name.startswith("steps/") and f.size}
    if is_last:
        counter = is_last
    elif sizes:  # the smallest, as a scan reads it
        counter = min(sizes, key=lambda name: (sizes[name], name))
    else:
        counter = instruction if instruction.startswith("steps/") else next(iter(cameras.values()))
    return Chosen(cameras, action, proprioception, state, instruction, is_last, counter, notes)


def _cameras(features: Mapping[str, Feature], file: Path, notes: list[str]) -> dict[str, str]:
    """Camera -> feature."""
    cameras: dict[str, str] = {}
    for name, feature in sorted(features.items()):
        picture = feature.kind == "image" or (feature.dtype == "uint8" and len(feature.shape) == 3 and feature.size > 0)
        if not picture:
            continue
        reason = ""
        if not name.startswith("steps/observation/"):
            reason = "is not under steps/observation"
        elif feature.dtype != "uint8" or len(feature.shape) != 3 or feature.shape[2] not in (3, None):
            reason = "is no 8-bit RGB picture"
        elif feature.kind == "tensor" and feature.encoding not in ("bytes", "zlib"):
            reason = "stores pictures as integers, which is not supported"
        if reason:
            notes.append(f"{name} ({feature}) {reason}: left out")
            continue
        camera = name.removeprefix("steps/observation/").replace("/", "_")
        if camera in cameras:
            raise FileError(f"{file}: {name} and {cameras[camera]} both give the camera {camera!r}")
        cameras[camera] = name
    if not cameras:
        raise FileError(f"{file}: no RGB image under steps/observation ({'; '.join(notes) or 'no image at all'})")
    return cameras


def _numeric(features: Mapping[str, Feature]) -> str:
    """The numeric features of a step, for messages."""
    names = [f"{n.removeprefix('steps/')} ({f.size})" for n, f in features.items() if n.startswith("steps/") and f.size]
    return ", ".join(names) or "none"


def _vectors(
    features: Mapping[str, Feature],
    option: str,
    named: Sequence[str] | None,
    known: Sequence[str],
    file: Path,
    notes: list[str],
) -> list[str]:
    """The features to join for a vector; empty where it has none."""
    if named is None:
        for name in known:
            if (feature := features.get(f"steps/{name}")) is not None and feature.size:
                named = [name]
                break
    if named is None:
        if option == "action":
            raise ParamsError(
                f"convert.options.action: {file} has no numeric feature 'action'; list those to join, or [] for none: "
                f"{_numeric(features)}"
            )
        notes.append(
            f"no {option}: none of {', '.join(known)}; convert.options.{option} can list some of: {_numeric(features)}"
        )
        return []
    for name in named:
        feature = features.get(f"steps/{name}")
        if feature is None or not feature.size:
            raise ParamsError(
                f"convert.options.{option} names {name!r}, which is {feature or 'not there'}, expected a numeric tensor of "
                f"fixed shape, such as: {_numeric(features)}"
            )
    return [f"steps/{name}" for name in named]


def _instruction(features: Mapping[str, Feature], options: Options, file: Path) -> str:
    """The feature with the instruction; empty where `convert.options.instruction` replaces it."""

    def usable(name: str) -> bool:
        feature = features.get(name)
        integer = feature is not None and feature.size > 0 and "int" in feature.dtype and len(feature.shape) == 1
        return feature is not None and (feature.kind == "text" or integer)

    key = options.instruction_key
    for name in [f"steps/{key}", key] if key else [f"steps/{known}" for known in _INSTRUCTIONS]:
        if usable(name):
            return name
    found = [name.removeprefix("steps/") for name, feature in features.items() if feature.kind == "text"]
    if key or not options.instruction.strip():
        wrong = f"convert.options.instruction_key is {key!r}, which is no text" if key else "no instruction under a known name"
        raise ParamsError(
            f"{file}: {wrong}; set convert.options.instruction, or instruction_key to one of: {', '.join(found) or 'none'}"
        )
    return ""
