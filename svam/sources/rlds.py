"""RLDS data sets as TFDS stores them (Open X-Embodiment): TFRecord files, read without TensorFlow.

A folder `<name>/<version>/` with `dataset_info.json`, `features.json` and `<name>-<split>.tfrecord-00000-of-00001`; each record
is an episode, with one list per feature over all its steps (`steps/action`, `steps/observation/image_0`, ...).

What becomes what:
- cameras: the RGB images under `steps/observation`, sorted by name, "/" in a name becoming "_". Depth images, other images and
  pictures stored as integers are left out with a note. JPEG is decoded with Pillow; TensorFlow's default decoder is a faster,
  coarser one, so its pixels may differ by a few levels. PNG and raw pictures are exact.
- vectors: float32; float64, integers and booleans are cast to it, and the axes of a step are flattened in row-major order.
- alignment, as RLDS defines it: step t holds observation t and the action that was taken from there. Of a step with `is_last`
  only the observation is meaningful, so that step is left out (option `last_step`), with a note. `is_terminal` says why an
  episode ended, not whether its action is valid: it changes nothing. A recording cut short has no `is_last`: all steps stay.
- repeated episodes (in a validation split that repeats the training split, for example): the same data under `steps/`, by
  SHA-256. The first is kept, the others are left out with a note.

Every record is checked against its CRC-32C when it is read. Before, one pass over the shards notes where records are, their
numbers of steps and instructions, skipping pictures. One record at a time is in memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from svam.console import track
from svam.contract import EVERYTHING, Choice, ContractError, Episode, EpisodeShape, FrameBlocks, SourceDescription
from svam.errors import ParamsError
from svam.files import FileError, stamp
from svam.sources._pictures import picture_blocks
from svam.sources._rlds_options import Options, choose
from svam.sources._tfds import (
    DatasetInfo,
    Feature,
    Shard,
    find_version,
    read_dataset_info,
    read_features,
    texts,
    vectors,
)
from svam.sources._tfrecord import byte_strings, feature_spans, features_of, fetch_from_file, read_record, record_spans


class _Entry(NamedTuple):
    """An episode's place and facts: shard number, record number in it, payload's offset and length, steps, steps kept."""

    shard: int
    record: int
    offset: int
    length: int
    recorded: int
    kept: int
    instruction: str


class _Index(NamedTuple):
    """All episodes that are read, and what was left out."""

    entries: list[_Entry]
    notes: list[str]


class RldsSource:
    """Episodes in the order of splits, shards and records."""

    def __init__(self, path: Path, options: Options) -> None:
        """See `open_source`."""
        self.folder, self._options = find_version(Path(path), options.version), options
        self._info: DatasetInfo = read_dataset_info(self.folder)
        self._features: dict[str, Feature] = read_features(self.folder)
        self._notes: list[str] = []
        self._shards = self._chosen_shards()
        self._chosen = choose(self._features, options, self.folder / "features.json")

    def _chosen_shards(self) -> list[Shard]:
        names = list(dict.fromkeys([*self._options.splits, *self._options.held_out_splits]))
        for name in names:
            if name not in self._info.splits:
                raise ParamsError(
                    f"convert.options.splits: {name!r}; {self.folder} has the splits {', '.join(self._info.splits)}"
                )
        for name, unread in self._info.splits.items():
            if name not in names:
                count = sum(shard.records for shard in unread)
                self._notes.append(f"split {name!r} ({count} episodes) is not read; convert.options.splits says which are")
        shards = [shard for name in names for shard in self._info.splits[name]]
        missing = [shard.name for shard in shards if not (self.folder / shard.name).is_file()]
        if missing and (self._options.missing_shards == "refuse" or len(missing) == len(shards)):
            raise FileError(
                f"{self.folder / missing[0]}: no such file, though dataset_info.json lists it ({len(missing)} of {len(shards)} "
                "are missing); convert.options.missing_shards: leave_out reads the others"
            )
        if missing:
            self._notes.append(f"{len(missing)} of {len(shards)} shards are missing and left out, the first is {missing[0]}")
        return [shard for shard in shards if shard.name not in missing]

    @cached_property
    def _index(self) -> _Index:
        """Scan all shards, once; workers receive the result."""
        notes: list[str] = []
        entries: list[_Entry] = []
        empty, unlabelled, shortened = [], [], 0
        sizes: list[int] = []
        interned: dict[str, str] = {}
        with closing(track(enumerate(self._shards), "index of the shards", len(self._shards))) as shards:
            for number, shard in shards:
                for entry, size in self._scan(number, shard):
                    if not entry.kept:
                        empty.append(self._where(entry))
                    elif not entry.instruction.strip():
                        unlabelled.append(self._where(entry))
                    else:
                        shortened += entry.kept < entry.recorded
                        entries.append(entry._replace(instruction=interned.setdefault(entry.instruction, entry.instruction)))
                        sizes.append(size)
        if unlabelled and self._options.without_instruction == "refuse":
            raise ContractError(
                f"{unlabelled[0]}: the instruction is empty, as in {len(unlabelled)} episodes in all; set "
                "convert.options.instruction or without_instruction: leave_out"
            )
        if unlabelled:
            notes.append(f"{len(unlabelled)} episodes without an instruction are left out, the first is {unlabelled[0]}")
        if empty:
            notes.append(f"{len(empty)} episodes without a usable step are left out, the first is {empty[0]}")
        if shortened:
            notes.append(
                f"the last step of {shortened} episodes is left out: is_last marks it, and RLDS gives its action no meaning "
                "(convert.options.last_step: keep)"
            )
        repeated = self._repeated(entries, sizes)
        if repeated:
            of_split = Counter(self._shards[entries[at].shard].split for at in repeated)
            first = entries[min(repeated)]
            notes.append(
                f"{len(repeated)} repeated episodes are left out ({', '.join(f'{n} in {s!r}' for s, n in of_split.items())}), "
                f"the first is {self._where(first)}, which repeats {self._where(entries[repeated[min(repeated)]])}"
            )
        kept = [entry for at, entry in enumerate(entries) if at not in repeated]
        for split in self._options.held_out_splits:
            if not any(self._shards[entry.shard].split == split for entry in kept):
                raise ContractError(
                    f"{self.folder}: the split {split!r} of convert.options.held_out_splits has no episode of its own"
                    + ("; " + notes[-1] if repeated else "")
                )
        if not kept:
            raise ContractError(f"{self.folder}: no episodes" + ("; " + notes[0] if notes else ""))
        return _Index(kept, notes)

    def _scan(self, number: int, shard: Shard) -> Iterator[tuple[_Entry, int]]:
        """Each record of a shard, with the number of bytes under `steps/`; pictures are skipped, data are not checked."""
        path = self.folder / shard.name
        try:
            with path.open("rb") as file:
                found = 0
                for offset, length in record_spans(file, path.stat().st_size, str(path)):
                    yield self._facts(file, number, found, offset, length)
                    found += 1
        except OSError as error:
            raise FileError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from None
        if found != shard.records:
            raise FileError(f"{path}: {found} records, but dataset_info.json says {shard.records}")

    def _facts(self, file: BinaryIO, shard: int, record: int, offset: int, length: int) -> tuple[_Entry, int]:
        where = self._place(shard, record)
        fetch = fetch_from_file(file, where)
        path = self.folder / self._shards[shard].name
        try:
            spans = feature_spans(fetch, offset, offset + length, where)
            wanted = {name for name in (self._chosen.counter, self._chosen.is_last, self._chosen.instruction) if name in spans}
            entry = self._entry(shard, record, offset, length, {name: memoryview(fetch(*spans[name])) for name in wanted})
        except (FileError, ContractError):
            read_record(path, offset, length, where)  # a damaged record is told as that
            raise
        if not entry.kept or not entry.instruction.strip():  # never left out because it is damaged
            read_record(path, offset, length, where)
        return entry, sum(end - start for name, (start, end) in spans.items() if name.startswith("steps/"))

    def _entry(self, shard: int, record: int, offset: int, length: int, data: Mapping[str, memoryview]) -> _Entry:
        """An episode's facts, from its small features."""
        where = self._place(shard, record)
        recorded = kept = self._length(self._chosen.counter, data, where)
        if self._chosen.is_last and recorded:
            marked = np.flatnonzero(self._vector(self._chosen.is_last, data, recorded, where))
            if len(marked) and marked[0] != recorded - 1:
                raise ContractError(
                    f"{where}: is_last marks step {marked[0]} of {recorded}, expected the last; "
                    "convert.options.last_step: keep ignores it"
                )
            kept -= len(marked)
        instruction = ""
        if self._chosen.instruction and recorded:
            steps = self._chosen.instruction.startswith("steps/")
            feature = self._feature(self._chosen.instruction, data, where)
            lines = texts(feature, self._features[self._chosen.instruction], f"{where}: {self._chosen.instruction}")
            if len(lines) != (recorded if steps else 1):
                raise ContractError(f"{where}: {len(lines)} instructions, expected {recorded if steps else 1}")
            different = list(dict.fromkeys(line for line in lines[:kept] if line.strip()))
            if len(different) > 1 and self._options.changing_instruction == "refuse":
                raise ContractError(
                    f"{where}: the instruction changes from {different[0]!r} to {different[1]!r}, expected one an episode; "
                    "convert.options.changing_instruction: first takes the first"
                )
            instruction = different[0] if different else ""
        return _Entry(shard, record, offset, length, recorded, kept, instruction or self._options.instruction)

    def _length(self, name: str, data: Mapping[str, memoryview], where: str) -> int:
        feature, found = self._features[name], self._feature(name, data, where)
        if feature.size and feature.kind == "tensor" and feature.encoding not in ("bytes", "zlib"):
            return len(vectors(found, feature, f"{where}: {name}"))
        return len(byte_strings(found, f"{where}: {name}"))

    @staticmethod
    def _feature(name: str, data: Mapping[str, memoryview], where: str) -> memoryview:
        if name not in data:
            raise FileError(f"{where}: feature {name!r} is missing, though features.json lists it")
        return data[name]

    def _vector(self, name: str, data: Mapping[str, memoryview], rows: int, where: str) -> NDArray[Any]:
        values = vectors(self._feature(name, data, where), self._features[name], f"{where}: {name}")
        if len(values) != rows:
            raise ContractError(f"{where}: {name} has {len(values)} rows, expected {rows} as {self._chosen.counter} has")
        return values

    def _repeated(self, entries: Sequence[_Entry], sizes: Sequence[int]) -> dict[int, int]:
        """Number of an episode that repeats an earlier one -> the earlier one's. Only those of equal sizes are read."""
        alike = Counter((entry.recorded, size) for entry, size in zip(entries, sizes, strict=True))
        first: dict[bytes, int] = {}
        repeated: dict[int, int] = {}
        todo = [at for at, entry in enumerate(entries) if alike[entry.recorded, sizes[at]] > 1]
        if not todo:
            return repeated
        with closing(track(todo, "episodes of equal size, compared", len(todo))) as numbers:
            for at in numbers:
                digest = self._digest(entries[at])
                if digest in first:
                    repeated[at] = first[digest]
                first.setdefault(digest, at)
        return repeated

    def _digest(self, entry: _Entry) -> bytes:
        """SHA-256 of all features under `steps/`, in the order of their names: a record's own order is arbitrary."""
        digest = hashlib.sha256()
        for name, feature in sorted(self._data(entry).items()):
            if name.startswith("steps/"):
                digest.update(f"{name}\0{len(feature)}\0".encode())
                digest.update(feature)
        return digest.digest()

    def _place(self, shard: int, record: int) -> str:
        return f"{self.folder / self._shards[shard].name}: record {record}"

    def _where(self, entry: _Entry) -> str:
        return self._place(entry.shard, entry.record)

    def _data(self, entry: _Entry) -> dict[str, memoryview]:
        """All features of a record, which is checked against its checksum."""
        where = self._where(entry)
        return features_of(read_record(self.folder / self._shards[entry.shard].name, entry.offset, entry.length, where), where)

    @property
    def notes(self) -> list[str]:
        """What is left out, and why."""
        return [*self._notes, *self._chosen.notes, *self._index.notes]

    def describe(self) -> SourceDescription:
        """Rate, cameras, one task per different instruction, and the data set's name and version."""
        sentences = dict.fromkeys(entry.instruction for entry in self._index.entries)
        return SourceDescription(
            rate_hz=self._options.rate_hz, cameras=list(self._chosen.cameras),
            instructions={sentence: {"train": [sentence], "held_out": []} for sentence in sentences},
            provenance={
                "source": "rlds", "name": self._info.name, "version": self._info.version,
                "splits": list(dict.fromkeys(shard.split for shard in self._shards)),
                "actions": self._chosen.action, "proprioception": self._chosen.proprioception, "state": self._chosen.state,
            },
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._index.entries)

    def shape(self, index: int) -> EpisodeShape:
        """Steps and split, from the scan."""
        entry = self._index.entries[index]
        shard = self._shards[entry.shard]
        held_out = shard.split in self._options.held_out_splits if self._options.held_out_splits else None
        return EpisodeShape(entry.kept, held_out=held_out, stamp=f"{stamp(self.folder / shard.name)}:{entry.offset}")

    def read(self, index: int) -> Episode:
        """One episode; its pictures are decoded when they are asked for.

        Raises:
            FileError: the record is damaged, lacks a feature, or changed since the scan.
            ContractError: the episode breaks the contract.
        """
        entry = self._index.entries[index]
        where, data, rows = self._where(entry), self._data(entry), entry.recorded
        if self._entry(entry.shard, entry.record, entry.offset, entry.length, data) != entry:
            raise FileError(f"{where}: differs from when the shards were scanned; run the same command again")

        def joined(names: Sequence[str]) -> NDArray[np.float32] | None:
            parts = [self._vector(name, data, rows, where) for name in names]
            with np.errstate(over="ignore", invalid="ignore"):  # an infinity is refused by the contract's check
                return np.concatenate([part.astype(np.float32) for part in parts], axis=1)[: entry.kept] if parts else None

        frames: dict[str, FrameBlocks] = {}
        for camera, name in self._chosen.cameras.items():
            pictures = byte_strings(self._feature(name, data, where), f"{where}: {name}")
            if len(pictures) != rows:
                raise ContractError(
                    f"{where}: {name} has {len(pictures)} pictures, expected {rows} as {self._chosen.counter} has"
                )
            frames[camera] = picture_blocks(pictures[: entry.kept], self._features[name], f"{where}: {name}")
        shard = self._shards[entry.shard]
        episode = Episode(
            task=entry.instruction, instruction=entry.instruction, rate_hz=self._options.rate_hz, frames=frames,
            actions=joined(self._chosen.action), proprioception=joined(self._chosen.proprioception),
            state=joined(self._chosen.state),
            provenance={"file": f"{shard.name}#{entry.record}", "split": shard.split, "recorded_steps": entry.recorded},
        )  # fmt: skip
        try:
            episode.check()
        except ContractError as error:
            raise ContractError(f"{where}: {error}") from None
        return episode


def open_source(path: Path, options: Options, choice: Choice = EVERYTHING) -> RldsSource:
    """Open a TFDS folder, or a folder above the only one; the shards are scanned when the first episode is asked for.

    Raises:
        FileError: the folder, a description or a shard is missing or damaged, or there is no camera.
        ParamsError: an option names what the data set does not have, or must name what cannot be guessed.
    """
    return RldsSource(Path(path), options)
