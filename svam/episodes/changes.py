"""A source's episodes as `convert` asks for them: cut where their sentence changes, at another rate, with other vectors.

Rows of a part are first resampled: row j is at the time of row j * old rate / new rate of the recording; vectors and timestamps
are interpolated there, frames are the nearest. So are binary dimensions, poses of which differences are made, and angles
where they jump between the ends of -pi to pi. Then actions are shifted: the last rows have none and are left out. In what order
actions change says `svam.actions`. Labels belong to single frames, so they are left out where rows are cut, resampled or
shifted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.actions import differences, limited, two_values, unwrapped
from svam.contract import (
    VECTORS,
    ContractError,
    Episode,
    EpisodeShape,
    EpisodeSource,
    FrameBlocks,
    Frames,
    SourceDescription,
    frame_blocks,
)  # fmt: skip
from svam.conversion import COLUMNS_OF, Convert
from svam.errors import ParamsError

UNCHANGED: dict[str, Any] = {
    "segments": False, "columns": {name: [] for name in VECTORS}, "unwrap": [], "resample_hz": None, "shift": 0,
    "differences": [], "binary_values": [-1.0, 1.0], "limits": [],
}  # fmt: skip
"""Keys of `convert` that this module applies, and the values at which they change nothing."""


def changed(source: EpisodeSource, params: Convert) -> EpisodeSource:
    """`source`, or its episodes changed where something is asked for."""
    asked = {key: value for key, value in params.model_dump(include=set(UNCHANGED)).items() if value != UNCHANGED[key]}
    cut = any(source.shape(number).segments for number in range(len(source)))
    return ChangedEpisodes(source, params, asked) if asked or cut else source


@dataclass(frozen=True)
class _Part:
    """Rows first..end - 1 of an episode of the source. sentences: none where it keeps its own."""

    number: int
    first: int
    end: int
    sentences: tuple[str, ...] = ()


class ChangedEpisodes:
    """The episodes of a source, or their parts, in its order; `numbers` are those of the episodes that they come from."""

    def __init__(self, source: EpisodeSource, params: Convert, asked: dict[str, Any]) -> None:
        """Look at every episode once.

        Raises:
            ParamsError: nothing is left of an episode, or its segments do not lie in it.
        """
        self.source, self._params, self._asked = source, params, asked
        self._rate = source.describe().rate_hz
        shapes = [source.shape(number) for number in range(len(source))]
        self._cut = any(shape.segments for shape in shapes)
        self._parts: list[_Part] = []
        self._unsaid = 0
        for number, shape in enumerate(shapes):
            chosen = [s for s in shape.segments if not params.tasks or s.sentences[0] in params.tasks]
            parts = [_Part(number, s.first, s.end, s.sentences) for s in chosen]
            self._parts += parts if shape.segments else [_Part(number, 0, shape.steps)]
            if shape.segments:
                self._unsaid += shape.steps - len({row for s in shape.segments for row in range(s.first, s.end)})
        own = getattr(source, "numbers", range(len(source)))
        self.numbers = [own[part.number] for part in self._parts]
        if short := sorted({n for n, part in zip(self.numbers, self._parts, strict=True) if self._steps(part) < 1}):
            raise ParamsError(
                f"convert.shift {params.shift} leaves nothing of {len(short)} episodes, which have no more rows; lower it, or "
                f"leave them out: convert.drop: {short}"
            )

    def _steps(self, part: _Part) -> int:
        return len(self._places(part)) - self._params.shift

    def _places(self, part: _Part) -> NDArray[np.float64]:
        """The rows of a part in rows of the recording, where resampled between them."""
        ratio = 1.0 if self._params.resample_hz is None else self._rate / self._params.resample_hz
        count = int((part.end - part.first - 1) / ratio + 1e-9) + 1
        places: NDArray[np.float64] = np.minimum(part.first + np.arange(count) * ratio, part.end - 1)
        return places

    @property
    def _other_rows(self) -> bool:
        return self._cut or self._params.shift > 0 or self._params.resample_hz is not None

    @property
    def notes(self) -> Sequence[str]:
        """The source's, and what is changed."""
        params, notes = self._params, list(self.source.notes)
        if "segments" in self._asked and not self._cut:
            notes.append("no episode's sentence changes, so convert.segments cuts none")
        if self._cut:
            left_out = f"; {self._unsaid} rows of no sentence are left out" if self._unsaid else ""
            notes.append(f"{len(self.source)} episodes are cut into {len(self)} by their sentences{left_out}")
        if params.resample_hz is not None:
            notes.append(
                f"resampled from {self._rate:g} to {params.resample_hz:g} Hz: vectors are interpolated, frames are the "
                "nearest; where actions are differences from row to row, these are not added up"
            )
        if params.shift:
            notes.append(f"actions are those of {params.shift} rows later; the last {params.shift} of an episode are left out")
        for one in params.differences:
            columns = "columns {} to {}".format(*one.columns)
            notes.append(f"actions, {columns}: {one.kind} differences in the {one.frame} frame")
        if self._other_rows and any(self.source.shape(part.number).annotated for part in self._parts):
            notes.append("labels of frames are left out, since rows were cut, resampled or shifted")
        return notes

    def describe(self) -> SourceDescription:
        """The source's, with the parts' sentences, the rate, names of the chosen columns, and what was asked for."""
        description, params = self.source.describe(), self._params
        said: dict[str, dict[str, list[str]]] = {}
        for part in self._parts:
            task = part.sentences[0] if part.sentences else self.source.shape(part.number).task
            listed = said.setdefault(task, description.instructions.get(task, {"train": [], "held_out": []}))
            said[task] = listed | {"train": list(dict.fromkeys([*listed["train"], *part.sentences]))}
        provenance = description.provenance | {"changes": self._asked}
        if names := description.provenance.get("dimension_names"):
            provenance["dimension_names"] = self._names(names)
        return description.model_copy(update={
            "rate_hz": params.resample_hz or description.rate_hz, "provenance": provenance,
            "instructions": said if self._cut else description.instructions,
        })  # fmt: skip

    def _names(self, names: dict[str, list[str]]) -> dict[str, list[str]]:
        """Of the vectors' dimensions; none of a vector some of whose columns have none."""
        chosen = self._params.columns.model_dump()
        joined = {vector: [_range_of(text) for text in chosen[vector]] for vector in chosen if chosen[vector]}
        known = {
            vector: [name for one, first, end in columns for name in names.get(one, [])[first:end]]
            for vector, columns in joined.items()
            if all(one in names and (end is None or end <= len(names[one])) for one, first, end in columns)
        }
        return {vector: own for vector, own in names.items() if vector not in joined} | known

    def __len__(self) -> int:
        return len(self._parts)

    def shape(self, index: int) -> EpisodeShape:
        """The source's, of the part."""
        part = self._parts[index]
        shape = self.source.shape(part.number)
        group = shape.group or f"episode {part.number}" if self._cut else shape.group
        return replace(
            shape, steps=self._steps(part), task=part.sentences[0] if part.sentences else shape.task, group=group, segments=(),
            annotated={} if self._other_rows else shape.annotated,
        )  # fmt: skip

    def read(self, index: int) -> Episode:
        """The part, with the vectors that are asked for.

        Raises:
            ParamsError: columns are asked for that are not there, or numbers are not what the params say of them.
            ContractError: a rotation is none.
        """
        part, params = self._parts[index], self._params
        episode = self.source.read(part.number)
        where = str(episode.provenance.get("file", episode.task))
        vectors = _chosen(episode, params)
        actions = [name for name in ("actions", "expert_actions") if name in vectors]
        _check_columns(self._asked, params, vectors)
        try:
            for name in actions:
                vectors[name] = unwrapped(vectors[name], params.unwrap)
            if self._other_rows:
                places, steps = self._places(part), self._steps(part)
                for vector, values in vectors.items():
                    there = _at(values, places, _as_recorded(params, vector))
                    vectors[vector] = there[params.shift :] if vector in actions else there[:steps]
                episode = _rows(episode, places[:steps])
            for name in actions:
                if params.differences:
                    vectors[name] = differences(vectors[name], vectors["proprioception"], params.differences)
                if "binary_values" in self._asked:
                    vectors[name] = two_values(vectors[name], params.binary_dimensions, params.binary_values)
                vectors[name] = limited(vectors[name], params.limits)
        except (ContractError, ParamsError) as error:
            raise type(error)(f"{where}: {error}") from None
        said = {"task": part.sentences[0], "instruction": part.sentences[0]} if part.sentences else {}
        rows = {"rows": [part.first, part.end]} if self._cut else {}
        changed: dict[str, Any] = {
            "rate_hz": params.resample_hz or episode.rate_hz, "provenance": {**episode.provenance, **rows}, **said,
            **{name: vectors.get(name) for name in VECTORS},
        }  # fmt: skip
        return replace(episode, **changed)


def _range_of(text: str) -> tuple[str, int, int | None]:
    """Vector, first column and the one after the last (None: all) of `convert.columns`."""
    match = re.fullmatch(COLUMNS_OF, text)
    assert match is not None  # the params say so
    vector, first, end = match.groups()
    return vector, int(first or 0), None if first is None else int(end or int(first) + 1)


def _chosen(episode: Episode, params: Convert) -> dict[str, Any]:
    """Those vectors that there are, by name, of the columns that `convert.columns` names."""
    own: dict[str, Any] = {name: values for name in VECTORS if (values := getattr(episode, name)) is not None}
    chosen: dict[str, list[str]] = params.columns.model_dump()
    result = {name: values for name, values in own.items() if name != "expert_actions" or not chosen["actions"]}
    for vector, texts in chosen.items():
        parts = []
        for text in texts:
            name, first, end = _range_of(text)
            there = own[name].shape[1] if name in own else 0
            if first >= (end or there) or (end or 0) > there:
                raise ParamsError(f"convert.columns.{vector} names {text!r}, but {name} has {there} columns")
            parts.append(own[name][:, first:end])
        if parts:
            result[vector] = np.ascontiguousarray(np.concatenate(parts, axis=1))
    return result


def _check_columns(asked: dict[str, Any], params: Convert, vectors: dict[str, Any]) -> None:
    """Raise `ParamsError` where params name columns that are not there."""
    dimensions, known = (vectors[name].shape[1] if name in vectors else 0 for name in ("actions", "proprioception"))
    for key in ("unwrap", "shift", "differences", "binary_values", "limits"):
        if key in asked and not dimensions:
            raise ParamsError(f"convert.{key} is set, but the episodes have no actions; convert.columns can choose some")
    for key in ("unwrap", "differences", "limits"):
        for one in getattr(params, key):
            if one.columns[1] > dimensions:
                raise ParamsError(f"convert.{key} names columns {one.columns}, but actions have {dimensions}")
    for one in params.differences:
        if one.proprioception[1] > known:
            raise ParamsError(
                f"convert.differences names columns {one.proprioception} of the proprioception, which has {known}; "
                "convert.columns.proprioception can choose some of other vectors"
            )
    for d in params.binary_dimensions:
        if d >= dimensions:
            raise ParamsError(f"convert.binary_dimensions lists {d}, but actions have {dimensions} dimensions, from 0 on")


def _as_recorded(params: Convert, vector: str) -> list[int]:
    """The columns of a vector that are not interpolated: binary ones, and poses of differences, as one rotation has several
    spellings."""
    acting = vector in ("actions", "expert_actions")
    poses = [one for one in params.differences if one.kind != "linear" and (acting or vector == "proprioception")]
    ranges = [range(*(one.columns if acting else one.proprioception)) for one in poses]
    return [*(params.binary_dimensions if acting else []), *chain(*ranges)]


def _at(values: NDArray[np.float32], places: NDArray[np.float64], nearest: Sequence[int]) -> NDArray[np.float32]:
    """(k, D) of (n, D) at k places, in rows: interpolated, but for the columns `nearest`, and angles that go round at pi."""
    low = np.minimum(places.astype(np.int64), len(values) - 1)
    high, share = np.minimum(low + 1, len(values) - 1), (places - low)[:, None]
    below, above = values[low], values[high]
    kept = (np.abs(above - below) > np.pi) & (np.maximum(np.abs(below), np.abs(above)) < np.pi + 0.01)
    kept[:, list(nearest)] = True
    between = np.where(share > 0, below * (1.0 - share) + above * share, below).astype(np.float32)
    return np.where(kept, values[_nearest(places)], between)


def _nearest(places: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.floor(places + 0.5).astype(np.int64)


def _rows(episode: Episode, places: NDArray[np.float64]) -> Episode:
    """The episode with the frames nearest to some places, interpolated timestamps and no labels."""
    rows, times = _nearest(places), episode.timestamps
    frames: dict[str, Frames] = {
        camera: images[rows] if isinstance(images, np.ndarray)
        else FrameBlocks((len(rows), *images.shape[1:]), partial(_picked, images, rows))
        for camera, images in episode.frames.items()
    }  # fmt: skip
    if times is not None:
        times = np.interp(places, np.arange(len(times)), times)
    return replace(episode, frames=frames, timestamps=times, annotations={})


def _picked(frames: FrameBlocks, rows: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """The frames of increasing rows, which may repeat; nothing is decoded after the last."""
    first = 0
    for block in frame_blocks(frames):
        here = rows[(rows >= first) & (rows < first + len(block))] - first
        for start in range(0, len(here), len(block)):
            yield block[here[start : start + len(block)]]
        first += len(block)
        if first > rows[-1]:
            return
