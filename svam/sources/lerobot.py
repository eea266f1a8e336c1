"""LeRobotDataset v2.0, v2.1 and v3.0, read directly: parquet with pyarrow, video (H.264, AV1, ...) with PyAV.

Row t of an episode's parquet data holds the action that was taken at frame t (LeRobot's convention); frame t of a video is
the one nearest to the row's timestamp, less than half a frame away. A v3 file holds several episodes: a video's part is the
span from_timestamp .. to_timestamp of `meta/episodes`. Pictures may also lie in the parquet files. Numbers become float32.
Only the columns that are asked for are read, so columns that hold pickled bytes stay as they are.

What real sets have and this reader copes with: cameras that are declared but have no files (left out, with a note), path
templates that are wrong (LeRobot's own layout is tried next, with a note), timestamps that begin late (see
`_lerobot_files.find_frames`), several tasks an episode (`task_index` of its rows decides), no `frame_index`, whole numbers
stored as floats, missing splits. `episode_index`, lengths and tasks of the metadata are checked against the parquet rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svam.contract import EVERYTHING, Choice, ContractError, Episode, EpisodeShape, FrameBlocks, Frozen, SourceDescription
from svam.errors import ParamsError
from svam.files import FileError, stamp
from svam.sources._lerobot_files import (
    StoredPictures,
    VideoFrames,
    episode_rows,
    find_frames,
    is_text,
    opened,
    read_rows,
    seconds,
    texts,
    vectors,
    whole_numbers,
)
from svam.sources._lerobot_meta import (
    Camera,
    Entry,
    dimension_names,
    fill,
    find_cameras,
    own_split,
    read_episodes,
    read_info,
    read_tasks,
)

Columns = tuple[str, ...]
_DEFAULTS: dict[str, Columns] = {"action": ("action",), "proprioception": ("observation.state",)}


class Options(Frozen):
    """What `convert.options` may say; everything has a default that fits most sets.

    action: columns joined to the action, in this order ([]: the set has none). A column may hold one number or a vector.
    expert_action: columns joined to what the demonstrator wanted, where the executed action is another.
    proprioception: columns joined to what the robot knows of itself. state: columns joined to the full state.
        null stands for `action`: [action] and `proprioception`: [observation.state] where that is there.
    cameras: which to read, by feature key or by name (the key without "observation.images."), the first is the foresight
        camera; []: all that have files.
    episodes: "first:end" reads the episode numbers first .. end - 1 only; "" all.
    instruction: one sentence for all episodes, for sets without tasks. "": the set's own.
    instruction_column: the column of task numbers (in `meta/tasks`) or of sentences.
    frames: "timestamps" as above; "order": row t is frame t and timestamps are neither used nor stored.
    """

    action: Columns | None = None
    expert_action: Columns = ()
    proprioception: Columns | None = None
    state: Columns = ()
    cameras: Columns = ()
    episodes: str = ""
    instruction: str = ""
    instruction_column: str = "task_index"
    frames: Literal["timestamps", "order"] = "timestamps"


@dataclass(frozen=True)
class _Item:
    """One episode to read, and its instruction."""

    entry: Entry
    instruction: str


class LerobotSource:
    """The episodes in the order of their numbers."""

    def __init__(self, path: Path, options: Options) -> None:
        """See `open_source`."""
        self.root = Path(path)
        self.options = options
        self.info = read_info(self.root)
        self._info_file = self.root / "meta" / "info.json"
        declared, self.notes = find_cameras(self._info_file, self.info)
        declared = self._asked_cameras(declared)
        entries = read_episodes(self.root, self.info, declared)
        if self.info.total_episodes not in (None, len(entries)):
            self.notes.append(
                f"{self._info_file}: total_episodes is {self.info.total_episodes}, but the episode list has {len(entries)}"
            )
        self._entries = self._asked_episodes(entries)
        self.cameras = self._present_cameras(declared)
        split, notes = own_split(self.info, self._entries)
        self._held_out = split
        self.notes += notes
        for entry in (self._entries[0], self._entries[-1]):
            file = self._data_file(entry)
            if file != self._candidates("data", entry)[0]:
                self.notes.append(
                    f"{self._info_file}: data_path {self.info.paths['data'][0]!r} does not lead to the file of episode "
                    f"{entry.number}; {file.relative_to(self.root)} is read instead"
                )
                break
        self.columns = self._find_columns()
        self._tasks = read_tasks(self.root)
        self._items = [_Item(entry, self._checked(entry, text)) for entry, text in self._instructions()]
        self._note_late_timestamps()

    # What is read

    def _asked_cameras(self, declared: list[Camera]) -> list[Camera]:
        if not self.options.cameras:
            return declared
        found = []
        for asked in self.options.cameras:
            camera = next((camera for camera in declared if asked in (camera.key, camera.name)), None)
            if camera is None:
                names = ", ".join(camera.name for camera in declared) or "none"
                raise ParamsError(f"convert.options.cameras names {asked!r}, but {self._info_file} declares {names}")
            if camera in found:
                raise ParamsError(f"convert.options.cameras names {asked!r} twice")
            found.append(camera)
        return found

    def _asked_episodes(self, entries: list[Entry]) -> list[Entry]:
        if not self.options.episodes:
            return entries
        match = re.fullmatch(r"(\d{1,15}):(\d{1,15})", self.options.episodes)
        if match is None:
            raise ParamsError(
                f"convert.options.episodes is {self.options.episodes!r}, expected 'first:end', for example '0:10'"
            )
        chosen = [entry for entry in entries if int(match.group(1)) <= entry.number < int(match.group(2))]
        if not chosen:
            raise ParamsError(
                f"convert.options.episodes is {self.options.episodes!r}, "
                f"but the numbers are {entries[0].number} to {entries[-1].number}"
            )
        return chosen

    def _present_cameras(self, declared: list[Camera]) -> list[Camera]:
        """Those cameras that have a file or a column; the others are noted, or an error where they were asked for."""
        columns: set[str] = set()
        if any(not camera.video for camera in declared):
            with opened(self._data_file(self._entries[0])) as parquet:
                columns = set(parquet.schema_arrow.names)
        present = []
        for camera in declared:
            if camera.key in columns if not camera.video else any(self._video(entry, camera) for entry in self._entries):
                present.append(camera)
                continue
            lacking = "has no video files" if camera.video else "has no column"
            if self.options.cameras:
                raise ParamsError(f"convert.options.cameras names {camera.name!r}, but it {lacking} in {self.root}")
            self.notes.append(f"{self._info_file} declares the camera {camera.key!r}, which {lacking}; it is left out")
        if not present:
            names = ", ".join(camera.key for camera in declared)
            raise FileError(
                f"{self.root}: {f'the declared cameras {names} have no files' if names else 'no camera is declared'}; "
                "a data set without pictures cannot be converted"
            )
        return present

    def _find_columns(self) -> dict[str, list[str]]:
        """Vector name -> columns to join, checked against the first episode's file."""
        file = self._data_file(self._entries[0])
        with opened(file) as parquet:
            names = list(parquet.schema_arrow.names)
        found: dict[str, list[str]] = {}
        for vector, option in (
            ("actions", "action"), ("expert_actions", "expert_action"), ("state", "state"), ("proprioception", "proprioception")
        ):  # fmt: skip
            asked: Columns | None = getattr(self.options, option)
            columns = _DEFAULTS[option] if asked is None else asked
            missing = [column for column in columns if column not in names]
            if missing:
                like = sorted(name for name in names if name.startswith(("action", "observation.", "state", "expert")))
                if (
                    asked is None
                    and option == "proprioception"
                    and not any(name.startswith("observation.state") for name in names)
                ):
                    self.notes.append(f"{file}: column 'observation.state' is missing; the episodes have no proprioception")
                    continue
                raise ParamsError(
                    f"convert.options.{option}: column {missing[0]!r} is not in {file}, "
                    f"which has {', '.join(like or names)}; "
                    "name those to join, in their order, or [] for none"
                )
            if columns:
                found[vector] = list(columns)
        return found

    # Where it lies

    def _candidates(self, kind: str, entry: Entry, camera: Camera | None = None) -> list[Path]:
        """The paths of a data or video file, the one that info.json states first."""
        values: dict[str, int | str] = {"video_key": camera.key if camera else ""}
        if self.info.major == "v2":
            values |= {"episode_index": entry.number, "episode_chunk": entry.number // self.info.chunks_size}
        else:
            clip = entry.clips.get(camera.key) if camera else None
            values |= {"chunk_index": clip.chunk if clip else entry.chunk, "file_index": clip.file if clip else entry.file}
        return [self.root / fill(self._info_file, template, values) for template in self.info.paths[kind]]

    def _data_file(self, entry: Entry) -> Path:
        paths = self._candidates("data", entry)
        file = next((path for path in paths if path.is_file()), None)
        if file is None:
            raise FileError(f"{' and '.join(map(str, paths))}: no such file, though the metadata lists episode {entry.number}")
        return file

    def _video(self, entry: Entry, camera: Camera) -> Path | None:
        if self.info.major == "v3" and camera.key not in entry.clips:
            return None
        return next((path for path in self._candidates("video", entry, camera) if path.is_file()), None)

    # What is said

    def _instructions(self) -> list[tuple[Entry, str | None]]:
        """Each episode with its sentence: the option's, the metadata's where it names one, else that of its rows."""
        if self.options.instruction:
            return [(entry, self.options.instruction) for entry in self._entries]
        found: dict[int, str | None] = {}
        by_file: dict[Path, list[Entry]] = {}
        for entry in self._entries:
            if len(entry.tasks) == 1 and self.options.instruction_column == "task_index":
                found[entry.number] = entry.tasks[0]
            else:
                by_file.setdefault(self._data_file(entry), []).append(entry)
        column = self.options.instruction_column
        for file, members in by_file.items():
            with opened(file) as parquet:
                if column not in parquet.schema_arrow.names:
                    if column != "task_index":
                        raise ParamsError(f"convert.options.instruction_column: column {column!r} is not in {file}")
                    found |= dict.fromkeys(entry.number for entry in members)
                    continue
                bounds = {entry.number: episode_rows(parquet, file, entry.number, self.info.major == "v2") for entry in members}
                values = read_rows(parquet, [column], 0, parquet.metadata.num_rows)[column]
                for number, (start, stop) in bounds.items():
                    found[number] = self._spoken(values.slice(start, stop - start), file, number)
        return [(entry, found[entry.number]) for entry in self._entries]

    def _spoken(self, column: Any, file: Path, number: int) -> str | None:
        """The one sentence of an episode's rows; None where there is no table of tasks."""
        name = self.options.instruction_column
        said: list[Any]
        if is_text(column):
            said = texts(column, f"{file}: {name}")
        elif self._tasks is None:
            return None
        else:
            said = whole_numbers(column, f"{file}: {name}").tolist()
            unknown = [value for value in said if value not in self._tasks]
            if unknown:
                raise FileError(f"{file}: {name} is {unknown[0]}, which meta/tasks does not list")
            said = [self._tasks[value] for value in said]
        row = next((row for row, value in enumerate(said) if value != said[0]), None)
        if row is not None:
            raise FileError(
                f"{file}: episode {number} changes its task at row {row} from {said[0]!r} to {said[row]!r}, expected one; "
                "set convert.options.instruction, or leave it out by convert.options.episodes"
            )
        return str(said[0])

    def _checked(self, entry: Entry, text: str | None) -> str:
        if text is None or not text.strip():
            found = "has no task" if text is None else "has an empty task"
            raise FileError(f"{self.root}: episode {entry.number} {found}; set convert.options.instruction to a sentence")
        return text.strip()

    def _note_late_timestamps(self) -> None:
        if self.options.frames == "order" or not any(camera.video for camera in self.cameras):
            return
        file = self._data_file(self._entries[0])
        with opened(file) as parquet:
            if "timestamp" not in parquet.schema_arrow.names:
                return
            start, _ = episode_rows(parquet, file, self._entries[0].number, self.info.major == "v2")
            first = seconds(read_rows(parquet, ["timestamp"], start, start + 1)["timestamp"], f"{file}: timestamp")[0]
        if first >= 0.5 / self.info.fps:
            self.notes.append(
                f"{file}: timestamps begin at {first:g} s; where a video has as many frames as rows, row t takes frame t"
            )

    # The source

    def describe(self) -> SourceDescription:
        """Rate, cameras, each sentence as a task of its own, and which columns were joined."""
        names = {
            vector: [name for column in columns for name in (dimension_names(self.info.features.get(column)) or [column])]
            for vector, columns in self.columns.items()
        }
        return SourceDescription(
            rate_hz=self.info.fps, cameras=[camera.name for camera in self.cameras],
            instructions={item.instruction: {"train": [item.instruction], "held_out": []} for item in self._items},
            provenance={
                "source": "lerobot", "codebase_version": self.info.version, "robot_type": self.info.robot,
                "cameras": {camera.name: camera.key for camera in self.cameras},
                "columns": self.columns, "dimension_names": names, "options": self.options.model_dump(mode="json"),
            },
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._items)

    def shape(self, index: int) -> EpisodeShape:
        """Length by the metadata, or by the parquet file where that does not say it."""
        entry = self._items[index].entry
        file = self._data_file(entry)
        steps = entry.steps
        if steps is None:
            with opened(file) as parquet:
                start, stop = episode_rows(parquet, file, entry.number, self.info.major == "v2")
            steps = stop - start
        videos = [path for camera in self.cameras if camera.video and (path := self._video(entry, camera))]
        return EpisodeShape(
            steps, held_out=self._held_out.get(entry.number), stamp="+".join(stamp(path) for path in (file, *videos))
        )

    def read(self, index: int) -> Episode:
        """One episode; its frames are decoded when they are asked for.

        Raises:
            FileError: a file is missing or damaged, lacks a column, or does not agree with the metadata.
            ContractError: the episode breaks the contract.
        """
        item = self._items[index]
        entry, file = item.entry, self._data_file(item.entry)
        with opened(file) as parquet:
            start, stop = episode_rows(parquet, file, entry.number, self.info.major == "v2")
            rows = stop - start
            if entry.steps not in (None, rows):
                raise FileError(f"{file}: episode {entry.number} has {rows} rows, but the metadata says {entry.steps}")
            if not rows:
                raise FileError(f"{file}: episode {entry.number} has no rows")
            names = set(parquet.schema_arrow.names)
            wanted = [column for columns in self.columns.values() for column in columns]
            missing = [column for column in wanted if column not in names]
            if missing:
                raise FileError(f"{file}: column {missing[0]!r} is missing, which the first episode has")
            column = self.options.instruction_column
            extra = [name for name in ("timestamp", "frame_index", column) if name in names]
            table = read_rows(parquet, list(dict.fromkeys([*wanted, *extra])), start, stop)
        spoken = self._spoken(table[column], file, entry.number) if column in table and not self.options.instruction else None
        if spoken is not None and spoken.strip() != item.instruction:
            raise FileError(
                f"{file}: {column} says {spoken!r} for episode {entry.number}, but the metadata says {item.instruction!r}; "
                "set convert.options.instruction"
            )
        if "frame_index" in table and (np.diff(whole_numbers(table["frame_index"], f"{file}: frame_index")) <= 0).any():
            raise FileError(f"{file}: frame_index of episode {entry.number} does not increase")
        times = seconds(table["timestamp"], f"{file}: timestamp") if "timestamp" in table else None
        times = None if self.options.frames == "order" else times
        if times is not None and rows > 1:
            step = float(np.median(np.diff(times)))
            if abs(step * self.info.fps - 1) > 0.25:
                raise FileError(
                    f"{file}: timestamps are {step:g} s apart in episode {entry.number}, info.json: fps {self.info.fps:g}"
                )
        frames, late = self._frames(entry, file, (start, stop), times)
        joined = {name: _joined(file, table, columns) for name, columns in self.columns.items()}
        episode = Episode(
            task=item.instruction, instruction=item.instruction, rate_hz=self.info.fps, frames=frames, timestamps=times,
            actions=joined.get("actions"), expert_actions=joined.get("expert_actions"),
            state=joined.get("state"), proprioception=joined.get("proprioception"),
            provenance={
                "file": file.relative_to(self.root).as_posix(), "episode_index": entry.number,
                "timestamps_begin_late_s": late,
            },
        )  # fmt: skip
        try:
            episode.check()
        except ContractError as error:
            raise ContractError(f"{file}: {error}") from None
        return episode

    def _frames(
        self, entry: Entry, file: Path, bounds: tuple[int, int], times: NDArray[np.float64] | None
    ) -> tuple[dict[str, FrameBlocks], dict[str, float]]:
        """Camera name -> frames of the rows `bounds`, and for videos by how much the timestamps begin late."""
        frames: dict[str, FrameBlocks] = {}
        late: dict[str, float] = {}
        rows = bounds[1] - bounds[0]
        for camera in self.cameras:
            pictures: StoredPictures | VideoFrames
            if camera.video:
                video = self._video(entry, camera)
                if video is None:
                    path = self._candidates("video", entry, camera)[0]
                    raise FileError(f"{path}: no such file, the video of camera {camera.name!r} in episode {entry.number}")
                clip = entry.clips.get(camera.key)
                pictures, shift = find_frames(video, times, rows, self.info.fps, (clip.start, clip.stop) if clip else None)
                if shift:
                    late[camera.name] = shift
                height, width = pictures.size
            else:
                pictures = StoredPictures(file, self.root, camera.key, *bounds)
                height, width = pictures.size()
            frames[camera.name] = FrameBlocks((rows, height, width, 3), pictures.blocks)
        return frames, late


def _joined(file: Path, table: dict[str, Any], columns: Sequence[str]) -> NDArray[np.float32]:
    """(n, d) float32: the columns side by side."""
    parts = [vectors(table[column], f"{file}: column {column!r}") for column in columns]
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, which the episode's check names
        return np.concatenate(parts, axis=1).astype(np.float32)


def open_source(path: Path, options: Options, choice: Choice = EVERYTHING) -> LerobotSource:
    """Open the folder of a LeRobot data set (the one that holds `meta/`).

    Raises:
        FileError: no such data set, its metadata is damaged, or it has no pictures or no instructions.
        ParamsError: an option names a column, camera or episode that is not there.
        MachineError: pyarrow is not installed.
    """
    return LerobotSource(path, options)
