"""Parquet columns, stored pictures and frames of rows in LeRobot data sets. Whatever is missing, damaged, of another form or in
contradiction with the rest is a `FileError`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import FrameBlocks
from svam.errors import MachineError, SvamError
from svam.files import FileError, refuse_lfs_pointer, stamp
from svam.sources._pictures import array_rgb, in_blocks, picture_rgb
from svam.sources._video import frame_times


@contextmanager
def opened(file: Path, needed: Sequence[str] = ()) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile` that has the columns `needed`; what goes wrong while it is read becomes a `FileError`.
    `MachineError` where pyarrow is not installed: what handles columns relies on this being asked first."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MachineError("convert.source is 'lerobot', which needs pyarrow: pip install -e \".[lerobot]\"") from None
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            if missing := [name for name in needed if name not in parquet.schema_arrow.names]:
                raise FileError(f"{file}: column {missing[0]!r} is missing")
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


def read_columns(parquet: Any, names: Sequence[str], start: int = 0, stop: int | None = None) -> Any:
    """A pyarrow table of those of the columns that are there, of the rows start..stop - 1 (None: of all from there on); others
    are not touched."""
    there = [name for name in dict.fromkeys(names) if name in parquet.schema_arrow.names]
    stop = parquet.metadata.num_rows if stop is None else stop
    groups, first = _groups(parquet, start, stop)
    table = parquet.read_row_groups(groups, columns=there, use_threads=False)
    return table.select(there).slice(start - first, stop - start)


@lru_cache(maxsize=4)
def _small_columns(file: Path, _: str, needed: Sequence[str], names: Sequence[str]) -> tuple[Any, Any, Set[int]]:
    """The table of `names`; (rows,) int64 `episode_index` or None; its values. Kept for the next episode of the file."""
    with opened(file, needed) as parquet:
        table = read_columns(parquet, ["episode_index", *names])
    if "episode_index" not in table.column_names:
        return table, None, set()
    episodes = whole_numbers(table["episode_index"], f"{file}: episode_index")
    return table, episodes, set(np.unique(episodes).tolist())


def _contradict(listed: Set[int], held: Set[int]) -> bool:
    """Whether a file lacks episodes that are listed in it and holds others: then the numbers may be those of another set."""
    return bool(listed - held and held - listed)


def episode_rows(file: Path, number: int, names: tuple[str, ...], needed: tuple[str, ...], listed: Set[int]) -> tuple[int, Any]:
    """The first row of episode `number` in a file, and the table of those of its columns `names` that are there; its rows must
    lie together, and the columns `needed` be there. listed: those of the file by the metadata; none: it holds no other."""
    table, episodes, held = _small_columns(file, stamp(file), ("episode_index", *needed) if listed else needed, names)
    if episodes is None:
        return 0, table
    rows = np.flatnonzero(episodes == number)
    if _contradict(listed, held):
        raise FileError(
            f"{file}: it holds episodes {min(held)} to {max(held)}, and by the metadata {min(listed)} to {max(listed)}, so "
            "that each may be another one there (were sets joined?); give the rows the metadata's numbers"
        )
    if not len(rows):
        way = "" if listed else "; if the file's name is right, write that number into its rows"
        raise FileError(f"{file}: episode {number} is not in it, it holds episodes {episodes.min()} to {episodes.max()}{way}")
    if rows[-1] - rows[0] + 1 != len(rows) or (not listed and len(rows) != len(episodes)):
        raise FileError(f"{file}: rows of other episodes lie among those of episode {number}")
    return int(rows[0]), table.slice(int(rows[0]), len(rows))


def holds(file: Path, number: int, listed: Set[int]) -> bool:
    """Whether rows of episode `number` are in a file, and can be those that the metadata mean, which list `listed` in it."""
    try:
        held = _small_columns(file, stamp(file), (), ())[2]
    except FileError:
        return False
    return number in held and not _contradict(listed, held)


def by_rows(folder: Path, wanted: Set[int]) -> dict[int, Path]:
    """Episode number -> the only parquet file below `folder` that has rows of it; empty where one of `wanted` has none, one has
    two, or a file cannot be read: then the numbers may be those of several sets."""
    found: dict[int, Path] = {}
    for file in sorted(folder.rglob("[!.]*.parquet")):
        try:
            held = _small_columns(file, stamp(file), ("episode_index",), ())[2]
        except FileError:
            return {}
        if held & found.keys():
            return {}
        found |= dict.fromkeys(held, file)
    return found if found.keys() >= wanted else {}


def numbers(column: Any, what: str) -> NDArray[Any]:
    """(n, ...) of a column of numbers, or of lists of one length (list, large or fixed-size list, nested), in its own dtype."""
    import pyarrow as pa

    n, shape = len(column), []
    if not n:
        raise FileError(f"{what} has no rows")
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    while True:
        if array.null_count:
            first = int(array.is_null().to_numpy(zero_copy_only=False).argmax())
            raise FileError(f"{what} lacks a value at row {first * n // len(array)}")
        if not isinstance(array, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
            break
        lengths = np.unique(array.value_lengths().to_numpy(zero_copy_only=False))
        if len(lengths) > 1:
            raise FileError(f"{what} has lists of {lengths[0]} and of {lengths[1]} numbers, expected one length")
        shape.append(int(lengths[0]) if len(lengths) else 0)
        array = array.flatten()
    types = pa.types
    if not (types.is_integer(array.type) or types.is_floating(array.type) or types.is_boolean(array.type)):
        raise FileError(f"{what} holds {column.type}, expected numbers")
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(n, *shape)


_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def seconds(column: Any, what: str, dates: bool = False) -> NDArray[np.float64]:
    """(n,) float64 of a column of finite numbers, one a row; of times of day or dates, too, with `dates`."""
    unit = getattr(column.type, "unit", None) if dates else None
    column = column.cast(f"int{column.type.bit_width}") if unit else column
    values = numbers(column, what).astype(np.float64) * (_UNITS[unit] if unit else 1.0)
    if values.size != len(values) or not np.isfinite(values).all():
        raise FileError(f"{what} does not hold one finite number a row")
    return values.ravel()


def whole_numbers(column: Any, what: str) -> NDArray[np.int64]:
    """(n,) int64 of a column of whole numbers, also where they are stored as floats."""
    values = seconds(column, what)
    wrong = (np.abs(values) >= 2**53) | (values != np.round(values))
    if wrong.any():
        raise FileError(f"{what} is {values[wrong][0]:g}, expected whole numbers")
    return values.astype(np.int64)


def joined(table: Any, columns: Sequence[str], file: Path, features: Mapping[str, Mapping[str, Any]]) -> NDArray[np.float32]:
    """(n, d) float32: the columns side by side; whole numbers and booleans become floats. Lists in lists must be of the shape
    that `features` states, as (2, 3) and (3, 2) would look alike."""
    parts: list[NDArray[np.float64]] = []
    for column in columns:
        part, stated = numbers(table[column], what := f"{file}: column {column!r}"), features.get(column, {}).get("shape")
        if part.ndim > 2 and stated not in (None, list(part.shape[1:])):
            raise FileError(f"{what} holds lists of {list(part.shape[1:])}, but meta/info.json says {stated}; correct that")
        parts.append(part.reshape(len(part), -1).astype(np.float64))
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, which the episode's check names
        return np.concatenate(parts, axis=1).astype(np.float32)


def sentences(column: Any, name: str, tasks: dict[int, str] | None, file: Path) -> list[str] | None:
    """What each row of a column of texts, or of numbers of `tasks`, says; None where none says anything, or `tasks` is None."""
    from pyarrow import types

    what = f"{file}: {name}"
    if column.null_count == len(column):
        return None
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        try:
            values: list[Any] = column.to_pylist()
        except UnicodeDecodeError:
            raise FileError(f"{what} is not UTF-8 text") from None
        return [value or "" for value in values]
    said = whole_numbers(column, what).tolist()
    if tasks is None:
        return None
    if unknown := [value for value in said if value not in tasks]:
        where = "meta/subtasks" if name == "subtask_index" else "meta/tasks"
        raise FileError(f"{what} is {unknown[0]}, which {where} does not list")
    return [tasks[value] for value in said]


def stored_pictures(
    file: Path, root: Path, key: str, rows: tuple[int, int], shape: tuple[int, ...]
) -> Iterator[tuple[NDArray[np.uint8], str]]:
    """(a picture (H, W, 3), what was done to it) of each of the rows from the first to before the second of `rows`.

    The column `key` holds encoded pictures (bytes, a path below `root`, or a struct of both, where the path counts if there
    are no bytes), or lists of numbers, of `shape` where they are flat.
    """
    from pyarrow import types

    what, (start, stop) = f"{file}: column {key!r}", rows
    with opened(file, [key]) as parquet:
        groups, row = _groups(parquet, start, stop)
        for batch in parquet.iter_batches(batch_size=16, row_groups=groups, columns=[key], use_threads=False):
            column = batch.column(key)
            chosen = column.slice(max(0, start - row), max(0, stop - max(row, start)))
            row += len(column)
            kind = chosen.type
            if any(is_kind(kind) for is_kind in (types.is_struct, types.is_binary, types.is_large_binary, types.is_string)):
                yield from (picture_rgb(_encoded(value, root, what), what) for value in chosen.to_pylist())
            elif len(chosen):
                first = max(start, row - len(column))
                values = numbers(chosen, what)
                done = f"are flat lists, taken as {shape}, the feature's shape in meta/info.json" if values.ndim == 2 else ""
                yield from ((picture, done) for picture in array_rgb(values, shape, what, first))
            if row >= stop:
                return
    raise FileError(f"{what} has {row} rows, expected {stop}")


def stored_frames(file: Path, root: Path, key: str, rows: tuple[int, int], shape: tuple[int, ...]) -> FrameBlocks:
    """The frames of `stored_pictures`, read when they are asked for; the first one, at once, says how large they are."""
    read = partial(stored_pictures, file, root, key, rows, shape)
    size = next(read())[0].shape
    return FrameBlocks((rows[1] - rows[0], *size), lambda: in_blocks((p for p, _ in read()), f"{file}: column {key!r}"))


def _encoded(value: Any, root: Path, what: str) -> bytes:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(data, str):
        data, path = None, data
    if data is None and isinstance(path, str):
        place = root / path
        if Path(path).is_absolute() or ".." in Path(path).parts or not place.is_file():
            raise FileError(f"{what} names the picture {path!r}, which is not in the data set")
        refuse_lfs_pointer(place)
        data = place.read_bytes()
    if not isinstance(data, bytes):
        found = "null" if data is None else type(data).__name__
        raise FileError(f"{what} holds {found}, expected the bytes of a picture")
    return data


BY_ORDER = "if row t is frame t all the same, set convert.options.frames to 'order'"
_DRIFT = 0.01
"""Frames by which a boundary of LeRobot's own metadata never differs from the lengths."""


@dataclass(frozen=True)
class Span:
    """Where an episode's frames lie in a video of several: by the metadata from `start` to `stop` seconds, and before `end`,
    where the next one begins; by the lengths of those before from the frame `first` on, None where they do not tell."""

    start: float
    stop: float
    end: float
    first: int | None


def first_frames(
    video: Path, members: Sequence[tuple[float, int, float, int]], frames: int, rate: float, believe: bool
) -> tuple[dict[int, int], str]:
    """(episode number -> its first frame, a note) of the episodes in one video; no frames where only `from_timestamp` tells.

    members: from_timestamp, number, to_timestamp and length of each episode, in increasing order. frames: how many the video
    has, `rate` a second. believe: that from_timestamp is right although the numbers do not add up; else that is a `FileError`.
    """
    starts, numbers, stops, lengths = (np.array(values) for values in zip(*members, strict=True))
    says = f"{video}: {frames} frames, and the {len(members)} episodes in it have {lengths.sum()} rows"
    if frames == lengths.sum():
        firsts = np.cumsum(lengths) - lengths
        drift = np.abs(starts * rate - firsts)
        at = drift.argmax()
        off = f"from_timestamp of episode {numbers[at]} is {drift[at]:.2g} frames off; the lengths decide where each begins"
        if drift[at] < 0.5 or (np.diff(numbers) > 0).all():  # else it is the order that is in doubt
            found = dict(zip(numbers.tolist(), firsts.tolist(), strict=True))
            return found, f"{says}, but {off}" if drift[at] > _DRIFT else ""
    reason, end = "", np.rint(stops.max() * rate)
    if (early := starts[1:] < stops[:-1] - 0.5 / rate).any():
        at = early.argmax()
        reason = f"episode {numbers[at]} ends at {stops[at]:g} s and episode {numbers[at + 1]} begins at {starts[at + 1]:g} s"
    elif frames != end and (n := len(members)) > 1 and (frames - end < lengths.min() or frames - end in (n, 2 * n)):
        # Each clip may be a little longer than said; else there is room for an episode that was removed from the list.
        reason = f"the last one ends with frame {end:.0f}"
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
    """
    half = 0.4999 / fps
    shown = frame_times(file)
    pts = shown.pts
    if pts is None or (np.diff(pts) <= 0).any():
        raise FileError(f"{file}: {'frames have no times' if pts is None else 'two frames have the same time'}")
    at = pts * shown.base
    # The frames from `first` to before `end` are the episode's; a row's frame may lie up to before `last`.
    origin, room, part, first, end, last = 0.0, -np.inf, "", 0, len(at), len(at)
    if span is not None and span.first is None and times is not None:
        origin, room, part = span.start, min(span.end, at[-1] + 2 * half) - half, f" from {span.start:g} to {span.stop:g} s"
        first, end = np.searchsorted(at, (span.start - half, span.stop - half)).tolist()
        last = int(np.searchsorted(at, min(span.stop + half, span.end - half), side="right"))  # not the next one's first
        end = min(end, last)
    elif span is not None:
        first = int(np.argmin(np.abs(at - span.start))) if span.first is None else span.first
        origin, part = float(at[min(first, len(at) - 1)]), f" from frame {first} on"
        end = last = min(first + rows, len(at))
        if span.first is None:
            there = at[0] - half <= span.start <= at[-1] + half
            end = last = min(end, int(np.searchsorted(at, span.end - half))) if there else first
    count = max(0, end - first)
    if times is None:
        if count != rows:
            raise FileError(f"{file}: {count} frames{part}, but the episode has {rows} rows")
        return pts[first:end], 0.0
    if count == rows:
        apart = origin + times - at[first:end]
        for late in (0.0, float(apart[0])):
            if (np.abs(apart - late) < half).all():
                if late > 3 * half and origin + times[-1] < room:  # cut rows, unless it is one step, the stamp of its end
                    raise FileError(
                        f"{file}: {count} frames{part}, as many as rows, but timestamps begin at {times[0]:g} s and lead to "
                        f"others that are there, too; {BY_ORDER}, or, if they are right, correct to_timestamp in meta/episodes"
                    )
                return pts[first:end], late
        row = int(np.argmax(np.abs(apart - apart[0]) >= half))
        raise FileError(
            f"{file}: its frame {row} comes {at[first + row] - at[first]:g} s after its first, but the timestamp of row {row} "
            f"{times[row] - times[0]:g} s, over half a frame away; {BY_ORDER}"
        )
    if last <= first:
        raise FileError(f"{file}: no frames{part}: it has {len(at)} frames and ends at {at[-1]:g} s")
    pts, at, target = pts[first:last], at[first:last], origin + times
    nearest = np.searchsorted((at[:-1] + at[1:]) / 2, target)
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
