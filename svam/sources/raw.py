"""The project's own raw layout, for people with their own recorder: one `.npz` an episode and one `meta.json`.

```
my_recordings/
  meta.json
  pick_001.npz            any name; episodes are read in the order of their names
  pick_001.front.mp4      optional: the frames of the camera "front" as a video instead of `frames_front` in the .npz
  pick_002.npz            ...
```

`meta.json`, at its shortest and with everything:

```
{"schema_version": 1, "rate_hz": 10, "cameras": ["front"], "tasks": {"pick": {"train": ["pick up the cup"]}}}

{"schema_version": 1, "rate_hz": 10, "cameras": ["front", "wrist"],
 "tasks": {"pick": {"train": ["pick up the cup", "lift the cup"], "held_out": ["take the cup"]}, "push": {"train": [...]}},
 "episodes": {"pick_001": {"task": "pick", "instruction": "lift the cup", "held_out": false, "success": true}, "pick_002": {}}}
```

- `rate_hz`: time steps a second. `cameras`: those to foresee come first.
- `tasks`: the sentences for each task; `held_out` sentences are kept for evaluation. May be left out if every episode has an
  instruction of its own; it is then a task by itself.
- `episodes`: by file name without `.npz`; each key is optional. The task is the only one of `tasks` where nothing says which.
  The instruction is that of `episodes`, or the field `instruction` of the `.npz`, or a training sentence of the task (one
  after the other, by the episode's number). If an episode says `held_out`, those that do not are training episodes;
  if none does, the convert stage draws a split. `success` is for `convert.success`.

The `.npz` (numpy.savez or savez_compressed), n time steps:

- `frames_<camera>` uint8 (n, H, W, 3) RGB (a fourth channel is dropped; (n, C, H, W) is read too, and (n, H, W) as grey) for
  each camera without a video; a video has exactly n frames, row t is frame t.
- `actions` (n, A): what was executed from the state that frame t shows, in physical units.
- optional `state` (n, S), `proprioception` (n, P), `expert_actions` (n, A); all of these are floating
  point (16, 32 or 64 bits) and become float32.
- optional `timestamps` (n,) seconds, float32 or 64, increasing.
- optional `instruction`: one sentence, as numpy writes `instruction="pick up the cup"`.
- optional labels of some frames of the first camera: `annotation_index` int64 (m,), with `depth` float16 or 32 (m, H, W) metres
  and/or `segmentation` uint8 (m, H, W), of `svam.contract.SEGMENTATION_CLASSES`. Where `convert.cameras` begins with another
  one they are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from svam.contract import EVERYTHING, Annotation, Choice, Episode, EpisodeShape, Frames, Frozen, SourceDescription
from svam.errors import SvamError
from svam.files import FileError, read_json, stamp, stated
from svam.sections import Distinct
from svam.sources._choice import (
    LABELS,
    checked,
    chosen_cameras,
    chosen_instruction,
    contents,
    existing_folder,
    own_task,
    rate_notes,
)
from svam.sources._hdf5 import text_of
from svam.sources._npz import Header, frame_blocks_of, headers, load, pictures_of, refuse_objects
from svam.sources._pictures import depth_doubts
from svam.sources._video import notes_of, probe, told_at, video_blocks

_VECTORS, _LABELS = ("actions", "expert_actions", "state", "proprioception"), ("depth", "segmentation")
_FIELDS: dict[str, tuple[Sequence[str], int, str]] = {
    **dict.fromkeys(_VECTORS, (("float16", "float32", "float64"), 2, "float32")),
    "timestamps": (("float32", "float64"), 1, "float64"),
    "annotation_index": (("int64",), 1, "int64"),
    "depth": (("float16", "float32"), 3, "float32"),
    "segmentation": (("uint8",), 3, "uint8"),
}
"""Field -> types that are read, number of axes, the contract's type."""
_Sentence = Annotated[str, Field(pattern=r"\S")]


class Options(Frozen):
    """None: `meta.json` says it all."""


class _Task(Frozen):
    train: Annotated[list[_Sentence], Field(min_length=1)]
    held_out: list[_Sentence] = []


class _EpisodeFacts(Frozen):
    task: str | None = None
    instruction: _Sentence | None = None
    held_out: bool | None = None
    success: bool | None = None


class _Meta(Frozen):
    schema_version: Literal[1]
    rate_hz: Annotated[float, Field(gt=0.0, allow_inf_nan=False, strict=True)]
    cameras: Annotated[list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]], Field(min_length=1), Distinct]
    tasks: dict[str, _Task] = {}
    episodes: dict[str, Any] = {}


class _Said(Frozen):
    episodes: dict[str, _EpisodeFacts]


def _field(file: Path, there: Mapping[str, NDArray[Any]] | Mapping[str, Header], name: str) -> Any:
    """One array (or header) of an archive, as `_FIELDS` says."""
    if name not in there:
        raise FileError(f"{file}: field {name!r} is missing; it has {', '.join(sorted(there))}")
    found, (types, axes, _) = there[name], _FIELDS[name]
    refuse_objects(file, name, found.dtype)
    if found.dtype.name not in types or len(found.shape) != axes:
        raise FileError(
            f"{file}: field {name!r} is {found.dtype} {found.shape}, expected {' or '.join(types)} with {axes} axes"
        )
    return found


def _own_instruction(file: Path) -> str:
    """Of an archive; "" where it has none."""
    value = load(file, ("instruction",)).get("instruction")
    if value is None:
        return ""
    text = text_of(value, f"{file}: field 'instruction'")
    if text is None:
        raise FileError(f"{file}: field 'instruction' is {value.dtype} {value.shape}, expected one string")
    return text


def _video(file: Path, camera: str, found: Mapping[str, Header]) -> Path | None:
    """The video of a camera, or None where its frames are in the archive."""
    inside, video = f"frames_{camera}" in found, file.with_name(f"{file.stem}.{camera}.mp4")
    if inside and video.is_file():
        raise FileError(f"{file}: has field 'frames_{camera}', and {video.name} is there too; keep one")
    if not inside and not video.is_file():
        raise FileError(f"{file}: field 'frames_{camera}' is missing, and there is no {video.name}")
    return None if inside else video


class RawSource:
    """The episodes of a folder, in the order of their names."""

    def __init__(self, path: Path, options: Options, choice: Choice = EVERYTHING) -> None:
        """Open a folder of the layout above.

        Raises:
            FileError: the folder, its `meta.json` or any recording is missing, or `meta.json` is not as described.
            ParamsError: `choice` names a camera that `meta.json` does not list.
        """
        self.path, self._choice = existing_folder(path), choice
        self._meta_file = self.path / "meta.json"
        if not self._meta_file.is_file():
            raise FileError(
                f"{self._meta_file}: no such file, which a folder of raw recordings has; it has {contents(self.path)}"
            )
        self._meta = stated(_Meta, read_json(self._meta_file), self._meta_file)
        self._rate_hz = choice.rate_hz or self._meta.rate_hz
        self._there = {file.stem: file for file in self.path.glob("*.npz")}
        if not self._there:
            raise FileError(f"{self.path}: no <name>.npz in it; it has {contents(self.path)}")
        self.names = sorted(self._there.keys() | self._meta.episodes.keys())
        self._cameras = chosen_cameras(choice, self._meta.cameras, self._meta_file, "frames_")
        self._unread = [f"frames_{camera}" for camera in self._meta.cameras if camera not in self._cameras]
        self._labels = _LABELS if self._cameras[0] == self._meta.cameras[0] else ()
        said = self._meta.episodes.values()
        self._has_split = any(isinstance(facts, dict) and facts.get("held_out") is not None for facts in said)

    @cached_property
    def notes(self) -> Sequence[str]:
        """What of the folder is not read: fields of the first episode, and videos of no episode; how pictures are stored."""
        notes = depth_doubts(f"frames_{camera}" for camera in self._cameras if not self._choice.cameras)
        known = {*_FIELDS, "instruction", *(f"frames_{camera}" for camera in self._meta.cameras)}
        first = self._there[min(self._there)]
        try:
            there = headers(first, unread=self._unread)
            for name in (f"frames_{camera}" for camera in self._cameras if f"frames_{camera}" in there):
                notes += pictures_of(first, name, there[name]).notes(f"{first}: {name}")
            if "timestamps" in there:
                times = _field(first, load(first, ["timestamps"]), "timestamps")
                notes += rate_notes(times, self._rate_hz, str(first))
        except FileError:  # which `shape` says
            there = {}
        if not self._labels and "annotation_index" in there:
            notes.append(f"{self.path}: {LABELS.format(self._meta.cameras[0])}")
        if unknown := sorted(set(there) - known):
            notes.append(
                f"{first}: ignoring {', '.join(unknown)}, which the raw layout does not know or meta.json does not list"
            )
        videos = {file.name: file for file in self.path.glob("*.mp4")}
        told: dict[Path, str] = {}
        for name in self._videos(self._cameras) & videos.keys():
            with suppress(FileError):  # which `shape` says
                told[videos[name]] = told_at(probe(videos[name]), self._rate_hz)
        notes += notes_of(told)
        if unused := sorted(videos.keys() - self._videos(self._meta.cameras)):
            notes.append(f"{self.path}: ignoring {len(unused)} videos of no episode or camera, such as {unused[0]}")
        return notes

    def _videos(self, cameras: Sequence[str]) -> set[str]:
        """The names that videos of these cameras may have."""
        return {f"{name}.{camera}.mp4" for name in self.names for camera in cameras}

    def _file(self, index: int) -> Path:
        """The archive of an episode; `FileError` where meta.json alone knows it."""
        name = self.names[index]
        if name not in self._there:
            raise FileError(f"{self._meta_file}: episodes names {name!r}, but there is no {name}.npz")
        return self._there[name]

    def _facts(self, name: str) -> _EpisodeFacts:
        """What meta.json says of an episode; `FileError` where that is not as described."""
        return stated(_Said, {"episodes": {name: self._meta.episodes.get(name, {})}}, self._meta_file).episodes[name]

    def _told(self, index: int) -> tuple[str, str]:
        """Task and instruction of an episode; `FileError` where they are missing or contradict one another."""
        file, tasks = self._file(index), self._meta.tasks
        facts = self._facts(file.stem)
        replaced, own = bool(self._choice.instruction), ""
        with suppress(FileError) if replaced else nullcontext():  # what is replaced need not be sound
            own = _own_instruction(file)
        if own and facts.instruction and own != facts.instruction and not replaced:
            raise FileError(f"{file}: its instruction is {own!r}, but meta.json says {facts.instruction!r}")
        task = facts.task or (next(iter(tasks)) if len(tasks) == 1 else None)
        if task not in tasks and (task is not None or tasks):
            said = "missing" if task is None else repr(task)
            raise FileError(f"{self._meta_file}: episodes.{file.stem}.task is {said}; tasks are {', '.join(tasks) or 'none'}")
        sentences: Sequence[str | None] = tasks[task].train if task is not None else [None]
        sentence = facts.instruction or own or sentences[index % len(sentences)]
        return task or own_task(self._choice, sentence, str(file)), chosen_instruction(self._choice, sentence, str(file))

    def describe(self) -> SourceDescription:
        """Rate, cameras and sentences; reads the instruction fields, no frame."""
        told = {} if self._choice.instruction else self._meta.tasks
        instructions = {task: sentences.model_dump() for task, sentences in told.items()}
        for index in range(len(self)):
            try:
                task, instruction = self._told(index)
            except SvamError:  # which `shape` says
                continue
            listed = instructions.setdefault(task, {"train": [], "held_out": []})
            if instruction not in listed["train"] + listed["held_out"]:
                listed["train"].append(instruction)
        return SourceDescription(
            rate_hz=self._rate_hz, cameras=self._cameras, instructions=instructions,
            provenance={"source": "raw"},
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.names)

    def shape(self, index: int) -> EpisodeShape:
        """Lengths, from the headers of the archive and of videos."""
        file = self._file(index)
        found = headers(file, unread=self._unread)
        steps = _field(file, found, "actions").shape[0]
        rows = {name: _field(file, found, name).shape[0] for name in _FIELDS if name in found}
        annotated = {name: _field(file, found, "annotation_index").shape[0] for name in self._labels if name in found}
        facts = self._facts(file.stem)
        videos = []
        for camera in self._cameras:
            if video := _video(file, camera, found):
                videos.append(video)
                if (frames := probe(video).frames) != steps:
                    raise FileError(f"{video}: {frames} frames, but {file.name} has {steps} actions; expected a frame a row")
            else:
                name = f"frames_{camera}"
                rows[name] = pictures_of(file, name, found[name]).shape[0]
        for name in sorted(rows.keys() - {"annotation_index", *_LABELS}):
            if rows[name] != steps:
                raise FileError(
                    f"{file}: field {name!r} has {rows[name]} rows, but there are {steps} actions; expected as many"
                )
        return EpisodeShape(
            steps, annotated, held_out=bool(facts.held_out) if self._has_split else None,
            stamp=" ".join(stamp(part) for part in (file, self._meta_file, *videos)),
            name=file.stem, task=self._told(index)[0], success=facts.success,
        )  # fmt: skip

    def read(self, index: int) -> Episode:
        """One episode."""
        file = self._file(index)
        found = headers(file, unread=self._unread)
        _field(file, found, "actions")
        task, instruction = self._told(index)
        frames: dict[str, Frames] = {}
        for camera in self._cameras:
            video, name = _video(file, camera, found), f"frames_{camera}"
            frames[camera] = video_blocks(video, probe(video)) if video else frame_blocks_of(file, name, found[name])
        loaded = load(file, list(_FIELDS))
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which check() names
            arrays = {name: _field(file, loaded, name).astype(_FIELDS[name][2]) for name in loaded}
        labels = {name: arrays[name] for name in self._labels if name in arrays}
        episode = Episode(
            task=task, instruction=instruction, rate_hz=self._rate_hz, frames=frames,
            timestamps=arrays.get("timestamps"), provenance={"file": file.name},
            annotations={name: Annotation(values, _field(file, arrays, "annotation_index")) for name, values in labels.items()},
            **{name: arrays[name] for name in _VECTORS if name in arrays},
        )  # fmt: skip
        return checked(episode, file)


open_source = RawSource
