"""Success rates with intervals: per task, per difficulty tier, over all episodes (micro) and over tasks (macro)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import binomtest

from svam.files import read_yaml

TIERS: Mapping[str, list[str]] = read_yaml(Path(__file__).with_suffix(".yaml"))
"""Difficulty tiers of the 50 MetaWorld tasks (Seo et al. 2022, "Masked World Models", appendix)."""
PUBLISHED_TIERS = {"easy": TIERS["easy"], "medium": TIERS["medium"], "hard": TIERS["hard"] + TIERS["very_hard"]}
"""The three columns of the tables of VPP and S-VAM, which merge hard and very hard into "hard" (11 tasks) and end in the mean
over tasks. LeRobot's evaluation ends in the mean over the four `TIERS` instead, in which a very hard task counts 28 / 5 times
as much as an easy one."""


def rate_of(successes: Sequence[bool]) -> dict[str, Any]:
    """{successes, episodes, success, low, high} of some episodes (at least one), all counted alike.

    low, high: the 95 % Wilson score interval, which stays inside [0, 1] and has a width even at rates 0 and 1 (Wilson 1927).
    """
    count, trials = sum(bool(s) for s in successes), len(successes)
    interval = binomtest(count, trials).proportion_ci(0.95, method="wilson")
    return {
        "successes": count, "episodes": trials, "success": count / trials, "low": float(interval.low),
        "high": float(interval.high),
    }  # fmt: skip


def tier_of(task: str) -> str | None:
    """The tier of a MetaWorld task name without its version suffix; None for a task that no tier names."""
    return next((tier for tier, tasks in TIERS.items() if task in tasks), None)


def summary(successes: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    """All averages of one row of the results table.

    Args:
        successes: task -> any-step success of each of its episodes, equally many of each task.

    Returns:
        {"tasks": {task: rate_of}, "tiers": {tier: rate_of}, "published_tiers": {...}, "micro": rate_of, "macro": {tasks,
        success, low, high}, "mean_of_tiers": {tiers, success}}; a tier none of whose tasks was evaluated is absent; without any
        the last is None. macro is the mean of the tasks' rates: of equally many episodes each, the rate of all together.

    Raises:
        ValueError: the tasks have different numbers of episodes, or none.
    """
    counts = {len(group) for group in successes.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"success rates: tasks of {sorted(counts)} episodes, expected equally many of each, at least one")

    def tiers(table: Mapping[str, list[str]]) -> dict[str, Any]:
        members = {tier: [s for task in tasks for s in successes.get(task, ())] for tier, tasks in table.items()}
        return {tier: rate_of(group) for tier, group in members.items() if group}

    four, micro = tiers(TIERS), rate_of([s for group in successes.values() for s in group])
    return {
        "tasks": {task: rate_of(group) for task, group in successes.items()},
        "tiers": four,
        "published_tiers": tiers(PUBLISHED_TIERS),
        "micro": micro,
        "macro": {"tasks": len(successes), **{key: micro[key] for key in ("success", "low", "high")}},
        "mean_of_tiers": {"tiers": len(four), "success": fmean(rate["success"] for rate in four.values())} if four else None,
    }
