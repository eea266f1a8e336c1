"""What a LeRobot data set says about itself (v2.0, v2.1, v3.0): `meta/info.json`, its episodes, tasks, cameras and paths."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, ValidationError

from svam.errors import describe
from svam.files import FileError, read_json, refuse_lfs_pointer
from svam.sources._choice import contents
from svam.sources._lerobot_files import opened, read_rows

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
_NUMBERS = {"v2": ("episode_chunk", "episode_index"), "v3": ("chunk_index", "file_index")}
_SIGNS = {"v2": ("meta/episodes.jsonl", "meta/tasks.jsonl"), "v3": ("meta/episodes", "meta/tasks.parquet")}
"""What only this version has."""
_PLACEHOLDER = re.compile(r"\{(\w+)(?::0?(\d{0,2})d)?\}")
_PREFIXES = ("observation.images.", "observation.image.", "observation.")


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=0, lt=2**53)]
_Positive = Annotated[_Whole, Field(ge=1)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


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
    """One episode as the metadata lists it. steps, success: None where it is not said. chunk, file: of its parquet file (v3).
    clips: camera key -> `Clip` (v3)."""

    number: _Whole = Field(alias="episode_index")
    steps: _Positive | None = Field(None, alias="length")
    tasks: Annotated[tuple[str, ...], BeforeValidator(_sentences)] = Field((), validation_alias=AliasChoices("tasks", "task"))
    success: Annotated[bool | None, BeforeValidator(lambda value: value if isinstance(value, bool) else None)] = None
    chunk: _Whole = Field(0, validation_alias=AliasChoices("data/chunk_index", "data_chunk_index"))
    file: _Whole = Field(0, validation_alias=AliasChoices("data/file_index", "data_file_index"))
    clips: dict[str, Clip] = {}


class Info(BaseModel):
    """The parts of `meta/info.json` that are needed."""

    codebase_version: Literal["v2.0", "v2.1", "v3.0"]
    fps: Annotated[_Number, Field(gt=0)]
    features: dict[str, dict[str, Any]]
    chunks_size: _Positive = 1000
    data_path: str | None = None
    video_path: str | None = None
    splits: Any = None
    robot_type: Any = None
    total_episodes: _Whole | None = None

    @property
    def major(self) -> str:
        """ "v2" or "v3"."""
        return self.codebase_version[:2]


class _Task(BaseModel):
    task_index: _Whole
    task: str


Model = TypeVar("Model", bound=BaseModel)


def _stated(model: type[Model], values: Any, file: Path) -> Model:
    """What a file states, as `model`; else `FileError` about its first fault."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise FileError(describe(error, file).partition("\n")[0]) from None


def _read_lines(file: Path) -> Iterator[Any]:
    """The values of a JSON-lines file."""
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


def read_info(root: Path) -> tuple[Info, dict[str, list[str]], list[str]]:
    """`meta/info.json`; "data"/"video" -> path templates, in the order in which they are tried; notes.

    Raises:
        FileError: no LeRobot data set, another version, or a field is missing or of the wrong kind.
    """
    if not root.is_dir():
        raise FileError(f"{root}: no such directory")
    file = root / "meta" / "info.json"
    if not file.is_file():
        raise FileError(f"{file}: no such file; {root} is no LeRobot data set (v2.0, v2.1 or v3.0)")
    info = _stated(Info, read_json(file), file)
    paths, notes = {}, []
    for kind, standard in STANDARD_PATHS[info.major].items():
        given = getattr(info, f"{kind}_path") or standard
        filled = fill(given, dict.fromkeys(_NUMBERS[info.major], 0) | {"video_key": "x"})
        if filled is None:
            notes.append(
                f"{file}: {kind}_path {given!r} cannot be filled in (a {info.major} path has "
                f"{', '.join(_NUMBERS[info.major])} and, of a video, video_key); LeRobot's own {standard!r} is taken instead"
            )
        elif Path(filled).is_absolute() or ".." in Path(filled).parts:
            raise FileError(f"{file}: {kind}_path {given!r} leads out of the data set")
        paths[kind] = list(dict.fromkeys([standard if filled is None else given, standard]))
    return info, paths, notes


def fill(template: str, values: Mapping[str, int | str]) -> str | None:
    """A path template with its placeholders replaced, as `str.format` does for `{name}` and `{name:06d}`; nothing else of
    `str.format` is understood, because the template is data. None where it holds anything else in braces."""

    def replaced(match: re.Match[str]) -> str:
        value, digits = values.get(match.group(1), "{"), match.group(2)
        return f"{value:0{int(digits)}d}" if digits and isinstance(value, int) else str(value)

    filled = _PLACEHOLDER.sub(replaced, template)
    return None if re.search(r"[{}\0]", filled) else filled


def what_lies_there(root: Path, path: Path, major: str) -> str:
    """For a file that is missing: what its nearest folder holds, and which files are of the other version's layout."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    lies = f"{'the folder' if folder == root else folder.relative_to(root)} holds {contents(folder)}"
    other = "v3" if major == "v2" else "v2"
    files = [sign for sign in _SIGNS[other] if (root / sign).exists()]
    verb = "are" if len(files) > 1 else "is"
    return f"{lies}; {' and '.join(files)} {verb} of a {other} set: is codebase_version right?" if files else lies


def read_tasks(root: Path) -> dict[int, str] | None:
    """`task_index` -> sentence, from `meta/tasks.parquet` (the sentence is a column `task` or the pandas index) or
    `meta/tasks.jsonl`; None where there is neither.

    Raises:
        FileError: a number repeats, or a sentence is no text.
    """
    file = root / "meta" / "tasks.parquet"
    rows: list[Any]
    if file.is_file():
        with opened(file) as parquet:
            names = parquet.schema_arrow.names
            sentence = "task" if "task" in names else "__index_level_0__"
            if not {sentence, "task_index"} <= set(names):
                raise FileError(f"{file}: columns {', '.join(names)}; expected task_index and task")
            columns = read_rows(parquet, ["task_index", sentence])
            pairs = zip(*(columns[name].to_pylist() for name in ("task_index", sentence)), strict=True)
            rows = [{"task_index": number, "task": task} for number, task in pairs]
    elif (file := root / "meta" / "tasks.jsonl").is_file():
        rows = list(_read_lines(file))
    else:
        return None
    tasks: dict[int, str] = {}
    for row in rows:
        line = _stated(_Task, row, file)
        if tasks.setdefault(line.task_index, line.task) != line.task:
            raise FileError(
                f"{file}: task_index {line.task_index} is there twice, as {tasks[line.task_index]!r} and {line.task!r}"
            )
    return tasks


def read_episodes(root: Path, info: Info, cameras: Sequence[Camera]) -> list[Entry]:
    """All episodes that the metadata lists, by number.

    Raises:
        FileError: a metadata file is missing or damaged, a number repeats, or a length is not positive.
    """
    if info.major == "v2":
        file = root / "meta" / "episodes.jsonl"
        if not file.is_file():
            lies = what_lies_there(root, file, "v2")
            raise FileError(f"{file}: no such file, which a {info.codebase_version} data set needs; {lies}")
        entries = [_stated(Entry, row, file) for row in _read_lines(file)]
    else:
        file = root / "meta" / "episodes"
        files = sorted(file.rglob("*.parquet"))
        if not files:
            lies = what_lies_there(root, file / "chunk-000", "v3")
            raise FileError(f"{file}: no parquet file in it, which a v3.0 data set needs; {lies}")
        entries = [entry for one in files for entry in _episodes_of(one, cameras)]
    entries.sort(key=lambda entry: entry.number)
    for before, after in pairwise(entries):
        if before.number == after.number:
            raise FileError(f"{file}: episode_index {after.number} is there twice")
    if not entries:
        raise FileError(f"{file}: lists no episodes")
    return entries


def _episodes_of(file: Path, cameras: Sequence[Camera]) -> Iterator[Entry]:
    """The episodes that one file of `meta/episodes` lists; statistics in it are not read."""
    plain = ["episode_index", "length", "tasks", "success", *(f"data{s}{n}_index" for s in "/_" for n in ("chunk", "file"))]
    clips = {camera.key: {part: f"videos/{camera.key}/{part}" for part in Clip.model_fields} for camera in cameras}
    with opened(file) as parquet:
        there = set(parquet.schema_arrow.names)
        names = [name for name in (*plain, *(name for parts in clips.values() for name in parts.values())) if name in there]
        rows = {name: column.to_pylist() for name, column in read_rows(parquet, names).items()}
    for name in ("episode_index", "length"):
        if name not in rows:
            raise FileError(f"{file}: column {name!r} is missing")
    for values in zip(*rows.values(), strict=True):
        row = dict(zip(rows, values, strict=True))
        row["clips"] = {
            key: {part: row[name] for part, name in parts.items() if name in row}
            for key, parts in clips.items() if not there.isdisjoint(parts.values())
        }  # fmt: skip
        yield _stated(Entry, row, file)


def find_cameras(file: Path, info: Info) -> tuple[list[Camera], list[str]]:
    """The cameras that `features` declares, in its order, and a note for each that is left out: depth, or no pictures.

    A name is the key without `observation.images.`, or the whole key where two would be called the same.
    """
    short: dict[str, str] = {}
    notes = []
    for key, feature in info.features.items():
        dtype, shape = str(feature.get("dtype")), _shape(feature)
        about = [d for d in (feature, feature.get("info"), feature.get("video_info")) if isinstance(d, dict)]
        flags = [flag for d in about for flag in ("video.is_depth_map", "is_depth_map") if d.get(flag)]
        if flags or "depth" in dtype:
            sign = flags[0] if flags else f"dtype {dtype!r}"
            notes.append(f"{file}: the camera {key!r} holds depth ({sign}); it is left out")
        elif dtype in ("video", "image") or (dtype == "uint8" and len(shape) == 3):
            if Path(key).is_absolute() or ".." in Path(key).parts or "\0" in key:
                raise FileError(f"{file}: the camera {key!r} has no name that can be part of a path")
            name = next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)
            short[key] = re.sub(r"[^\w.-]", "_", name).lstrip(".")
        elif key.startswith("observation.image"):
            expected = "expected 'video', 'image', or 'uint8' of three axes; it is left out"
            notes.append(f"{file}: {key!r} is of dtype {dtype!r} and shape {list(shape)}, {expected}")
    unique = {name for name in short.values() if name and list(short.values()).count(name) == 1}
    names = {key: name if name in unique else key.replace("/", ".") for key, name in short.items()}
    if len(set(names.values())) != len(names):
        raise FileError(f"{file}: the cameras {', '.join(names)} cannot be told apart by name")
    features = {key: info.features[key] for key in names}
    cameras = [Camera(key, names[key], f["dtype"] == "video", _shape(f), f["dtype"]) for key, f in features.items()]
    return cameras, notes


def _shape(feature: Mapping[str, Any]) -> tuple[int, ...]:
    shape = feature.get("shape")
    return tuple(shape) if isinstance(shape, list) and all(isinstance(side, int) and side > 0 for side in shape) else ()


def own_split(info: Info, entries: Sequence[Entry]) -> tuple[dict[int, bool], list[str]]:
    """Episode number -> held out, where `splits` names ranges besides "train" that hold some of `entries`; else empty.

    "a:b" means the numbers a to b - 1. Numbers in no range are trained on. Also notes about what could not be used.
    """
    ranges: dict[str, set[int]] = {}
    unused = "the set's own split is not used, one is drawn"
    for name, text in (info.splits if isinstance(info.splits, dict) else {}).items():
        match = re.fullmatch(r"\s*(\d{1,15})\s*:\s*(\d{1,15})\s*", str(text))
        if match is None:
            return {}, [f"meta/info.json: splits[{name!r}] is {text!r}, not 'first:end'; {unused}"]
        ranges[name] = {entry.number for entry in entries if int(match[1]) <= entry.number < int(match[2])}
    trained = ranges.pop("train", set())
    held = set().union(*ranges.values())
    reason = ""
    if both := sorted(held & trained):
        reason = f"overlap in episode {both[0]}"
    elif len(held) == len(entries) or (ranges and not held):
        reason = f"leave no episode to {'train' if held else 'hold out'}"
    if reason:
        return {}, [f"meta/info.json: splits {info.splits} {reason}; {unused}"]
    return {entry.number: entry.number in held for entry in entries} if held else {}, []


def dimension_names(feature: Mapping[str, Any] | None) -> list[str]:
    """The names of a feature's dimensions, which sets write as a list, a nested list, an object of lists, or not at all."""
    names: list[str] = []
    pending = [feature.get("names") if feature else None]
    while pending and len(names) < 10_000:
        value = pending.pop(0)
        if isinstance(value, str):
            names.append(value)
        elif isinstance(value, dict):
            pending[:0] = [one for one in value.values() if isinstance(one, (list, dict))] or list(value)
        elif isinstance(value, list):
            pending[:0] = value
    return names
