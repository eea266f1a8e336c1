"""Paired statistics of two policies that were evaluated on the same goals.

Those of single runs speak of the policies that were trained, on goals drawn as these were, and say nothing of other training
seeds; `hierarchical` speaks of training seeds, tasks and goals like these, and of pipelines where there are several.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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


def reached(runs: Iterable[Pairs]) -> tuple[int, int, int]:
    """Goals of all runs that the variant reached, that the reference reached, and how many there were."""
    outcomes = np.concatenate([goals for pairs in runs for goals in pairs.values()])
    return int(outcomes[:, 0].sum()), int(outcomes[:, 1].sum()), len(outcomes)


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


def difference(pairs: Pairs) -> tuple[float, float, float]:
    """Success rate of the variant minus that of the reference, of one run of each, and its 95 % percentile interval: resamples
    the goals within each task."""
    random = generator("comparison bootstrap", 0)
    sums, count, total = np.zeros(RESAMPLES), 0, 0.0
    for task in sorted(pairs):
        differences = pairs[task][:, 0] - pairs[task][:, 1]
        sums += differences[random.integers(len(differences), size=(RESAMPLES, len(differences)))].sum(axis=1)
        count, total = count + len(differences), total + differences.sum()
    return float(total / count), *interval(sums / count)


def interval(resampled: NDArray[np.float64]) -> tuple[float, float]:
    """The ends between which 95 % of resampled values lie."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(low), float(high)


def hierarchical(seeds: Sequence[Pairs], pipelines: Sequence[int | None] = ()) -> tuple[float, NDArray[np.float64]]:
    """Success rate of the variant minus that of the reference, mean over tasks of the mean over training seeds and goals, and
    (RESAMPLES,) bootstrap values of it: pipelines, training seeds of each drawn one, and tasks are drawn with replacement, and
    goals anew for each drawn task and pipeline. Where pipelines have tasks of their own, each draws among these.

    A drawn goal counts with the outcomes of all drawn seeds of its pipeline, since all of them met it. Tasks and goals are
    drawn alike wherever their numbers are alike, so that values of two comparisons on the same goals may be subtracted.

    Args:
        seeds: the outcomes of each training seed, on the tasks of its pipeline. pipelines: of which pipeline each of them is,
            with goals of its own; empty: all are of one.

    Raises:
        FileError: a pipeline has fewer tasks than another.
    """
    labels = list(pipelines) or [None] * len(seeds)
    members = [[pairs for pairs, of in zip(seeds, labels, strict=True) if of == name] for name in dict.fromkeys(labels)]
    sizes, tasks = np.asarray([len(several) for several in members]), [sorted(several[0]) for several in members]
    if len({len(own) for own in tasks}) > 1:
        raise FileError(f"pipelines of {' and '.join(str(len(own)) for own in tasks)} tasks: expected as many in each")
    counts = np.asarray([[len(several[0][task]) for task in own] for several, own in zip(members, tasks, strict=True)])
    number, crossed = counts.shape[1], all(own == tasks[0] for own in tasks)
    # (pipeline, seed, task, goal), zeros past a pipeline's last seed and a task's last goal
    won = np.zeros((len(members), sizes.max(), number, counts.max()))
    for p, several in enumerate(members):
        for s, pairs in enumerate(several):
            for t, task in enumerate(tasks[p]):
                won[p, s, t, : counts[p, t]] = pairs[task][:, 0] - pairs[task][:, 1]
    which = generator("hierarchical bootstrap", "pipelines").integers(len(members), size=(len(members), RESAMPLES))
    of_goals = [generator("hierarchical bootstrap", "goals", *([draw] if draw else [])) for draw in range(len(members))]
    by_seed = np.zeros((len(members), RESAMPLES, sizes.max()))  # of each drawn pipeline
    for _ in range(number):
        for draw, random in enumerate(of_goals):
            if draw == 0 or not crossed:  # tasks that all pipelines have are drawn for all of them
                chosen = random.integers(number, size=RESAMPLES)
            goals = counts[which[draw], chosen][:, None]
            goal = (random.random((RESAMPLES, counts.max())) * goals).astype(np.int64)
            real = np.arange(counts.max()) < goals
            outcomes = won[which[draw][:, None], :, chosen[:, None], goal] * real[..., None]
            by_seed[draw] += outcomes.sum(axis=1) / goals / number
    of_seeds, values = generator("hierarchical bootstrap", "seeds"), np.zeros(RESAMPLES)
    for draw, pipeline in enumerate(which):
        size = sizes[pipeline][:, None]
        chosen = of_seeds.integers(size, size=(RESAMPLES, sizes.max()))
        counted = np.take_along_axis(by_seed[draw], chosen, axis=1) * (np.arange(sizes.max()) < size)
        values += counted.sum(axis=1) / size[:, 0] / len(members)
    means = [(won[p, :size].sum(axis=2) / counts[p]).mean() for p, size in enumerate(sizes)]
    return float(np.mean(means)), values


def two_sided(resampled: NDArray[np.float64]) -> float:
    """p of "no difference" by bootstrap values of the difference: twice the smaller share beyond 0, never 0."""
    tail = min(int((resampled <= 0.0).sum()), int((resampled >= 0.0).sum()))
    return min(1.0, 2.0 * (tail + 1) / (len(resampled) + 1))
