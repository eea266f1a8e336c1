"""The demonstrations that the collect stage wrote: `<path>/<task>/meta.json` and `episode_0000.npz`, ...

Only these files are read; no simulator is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from svam.contract import Annotation, ContractError, Episode, EpisodeShape, Frozen, SourceDescription
from svam.files import FileError, read_json, stamp
from svam.sources._npz import field, load

RAW_SCHEMA = 1
"""The layout of `meta.json` and of the archives that this module reads."""
_KEYS = ("schema_version", "task", "rate_hz", "cameras", "image_size", "instructions", "provenance")
_MISSING = ", though meta.json lists its episode"


def _read_meta(folder: Path) -> dict[str, Any]:
    """One task's `meta.json`, with all of `_KEYS`."""
    file = folder / "meta.json"
    meta = read_json(file)
    missing = [key for key in _KEYS if not isinstance(meta, dict) or key not in meta]
    if missing:
        raise FileError(f"{file}: key {missing[0]!r} is missing")
    if meta["schema_version"] != RAW_SCHEMA:
        raise FileError(f"{file}: schema_version is {meta['schema_version']!r}, this code reads {RAW_SCHEMA}; collect again")
    if not isinstance(meta["provenance"], dict) or not isinstance(meta["provenance"].get("episodes"), list):
        raise FileError(f"{file}: provenance.episodes is missing")
    if not isinstance(meta["instructions"], dict) or not meta["instructions"].get("train"):
        raise FileError(f"{file}: instructions.train is missing or empty")
    return dict(meta)


class MetaworldSource:
    """Episodes task by task, in the order of `only` (or of the folders' names), then by number."""

    def __init__(self, path: Path, only: Sequence[str] | None = None) -> None:
        """See `open_source`."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileError(f"{self.path}: no such directory")
        present = sorted(file.parent.name for file in self.path.glob("*/meta.json"))
        if not present:
            raise FileError(f"{self.path}: no <task>/meta.json in it; run the collect stage first")
        tasks = present if only is None else list(only)
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

    def describe(self) -> SourceDescription:
        """Rate, cameras, instructions and each task's provenance."""
        first = next(iter(self._meta.values()))
        return SourceDescription(
            rate_hz=first["rate_hz"], cameras=first["cameras"],
            instructions={task: meta["instructions"] for task, meta in self._meta.items()},
            provenance={
                "source": "metaworld",
                "tasks": {
                    task: {key: value for key, value in meta["provenance"].items() if key != "episodes"}
                    for task, meta in self._meta.items()
                },
            },
        )  # fmt: skip

    def __len__(self) -> int:
        return sum(len(meta["provenance"]["episodes"]) for meta in self._meta.values())

    def _place(self, index: int) -> tuple[str, int, Path]:
        """Task, number within it and file of an episode."""
        for task, meta in self._meta.items():
            count = len(meta["provenance"]["episodes"])
            if index < count:
                return task, index, self.path / task / f"episode_{index:04d}.npz"
            index -= count
        raise IndexError(index)

    def shape(self, index: int) -> EpisodeShape:
        """Lengths, of the small arrays alone."""
        _, _, file = self._place(index)
        arrays = load(file, ("actions", "annotation_index"), _MISSING)
        annotated = {}
        if "annotation_index" in arrays:
            labelled = len(field(file, arrays, "annotation_index", ("int64",), 1))
            annotated = {"depth": labelled, "segmentation": labelled}
        return EpisodeShape(len(field(file, arrays, "actions", ("float32",), 2)), annotated, stamp=stamp(file))

    def read(self, index: int) -> Episode:
        """One episode with its labels.

        Raises:
            FileError: the archive is missing or damaged, or lacks a field.
            ContractError: the episode breaks the contract.
        """
        task, number, file = self._place(index)
        meta = self._meta[task]
        arrays = load(file, missing=_MISSING)
        annotations = {}
        if "annotation_index" in arrays:
            labelled = field(file, arrays, "annotation_index", ("int64",), 1)
            depth = field(file, arrays, "depth", ("float32", "float16"), 3)
            annotations["depth"] = Annotation(depth.astype(np.float32), labelled)
            annotations["segmentation"] = Annotation(field(file, arrays, "segmentation", ("uint8",), 3), labelled)
        paraphrases = meta["instructions"]["train"]
        episode = Episode(
            task=task,
            instruction=paraphrases[number % len(paraphrases)],
            rate_hz=meta["rate_hz"],
            frames={camera: field(file, arrays, f"frames_{camera}", ("uint8",), 4) for camera in meta["cameras"]},
            annotations=annotations,
            provenance={"file": f"{task}/{file.name}", **meta["provenance"]["episodes"][number]},
            **{
                name: field(file, arrays, name, ("float32",), 2)
                for name in ("actions", "expert_actions", "state", "proprioception")
            },
        )
        try:
            episode.check()
        except ContractError as error:
            raise ContractError(f"{file}: {error}") from None
        return episode


class Options(Frozen):
    """`tasks`: which to read, and in which order; empty means all that are there. The convert stage sets `collect.tasks`."""

    tasks: tuple[str, ...] = ()


def open_source(path: Path, options: Options) -> MetaworldSource:
    """Open the folder that the collect stage filled.

    Raises:
        FileError: the folder, a task or a field of a `meta.json` is missing.
        ContractError: two tasks differ in rate, cameras or image size.
    """
    return MetaworldSource(path, options.tasks or None)
