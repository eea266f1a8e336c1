"""Replay buffers of diffusion_policy and its kin: Zarr v2 or v3, a folder `x.zarr` or an archive `x.zarr.zip`.

`data/<name>` are arrays with one row per time step of all episodes; `meta/episode_ends` (E,) are the rows where episodes end.
Row t of an action belongs to row t of the pictures: the action that was taken from what the picture shows.

- Cameras are the arrays of pictures: (n, H, W, C) or (n, C, H, W), C 3 or 4 (the fourth is dropped), uint8, or whole numbers
  in 0..255 of another type (old PushT buffers), which become uint8 exactly; and grey uint8 that `convert.cameras` names. Others
  are left out, with a note. Channels are taken to be RGB, as the format's own readers do.
- Vectors of any numeric dtype become float32; arrays with more axes, such as key points (n, 9, 2), are flattened per row.
- The format has no instruction and no rate: set `convert.instruction` and `convert.rate_hz`. PushT is recorded at 10 Hz.
- Values are kept as recorded; the notes state the range of what is read (PushT's positions leave their 0..512 now and then).

Zarr's writers leave out chunks that hold the fill value alone: an absent chunk is read as that, and a note counts them.
Pictures without any chunk are refused: nobody films the dark, but folders are copied in part. Blosc chunks have no checksum: a
length that does not fit is found, a flipped bit inside need not be (in a `.zarr.zip` the archive's CRC-32 finds it).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svam.contract import EVERYTHING, Choice, Episode, EpisodeShape, FrameBlocks, Frozen, SourceDescription
from svam.errors import MachineError, ParamsError
from svam.files import FileError, stamp
from svam.sources._choice import checked, chosen_cameras, chosen_instruction, contents, rate_notes
from svam.sources._pictures import (
    PictureArray,
    depth_doubts,
    frames_per_block,
    named_pictures,
    needed_pictures,
    picture_array,
    without_it,
)
from svam.sources._zarr import ZarrArray, ZarrFolder

_SURVEYED = 50_000_000
"""Numbers of an array up to which its range is read for the notes."""


class Options(Frozen):
    """What `convert.options` may say.

    action: arrays joined to the action; empty takes none, and then only the video model can be trained.
    proprioception: arrays joined to what the robot knows of itself. state: arrays joined to the full state.
    Columns are chosen in brackets: for PushT `proprioception: ["state[0:2]"]` is the agent's position; `state[4]` is one.
    timestamp: an array (n,) or (n, 1) of seconds, if there is one.
    """

    action: list[str] = ["action"]
    proprioception: list[str] = []
    state: list[str] = []
    timestamp: str | None = None


def _buffer_path(path: Path) -> Path:
    """The buffer itself: `path`, or the only `*.zarr` or `*.zarr.zip` in it."""
    if path.is_file() or any((path / name).exists() for name in ("meta", ".zgroup", "zarr.json")):
        return path
    if not path.is_dir():
        raise FileError(f"{path}: no such file or directory")
    inside = sorted([*path.glob("*.zarr"), *path.glob("*.zarr.zip")])
    if len(inside) != 1:
        raise FileError(f"{path}: expected a replay buffer, or one *.zarr or *.zarr.zip in it; it has {contents(path)}")
    return inside[0]


class ReplayZarrSource:
    """The episodes of one buffer, in its order."""

    def __init__(self, path: Path, options: Options, choice: Choice = EVERYTHING) -> None:
        """Open a replay buffer: the folder `x.zarr`, the archive `x.zarr.zip`, or a folder that holds one of them.

        Raises:
            ParamsError: `choice` has no rate, or the options name no array.
            FileError: no instruction; the buffer is missing or damaged, or `episode_ends` decreases.
            MachineError: a codec's library is missing.
        """
        self.path = _buffer_path(Path(path))
        if choice.rate_hz is None:
            raise ParamsError("convert.rate_hz is missing: a replay buffer does not say its rate; PushT has 10")
        self.rate_hz, self.instruction = choice.rate_hz, chosen_instruction(choice, None, str(self.path))
        self._buffer = ZarrFolder(self.path)
        ends = self._episode_ends()
        self._episodes, self._rows = list(pairwise([0, *ends])), ends[-1]
        self._unreadable: list[str] = []
        self._pictures = self._choose_pictures(choice)
        named = dict(options) | {"timestamp": [options.timestamp] if options.timestamp else []}
        self._vectors = {option: [self._columns(option, name) for name in names] for option, names in named.items()}
        read = [*self._pictures.values(), *chain(*self._vectors.values())]
        self._arrays = {array.name: array for array, _ in read}

    def _episode_ends(self) -> list[int]:
        array = self._buffer.array("meta/episode_ends")
        if array.dtype.kind not in "ui" or len(array.shape) != 1 or not 0 < array.shape[0] <= 10_000_000:
            raise FileError(
                f"{self.path}: meta/episode_ends is {array.dtype} {array.shape}, expected whole numbers, one an episode"
            )
        if array.empty:
            raise FileError(f"{self.path}: meta/episode_ends has none of its chunks: was the whole folder copied?")
        ends = [int(end) for end in self._buffer.rows(array, 0, array.shape[0])]
        for number, (before, end) in enumerate(pairwise([0, *ends])):
            if end < before:
                raise FileError(f"{self.path}: meta/episode_ends[{number}] is {end}, expected more than {before}")
        return ends

    def _choose_pictures(self, choice: Choice) -> dict[str, tuple[ZarrArray, PictureArray]]:
        """The chosen arrays of pictures, else all; one that cannot be read is no matter where it is not chosen."""
        known: dict[str, tuple[ZarrArray, PictureArray]] = {}
        chosen = {name.removeprefix("data/") for name in choice.cameras}
        for name in self._buffer.names:
            try:
                array = self._buffer.array(f"data/{name}")
                where, kind = f"{self.path}: {array.name}", (array.shape, array.dtype)
                pictures = needed_pictures(where, *kind) if name in chosen else picture_array(*kind)
                if pictures is not None and array.empty:
                    raise FileError(
                        f"{where} has none of its {array.left_out} chunks: was the whole folder copied? If all its pictures "
                        "are black, leave it out by convert.cameras"
                    )
                if pictures is not None and pictures.dtype != np.uint8:  # such as 0 to 1, or depth
                    pictures.rgb(self._buffer.rows(array, 0, 1), where, 0)
            except (FileError, MachineError) as error:
                if name in chosen or not (chosen or isinstance(error, FileError)):
                    raise
                self._unreadable.append(without_it(error, []))
                continue
            if pictures is not None:
                known[name] = array, pictures
            elif named_pictures(*kind) is not None:
                self._unreadable.append(f"{where} is uint8 {array.shape}; if it is grey, convert.cameras can name it")
        if not known:
            has, why = ", ".join(self._buffer.names) or "nothing", "".join(f"; {said}" for said in self._unreadable)
            if (videos := self.path.parent / "videos").is_dir() and not self._buffer.zipped:
                why += (
                    f"; they are in {videos}/<episode>/<camera>.mp4, which this source does not read; write them and the "
                    "vectors as convert.source 'raw' (svam/sources/raw.py), whose frames may be mp4"
                )
            raise FileError(f"{self.path}: no pictures: data has {has}, none of which is (n, H, W, 3) uint8{why}")
        self._doubts = [] if chosen else depth_doubts(array.name for array, _ in known.values())
        return {name: known[name] for name in chosen_cameras(choice, list(known), self.path, "data/")}

    def _columns(self, option: str, name: str) -> tuple[ZarrArray, slice]:
        """An array of `data`, and which of its columns are meant, flattened per row."""
        match = re.fullmatch(r"([^\[\]]+)(?:\[(\d{1,9})(?::(\d{1,9}))?\])?", name.removeprefix("data/"))
        if match is None:
            raise ParamsError(
                f"convert.options.{option} has {name!r}, expected a name, or a name with columns as in 'state[0:2]', 'state[4]'"
            )
        where = f"{self.path}: convert.options.{option} names {name!r}"
        if match[1] not in self._buffer.names:
            raise FileError(f"{where}; data has {', '.join(self._buffer.names)}")
        array = self._buffer.array(f"data/{match[1]}")
        start, stop = (0, array.row) if match[2] is None else (int(match[2]), int(match[3] or int(match[2]) + 1))
        if not start < stop <= array.row:
            raise FileError(f"{where}, but {array.name} is {array.dtype} {array.shape}")
        if option == "timestamp" and stop - start != 1:
            raise FileError(f"{where}, which has {stop - start} columns, expected one")
        return array, slice(start, stop)

    @cached_property
    def notes(self) -> Sequence[str]:
        """What is not read, and the range of what is."""
        notes, whole = [], min([self._rows, *(array.shape[0] for array in self._arrays.values())])
        if unused := [name for name in self._buffer.names if f"data/{name}" not in self._arrays]:
            notes.append(f"not read: {', '.join(unused)}")
        if not self._vectors["action"]:
            notes.append("no actions are read: the episodes can train the video model, no policy")
        for array in self._arrays.values():
            if array.left_out:
                count = f"all {array.left_out}" if array.empty else str(array.left_out)
                notes.append(
                    f"{count} chunks of {array.name} are absent and read as its fill value (zero where it states none), as "
                    "Zarr's writers mean it; if the buffer was copied, check that it is whole"
                )
            if (left := array.shape[0] - self._rows) > 0:
                notes.append(f"{left} rows of {array.name} are behind the last episode and left out")
        notes += [*self._doubts, *(note for array, pictures in self._pictures.values() for note in pictures.notes(array.name))]
        first = min(self._episodes[0][1], whole)
        for times in self._vectors["timestamp"] if first else ():
            notes += rate_notes(self._joined([times], 0, first)[:, 0], self.rate_hz, times[0].name)
        for name, columns in self._vectors.items():
            if whole and columns and name != "timestamp" and whole * sum(array.row for array, _ in columns) <= _SURVEYED:
                values = self._joined(columns, 0, whole)
                notes.append(f"{name} ranges from {values.min():g} to {values.max():g}; kept as recorded")
        return [f"left out: {said}" for said in self._unreadable] + [f"{self.path}: {note}" for note in notes]

    def describe(self) -> SourceDescription:
        """Rate and instruction as given, cameras."""
        return SourceDescription(
            rate_hz=self.rate_hz, cameras=list(self._pictures), instructions={self.instruction: {
                "train": [self.instruction], "held_out": []}}, provenance={"source": "replay_zarr"},
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._episodes)

    def shape(self, index: int) -> EpisodeShape:
        """Length, from `episode_ends`. The stamp covers the arrays' files, or the archive."""
        start, stop = self._episodes[index]
        if start == stop:
            raise FileError(f"{self.path}: meta/episode_ends[{index}] is {stop}, expected more than {start}")
        for array in self._arrays.values():
            if (rows := array.shape[0]) < stop:
                raise FileError(
                    f"{self.path}: {array.name} has {rows} rows, but meta/episode_ends reaches to {stop} in episode {index}"
                )
        return EpisodeShape(stop - start, stamp=f"{start}:{stop} {self._stamp}", name=str(index), task=self.instruction)

    @cached_property
    def _stamp(self) -> str:
        files = [file for name in sorted(self._arrays) for file in sorted((self.path / name).rglob("*"))]
        return hashlib.sha256(" ".join(map(stamp, files or [self.path])).encode()).hexdigest()

    def _joined(self, columns: Sequence[tuple[ZarrArray, slice]], start: int, stop: int) -> NDArray[np.float64]:
        parts = [self._buffer.rows(array, start, stop).reshape(stop - start, -1)[:, part] for array, part in columns]
        return np.hstack(parts, dtype=np.float64)

    def read(self, index: int) -> Episode:
        """One episode."""
        start, stop = self._episodes[index]
        frames = {
            camera: FrameBlocks((stop - start, *pictures.shape[1:]), partial(self._blocks, camera, start, stop))
            for camera, (_, pictures) in self._pictures.items()
        }
        values = {name: self._joined(columns, start, stop) for name, columns in self._vectors.items() if columns}
        times = values.pop("timestamp", None)
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which check() names
            vectors = {name: vector.astype(np.float32) for name, vector in values.items()}
        episode = Episode(
            task=self.instruction, instruction=self.instruction, rate_hz=self.rate_hz, frames=frames,
            actions=vectors.get("action"), proprioception=vectors.get("proprioception"), state=vectors.get("state"),
            timestamps=None if times is None else times[:, 0],
            provenance={"file": f"{self.path.name}[{start}:{stop}]"},
        )  # fmt: skip
        return checked(episode, self.path)

    def _blocks(self, camera: str, start: int, stop: int) -> Iterator[NDArray[np.uint8]]:
        """Each chunk is decompressed once per episode."""
        array, pictures = self._pictures[camera]
        step, chunk = frames_per_block(pictures.frame_bytes), array.chunks[0]
        together = max(1, step // chunk) * chunk  # one-frame chunks, the format's usual ones, are gathered
        for edge in range(start - start % chunk, stop, together):
            row = max(start, edge)
            values = self._buffer.rows(array, row, min(stop, edge + together))
            for first in range(0, len(values), step):
                yield pictures.rgb(values[first : first + step], f"{self.path}: {array.name}", row + first)


open_source = ReplayZarrSource
