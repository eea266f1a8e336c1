"""LeRobotDataset v2.0, v2.1 and v3.0, read directly: parquet with pyarrow, video (H.264, AV1, ...) with PyAV.

Row t of an episode's parquet data holds the action that was taken at frame t (LeRobot's convention); frame t of a video is
the one nearest to the row's timestamp, less than half a frame away. A v3 file holds several episodes: where it has as many
frames as its episodes have rows, the lengths say where each begins, else `from_timestamp` of `meta/episodes`. Pictures may also
lie in the parquet files. Numbers become float32. Only the columns that are asked for are read, so columns that hold pickled
bytes stay as they are.

What real sets have and this reader copes with, each with a note: cameras that are declared but have no files (left out), path
templates that are wrong (LeRobot's own layout is tried next), pictures that are not where `dtype` says, boundaries that drift,
videos longer than their rows, lists that err about the file of rows, timestamps that begin late (see `find_frames`). Several
tasks an episode (`task_index` of its rows decides), no `frame_index`, whole numbers stored as floats and missing splits are
read without one. `episode_index`, lengths and tasks of the metadata are checked against the parquet rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence, Set
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svam.contract import EVERYTHING, VECTORS, Choice, Episode, EpisodeShape, FrameBlocks, Frozen, Segment, SourceDescription
from svam.errors import ParamsError
from svam.files import FileError, refuse_lfs_pointer, stamp
from svam.sources import _lerobot_files as files
from svam.sources import _lerobot_meta as meta
from svam.sources._choice import checked, chosen_cameras, own_task, segments_of
from svam.sources._lerobot_meta import Camera, Entry
from svam.sources._pictures import NoColourError, depth_doubts, without_it
from svam.sources._video import frames_at, probe

Columns = tuple[str, ...]
_OPTIONS = {"actions": "action", "expert_actions": "expert_action", "state": "state", "proprioception": "proprioception"}
"""Vector of an episode -> the option that names its columns."""
_DEFAULTS: dict[str, Columns] = {"action": ("action",), "proprioception": ("observation.state",)}
_PREFIX = "observation.images."
_TRIED = 20
"""Data files that are opened in search of a sound one."""


class Options(Frozen):
    """What `convert.options` may say; everything has a default that fits most sets.

    action: columns joined to the action, in this order ([]: the set has none). A column may hold one number or a vector.
    expert_action: columns joined to what the demonstrator wanted, where the executed action is another.
    proprioception: columns joined to what the robot knows of itself. state: columns joined to the full state.
        null stands for `action`: [action] and `proprioception`: [observation.state] where that is there.
    instruction_column: the column of task numbers (in `meta/tasks`; `subtask_index`: in `meta/subtasks`) or of sentences that
        decides; "tasks": the sentence of `meta/episodes` does. null: both `task_index` and `meta/episodes`, which must agree.
    frames: "timestamps" as above; "order": row t is frame t and timestamps are neither used nor stored. In a v3 file whose
        frames do not add up an episode's first frame is then the one at `from_timestamp`.
    """

    action: Columns | None = None
    expert_action: Columns = ()
    proprioception: Columns | None = None
    state: Columns = ()
    instruction_column: str | None = None
    frames: Literal["timestamps", "order"] = "timestamps"


@dataclass(frozen=True)
class _Rows:
    """An episode's files (`videos` by camera name), and what its rows `start` .. `stop` - 1 of `file` say, but for vectors and
    pictures. times: (n,) seconds, None where they are not used. fps: the rows a second of which frames are found."""

    file: Path
    videos: dict[str, Path]
    start: int
    stop: int
    times: NDArray[np.float64] | None
    fps: float
    task: str
    segments: tuple[Segment, ...]
    success: bool | None

    def __len__(self) -> int:
        return self.stop - self.start


class LerobotSource:
    """The episodes in the order of their numbers."""

    def __init__(self, path: Path, options: Options, choice: Choice = EVERYTHING) -> None:
        """Open the folder of a LeRobot data set (the one that holds `meta/`).

        Raises:
            FileError: no such data set, its metadata is damaged, or it has no pictures.
            ParamsError: a column or camera is named that is not there.
            MachineError: pyarrow is not installed.
        """
        self.root = Path(path)
        self.options, self.choice = options, choice
        self._info_file, self.info = meta.read_info(self.root)
        self._notes: list[str] = []
        self._cases: dict[str, dict[str, None]] = {}
        self._tasks_of: dict[int, str] = {}
        self._clips: dict[Path, tuple[list[float], dict[int, int]]] = {}
        declared = self._chosen_cameras()
        self._entries = meta.read_episodes(self.root, self.info, declared)
        self.names = [str(entry.number) for entry in self._entries]
        if (last := self.names[-1]) != str(len(self) - 1):
            called = f"in convert.episodes and drop it is {len(self) - 1}, or by name {last!r}"
            self._notes.append(f"{self.root}: some numbers are left out: the last episode has episode_index {last}; {called}")
        if self.info.total_episodes not in (None, len(self)):
            said = f"total_episodes is {self.info.total_episodes}, but the episode list has {len(self)}"
            self._notes.append(f"{self._info_file}: {said}")
        self._templates = {"data": self._right_template("data", [None]), "video": self._right_template("video", declared)}
        self._listed: dict[Path, set[int]] = {}
        for entry in (entry for entry in self._entries if self.info.major == "v3" and not entry.fault):
            self._listed.setdefault(self._path(entry), set()).add(entry.number)
        self._first_file, names = self._find_first_file()
        self.cameras = self._present_cameras(declared, names)
        self._look_at_pictures()
        self._held_out, notes = meta.own_split(self.info, self._entries)
        self._notes += notes + depth_doubts(camera.key for camera in self.cameras if not self.choice.cameras)
        self.columns = self._find_columns(names)
        self._needed = (*(camera.key for camera in self.cameras if not camera.video), *chain(*self.columns.values()))
        self._tasks = meta.read_tasks(self.root, self.info.major, self.options.instruction_column)

    @property
    def notes(self) -> Sequence[str]:
        """What is left out, mended or doubtful, of the set and of the episodes that `shape` has looked at."""
        more = {what: f", and {len(cases) - 1} more alike" * (len(cases) > 1) for what, cases in self._cases.items()}
        return [*self._notes, *(f"{next(iter(cases))}{more[what]}{what}" for what, cases in self._cases.items())]

    def _note(self, what: str, case: str) -> None:
        """Note a case (an episode or a file) of what may occur in many; the first one is told."""
        self._cases.setdefault(what, {})[case] = None

    # What is read

    def _chosen_cameras(self) -> list[Camera]:
        declared, notes = meta.find_cameras(self._info_file, self.info)
        by_name = {camera.name: camera for camera in declared}
        by_key = {camera.key: camera.name for camera in declared}
        if not self.choice.cameras:
            self._notes += notes
        try:
            return [by_name[name] for name in chosen_cameras(self.choice, list(by_name), self._info_file, _PREFIX, by_key)]
        except ParamsError as error:
            raise ParamsError("; ".join([str(error), *notes])) from None

    def _right_template(self, kind: str, cameras: Sequence[Camera | None]) -> str:
        """The path template of info.json; LeRobot's own where that leads to a file, and the other to none or to that of another
        episode or camera."""
        own = meta.STANDARD_PATHS[self.info.major][kind]
        given = getattr(self.info, f"{kind}_path") or own
        owners: dict[Path, tuple[Any, ...]] = {}
        for entry, camera in product(self._entries, cameras) if given != own else ():
            place, owner = self._path(entry, camera, given), (camera, self.info.major == "v2" and entry.number)
            other = (camera is None or camera.video) and owners.setdefault(place, owner) != owner
            if self._path(entry, camera, own).is_file() and (other or not place.is_file()):
                wrong = f"{self._info_file}: {kind}_path {given!r} does not lead to all files"
                self._notes.append(f"{wrong}; LeRobot's own {own!r} is taken instead")
                return own
            if other and place.is_file():
                raise FileError(
                    f"{self._info_file}: {kind}_path {given!r} leads to one file for several episodes or cameras, {place}, and "
                    f"LeRobot's own {own!r} to none; correct it, or name one camera in convert.cameras if it is of cameras"
                )
        return given

    def _find_first_file(self) -> tuple[Path, list[str]]:
        """The first data file that can be read, and its columns, which stand for all."""
        refused: FileError | None = None
        for file in islice(filter(Path.is_file, map(self._path, self._entries)), _TRIED):
            try:
                with files.opened(file) as parquet:
                    return file, list(parquet.schema_arrow.names)
            except FileError as error:
                refused = refused or error
        place = self._path(self._entries[0])
        lies = meta.what_lies_there(self.root, place, self.info.major)
        raise refused or FileError(f"{place}: no such file, nor that of any other episode; {lies}")

    def _present_cameras(self, declared: list[Camera], columns: list[str]) -> list[Camera]:
        """Those cameras that have videos or a column; the others are noted, or an error where they were asked for."""
        present: list[Camera] = []
        looked: list[str] = []
        for camera in declared:
            stored = camera.key in columns
            filmed = (camera.video or not stored) and self._first_video(camera) is not None
            if not stored and not filmed:
                where = self._where_looked(camera)
                if self.choice.cameras:
                    raise ParamsError(f"convert.cameras names {camera.name!r}, but {self.root} has no pictures of it: {where}")
                self._notes.append(f"{self._info_file} declares the camera {camera.key!r}, but {where}; it is left out")
                looked.append(f"{camera.key}: {where}")
                continue
            if filmed != camera.video:
                place = "in videos" if filmed else f"in a column of {self._first_file}"
                declares = f"{self._info_file}: {camera.key!r} is of dtype {camera.dtype!r}"
                self._notes.append(f"{declares}, but its pictures lie {place}, and are read from there")
            present.append(replace(camera, video=filmed))
        if not present:
            none = f"{self._info_file} declares no feature of dtype 'video', 'image', or 'uint8' of three axes"
            found = "; ".join([*meta.find_cameras(self._info_file, self.info)[1], *looked]) or none
            raise FileError(f"{self.root}: a data set without pictures cannot be converted; {found}")
        return present

    def _where_looked(self, camera: Camera) -> str:
        column = f"{self._first_file.relative_to(self.root)} has no column of that name"
        if self.info.major == "v3" and not any(camera.key in entry.clips for entry in self._entries):
            return f"{column}, and meta/episodes no columns videos/{camera.key}/..."
        path = self._path(self._entries[0], camera)
        lies = meta.what_lies_there(self.root, path, self.info.major)
        return f"{column}, and it has no video files: {path.relative_to(self.root)} is not there, {lies}"

    def _look_at_pictures(self) -> None:
        """At the first picture of each camera: one that holds no colours is named with the way to leave it out."""
        for camera in self.cameras:
            try:
                if camera.video and (video := self._first_video(camera)):
                    probe(video)
                else:
                    next(files.stored_pictures(self._first_file, self.root, camera.key, (0, 1), camera.shape))
            except NoColourError as error:
                others = [other.name for other in self.cameras if other is not camera]
                raise NoColourError(without_it(error, others)) from None
            except FileError:  # damage of one episode, which its `shape` or `read` names
                pass

    def _find_columns(self, names: list[str]) -> dict[str, list[str]]:
        """Vector name -> columns to join, checked against the first episode's file."""
        chosen: dict[str, list[str]] = {}
        for vector, option in _OPTIONS.items():
            asked: Columns | None = getattr(self.options, option)
            columns = _DEFAULTS[option] if asked is None else asked
            if missing := [column for column in columns if column not in names]:
                if asked is None and vector == "proprioception" and not any(n.startswith("observation.state") for n in names):
                    self._notes.append(f"{self._first_file}: no column 'observation.state': episodes have no proprioception")
                    continue
                like = sorted(name for name in names if name.startswith(("action", "observation.", "state", "expert")))
                raise ParamsError(
                    f"convert.options.{option}: column {missing[0]!r} is not in {self._first_file}, "
                    f"which has {', '.join(like or names)}; name those to join, in their order, or [] for none"
                )
            if columns:
                chosen[vector] = list(columns)
        column = self.options.instruction_column
        if column not in (None, "tasks", *names):
            raise ParamsError(f"convert.options.instruction_column: column {column!r} is not in {self._first_file}")
        return chosen

    # Where it lies

    def _path(self, entry: Entry, camera: Camera | None = None, template: str = "") -> Path:
        """Where an episode's data file, or the video of a camera, is said to lie."""
        return self.root / meta.place(self.info, entry, camera, template or self._templates["video" if camera else "data"])

    def _first_video(self, camera: Camera) -> Path | None:
        return next((path for entry in self._entries if (path := self._path(entry, camera)).is_file()), None)

    @cached_property
    def _by_rows(self) -> dict[int, Path]:
        return files.by_rows(self.root / "data", {entry.number for entry in self._entries})

    def _files(self, entry: Entry) -> tuple[Path, Set[int], dict[str, Path]]:
        """The data file of an episode (as its rows say where the list of a v3 set errs), the episodes listed in it, and
        camera name -> video; `FileError` that names all that are not there."""
        data = self._path(entry)
        listed = self._listed.get(data, set())
        if listed and not files.holds(data, entry.number, listed) and entry.number in self._by_rows:
            wrong = f"{self.root}: meta/episodes says {data.relative_to(self.root)} of episode {entry.number}"
            data, listed = self._by_rows[entry.number], {entry.number}
            self._note("; the rows decide", f"{wrong}, but its rows lie in {data.relative_to(self.root)}")
        videos = {camera.name: self._path(entry, camera) for camera in self.cameras if camera.video}
        needed = {data: str(data)} | {video: f"{video} (the video of camera {name!r})" for name, video in videos.items()}
        unsaid = [camera.key for camera in self.cameras if camera.video and camera.key not in entry.clips]
        if unsaid and self.info.major == "v3":
            raise FileError(f"{self.root}: meta/episodes names no video of {', '.join(unsaid)} for episode {entry.number}")
        if missing := [path for path in needed if not path.is_file()]:
            absent = f"{', '.join(needed[path] for path in missing)}: no such file"
            lies = meta.what_lies_there(self.root, missing[0], self.info.major)
            raise FileError(f"{absent}, though the metadata lists episode {entry.number}; {lies}")
        for path in needed:
            refuse_lfs_pointer(path)
        return data, listed, videos

    # What the rows say

    def _rows(self, index: int) -> _Rows:
        entry, asked = self._entries[index], self.options.instruction_column
        if entry.fault:
            raise FileError(entry.fault)
        file, listed, videos = self._files(entry)
        spoken = "task_index" if asked in (None, "tasks") else str(asked)
        small = ("timestamp", "frame_index", "next.success", spoken)
        start, table = files.episode_rows(file, entry.number, small, self._needed, listed)
        if entry.steps not in (None, len(table)):
            raise FileError(f"{file}: episode {entry.number} has {len(table)} rows, but the metadata says {entry.steps}")
        columns = dict(zip(table.column_names, table.columns, strict=True))
        numbered = columns.get("frame_index")
        if numbered is not None and (np.diff(files.whole_numbers(numbered, f"{file}: frame_index")) <= 0).any():
            raise FileError(f"{file}: frame_index of episode {entry.number} does not increase")
        times, fps = self._times(entry, file, columns.get("timestamp"))
        success = entry.success
        if success is None and "next.success" in columns:
            with suppress(FileError):  # it may be empty, and only `convert.success` needs it
                said = files.numbers(columns["next.success"], f"{file}: next.success")
                success = bool(said.any()) if np.isin(said, (0, 1)).all() else None  # NaN says nothing
        task, segments = self.choice.instruction or "", tuple[Segment, ...]()
        with suppress(FileError) if task else nullcontext():  # what is replaced need not be sound
            task, segments = self._task(index, file, columns.get(spoken))
        return _Rows(file, videos, start, start + len(table), times, fps, task, segments, success)

    def _times(self, entry: Entry, file: Path, column: Any) -> tuple[NDArray[np.float64] | None, float]:
        """The rows' timestamps in seconds, None where they are not used, and the rows a second of which frames are found."""
        order, fps, stated = self.options.frames == "order", self.info.fps, self.choice.rate_hz
        if column is None:
            return None, fps
        try:
            times = files.seconds(column, f"{file}: timestamp", dates=order)
        except FileError as error:
            if order:
                self._note(f"; nothing compares it with the rate, {stated or fps:g} Hz", str(error))
                return None, fps
            raise FileError(f"{error}; {files.BY_ORDER}") from None
        step = float(np.median(np.diff(times))) if len(times) > 1 else 1 / fps
        rate = stated or fps
        if len(times) > 1 and (off := abs(step * rate - 1)) > 0.04:
            says = "convert.rate_hz is" if stated else f"{self._info_file} says fps"
            apart = f"{file}: timestamps are {step:g} s apart in episode {entry.number}, but {says} {rate:g}"
            if off > 0.26 and not (order or stated):  # more than a quarter, whatever single precision makes of it
                hint = f"set convert.rate_hz to {1 / step:g} if the timestamps are right, or, " if 0.001 < step < 10 else ""
                raise FileError(f"{apart}; {hint}{files.BY_ORDER}")
            self._note(f"; it is stored at {rate:g} Hz" + ", which convert.rate_hz replaces" * (stated is None), apart)
        if not order and (np.diff(times) <= 0).any():
            raise FileError(f"{file}: timestamps of episode {entry.number} do not increase; {files.BY_ORDER}")
        if not order and times[0] >= 0.5 * step > 0 and any(camera.video for camera in self.cameras):
            what = "; where a video has as many frames as rows, row t takes frame t"
            self._note(what, f"{file}: timestamps begin at {times[0]:g} s")
        return None if order else times, 1 / step if stated and step > 0 else fps

    def _task(self, index: int, file: Path, column: Any) -> tuple[str, tuple[Segment, ...]]:
        """An episode's own sentence: the metadata's where it names one, else, or as the option says, that of its rows. And the
        parts that its rows have, where the choice asks for them."""
        entry, asked = self._entries[index], self.options.instruction_column
        segments: tuple[Segment, ...] = ()
        if asked == "tasks" and len(entry.tasks) > 1:
            raise FileError(f"{self.root}: meta/episodes lists {len(entry.tasks)} tasks for episode {entry.number}")
        own = entry.tasks[0] if len(entry.tasks) == 1 and asked in (None, "tasks") else None
        rows_say = asked != "tasks" and column is not None
        try:
            said = files.sentences(column, asked or "task_index", self._tasks, file) if rows_say else None
        except FileError as error:
            ways = "set convert.options.instruction_column to 'tasks' for the metadata's sentences"
            raise FileError(f"{error}; {ways}, or convert.instruction to one for all") from None
        if told := next((sentence.strip() for sentence in said or () if sentence.strip()), ""):
            segments = () if self.choice.instruction else segments_of(said or ())
            if segments and not self.choice.segments:
                raise FileError(
                    f"{file}: episode {entry.number} changes its task at row {segments[1].first} from {told!r} to "
                    f"{segments[1].sentences[0]!r}, expected one; set convert.segments to true to cut it there, "
                    f"convert.instruction to one for all, or leave it out: convert.drop: [{index}]"
                )
            if (own or "").strip() not in ("", told):
                raise FileError(
                    f"{file}: task_index says {told!r} for episode {entry.number}, but the metadata says {own!r}; set "
                    "convert.options.instruction_column to 'task_index' or to 'tasks', whichever is right"
                )
            own = told
        return own_task(self.choice, own, f"{self.root}: episode {entry.number}").strip(), segments

    # Where the frames lie

    def _span(self, entry: Entry, camera: Camera, video: Path) -> files.Span | None:
        """Where an episode lies in the video of a v3 set; None where it has a video of its own (v2)."""
        clip = entry.clips.get(camera.key)
        if clip is None:
            return None
        if video not in self._clips:
            place = clip.chunk_index, clip.file_index
            members = sorted(
                (other.from_timestamp, one.number, other.to_timestamp, one.steps or 0)
                for one in self._entries
                if (other := one.clips.get(camera.key)) and (other.chunk_index, other.file_index) == place
            )
            facts, believe = probe(video), self.options.frames == "order"
            first, note = files.first_frames(video, members, facts.frames, facts.rate or self.info.fps, believe)
            self._clips[video] = [*(start for start, *_ in members), np.inf], first
            if note:
                self._note("", note)
        starts, first = self._clips[video]
        end = starts[bisect_right(starts, clip.from_timestamp)]
        return files.Span(clip.from_timestamp, clip.to_timestamp, end, first.get(entry.number))

    def _place(self, entry: Entry, camera: Camera, rows: _Rows, cheaply: bool = False) -> tuple[NDArray[np.int64], float]:
        """The presentation times of the rows' frames, and by how much timestamps begin late. With `cheaply` no times where
        frames and rows are equally many and equally far apart, so that reading will find them."""
        video, times = rows.videos[camera.name], rows.times
        span, facts = self._span(entry, camera, video), probe(video)
        if facts.told:
            self._note(f": {facts.told}", str(video))
        count, part = facts.frames, ""
        if span is not None:
            count, part = round((span.stop - span.start) * (facts.rate or self.info.fps)), f" from {span.start:g} s on"
        if (span is None or span.first is None) and count > len(rows):
            say = "row t takes frame t" if times is None else "the timestamps say which frame belongs to a row"
            case = f"{video}: {count} frames{part}, but episode {entry.number} has {len(rows)} rows"
            self._note(f"; {say}, and pictures of other rows may lie there", case)
        equal = facts.frames == len(rows) if span is None else span.first is not None
        if equal and self.choice.rate_hz:  # then row t can only be frame t, at whatever rate the video plays
            times = None
        if times is not None and equal and facts.start - times[0] >= 0.5 / rows.fps:
            begins = f"{video}: its first frame is shown at {facts.start:g} s, but row 0 is at {times[0]:g} s"
            self._note("; row t takes frame t", begins)
        regular = times is None or (
            abs((facts.rate or rows.fps) / rows.fps - 1) < 0.02
            and (np.abs(times - times[0] - np.arange(len(rows)) / rows.fps) < 0.4 / rows.fps).all()
        )
        if cheaply and equal and regular:
            return np.zeros(0, np.int64), 0.0
        return files.find_frames(video, times, len(rows), rows.fps, span)

    # The source

    def describe(self) -> SourceDescription:
        """Rate, cameras, each sentence as a task of its own, and which columns were joined."""
        names = {vector: meta.names_of(columns, self.info.features) for vector, columns in self.columns.items()}
        for index in set(range(len(self))) - self._tasks_of.keys():
            with suppress(FileError):  # of an episode that cannot be read
                self._tasks_of[index] = self._rows(index).task
        tasks = (self._tasks_of[index] for index in sorted(self._tasks_of))
        return SourceDescription(
            rate_hz=self.choice.rate_hz or self.info.fps, cameras=[camera.name for camera in self.cameras],
            instructions={task: {"train": [self.choice.instruction or task], "held_out": []} for task in tasks},
            provenance={
                "source": "lerobot", "codebase_version": self.info.codebase_version,
                "robot_type": str(self.info.robot_type or "unknown"),
                "cameras": {camera.name: camera.key for camera in self.cameras},
                "columns": self.columns, "dimension_names": names, "options": self.options.model_dump(mode="json"),
            },
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, index: int) -> EpisodeShape:
        """What the metadata, the small columns of the rows, the videos' indices and an episode's first picture say."""
        entry, rows = self._entries[index], self._rows(index)
        self._tasks_of[index] = rows.task
        first = (rows.start, rows.start + 1)
        for camera in self.cameras:
            try:
                if camera.video:
                    self._place(entry, camera, rows, cheaply=True)
                elif done := next(files.stored_pictures(rows.file, self.root, camera.key, first, camera.shape))[1]:
                    self._note(f" {done}", f"{rows.file}: pictures of {camera.key!r}")
            except FileError as error:
                others = [other.name for other in self.cameras if other is not camera]
                raise FileError(without_it(error, others)) from None
        return EpisodeShape(
            len(rows), held_out=self._held_out.get(entry.number), name=self.names[index], task=rows.task,
            stamp="+".join(stamp(path) for path in (rows.file, *rows.videos.values())), success=rows.success,
            segments=rows.segments,
        )  # fmt: skip

    def read(self, index: int) -> Episode:
        """One episode."""
        entry, rows = self._entries[index], self._rows(index)
        with files.opened(rows.file, self._needed) as parquet:
            table = files.read_columns(parquet, [*chain(*self.columns.values())], rows.start, rows.stop)
        vectors = {
            name: files.joined(table, self.columns[name], rows.file, self.info.features) if name in self.columns else None
            for name in VECTORS
        }
        frames: dict[str, FrameBlocks] = {}
        late: dict[str, float] = {}
        for camera in self.cameras:
            if camera.video:
                video = rows.videos[camera.name]
                pts, delay = self._place(entry, camera, rows)
                frames[camera.name] = frames_at(video, probe(video), pts, len(rows))
                late |= {camera.name: delay} if delay else {}
            else:
                at = (rows.start, rows.stop)
                frames[camera.name] = files.stored_frames(rows.file, self.root, camera.key, at, camera.shape)
        episode = Episode(
            task=rows.task, instruction=self.choice.instruction or rows.task, frames=frames, timestamps=rows.times,
            rate_hz=self.choice.rate_hz or self.info.fps, annotations={}, **vectors,
            provenance={
                "file": rows.file.relative_to(self.root).as_posix(), "episode_index": entry.number,
                "timestamps_begin_late_s": late,
            },
        )  # fmt: skip
        return checked(episode, rows.file)


open_source = LerobotSource
