"""Parquet columns, stored pictures and frames of rows in LeRobot data sets, each failure one sentence that names the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.errors import MachineError, SvamError
from svam.files import FileError, refuse_lfs_pointer
from svam.sources._pictures import array_rgb, picture_rgb
from svam.sources._video import frame_times


def _arrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet, which ship no types."""
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise MachineError("convert.source is 'lerobot', which needs pyarrow: pip install -e \".[lerobot]\"") from None


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; whatever goes wrong while it is read becomes a `FileError`."""
    pa, pq = _arrow()
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            yield parquet
    except SvamError:
        raise
    except FileNotFoundError:
        raise FileError(f"{file}: no such file") from None
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        refuse_lfs_pointer(file)
        raise FileError(f"{file}: truncated, damaged or no parquet file ({type(error).__name__})") from None


def _groups(parquet: Any, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that hold the rows start..stop - 1, and the number of rows before the first of them."""
    counts = [parquet.metadata.row_group(number).num_rows for number in range(parquet.metadata.num_row_groups)]
    ends = np.cumsum([0, *counts])
    groups = np.flatnonzero((ends[:-1] < stop) & (ends[1:] > start)).tolist()
    return groups, int(ends[groups[0]]) if groups else 0


def read_rows(parquet: Any, names: Sequence[str], start: int = 0, stop: int | None = None) -> dict[str, Any]:
    """Column name -> pyarrow array of the rows start..stop - 1 (None: of all from there on). Other columns are not touched."""
    stop = parquet.metadata.num_rows if stop is None else stop
    groups, first = _groups(parquet, start, stop)
    table = parquet.read_row_groups(groups, columns=list(names), use_threads=False).slice(start - first, stop - start)
    return {name: table.column(name) for name in names}


@dataclass(frozen=True)
class SmallColumns:
    """Columns of a file that are read whole, `rows` long. episodes: (rows,) int64, `episode_index`, None where it is absent."""

    rows: int
    episodes: NDArray[np.int64] | None
    columns: dict[str, Any]


@lru_cache(maxsize=4)
def small_columns(file: Path, _stamp: str, names: tuple[str, ...]) -> SmallColumns:
    """`episode_index` and those of the other columns that are there; kept for the next episode of the file."""
    with opened(file) as parquet:
        there = [name for name in ("episode_index", *names) if name in parquet.schema_arrow.names]
        rows, columns = parquet.metadata.num_rows, read_rows(parquet, there)
    episodes = columns.pop("episode_index", None)
    return SmallColumns(rows, None if episodes is None else whole_numbers(episodes, f"{file}: episode_index"), columns)


def numbers(column: Any, what: str) -> NDArray[Any]:
    """(n, ...) of a column of numbers, or of lists of one length (list, large or fixed-size list, nested), in its own dtype.

    Raises:
        FileError: a value is missing, lists differ in length, or it holds no numbers.
    """
    pa, _ = _arrow()
    types = pa.types
    n, shape = len(column), []
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    while True:
        if array.null_count:
            position = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
            raise FileError(f"{what} lacks a value at row {position // max(1, len(array) // max(1, n))}")
        if not (types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type)):
            break
        lengths = np.unique(array.value_lengths().to_numpy(zero_copy_only=False))
        if len(lengths) > 1:
            raise FileError(f"{what} has lists of {lengths[0]} and of {lengths[1]} numbers, expected one length")
        shape.append(int(lengths[0]) if len(lengths) else 0)
        array = array.flatten()
    if not (types.is_integer(array.type) or types.is_floating(array.type) or types.is_boolean(array.type)):
        raise FileError(f"{what} holds {column.type}, expected numbers")
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(n, *shape)


def vectors(column: Any, what: str) -> NDArray[np.float64]:
    """(n, d) float64 of a column of numbers or lists; whole numbers and booleans become floats."""
    values = numbers(column, what)
    if not len(values):
        raise FileError(f"{what} has no rows")
    return values.reshape(len(values), -1).astype(np.float64)


def seconds(column: Any, what: str) -> NDArray[np.float64]:
    """(n,) float64 of a column of finite numbers, one a row."""
    values = vectors(column, what)
    if values.shape[1] != 1 or not np.isfinite(values).all():
        raise FileError(f"{what} does not hold one finite number a row")
    return np.ascontiguousarray(values[:, 0])


def joined(file: Path, table: dict[str, Any], columns: Sequence[str]) -> NDArray[np.float32]:
    """(n, d) float32: the columns side by side."""
    parts = [vectors(table[column], f"{file}: column {column!r}") for column in columns]
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, which the episode's check names
        return np.concatenate(parts, axis=1).astype(np.float32)


def whole_numbers(column: Any, what: str) -> NDArray[np.int64]:
    """(n,) int64 of a column of whole numbers, also where they are stored as floats."""
    values = seconds(column, what)
    wrong = (np.abs(values) >= 2**53) | (values != np.round(values))
    if wrong.any():
        raise FileError(f"{what} is {values[wrong][0]:g}, expected whole numbers")
    return values.astype(np.int64)


def sentences(column: Any, tasks: dict[int, str] | None, what: str) -> list[str] | None:
    """What each row of a column of texts, or of numbers of `tasks`, says; None where there is no table of tasks.

    Raises:
        FileError: a row is neither a text nor a number, or its number is in no table.
    """
    types = _arrow()[0].types
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_string(kind) or types.is_large_string(kind):
        try:
            values: list[Any] = column.to_pylist()
        except UnicodeDecodeError:
            raise FileError(f"{what} is not UTF-8 text") from None
        if None in values:
            raise FileError(f"{what} lacks a value at row {values.index(None)}")
        return values
    if tasks is None:
        return None
    said = whole_numbers(column, what).tolist()
    if unknown := [value for value in said if value not in tasks]:
        raise FileError(f"{what} is {unknown[0]}, which meta/tasks does not list")
    return [tasks[value] for value in said]


def episode_rows(content: SmallColumns, file: Path, number: int, alone: bool) -> tuple[int, int]:
    """First row of episode `number` in a file, and the row after its last; `alone`: the file holds no other episode.

    Raises:
        FileError: it is not there, or its rows lie apart.
    """
    if content.episodes is None:
        if alone:
            return 0, content.rows
        raise FileError(f"{file}: column 'episode_index' is missing")
    rows = np.flatnonzero(content.episodes == number)
    if not len(rows):
        inside = f"episodes {content.episodes.min()} to {content.episodes.max()}"
        raise FileError(f"{file}: episode {number} is not in it, it holds {inside}")
    if rows[-1] - rows[0] + 1 != len(rows) or (alone and len(rows) != content.rows):
        raise FileError(f"{file}: rows of other episodes lie among those of episode {number}")
    return int(rows[0]), int(rows[-1]) + 1


def stored_pictures(
    file: Path, root: Path, key: str, rows: tuple[int, int], shape: tuple[int, ...]
) -> Iterator[tuple[NDArray[np.uint8], bool]]:
    """(a picture (H, W, 3), whether EXIF asked to turn it) of each of the rows from the first to before the second of `rows`.

    The column `key` holds encoded pictures (bytes, or a struct of bytes and path; a row without bytes names a file below
    `root`), or lists of numbers, of `shape` where they are flat.
    """
    what, (start, stop) = f"{file}: column {key!r}", rows
    types = _arrow()[0].types
    with opened(file) as parquet:
        groups, row = _groups(parquet, start, stop)
        for batch in parquet.iter_batches(batch_size=16, row_groups=groups, columns=[key], use_threads=False):
            column = batch.column(batch.schema.names.index(key))
            chosen = column.slice(max(0, start - row), max(0, stop - max(row, start)))
            row += len(column)
            kind = chosen.type
            if types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind):
                yield from (picture_rgb(_encoded(value, root, what), what) for value in chosen.to_pylist())
            elif len(chosen):
                yield from ((picture, False) for picture in array_rgb(numbers(chosen, what), shape, what))
            if row >= stop:
                return
    raise FileError(f"{what} has {row} rows, expected {stop}")


def _encoded(value: Any, root: Path, what: str) -> bytes:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is None and isinstance(path, str):
        place = root / path
        if Path(path).is_absolute() or ".." in Path(path).parts or not place.is_file():
            raise FileError(f"{what} names the picture {path!r}, which is not in the data set")
        refuse_lfs_pointer(place)
        data = place.read_bytes()
    if not isinstance(data, bytes):
        raise FileError(f"{what} holds {type(data).__name__}, expected the bytes of a picture")
    return data


@dataclass(frozen=True)
class Rows:
    """What an episode's rows `start` .. `stop` - 1 of `file` say, but for vectors and pictures."""

    file: Path
    start: int
    stop: int
    times: NDArray[np.float64] | None
    fps: float
    instruction: str
    success: bool | None

    def __len__(self) -> int:
        return self.stop - self.start


BY_ORDER = "if row t is frame t all the same, set convert.options.frames to 'order'"
_DRIFT = 0.01
"""Frames by which a boundary of LeRobot's own metadata never differs from the lengths."""


@dataclass(frozen=True)
class Span:
    """Where an episode's frames lie in a video of several: from `start` to `stop` seconds by the metadata, and from the frame
    `first` on by the lengths of the episodes before, None where those do not tell."""

    start: float
    stop: float
    first: int | None


def first_frames(
    video: Path, members: Sequence[tuple[float, float, int, int]], frames: int, rate: float, believe: bool
) -> tuple[dict[int, int], str]:
    """(episode number -> its first frame, a note) of the episodes in one video; no frames where only `from_timestamp` tells.

    members: from_timestamp, to_timestamp, number and length of each episode, in increasing order. frames: how many the video
    has, `rate` a second. believe: that from_timestamp is right although the numbers do not add up.

    Raises:
        FileError: the numbers do not add up, and nothing says where an episode begins.
    """
    starts, stops, numbers, lengths = zip(*members, strict=True)
    total, end = sum(lengths), round(max(stops) * rate)
    says = f"{video}: {frames} frames, and the {len(members)} episodes in it have {total} rows"
    if frames == total:
        firsts = np.cumsum([0, *lengths[:-1]])
        drift = np.abs(np.array(starts) * rate - firsts)
        at = int(drift.argmax())
        off = f"from_timestamp of episode {numbers[at]} is {drift[at]:.2g} frames off; the lengths decide where each begins"
        return dict(zip(numbers, firsts.tolist(), strict=True)), f"{says}, but {off}" if drift[at] > _DRIFT else ""
    reason = ""
    for before, after in pairwise(members):
        if after[0] < before[1] - 0.5 / rate:
            reason = f"episode {before[2]} ends at {before[1]:g} s and episode {after[2]} begins at {after[0]:g} s"
    if not reason and frames != end and len(members) > 1 and frames - end < min(lengths):
        reason = f"the last one ends with frame {end}"  # else there is room for an episode that was removed from the list
    if reason and not believe:
        raise FileError(
            f"{says}, but by meta/episodes {reason}, so that nothing says where an episode begins; if from_timestamp is right "
            "all the same, set convert.options.frames to 'order'"
        )
    return {}, f"{says}; from_timestamp decides where each begins"


def find_frames(
    file: Path, times: NDArray[np.float64] | None, rows: int, fps: float, span: Span | None
) -> tuple[NDArray[np.int64], float]:
    """((rows,) presentation times of the frame of each row, by how many seconds the rows' timestamps begin late).

    A row's frame is the one nearest to its timestamp, less than half a frame of `fps` away.
    times: (rows,) seconds from the episode's beginning, or None to take the frames in order. span: None where the video holds
        one episode alone.
    Where there are exactly as many frames as rows, row t can only be frame t: timestamps that begin late (recorders that stamp
    the end of a step) are then taken from the first one on.

    Raises:
        FileError: no frame is near enough, two rows share one, or the numbers of frames and rows do not fit.
    """
    half = 0.4999 / fps
    shown = frame_times(file)
    pts = shown.pts
    if pts is None or (np.diff(pts) <= 0).any():
        raise FileError(f"{file}: {'frames have no times' if pts is None else 'two frames have the same time'}")
    at = pts * shown.base
    origin, part, first, end, last = 0.0, "", 0, len(at), len(at)
    if span is not None and span.first is None and times is not None:
        origin, part = span.start, f" from {span.start:g} to {span.stop:g} s"
        first, end = np.searchsorted(at, (span.start - half, span.stop - half)).tolist()
        last = int(np.searchsorted(at, span.stop + half, side="right"))
    elif span is not None:
        first = int(np.argmin(np.abs(at - span.start))) if span.first is None else span.first
        origin, part = float(at[min(first, len(at) - 1)]), f" from frame {first} on"
        end = last = min(first + rows, len(at))
    count = max(0, end - first)
    if times is None:
        if count != rows:
            raise FileError(f"{file}: {count} frames{part}, but the episode has {rows} rows")
        return pts[first:end], 0.0
    if count == rows:
        here = at[first:end]
        late = float(times[0] - (here[0] - origin))
        for shift in (0.0, late):
            far = np.abs(origin + times - shift - here) >= half
            if not far.any():
                return pts[first:end], shift
        row = int(np.argmax(far))
        raise FileError(
            f"{file}: its frame {row} comes {here[row] - here[0]:g} s after its first, but the timestamp of row {row} "
            f"{times[row] - times[0]:g} s, over half a frame away; {BY_ORDER}"
        )
    if last <= first:
        raise FileError(f"{file}: no frames{part}: it has {len(at)} frames and ends at {at[-1]:g} s")
    pts, at, target = pts[first:last], at[first:last], origin + times
    right = np.clip(np.searchsorted(at, target), 0, len(pts) - 1)
    left = np.maximum(right - 1, 0)
    nearest = np.where(np.abs(at[left] - target) <= np.abs(at[right] - target), left, right)
    if (far := np.abs(at[nearest] - target) >= half).any():
        row = int(np.argmax(far))
        raise FileError(
            f"{file}: row {row} of the episode is at {times[row]:g} s and the nearest of the {count} frames{part} at "
            f"{at[nearest[row]] - origin:g} s, over half a frame away (the episode has {rows} rows)"
        )
    if (same := np.diff(nearest) <= 0).any():
        row = int(np.argmax(same))
        raise FileError(f"{file}: rows {row} and {row + 1} of the episode both fall on the frame at {at[nearest[row]]:g} s")
    return pts[nearest], 0.0
