"""What a LeRobot data set says about itself (v2.0, v2.1, v3.0): `meta/info.json`, its episodes, tasks, cameras and paths.
Whatever is missing, damaged or of another form is a `FileError`."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, Field, model_validator

from svam.files import FileError, read_json, refuse_lfs_pointer, stated
from svam.sources._choice import TRAINING, contents, existing_folder, lies_there
from svam.sources._lerobot_files import opened, read_columns

STANDARD_PATHS = {
    "v2": {
        "data": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    },
    "v3": {
        "data": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    },
}
"""Where LeRobot itself writes; `info.json` repeats it, not always rightly."""
_SIGNS = {"v2": ("meta/episodes.jsonl", "meta/tasks.jsonl"), "v3": ("meta/episodes", "meta/tasks.parquet")}
"""What only this version has."""
_PLACEHOLDER = re.compile(r"\{(\w+)(?::0?(\d{0,2})d?)?\}")
_PREFIXES = ("observation.images.", "observation.image.", "observation.")


_Whole = Annotated[int, Field(ge=0, lt=2**53)]
"""Also where it is written as 5.0."""
_Positive = Annotated[_Whole, Field(ge=1)]
_UNSAID = BeforeValidator(lambda value: None if value != value else value)
"""What pandas writes for null is NaN."""
_Number = Annotated[float, Field(allow_inf_nan=False)]


def _sentences(value: Any) -> tuple[str, ...]:
    """The `tasks` of an episode, as texts; anything else counts as not said."""
    values = [value] if isinstance(value, str) else value
    said = isinstance(values, list) and all(isinstance(one, str) for one in values)
    return tuple(dict.fromkeys(values)) if said else ()


@dataclass(frozen=True)
class Camera:
    """A camera as `info.json` declares it: the feature's `key`, the `name` given here, whether it is a `video`, the `shape` of
    its pictures, and the feature's `dtype`."""

    key: str
    name: str
    video: bool
    shape: tuple[int, ...]
    dtype: str


class Clip(BaseModel):
    """The part of a v3 video file that belongs to one episode: numbers of its path, and seconds within the file."""

    chunk_index: _Whole
    file_index: _Whole
    from_timestamp: _Number
    to_timestamp: _Number


class Entry(BaseModel):
    """One episode as the metadata lists it, None where it is not said. chunk, file: of its parquet file (v3). clips: camera key
    -> `Clip` (v3). fault: what is wrong in its line, of which only the number is kept then."""

    number: _Whole = Field(alias="episode_index")
    steps: Annotated[_Positive | None, _UNSAID] = Field(None, alias="length")
    tasks: Annotated[tuple[str, ...], BeforeValidator(_sentences)] = Field((), validation_alias=AliasChoices("tasks", "task"))
    success: Annotated[bool | None, BeforeValidator(lambda value: bool(value) if value in (0, 1) else None)] = None
    chunk: Annotated[_Whole | None, _UNSAID] = Field(0, validation_alias=AliasChoices("data/chunk_index", "data_chunk_index"))
    file: Annotated[_Whole | None, _UNSAID] = Field(0, validation_alias=AliasChoices("data/file_index", "data_file_index"))
    clips: dict[str, Clip] = {}
    fault: str = Field("", alias="(fault)")  # which no set calls anything

    @model_validator(mode="before")
    @classmethod
    def _gather_clips(cls, row: Any) -> Any:
        """Columns `videos/<camera>/<part>` become `clips`; those that are null or NaN say that the episode has none."""
        clips: dict[str, dict[str, Any]] = {}
        for name in row if isinstance(row, dict) else ():
            if name.startswith("videos/"):
                camera, _, part = name.removeprefix("videos/").rpartition("/")
                clips.setdefault(camera, {})[part] = row[name]
        said = {camera: parts for camera, parts in clips.items() if all(v is not None and v == v for v in parts.values())}
        return row | {"clips": said} if clips else row


def _inside(template: str) -> str:
    if Path(template).is_absolute() or ".." in Path(template).parts:
        raise ValueError(f"{template!r} leads out of the data set")
    return template


_Template = Annotated[str, AfterValidator(_inside)]


def _known_version(value: Any) -> Any:
    value = "v" + value.strip().lower().removeprefix("v") if isinstance(value, str) else value
    if isinstance(value, str) and value not in ("v2.0", "v2.1", "v3.0"):
        raise ValueError(
            f"{value!r} is not read, expected 'v2.0', 'v2.1' or 'v3.0'; LeRobot's own scripts convert_dataset_*.py bring older "
            "sets up to these, and a newer one can be written as convert.source 'raw' by whatever reads it"
        )
    return value


class Info(BaseModel):
    """The parts of `meta/info.json` that are needed."""

    codebase_version: Annotated[Literal["v2.0", "v2.1", "v3.0"], BeforeValidator(_known_version)]
    fps: Annotated[_Number, Field(gt=0)]
    features: dict[str, dict[str, Any]]
    chunks_size: _Positive = 1000
    data_path: _Template | None = None
    video_path: _Template | None = None
    splits: Any = None
    robot_type: Any = None
    total_episodes: _Whole | None = None

    @property
    def major(self) -> str:
        """ "v2" or "v3"."""
        return self.codebase_version[:2]


_INDEX = "__index_level_0__"
"""What pandas calls an index without a name."""


class _Task(BaseModel):
    task_index: _Whole = Field(validation_alias=AliasChoices("task_index", "subtask_index"))
    task: Annotated[str, BeforeValidator(lambda value: "" if value is None else value)] = Field(
        validation_alias=AliasChoices("task", "subtask", _INDEX)
    )


def _rows(file: Path, needed: Sequence[str], wanted: Sequence[str]) -> Iterator[Any]:
    """The values of a JSON-lines file; of a parquet file its rows, of the columns `needed` and of those of `wanted` that are
    there: the others are large statistics."""
    if file.suffix == ".parquet":
        with opened(file, needed) as parquet:
            rows = read_columns(parquet, [*needed, *wanted]).to_pylist()
        yield from rows
        return
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except (ValueError, RecursionError):
            refuse_lfs_pointer(file)
            raise FileError(f"{file}: line {number} is not valid JSON; the file is truncated or damaged") from None


def read_info(root: Path) -> tuple[Path, Info]:
    """The file `meta/info.json`, and what it says."""
    file = existing_folder(root) / "meta" / "info.json"
    if not file.is_file():
        raise FileError(f"{file}: no such file, which a LeRobot data set (v2.0, v2.1 or v3.0) has; {root} has {contents(root)}")
    return file, stated(Info, read_json(file), file)


def fill(template: str, values: Mapping[str, int | str | None]) -> str:
    """A path template with its placeholders replaced, as `str.format` does for `{name}` and `{name:06d}`. Nothing else of
    `str.format` is understood, because the template is data; what it does not understand stays, and leads to no file."""

    def replaced(match: re.Match[str]) -> str:
        value, digits = values.get(match[1], match[0]), match[2]
        return f"{value:0{digits}d}" if digits and isinstance(value, int) else str(value)

    return _PLACEHOLDER.sub(replaced, template)


def place(info: Info, entry: Entry, camera: Camera | None, template: str) -> str:
    """Where an episode's data file, or the video of a camera, is said to lie in the set; a folder where nothing says it."""
    values: dict[str, int | str | None]  # those of the version: a template with other names is not LeRobot's
    if info.major == "v2":
        values = {"episode_index": entry.number, "episode_chunk": entry.number // info.chunks_size}
    elif camera is None:
        values = {"chunk_index": entry.chunk, "file_index": entry.file}
    elif clip := entry.clips.get(camera.key):
        values = {"chunk_index": clip.chunk_index, "file_index": clip.file_index}
    else:
        return f"videos/{camera.key}"
    if camera:
        values["video_key"] = camera.key
    return fill(template, values)


def what_lies_there(root: Path, path: Path, major: str) -> str:
    """The same as `lies_there`, and which files are of the other version's layout."""
    lies = lies_there(root, path)
    other = "v3" if major == "v2" else "v2"
    files = [sign for sign in _SIGNS[other] if (root / sign).exists()]
    verb = "are" if len(files) > 1 else "is"
    return f"{lies}; {' and '.join(files)} {verb} of a {other} set: is codebase_version right?" if files else lies


def read_tasks(root: Path, major: str, column: str | None = None) -> dict[int, str] | None:
    """`task_index` -> sentence, from `meta/tasks.parquet` (the sentence is a column `task` or the pandas index) or
    `meta/tasks.jsonl`, whichever is of the version where there are both; None where there is neither. What the
    column "subtask_index" means is in `meta/subtasks.parquet`."""
    names: tuple[str, ...] = ("tasks.parquet", "tasks.jsonl") if major == "v3" else ("tasks.jsonl", "tasks.parquet")
    names = ("subtasks.parquet",) if column == "subtask_index" else names
    file = next((file for name in names if (file := root / "meta" / name).is_file()), None)
    if file is None:
        return None
    tasks: dict[int, str] = {}
    kind = file.stem.removesuffix("s")
    for row in _rows(file, [f"{kind}_index"], [kind, _INDEX]):
        line = stated(_Task, row, file)
        if tasks.setdefault(line.task_index, line.task) != line.task:
            raise FileError(
                f"{file}: {kind}_index {line.task_index} is there twice, as {tasks[line.task_index]!r} and {line.task!r}"
            )
    return tasks


def _entry(row: Any, file: Path) -> Entry:
    try:
        return stated(Entry, row, file)
    except FileError as error:
        with suppress(FileError, AttributeError):
            return stated(Entry, {"episode_index": row.get("episode_index"), "(fault)": str(error)}, file)
        raise


def read_episodes(root: Path, info: Info, cameras: Sequence[Camera]) -> list[Entry]:
    """All episodes that the metadata lists, by number; `FileError` also where every line is wrong."""
    v2 = info.major == "v2"
    place = root / "meta" / ("episodes.jsonl" if v2 else "episodes")
    files = [place] if v2 and place.is_file() else sorted(place.rglob("[!.]*.parquet"))
    if not files:
        lacks = f"no {'such file' if v2 else 'parquet file in it'}, which a {info.codebase_version} data set needs"
        raise FileError(f"{place}: {lacks}; {what_lies_there(root, place / 'chunk-000', info.major)}")
    wanted = ["tasks", "success", "data/chunk_index", "data/file_index", "data_chunk_index", "data_file_index"]
    wanted += [f"videos/{camera.key}/{part}" for camera in cameras for part in Clip.model_fields]
    entries = [_entry(row, file) for file in files for row in _rows(file, ["episode_index", "length"], wanted)]
    entries.sort(key=lambda entry: entry.number)
    for before, after in pairwise(entries):
        if before.number == after.number:
            raise FileError(f"{place}: episode_index {after.number} is there twice")
    if all(entry.fault for entry in entries):
        raise FileError(entries[0].fault if entries else f"{place}: lists no episodes")
    return entries


def find_cameras(file: Path, info: Info) -> tuple[list[Camera], list[str]]:
    """The cameras that `features` declares, in its order, and a note for each that is left out: depth, or no pictures.

    A name is the key without `observation.images.`, or the whole key where two would be called the same.
    """
    cameras: list[Camera] = []
    notes: list[str] = []
    for key, feature in info.features.items():
        dtype, shape = str(feature.get("dtype")).lower(), feature.get("shape")
        sides = tuple(shape) if isinstance(shape, list) and all(isinstance(n, int) and n > 0 for n in shape) else ()
        about = [d for d in (feature, feature.get("info"), feature.get("video_info")) if isinstance(d, dict)]
        told = [(flag, str(d.get(flag)).lower()) for d in about for flag in ("video.is_depth_map", "is_depth_map")]
        signs = [flag for flag, value in told if value in ("true", "1")]
        if signs or "depth" in dtype:
            sign = signs[0] if signs else f"dtype {dtype!r}"
            notes.append(f"{file}: the camera {key!r} holds depth ({sign}); it is left out")
        elif dtype in ("video", "image") or (dtype == "uint8" and len(sides) == 3):
            if Path(key).is_absolute() or ".." in Path(key).parts or "\0" in key:
                raise FileError(f"{file}: the camera {key!r} has no name that can be part of a path")
            name = next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)
            cameras.append(Camera(key, re.sub(r"[^\w.-]", "_", name).lstrip("."), dtype == "video", sides, dtype))
        elif key.startswith("observation.image"):
            expected = "expected 'video', 'image', or 'uint8' of three axes; it is left out"
            notes.append(f"{file}: {key!r} is of dtype {dtype!r} and shape {list(sides)}, {expected}")
    alike = Counter(camera.name for camera in cameras)
    cameras = [
        camera if camera.name and alike[camera.name] == 1 else replace(camera, name=camera.key.replace("/", "."))
        for camera in cameras
    ]
    if len({camera.name for camera in cameras}) < len(cameras):
        raise FileError(f"{file}: the cameras {', '.join(camera.key for camera in cameras)} cannot be told apart by name")
    return cameras, notes


def own_split(info: Info, entries: Sequence[Entry]) -> tuple[dict[int, bool], list[str]]:
    """Episode number -> held out, where `splits` names ranges besides "train" that hold some of `entries`; else empty.

    "a:b" means the numbers a to b - 1. Numbers in no range are trained on. Also notes about what is doubtful or not used.
    """
    ranges: dict[str, set[int]] = {}
    unused = "the set's own split is not used, one is drawn"
    if not isinstance(info.splits or {}, dict):
        return {}, [f"meta/info.json: splits is {info.splits!r}, not ranges by name; {unused}"]
    for name, text in (info.splits or {}).items():
        match = re.fullmatch(r"\s*(\d{1,15})\s*:\s*(\d{1,15})\s*", str(text))
        if match is None:
            return {}, [f"meta/info.json: splits[{name!r}] is {text!r}, not 'first:end'; {unused}"]
        ranges[name] = {entry.number for entry in entries if int(match[1]) <= entry.number < int(match[2])}
    trained = set().union(*(ranges.pop(name) for name in list(ranges) if name.lower() in TRAINING))
    held = set().union(*ranges.values())
    free = sorted({entry.number for entry in entries} - trained - held)
    if held & trained:
        reason = f"overlap in episode {min(held & trained)}"
    elif len(held) == len(entries) or (ranges and not held):
        reason = f"leave no episode to {'train' if held else 'hold out'}"
    elif held:
        notes = [f"meta/info.json: splits {info.splits} do not name episode {free[0]}, which is trained on"] if free else []
        return {entry.number: entry.number in held for entry in entries}, notes
    elif info.splits and free:
        reason = f"do not name episode {free[0]}"
    else:
        return {}, []
    return {}, [f"meta/info.json: splits {info.splits} {reason}; {unused}"]


def names_of(columns: Sequence[str], features: Mapping[str, dict[str, Any]]) -> list[str]:
    """A name for each dimension of joined columns; none where a column has not one for each of its numbers."""
    joined: list[str] = []
    for feature in (features.get(key, {}) | {"key": key} for key in columns):
        names, shape = dimension_names(feature.get("names")) or [feature["key"]], feature.get("shape")
        if isinstance(shape, list) and all(isinstance(n, int) for n in shape) and math.prod(shape) != len(names):
            return []
        joined += names
    return joined


def dimension_names(names: Any, depth: int = 9) -> list[str]:
    """The `names` of a feature's dimensions, which sets write as a list, a nested list, an object of lists, or not at all."""
    if isinstance(names, dict):
        names = [one for one in names.values() if isinstance(one, (list, dict))] or list(names)
    if isinstance(names, list) and depth:
        return [name for one in names for name in dimension_names(one, depth - 1)]
    return [names] if isinstance(names, str) else []
