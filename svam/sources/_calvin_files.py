"""The files of a CALVIN folder: which steps are recordings, scenes and annotations, and the members of one step's .npz.

Whatever is missing, damaged or of another form is a `FileError`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.files import FileError, refuse_lfs_pointer
from svam.sources._choice import contents
from svam.sources._npz import load
from svam.sources._pictures import in_blocks
from svam.sources._restricted_pickle import load_objects

LISTED = ", though a recording or an annotation includes its step"
_MAX_POSITION = 0.02
_CHECKED_STEPS = 16


def step_file(folder: Path, step: int) -> Path:
    """The file of one step."""
    return folder / f"episode_{step:07d}.npz"


def _bounds(value: Any) -> tuple[int, int] | None:
    """(first, last) of a pair of whole numbers in order, or None."""
    try:
        first, last = map(operator.index, value)
    except (TypeError, ValueError):
        return None
    return (first, last) if 0 <= first <= last else None


def _is_text(value: Any) -> bool:
    """Text that can be written as UTF-8 (a lone surrogate cannot)."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def read_recordings(folder: Path) -> NDArray[np.int64]:
    """(recordings, 2), sorted by their first step."""
    file = folder / "ep_start_end_ids.npy"
    refuse_lfs_pointer(file)
    try:
        with file.open("rb") as opened:
            values = np.lib.format.read_array(opened)
    except FileNotFoundError:
        there = f"{folder} has {contents(folder)}; convert.options.folders says which folders are read"
        raise FileError(f"{file}: no such file; it lists the recordings of an official CALVIN folder; {there}") from None
    except Exception as error:  # numpy's parser of headers raises a dozen types on damaged bytes
        raise FileError(f"{file}: truncated, damaged or no .npy file of numbers ({type(error).__name__})") from None
    if values.dtype.kind not in "iu" or values.ndim != 2 or values.shape[1] != 2:
        raise FileError(f"{file}: it is {values.dtype} {values.shape}, expected integers (recordings, 2)")
    if not len(values):
        raise FileError(f"{file}: no recordings")
    pairs = values.astype(np.int64)
    if (wrong := (pairs[:, 0] < 0) | (pairs[:, 1] < pairs[:, 0])).any():
        row = int(np.argmax(wrong))
        raise FileError(f"{file}: row {row} is {values[row].tolist()}, expected 0 <= first step <= last step")
    return pairs[np.argsort(pairs[:, 0], kind="stable")]


def read_scenes(folder: Path) -> list[tuple[str, int, int]]:
    """(scene, first, last) of the folder's scene_info.npy, scene "A" for "calvin_scene_A"; empty without the file."""
    file = folder / "scene_info.npy"
    if not file.exists():
        return []
    scenes = load_objects(file)
    if not isinstance(scenes, dict):
        raise FileError(f"{file}: holds a {type(scenes).__name__}, expected a dict of scenes and their first and last step")
    entries = []
    for number, (name, value) in enumerate(scenes.items()):
        pair = _bounds(value)
        if not _is_text(name) or pair is None:
            raise FileError(f"{file}: entry {number} is no scene's name with [first step, last step], 0 <= first <= last")
        entries.append((name.removeprefix("calvin_scene_"), *pair))
    return entries


def read_annotations(file: Path) -> list[tuple[int, int, str, str, str]]:
    """(first step, last step, task, sentence, why it cannot be read) of each annotation; a sentence may be ""."""
    if not file.exists():
        folder = file.parent.parent
        others = [str(path.parent.relative_to(folder)) for start in ("*/", "") for path in folder.glob(start + file.name)]
        choice = f"set convert.options.annotations to one of {', '.join(sorted(others))}"
        choice = choice if others else "no other folder there has it"
        raise FileError(f"{file}: no such file; {choice}, or set convert.options.segments to 'whole' and one sentence for all")
    content, lists = load_objects(file), []
    for group, key in (("info", "indx"), ("language", "task"), ("language", "ann")):
        try:
            lists.append(list(content[group][key]))
        except (TypeError, LookupError):
            raise FileError(f"{file}: [{group!r}][{key!r}] is missing or no list") from None
    counts = [len(values) for values in lists]
    if len(set(counts)) != 1 or not counts[0]:
        raise FileError(
            f"{file}: {counts[0]} indx, {counts[1]} task and {counts[2]} ann, expected as many of each, at least one"
        )
    entries = []
    for number, (pair, task, sentence) in enumerate(zip(*lists, strict=True)):
        steps, said = _bounds(pair), "" if sentence is None else sentence
        if steps is None:
            fault = f"{file}: ['info']['indx'][{number}] is no pair (first step, last step) with 0 <= first <= last"
            entries.append((0, 0, "", "", fault))
        elif not (_is_text(task) and task.strip() and _is_text(said)):
            entries.append((*steps, "", "", f"{file}: annotation {number} has no task name, or a sentence that is no text"))
        else:
            entries.append((*steps, str(task), str(said).strip(), ""))
    return entries


def read_step(
    file: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: tuple[str, ...] = ("float32", "float64")
) -> dict[str, NDArray[Any]]:
    """The named members of one step, of one of `dtypes` and of the given shapes."""
    arrays = load(file, tuple(shapes), LISTED)
    for name, shape in shapes.items():
        if name not in arrays:
            raise FileError(f"{file}: field {name!r} is missing")
        if arrays[name].dtype.name not in dtypes or arrays[name].shape != shape:
            stored = f"{arrays[name].dtype} {arrays[name].shape}"
            raise FileError(f"{file}: field {name!r} is {stored}, expected {' or '.join(dtypes)} {shape}")
    return arrays


def read_frames(folder: Path, first: int, member: str, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint8]]:
    """The frames of one camera, a block of steps at a time."""
    files = (step_file(folder, step) for step in range(first, first + shape[0]))
    return in_blocks((read_step(file, {member: shape[1:]}, ("uint8",))[member] for file in files), str(folder))


def alignment_gap(folder: Path, first: int, last: int) -> float:
    """Largest difference, over a segment's first steps, between rel_actions' x, y, z and what the same step's absolute action
    less its pose gives."""
    shapes, gap = {"actions": (7,), "rel_actions": (7,), "robot_obs": (15,)}, 0.0
    for step in range(first, min(last + 1, first + _CHECKED_STEPS)):
        arrays = read_step(step_file(folder, step), shapes)
        absolute, relative, pose = (arrays[name][:3].astype(np.float64) for name in shapes)
        with np.errstate(all="ignore"):  # what is not finite is refused elsewhere
            difference = np.abs(np.clip((absolute - pose) / _MAX_POSITION, -1.0, 1.0) - relative).max()
        gap = max(gap, float(np.nan_to_num(difference)))
    return gap
