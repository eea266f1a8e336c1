"""What a LeRobot data set says about itself (v2.0, v2.1, v3.0): `meta/info.json`, its episodes, tasks, cameras and paths."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from svam.files import FileError, read_json, refuse_lfs_pointer
from svam.sources._lerobot_files import opened, read_rows, seconds, texts, whole_numbers

VERSIONS = ("v2.0", "v2.1", "v3.0")
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
_SIGNS = {
    "v2": ("meta/episodes.jsonl", "meta/tasks.jsonl", "data/chunk-*/episode_*.parquet", "videos/chunk-*/*/episode_*.mp4"),
    "v3": ("meta/episodes", "meta/tasks.parquet", "data/chunk-*/file-*.parquet", "videos/*/chunk-*/file-*.mp4"),
}
"""Files that only this version has."""
_NUMBERS = {"v2": ("episode_chunk", "episode_index"), "v3": ("chunk_index", "file_index")}
_CLIP_PARTS = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
_PLACEHOLDER = re.compile(r"\{(\w+)(?::0?(\d{0,2})d)?\}")
_PREFIXES = ("observation.images.", "observation.image.", "observation.")


@dataclass(frozen=True)
class Camera:
    """A camera as `info.json` declares it: the feature's `key`, the `name` given here, whether it is a `video`, the `shape` of
    its pictures, and the feature's `dtype`."""

    key: str
    name: str
    video: bool
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Clip:
    """The part of a v3 video file that belongs to one episode: numbers of its path, and seconds within the file."""

    chunk: int
    file: int
    start: float
    stop: float


@dataclass(frozen=True)
class Entry:
    """One episode as the metadata lists it.

    number: `episode_index`. steps: None where it is not said. tasks: its sentences. success: None where it is not said.
    chunk, file: of its parquet file (v3). clips: camera key -> `Clip` (v3).
    """

    number: int
    steps: int | None
    tasks: tuple[str, ...]
    success: bool | None = None
    chunk: int = 0
    file: int = 0
    clips: Mapping[str, Clip] = field(default_factory=dict)


@dataclass(frozen=True)
class Info:
    """The parts of `meta/info.json` that are needed. `major` is "v2" or "v3"; paths: "data"/"video" -> templates, in the
    order in which they are tried; notes: what of it is not believed."""

    version: str
    major: str
    fps: float
    chunks_size: int
    paths: Mapping[str, tuple[str, ...]]
    features: Mapping[str, Mapping[str, Any]]
    splits: Mapping[str, Any]
    robot: str
    total_episodes: int | None
    notes: tuple[str, ...]


def whole_number(value: Any, what: str, least: int = 0) -> int:
    """A JSON number that is whole and at least `least`; else `FileError` naming `what`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value != int(value):
        raise FileError(f"{what} is {value!r}, expected a whole number")
    if not least <= value < 2**53:
        raise FileError(f"{what} is {value!r}, expected {least} or more")
    return int(value)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file.

    Raises:
        FileError: the file is missing, or a line is no JSON object.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise FileError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    objects = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            refuse_lfs_pointer(file)
            raise FileError(f"{file}: line {number} is not valid JSON; the file is truncated or damaged") from None
        if not isinstance(value, dict):
            raise FileError(f"{file}: line {number} is a {type(value).__name__}, expected an object")
        objects.append(value)
    return objects


def read_info(root: Path) -> Info:
    """Read and check `meta/info.json`.

    Raises:
        FileError: no LeRobot data set, another version, or a field is missing or of the wrong kind.
    """
    if not root.is_dir():
        raise FileError(f"{root}: no such directory")
    file = root / "meta" / "info.json"
    if not file.is_file():
        raise FileError(f"{file}: no such file; {root} is no LeRobot data set (v2.0, v2.1 or v3.0)")
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise FileError(f"{file}: a {type(raw).__name__}, expected an object")
    version = raw.get("codebase_version")
    version = f"v{version.removeprefix('v')}" if isinstance(version, str) else version
    if version not in VERSIONS:
        raise FileError(f"{file}: codebase_version is {version!r}, this reader knows {', '.join(VERSIONS)}")
    major = version[:2]
    fps = raw.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not math.isfinite(fps) or fps <= 0:
        raise FileError(f"{file}: fps is {fps!r}, expected a positive number")
    features = raw.get("features")
    if not isinstance(features, dict) or not all(isinstance(feature, dict) for feature in features.values()):
        raise FileError(f"{file}: features is missing or no object of objects")
    paths, notes = {}, []
    for kind, standard in STANDARD_PATHS[major].items():
        given = raw.get(f"{kind}_path")
        if given is not None and not isinstance(given, str):
            raise FileError(f"{file}: {kind}_path is {given!r}, expected a path template")
        filled = fill(given, dict.fromkeys(_NUMBERS[major], 0) | {"video_key": "x"}) if given else standard
        if filled is None:
            notes.append(
                f"{file}: {kind}_path {given!r} cannot be filled in (a {major} path has {', '.join(_NUMBERS[major])} and, of a "
                f"video, video_key); LeRobot's own {standard!r} is taken instead"
            )
            given = None
        elif Path(filled).is_absolute() or ".." in Path(filled).parts:
            raise FileError(f"{file}: {kind}_path {given!r} leads out of the data set")
        paths[kind] = tuple(dict.fromkeys([given, standard] if given else [standard]))
    splits = raw.get("splits")
    total = raw.get("total_episodes")
    return Info(
        version, major, float(fps),
        whole_number(raw.get("chunks_size", 1000), f"{file}: chunks_size", 1),
        paths, features,
        splits if isinstance(splits, dict) else {},
        str(raw.get("robot_type") or "unknown"),
        None if total is None else whole_number(total, f"{file}: total_episodes"),
        tuple(notes),
    )  # fmt: skip


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
    held = sorted(entry.name for entry in islice(folder.iterdir(), 1000))
    name = folder.relative_to(root).as_posix() if folder.is_relative_to(root) else str(folder)
    lies = f"{'the folder' if name == '.' else name} holds {', '.join(held[:5]) or 'nothing'}{', ...' * (len(held) > 5)}"
    other = "v3" if major == "v2" else "v2"
    signs = [next(islice(root.glob(pattern), 1), None) for pattern in _SIGNS[other]]
    if files := [sign.relative_to(root).as_posix() for sign in signs if sign is not None]:
        lies += f"; {' and '.join(files[:2])} {'are' if len(files) > 1 else 'is'} of a {other} set: is codebase_version right?"
    return lies


def read_tasks(root: Path) -> dict[int, str] | None:
    """`task_index` -> sentence, from `meta/tasks.parquet` (the sentence is a column `task` or the pandas index) or
    `meta/tasks.jsonl`; None where there is neither.

    Raises:
        FileError: a number repeats, or a sentence is no text.
    """
    table, lines = root / "meta" / "tasks.parquet", root / "meta" / "tasks.jsonl"
    pairs: list[tuple[Any, Any]]
    if table.is_file():
        with opened(table) as parquet:
            names = parquet.schema_arrow.names
            column = next((name for name in ("task", "__index_level_0__", "index", "tasks") if name in names), None)
            if column is None or "task_index" not in names:
                raise FileError(f"{table}: columns {', '.join(names)}; expected task_index and task")
            rows = read_rows(parquet, ["task_index", column])
        numbers = whole_numbers(rows["task_index"], f"{table}: task_index").tolist()
        pairs = list(zip(numbers, texts(rows[column], f"{table}: {column}"), strict=True))
        file = table
    elif lines.is_file():
        pairs = [(row.get("task_index"), row.get("task")) for row in read_lines(lines)]
        file = lines
    else:
        return None
    tasks: dict[int, str] = {}
    for number, task in pairs:
        key = whole_number(number, f"{file}: task_index")
        if not isinstance(task, str):
            raise FileError(f"{file}: the task {key} is {task!r}, expected a sentence")
        if tasks.setdefault(key, task) != task:
            raise FileError(f"{file}: task_index {key} is there twice, as {tasks[key]!r} and {task!r}")
    return tasks


def _sentences(value: Any) -> tuple[str, ...]:
    """The `tasks` of an episode, as texts; anything else counts as not said."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(one, str) for one in values):
        return ()
    return tuple(dict.fromkeys(values))


def read_episodes(root: Path, info: Info, cameras: Sequence[Camera]) -> list[Entry]:
    """All episodes that the metadata lists, by number.

    Raises:
        FileError: a metadata file is missing or damaged, a number repeats, or a length is not positive.
    """
    if info.major == "v2":
        file = root / "meta" / "episodes.jsonl"
        if not file.is_file():
            raise FileError(f"{file}: no such file, which a {info.version} data set needs; {what_lies_there(root, file, 'v2')}")
        entries = [
            Entry(
                whole_number(row.get("episode_index"), f"{file}: episode_index"),
                None if row.get("length") is None else whole_number(row["length"], f"{file}: length", 1),
                _sentences(row.get("tasks", row.get("task"))),
                row.get("success") if isinstance(row.get("success"), bool) else None,
            )
            for row in read_lines(file)
        ]
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


def _episodes_of(file: Path, cameras: Sequence[Camera]) -> list[Entry]:
    """The episodes that one file of `meta/episodes` lists; statistics in it are not read."""
    with opened(file) as parquet:
        names = set(parquet.schema_arrow.names)

        def column(*spellings: str) -> str:
            name = next((spelling for spelling in spellings if spelling in names), None)
            if name is None:
                raise FileError(f"{file}: column {spellings[0]!r} is missing")
            return name

        plain = {
            "number": column("episode_index"), "steps": column("length"),
            "chunk": column("data/chunk_index", "data_chunk_index"), "file": column("data/file_index", "data_file_index"),
        }  # fmt: skip
        clips = {
            camera.key: [column(f"videos/{camera.key}/{part}") for part in _CLIP_PARTS]
            for camera in cameras if any(name.startswith(f"videos/{camera.key}/") for name in names)
        }  # fmt: skip
        more = [name for name in ("tasks", "success") if name in names]
        rows = read_rows(parquet, [*plain.values(), *(name for four in clips.values() for name in four), *more])
        tasks, success = (rows[name].to_pylist() if name in rows else None for name in ("tasks", "success"))
    values = {key: whole_numbers(rows[name], f"{file}: {name}", 0) for key, name in plain.items()}
    places = {
        key: (
            whole_numbers(rows[four[0]], f"{file}: {four[0]}", 0),
            whole_numbers(rows[four[1]], f"{file}: {four[1]}", 0),
            *(seconds(rows[name], f"{file}: {name}") for name in four[2:]),
        )
        for key, four in clips.items()
    }
    entries = []
    for row, number in enumerate(values["number"].tolist()):
        if values["steps"][row] < 1:
            raise FileError(f"{file}: length of episode {number} is {values['steps'][row]}, expected 1 or more")
        clip = {
            key: Clip(int(chunk[row]), int(index[row]), float(start[row]), float(stop[row]))
            for key, (chunk, index, start, stop) in places.items()
        }
        place = int(values["chunk"][row]), int(values["file"][row])
        reached = success[row] if success and isinstance(success[row], bool) else None
        said = _sentences(tasks[row]) if tasks else ()
        entries.append(Entry(number, int(values["steps"][row]), said, reached, *place, clip))
    return entries


def find_cameras(file: Path, info: Info) -> tuple[list[Camera], list[str]]:
    """The cameras that `features` declares, in its order, and a note for each that is left out: depth, or no pictures.

    A name is the key without `observation.images.`, or the whole key where two would be called the same.
    """
    keys, notes = [], []
    for key, feature in info.features.items():
        dtype, shape = str(feature.get("dtype")), _shape(feature)
        about = [d for d in (feature, feature.get("info"), feature.get("video_info")) if isinstance(d, dict)]
        flags = [flag for d in about for flag in ("video.is_depth_map", "is_depth_map") if d.get(flag)]
        if flags or "depth" in dtype:
            notes.append(
                f"{file}: the camera {key!r} holds depth ({flags[0] if flags else f'dtype {dtype!r}'}); it is left out"
            )
        elif dtype in ("video", "image") or (dtype == "uint8" and len(shape) == 3):
            if Path(key).is_absolute() or ".." in Path(key).parts or "\0" in key:
                raise FileError(f"{file}: the camera {key!r} has no name that can be part of a path")
            keys.append(key)
        elif key.startswith("observation.image"):
            notes.append(
                f"{file}: {key!r} is of dtype {dtype!r} and shape {list(shape)}, expected 'video', 'image', or 'uint8' of "
                "three axes; it is left out"
            )
    short = {}
    for key in keys:
        name = next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)
        short[key] = re.sub(r"[^\w.-]", "_", name).lstrip(".")
    names = {
        key: name if name and list(short.values()).count(name) == 1 else key.replace("/", ".") for key, name in short.items()
    }
    if len(set(names.values())) != len(names):
        raise FileError(f"{file}: the cameras {', '.join(keys)} cannot be told apart by name")
    dtypes = {key: str(info.features[key]["dtype"]) for key in keys}
    return [Camera(key, names[key], dtypes[key] == "video", _shape(info.features[key]), dtypes[key]) for key in keys], notes


def _shape(feature: Mapping[str, Any]) -> tuple[int, ...]:
    shape = feature.get("shape")
    return tuple(shape) if isinstance(shape, list) and all(isinstance(side, int) and side > 0 for side in shape) else ()


def own_split(info: Info, entries: Sequence[Entry]) -> tuple[dict[int, bool], list[str]]:
    """Episode number -> held out, where `splits` names ranges besides "train" that hold some of `entries`; else empty.

    "a:b" means the numbers a to b - 1. Numbers in no range are trained on. Also notes about what could not be used.
    """
    ranges: dict[str, set[int]] = {}
    unused = "the set's own split is not used, one is drawn"
    for name, text in info.splits.items():
        match = re.fullmatch(r"\s*(\d{1,15})\s*:\s*(\d{1,15})\s*", text) if isinstance(text, str) else None
        if match is None:
            return {}, [f"meta/info.json: splits[{name!r}] is {text!r}, not 'first:end'; {unused}"]
        first, end = int(match.group(1)), int(match.group(2))
        ranges[name] = {entry.number for entry in entries if first <= entry.number < end}
    trained = ranges.get("train", set())
    held = {number for name, members in ranges.items() if name != "train" for number in members}
    if both := sorted(held & trained):
        return {}, [f"meta/info.json: splits {dict(info.splits)} overlap in episode {both[0]}; {unused}"]
    if len(held) == len(entries) or (not held and set(ranges) - {"train"}):
        side = "train" if held else "hold out"
        return {}, [f"meta/info.json: splits {dict(info.splits)} leave no episode to {side}; {unused}"]
    return ({entry.number: entry.number in held for entry in entries} if held else {}), []


def dimension_names(feature: Mapping[str, Any] | None) -> list[str]:
    """The names of a feature's dimensions, which sets write as a list, a nested list, an object of lists, or not at all."""
    found: list[str] = []
    pending = [feature.get("names") if feature else None]
    while pending and len(found) < 10_000:
        value = pending.pop(0)
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            inner = [one for one in value.values() if isinstance(one, (list, dict))]
            pending[:0] = inner or list(value)
        elif isinstance(value, list):
            pending[:0] = value
    return found
