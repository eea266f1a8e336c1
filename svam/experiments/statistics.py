"""Paired statistics of two policies that were evaluated on the same goals.

They speak of the policies that were trained, on goals drawn as these were. They say nothing of other training seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from svam.experiments.records import Record
from svam.files import FileError
from svam.seeds import generator

RESAMPLES = 10_000
LEVEL = 0.05
Pairs = Mapping[str, NDArray[np.int64]]
"""Task -> (N, 2) of the goals that both were evaluated on: did the variant succeed, did the reference (1 or 0)."""


def paired(variant: Record, reference: Record) -> Pairs:
    """Their outcomes on the goals of the shorter evaluation, all of which the other must have.

    Raises:
        FileError: the runs had different budgets or data, or their goals are not the same.
    """
    names = f"{variant.name} and {reference.name} cannot be compared"
    for key, other in reference.budget.items():
        if (value := variant.budget.get(key)) != other:
            raise FileError(f"{names}: {key} is {value} and {other}, expected equal budgets; run both with the same params")
    ours, theirs = ({(e.task, e.index, e.seed): e.success for e in record.episodes} for record in (variant, reference))
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) < min(len(ours), len(theirs)):
        raise FileError(f"{names}: expected the goals of one to be among the other's; run both with the same params")
    tasks = sorted({goal[0] for goal in shared})
    return {task: np.array([(ours[goal], theirs[goal]) for goal in shared if goal[0] == task], np.int64) for task in tasks}


def only_one(pairs: Pairs) -> tuple[int, int]:
    """How many goals only the variant reached, and only the reference."""
    goals = np.concatenate(list(pairs.values()))
    return int((goals[:, 0] > goals[:, 1]).sum()), int((goals[:, 0] < goals[:, 1]).sum())


def mcnemar(one: int, other: int) -> float:
    """McNemar's exact two-sided p-value: how probable so uneven a split of the goals that only one of two reached is (or a
    less probable one), were both equally good."""
    return float(binomtest(one, one + other).pvalue) if one + other else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): below a level only if the chance of any false finding is."""
    order = np.argsort(values, kind="stable")
    scaled = np.minimum(1.0, np.asarray(values)[order] * np.arange(len(values), 0, -1))
    corrected = np.empty(len(values))
    corrected[order] = np.maximum.accumulate(scaled)
    return corrected.tolist()


def difference(seeds: Sequence[Pairs]) -> tuple[float, float, float]:
    """Success rate of the variant minus that of the reference, mean of some training seeds on the same goals, and its 95 %
    percentile interval: resamples the goals within each task, each with the outcomes of all seeds."""
    random = generator("comparison bootstrap", 0)
    sums, count, total = np.zeros(RESAMPLES), 0, 0.0
    for task in sorted(seeds[0]):
        differences = np.mean([pairs[task][:, 0] - pairs[task][:, 1] for pairs in seeds], axis=0)
        sums += differences[random.integers(len(differences), size=(RESAMPLES, len(differences)))].sum(axis=1)
        count, total = count + len(differences), total + differences.sum()
    low, high = np.quantile(sums / count, (0.025, 0.975))
    return float(total / count), float(low), float(high)
