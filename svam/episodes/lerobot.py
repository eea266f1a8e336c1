"""A LeRobotDataset v3.0 of episodes, as LeRobot itself lays it out: parquet with pyarrow, H.264 in mp4 with PyAV.

`data/` has a row a time step, `videos/<camera>/` the frames of one episode after the other (every second one a keyframe, as
LeRobot writes them, so that single frames are found fast), `meta/` what LeRobot reads first, with statistics of all episodes
together and of each. Files end at the sizes that LeRobot has by default. Equal episodes are equal bytes. Memory is constant.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.console import track
from svam.contract import VECTORS, Episode, Frames, frame_blocks
from svam.episodes.export import Recording
from svam.episodes.lossy import PictureError, stated_error
from svam.episodes.statistics import Summary, summary
from svam.errors import MachineError, ParamsError
from svam.files import FileError, whole_directory, write_json
from svam.films import Film
from svam.sources._lerobot_files import numbers, opened
from svam.sources._lerobot_meta import STANDARD_PATHS, fill
from svam.sources.lerobot import LerobotSource, Options

COLUMNS = {
    "actions": "action", "proprioception": "observation.state", "state": "observation.environment_state",
    "expert_actions": "expert_action",
}  # fmt: skip
"""Vector of an episode -> its column, by LeRobot's name where it has one."""
RECORDED = "recorded_timestamp"
"""Column of the timestamps as they were recorded, float64 seconds: LeRobot's own are evenly spaced, and begin at 0."""
CAMERA = "observation.images."
PATHS = {**STANDARD_PATHS["v3"], "episodes": "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"}
CHUNK, TABLE_MB, FILM_MB = 1000, 100, 200
"""Files in a chunk, and MiB at which a parquet file and a film end: LeRobot's own."""
WAITING = 100
"""Episodes whose metadata wait in memory to be a row group."""
CHECKED = 32
"""Most episodes that are read again."""
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
INDEXED_BY_TASK: dict[str, Any] = {
    "index_columns": ["task"],
    "column_indexes": [
        {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": {"encoding": "UTF-8"}}
    ],
    "columns": [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": array, "metadata": None}
        for name, kind, array in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ],
    "pandas_version": "2.0.0",
}
"""By this note in the file pandas makes the sentence the index of the table of tasks, where LeRobot looks for it."""
Statistics = dict[str, list[Any]]


def write_lerobot(recording: Recording, out: Path, crf: int, pixel_format: str) -> list[str]:
    """Write a data set to the new folder `out`. Some of it is read again by `svam.sources.lerobot`: vectors must be the same,
    and how far pictures are from what they were is stated in `meta/info.json`.

    Args:
        crf, pixel_format: of the films, as `svam.films.Film` has them.

    Returns:
        Sentences about what was written, and with which loss.

    Raises:
        FileError: `out` is there already, or what was written reads otherwise.
        ParamsError: pictures of odd sides, and a pixel format that halves them.
        MachineError: pyarrow is not installed.
        ContractError: an episode is damaged.
    """
    if find_spec("pyarrow") is None:
        raise MachineError('--format lerobot needs pyarrow: pip install -e ".[lerobot]"')
    if out.exists():
        raise FileError(f"{out}: is there already; name a folder that is not")
    first = recording.read(0)
    for camera, frames in first.frames.items():
        height, width = frames.shape[1:3]
        if pixel_format == "yuv420p" and (height % 2 or width % 2):
            raise ParamsError(
                f"--pixel-format is 'yuv420p', which needs even sides, but {camera!r} has pictures of {height} x {width}; name "
                "yuv444p"
            )
    tasks: dict[str, int] = {}
    with whole_directory(out) as root:
        rows, statistics = _write_episodes(recording, root, tasks, crf, pixel_format)
        write_json(root / "meta/stats.json", statistics)
        _write_tasks(root / "meta/tasks.parquet", tasks)
        info = _info(recording, first, rows, len(tasks), crf, pixel_format)
        write_json(root / "meta/info.json", info)
        losses = _read_again(recording, root, first)
        for camera, loss in losses.items():
            info["features"][CAMERA + camera]["info"] |= {f"svam.{name}": value for name, value in loss.items()}
        write_json(root / "meta/info.json", info)
    lines = [f"{out}: {recording.count} episodes, {rows} frames, {len(tasks)} sentences"]
    for camera, loss in losses.items():
        error = f"{loss['mean_absolute']:.2f} of 255, PSNR {loss['psnr_db']} dB" if loss["psnr_db"] else "none"
        lines.append(f"{camera}: mean absolute error of {loss['pictures']} pictures: {error}")
    return [*recording.notes, *lines]


# Files


class _Place:
    """Where files of one kind lie below `root`: the present one's `numbers` and `path`."""

    def __init__(self, root: Path, template: str) -> None:
        self._root, self._template, self._number = root, template, 0

    @property
    def numbers(self) -> dict[str, int]:
        """As LeRobot's metadata have them."""
        return {"chunk_index": self._number // CHUNK, "file_index": self._number % CHUNK}

    @property
    def path(self) -> Path:
        path = self._root / fill(self._template, {**self.numbers})
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def advance(self) -> None:
        self._number += 1


class _Tables:
    """Parquet files, with a row group for each table; one that is large enough ends."""

    def __init__(self, root: Path, template: str) -> None:
        self._place, self._bytes = _Place(root, template), 0
        self._writer: Any = None

    def place(self) -> dict[str, int]:
        """Where the next table will lie."""
        if self._bytes >= TABLE_MB * 2**20:
            self.close()
            self._place.advance()
        return self._place.numbers

    def append(self, table: Any) -> None:
        """Write a table, to where `place` says."""
        import pyarrow.parquet as pq

        if self._writer is None:
            self._writer = pq.ParquetWriter(self._place.path, table.schema, write_page_checksum=True)
        self._writer.write_table(table)
        self._bytes += table.nbytes

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._bytes = None, 0


class _Films:
    """The films of one camera. counts: (3, 256) int64, how often each value of red, green and blue occurs in all of them."""

    def __init__(self, root: Path, camera: str, rate_hz: float, crf: int, pixel_format: str) -> None:
        self._place = _Place(root, PATHS["video"].replace("{video_key}", CAMERA + camera))
        self._rate, self._coding = rate_hz, (crf, pixel_format, {"g": "2", "bf": "0"})
        self._film: Film | None = None
        self.counts = np.zeros((3, 256), np.int64)

    def append(self, frames: Frames) -> tuple[dict[str, int | float], NDArray[np.int64]]:
        """Write an episode. Where it lies, as LeRobot's metadata say it, and its own counts."""
        if self._film is not None and self._film.bytes >= FILM_MB * 2**20:
            self.close()
            self._place.advance()
        if self._film is None:
            self._film = Film(self._place.path, self._rate, *self._coding)
        before, counts = self._film.pictures, np.zeros((3, 256), np.int64)
        for picture in _pictures(frames):
            self._film.write(picture)
            values = picture.reshape(-1, 3) + 256 * np.arange(3)
            counts += np.bincount(values.ravel(), minlength=768).reshape(3, 256)
        self.counts += counts
        span = {"from_timestamp": before / self._rate, "to_timestamp": self._film.pictures / self._rate}
        return {**self._place.numbers, **span}, counts

    def close(self) -> None:
        if self._film is not None:
            self._film.close()
        self._film = None


def _columns(episode: Episode) -> dict[str, str]:
    """Those of `COLUMNS` whose vectors the episode has."""
    return {name: column for name, column in COLUMNS.items() if getattr(episode, name) is not None}


def _pictures(frames: Frames) -> Iterator[NDArray[np.uint8]]:
    for block in frame_blocks(frames):
        yield from block


# What is in them


def _write_episodes(
    recording: Recording, root: Path, tasks: dict[str, int], crf: int, pixel_format: str
) -> tuple[int, dict[str, Statistics]]:
    """All files but four of `meta/`; number the sentences in `tasks`. Returns the number of rows and statistics by column."""
    import pyarrow as pa

    rows, waiting = 0, list[dict[str, Any]]()
    films: dict[str, _Films] = {}
    data, listed = _Tables(root, PATHS["data"]), _Tables(root, PATHS["episodes"])
    with ExitStack() as stack:
        stack.callback(data.close)
        stack.callback(listed.close)
        for number in track(range(recording.count), "export", recording.count):
            episode = recording.read(number)
            episode.check()
            n = episode.steps
            task = tasks.setdefault(episode.instruction, len(tasks))
            entry: dict[str, Any] = {"episode_index": number, "tasks": [episode.instruction], "length": n}
            entry |= {f"data/{key}": value for key, value in data.place().items()}
            entry |= {"dataset_from_index": rows, "dataset_to_index": rows + n}
            if "success" in episode.provenance:
                entry["success"] = bool(episode.provenance["success"])
            data.append(pa.table(_values(episode, number, rows, task)))
            for name, column in _columns(episode).items():
                found = _statistics_of_rows(getattr(episode, name))
                entry |= {f"stats/{column}/{key}": value for key, value in found.items()}
            for camera, frames in episode.frames.items():
                if camera not in films:
                    films[camera] = _Films(root, camera, recording.rate_hz, crf, pixel_format)
                    stack.callback(films[camera].close)
                clip, counts = films[camera].append(frames)
                entry |= {f"videos/{CAMERA}{camera}/{key}": value for key, value in clip.items()}
                entry |= {f"stats/{CAMERA}{camera}/{key}": value for key, value in _statistics_of_counts(counts, n).items()}
            rows += n
            waiting.append(entry)
            if len(waiting) == WAITING or number + 1 == recording.count:
                place = {f"meta/episodes/{key}": value for key, value in listed.place().items()}
                listed.append(pa.Table.from_pylist([entry | place for entry in waiting]))
                waiting = []
    statistics = {CAMERA + camera: _statistics_of_counts(written.counts, rows) for camera, written in films.items()}
    return rows, statistics | {column: _statistics_of_column(root, column) for column in _columns(episode).values()}


def _values(episode: Episode, number: int, before: int, task: int) -> dict[str, Any]:
    """Column -> values of an episode's rows, of the types that LeRobot's features of those shapes have."""
    import pyarrow as pa

    n, columns = episode.steps, {}
    for name, column in _columns(episode).items():
        values = getattr(episode, name)
        flat, width = pa.array(values.ravel()), values.shape[1]
        columns[column] = flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
    if episode.timestamps is not None:
        columns[RECORDED] = pa.array(episode.timestamps)
    t = np.arange(n, dtype=np.int64)
    return columns | {
        "timestamp": pa.array((t / episode.rate_hz).astype(np.float32)), "frame_index": pa.array(t),
        "episode_index": pa.array(np.full(n, number, np.int64)), "index": pa.array(before + t),
        "task_index": pa.array(np.full(n, task, np.int64)),
    }  # fmt: skip


def _write_tasks(file: Path, tasks: dict[str, int]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"task_index": pa.array(list(tasks.values()), pa.int64()), "task": pa.array(list(tasks), pa.string())})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(INDEXED_BY_TASK)}), file)


def _info(recording: Recording, first: Episode, rows: int, tasks: int, crf: int, pixel_format: str) -> dict[str, Any]:
    """`meta/info.json`; of the ranges of `splits`, LeRobot itself uses none."""
    fps = int(recording.rate_hz) if recording.rate_hz == int(recording.rate_hz) else recording.rate_hz
    features: dict[str, dict[str, Any]] = {}
    for camera, frames in first.frames.items():
        height, width = frames.shape[1:3]
        features[CAMERA + camera] = {
            "dtype": "video", "shape": [height, width, 3], "names": ["height", "width", "channels"],
            "info": {
                "video.height": height, "video.width": width, "video.channels": 3, "video.codec": "h264", "video.fps": fps,
                "video.pix_fmt": pixel_format, "video.g": 2, "video.crf": crf, "has_audio": False,
            },
        }  # fmt: skip
    for name, column in _columns(first).items():
        names = recording.dimension_names.get(name, [])
        width = getattr(first, name).shape[1]
        features[column] = {"dtype": "float32", "shape": [width], "names": names if len(names) == width else None}
    scalars = {"timestamp": "float32", **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")}
    if first.timestamps is not None:
        scalars = {RECORDED: "float64", **scalars}
    features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in scalars.items()}
    splits = {"train": f"0:{recording.trained}"}
    if recording.trained < recording.count:
        splits["held_out"] = f"{recording.trained}:{recording.count}"
    return {
        "codebase_version": "v3.0", "robot_type": recording.robot, "fps": fps, "features": features, "splits": splits,
        "total_episodes": recording.count, "total_frames": rows, "total_tasks": tasks, "chunks_size": CHUNK,
        "data_files_size_in_mb": TABLE_MB, "video_files_size_in_mb": FILM_MB, "data_path": PATHS["data"],
        "video_path": PATHS["video"],
    }  # fmt: skip


# Statistics, by LeRobot's names: pictures as fractions of white, (3, 1, 1); vectors in their own units


def _stated(count: int, found: Summary) -> Statistics:
    between = zip(QUANTILES, found.quantiles.tolist(), strict=True)
    named = {name: getattr(found, name).tolist() for name in ("min", "max", "mean", "std")}
    return {**named, "count": [count], **dict(between)}


def _statistics_of_rows(values: NDArray[np.float32]) -> Statistics:
    """Of the rows (n, d) of one episode."""
    own = values.astype(np.float64)
    between = np.quantile(own, list(QUANTILES.values()), axis=0)
    return _stated(len(own), Summary(len(own), own.mean(0), own.std(0), own.min(0), own.max(0), between))


def _statistics_of_column(root: Path, column: str) -> Statistics:
    """Of a column of all data files."""

    def blocks() -> Iterator[NDArray[np.float32]]:
        for file in sorted((root / "data").rglob("*.parquet")):
            with opened(file, [column]) as parquet:
                for batch in parquet.iter_batches(columns=[column], use_threads=False):
                    yield numbers(batch.column(0), f"{file}: {column}").reshape(len(batch), -1)

    found = summary(blocks, list(QUANTILES.values()))
    return _stated(found.count, found)


def _statistics_of_counts(counts: NDArray[np.int64], frames: int) -> Statistics:
    """Of pixels that occur (3, 256) times; a quantile between two values is the lower one."""
    levels, pixels, reached = np.arange(256) / 255, counts.sum(axis=1), counts.cumsum(axis=1)
    mean = counts @ levels / pixels
    std = np.sqrt(np.maximum(counts @ levels**2 / pixels - mean**2, 0))
    at = [(reached > q * (pixels[:, None] - 1)).argmax(axis=1) for q in (0.0, *QUANTILES.values(), 1.0)]
    low, *between, high = (levels[level] for level in at)
    found = _stated(frames, Summary(frames, mean, std, low, high, np.stack(between)))
    return {name: value if name == "count" else [[[each]] for each in value] for name, value in found.items()}


# Was it written?


def _read_again(recording: Recording, root: Path, first: Episode) -> dict[str, dict[str, Any]]:
    """Camera -> the loss in its pictures, of up to `CHECKED` episodes, evenly apart; their vectors must be equal."""
    columns = {name: (column,) for name, column in _columns(first).items()}
    source = LerobotSource(root, Options(
        action=columns.get("actions", ()), expert_action=columns.get("expert_actions", ()),
        proprioception=columns.get("proprioception", ()), state=columns.get("state", ()),
    ))  # fmt: skip
    errors = {camera: PictureError() for camera in first.frames}
    chosen = np.unique(np.linspace(0, recording.count - 1, min(CHECKED, recording.count)).round().astype(np.int64))
    for number in track(chosen.tolist(), "check", len(chosen)):
        written, own = source.read(number), recording.read(number)
        for name in VECTORS:
            if not np.array_equal(getattr(written, name), getattr(own, name)):
                raise FileError(f"{root}: {name} of episode {number} reads otherwise than it was; is the disk sound?")
        for camera, error in errors.items():
            for kept, picture in zip(_pictures(written.frames[camera]), _pictures(own.frames[camera]), strict=True):
                error.add(kept, picture)
    return {camera: stated_error([vars(error)]) for camera, error in errors.items()}
