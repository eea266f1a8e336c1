"""Tiny recorded episodes for the tests: in memory, and as the folder that the collect stage writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from svam.contract import Annotation, Episode, EpisodeShape, SourceDescription
from svam.files import sha256
from svam.params import Convert
from svam.simulation.collect import RAW_SCHEMA, write_episode
from tests.toy import committed

CAMERAS = ["front", "wrist"]
SETTINGS = Convert.model_validate(
    committed("convert", held_out=0.25, chunk_frames=4, shard_megabytes=16 * 192 / 2**20)  # four chunks of frames to a shard
)


def make_episode(task: str, steps: int, seed: int, size: int = 8) -> Episode:
    """Random pictures and vectors; every third frame has depth and segmentation."""
    rng = np.random.default_rng(seed)
    index = np.arange(0, steps, 3, dtype=np.int64)
    return Episode(
        task=task, instruction=f"{task} please, number {seed}", rate_hz=20.0,
        frames={camera: rng.integers(0, 256, (steps, size, size, 3), dtype=np.uint8) for camera in CAMERAS},
        actions=rng.uniform(-1, 1, (steps, 3)).astype(np.float32),
        expert_actions=rng.uniform(-1, 1, (steps, 3)).astype(np.float32),
        proprioception=rng.normal(size=(steps, 2)).astype(np.float32),
        annotations={
            "depth": Annotation(rng.uniform(0.5, 2, (len(index), size, size)).astype(np.float32), index),
            "segmentation": Annotation(rng.integers(0, 7, (len(index), size, size), dtype=np.uint8), index),
        },
        provenance={"file": f"{task}/{seed}"},
    )  # fmt: skip


class Recorded:
    """An `EpisodeSource` of the episodes it is given."""

    notes: Sequence[str] = ()

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self.episodes = list(episodes)

    def describe(self) -> SourceDescription:
        tasks = dict.fromkeys(episode.task for episode in self.episodes)
        return SourceDescription(
            rate_hz=20.0, cameras=CAMERAS, provenance={"source": "test"},
            instructions={task: {"train": [f"{task} a", f"{task} b"], "held_out": [f"{task} c"]} for task in tasks},
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.episodes)

    def shape(self, index: int) -> EpisodeShape:
        episode = self.episodes[index]
        return EpisodeShape(episode.steps, {name: len(labels.index) for name, labels in episode.annotations.items()})

    def read(self, index: int) -> Episode:
        return self.episodes[index]

    def changed(self, number: int, **fields: Any) -> Recorded:
        """The same source with fields of one episode replaced."""
        episodes = list(self.episodes)
        episodes[number] = dataclasses.replace(episodes[number], **fields)
        return Recorded(episodes)


def two_tasks() -> Recorded:
    """Four episodes of `push`, five of `pull`; 9 to 33 steps, so that chunks and shards end inside episodes."""
    return Recorded([make_episode(task, 9 + 3 * k, k) for k, task in enumerate(["push"] * 4 + ["pull"] * 5)])


def write_raw(path: Path, tasks: Sequence[str], episodes: int = 4, size: int = 8) -> None:
    """`<path>/<task>/...` as the collect stage writes them, with random content."""
    for t, task in enumerate(tasks):
        folder = path / task
        folder.mkdir(parents=True)
        files: list[str] = []
        for e in range(episodes):
            rng = np.random.default_rng([t, e])
            n = 10 + e
            index = np.arange(0, n, 4, dtype=np.int64)
            state = rng.normal(size=(n, 39)).astype(np.float32)
            files += write_episode(folder, e, {
                "frames_corner2": rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8),
                "state": state, "proprioception": state[:, :4],
                "actions": rng.uniform(-1, 1, (n, 4)).astype(np.float32),
                "expert_actions": rng.uniform(-1, 1, (n, 4)).astype(np.float32),
                "depth": rng.uniform(0.5, 2, (len(index), size, size)).astype(np.float32),
                "segmentation": rng.integers(0, 7, (len(index), size, size), dtype=np.uint8),
                "annotation_index": index, "goal": np.zeros(3, np.float32), "draw": np.zeros(6, np.float32),
                "success": np.ones(n, bool),
            })  # fmt: skip
        meta = {
            "schema_version": RAW_SCHEMA, "task": task, "rate_hz": 80.0, "cameras": ["corner2"], "image_size": size,
            "instructions": {"train": [f"{task} the thing", f"do {task}"], "held_out": [f"please {task}"]},
            "provenance": {"source": "test", "episodes": [{"attempt": 0, "noisy": e % 2 == 1} for e in range(episodes)]},
            "sha256": {file: sha256(folder / file) for file in files},
        }  # fmt: skip
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
