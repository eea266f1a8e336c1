"""RLDS data sets as TFDS stores them (Open X-Embodiment): TFRecord files, read without TensorFlow.

A folder `<name>/<version>/` with `dataset_info.json`, `features.json` and `<name>-<split>.tfrecord-00000-of-00001`; each record
is an episode, with one list per feature over all its steps (`steps/action`, `steps/observation/image_0`, ...).

What becomes what:
- cameras: the RGB images under `steps/observation`, sorted by name, "/" in a name becoming "_"; `convert.cameras` takes a
  feature's name too. Depth and other images are left out with a note; grey ones are read where it names them. JPEG is decoded
  with Pillow; TensorFlow's default decoder is a faster, coarser one, so its pixels may differ by a few levels. PNG and pictures
  in tensors are exact; a fourth channel is dropped.
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

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from svam.console import track
from svam.contract import EVERYTHING, Choice, ContractError, Episode, EpisodeShape, Frames, Segment, SourceDescription
from svam.errors import ParamsError
from svam.files import FileError, refuse_lfs_pointer, stamp
from svam.sources._choice import checked, chosen_instruction, contents, segments_of
from svam.sources._pictures import LEAVE_OUT, array_rgb, one_coloured, picture_blocks, picture_rgb
from svam.sources._rlds_options import Options, choose
from svam.sources._tfds import Record, Shard, find_version, read_dataset_info, read_features
from svam.sources._tfrecord import mapped, read_record, record_spans

_MOST_LOST = 1_000_000
"""Records of a shard that may be missing; a damaged description can claim any number."""


class _Entry(NamedTuple):
    """An episode's place and facts: shard, record number in it, payload's offset and length; steps, steps kept, bytes under
    `steps/`; its own sentence, which names its task (`convert.instruction` where it has none), others for the same, and those
    of its parts; why it cannot be read."""

    shard: Shard
    record: int
    offset: int
    length: int
    recorded: int = 0
    kept: int = 0
    size: int = 0
    instruction: str = ""
    paraphrases: tuple[str, ...] = ()
    segments: tuple[Segment, ...] = ()
    success: bool | None = None
    refusal: str = ""

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.shard.file}: record {self.record}"

    def payload(self) -> memoryview:
        """The record, checked against its checksum."""
        return read_record(self.shard.file, self.offset, self.length, self.where)


class RldsSource:
    """Episodes in the order of splits, shards and records."""

    def __init__(self, path: Path, options: Options, choice: Choice = EVERYTHING) -> None:
        """Open a TFDS folder, or a folder above the only one; the shards are scanned when the first episode is asked for.

        Raises:
            FileError: the folder, a description or a shard is missing or damaged, or there is no camera.
            ParamsError: a choice or option names what the data set does not have, or must name what cannot be guessed.
        """
        self.folder, self._options, self._choice = find_version(path, options.version), options, choice
        self._info, splits, self._notes = read_dataset_info(self.folder)
        self._features = read_features(self.folder)
        if choice.rate_hz is None:
            raise ParamsError(
                "convert.rate_hz is null, but RLDS does not record the steps per second: set it, for example to 5 for bridge, "
                "3 for fractal20220817_data (RT-1), 15 for droid"
            )
        self._rate_hz = choice.rate_hz
        self._chosen = choose(self._features, options, choice, self.folder / "features.json")
        self._shards = self._present(splits)
        self._notes += self._chosen.notes

    def _present(self, splits: Mapping[str, list[Shard]]) -> list[Shard]:
        """The shards of the chosen splits, which must all be there."""
        names = list(dict.fromkeys([*self._options.splits, *self._options.held_out_splits]))
        if unknown := [name for name in names if name not in splits]:
            raise ParamsError(f"convert.options.splits: {unknown[0]!r}; {self.folder} has the splits {', '.join(splits)}")
        counts = {name: sum(shard.records for shard in shards) for name, shards in splits.items() if name not in names}
        self._notes += [
            f"split {name!r} ({count} episodes) is not read; convert.options.splits says which are"
            for name, count in counts.items()
        ]
        shards = [shard for name in names for shard in splits[name]]
        absent = {shard.file.name: why for shard in shards if (why := _absence(shard.file))}
        if absent and (self._options.missing_shards == "refuse" or len(absent) == len(shards)):
            listed = ", ".join(list(absent)[:10]) + ", ..." * (len(absent) > 10)
            way_out = "convert.options.missing_shards: leave_out reads the others"
            way_out = way_out if len(absent) < len(shards) else f"{self.folder} has {contents(self.folder)}"
            said = f"{next(iter(absent.values()))}; {len(absent)} of {len(shards)} shards are missing"
            raise FileError(f"{said} ({listed}); {way_out}")
        if absent:
            self._notes.append(f"{len(absent)} of {len(shards)} shards are missing and left out: {', '.join(absent)}")
        return [shard for shard in shards if shard.file.name not in absent]

    @cached_property
    def _index(self) -> tuple[list[_Entry], list[str]]:
        """All episodes, and what was left out: one scan of all shards; workers receive the result."""
        entries: list[_Entry] = []
        left_out: dict[str, list[_Entry]] = {}
        with closing(track(self._shards, "index of the shards", len(self._shards))) as shards:
            for shard in shards:
                for entry in self._scan(shard):
                    lacking = self._lacking(entry)
                    (left_out.setdefault(lacking, []) if lacking else entries).append(entry)
        notes = [
            f"{len(those)} episodes without {what} are left out, the first is {those[0].where}"
            for what, those in left_out.items()
        ]
        if shortened := sum(entry.kept < entry.recorded for entry in entries):
            notes.append(
                f"the last step of {shortened} episodes is left out: is_last marks it, and RLDS gives its action no meaning "
                "(convert.options.last_step: keep)"
            )
        if repeated := self._repeated(entries):
            splits = Counter(entry.shard.split for entry in repeated)
            first, original = next(iter(repeated.items()))
            notes.append(
                f"{len(repeated)} repeated episodes are left out ({', '.join(f'{n} in {s!r}' for s, n in splits.items())}), "
                f"the first is {first.where}, which repeats {original.where}"
            )
        entries = [entry for entry in entries if entry not in repeated]
        there = {entry.shard.split for entry in entries}
        if empty := [split for split in self._options.held_out_splits if split not in there]:
            raise ContractError(
                f"{self.folder}: the split {empty[0]!r} of convert.options.held_out_splits has no episode of its own; "
                "without it there convert.held_out draws a share" + ("; " + notes[-1] if repeated else "")
            )
        if not entries:
            raise ContractError("; ".join([f"{self.folder}: no episodes", *notes[:1]]))
        return entries, notes

    def _lacking(self, entry: _Entry) -> str:
        """For lack of what it is left out."""
        if not (entry.kept or entry.refusal):
            return "a usable step"
        labelled = entry.refusal or entry.instruction
        return "" if labelled or self._options.without_instruction == "refuse" else "an instruction"

    def _scan(self, shard: Shard) -> Iterator[_Entry]:
        """Each record that a shard should have; pictures are skipped, data are not checked."""
        record = -1
        try:
            content = mapped(shard.file)
            for record, (offset, length) in enumerate(record_spans(content, str(shard.file))):
                place = entry = _Entry(shard, record, offset, length)
                try:
                    try:
                        entry = self._entry(place, self._record(place, content[offset : offset + length]))
                    finally:
                        if not (entry.kept and entry.instruction):
                            place.payload()  # a damaged record is told as that, and never left out
                except (FileError, ContractError) as error:
                    entry = place._replace(refusal=str(error))
                yield entry
            if record + 1 != shard.records:
                told = f"{record + 1} records, but dataset_info.json says {shard.records}"
                raise FileError(f"{shard.file}: {told}; fetch both again")
        except FileError as error:  # the records from there on cannot be found: bad episodes, as many as there should be
            if not 0 < shard.records - record - 1 <= _MOST_LOST:
                raise
            for lost in range(record + 1, shard.records):
                yield _Entry(shard, lost, 0, 0, refusal=str(error))

    def _entry(self, place: _Entry, record: Record) -> _Entry:
        """An episode's facts, from its small features."""
        recorded = kept = record.steps
        if self._chosen.is_last:
            marked = np.flatnonzero(record.vectors(self._chosen.is_last))
            if len(marked) and marked[0] != recorded - 1:
                raise ContractError(
                    f"{record.where}: is_last marks step {marked[0]} of {recorded}, expected the last; "
                    "convert.options.last_step: keep ignores it"
                )
            kept -= len(marked)
        record.need(*(self._chosen.read if kept else ()))
        name = self._chosen.success
        said = float(record.vectors(name)[0, 0]) if name and name in record else None
        success = bool(said) if said in (0, 1) else None  # NaN says nothing
        told, replaced = self._told(record, kept), self._choice.instruction
        try:
            instruction = next(told, "") or replaced or ""
        except FileError:
            if not replaced:
                raise
            instruction = replaced  # which need not be sound
        further = self._options.paraphrases and not replaced
        others = tuple(said for said in dict.fromkeys(told) if said != instruction) if further else ()
        return place._replace(
            recorded=recorded, kept=kept, size=record.size, instruction=instruction, success=success, paraphrases=others,
            segments=self._segments(record, kept),
        )  # fmt: skip

    def _told(self, record: Record, kept: int) -> Iterator[str]:
        """The sentences that an episode's features have."""
        return filter(None, (self._sentence(record, name, kept) for name in self._chosen.instructions if kept))

    def _segments(self, record: Record, kept: int) -> tuple[Segment, ...]:
        """The parts of an episode by the first instruction that its steps have, where the choice asks for them."""
        asked = self._choice.segments and not self._choice.instruction
        told = (record.texts(name)[:kept] for name in self._chosen.instructions if asked)
        lines = next((lines for lines in told if any(line.strip() for line in lines)), [])
        return segments_of(lines) if len(lines) == kept else ()

    def _sentence(self, record: Record, name: str, kept: int) -> str:
        """The one that is not empty, of a feature's first `kept` steps."""
        different = list(filter(None, dict.fromkeys(line.strip() for line in record.texts(name)[:kept])))
        allowed = self._options.changing_instruction == "first" or self._choice.segments or self._choice.instruction
        if len(different) > 1 and not allowed:
            raise ContractError(
                f"{record.where}: the instruction changes from {different[0]!r} to {different[1]!r}, expected one an episode; "
                "convert.segments: true cuts it there, convert.options.changing_instruction: first takes the first"
            )
        return different[0] if different else ""

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
                entry = entries[at]
                try:
                    digest = self._record(entry, entry.payload()).digest()
                except FileError as error:
                    entries[at] = entry._replace(refusal=str(error))
                    continue
                if (original := first.setdefault(digest, entry)) != entry:
                    repeated[entry] = original
        return repeated

    def _record(self, entry: _Entry, payload: memoryview) -> Record:
        return Record(payload, self._features, self._chosen.counter, entry.where)

    @cached_property
    def notes(self) -> list[str]:
        """What is left out, and why; and cameras without pictures, which the first episode tells."""
        notes = [*self._notes, *self._index[1]]
        with suppress(FileError, ContractError):  # which `shape` says
            for camera in one_coloured(self.read(0).frames):
                said = f"pictures of {camera} are of one colour, as sets fill up a camera that is not there"
                notes.append(f"{self._index[0][0].where}: {said}; {LEAVE_OUT}")
            entry = self._index[0][0]
            record = self._record(entry, entry.payload())
            images = {c: name for c, name in self._chosen.cameras.items() if self._features[name].kind == "image"}
            turned = [c for c, name in images.items() if "EXIF" in picture_rgb(record.rows(name)[0], entry.where)[1]]
            if turned:
                asked = f"the EXIF of pictures of {', '.join(turned)} asks to turn them"
                notes.append(f"{entry.where}: {asked}; they are stored unturned, as TensorFlow reads them")
        return notes

    def describe(self) -> SourceDescription:
        """Rate, cameras, one task per different instruction, and the data set's name and version."""
        sentences: dict[str, dict[str, None]] = {}
        for entry in self._index[0]:
            if own := entry.instruction or self._choice.missing_instruction:
                said = [self._choice.instruction or own, *entry.paraphrases]
                sentences.setdefault(own, {}).update(dict.fromkeys(said))
        return SourceDescription(
            rate_hz=self._rate_hz, cameras=list(self._chosen.cameras),
            instructions={task: {"train": list(said), "held_out": []} for task, said in sentences.items()},
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
        file, held_out = entry.shard.file, self._options.held_out_splits
        return EpisodeShape(
            entry.kept, held_out=entry.shard.split in held_out if held_out else None, stamp=f"{stamp(file)}:{entry.offset}",
            name=f"{file.name}#{entry.record}", success=entry.success, segments=entry.segments,
            task=self._task(entry),
        )  # fmt: skip

    def _task(self, entry: _Entry) -> str:
        return entry.instruction or chosen_instruction(self._choice, None, entry.where)

    def read(self, index: int) -> Episode:
        """One episode."""
        entry = self._index[0][index]
        record = self._record(entry, entry.payload())
        if self._entry(_Entry(*entry[:4]), record) != entry:
            raise FileError(f"{record.where}: differs from when the shards were scanned; run the same command again")

        def joined(names: Sequence[str]) -> NDArray[np.float32] | None:
            if not names:
                return None
            with np.errstate(over="ignore", invalid="ignore"):  # an infinity is refused by the contract's check
                return np.concatenate([record.vectors(name) for name in names], axis=1, dtype=np.float32)[: entry.kept]

        def pictures(name: str) -> Frames:
            feature, what = self._features[name], f"{record.where}: {name}"
            if feature.kind == "tensor":
                return array_rgb(record.vectors(name), [size or 0 for size in feature.shape], what)[: entry.kept]
            return picture_blocks(record.rows(name)[: entry.kept], feature.shape, what)

        task = self._task(entry)
        episode = Episode(
            task=task, instruction=self._choice.instruction or task, rate_hz=self._rate_hz,
            frames={camera: pictures(name) for camera, name in self._chosen.cameras.items()},
            actions=joined(self._chosen.action), proprioception=joined(self._chosen.proprioception),
            state=joined(self._chosen.state),
            provenance={
                "file": f"{entry.shard.file.name}#{entry.record}", "split": entry.shard.split, "recorded_steps": entry.recorded,
            },
        )  # fmt: skip
        return checked(episode, record.where)


def _absence(file: Path) -> str:
    """Why a shard cannot be read, "" where it can."""
    try:
        refuse_lfs_pointer(file)
    except FileError as error:
        return str(error)
    return "" if file.is_file() else f"{file}: no such file, though dataset_info.json lists it"


open_source = RldsSource
