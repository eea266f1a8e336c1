"""How much data a run has: measured in a store, or estimated from the params before there is one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svam.agreement import frame_size
from svam.contract import EpisodeShape
from svam.episodes.instructions import instructions_of
from svam.episodes.joined import open_store
from svam.episodes.split import split_episodes
from svam.errors import ParamsError
from svam.params import Params
from svam.simulation.metaworld import ACTION_DIMENSIONS
from svam.training.prepare_backbones.text import training_sentences

STEPS = 84
"""Of a demonstration until its success: the mean over MetaWorld's fifty tasks, four of each; tasks differ from 28 to 174."""


@dataclass(frozen=True)
class Data:
    """What the data decides. lengths (E,) steps and held_out (E,) bool, by episode; tasks: E names. size: (H, W) pixels.
    sentences: that a text encoder is trained on, where they are known. stored: bytes of the store, None for an estimate."""

    lengths: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    tasks: list[str]
    size: tuple[int, int]
    actions: int
    proprioception: int | None
    sentences: list[str] | None
    stored: int | None

    def rows(self, held_out: bool) -> int:
        return int(self.lengths[self.held_out == held_out].sum())

    def observations(self, held_out: bool, stride: int, episodes_per_task: int | None) -> int:
        """Every `stride`-th step of each episode, as `train_policy` takes them."""
        seen: dict[str, int] = {}
        count = 0
        for length, side, task in zip(self.lengths.tolist(), self.held_out.tolist(), self.tasks, strict=True):
            if side == held_out:
                seen[task] = seen.get(task, 0) + 1
                count += -(-length // stride) if episodes_per_task is None or seen[task] <= episodes_per_task else 0
        return count


def measured(path: Path) -> Data:
    """The data of the store at `path`; raises as `open_store`."""
    store = open_store(path)
    files = (file for file in path.rglob("*") if file.is_file())
    tasks = [store.task_of(episode) for episode in range(len(store.episode_ends))]
    sentences = [said for task in store.tasks for said in training_sentences(store, task)]
    return Data(
        np.diff(store.episode_ends, prepend=0), store.episode_split == 1, tasks, store.image_size, store.action_dimensions,
        store.proprioception_dimensions, sentences, sum(file.stat().st_size for file in files),
    )  # fmt: skip


def estimated(params: Params, rows: int | None, actions: int | None, proprioception: int | None = None) -> Data:
    """The data that `collect` would record, or `rows` time steps of other data with so many dimensions of actions and of
    proprioception.

    Raises:
        ParamsError: the params do not say how much data there is, or the size of its frames.
    """
    if params.convert.sets:
        raise ParamsError("convert.sets: only the stores say how much data there is: run dvc repro convert first")
    size, collected = frame_size(params), params.convert.source == "metaworld"
    if size is None or (not collected and (rows is None or actions is None)):
        raise ParamsError(
            f"convert.source is {params.convert.source!r} and there is no store of it to measure: pass --rows and --actions, "
            "and set convert.image_size; or run dvc repro convert first"
        )
    if not collected and params.train_policy.proprioception and proprioception is None:
        raise ParamsError(
            "train_policy.proprioception is true, but there is no store that says its dimensions: pass "
            "--proprioception, or run dvc repro convert first"
        )
    if not collected:
        held = round(params.convert.held_out * (rows or 0))
        lengths, split = np.array([(rows or 0) - held, held]), np.array([False, True])
        return Data(lengths, split, ["", ""], size, actions or 0, proprioception, None, None)
    tasks = [task for task in params.collect.tasks for _ in range(params.collect.episodes_for(task))]
    steps = STEPS + params.collect.tail
    split = split_episodes(tasks, [EpisodeShape(steps, task=t) for t in tasks], params.convert.held_out, params.seed) == 1
    sentences = [said for task in params.collect.tasks for said in instructions_of(task)["train"]]
    return Data(np.full(len(tasks), steps), split, tasks, size, ACTION_DIMENSIONS, 4, sentences, None)
