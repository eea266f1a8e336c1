"""Averages and intervals by hand-computed numbers, and the protocols' checks."""

from __future__ import annotations

import pytest

from svam.simulation.scores import PUBLISHED_TIERS, TIERS, macro_of, rate_of, summary, tier_of, wilson


def test_wilson_against_published_values() -> None:
    # 8 of 10: 0.4902 to 0.9433 (Brown, Cai & DasGupta 2001's formula, computed by hand); 0 of 25 and 25 of 25 mirror.
    assert wilson(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    low, high = wilson(0.0, 25)
    assert low == 0.0 and high == pytest.approx(3.841459 / (25 + 3.841459), abs=1e-6)
    assert wilson(1.0, 25) == pytest.approx((1.0 - high, 1.0), abs=1e-12)


def test_tiers_partition_the_fifty_tasks() -> None:
    from svam.simulation.metaworld import task_names

    assert [len(TIERS[t]) for t in ("easy", "medium", "hard", "very_hard")] == [28, 11, 6, 5]
    assert sorted(t for tasks in TIERS.values() for t in tasks) == task_names()
    assert [len(tasks) for tasks in PUBLISHED_TIERS.values()] == [28, 11, 11]
    assert tier_of("reach") == "easy" and tier_of("stick-pull") == "very_hard" and tier_of("somewhere") is None


def test_micro_weighs_episodes_and_macro_weighs_tasks() -> None:
    found = summary({"reach": [True, False], "push": [True] * 6, "shelf-place": [False] * 2})
    assert found["micro"]["success"] == 0.7 and found["micro"]["episodes"] == 10
    assert found["macro"]["success"] == pytest.approx(0.5) and found["macro"]["tasks"] == 3
    assert set(found["tiers"]) == {"easy", "hard", "very_hard"}
    assert found["published_tiers"]["hard"] == rate_of([True] * 6 + [False] * 2)
    assert found["tasks"]["reach"]["success"] == 0.5
    # Equally many episodes: the two averages and their intervals are the same.
    even = summary({"reach": [True, False], "push": [True, True]})
    assert (even["macro"]["low"], even["macro"]["high"]) == pytest.approx((even["micro"]["low"], even["micro"]["high"]))
    # 3^2 / (1/2 + 1/6 + 1/2) = 7.714... episodes carry the macro mean of the uneven case.
    assert (found["macro"]["low"], found["macro"]["high"]) == pytest.approx(wilson(0.5, 54 / 7))


def test_no_episodes_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one episode"):
        summary({"reach": []})
    with pytest.raises(ZeroDivisionError):
        macro_of([])
