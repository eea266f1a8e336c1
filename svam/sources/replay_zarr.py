"""Replay buffers of diffusion_policy and its kin: Zarr v2, a folder `x.zarr` or an archive `x.zarr.zip`.

`data/<name>` are arrays with one row per time step of all episodes; `meta/episode_ends` (E,) are the rows where episodes end.
Row t of an action belongs to row t of the pictures: the action that was taken from what the picture shows.

- Pictures: (n, H, W, 3) or (n, 3, H, W), uint8, or floats that are whole numbers in 0..255 (old PushT buffers), which become
  uint8 exactly; other floats are refused. Their order of channels is taken to be RGB, as the format's own readers do.
- Vectors of any numeric dtype become float32; arrays with more axes, such as key points (n, 9, 2), are flattened per row.
- The format has no instruction and no rate: both are options that must be given.
- Values are kept as recorded; the notes state the range of what is read (PushT's positions leave their 0..512 now and then).

A chunk that is absent is an error: Zarr would give its fill value instead. Blosc chunks have no checksum: a length that does
not fit is found, a flipped bit inside need not be (in a `.zarr.zip` the archive's CRC-32 finds it).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from svam.contract import EVERYTHING, Choice, ContractError, Episode, EpisodeShape, FrameBlocks, Frozen, SourceDescription
from svam.errors import ParamsError
from svam.files import FileError, stamp
from svam.sources._npz import frames_per_block
from svam.sources._zarr2 import ZarrArray, ZarrFolder

_SURVEYED = 50_000_000
"""Numbers of an array up to which its range is read for the notes."""


class Options(Frozen):
    """`instruction` and `rate_hz` must be given: the format has neither. PushT is recorded at 10 Hz.

    instruction: the sentence for all episodes. rate_hz: time steps per second.
    cameras: arrays of `data` that are pictures, the foresight camera first; empty takes all with 4 axes, one of length 3.
    action: arrays joined to the action; empty takes none, and then only the video model can be trained.
    proprioception: arrays joined to what the robot knows of itself. state: arrays joined to the full state.
    Columns are chosen in brackets: for PushT `proprioception: ["state[0:2]"]` is the agent's position.
    timestamp: an array (n,) or (n, 1) of seconds, if there is one.
    """

    instruction: Annotated[str, Field(pattern=r"\S")] | None = None
    rate_hz: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    cameras: tuple[str, ...] = ()
    action: tuple[str, ...] = ("action",)
    proprioception: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    timestamp: str | None = None


def _buffer_path(path: Path) -> Path:
    """The buffer itself: `path`, or the only `*.zarr` or `*.zarr.zip` in it."""
    if path.is_file() or (path / "meta").is_dir() or (path / ".zgroup").is_file():
        return path
    if not path.is_dir():
        raise FileError(f"{path}: no such file or directory")
    inside = sorted([*path.glob("*.zarr"), *path.glob("*.zarr.zip")])
    if len(inside) != 1:
        names = ", ".join(file.name for file in inside) or "none"
        raise FileError(f"{path}: expected a replay buffer, or one *.zarr or *.zarr.zip in it; found {names}")
    return inside[0]


@dataclass(frozen=True)
class _Columns:
    """An array of `data`, flattened per row, and which of its columns are meant."""

    array: ZarrArray
    start: int
    stop: int


class ReplayZarrSource:
    """The episodes of one buffer, in its order."""

    def __init__(self, path: Path, options: Options) -> None:
        """See `open_source`."""
        if options.instruction is None:
            raise ParamsError(
                "convert.options.instruction is missing: a replay buffer has no instruction; write the sentence for it"
            )
        if options.rate_hz is None:
            raise ParamsError("convert.options.rate_hz is missing: a replay buffer does not say its rate; PushT has 10")
        self.path, self.options = _buffer_path(Path(path)), options
        self.instruction, self.rate_hz = options.instruction, options.rate_hz
        self._buffer = ZarrFolder(self.path)
        self._ends = self._episode_ends()
        self._pictures = self._choose_pictures()
        self._vectors = {
            "actions": self._columns("action", options.action),
            "proprioception": self._columns("proprioception", options.proprioception),
            "state": self._columns("state", options.state),
        }
        self._times = self._columns("timestamp", (options.timestamp,) if options.timestamp else ())
        for array in {a.name: a for a in [*self._pictures.values(), *(c.array for c in self._all_columns())]}.values():
            if array.shape[0] < self._ends[-1]:
                raise FileError(
                    f"{self.path}: {array.name} has {array.shape[0]} rows, but meta/episode_ends reaches to {self._ends[-1]}"
                )

    def _all_columns(self) -> list[_Columns]:
        return [column for columns in (*self._vectors.values(), self._times) for column in columns]

    def _episode_ends(self) -> list[int]:
        array = self._buffer.array("meta/episode_ends")
        if array.dtype.kind not in "ui" or len(array.shape) != 1 or not 0 < array.shape[0] <= 10_000_000:
            raise FileError(
                f"{self.path}: meta/episode_ends is {array.dtype} {array.shape}, expected whole numbers, one an episode"
            )
        ends = [int(end) for end in self._buffer.rows(array, 0, array.shape[0])]
        for number, (before, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end <= before:
                raise FileError(f"{self.path}: meta/episode_ends[{number}] is {end}, expected more than {before}")
        return ends

    def _choose_pictures(self) -> dict[str, ZarrArray]:
        names = self.options.cameras
        if not names:
            headers = [self._buffer.array(f"data/{name}") for name in self._buffer.names()]
            chosen = [a for a in headers if len(a.shape) == 4 and 3 in (a.shape[-1], a.shape[1])]
        else:
            chosen = [self._buffer.array(f"data/{self._known(name, 'cameras')}") for name in names]
        if not chosen:
            raise FileError(
                f"{self.path}: no pictures: data has {', '.join(self._buffer.names()) or 'nothing'}, none is (n, H, W, 3)"
            )
        for array in chosen:
            if len(array.shape) != 4 or 3 not in (array.shape[-1], array.shape[1]) or array.dtype.kind not in "uf":
                raise FileError(f"{self.path}: {array.name} is {array.dtype} {array.shape}, expected pictures (n, H, W, 3)")
        return {array.name.removeprefix("data/"): array for array in chosen}

    def _known(self, name: str, option: str) -> str:
        if name not in self._buffer.names():
            raise FileError(f"{self.path}: convert.options.{option} names {name!r}; data has {', '.join(self._buffer.names())}")
        return name

    def _columns(self, option: str, names: Sequence[str]) -> tuple[_Columns, ...]:
        columns = []
        for name in names:
            match = re.fullmatch(r"([^\[\]]+)(?:\[(\d{1,9}):(\d{1,9})\])?", name)
            if match is None:
                raise ParamsError(
                    f"convert.options.{option} has {name!r}, expected a name, or a name with columns as in 'state[0:2]'"
                )
            array = self._buffer.array(f"data/{self._known(match[1], option)}")
            start, stop = (0, array.row) if match[2] is None else (int(match[2]), int(match[3]))
            if not 0 <= start < stop <= array.row or array.dtype.kind == "b":
                raise FileError(
                    f"{self.path}: convert.options.{option} names {name!r}, but {array.name} is {array.dtype} {array.shape}"
                )
            columns.append(_Columns(array, start, stop))
        return tuple(columns)

    @cached_property
    def notes(self) -> Sequence[str]:
        """What is not read, and the range of what is."""
        used = {*self._pictures, *(column.array.name.removeprefix("data/") for column in self._all_columns())}
        notes = []
        if unused := [name for name in self._buffer.names() if name not in used]:
            notes.append(f"{self.path}: not read: {', '.join(unused)}")
        if not self._vectors["actions"]:
            notes.append(f"{self.path}: no actions are read: the episodes can train the video model, no policy")
        for array in self._pictures.values():
            if array.dtype != np.uint8:
                notes.append(
                    f"{self.path}: {array.name} is {array.dtype}; its whole numbers become uint8, any others are refused"
                )
            if array.shape[0] > self._ends[-1]:
                left = array.shape[0] - self._ends[-1]
                notes.append(f"{self.path}: {left} rows of {array.name} are behind the last episode and left out")
        for name, columns in self._vectors.items():
            if columns and self._ends[-1] * sum(c.array.row for c in columns) <= _SURVEYED:
                values = self._joined(columns, 0, self._ends[-1])
                notes.append(f"{self.path}: {name} ranges from {values.min():g} to {values.max():g}; kept as recorded")
        return notes

    def describe(self) -> SourceDescription:
        """Rate and instruction as given, cameras."""
        return SourceDescription(
            rate_hz=self.rate_hz, cameras=list(self._pictures), instructions={self.instruction: {
                "train": [self.instruction], "held_out": []}}, provenance={"source": "replay_zarr"},
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._ends)

    def _bounds(self, index: int) -> tuple[int, int]:
        return (self._ends[index - 1] if index else 0), self._ends[index]

    def shape(self, index: int) -> EpisodeShape:
        """Length, from `episode_ends`. The stamp covers the arrays' folders, or the archive."""
        start, stop = self._bounds(index)
        arrays = {*(a.name for a in self._pictures.values()), *(c.array.name for c in self._all_columns())}
        files = [self.path] if self._buffer.zipped else [self.path / name for name in sorted(arrays)]
        return EpisodeShape(stop - start, stamp=" ".join([f"{start}:{stop}", *(stamp(file) for file in files)]))

    def _joined(self, columns: Sequence[_Columns], start: int, stop: int) -> NDArray[np.float64]:
        parts = [
            self._buffer.rows(c.array, start, stop).reshape(stop - start, -1)[:, c.start : c.stop].astype(np.float64)
            for c in columns
        ]
        return np.concatenate(parts, axis=1)

    def read(self, index: int) -> Episode:
        """One episode; its pictures are read chunk by chunk when they are asked for.

        Raises:
            FileError: a chunk is missing or damaged.
            ContractError: the episode breaks the contract.
        """
        start, stop = self._bounds(index)
        frames = {}
        for camera, array in self._pictures.items():
            last = array.shape[-1] == 3
            height, width = array.shape[1:3] if last else array.shape[2:]
            blocks = partial(_read_pictures, self._buffer, array, start, stop)
            frames[camera] = FrameBlocks((stop - start, height, width, 3), blocks)
        vectors: dict[str, NDArray[np.float32]] = {}
        for name, columns in self._vectors.items():
            if columns:
                with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which check() names
                    vectors[name] = self._joined(columns, start, stop).astype(np.float32)
        times = self._joined(self._times, start, stop) if self._times else None
        if times is not None and times.shape[1] != 1:
            raise FileError(f"{self.path}: convert.options.timestamp has {times.shape[1]} columns, expected one")
        episode = Episode(
            task=self.instruction, instruction=self.instruction, rate_hz=self.rate_hz, frames=frames,
            actions=vectors.get("actions"), proprioception=vectors.get("proprioception"), state=vectors.get("state"),
            timestamps=None if times is None else times[:, 0],
            provenance={"file": f"{self.path.name}[{start}:{stop}]"},
        )  # fmt: skip
        try:
            episode.check()
        except ContractError as error:
            raise ContractError(f"{self.path}: {error}") from None
        return episode


def _read_pictures(buffer: ZarrFolder, array: ZarrArray, start: int, stop: int) -> Iterator[NDArray[np.uint8]]:
    """Each chunk is decompressed once per episode."""
    last = array.shape[-1] == 3
    step = frames_per_block(array.row)
    row = start
    while row < stop:
        end = min(stop, (row // array.chunks[0] + 1) * array.chunks[0])
        while end - row < step // 2 and end < stop:  # one-frame chunks, the format's usual ones, are gathered
            end = min(stop, end + array.chunks[0])
        values = buffer.rows(array, row, end)
        for first in range(0, len(values), step):
            part = values[first : first + step]
            pictures = part if last else np.moveaxis(part, 1, -1)
            yield np.ascontiguousarray(_to_uint8(buffer.path, array.name, row + first, pictures))
        row = end


def _to_uint8(path: Path, name: str, row: int, pictures: NDArray[Any]) -> NDArray[np.uint8]:
    if pictures.dtype == np.uint8:
        return pictures
    with np.errstate(invalid="ignore"):
        converted: NDArray[np.uint8] = pictures.astype(np.uint8)
    different = converted != pictures
    if different.any():
        at = tuple(int(part) for part in np.argwhere(different)[0])
        raise FileError(f"{path}: {name} is {pictures[at]:g} in row {row + at[0]}, expected whole numbers in 0..255")
    return converted


def open_source(path: Path, options: Options, choice: Choice = EVERYTHING) -> ReplayZarrSource:
    """Open a replay buffer: the folder `x.zarr`, the archive `x.zarr.zip`, or a folder that holds one of them.

    Raises:
        ParamsError: `instruction` or `rate_hz` is missing.
        FileError: the buffer is missing or damaged, or `episode_ends` does not increase within the arrays' rows.
        MachineError: a codec's library is missing.
    """
    return ReplayZarrSource(path, options)
