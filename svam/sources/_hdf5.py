"""HDF5 files that may be damaged, and what all formats in them have in common.

Every failure is a `FileError` that names the file and the place in it. Most HDF5 files carry no checksums, so a flipped byte
can make the library report absurd shapes: what is allocated is bounded by what the file can hold. A flipped pixel in an
unchecked file cannot be noticed by anyone.
"""

from __future__ import annotations

import importlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mode
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from svam.contract import Choice, ContractError, Episode, EpisodeShape, FrameBlocks, SourceDescription
from svam.errors import MachineError, SvamError
from svam.files import FileError, refuse_lfs_pointer, stamp
from svam.sources._choice import TRAINING, checked, chosen_cameras, chosen_instruction, contents
from svam.sources._pictures import PictureArray, depth_doubts, frames_per_block, needed_pictures

HELD_OUT = ("valid", "val", "validation", "test")
"""How sets call the part that is not trained on."""
_LARGEST = 2**30
"""Bytes of a dataset that is read whole, as stored and as read; and of a chunk, of which the library holds one decompressed."""
# Per dataset: compressed chunks across a block's edge are needed twice, and the library's 1 MiB would decompress them twice.
_CACHE_BYTES = 2**27


def hdf5_files(path: Path) -> list[Path]:
    """`path` itself, or all .hdf5 and .h5 files under it, hidden ones left out, sorted with numbers as numbers; `FileError`
    where there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileError(f"{path}: no such file or directory")
    names = [file.relative_to(path) for end in (".hdf5", ".h5") for file in path.rglob(f"*{end}") if file.is_file()]
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not shown:
        raise FileError(f"{path}: no .hdf5 or .h5 file in it or below it; it has {contents(path)}")
    return [path / name for name in sorted(shown, key=lambda name: [_by_number(part) for part in name.parts])]


def _by_number(name: str) -> list[str | int]:
    """A sort key that puts `demo_2` before `demo_10`: every second part is a number."""
    return [int(part) if at % 2 else part for at, part in enumerate(re.split(r"([0-9]+)", name))]


def text_of(value: Any, where: str) -> str | None:
    """A string attribute or one row of a string dataset as str, stripped; None where it is no text, `FileError` where it is not
    UTF-8."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    try:
        if isinstance(value, bytes):  # numpy's fixed-length strings are bytes too
            value = value.decode("utf-8")
        if not isinstance(value, str):
            return None
        value.encode("utf-8")  # h5py and JSON hide undecodable bytes as lone surrogates
    except UnicodeError:
        raise FileError(f"{where} is not valid UTF-8") from None
    return value.strip(" \t\r\n\0")


class Hdf5File:
    """An HDF5 file open for reading, in a `with` statement.

    Raises:
        FileError: what is asked for is missing, damaged or of another kind; this holds for the file and for each method.
        MachineError: h5py is not installed, or a compression filter of a dataset.
    """

    def __init__(self, file: Path, source: str) -> None:
        """`source` is the value of `convert.source`, for messages."""
        try:
            self._h5py = importlib.import_module("h5py")
        except ImportError:
            raise MachineError(f'convert.source is {source!r}, which needs h5py: pip install -e ".[hdf5]"') from None
        refuse_lfs_pointer(file)
        self.file, self._checked = file, set[str]()
        with self._guarded("its HDF5 content"):
            self._root = self._h5py.File(file, "r", locking="best-effort", rdcc_nbytes=_CACHE_BYTES)
            self._size = file.stat().st_size

    def __enter__(self) -> Hdf5File:
        return self

    def __exit__(self, *error: object) -> None:
        with self._guarded("the end of the file"):
            self._root.close()

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except SvamError:
            raise
        except Exception as error:  # h5py raises a dozen types: damage, names that are not there, values it cannot convert
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise FileError(f"{self.file}: {what} is missing, truncated or damaged ({reason})") from None

    @contextmanager
    def _dataset(self, name: str) -> Iterator[Any]:
        with self._guarded(name):
            member = self._root.get(name)
            if not isinstance(member, self._h5py.Dataset):
                kind = "missing" if member is None else "a group"
                raise FileError(f"{self.file}: {name} is {kind}, expected a dataset")
            if member.is_virtual or member.external or member.file.filename != self._root.filename:
                way = "copy all into one file (h5repack; what is linked: h5copy -f ext), then convert that"
                raise FileError(f"{self.file}: {name} keeps its values in other files; {way}")
            yield member

    def names(self, group: str) -> list[str]:
        """Members of a group, numbers sorted as numbers; nothing where there is no such group."""
        with self._guarded(group):
            members = self._root.get(group)
            names = sorted(members, key=_by_number) if isinstance(members, self._h5py.Group) else []
        for name in names:
            if not name.isprintable():  # no recorder's: damage, which would break messages into lines
                raise FileError(f"{self.file}: {group} has a member named {name!r}, expected characters that can be printed")
        return names

    def listed(self, group: str) -> str:
        """What lies in a group, for messages."""
        names, parts = self.names(group), []
        for name in names[:12]:
            if self.is_dataset(f"{group}/{name}"):
                shape, dtype = self.layout(f"{group}/{name}")
                parts.append(f"{name} {dtype} {shape}")
            else:
                parts.append(f"{name} (a group)")
        return (", ".join(parts) or "nothing") + ", ..." * (len(names) > 12)

    def is_dataset(self, name: str) -> bool:
        """Whether there is a dataset of this name."""
        with self._guarded(name):
            return isinstance(self._root.get(name), self._h5py.Dataset)

    def attribute(self, name: str, key: str) -> Any:
        """The value of an attribute of `name`, None where there is none."""
        with self._guarded(f"attribute {key!r} of {name}"):
            return self._root[name].attrs.get(key)

    def text_attribute(self, name: str, key: str) -> str | None:
        """A string attribute, stripped; None where there is none or where it is no string."""
        return text_of(self.attribute(name, key), f"{self.file}: attribute {key!r} of {name}")

    def layout(self, name: str, steps: int | None = None) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of a dataset, as the file states them; `ContractError` where it has other than `steps` rows."""
        with self._dataset(name) as dataset:
            if dataset.shape is None:
                raise FileError(f"{self.file}: {name} is an empty dataset")
            if steps and dataset.shape and dataset.shape[0] != steps:
                found = f"{self.file}: {name} has {dataset.shape[0]} steps, but the actions have {steps}"
                raise ContractError(f"{found}; cut all to one length, row t of each at one time")
            return tuple(int(size) for size in dataset.shape), dataset.dtype

    def vector(self, name: str, steps: int | None = None) -> tuple[int, int]:
        """(steps, dimensions) of a dataset of vectors, without reading them; (n,) is one dimension."""
        shape, dtype = self.layout(name, steps)
        if dtype.kind not in "fiub" or len(shape) not in (1, 2) or not shape[0]:
            raise FileError(
                f"{self.file}: {name} is {dtype} {shape}, expected numbers (steps, dimensions) with at least one step"
            )
        return shape[0], math.prod(shape[1:])

    def matrix(self, name: str) -> NDArray[np.float32]:
        """A vector per step as (n, d) float32."""
        steps, dimensions = self.vector(name)
        with np.errstate(over="ignore", invalid="ignore"):  # an infinity is refused by the contract's check
            return self.rows(name).reshape(steps, dimensions).astype(np.float32)

    def texts(self, name: str) -> list[str]:
        """The strings of a dataset, stripped; none where it holds something else."""
        shape, dtype = self.layout(name)
        if dtype.kind not in "SO" or len(shape) > 2:
            return []
        texts = [text_of(value, f"{self.file}: {name}") for value in self.rows(name).reshape(-1)]
        return [text for text in texts if text is not None]

    def pictures(self, name: str, steps: int) -> PictureArray:
        """How the pictures of a dataset lie."""
        pictures = needed_pictures(f"{self.file}: {name}", *self.layout(name, steps))
        if pictures.dtype != np.uint8:  # numbers in 0..1, which are no pictures of bytes, are told here
            pictures.rgb(self.rows(name, 0, 1), f"{self.file}: {name}", 0)
        return pictures

    def picture_blocks(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """All pictures of a dataset, as (k, H, W, 3) blocks."""
        pictures, row = needed_pictures(f"{self.file}: {name}", *self.layout(name)), 0
        for block in self.blocks(name):
            yield pictures.rgb(block, f"{self.file}: {name}", row)
            row += len(block)

    def blocks(self, name: str) -> Iterator[NDArray[Any]]:
        """All rows, at most 64 at a time and 32 MiB, unless one row is larger."""
        (steps, *rest), dtype = self.layout(name)
        count = frames_per_block(math.prod(rest) * dtype.itemsize)
        for start in range(0, steps, count):
            yield self.rows(name, start, min(start + count, steps))

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows start..stop - 1 as they are stored, or the whole dataset, which must be no larger than `_LARGEST`."""
        with self._dataset(name) as dataset:
            if stop is None and math.prod(dataset.shape) * max(dataset.dtype.itemsize, 4) > _LARGEST:
                raise FileError(f"{self.file}: {name} claims {dataset.dtype} {dataset.shape}, more than {_LARGEST} bytes")
            if name not in self._checked:
                self._check_stored(name, dataset)
                self._checked.add(name)
            return np.asarray(dataset[()] if stop is None else dataset[start:stop])

    def _check_stored(self, name: str, dataset: Any) -> None:
        """That the values of a dataset are in this file, whole and readable, and no larger than it can hold."""
        where = f"{self.file}: {name}"
        creation = dataset.id.get_create_plist()
        for code, _, _, title in map(creation.get_filter, range(creation.get_nfilters())):
            with suppress(ImportError):
                if not self._h5py.h5z.filter_avail(code):
                    importlib.import_module("hdf5plugin")  # which makes its filters known
            if not self._h5py.h5z.filter_avail(code):
                needed = f"HDF5 filter {code} ({title.decode('ascii', 'replace')})"
                raise MachineError(f"{where} is compressed with {needed}, which needs: pip install hdf5plugin")
        stored, item = dataset.id.get_storage_size(), dataset.id.get_type().get_size()
        if dataset.chunks is None:
            # A compact or contiguous dataset that nobody wrote reads as zeros.
            if not (claimed := math.prod(dataset.shape) * item) <= stored <= self._size:
                raise FileError(f"{where} claims {claimed} bytes, of which {stored} are stored: damaged or never written")
            return
        if math.prod(dataset.chunks) * item > _LARGEST:
            raise FileError(f"{where} has chunks of {dataset.chunks}, too large to read piece by piece; rechunk it (h5repack)")
        chunks = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        # A chunk is at least some bytes of file, so an absurd shape is noticed before the library counts its chunks.
        present = dataset.id.get_num_chunks() if chunks <= self._size else 0
        if present < chunks:
            raise FileError(f"{where} has {present} of its {chunks} chunks: damaged, or the recorder stopped early")


Size = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What is known of an episode before it is read.

    place: its group in the file, ending in "/", or "" for all of the file; datasets are named below it. cameras: name ->
    (dataset, (n, H, W, 3)). vectors: field of `Episode` -> datasets that are joined. sentences: at least one, whatever
    `convert.instruction` says in their place; the first names the task. alike: what must be the same in all episodes, in
    words. facts: of its provenance. flip: how its pictures are turned: "none", "vertical" or "rotate_180". late: 1 where
    pictures and proprioception of row t belong to actions and state of row t + 1; `steps` are without the rows that have no
    partner then.
    """

    file: Path
    place: str
    steps: int
    cameras: dict[str, tuple[str, Size]]
    vectors: dict[str, list[str]]
    sentences: list[str]
    alike: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    held_out: bool | None = None
    success: bool | None = None
    flip: str = "none"
    late: int = 0

    def __str__(self) -> str:
        return f"{self.file}: {self.place}".rstrip(":/ ")


class Hdf5Source(ABC):
    """The episodes of HDF5 files, as far as formats are read alike; what is said of each file is looked up when it is opened.

    A format says how the episodes of a file are found (`_scan`) and what is known of one (`_header`), where its sentences are,
    and by which key its option `instructions` names a file.
    """

    source_name: ClassVar[str]
    prefix: ClassVar[str]
    """Before a camera's name."""
    usual_rate: ClassVar[tuple[float, str]]
    """Assumed where a file states none, and what is said of it."""
    remedies: ClassVar[dict[str, str]] = {}
    """Key of `Recording.alike` -> what to do where it differs."""

    def __init__(self, path: Path, options: Any, choice: Choice, files: list[Path]) -> None:
        """See the format's."""
        self.path, self.options, self._choice, self.notes = path, options, choice, list[str]()
        known = sorted({self._key(file) for file in files})
        if absent := sorted(set(options.instructions) - set(known)):  # a misspelt key would silently say nothing
            names = ", ".join(known[:5]) + ", ..." * (len(known) > 5)
            raise FileError(f"{path}: convert.options.instructions names {absent[0]!r}, which is not there; it has {names}")
        found = [pair for file in files for pair in self._headers(file)]
        self.names, self._recordings = [name for name, _ in found], [one for _, one in found]
        self._readable = [one for one in self._recordings if isinstance(one, Recording)]
        if not self._readable:
            faults = [one for one in self._recordings if isinstance(one, SvamError)]
            raise faults[0] if faults else FileError(f"{path}: convert.options choose no episode of its files")
        self._cameras = self._choose_cameras()
        compared = dict.fromkeys(name for one in self._readable for name in one.alike)
        self._alike = {name: mode(one.alike.get(name, "absent") for one in self._readable) for name in compared}
        stated = self._alike.get("control_freq")
        self.rate_hz: float = choice.rate_hz or stated or self.usual_rate[0]
        if not (choice.rate_hz or stated):
            self._note(f"the files do not state their rate: {self.usual_rate[1]}; set convert.rate_hz to yours")
        folders = {part for one in self._readable for part in self._relative(one.file).parts[:-1]}
        sides = sorted(part for part in folders if part.lower() in TRAINING | {*HELD_OUT})
        if len(sides) > 1 and all(one.held_out is None for one in self._readable):
            self._note(f"the folders {', '.join(sides)} are read as one and say no split; one is drawn")

    def _headers(self, file: Path) -> Iterator[tuple[str, Recording | SvamError]]:
        """The episodes of a file by name, or why they cannot be read. A missing library is raised: it is no file's fault."""
        name = self._relative(file).with_suffix("").as_posix()
        try:
            with Hdf5File(file, self.source_name) as data:
                for place, held_out in self._scan(data).items():
                    inside = place.split("/")[1:2]
                    full = "/".join([name, *inside] if self.path.is_dir() or not inside else inside)
                    try:
                        yield full, self._header(data, place, held_out)
                    except (FileError, ContractError) as error:
                        yield full, error
        except (FileError, ContractError) as error:
            yield name, error

    def _choose_cameras(self) -> list[str]:
        datasets = {camera: dataset for one in self._readable for camera, (dataset, _) in one.cameras.items()}
        if self._choice.cameras:
            forms = {form: name for name, dataset in datasets.items() for form in (dataset, dataset.rpartition("/")[2])}
            return chosen_cameras(self._choice, list(datasets), self.path, self.prefix, forms)
        cameras = list(mode(tuple(one.cameras) for one in self._readable))
        self._note(*depth_doubts(datasets[camera] for camera in cameras))
        for camera in [camera for camera in datasets if camera not in cameras]:
            count = sum(camera in one.cameras for one in self._readable)
            of = f"{count} of {len(self._readable)} episodes have it"
            self._note(f"{datasets[camera]} is left out: {of}; convert.cameras can name it")
        return cameras

    def _note(self, *notes: str) -> None:
        """Each is said once, however many episodes it is true of."""
        self.notes += [said for note in notes if (said := f"{self.path}: {note}") not in self.notes]

    @abstractmethod
    def _key(self, file: Path) -> str:
        """By which `options.instructions` names a file."""

    @abstractmethod
    def _scan(self, data: Hdf5File) -> dict[str, bool | None]:
        """Place of each episode in a file -> whether it is held out."""

    @abstractmethod
    def _header(self, data: Hdf5File, place: str, held_out: bool | None) -> Recording:
        """What is known of an episode before it is read; raises what makes it unreadable."""

    @abstractmethod
    def _own_sentences(self, data: Hdf5File, place: str) -> list[str]:
        """The sentences that a file has for an episode; "" says nothing."""

    def _pictures(self, data: Hdf5File, dataset: str) -> Iterator[NDArray[np.uint8]]:
        """Pictures of a camera as they are stored, (k, H, W, 3) uint8 RGB at a time."""
        return data.picture_blocks(dataset)

    def _asked_for(self, *forms: str) -> bool:
        """Whether a camera of these names is to be read."""
        names = {name.removeprefix(self.prefix) for name in self._choice.cameras}
        return not names or not names.isdisjoint(forms)

    def _sentences(self, data: Hdf5File, place: str) -> list[str]:
        """What the options say, or the file's own; without, `convert.instruction`, or `convert.missing_instruction`."""
        told = self.options.instructions.get(self._key(data.file), "").strip()
        try:
            sentences = [told] if told else [sentence for sentence in self._own_sentences(data, place) if sentence]
        except SvamError:
            if not self._choice.instruction:
                raise
            sentences = []  # what `convert.instruction` replaces may be damaged
        where = f"{data.file}: {place}".rstrip(":/ ")
        return list(dict.fromkeys(sentences)) or [chosen_instruction(self._choice, None, where)]

    def describe(self) -> SourceDescription:
        """Rate, cameras and instructions; a task is named by its own (first) sentence."""
        instructions: dict[str, dict[str, list[str]]] = {}
        for one in self._readable:
            train = instructions.setdefault(one.sentences[0], {"train": [], "held_out": []})["train"]
            train.extend(sentence for sentence in self._said(one) if sentence not in train)
        return SourceDescription(
            rate_hz=self.rate_hz, cameras=self._cameras, instructions=instructions, provenance={
                "source": self.source_name, "options": self.options.model_dump(),
                "files": len({one.file for one in self._readable}),
            },
        )  # fmt: skip

    def _said(self, one: Recording) -> list[str]:
        return [self._choice.instruction] if self._choice.instruction else one.sentences

    def __len__(self) -> int:
        return len(self._recordings)

    def _relative(self, file: Path) -> Path:
        return file.relative_to(self.path) if self.path.is_dir() else Path(file.name)

    def _known(self, index: int) -> Recording:
        """An episode that can be read, with all that the set has."""
        one = self._recordings[index]
        if isinstance(one, SvamError):
            raise one
        if absent := [camera for camera in self._cameras if camera not in one.cameras]:
            raise ContractError(
                f"{one}: no camera {absent[0]!r}, which other episodes have; it has {', '.join(one.cameras)}, and "
                "convert.cameras says which to read"
            )
        for name, most in self._alike.items():
            if (its := one.alike.get(name, "absent")) != most:
                remedy = self.remedies.get(name, "convert them as separate sets")
                raise ContractError(f"{one}: {name} is {its}, but {most} in most episodes; {remedy}")
        return one

    def shape(self, index: int) -> EpisodeShape:
        """Length, split, name, task and success of one episode; refused where it cannot be read or differs from the others."""
        one = self._known(index)
        return EpisodeShape(
            one.steps, held_out=one.held_out, stamp=stamp(one.file), name=self.names[index], task=one.sentences[0],
            success=one.success,
        )  # fmt: skip

    def read(self, index: int) -> Episode:
        """One episode; `MachineError` where a compression filter is not installed."""
        one = self._known(index)
        vectors: dict[str, NDArray[np.float32]] = {}
        with Hdf5File(one.file, self.source_name) as data:
            for name, datasets in one.vectors.items():
                if datasets:
                    values = np.hstack([data.matrix(one.place + dataset) for dataset in datasets])
                    vectors[name] = values[: one.steps] if name == "proprioception" else values[one.late :]
        frames, said = {}, self._said(one)
        for camera in self._cameras:
            dataset, size = one.cameras[camera]
            frames[camera] = FrameBlocks(size, partial(self._blocks, one, one.place + dataset))
        episode = Episode(
            task=one.sentences[0], instruction=said[index % len(said)], rate_hz=self.rate_hz, frames=frames,
            actions=vectors["actions"], state=vectors.get("state"), proprioception=vectors.get("proprioception"),
            provenance={"file": self._relative(one.file).as_posix(), **one.facts},
        )  # fmt: skip
        return checked(episode, str(one))

    def _blocks(self, one: Recording, dataset: str) -> Iterator[NDArray[np.uint8]]:
        left = one.steps
        with Hdf5File(one.file, self.source_name) as data:
            for block in self._pictures(data, dataset):
                upright = {"vertical": block[:, ::-1], "rotate_180": block[:, ::-1, ::-1]}.get(one.flip, block)[:left]
                left -= len(upright)
                if len(upright):
                    yield np.ascontiguousarray(upright)
