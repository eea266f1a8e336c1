"""ALOHA, Mobile ALOHA and AgileX Cobot Magic recordings: one HDF5 file per episode, `episode_0.hdf5`, `episode_1.hdf5`, ...

The files lie in `convert.path` or in folders below it, for example one per task; where none is named `episode_*`, all .hdf5 and
.h5 files are read, in the order of the numbers in their names. Read from each:

- `/action` (n, A): what the leader arms commanded; with `append_base_action` followed by the columns of `/base_action` (n, 2).
- `/observations/qpos` (n, P): proprioception. State: `qpos`, and `qvel` behind it where the files have it. Effort is not read.
- `/observations/images/<camera>`: raw uint8 (n, H, W, 3) (or with alpha, or channels first), or one JPEG (or PNG) per row:
  (n, L) uint8 padded with zeros, as Mobile ALOHA's `compress` writes them, fixed-length byte strings, or rows of variable
  length. The dataset's shape decides; the attribute `compress` and `/compress_len` say nothing more, because a picture knows
  its own end. Cameras in the order of their names. Depth, here or in `/observations/images_depth`, is left out, with a note.
- The instruction: see `Options`. The rate: the files do not state it; without `convert.rate_hz`, ALOHA's 50 Hz, with a note
  (AgileX Cobot Magic's recorder has 30).

Alignment: the recorders append the observation and then the action taken on it, so row t of `action` is what was commanded in
the state that picture t shows; nothing is shifted. Numbers are cast to float32. There are no timestamps.

Channel order. The published recorders (tonyzhaozh/aloha, MarkFzp/mobile-aloha, agilexrobotics/cobot_magic) keep the camera
driver's RGB arrays. Where they compress, they hand these arrays to `cv2.imencode`, which believes them to be BGR: a standard
viewer shows such a JPEG with red and blue swapped, and `cv2.imdecode` swaps them back. `channel_order: rgb`, the default, means
that: raw arrays as they are, and JPEGs as `cv2.imdecode` returns them. `channel_order: bgr` is for recorders whose arrays were
BGR: raw arrays are reversed, and JPEGs are taken as a standard viewer shows them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svam.contract import EVERYTHING, Choice, ContractError, Episode, EpisodeShape, FrameBlocks, Frozen, SourceDescription
from svam.errors import SvamError
from svam.files import FileError, read_json, stamp
from svam.sources._choice import checked, chosen_cameras, chosen_instruction
from svam.sources._hdf5 import Hdf5File, attempted, check_named, hdf5_files, most_common, text_of
from svam.sources._picture_arrays import MAX_PIXELS, picture_array

_IMAGES = "observations/images"
_INSTRUCTION_KEYS = ("language_raw", "language_instruction", "instruction", "task_description", "language", "prompt")
_SIDECARS = ("expanded_instruction_gpt-4-turbo.json", "instructions.json", "instruction.json")
_RATE_HZ = 50.0


class Options(Frozen):
    """What `convert.options` may say for `aloha`.

    channel_order: "rgb" or "bgr", the order of the recorder's arrays; see the module's text.
    append_base_action: put the columns of `/base_action` (a mobile base's velocities) behind those of `/action`.
    instructions: folder below `convert.path` ("." for itself) -> sentence of its files. Where it says nothing, a file's own is
        taken: the dataset or attribute `language_raw`, `language_instruction`, `instruction`, `task_description`, `language` or
        `prompt`, or else the key `instruction` or `instructions` of `expanded_instruction_gpt-4-turbo.json`,
        `instructions.json` or `instruction.json` beside the file. Where there is none, `convert.missing_instruction`.
    """

    channel_order: Literal["rgb", "bgr"] = "rgb"
    append_base_action: bool = False
    instructions: dict[str, str] = {}


@dataclass(frozen=True)
class _Header:
    """What is known of one file without its pictures. `cameras`: name -> (n, H, W, 3); `vectors`: dataset -> columns;
    `sentences`: at least one; `aside`: what lies among the cameras and is none; `notes`: of their pictures."""

    file: Path
    steps: int
    cameras: dict[str, tuple[int, int, int, int]]
    vectors: dict[str, int]
    sentences: tuple[str, ...]
    compressed: bool
    aside: str
    notes: tuple[str, ...]


def _picture(file: Path, where: str, row: Any) -> Any:
    """An encoded row opened by Pillow: its header is read, its pixels are not."""
    from PIL import Image

    data = np.ascontiguousarray(row).tobytes() if isinstance(row, np.ndarray) else bytes(row)
    data = data.rstrip(b"\0")  # neither a JPEG nor a PNG ends with a zero byte
    if not data:
        raise FileError(f"{file}: {where} is empty, expected a JPEG")
    try:
        picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    except Exception:  # Pillow raises a dozen types on damaged bytes
        raise FileError(f"{file}: {where} is no whole JPEG or PNG picture") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise FileError(f"{file}: {where} claims {picture.width} x {picture.height} pixels, more than {MAX_PIXELS}")
    return picture


def _pixels(file: Path, where: str, row: Any, size: tuple[int, int]) -> NDArray[np.uint8]:
    """An encoded row as (H, W, 3) uint8 in the order that a standard viewer shows; `size` is (H, W)."""
    picture = _picture(file, where, row)
    if (picture.height, picture.width) != size:
        raise FileError(f"{file}: {where} is {picture.height} x {picture.width}, but the first is {size[0]} x {size[1]}")
    if picture.mode not in _COLOURS:
        raise FileError(f"{file}: {where} has the colour mode {picture.mode}, expected RGB or grey")
    try:
        return np.asarray(picture.convert("RGB"))
    except Exception as error:  # as above
        raise FileError(f"{file}: {where} is truncated or damaged ({error})") from None


_COLOURS = ("RGB", "RGBA", "L", "P")


class AlohaSource:
    """Episodes in the order of their folders' names, then by number."""

    def __init__(self, path: Path, options: Options, choice: Choice) -> None:
        """See `open_source`."""
        self.path, self.options, self._choice = Path(path), options, choice
        there = hdf5_files(self.path)
        files = [file for file in there if file.name.startswith("episode_")] or there
        check_named(self.path, options.instructions, map(self._folder, files))
        self._headers = [attempted(partial(self._header, file)) for file in files]
        readable = [header for header in self._headers if isinstance(header, _Header)]
        if not readable:
            raise next(header for header in self._headers if isinstance(header, SvamError))
        known = list(dict.fromkeys(camera for header in readable for camera in header.cameras))
        asked = chosen_cameras(choice, known, self.path, f"{_IMAGES}/")
        self._cameras = asked if choice.cameras else list(most_common(tuple(header.cameras) for header in readable))
        self._vectors = dict(most_common(tuple(header.vectors.items()) for header in readable))
        self.notes = self._notes(readable, len(there) - len(files), [camera for camera in known if camera not in self._cameras])

    def _notes(self, readable: list[_Header], unnamed: int, unread: list[str]) -> list[str]:
        notes = [f"{self.path}: {unnamed} HDF5 files are left out: not named episode_*"] if unnamed else []
        notes += [f"{self.path}: {_IMAGES}/{camera} is left out: most files do not have it" for camera in unread]
        if aside := next((header.aside for header in readable if header.aside), ""):
            notes.append(f"{self.path}: left out, as no colour pictures: {aside}")
        notes += dict.fromkeys(note for header in readable for note in header.notes)
        if "base_action" in self._vectors and not self.options.append_base_action:
            notes.append(f"{self.path}: base_action is left out; convert.options.append_base_action adds its columns")
        if any(header.compressed for header in readable):
            seen = "swapped by" if self.options.channel_order == "rgb" else "as"
            notes.append(
                f"{self.path}: compressed pictures are read with red and blue {seen} a standard viewer, as channel_order "
                f"{self.options.channel_order!r} says; look at one episode, and change it if colours are wrong"
            )
        if self._choice.rate_hz is None:
            notes.append(
                f"{self.path}: the files do not state their rate: ALOHA's {_RATE_HZ:g} Hz are assumed (AgileX's recorder has "
                "30); set convert.rate_hz to that of yours"
            )
        return notes

    def _header(self, file: Path) -> _Header:
        with Hdf5File(file, "aloha") as data:
            return self._read_header(file, data)

    def _read_header(self, file: Path, data: Hdf5File) -> _Header:
        if not data.is_group("observations"):
            raise FileError(f"{file}: no group observations, which ALOHA's layout has; it has {data.listed('/')}")
        names = ["action", "observations/qpos", *(n for n in ("observations/qvel", "base_action") if data.is_dataset(n))]
        vectors, steps = {}, data.layout("action")[0][:1] or (0,)
        for name in names:
            shape, _ = data.layout(name)
            if len(shape) != 2 or shape[0] == 0:
                raise FileError(f"{file}: {name} is {shape}, expected (steps, dimensions) with at least one step")
            if shape[0] != steps[0] and (name != "base_action" or self.options.append_base_action):
                raise ContractError(f"{file}: {name} has {shape[0]} steps, but action has {steps[0]}")
            vectors[name] = shape[1]
        asked = {name.removeprefix(f"{_IMAGES}/") for name in self._choice.cameras}
        cameras, aside, notes, compressed = {}, list[str](), list[str](), False
        for camera in data.names(_IMAGES):
            if asked and camera not in asked:
                continue
            name = f"{_IMAGES}/{camera}"
            shape, dtype = data.layout(name)
            if not shape or shape[0] != steps[0]:
                raise ContractError(f"{file}: {name} is {shape}, but action has {steps[0]} steps{self._without(data, camera)}")
            if picture_array(shape, dtype) is not None:
                pictures = data.pictures(name)
                cameras[camera] = pictures.shape
                notes += pictures.notes(f"{self.path}: {name}")
            elif dtype.kind in "uif" and len(shape) > 2 and not asked:
                aside.append(f"{name} {dtype} {shape}")
            elif (size := self._encoded(file, data, camera, bool(asked))) is not None:
                cameras[camera], compressed = (steps[0], *size, 3), True
            else:
                aside.append(f"{name}, pictures of depth")
        if not cameras:
            raise FileError(
                f"{file}: no camera {'of convert.cameras ' * bool(asked)}in {_IMAGES}; it has {data.listed(_IMAGES)}"
            )
        if (depth := "observations/images_depth") and data.names(depth):
            aside.append(depth)
        return _Header(
            file=file, steps=steps[0], cameras=cameras, vectors=vectors, sentences=self._sentences(file, data),
            compressed=compressed, aside=", ".join(aside), notes=tuple(notes),
        )  # fmt: skip

    @staticmethod
    def _without(data: Hdf5File, camera: str) -> str:
        """How to leave a camera out, for the end of a message."""
        others = [name for name in data.names(_IMAGES) if name != camera]
        return f"; to leave it out, set convert.cameras: [{', '.join(others)}]" if others else ""

    def _encoded(self, file: Path, data: Hdf5File, camera: str, asked: bool) -> tuple[int, int] | None:
        """(H, W) of encoded pictures, by the first; None where they are of depth and nobody asked for them."""
        name = f"{_IMAGES}/{camera}"
        shape, dtype = data.layout(name)
        rows = (data.is_variable_bytes(name) or (dtype.kind in "SV" and dtype.fields is None)) and len(shape) == 1
        if not rows and not (dtype == np.uint8 and len(shape) == 2):
            raise FileError(
                f"{file}: {name} is {dtype} {shape}, expected uint8 (steps, H, W, 3) or an encoded picture per row"
                + self._without(data, camera)
            )
        try:
            picture = _picture(file, f"{name}[0]", data.rows(name, 0, 1)[0])
        except FileError as error:
            raise FileError(f"{error}{self._without(data, camera)}") from None
        if picture.mode not in _COLOURS and not asked:
            return None
        return picture.height, picture.width

    def _folder(self, file: Path) -> str:
        return file.parent.relative_to(self.path).as_posix() if self.path.is_dir() else "."

    def _sentences(self, file: Path, data: Hdf5File) -> tuple[str, ...]:
        mapped = self.options.instructions.get(self._folder(file), "").strip()
        own = [mapped] if mapped else [] if self._choice.instruction else self._own_sentences(file, data)
        first = chosen_instruction(self._choice, own[0] if own else None, str(file))
        return tuple(dict.fromkeys([first, *(sentence for sentence in own if sentence and not self._choice.instruction)]))

    @staticmethod
    def _own_sentences(file: Path, data: Hdf5File) -> list[str]:
        for key in _INSTRUCTION_KEYS:
            found = data.texts(key) if data.is_dataset(key) else [data.text_attribute("/", key) or ""]
            if any(found):
                return found
        for sidecar in (file.with_name(name) for name in _SIDECARS):
            if not sidecar.is_file():
                continue
            content = read_json(sidecar)
            value = content.get("instruction", content.get("instructions")) if isinstance(content, dict) else None
            sentences = value if isinstance(value, list) else [value]
            if not sentences or not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
                raise FileError(f"{sidecar}: key 'instruction' is {value!r:.80}, expected a sentence or a list of sentences")
            try:
                return [text_of(sentence) or "" for sentence in sentences]
            except UnicodeError:
                raise FileError(f"{sidecar}: an instruction holds characters that are not valid Unicode") from None
        return []

    def describe(self) -> SourceDescription:
        """Rate, cameras and instructions; a task is named by its (first) sentence."""
        instructions: dict[str, dict[str, list[str]]] = {}
        for header in self._headers:
            if isinstance(header, _Header):
                train = instructions.setdefault(header.sentences[0], {"train": [], "held_out": []})["train"]
                train.extend(sentence for sentence in header.sentences if sentence not in train)
        return SourceDescription(
            rate_hz=self._choice.rate_hz or _RATE_HZ, cameras=self._cameras, instructions=instructions,
            provenance={"source": "aloha", "options": self.options.model_dump(), "files": len(self._headers)},
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._headers)

    def _known(self, index: int) -> _Header:
        """The header of an episode that can be read, with all cameras and vectors of the set."""
        header = self._headers[index]
        if not isinstance(header, _Header):
            raise header
        if absent := [camera for camera in self._cameras if camera not in header.cameras]:
            raise ContractError(
                f"{header.file}: no camera {absent[0]!r} in {_IMAGES}, which other files have; it has "
                f"{', '.join(header.cameras)}, and convert.cameras says which to read"
            )
        if self.options.append_base_action and "base_action" not in header.vectors:
            raise FileError(f"{header.file}: no base_action in it, which convert.options.append_base_action asks for")
        for name, columns in self._vectors.items():
            read = name != "base_action" or self.options.append_base_action
            if read and header.vectors.get(name) != columns:
                raise ContractError(
                    f"{header.file}: {name} has {header.vectors.get(name, 'no')} columns, but {columns} in most files; "
                    "convert them as separate sets"
                )
        return header

    def _relative(self, file: Path) -> Path:
        return file.relative_to(self.path) if self.path.is_dir() else Path(file.name)

    def shape(self, index: int) -> EpisodeShape:
        """Length, name and task of one episode.

        Raises:
            FileError, ContractError: it cannot be read, or differs from the others in cameras or vectors.
        """
        header = self._known(index)
        name = self._relative(header.file).with_suffix("").as_posix()
        return EpisodeShape(header.steps, stamp=stamp(header.file), name=name, task=header.sentences[0])

    def _frames(self, file: Path, camera: str, shape: tuple[int, int, int, int]) -> FrameBlocks:
        """One camera's frames, to be read later from a file of their own."""
        return FrameBlocks(shape, lambda: self._blocks(file, f"{_IMAGES}/{camera}", shape))

    def _blocks(self, file: Path, name: str, shape: tuple[int, int, int, int]) -> Iterator[NDArray[np.uint8]]:
        with Hdf5File(file, "aloha") as data:
            raw = len(data.layout(name)[0]) == 4
            blocks = data.picture_blocks(name) if raw else self._decoded(file, data, name, shape)
            swapped = (self.options.channel_order == "bgr") == raw
            for block in blocks:
                yield np.ascontiguousarray(block[..., ::-1]) if swapped else block

    @staticmethod
    def _decoded(file: Path, data: Hdf5File, name: str, shape: tuple[int, int, int, int]) -> Iterator[NDArray[np.uint8]]:
        """Encoded pictures, as a standard viewer shows them."""
        done, (stored, dtype) = 0, data.layout(name)
        # Decoded pictures are what fills the memory, unless the padded rows are larger still.
        size = max(shape[1] * shape[2] * 3, stored[1] if len(stored) == 2 else dtype.itemsize)
        for rows in data.blocks(name, size):
            block = np.empty((len(rows), *shape[1:]), dtype=np.uint8)
            for i, row in enumerate(rows):
                block[i] = _pixels(file, f"{name}[{done + i}]", row, (shape[1], shape[2]))
            done += len(rows)
            yield block

    def read(self, index: int) -> Episode:
        """One episode; its frames are read when they are asked for.

        Raises:
            FileError: the file is damaged, lacks a field or changed since the source was opened.
            ContractError: the episode breaks the contract.
            MachineError: a compression filter is not installed.
        """
        header = self._known(index)
        file, sentences = header.file, header.sentences
        with Hdf5File(file, "aloha") as data:
            action, qpos = data.matrix("action"), data.matrix("observations/qpos")
            actions = [action, data.matrix("base_action")] if self.options.append_base_action else [action]
            state = [qpos, data.matrix("observations/qvel")] if "observations/qvel" in header.vectors else [qpos]
            if any(len(part) != header.steps for part in (*actions, *state)):
                raise FileError(f"{file}: changed since it was opened")
            simulated = data.attribute("/", "sim")
        known = {"sim": bool(simulated)} if isinstance(simulated, (bool, np.bool_)) else {}
        episode = Episode(
            task=sentences[0], instruction=sentences[index % len(sentences)], rate_hz=self._choice.rate_hz or _RATE_HZ,
            frames={camera: self._frames(file, camera, header.cameras[camera]) for camera in self._cameras},
            actions=np.hstack(actions), state=np.hstack(state), proprioception=qpos,
            provenance={"file": self._relative(file).as_posix(), **known},
        )  # fmt: skip
        return checked(episode, file)


def open_source(path: Path, options: Options, choice: Choice = EVERYTHING) -> AlohaSource:
    """Open a folder of one HDF5 file an episode, or one such file; every file's header is read.

    Raises:
        FileError: no files, or none of them can be read.
        ParamsError: `choice` names a camera that no file has.
        MachineError: h5py is not installed.
    """
    return AlohaSource(path, options, choice)
