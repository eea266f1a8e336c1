"""Parquet columns and video frames of LeRobot data sets, each failure one sentence that names the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import ContractError
from svam.errors import MachineError, ParamsError
from svam.files import FileError

BLOCK_FRAMES = 64
BLOCK_BYTES = 2**25
"""A block of decoded frames holds at most so many frames, and about so many bytes."""


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
    except (FileError, ContractError, ParamsError):
        raise
    except FileNotFoundError:
        raise FileError(f"{file}: no such file") from None
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        raise FileError(f"{file}: truncated, damaged or no parquet file ({type(error).__name__})") from None


def _groups(parquet: Any, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that hold the rows start..stop - 1, and the number of rows before the first of them."""
    groups: list[int] = []
    first = row = 0
    for number in range(parquet.metadata.num_row_groups):
        count = parquet.metadata.row_group(number).num_rows
        if row < stop and row + count > start:
            if not groups:
                first = row
            groups.append(number)
        row += count
    return groups, first


def read_rows(parquet: Any, names: Sequence[str], start: int, stop: int) -> dict[str, Any]:
    """Column name -> pyarrow array of the rows start..stop - 1. Other columns are not touched."""
    groups, first = _groups(parquet, start, stop)
    table = parquet.read_row_groups(groups, columns=list(names), use_threads=False).slice(start - first, stop - start)
    return {name: table.column(name) for name in names}


def vectors(column: Any, what: str) -> NDArray[np.float64]:
    """(n, d) float64 of a column of numbers, or of lists of one length (list, large or fixed-size list, nested: flattened
    in row-major order). Whole numbers and booleans become floats.

    Raises:
        FileError: a value is missing, lists differ in length, or it holds no numbers.
    """
    pa, _ = _arrow()
    types = pa.types
    n = len(column)
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    while types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type):
        if array.null_count:
            raise FileError(f"{what} lacks a value at row {_null_row(array, n)}")
        lengths = array.value_lengths().to_numpy(zero_copy_only=False)
        if len(lengths) and (lengths != lengths[0]).any():
            odd = int(np.flatnonzero(lengths != lengths[0])[0])
            raise FileError(f"{what} has lists of {lengths[0]} and of {lengths[odd]} numbers, expected one length")
        array = array.flatten()
    kind = array.type
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise FileError(f"{what} holds {column.type}, expected numbers")
    if array.null_count:
        raise FileError(f"{what} lacks a value at row {_null_row(array, n)}")
    values = array.to_numpy(zero_copy_only=False).astype(np.float64)
    if n == 0 or len(values) % n:
        raise FileError(f"{what} has {len(values)} numbers in {n} rows")
    return np.asarray(values.reshape(n, -1))


def _null_row(array: Any, rows: int) -> int:
    """Row of the first missing value of a flattened array."""
    position = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
    return position // max(1, len(array) // max(1, rows))


def whole_numbers(column: Any, what: str, least: int | None = None) -> NDArray[np.int64]:
    """(n,) int64 of a column of whole numbers, also where they are stored as floats."""
    if len(column) == 0:
        return np.zeros(0, dtype=np.int64)
    values = vectors(column, what)
    if values.shape[1] != 1:
        raise FileError(f"{what} has {values.shape[1]} numbers a row, expected one")
    flat = values[:, 0]
    wrong = ~np.isfinite(flat) | (np.abs(flat) >= 2**53)
    wrong[~wrong] = flat[~wrong] != np.round(flat[~wrong])
    if least is not None:
        wrong |= ~(flat >= least)
    if wrong.any():
        raise FileError(f"{what} is {flat[wrong][0]:g}, expected whole numbers{'' if least is None else f' from {least} on'}")
    return flat.astype(np.int64)


def seconds(column: Any, what: str) -> NDArray[np.float64]:
    """(n,) float64 of a column of finite numbers, one a row."""
    values = vectors(column, what)
    if values.shape[1] != 1 or not np.isfinite(values).all():
        raise FileError(f"{what} does not hold one finite number a row")
    return np.ascontiguousarray(values[:, 0])


def texts(column: Any, what: str) -> list[str]:
    """A column of texts, plain or dictionary-encoded."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        raise FileError(f"{what} is not UTF-8 text") from None
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise FileError(f"{what} is {str(value)[:60]!r} at row {row}, expected text")
    return values


def is_text(column: Any) -> bool:
    """Whether a column holds texts."""
    types = _arrow()[0].types
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    return bool(types.is_string(kind) or types.is_large_string(kind))


def episode_rows(parquet: Any, file: Path, number: int, alone: bool) -> tuple[int, int]:
    """First row of episode `number` in a file, and the row after its last; `alone`: the file holds no other episode.

    Raises:
        FileError: it is not there, or its rows lie apart.
    """
    total = parquet.metadata.num_rows
    if "episode_index" not in parquet.schema_arrow.names:
        if alone:
            return 0, total
        raise FileError(f"{file}: column 'episode_index' is missing")
    found = whole_numbers(read_rows(parquet, ["episode_index"], 0, total)["episode_index"], f"{file}: episode_index")
    rows = np.flatnonzero(found == number)
    if not len(rows):
        inside = f"episodes {found.min()} to {found.max()}" if len(found) else "no rows"
        raise FileError(f"{file}: episode {number} is not in it, it holds {inside}")
    if rows[-1] - rows[0] + 1 != len(rows) or (alone and len(rows) != total):
        raise FileError(f"{file}: rows of other episodes lie among those of episode {number}")
    return int(rows[0]), int(rows[-1]) + 1


@dataclass(frozen=True)
class StoredPictures:
    """PNG or JPEG pictures in the column `key` (struct of bytes and path, or bytes) of the rows start..stop - 1 of a parquet
    file. A row without bytes names a file below `root`."""

    file: Path
    root: Path
    key: str
    start: int
    stop: int

    def size(self) -> tuple[int, int]:
        """Height and width of the first picture."""
        for picture in self._pictures(self.start + 1):
            return picture.shape[0], picture.shape[1]
        raise FileError(f"{self.file}: column {self.key!r} has no rows")

    def blocks(self) -> Iterator[NDArray[np.uint8]]:
        """(k, H, W, 3) uint8 blocks of all pictures."""
        yield from in_blocks(self._pictures(self.stop), f"{self.file}: column {self.key!r}")

    def _pictures(self, stop: int) -> Iterator[NDArray[np.uint8]]:
        with opened(self.file) as parquet:
            groups, row = _groups(parquet, self.start, stop)
            for batch in parquet.iter_batches(batch_size=16, row_groups=groups, columns=[self.key], use_threads=False):
                column = batch.column(batch.schema.names.index(self.key))
                for value in column.slice(max(0, self.start - row), max(0, stop - max(row, self.start))).to_pylist():
                    yield self._decode(value, f"{self.file}: column {self.key!r}")
                row += len(column)
                if row >= stop:
                    return

    def _decode(self, value: Any, what: str) -> NDArray[np.uint8]:
        from PIL import Image

        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is None and isinstance(path, str):
            place = self.root / path
            if Path(path).is_absolute() or ".." in Path(path).parts or not place.is_file():
                raise FileError(f"{what} names the picture {path!r}, which is not in the data set")
            data = place.read_bytes()
        if not isinstance(data, bytes):
            raise FileError(f"{what} holds {type(data).__name__}, expected the bytes of a PNG or JPEG picture")
        try:
            with Image.open(BytesIO(data), formats=("PNG", "JPEG", "WEBP", "BMP")) as picture:
                if picture.mode not in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK"):
                    raise FileError(f"{what} holds pictures of mode {picture.mode}, expected colour; is it depth?")
                return np.asarray(picture.convert("RGB"))
        except FileError:
            raise
        except (OSError, ValueError, SyntaxError, LookupError, TypeError, OverflowError, MemoryError, EOFError,
                Image.DecompressionBombError) as error:  # fmt: skip
            raise FileError(f"{what} holds a damaged picture ({type(error).__name__})") from None


def in_blocks(frames: Iterator[NDArray[np.uint8]], what: str) -> Iterator[NDArray[np.uint8]]:
    """Frames of one size, stacked into blocks of bounded size; another size raises `FileError`."""
    block: list[NDArray[np.uint8]] = []
    size: tuple[int, ...] = ()
    for frame in frames:
        size = size or frame.shape
        if frame.shape != size:
            raise FileError(f"{what} changes its picture size from {size[:2]} to {frame.shape[:2]}")
        block.append(frame)
        if len(block) >= min(BLOCK_FRAMES, max(1, BLOCK_BYTES // frame.nbytes)):
            yield np.stack(block)
            block = []
    if block:
        yield np.stack(block)


@contextmanager
def _opened_video(file: Path) -> Iterator[tuple[Any, Any]]:
    """A PyAV container and its first video stream; whatever goes wrong while it is read becomes a `FileError`."""
    import av

    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise FileError(f"{file}: no video in it")
            stream = container.streams.video[0]
            if stream.codec_context is None or stream.time_base is None:
                raise FileError(f"{file}: truncated, damaged, or in a codec that PyAV {av.__version__} cannot decode")
            # One decoder thread: the conversion runs an episode a process. Errors in the bit stream end the reading,
            # because the decoder would otherwise paint over them.
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except (FileError, ContractError, ParamsError):
        raise
    except FileNotFoundError:
        raise FileError(f"{file}: no such file") from None
    except (av.FFmpegError, OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        raise FileError(f"{file}: truncated, damaged or no video ({type(error).__name__})") from None


@dataclass(frozen=True)
class VideoFrames:
    """The frames of a video file with the presentation times `pts` ((n,) int64, increasing, in the stream's time base).

    size: height and width. seek: the time from which seeking leads to a key frame before the first one, None for the start.
    """

    file: Path
    pts: NDArray[np.int64]
    size: tuple[int, int]
    seek: int | None

    def blocks(self) -> Iterator[NDArray[np.uint8]]:
        """(k, H, W, 3) uint8 RGB blocks, decoded in one pass that ends at the last frame wanted."""
        yield from in_blocks(self._decode(), str(self.file))

    def _decode(self) -> Iterator[NDArray[np.uint8]]:
        with _opened_video(self.file) as (container, stream):
            if self.seek is not None:
                container.seek(self.seek, stream=stream)
            wanted = iter(self.pts.tolist())
            pts = next(wanted)
            for frame in container.decode(stream):
                if frame.pts is None or frame.is_corrupt:
                    raise FileError(f"{self.file}: a frame near {float(pts * stream.time_base):g} s is damaged")
                if frame.pts < pts:
                    continue
                if frame.pts > pts:
                    break
                yield frame.to_ndarray(format="rgb24")
                following = next(wanted, None)
                if following is None:
                    return
                pts = following
            raise FileError(f"{self.file}: the frame at {float(pts * stream.time_base):g} s cannot be decoded")


def _scan(file: Path, span: tuple[float, float] | None) -> tuple[NDArray[np.int64], float, tuple[int, int], int | None]:
    """Presentation times of a video's frames (sorted; those near `span` seconds, or all) without decoding, the time base in
    seconds, height and width, and where to seek to."""
    for seeking in (True, False):
        with _opened_video(file) as (container, stream):
            base, size = float(stream.time_base), (stream.codec_context.height, stream.codec_context.width)
            kind = stream.codec_context.pix_fmt or ""
            if min(size) <= 0 or base <= 0:
                raise FileError(f"{file}: truncated, damaged or no video (pictures of {size[0]} x {size[1]})")
            if kind.startswith(("gray9", "gray1", "ya16")):
                raise FileError(f"{file}: pictures are {kind}, expected colour; leave depth out by options.cameras")
            seek = max(0, int(span[0] / base) - 1) if span is not None and seeking else None
            if seek is not None:
                container.seek(seek, stream=stream)
            times: list[int] = []
            for packet in container.demux(stream):
                if packet.pts is not None and packet.size and not packet.is_discard:
                    times.append(packet.pts)
                if span is not None and packet.dts is not None and packet.dts * base > span[1]:
                    break
        if span is None or seek is None or (times and times[0] * base <= span[0]):
            break
    pts = np.unique(np.asarray(times, dtype=np.int64))
    if len(pts) != len(times):
        raise FileError(f"{file}: two frames have the same time")
    return pts, base, size, seek


def find_frames(
    file: Path, times: NDArray[np.float64] | None, rows: int, fps: float, span: tuple[float, float] | None
) -> tuple[VideoFrames, float]:
    """The frame of each row of an episode: the one nearest to the row's timestamp, less than half a frame away.

    times: (rows,) seconds from the episode's beginning, or None to take the frames in order, which must then be as many as
        the rows. span: first and last seconds of the episode in a file that holds several (v3), else None.
    Where the video has exactly as many frames as the episode has rows, row t can only be frame t: timestamps that begin late
    (recorders that stamp the end of a step) are then taken from the first one on. The second value is by how much, in seconds.

    Raises:
        FileError: no frame is near enough, two rows share one, or the numbers of frames and rows do not fit.
    """
    half = 0.4999 / fps
    pts, base, size, seek = _scan(file, None if span is None else (span[0] - half, span[1] + half))
    seconds = pts * base
    origin = 0.0 if span is None else span[0]
    inside = np.ones(len(pts), dtype=bool) if span is None else (seconds >= span[0] - half) & (seconds < span[1] - half)
    count = int(inside.sum())
    part = "" if span is None else f" from {span[0]:g} to {span[1]:g} s"
    if times is None or count == rows:
        if count != rows:
            raise FileError(f"{file}: {count} frames{part}, but the episode has {rows} rows")
        here = seconds[inside]
        if times is None:
            return VideoFrames(file, pts[inside], size, seek), 0.0
        late = float(times[0] - (here[0] - origin))
        for shift in (0.0, late):
            if (np.abs(origin + times - shift - here) < half).all():
                return VideoFrames(file, pts[inside], size, seek), shift
        row = int(np.argmax(np.abs(origin + times - late - here) >= half))
        raise FileError(
            f"{file}: its frame {row} comes {here[row] - here[0]:g} s after its first, but the timestamp of row {row} "
            f"{times[row] - times[0]:g} s, over half a frame away; "
            "if row t is frame t all the same, set convert.options.frames to 'order'"
        )
    usable = np.ones(len(pts), dtype=bool) if span is None else (seconds >= span[0] - half) & (seconds <= span[1] + half)
    pts, seconds = pts[usable], seconds[usable]
    if not len(pts):
        raise FileError(f"{file}: no frames{part}")
    target = origin + times
    right = np.clip(np.searchsorted(seconds, target), 0, len(pts) - 1)
    left = np.maximum(right - 1, 0)
    nearest = np.where(np.abs(seconds[left] - target) <= np.abs(seconds[right] - target), left, right)
    far = np.abs(seconds[nearest] - target) >= half
    if far.any():
        row = int(np.argmax(far))
        raise FileError(
            f"{file}: row {row} of the episode is at {times[row]:g} s and the nearest of the {count} frames{part} at "
            f"{seconds[nearest[row]] - origin:g} s, over half a frame away (the episode has {rows} rows)"
        )
    if (np.diff(nearest) <= 0).any():
        row = int(np.argmax(np.diff(nearest) <= 0))
        raise FileError(
            f"{file}: rows {row} and {row + 1} of the episode both fall on the frame at {seconds[nearest[row]]:g} s"
        )
    return VideoFrames(file, pts[nearest], size, seek), 0.0
