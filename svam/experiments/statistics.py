"""Paired statistics of two policies that were evaluated on the same goals.

They speak of the policies that were trained, on goals drawn as these were. They say nothing of other training seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from svam.experiments.records import Episode, Record
from svam.files import FileError
from svam.seeds import generator

RESAMPLES = 10_000
LEVEL = 0.05


@dataclass(frozen=True)
class Pairs:
    """Outcomes on shared goals, by task: task -> [(variant's success, reference's success), ...]."""

    tasks: dict[str, list[tuple[bool, bool]]]

    @property
    def all(self) -> list[tuple[bool, bool]]:
        """Of all tasks."""
        return [pair for pairs in self.tasks.values() for pair in pairs]

    @property
    def difference(self) -> float:
        """Success rate of the variant minus that of the reference, on the shared goals."""
        return sum(int(a) - int(b) for a, b in self.all) / len(self.all)

    @property
    def only_variant(self) -> int:
        """Goals that only the variant reached."""
        return sum(a and not b for a, b in self.all)

    @property
    def only_reference(self) -> int:
        """Goals that only the reference reached."""
        return sum(b and not a for a, b in self.all)


def paired(variant: Record, reference: Record) -> Pairs:
    """Their outcomes on the goals of the shorter evaluation, all of which the other must have.

    Raises:
        FileError: the runs had different budgets or data, or their goals are not the same.
    """
    ours, theirs = variant.budget.model_dump(), reference.budget.model_dump()
    for key, value in ours.items():
        if value != theirs[key]:
            raise FileError(
                f"{variant.name} and {reference.name} are not to be compared: {key} is {value} and {theirs[key]}, "
                "expected equal budgets; run both again with the same params"
            )
    pairs = pairs_of(variant.episodes, reference.episodes)
    if pairs is None:
        raise FileError(
            f"{variant.name} and {reference.name} are not to be compared: they were evaluated on different goals, "
            "expected the goals of one to be among the other's; run both again with the same params"
        )
    return pairs


def pairs_of(ours: Sequence[Episode], theirs: Sequence[Episode]) -> Pairs | None:
    """Outcomes on the goals of the shorter evaluation; None where not all of them are among the other's."""
    found, known = ({(e.task, e.index): e for e in episodes} for episodes in (ours, theirs))
    shared = sorted(found.keys() & known.keys())
    if len(shared) < min(len(found), len(known)) or any(found[goal].seed != known[goal].seed for goal in shared):
        return None
    tasks: dict[str, list[tuple[bool, bool]]] = {}
    for task, index in shared:
        tasks.setdefault(task, []).append((found[task, index].success, known[task, index].success))
    return Pairs(tasks)


def mcnemar(only_one: int, only_other: int) -> float:
    """McNemar's exact two-sided p-value: how probable so uneven a split of the goals that only one of two reached is (or a
    less probable one), were both equally good."""
    return float(binomtest(only_one, only_one + only_other).pvalue) if only_one + only_other else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): below a level only if the chance of any false finding is."""
    corrected, least = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        least = max(least, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = least
    return corrected


def bootstrap(pairs: Sequence[Pairs], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the difference, resampling goals within each task.

    With the pairs of several training seeds on the same goals, a goal is drawn with all of its pairs, and the interval is of
    the mean difference of these seeds.
    """
    random = generator("comparison bootstrap", seed)
    sums, count = np.zeros(RESAMPLES), 0
    for task in sorted(pairs[0].tasks):
        differences = np.mean([[int(a) - int(b) for a, b in p.tasks[task]] for p in pairs], axis=0)
        drawn = random.integers(len(differences), size=(RESAMPLES, len(differences)))
        sums += differences[drawn].sum(axis=1)
        count += len(differences)
    low, high = np.quantile(sums / count, (0.025, 0.975))
    return float(low), float(high)
