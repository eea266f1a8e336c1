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

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svam.contract import EVERYTHING, Choice, Frozen
from svam.errors import SvamError
from svam.files import FileError, read_json
from svam.sources._hdf5 import Hdf5File, Hdf5Source, Recording, Size, hdf5_files, text_of
from svam.sources._pictures import NoColourError, in_blocks, picture_rgb, without_it

_IMAGES, _DEPTH = "observations/images", "observations/images_depth"
_INSTRUCTION_KEYS = ("language_raw", "language_instruction", "instruction", "task_description", "language", "prompt")
_SIDECARS = ("expanded_instruction_gpt-4-turbo.json", "instructions.json", "instruction.json")


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


def _is_encoded(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether each row is one JPEG or PNG: bytes padded with zeros, or strings."""
    return (dtype == np.uint8 and len(shape) == 2) or (dtype.kind in "SVO" and len(shape) == 1)


def _decoded(row: Any, where: str) -> tuple[NDArray[np.uint8], str]:
    """A row as `picture_rgb` reads it. No JPEG and no PNG ends with a zero byte."""
    return picture_rgb(np.asarray(row).tobytes().rstrip(b"\0"), where)


class AlohaSource(Hdf5Source):
    """Episodes in the order of their folders' names, then by number."""

    source_name = "aloha"
    prefix = f"{_IMAGES}/"
    usual_rate = (50.0, "ALOHA's 50 Hz are assumed (AgileX's recorder has 30)")

    def __init__(self, path: Path, options: Options, choice: Choice = EVERYTHING) -> None:
        """Open a folder of one HDF5 file an episode, or one such file; every file's header is read.

        Raises:
            FileError: no files, or none of them can be read.
            ParamsError: `choice` names a camera that no file has.
            MachineError: h5py is not installed.
        """
        there = hdf5_files(path)
        files = [file for file in there if file.name.startswith("episode_")] or there
        super().__init__(path, options, choice, files)
        if unnamed := len(there) - len(files):
            self._note(f"{unnamed} HDF5 files are left out: not named episode_*")

    def _key(self, file: Path) -> str:
        return self._relative(file).parent.as_posix()

    def _scan(self, data: Hdf5File) -> dict[str, bool | None]:
        if not data.names("observations"):
            raise FileError(f"{data.file}: no group observations, which ALOHA's layout has; it has {data.listed('/')}")
        return {"": None}

    def _header(self, data: Hdf5File, place: str, held_out: bool | None) -> Recording:
        steps, _ = data.vector("action")
        qpos, qvel = ["observations/qpos"], ["observations/qvel"] * data.is_dataset("observations/qvel")
        actions = ["action"] + ["base_action"] * self.options.append_base_action
        columns = {name: f"(n, {data.vector(name, steps)[1]})" for name in actions + qpos + qvel}
        simulated = data.attribute("/", "sim")
        return Recording(
            file=data.file, place=place, steps=steps,
            cameras=self._cameras_of(data, steps), alike=columns, sentences=self._sentences(data, place),
            vectors={"actions": actions, "state": qpos + qvel, "proprioception": qpos},
            facts={"sim": bool(simulated)} if isinstance(simulated, (bool, np.bool_)) else {},
        )  # fmt: skip

    def _cameras_of(self, data: Hdf5File, steps: int) -> dict[str, tuple[str, Size]]:
        """The cameras of a file (those of `convert.cameras`)."""
        cameras: dict[str, tuple[str, Size]] = {}
        left_out: list[SvamError] = []
        faults: list[SvamError] = []
        for camera in filter(self._asked_for, data.names(_IMAGES)):
            name = f"{_IMAGES}/{camera}"
            if not (data.is_dataset(name) or self._choice.cameras):
                self._note(f"left out, as a group and no dataset: {name}")
                continue
            shape, dtype = data.layout(name)
            encoded = _is_encoded(shape, dtype)
            try:
                if encoded:
                    data.layout(name, steps)
                    picture, done = _decoded(data.rows(name, 0, 1)[0], f"{data.file}: {name}[0]")
                    cameras[camera] = name, (steps, *picture.shape[:2], 3)
                    if done:
                        self._note(f"pictures of {name} {done}")
                    seen = "swapped by" if self.options.channel_order == "rgb" else "as"
                    self._note(
                        f"compressed pictures are read with red and blue {seen} a standard viewer, as channel_order "
                        f"{self.options.channel_order!r} says; look at one episode, and change it if colours are wrong"
                    )
                else:
                    pictures = data.pictures(name, steps)
                    cameras[camera] = name, pictures.shape
                    self._note(*pictures.notes(name))
            except SvamError as error:
                depth = isinstance(error, NoColourError) and (encoded or len(shape) > 2) and not self._choice.cameras
                (left_out if depth else faults).append(error)
                if depth:
                    self._note(f"left out, as no colour pictures: {name}" + f" {dtype} {shape[1:]}" * (not encoded))
        if faults:
            raise type(faults[0])(without_it(faults[0], list(cameras)))
        if not cameras:
            asked = "of convert.cameras " * bool(self._choice.cameras)
            why = f"; {without_it(left_out[0], [])}" if left_out else ""
            raise FileError(f"{data.file}: no camera {asked}in {_IMAGES}; it has {data.listed(_IMAGES)}{why}")
        if data.names(_DEPTH):
            self._note(f"left out, as no colour pictures: {_DEPTH}")
        if not self.options.append_base_action and data.is_dataset("base_action"):
            self._note("base_action is left out; convert.options.append_base_action adds its columns")
        return cameras

    def _pictures(self, data: Hdf5File, dataset: str) -> Iterator[NDArray[np.uint8]]:
        where, encoded = f"{data.file}: {dataset}", _is_encoded(*data.layout(dataset))
        if encoded:
            rows = enumerate(row for block in data.blocks(dataset) for row in block)
            blocks = in_blocks((_decoded(row, f"{where}[{number}]")[0] for number, row in rows), where)
        else:
            blocks = data.picture_blocks(dataset)
        swapped = encoded == (self.options.channel_order == "rgb")
        for block in blocks:
            yield block[..., ::-1] if swapped else block

    def _own_sentences(self, data: Hdf5File, place: str) -> list[str]:
        """Those of a file, or of the JSON beside it."""
        for key in _INSTRUCTION_KEYS:
            texts = data.texts(key) if data.is_dataset(key) else [data.text_attribute("/", key) or ""]
            if len(set(filter(None, texts))) > 1 and len(texts) == data.layout("action")[0][0]:
                found = f"{data.file}: {key} has a sentence for each row, not all alike, expected those of the whole episode"
                raise FileError(f"{found}; give them to its parts by convert.captions, or set convert.instruction")
            if any(texts):
                return texts
        for sidecar in filter(Path.is_file, map(data.file.with_name, _SIDECARS)):
            content = read_json(sidecar)
            value = content.get("instruction", content.get("instructions")) if isinstance(content, dict) else None
            values = value if isinstance(value, list) else [value]
            texts = [text_of(text, f"{sidecar}: an instruction") or "" for text in values]
            if not all(texts) or not texts:
                raise FileError(f"{sidecar}: key 'instruction' is {value!r:.80}, expected a sentence or a list of sentences")
            return texts
        return []


open_source = AlohaSource
