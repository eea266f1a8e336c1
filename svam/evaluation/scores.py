"""Success rates with intervals: per task, per difficulty tier, over all episodes (micro) and over tasks (macro)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TIERS: Mapping[str, tuple[str, ...]] = {
    "easy": (
        "button-press", "button-press-topdown", "button-press-topdown-wall", "button-press-wall", "coffee-button", "dial-turn",
        "door-close", "door-lock", "door-open", "door-unlock", "drawer-close", "drawer-open", "faucet-close", "faucet-open",
        "handle-press", "handle-press-side", "handle-pull", "handle-pull-side", "lever-pull", "plate-slide",
        "plate-slide-back", "plate-slide-back-side", "plate-slide-side", "reach", "reach-wall", "window-close",
        "window-open", "peg-unplug-side",
    ),
    "medium": (
        "basketball", "bin-picking", "box-close", "coffee-pull", "coffee-push", "hammer", "peg-insert-side", "push-wall",
        "soccer", "sweep", "sweep-into",
    ),
    "hard": ("assembly", "hand-insert", "pick-out-of-hole", "pick-place", "push", "push-back"),
    "very_hard": ("shelf-place", "disassemble", "stick-pull", "stick-push", "pick-place-wall"),
}  # fmt: skip
"""Difficulty tiers of the 50 MetaWorld tasks (Seo et al. 2022, "Masked World Models", appendix)."""
PUBLISHED_TIERS: Mapping[str, tuple[str, ...]] = {
    "easy": TIERS["easy"],
    "medium": TIERS["medium"],
    "hard": TIERS["hard"] + TIERS["very_hard"],
}
"""The three columns of the published tables, which merge hard and very hard into "hard" (11 tasks)."""
Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution: all intervals hold 95 %."""


def wilson(rate: float, trials: float) -> tuple[float, float]:
    """The 95 % Wilson score interval of a success rate (in [0, 1]) measured in `trials` trials (> 0).

    Unlike the normal approximation it stays inside [0, 1] and has a width even at rates 0 and 1 (Wilson 1927).
    """
    if trials <= 0 or not 0.0 <= rate <= 1.0:
        raise ValueError(f"wilson: rate {rate} and trials {trials}, expected a rate in [0, 1] and a positive number of trials")
    square = Z * Z
    centre = (rate + square / (2.0 * trials)) / (1.0 + square / trials)
    half = Z / (1.0 + square / trials) * math.sqrt(rate * (1.0 - rate) / trials + square / (4.0 * trials * trials))
    # At the ends the exact bound is the end itself; rounding would leave 1e-17.
    return 0.0 if rate == 0.0 else centre - half, 1.0 if rate == 1.0 else centre + half


def rate_of(successes: Sequence[bool]) -> dict[str, Any]:
    """{successes, episodes, success, low, high} of some episodes, all counted alike (`low`, `high`: 95 % Wilson)."""
    count, trials = sum(bool(s) for s in successes), len(successes)
    low, high = wilson(count / trials, trials)
    return {"successes": count, "episodes": trials, "success": count / trials, "low": low, "high": high}


def macro_of(per_task: Iterable[Sequence[bool]]) -> dict[str, Any]:
    """{tasks, success, low, high}: the mean of the tasks' rates, each task counted alike.

    The mean's variance under a common rate is that of n' = t^2 / sum(1 / n_i) episodes (t tasks of n_i episodes), so the
    interval is Wilson's for n' trials; with equally many episodes a task it is the micro average's.
    """
    groups = [list(group) for group in per_task]
    success = sum(sum(map(bool, group)) / len(group) for group in groups) / len(groups)
    low, high = wilson(min(1.0, success), len(groups) ** 2 / sum(1.0 / len(group) for group in groups))
    return {"tasks": len(groups), "success": success, "low": low, "high": high}


def tier_of(task: str) -> str | None:
    """The tier of a MetaWorld task name without its version suffix; None for a task that no tier names."""
    return next((tier for tier, tasks in TIERS.items() if task in tasks), None)


def summary(successes: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    """All averages of one row of the results table.

    Args:
        successes: task -> any-step success of each of its episodes (at least one).

    Returns:
        {"tasks": {task: rate_of}, "tiers": {tier: rate_of}, "published_tiers": {...}, "micro": rate_of, "macro": macro_of};
        a tier none of whose tasks was evaluated is absent.
    """
    if not successes or not all(len(s) for s in successes.values()):
        raise ValueError("success rates: every task needs at least one episode")

    def tiers(table: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
        members = {tier: [s for task in tasks for s in successes.get(task, ())] for tier, tasks in table.items()}
        return {tier: rate_of(group) for tier, group in members.items() if group}

    return {
        "tasks": {task: rate_of(group) for task, group in successes.items()},
        "tiers": tiers(TIERS),
        "published_tiers": tiers(PUBLISHED_TIERS),
        "micro": rate_of([s for group in successes.values() for s in group]),
        "macro": macro_of(successes.values()),
    }
