"""The stores of several data sets as one, by a small index beside them, which `svam.episodes.sets` writes.

Rows and episodes of the sets stand one after the other. Of each set the foresight cameras are shown; vectors of different width
are padded with zeros, and each set keeps its own statistics and conventions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from svam.contract import ContractError, Frozen, Statistics
from svam.episodes.store import SETS, SPLITS, AnnotatedRows, EpisodeStore, Split
from svam.files import read_json, stated

SCHEMA = 1


class Member(Frozen):
    """One set of the index. weight: its share of what training draws, among the weights of all. policy: whether the policy
    learns from it."""

    name: str
    weight: Annotated[float, Field(gt=0)]
    policy: bool


class Index(Frozen):
    """`sets.json`."""

    schema_version: Annotated[int, Field(ge=SCHEMA, le=SCHEMA)]
    sets: Annotated[list[Member], Field(min_length=1)]


class _Labels(NamedTuple):
    """Labels of some frames of several sets, read by their places one after the other."""

    parts: list[AnnotatedRows]

    def read(self, places: NDArray[np.int64]) -> NDArray[Any]:
        ends = np.cumsum([len(part.rows) for part in self.parts])
        number = np.searchsorted(ends, places, side="right")
        first = ends - [len(part.rows) for part in self.parts]
        read = [(n, self.parts[n].values(places[number == n] - first[n])) for n in np.unique(number)]
        out = np.empty((len(places), *read[0][1].shape[1:]), read[0][1].dtype)
        for n, values in read:
            out[number == n] = values
        return out


class JoinedStore(EpisodeStore):
    """The stores of several sets as one; see the module's head. `attributes`, `arrays` and timestamps are those of each set.

    Attributes, besides those of `EpisodeStore`: sets: name -> store. members: what the index says of each.
    """

    def __init__(self, path: Path) -> None:
        """Open all.

        Raises:
            FileError: the index or a store is missing, damaged or of another version.
            ContractError: two sets differ in what must be the same of all, or the policy is to learn from one without actions.
        """
        self.path = Path(path)
        self.members = stated(Index, read_json(self.path / SETS), self.path / SETS).sets
        self.sets = {member.name: EpisodeStore(self.path / member.name) for member in self.members}
        self._stores = stores = list(self.sets.values())
        for name, store in self.acting.items():
            if store.attributes.statistics is None:
                raise ContractError(f"convert.sets: {name} has no actions for the policy to learn from; set policy: false")
        self._agree(self.sets, "rate", "resample_hz", lambda store: store.rate_hz)
        self._agree(self.sets, "size of frames", "image_size", lambda store: store.image_size)
        self._agree(self.sets, "number of foresight cameras", "foreseen", lambda store: len(store.foreseen))
        self._agree(self.acting, "normalisation", "normalisation", lambda store: store.statistics.convention.normalisation)
        first = next(iter({**self.acting, **self.sets}.values()))  # whose cameras name the shared ones
        self.rate_hz, self.image_size, self.cameras = first.rate_hz, first.image_size, first.foreseen
        self.foreseen = first.foreseen
        self._first = np.cumsum([0, *map(len, stores)])
        self.episode_ends = np.concatenate([s.episode_ends + row for s, row in zip(stores, self._first[:-1], strict=True)])
        self.episode_split = np.concatenate([store.episode_split for store in stores])
        self.tasks = list(dict.fromkeys(task for store in stores for task in store.tasks))
        numbers = [np.array([self.tasks.index(task) for task in store.tasks]) for store in stores]
        self.episode_task = np.concatenate([own[s.episode_task] for own, s in zip(numbers, stores, strict=True)])
        self.instructions = {
            task: {
                side: list(dict.fromkeys(said for s in stores for said in s.instructions.get(task, {}).get(side, [])))
                for side in SPLITS
            }
            for task in self.tasks
        }  # fmt: skip
        for said in self.instructions.values():  # what one set holds out another may train on
            said["held_out"] = [sentence for sentence in said["held_out"] if sentence not in said["train"]]
        self.provenance = {"source": "sets", "sets": {name: store.provenance for name, store in self.sets.items()}}
        self.episode_numbers = [number for store in stores for number in store.episode_numbers]
        self.episode_names = [name for store in stores for name in store.episode_names]
        self.episode_instructions = [said for store in stores for said in store.episode_instructions]
        self.episode_provenance = [facts for store in stores for facts in store.episode_provenance]
        self.proprioception_dimensions = max((s.proprioception_dimensions or 0 for s in stores), default=0) or None

    @staticmethod
    def _agree(sets: Mapping[str, EpisodeStore], what: str, key: str, value_of: Callable[[EpisodeStore], object]) -> None:
        values = {name: value_of(store) for name, store in sets.items()}
        for name, found in values.items():
            first, expected = next(iter(values.items()))
            if found != expected:
                raise ContractError(
                    f"convert.sets: the {what} of {name} is {found}, that of {first} {expected}; set {key} of both to the same"
                )

    @property
    def acting(self) -> dict[str, EpisodeStore]:
        """The sets that the policy learns from."""
        return {member.name: self.sets[member.name] for member in self.members if member.policy}

    @property
    def statistics(self) -> Statistics:
        raise ContractError(f"{self.path}: each of its sets ({', '.join(self.sets)}) has statistics of its own")

    @property
    def action_dimensions(self) -> int:
        """Of the set that has most."""
        return max(store.action_dimensions for store in self.acting.values())

    def _by_set(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], int, NDArray[np.int64]]]:
        """Places in `rows`, number of the set and rows in its store."""
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise ContractError(f"{self.path}: rows {rows.min()}..{rows.max()} asked for, there are 0..{len(self) - 1}")
        numbers = np.searchsorted(self._first, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            yield places, number, rows[places] - self._first[number]

    def frames(self, rows: NDArray[np.int64], camera: str | None = None) -> NDArray[np.uint8]:
        if camera not in (None, *self.foreseen):
            raise ContractError(
                f"{self.path}: no camera {camera!r}; of several sets only foresight cameras: {', '.join(self.foreseen)}"
            )
        cameras, rows = (0, rows) if len(self.foreseen) == 1 else np.divmod(rows, len(self))
        cameras = np.broadcast_to(cameras if camera is None else self.foreseen.index(camera), len(rows))
        out = np.empty((len(rows), *self.image_size, 3), np.uint8)
        for places, number, own in self._by_set(rows):
            out[places] = self._stores[number].frames(own + cameras[places] * len(self._stores[number]))
        return out

    def has(self, name: str) -> bool:
        return any(store.has(name) for store in self._stores)

    def vector(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """As of one store, with zeros where a set has fewer dimensions, or none."""
        widths = [store.arrays[name].shape[1] for store in self._stores if store.has(name)]
        if not widths:
            raise ContractError(f"{self.path}: no vector {name!r}")
        out = np.zeros((len(rows), max(widths)), np.float32)
        for places, number, own in self._by_set(rows):
            if self._stores[number].has(name):
                values = self._stores[number].vector(name, own)
                out[places, : values.shape[1]] = values
        return out

    def targets(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(k, A) of rows of sets that the policy learns from, A of the widest of these."""
        out = np.zeros((len(rows), self.action_dimensions), np.float32)
        for places, number, own in self._by_set(rows):
            values = self._stores[number].targets(own)
            out[places, : values.shape[1]] = values
        return out

    def timestamps(self, rows: NDArray[np.int64]) -> NDArray[np.float64] | None:
        return None

    def annotation(self, name: str, split: Split | None = None) -> AnnotatedRows | None:
        found = [store.annotation(name, split) for store in self._stores]
        parts = [part for part in found if part is not None]
        if not parts:
            return None
        rows = [part.rows + row for part, row in zip(found, self._first[:-1], strict=True) if part is not None]
        labels: Any = _Labels(parts)
        return AnnotatedRows(np.concatenate(rows), labels, np.arange(sum(map(len, rows)), dtype=np.int64))

    def drawn(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """As often as the weights say: the rows of a set are repeated, evenly, until the shares are right; none is left out."""
        parts = [(number, rows[places]) for places, number, _ in self._by_set(rows % len(self))]
        counts = self._counts({number: len(own) for number, own in parts})
        return np.concatenate([
            own[np.arange(count) * len(own) // count] for (_, own), count in zip(parts, counts, strict=True)
        ])  # fmt: skip

    def _counts(self, there: Mapping[int, int]) -> list[int]:
        """How many are drawn of sets, by number, of which so many are there."""
        total = max(count / self.members[number].weight for number, count in there.items())
        return [round(total * self.members[number].weight) for number in there]

    def shares(self, split: Split) -> list[tuple[int, int]]:
        there = {number: share for number, store in enumerate(self._stores) for share in store.shares(split) if share[0]}
        counts = self._counts({number: pictures for number, (_, pictures) in there.items()})
        return [(rows, count) for (rows, _), count in zip(there.values(), counts, strict=True)]

    def acting_episodes(self, split: Split) -> NDArray[np.int64]:
        if not self.acting:
            raise ContractError(f"convert.sets: the policy has no set to learn from: {', '.join(self.sets)} have policy: false")
        numbers = np.repeat(np.arange(len(self.members)), [len(store.episode_ends) for store in self._stores])
        episodes = self.episodes(split)
        chosen: NDArray[np.int64] = episodes[np.array([member.policy for member in self.members])[numbers[episodes]]]
        if not len(chosen):
            raise ContractError(f"{self.path}: no episode of {', '.join(self.acting)} is held out, which this needs")
        return chosen

    def by_statistics(self, rows: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], Statistics]]:
        return [(places, self._stores[number].statistics) for places, number, _ in self._by_set(rows)]


def open_store(path: Path) -> EpisodeStore:
    """Open and validate the store at `path`, or the stores of several sets there as one, without decompressing a frame.

    Raises:
        FileError: it is missing, of another schema version, or a file in it is missing, truncated or damaged.
        ContractError: lengths or numbers contradict one another.
    """
    return JoinedStore(path) if (Path(path) / SETS).is_file() else EpisodeStore(path)
