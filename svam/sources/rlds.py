"""RLDS data sets as TFDS stores them (Open X-Embodiment): TFRecord files, read without TensorFlow.

A folder `<name>/<version>/` with `dataset_info.json`, `features.json` and `<name>-<split>.tfrecord-00000-of-00001`; each record
is an episode, with one list per feature over all its steps (`steps/action`, `steps/observation/image_0`, ...).

What becomes what:
- cameras: the RGB images under `steps/observation`, sorted by name, "/" in a name becoming "_"; `convert.cameras` takes a
  feature's name too. Depth and other images are left out with a note. JPEG is decoded with Pillow; TensorFlow's default decoder
  is a faster, coarser one, so its pixels may differ by a few levels. PNG and pictures in tensors are exact; a fourth channel is
  dropped.
- vectors: float32; float64, integers and booleans are cast to it, and the axes of a step are flattened in row-major order.
- alignment, as RLDS defines it: step t holds observation t and the action that was taken from there. Of a step with `is_last`
  only the observation is meaningful, so that step is left out (option `last_step`), with a note. `is_terminal` says why an
  episode ended, not whether its action is valid: it changes nothing. A recording cut short has no `is_last`: all steps stay.
- instruction: of `language_instruction` or kin; where that is empty, of `language_instruction_2` or `_3`, which DROID has.
- repeated episodes (in a validation split that repeats the training split, for example): the same data under `steps/`, by
  SHA-256. The first is kept, the others are left out with a note.
- an episode's name is `<shard>#<number in it>`; `episode_metadata/success` is its success.

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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from svam.console import track
from svam.contract import EVERYTHING, Choice, ContractError, Episode, EpisodeShape, Frames, SourceDescription
from svam.errors import ParamsError
from svam.files import FileError, refuse_lfs_pointer, stamp
from svam.sources._choice import checked, chosen_instruction
from svam.sources._pictures import array_rgb, picture_blocks
from svam.sources._rlds_options import Options, choose
from svam.sources._tfds import Shard, find_version, read_dataset_info, read_features, texts, vectors
from svam.sources._tfrecord import byte_strings, features_of, mapped, read_record, record_spans


class _Entry(NamedTuple):
    """An episode's place and facts: shard number, record number in it, payload's offset and length; steps, steps kept, bytes
    under `steps/`; why it cannot be read."""

    shard: int
    record: int
    offset: int
    length: int
    recorded: int = 0
    kept: int = 0
    size: int = 0
    instruction: str = ""
    success: bool | None = None
    refusal: str = ""


class RldsSource:
    """Episodes in the order of splits, shards and records."""

    def __init__(self, path: Path, options: Options, choice: Choice) -> None:
        """See `open_source`."""
        self.folder, self._options, self._choice = find_version(path, options.version), options, choice
        self._info, splits = read_dataset_info(self.folder)
        self._features = read_features(self.folder)
        if choice.rate_hz is None:
            raise ParamsError(
                "convert.rate_hz is null, but RLDS does not record the steps per second: set it, for example to 5 for bridge, "
                "3 for fractal20220817_data (RT-1), 15 for droid"
            )
        self._rate_hz = choice.rate_hz
        self._chosen = choose(self._features, options, choice, self.folder / "features.json")
        self._notes: list[str] = []
        self._shards = self._present(splits)
        self._notes += self._chosen.notes

    def _present(self, splits: Mapping[str, list[Shard]]) -> list[Shard]:
        """The shards of the chosen splits, which must all be there."""
        names = list(dict.fromkeys([*self._options.splits, *self._options.held_out_splits]))
        if unknown := [name for name in names if name not in splits]:
            raise ParamsError(f"convert.options.splits: {unknown[0]!r}; {self.folder} has the splits {', '.join(splits)}")
        for name in [name for name in splits if name not in names]:
            count = sum(shard.records for shard in splits[name])
            self._notes.append(f"split {name!r} ({count} episodes) is not read; convert.options.splits says which are")
        shards = [shard for name in names for shard in splits[name]]
        absent = {shard.name: why for shard in shards if (why := self._absence(shard.name))}
        if absent and (self._options.missing_shards == "refuse" or len(absent) == len(shards)):
            listed = ", ".join(list(absent)[:10]) + ", ..." * (len(absent) > 10)
            raise FileError(
                f"{next(iter(absent.values()))}; {len(absent)} of {len(shards)} shards are missing ({listed}); "
                "convert.options.missing_shards: leave_out reads the others"
            )
        if absent:
            self._notes.append(f"{len(absent)} of {len(shards)} shards are missing and left out: {', '.join(absent)}")
        return [shard for shard in shards if shard.name not in absent]

    def _absence(self, name: str) -> str:
        try:
            refuse_lfs_pointer(self.folder / name)
        except FileError as error:
            return str(error)
        there = (self.folder / name).is_file()
        return "" if there else f"{self.folder / name}: no such file, though dataset_info.json lists it"

    @cached_property
    def _index(self) -> tuple[list[_Entry], list[str]]:
        """All episodes, and what was left out: one scan of all shards; workers receive the result."""
        entries: list[_Entry] = []
        left_out: dict[str, list[_Entry]] = {}
        with closing(track(enumerate(self._shards), "index of the shards", len(self._shards))) as shards:
            for number, shard in shards:
                for entry in self._scan(number, shard):
                    lacking = self._lacking(entry)
                    (left_out.setdefault(lacking, []) if lacking else entries).append(entry)
        notes = [
            f"{len(those)} episodes without {what} are left out, the first is {self._where(those[0])}"
            for what, those in left_out.items()
        ]
        if shortened := sum(entry.kept < entry.recorded for entry in entries):
            notes.append(
                f"the last step of {shortened} episodes is left out: is_last marks it, and RLDS gives its action no meaning "
                "(convert.options.last_step: keep)"
            )
        if repeated := self._repeated(entries):
            splits = Counter(self._shards[entry.shard].split for entry in repeated)
            first, original = next(iter(repeated.items()))
            notes.append(
                f"{len(repeated)} repeated episodes are left out ({', '.join(f'{n} in {s!r}' for s, n in splits.items())}), "
                f"the first is {self._where(first)}, which repeats {self._where(original)}"
            )
        entries = [entry for entry in entries if entry not in repeated]
        for split in self._options.held_out_splits:
            if not any(self._shards[entry.shard].split == split for entry in entries):
                raise ContractError(
                    f"{self.folder}: the split {split!r} of convert.options.held_out_splits has no episode of its own"
                    + ("; " + notes[-1] if repeated else "")
                )
        if not entries:
            raise ContractError("; ".join([f"{self.folder}: no episodes", *notes[:1]]))
        return entries, notes

    def _lacking(self, entry: _Entry) -> str:
        """For lack of what it is left out."""
        if not (entry.kept or entry.refusal):
            return "a usable step"
        labelled = entry.refusal or entry.instruction or self._choice.instruction
        return "" if labelled or self._options.without_instruction == "refuse" else "an instruction"

    def _scan(self, number: int, shard: Shard) -> Iterator[_Entry]:
        """Each record of a shard; pictures are skipped, data are not checked."""
        path, record = self.folder / shard.name, -1
        content = mapped(path)
        for record, (offset, length) in enumerate(record_spans(content, str(path))):
            place = entry = _Entry(number, record, offset, length)
            try:
                try:
                    entry = self._entry(place, features_of(content[offset : offset + length], self._where(place)))
                finally:
                    if not (entry.kept and (entry.instruction or self._choice.instruction)):
                        self._payload(place)  # a damaged record is told as that, and never left out
            except (FileError, ContractError) as error:
                entry = place._replace(refusal=str(error))
            yield entry
        if record + 1 != shard.records:
            raise FileError(f"{path}: {record + 1} records, but dataset_info.json says {shard.records}")

    def _entry(self, place: _Entry, data: Mapping[str, memoryview]) -> _Entry:
        """An episode's facts, from its small features."""
        where = self._where(place)
        counter, feature = self._chosen.counter, self._features[self._chosen.counter]
        if feature.size and not feature.packed:
            recorded = kept = len(self._vector(counter, data, where))
        else:
            recorded = kept = len(byte_strings(self._feature(counter, data, where), f"{where}: {counter}"))
        if self._chosen.is_last and recorded:
            marked = np.flatnonzero(self._vector(self._chosen.is_last, data, where, recorded))
            if len(marked) and marked[0] != recorded - 1:
                raise ContractError(
                    f"{where}: is_last marks step {marked[0]} of {recorded}, expected the last; "
                    "convert.options.last_step: keep ignores it"
                )
            kept -= len(marked)
        success = bool(self._vector(self._chosen.success, data, where, 1)[0, 0]) if self._chosen.success else None
        sentences = (self._sentence(name, data, recorded, kept, where) for name in self._chosen.instructions if kept)
        sentence = next(filter(None, sentences), "")
        size = sum(len(feature) for name, feature in data.items() if name.startswith("steps/"))
        return place._replace(recorded=recorded, kept=kept, size=size, instruction=sentence, success=success)

    def _sentence(self, name: str, data: Mapping[str, memoryview], recorded: int, kept: int, where: str) -> str:
        """The one that is not empty, of a feature's steps that are kept."""
        lines = texts(self._feature(name, data, where), self._features[name], f"{where}: {name}")
        expected = recorded if name.startswith("steps/") else 1
        if len(lines) != expected:
            raise ContractError(f"{where}: {name} has {len(lines)} instructions, expected {expected}")
        different = list(dict.fromkeys(line for line in lines[:kept] if line.strip()))
        if len(different) > 1 and self._options.changing_instruction == "refuse":
            raise ContractError(
                f"{where}: the instruction changes from {different[0]!r} to {different[1]!r}, expected one an episode; "
                "convert.options.changing_instruction: first takes the first"
            )
        return different[0].strip() if different else ""

    @staticmethod
    def _feature(name: str, data: Mapping[str, memoryview], where: str) -> memoryview:
        if name not in data:
            raise FileError(f"{where}: feature {name!r} is missing, though features.json lists it")
        return data[name]

    def _vector(self, name: str, data: Mapping[str, memoryview], where: str, rows: int | None = None) -> NDArray[Any]:
        values = vectors(self._feature(name, data, where), self._features[name], f"{where}: {name}")
        if rows is not None and len(values) != rows:
            raise ContractError(f"{where}: {name} has {len(values)} rows, expected {rows} as {self._chosen.counter} has")
        return values

    def _repeated(self, entries: list[_Entry]) -> dict[_Entry, _Entry]:
        """Each episode that repeats an earlier one -> the earlier one. Only those of equal sizes are read; one that is damaged
        gets its refusal in `entries`."""
        alike = Counter((entry.recorded, entry.size) for entry in entries)
        todo = [at for at, entry in enumerate(entries) if not entry.refusal and alike[entry.recorded, entry.size] > 1]
        first: dict[bytes, _Entry] = {}
        repeated: dict[_Entry, _Entry] = {}
        if not todo:
            return repeated
        with closing(track(todo, "episodes of equal size, compared", len(todo))) as numbers:
            for at in numbers:
                entry, digest = entries[at], hashlib.sha256()
                try:
                    data = features_of(self._payload(entry), self._where(entry))
                except FileError as error:
                    entries[at] = entry._replace(refusal=str(error))
                    continue
                for name, feature in sorted(data.items()):
                    if name.startswith("steps/"):  # by name: a record's own order is arbitrary
                        digest.update(f"{name}\0{len(feature)}\0".encode())
                        digest.update(feature)
                if (original := first.setdefault(digest.digest(), entry)) != entry:
                    repeated[entry] = original
        return repeated

    def _where(self, entry: _Entry) -> str:
        return f"{self.folder / self._shards[entry.shard].name}: record {entry.record}"

    def _payload(self, entry: _Entry) -> memoryview:
        """A record, which is checked against its checksum."""
        return read_record(self.folder / self._shards[entry.shard].name, entry.offset, entry.length, self._where(entry))

    def _sentence_of(self, entry: _Entry) -> str:
        return chosen_instruction(self._choice, entry.instruction, self._where(entry))

    @property
    def notes(self) -> list[str]:
        """What is left out, and why."""
        return [*self._notes, *self._index[1]]

    def describe(self) -> SourceDescription:
        """Rate, cameras, one task per different instruction, and the data set's name and version."""
        choice = self._choice
        own = [choice.instruction or entry.instruction or choice.missing_instruction for entry in self._index[0]]
        sentences = dict.fromkeys(filter(None, own))
        return SourceDescription(
            rate_hz=self._rate_hz, cameras=list(self._chosen.cameras),
            instructions={sentence: {"train": [sentence], "held_out": []} for sentence in sentences},
            provenance={
                "source": "rlds", "name": self._info.name, "version": self._info.version or self.folder.name,
                "splits": list(dict.fromkeys(shard.split for shard in self._shards)),
                "actions": self._chosen.action, "proprioception": self._chosen.proprioception, "state": self._chosen.state,
            },
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._index[0])

    def shape(self, index: int) -> EpisodeShape:
        """Steps, split and sentence, from the scan."""
        entry = self._index[0][index]
        if entry.refusal:
            raise FileError(entry.refusal)
        shard = self._shards[entry.shard]
        return EpisodeShape(
            entry.kept, held_out=shard.split in self._options.held_out_splits if self._options.held_out_splits else None,
            stamp=f"{stamp(self.folder / shard.name)}:{entry.offset}", name=f"{shard.name}#{entry.record}",
            task=self._sentence_of(entry), success=entry.success,
        )  # fmt: skip

    def read(self, index: int) -> Episode:
        """One episode; its pictures are decoded when they are asked for.

        Raises:
            FileError: the record is damaged, lacks a feature, or changed since the scan.
            ContractError: the episode breaks the contract.
        """
        entry = self._index[0][index]
        where, rows, kept = self._where(entry), entry.recorded, entry.kept
        data = features_of(self._payload(entry), where)
        if self._entry(_Entry(*entry[:4]), data) != entry:
            raise FileError(f"{where}: differs from when the shards were scanned; run the same command again")

        def joined(names: Sequence[str]) -> NDArray[np.float32] | None:
            parts = [self._vector(name, data, where, rows) for name in names]
            with np.errstate(over="ignore", invalid="ignore"):  # an infinity is refused by the contract's check
                return np.concatenate([part.astype(np.float32) for part in parts], axis=1)[:kept] if parts else None

        def pictures(name: str) -> Frames:
            feature, what = self._features[name], f"{where}: {name}"
            if feature.kind == "tensor":
                return array_rgb(self._vector(name, data, where, rows), [size or 0 for size in feature.shape], what)[:kept]
            items = byte_strings(self._feature(name, data, where), what)
            if len(items) != rows:
                raise ContractError(f"{what} has {len(items)} pictures, expected {rows} as {self._chosen.counter} has")
            return picture_blocks(items[:kept], feature.shape, what)

        shard, sentence = self._shards[entry.shard], self._sentence_of(entry)
        episode = Episode(
            task=sentence, instruction=sentence, rate_hz=self._rate_hz,
            frames={camera: pictures(name) for camera, name in self._chosen.cameras.items()},
            actions=joined(self._chosen.action), proprioception=joined(self._chosen.proprioception),
            state=joined(self._chosen.state),
            provenance={"file": f"{shard.name}#{entry.record}", "split": shard.split, "recorded_steps": rows},
        )  # fmt: skip
        return checked(episode, where)


def open_source(path: Path, options: Options, choice: Choice = EVERYTHING) -> RldsSource:
    """Open a TFDS folder, or a folder above the only one; the shards are scanned when the first episode is asked for.

    Raises:
        FileError: the folder, a description or a shard is missing or damaged, or there is no camera.
        ParamsError: a choice or option names what the data set does not have, or must name what cannot be guessed.
    """
    return RldsSource(Path(path), options, choice)
