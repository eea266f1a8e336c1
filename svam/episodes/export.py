"""What is written out for other software: the episodes of a store, or the rollouts that `evaluate` recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from svam.contract import VECTORS, ContractError, Episode, FrameBlocks
from svam.episodes.store import SPLITS, EpisodeStore
from svam.files import FileError, read_json, stated
from svam.npy import read_arrays

BLOCK = 32
"""Frames of a camera in memory."""


@dataclass(frozen=True)
class Recording:
    """Episodes to be written out, training episodes before held-out ones.

    rate_hz: steps a second. count: how many episodes; the first `trained` of them are training ones. read: one of them, its
    frames block by block; `provenance` has `success` where that is known. dimension_names: of vectors. robot: its name.
    notes: what is left out.
    """

    rate_hz: float
    count: int
    trained: int
    read: Callable[[int], Episode]
    dimension_names: Mapping[str, list[str]] = field(default_factory=dict)
    robot: str | None = None
    notes: list[str] = field(default_factory=list)


def open_recording(path: Path) -> Recording:
    """An episode store, or the folder of results that `evaluate` wrote.

    Raises:
        FileError: it is neither, or damaged, or its rollouts were recorded without actions.
    """
    return _rollouts(path) if (path / "episodes.jsonl").is_file() else _demonstrations(path)


def _demonstrations(path: Path) -> Recording:
    store = EpisodeStore(path)
    order = np.argsort(store.episode_split, kind="stable")
    labels = [name for name in ("depth", "segmentation") if store.annotation(name) is not None]
    notes = [f"{path}: labels ({', '.join(labels)}) are left out"] if labels else []
    if (kept := store.attributes.statistics) is not None and kept.convention.changed:
        notes.append(f"{path}: actions are written as the conversion has changed them, not as the source had them")
    return Recording(
        store.rate_hz, len(order), int((store.episode_split == SPLITS.index("train")).sum()),
        lambda number: _demonstration(store, int(order[number])), store.provenance.get("dimension_names", {}),
        store.provenance.get("robot_type"), notes,
    )  # fmt: skip


def _demonstration(store: EpisodeStore, episode: int) -> Episode:
    start, stop = store.bounds(episode)
    rows = np.arange(start, stop, dtype=np.int64)

    def blocks(camera: str) -> Iterator[NDArray[np.uint8]]:
        for first in range(0, len(rows), BLOCK):
            yield store.frames(rows[first : first + BLOCK], camera)

    shapes = {camera: store.arrays[f"frames/{camera}"].shape[1:3] for camera in store.cameras}
    return Episode(
        task=store.task_of(episode), instruction=store.episode_instructions[episode], rate_hz=store.rate_hz,
        frames={
            camera: FrameBlocks((len(rows), height, width, 3), partial(blocks, camera))
            for camera, (height, width) in shapes.items()
        },
        timestamps=store.timestamps(rows), annotations={}, provenance={"file": f"{store.path} {episode}"},
        **{name: store.vector(name, rows) if store.has(name) else None for name in VECTORS},
    )  # fmt: skip


class _Line(BaseModel):
    """What is needed of a line of `episodes.jsonl`."""

    row: str
    task: str
    index: int
    instruction: str
    success: bool


class _Setting(BaseModel):
    cameras: list[str]


class _Protocol(BaseModel):
    rate_hz: float
    setting: _Setting


class _Results(BaseModel):
    """What is needed of `metrics.json`."""

    metaworld: _Protocol


def _rollouts(path: Path) -> Recording:
    """Those of the protocol `metaworld`, the only one that records actions, in the order of `episodes.jsonl`."""
    results = stated(_Results, read_json(path / "metrics.json"), path / "metrics.json").metaworld
    file = path / "episodes.jsonl"
    lines = [stated(_Line, _parsed(file, text), file) for text in file.read_text(encoding="utf-8").splitlines()]
    folder = path / "rollouts"
    recorded = [line for line in lines if line.row == "policy" and (folder / f"{line.task}_{line.index}").is_dir()]
    if not recorded:
        raise FileError(f"{folder}: holds no rollouts; evaluate with evaluate.videos above 0 and evaluate.record_actions true")
    return Recording(
        results.rate_hz,
        len(recorded),
        len(recorded),
        lambda number: _rollout(folder, recorded[number], results.setting.cameras, results.rate_hz),
    )


def _parsed(file: Path, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise FileError(f"{file}: not valid JSON in every line; truncated or damaged") from None


def _rollout(folder: Path, line: _Line, cameras: list[str], rate_hz: float) -> Episode:
    """Row t is what the policy could see at step t and the action that was executed then; what came after the last action is
    left out."""
    name = f"{line.task}_{line.index}"
    arrays = read_arrays(folder / name)
    for wanted in ("frames", "actions", "proprioception"):
        if wanted not in arrays:
            raise FileError(f"{folder / name}: no {wanted}.npy; evaluate again with evaluate.record_actions true")
    frames, actions = arrays["frames"], np.array(arrays["actions"])
    if len(frames) != len(actions) + 1:
        raise ContractError(f"{folder / name}: {len(frames)} frames and {len(actions)} actions, expected one frame more")
    seen = np.split(frames[:-1], len(cameras), axis=1)  # they lie below one another
    return Episode(
        task=line.task, instruction=line.instruction, rate_hz=rate_hz, frames=dict(zip(cameras, seen, strict=True)),
        actions=actions,
        proprioception=np.array(arrays["proprioception"][:-1]),
        provenance={"file": f"rollouts/{name}", "success": line.success},
    )  # fmt: skip
