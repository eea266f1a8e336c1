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
    for key, value in variant.budget:
        other = getattr(reference.budget, key)
        if value != other:
            raise FileError(f"{names}: {key} is {value} and {other}, expected equal budgets; run both with the same params")
    ours, theirs = ({(e.task, e.index): e for e in record.episodes} for record in (variant, reference))
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) < min(len(ours), len(theirs)) or any(ours[goal].seed != theirs[goal].seed for goal in shared):
        raise FileError(f"{names}: expected the goals of one to be among the other's; run both with the same params")
    outcomes: dict[str, list[tuple[bool, bool]]] = {}
    for goal in shared:
        outcomes.setdefault(goal[0], []).append((ours[goal].success, theirs[goal].success))
    return {task: np.array(pairs, np.int64) for task, pairs in outcomes.items()}


def difference(pairs: Pairs) -> float:
    """Success rate of the variant minus that of the reference."""
    return float(np.mean(np.concatenate([goals[:, 0] - goals[:, 1] for goals in pairs.values()])))


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
    corrected, least = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        least = max(least, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = least
    return corrected


def bootstrap(seeds: Sequence[Pairs]) -> tuple[float, float]:
    """The 95 % percentile interval of the mean difference of some training seeds, evaluated on the same goals: resamples the
    goals within each task, each with the outcomes of all seeds."""
    random = generator("comparison bootstrap", 0)
    sums, count = np.zeros(RESAMPLES), 0
    for task in sorted(seeds[0]):
        differences = np.mean([pairs[task][:, 0] - pairs[task][:, 1] for pairs in seeds], axis=0)
        drawn = random.integers(len(differences), size=(RESAMPLES, len(differences)))
        sums += differences[drawn].sum(axis=1)
        count += len(differences)
    low, high = np.quantile(sums / count, (0.025, 0.975))
    return float(low), float(high)
