"""Which episodes are held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from svam.contract import ContractError, EpisodeShape
from svam.seeds import generator


def split_episodes(tasks: Sequence[str], shapes: Sequence[EpisodeShape], held_out: float, seed: int) -> NDArray[np.uint8]:
    """(E,) uint8, 1 for held-out episodes: the source's own split where it holds out some of them, else of each task's
    episodes the share `held_out`, rounded, at least one. A task's only episode is trained on; where that leaves none, all are
    one pool. A single episode, or group, is trained on.
    Where episodes share frames (`EpisodeShape.group`), whole groups are drawn instead, until they are that share of all.

    Which ones are drawn depends on the seed, the task and its number of episodes only; of groups, on the seed and their sizes.

    Raises:
        ContractError: the source's own split holds out all of them.
    """
    split = np.zeros(len(tasks), dtype=np.uint8)
    if len(tasks) == 1:
        return split
    if any(shape.held_out for shape in shapes):
        split[:] = [shape.held_out is True for shape in shapes]
        if split.all():
            raise ContractError(
                f"the source's own split holds out all {len(split)} chosen episodes, which leaves none to train on; choose "
                "training episodes too, by convert.episodes and convert.drop, or by convert.options where they name the split"
            )
        return split
    if any(shape.group for shape in shapes):
        return _split_groups([shape.group or str(number) for number, shape in enumerate(shapes)], held_out, seed)
    groups = {task: np.flatnonzero([name == task for name in tasks]) for task in dict.fromkeys(tasks)}
    if max(map(len, groups.values())) == 1:
        groups = {"": np.arange(len(tasks))}
    for task, members in groups.items():
        if len(members) > 1:
            count = min(max(1, round(held_out * len(members))), len(members) - 1)
            split[generator(seed, "split", task).permutation(members)[:count]] = 1
    return split


def _split_groups(groups: Sequence[str], held_out: float, seed: int) -> NDArray[np.uint8]:
    """As `split_episodes`: whole groups, in an order that is drawn, as many as fit into the share; or the smallest one."""
    names, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < 2:
        return np.zeros(len(groups), dtype=np.uint8)
    left, chosen = min(round(held_out * len(groups)), len(groups) - 1), []
    for number in generator(seed, "split").permutation(len(names)):
        if sizes[number] <= left:
            chosen.append(number)
            left -= sizes[number]
    return np.isin(group, chosen or [int(np.argmin(sizes))]).astype(np.uint8)
