"""The files of a CALVIN folder: which steps are recordings, scenes and annotations, and the members of one step's .npz."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.files import FileError, refuse_lfs_pointer
from svam.sources._npz import load
from svam.sources._picture_arrays import frames_per_block
from svam.sources._restricted_pickle import load_objects

LISTED = ", though a recording or an annotation includes its step"
_LARGEST_STEP = 2**53
_MAX_POSITION = 0.02
_CHECKED_STEPS = 16


def step_file(folder: Path, step: int) -> Path:
    """The file of one step."""
    return folder / f"episode_{step:07d}.npz"


def bounds(value: Any) -> tuple[int, int] | None:
    """(first, last) of a pair of whole numbers in order, or None."""
    if not isinstance(value, list | tuple | np.ndarray) or len(value) != 2:
        return None
    if any(isinstance(n, bool) or not isinstance(n, int | np.integer) for n in value):
        return None
    first, last = int(value[0]), int(value[1])
    return (first, last) if 0 <= first <= last < _LARGEST_STEP else None


def read_recordings(folder: Path) -> NDArray[np.int64]:
    """(recordings, 2), sorted by their first step."""
    file = folder / "ep_start_end_ids.npy"
    refuse_lfs_pointer(file)
    try:
        with file.open("rb") as opened:
            values = np.lib.format.read_array(opened)
    except FileNotFoundError:
        raise FileError(f"{file}: no such file; it lists the recordings of an official CALVIN folder") from None
    except Exception as error:  # numpy's parser of headers raises a dozen types on damaged bytes
        raise FileError(f"{file}: truncated, damaged or no .npy file of numbers ({type(error).__name__})") from None
    if values.dtype.kind not in "iu" or values.ndim != 2 or values.shape[1] != 2:
        raise FileError(f"{file}: it is {values.dtype} {values.shape}, expected integers (recordings, 2)")
    if not len(values):
        raise FileError(f"{file}: no recordings")
    for number, pair in enumerate(values):
        if bounds(pair) is None:
            raise FileError(f"{file}: row {number} is {pair.tolist()}, expected 0 <= first step <= last step")
    pairs = values.astype(np.int64)
    return pairs[np.argsort(pairs[:, 0], kind="stable")]


def scene_name(name: str) -> str:
    """'A' of 'calvin_scene_A'."""
    return name.removeprefix("calvin_scene_")


def read_scenes(folder: Path) -> list[tuple[str, int, int]]:
    """(scene, first, last) of the folder's scene_info.npy; empty without the file."""
    file = folder / "scene_info.npy"
    if not file.exists():
        return []
    found = load_objects(file)
    if not isinstance(found, dict) or not found:
        raise FileError(f"{file}: holds a {type(found).__name__}, expected a dict of scenes and their first and last step")
    entries = []
    for number, (name, value) in enumerate(found.items()):
        pair = bounds(value)
        if not is_sentence(name) or pair is None:
            raise FileError(f"{file}: entry {number} is no scene's name with [first step, last step], 0 <= first <= last")
        entries.append((scene_name(name), *pair))
    return entries


def is_sentence(value: Any) -> bool:
    """Text that is not blank and can be written as UTF-8 (a lone surrogate cannot)."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def read_annotations(folder: Path, name: str) -> list[tuple[int, int, str, str]]:
    """(first step, last step, task, sentence) of each annotation; a sentence may be "".

    Raises:
        FileError: the file is missing, damaged, or lists differ in length or hold something else.
    """
    file = folder / name / "auto_lang_ann.npy"
    if not file.exists():
        with os.scandir(folder) as listing:
            others = sorted(e.name for e in listing if e.is_dir() and Path(e.path, file.name).is_file())
        others += ["."] if (folder / file.name).is_file() else []
        choice = f"set convert.options.annotations to one of {', '.join(others)}" if others else "no other folder there has it"
        raise FileError(f"{file}: no such file; {choice}, or set convert.options.segments to 'whole' to do without sentences")
    found, lists = load_objects(file), []
    for group, key in (("info", "indx"), ("language", "task"), ("language", "ann")):
        values = found.get(group) if isinstance(found, dict) else None
        values = values.get(key) if isinstance(values, dict) else None
        if isinstance(values, np.ndarray) and values.ndim:
            values = list(values)
        if not isinstance(values, list | tuple):
            raise FileError(f"{file}: [{group!r}][{key!r}] is missing or no list")
        lists.append(values)
    if len({len(values) for values in lists}) != 1:
        raise FileError(f"{file}: {len(lists[0])} indx, {len(lists[1])} task and {len(lists[2])} ann, expected as many of each")
    if not lists[0]:
        raise FileError(f"{file}: no annotations")
    entries = []
    for number, (pair, task, sentence) in enumerate(zip(*lists, strict=True)):
        steps = bounds(pair)
        if steps is None:
            raise FileError(f"{file}: ['info']['indx'][{number}] is no pair (first step, last step) with 0 <= first <= last")
        if not is_sentence(task) or not (sentence == "" or is_sentence(sentence) or str(sentence).isspace()):
            raise FileError(f"{file}: annotation {number} has no task name, or a sentence that is no text")
        entries.append((*steps, str(task), str(sentence).strip()))
    return entries


def read_step(file: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The named members of one step, of one of `dtypes` and of the given shapes."""
    arrays = load(file, tuple(shapes), LISTED)
    for name, shape in shapes.items():
        if name not in arrays:
            raise FileError(f"{file}: field {name!r} is missing")
        if arrays[name].dtype.name not in dtypes or arrays[name].shape != shape:
            found = f"{arrays[name].dtype} {arrays[name].shape}"
            raise FileError(f"{file}: field {name!r} is {found}, expected {' or '.join(dtypes)} {shape}")
    return arrays


def as_float32(file: Path, name: str, values: NDArray[Any]) -> NDArray[np.float32]:
    """Cast, and refuse what is not finite afterwards."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    if not np.isfinite(single).all():
        wrong = values.flat[int(np.flatnonzero(~np.isfinite(single))[0])]
        raise FileError(f"{file}: field {name!r} has the value {wrong:g}, expected numbers that are finite as float32")
    return single


def read_frames(folder: Path, first: int, member: str, shape: tuple[int, int, int, int]) -> Iterator[NDArray[np.uint8]]:
    """The frames of one camera, a block of steps at a time."""
    length = frames_per_block(int(np.prod(shape[1:])))
    for start in range(0, shape[0], length):
        block = np.empty((min(length, shape[0] - start), *shape[1:]), dtype=np.uint8)
        for i in range(len(block)):
            block[i] = read_step(step_file(folder, first + start + i), {member: shape[1:]}, ("uint8",))[member]
        yield block


def alignment_gap(folder: Path, first: int, last: int) -> float:
    """Largest difference, over a segment's first steps, between rel_actions' x, y, z and what the same step's absolute action
    less its pose gives; 0 where a step lacks one of the three."""
    worst = 0.0
    for step in range(first, min(last + 1, first + _CHECKED_STEPS)):
        arrays = load(step_file(folder, step), ("actions", "rel_actions", "robot_obs"), LISTED)
        if len(arrays) < 3 or any(v.dtype.kind != "f" or v.ndim != 1 or len(v) < 3 for v in arrays.values()):
            return 0.0
        absolute, relative, pose = (arrays[k][:3].astype(np.float64) for k in ("actions", "rel_actions", "robot_obs"))
        with np.errstate(all="ignore"):
            gap = np.abs(np.clip((absolute - pose) / _MAX_POSITION, -1.0, 1.0) - relative)
        worst = max(worst, float(gap.max()) if np.isfinite(gap).all() else 0.0)  # what is not finite is an error of its own
    return worst
