"""ALOHA, Mobile ALOHA and AgileX Cobot Magic recordings: one HDF5 file per episode, `episode_0.hdf5`, `episode_1.hdf5`, ...

The files lie in `convert.path` or in folders below it, for example one per task. Read from each:

- `/action` (n, A): what the leader arms commanded; with `append_base_action` followed by the columns of `/base_action` (n, 2).
- `/observations/qpos` (n, P): proprioception. State: `qpos`, and `qvel` behind it where the files have it. Effort is not read.
- `/observations/images/<camera>`: raw (n, H, W, 3) uint8, or one JPEG (or PNG) per row: (n, L) uint8 padded with zeros, as
  Mobile ALOHA's `compress` writes them, fixed-length byte strings, or rows of variable length. The dataset's shape decides;
  the attribute `compress` and `/compress_len` say nothing more, because a picture knows its own end. Cameras in the order of
  their names. `/observations/images_depth` is left out, with a note.
- The instruction: see `Options`.

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
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from svam.contract import EVERYTHING, Choice, ContractError, Episode, EpisodeShape, FrameBlocks, Frozen, SourceDescription
from svam.files import FileError, read_json, stamp
from svam.sources._hdf5 import MAX_PIXELS, Hdf5File, check_named, hdf5_files, picture_shape, text_of

_IMAGES = "observations/images"
_INSTRUCTION_KEYS = ("language_raw", "language_instruction", "instruction", "task_description", "language", "prompt")
_SIDECARS = ("expanded_instruction_gpt-4-turbo.json", "instructions.json", "instruction.json")


class Options(Frozen):
    """What `convert.options` may say for `aloha`.

    rate_hz: recording rate, which the files do not state: 50 for ALOHA and Mobile ALOHA, 30 for AgileX Cobot Magic's recorder.
    channel_order: "rgb" or "bgr", the order of the recorder's arrays; see the module's text.
    append_base_action: put the columns of `/base_action` (a mobile base's velocities) behind those of `/action`.
    instruction: one sentence for all episodes.
    instructions: folder below `convert.path` ("." for itself) -> sentence; goes before `instruction`.
        Where neither says anything, the file's own is taken: the dataset or attribute `language_raw`, `language_instruction`,
        `instruction`, `task_description`, `language` or `prompt`, or else the key `instruction` or `instructions` of
        `expanded_instruction_gpt-4-turbo.json`, `instructions.json` or `instruction.json` beside the file. Without: an error.
    """

    rate_hz: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 50.0
    channel_order: Literal["rgb", "bgr"] = "rgb"
    append_base_action: bool = False
    instruction: str = ""
    instructions: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class _Header:
    """What is known of one file without its pictures. `base`: columns of base_action; `sentences`: at least one."""

    file: Path
    steps: int
    cameras: tuple[str, ...]
    velocity: bool
    base: int
    depth: bool
    compressed: bool
    sentences: tuple[str, ...]


def _picture(file: Path, where: str, row: Any) -> Any:
    """An encoded row opened by Pillow: its header is read, its pixels are not."""
    from PIL import Image

    data = np.ascontiguousarray(row).tobytes() if isinstance(row, np.ndarray) else bytes(row)
    data = data.rstrip(b"\0")  # neither a JPEG nor a PNG ends with a zero byte
    if not data:
        raise FileError(f"{file}: {where} is empty, expected a JPEG")
    try:
        picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, Image.DecompressionBombError):
        raise FileError(f"{file}: {where} is no whole JPEG or PNG picture") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise FileError(f"{file}: {where} claims {picture.width} x {picture.height} pixels, more than {MAX_PIXELS}")
    if picture.mode not in ("RGB", "L"):
        raise FileError(f"{file}: {where} has the colour mode {picture.mode}, expected RGB or grey")
    return picture


def _pixels(file: Path, where: str, row: Any, size: tuple[int, int]) -> NDArray[np.uint8]:
    """An encoded row as (H, W, 3) uint8 in the order that a standard viewer shows; `size` is (H, W)."""
    import struct
    import zlib

    picture = _picture(file, where, row)
    if (picture.height, picture.width) != size:
        raise FileError(f"{file}: {where} is {picture.height} x {picture.width}, but the first is {size[0]} x {size[1]}")
    try:
        return np.asarray(picture.convert("RGB"))
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        ArithmeticError,
        LookupError,
        TypeError,
        struct.error,
        zlib.error,
    ) as error:
        raise FileError(f"{file}: {where} is truncated or damaged ({error})") from None


class AlohaSource:
    """Episodes in the order of their folders' names, then by number."""

    def __init__(self, path: Path, options: Options) -> None:
        """See `open_source`."""
        self.path, self.options = Path(path), options
        found = hdf5_files(self.path)
        files = found if self.path.is_file() else [file for file in found if file.name.startswith("episode_")]
        if not files:
            names = f"; it has {found[0].relative_to(self.path)}" if found else ""
            raise FileError(f"{self.path}: no episode_*.hdf5 in it{names}")
        check_named(self.path, options.instructions, map(self._folder, files))
        self._headers = [self._header(file) for file in files]
        first = self._headers[0]
        for header in self._headers:
            for what, name in (("cameras", "cameras"), ("velocity", "observations/qvel"), ("base", "columns of base_action")):
                if getattr(header, what) != getattr(first, what) and (what != "base" or options.append_base_action):
                    raise ContractError(
                        f"{header.file}: {name}: {getattr(header, what)}, but {getattr(first, what)} in {first.file}; "
                        "convert them as separate sets"
                    )
        self.notes = self._notes(found)

    def _notes(self, found: list[Path]) -> list[str]:
        first, notes = self._headers[0], []
        if len(found) > len(self._headers):
            notes.append(f"{self.path}: {len(found) - len(self._headers)} HDF5 files are left out: not named episode_*")
        if any(header.depth for header in self._headers):
            notes.append(f"{self.path}: observations/images_depth is left out")
        if first.base and not self.options.append_base_action:
            notes.append(f"{self.path}: base_action is left out; convert.options.append_base_action adds its columns")
        if any(header.compressed for header in self._headers):
            seen = "swapped by" if self.options.channel_order == "rgb" else "as"
            notes.append(
                f"{self.path}: compressed pictures are read with red and blue {seen} a standard viewer, as channel_order "
                f"{self.options.channel_order!r} says; look at one episode, and change it if colours are wrong"
            )
        return notes

    def _header(self, file: Path) -> _Header:
        with Hdf5File(file, "aloha") as data:
            if not data.is_group("observations"):
                other = "; convert.source 'robomimic' reads its layout" if data.is_group("data") else ""
                raise FileError(f"{file}: no group observations, which ALOHA's layout has{other}")
            shape, _ = data.layout("action")
            if len(shape) != 2 or shape[0] == 0:
                raise FileError(f"{file}: action is {shape}, expected (steps, dimensions) with at least one step")
            cameras = data.names(_IMAGES)
            if not cameras:
                raise FileError(f"{file}: no camera in {_IMAGES}")
            compressed = False
            for camera in cameras:
                pictures, dtype = data.layout(f"{_IMAGES}/{camera}")
                if not pictures or pictures[0] != shape[0]:
                    raise ContractError(f"{file}: {_IMAGES}/{camera} is {pictures}, but action has {shape[0]} steps")
                if len(pictures) == 4 or dtype.kind not in "uSOV":
                    picture_shape(file, f"{_IMAGES}/{camera}", pictures, dtype)
                else:
                    compressed = True
            base = data.layout("base_action")[0] if data.is_dataset("base_action") else (0, 0)
            return _Header(
                file=file, steps=shape[0], cameras=tuple(cameras), velocity=data.is_dataset("observations/qvel"),
                base=base[1] if len(base) == 2 else 1, depth=bool(data.names("observations/images_depth")),
                compressed=compressed, sentences=self._sentences(file, data),
            )  # fmt: skip

    def _folder(self, file: Path) -> str:
        return file.parent.relative_to(self.path).as_posix() if self.path.is_dir() else "."

    def _sentences(self, file: Path, data: Hdf5File) -> tuple[str, ...]:
        folder = self._folder(file)
        said = self.options.instructions.get(folder, self.options.instruction).strip()
        found = [said] if said else self._own_sentences(file, data)
        found = [sentence for sentence in dict.fromkeys(found) if sentence]
        if not found:
            raise FileError(
                f"{file}: no instruction in it (attribute or dataset {', '.join(_INSTRUCTION_KEYS)}) or beside it; "
                f"set convert.options.instruction, or convert.options.instructions with the key {folder!r}"
            )
        return tuple(found)

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
            train = instructions.setdefault(header.sentences[0], {"train": [], "held_out": []})["train"]
            train.extend(sentence for sentence in header.sentences if sentence not in train)
        return SourceDescription(
            rate_hz=self.options.rate_hz, cameras=list(self._headers[0].cameras), instructions=instructions,
            provenance={"source": "aloha", "options": self.options.model_dump(), "files": len(self._headers)},
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._headers)

    def shape(self, index: int) -> EpisodeShape:
        """Length of one episode."""
        header = self._headers[index]
        return EpisodeShape(header.steps, stamp=stamp(header.file))

    def _frames(self, file: Path, data: Hdf5File, camera: str) -> FrameBlocks:
        """One camera's frames, to be read later from a file of their own."""
        name = f"{_IMAGES}/{camera}"
        shape, dtype = data.layout(name)
        if len(shape) == 4:
            raw = picture_shape(file, name, shape, dtype)
            return FrameBlocks(raw, lambda: self._raw_blocks(file, name, raw))
        variable = data.is_variable_bytes(name)
        if not (variable and len(shape) == 1) and not (dtype == np.uint8 and len(shape) == 2) and not (
            dtype.kind in "SV" and dtype.fields is None and len(shape) == 1
        ):  # fmt: skip
            raise FileError(f"{file}: {name} is {dtype} {shape}, expected uint8 (steps, H, W, 3) or an encoded picture per row")
        picture = _picture(file, f"{name}[0]", data.rows(name, 0, 1)[0])
        encoded = (shape[0], picture.height, picture.width, 3)
        return FrameBlocks(encoded, lambda: self._decoded_blocks(file, name, encoded))

    def _raw_blocks(self, file: Path, name: str, shape: tuple[int, int, int, int]) -> Iterator[NDArray[np.uint8]]:
        with Hdf5File(file, "aloha") as data:
            for block in data.blocks(name, shape[1] * shape[2] * 3):
                yield block if self.options.channel_order == "rgb" else np.ascontiguousarray(block[..., ::-1])

    def _decoded_blocks(self, file: Path, name: str, shape: tuple[int, int, int, int]) -> Iterator[NDArray[np.uint8]]:
        with Hdf5File(file, "aloha") as data:
            done = 0
            stored, dtype = data.layout(name)
            # Decoded pictures are what fills the memory, unless the padded rows are larger still.
            size = max(shape[1] * shape[2] * 3, stored[1] if len(stored) == 2 else dtype.itemsize)
            for rows in data.blocks(name, size):
                block = np.empty((len(rows), *shape[1:]), dtype=np.uint8)
                for i, row in enumerate(rows):
                    block[i] = _pixels(file, f"{name}[{done + i}]", row, (shape[1], shape[2]))
                done += len(rows)
                yield block if self.options.channel_order == "bgr" else np.ascontiguousarray(block[..., ::-1])

    def read(self, index: int) -> Episode:
        """One episode; its frames are read when they are asked for.

        Raises:
            FileError: the file is damaged, lacks a field or changed since the source was opened.
            ContractError: the episode breaks the contract.
            MachineError: a compression filter is not installed.
        """
        header = self._headers[index]
        file = header.file
        with Hdf5File(file, "aloha") as data:
            action, qpos = data.matrix("action"), data.matrix("observations/qpos")
            parts = {"action": [action], "state": [qpos]}
            if self.options.append_base_action:
                if not header.base:
                    raise FileError(f"{file}: no base_action in it, which convert.options.append_base_action asks for")
                parts["action"].append(data.matrix("base_action"))
            if header.velocity:
                parts["state"].append(data.matrix("observations/qvel"))
            for name, columns in parts.items():
                if any(len(column) != len(action) for column in columns):
                    raise ContractError(
                        f"{file}: {name} is joined of {[len(c) for c in columns]} steps, expected {len(action)}"
                    )
            simulated = data.attribute("/", "sim")
            frames = {camera: self._frames(file, data, camera) for camera in header.cameras}
        number = index % len(header.sentences)
        relative = file.relative_to(self.path).as_posix() if self.path.is_dir() else file.name
        known = {"sim": bool(simulated)} if isinstance(simulated, (bool, np.bool_)) else {}
        episode = Episode(
            task=header.sentences[0], instruction=header.sentences[number], rate_hz=self.options.rate_hz, frames=frames,
            actions=np.hstack(parts["action"]), state=np.hstack(parts["state"]), proprioception=qpos,
            provenance={"file": relative, **known},
        )  # fmt: skip
        try:
            episode.check()
        except ContractError as error:
            raise ContractError(f"{file}: {error}") from None
        return episode


def open_source(path: Path, options: Options, choice: Choice = EVERYTHING) -> AlohaSource:
    """Open a folder of `episode_*.hdf5` files, or one such file; every file's header is read.

    Raises:
        FileError: no files, or one is damaged, has no camera or no instruction.
        ContractError: two files differ in their cameras or vectors, or a file's cameras in length from its actions.
        MachineError: h5py is not installed.
    """
    return AlohaSource(path, options)
