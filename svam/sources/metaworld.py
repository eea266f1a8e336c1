"""The demonstrations that the collect stage wrote: `<path>/<task>/meta.json`, and for each episode
`episode_0000.safetensors` and `episode_0000.<camera>.png`, its frames from left to right. Episodes of a look that is
`unlabelled` are video, without vectors.

Only these files are read; no simulator is imported.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load

from svam.contract import (
    EVERYTHING,
    VECTORS,
    Annotation,
    Choice,
    ContractError,
    Episode,
    EpisodeShape,
    Frozen,
    SourceDescription,
)
from svam.files import FileError, read_json, refuse_lfs_pointer, stamp
from svam.sources._choice import LABELS, checked, chosen_cameras, contents, existing_folder, lies_there

RAW_SCHEMA = 2
"""The layout of the files that this module reads."""
_KEYS = ("schema_version", "task", "rate_hz", "cameras", "image_size", "instructions", "provenance", "sha256")
_LABELS = ("depth", "segmentation")
_ARRAYS = (*VECTORS, "annotation_index", *_LABELS, "success")


class Options(Frozen):
    """`tasks`: which to read, and in which order; empty means all that are there. The convert stage sets `collect.tasks`.
    `looks`: read only episodes of these; empty means all."""

    tasks: tuple[str, ...] = ()
    looks: tuple[str, ...] = ()


def _read_meta(folder: Path) -> dict[str, Any]:
    """One task's `meta.json`, with all of `_KEYS`."""
    file = folder / "meta.json"
    meta = read_json(file)
    if not isinstance(meta, dict) or "schema_version" not in meta:
        raise FileError(f"{file}: key 'schema_version' is missing")
    if meta["schema_version"] != RAW_SCHEMA:
        raise FileError(f"{file}: schema_version is {meta['schema_version']!r}, this code reads {RAW_SCHEMA}; collect again")
    missing = [key for key in _KEYS if key not in meta]
    if missing:
        raise FileError(f"{file}: key {missing[0]!r} is missing")
    if not isinstance(meta["provenance"], dict) or not isinstance(meta["provenance"].get("episodes"), list):
        raise FileError(f"{file}: provenance.episodes is missing")
    if not isinstance(meta["instructions"], dict) or not meta["instructions"].get("train"):
        raise FileError(f"{file}: instructions.train is missing or empty")
    return meta


class MetaworldSource:
    """Episodes task by task, then by number."""

    def __init__(self, path: Path, options: Options, choice: Choice = EVERYTHING) -> None:
        """Open the folder that the collect stage filled.

        Raises:
            FileError: the folder, a task, a look or a field of a `meta.json` is missing.
            ContractError: two tasks differ in rate, cameras or image size.
        """
        self.path, self._choice = existing_folder(path), choice
        present = sorted(file.parent.name for file in self.path.glob("*/meta.json"))
        if not present:
            has = contents(self.path)
            raise FileError(f"{self.path}: no <task>/meta.json in it, it has {has}; run the collect stage first")
        tasks = list(options.tasks) or present
        for task in tasks:
            if task not in present:
                raise FileError(f"{self.path / task / 'meta.json'}: no such file; collect task {task!r} first")
        ignored = [task for task in present if task not in tasks]
        self.notes = [f"{self.path}: ignoring {', '.join(ignored)}, which collect.tasks does not list"] if ignored else []
        self._meta = {task: _read_meta(self.path / task) for task in tasks}
        first = tasks[0]
        for task, meta in self._meta.items():
            for key in ("rate_hz", "cameras", "image_size"):
                if meta[key] != self._meta[first][key]:
                    raise ContractError(
                        f"{self.path / task / 'meta.json'}: {key} is {meta[key]}, but {self._meta[first][key]} "
                        f"in {first}; collect both with the same params"
                    )
            if meta["task"] != task:
                raise FileError(f"{self.path / task / 'meta.json'}: task is {meta['task']!r}, expected {task!r}")
        own = self._meta[first]["cameras"]
        self._cameras = chosen_cameras(choice, own, self.path)
        self._labels = _LABELS if self._cameras[0] == own[0] else ()
        self.notes += [] if self._labels else [f"{self.path}: {LABELS.format(own[0])}"]
        every = [(task, k, _look(entry)) for task in tasks for k, entry in enumerate(self._entries(task))]
        there = sorted({look for _, _, look in every})
        if absent := [look for look in options.looks if look not in there]:
            raise FileError(f"{self.path}: no episode of look {absent[0]!r}; there are {', '.join(there)}")
        self._chosen = [(task, k) for task, k, look in every if not options.looks or look in options.looks]
        self.names = [f"{task}/episode_{k:04d}" for task, k in self._chosen]

    def _entries(self, task: str) -> list[dict[str, Any]]:
        """What the `meta.json` of a task says of its episodes."""
        entries: list[dict[str, Any]] = self._meta[task]["provenance"]["episodes"]
        return entries

    def describe(self) -> SourceDescription:
        """Rate, cameras, instructions and each task's provenance."""
        first = next(iter(self._meta.values()))
        return SourceDescription(
            rate_hz=self._choice.rate_hz or first["rate_hz"], cameras=self._cameras,
            instructions={
                task: {"train": [said], "held_out": []} if (said := self._choice.instruction) else meta["instructions"]
                for task, meta in self._meta.items()
            },
            provenance={
                "source": "metaworld",
                "tasks": {
                    task: {key: value for key, value in meta["provenance"].items() if key != "episodes"}
                    | {"image_size": meta["image_size"]}
                    for task, meta in self._meta.items()
                },
            },
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._chosen)

    def _place(self, index: int) -> tuple[str, int, Path]:
        """Task, number within it, and file of arrays of an episode."""
        task, number = self._chosen[index]
        return task, number, self.path / f"{self.names[index]}.safetensors"

    def _refuse_absent(self, file: Path) -> None:
        """Nothing, unless a file of an episode is not there, or only its Git LFS pointer is."""
        if not file.is_file():
            lies = lies_there(self.path, file)
            raise FileError(f"{file}: no such file, though meta.json lists its episode; {lies}; collect again")
        refuse_lfs_pointer(file)

    def _content(self, task: str, file: Path) -> bytes:
        """A file of an episode of `task`, checked against the SHA-256 that `meta.json` states."""
        self._refuse_absent(file)
        content, expected = file.read_bytes(), self._meta[task]["sha256"].get(file.name)
        if hashlib.sha256(content).hexdigest() != expected:
            raise FileError(f"{file}: truncated or damaged: its SHA-256 is not the one in meta.json; collect again")
        return content

    def _arrays(self, task: str, number: int, file: Path) -> dict[str, NDArray[Any]]:
        """The arrays of an episode, all but its frames."""
        arrays = load(self._content(task, file))
        unlabelled = _look(self._entries(task)[number]) in self._meta[task]["provenance"].get("unlabelled", [])
        missing = [name for name in _ARRAYS if name not in arrays and not (unlabelled and name in VECTORS)]
        if missing:
            raise FileError(f"{file}: array {missing[0]!r} is missing; it has {', '.join(sorted(arrays))}")
        return arrays

    def _frames(self, task: str, file: Path, steps: int) -> NDArray[np.uint8]:
        """(steps, H, W, 3), which stand from left to right in a picture."""
        size = self._meta[task]["image_size"]
        with Image.open(io.BytesIO(self._content(task, file)), formats=("PNG",)) as picture:
            if (picture.height, picture.width, picture.mode) != (size, steps * size, "RGB"):
                raise FileError(
                    f"{file}: {picture.height} x {picture.width} pixels in mode {picture.mode}, expected {size} x "
                    f"{steps * size} in RGB"
                )
            pixels = np.asarray(picture, dtype=np.uint8)
        return np.ascontiguousarray(pixels.reshape(size, steps, size, 3).swapaxes(0, 1))

    def shape(self, index: int) -> EpisodeShape:
        """Lengths, without a frame."""
        task, number, file = self._place(index)
        arrays = self._arrays(task, number, file)
        labelled = len(arrays["annotation_index"])
        files = [file, *(_picture(file, camera) for camera in self._cameras)]
        for part in files:
            self._refuse_absent(part)
        return EpisodeShape(
            len(arrays["success"]), dict.fromkeys(self._labels, labelled), stamp=" ".join(stamp(part) for part in files),
            name=self.names[index], task=task, success=bool(arrays["success"].any()),
        )  # fmt: skip

    def read(self, index: int) -> Episode:
        """One episode with its labels."""
        task, number, file = self._place(index)
        meta, arrays = self._meta[task], self._arrays(task, number, file)
        steps, labelled = len(arrays["success"]), arrays["annotation_index"]
        paraphrases = meta["instructions"]["train"]
        turn = number // len(meta["provenance"].get("looks", ["stock"]))  # so that no look goes with a sentence
        episode = Episode(
            task=task,
            instruction=self._choice.instruction or paraphrases[turn % len(paraphrases)],
            rate_hz=self._choice.rate_hz or meta["rate_hz"],
            frames={camera: self._frames(task, _picture(file, camera), steps) for camera in self._cameras},
            annotations={name: Annotation(arrays[name], labelled) for name in self._labels},
            provenance={"file": f"{task}/{file.name}", **meta["provenance"]["episodes"][number]},
            **{name: arrays.get(name) for name in VECTORS},
        )
        return checked(episode, file)


def _look(entry: dict[str, Any]) -> str:
    """The look of an episode, by what `meta.json` says of it."""
    return str(entry.get("look", "stock"))


def _picture(file: Path, camera: str) -> Path:
    """The file of a camera's frames, beside that of the arrays."""
    return file.with_name(f"{file.stem}.{camera}.png")


open_source = MetaworldSource
