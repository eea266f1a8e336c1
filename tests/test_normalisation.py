"""Normalisation there and back, and its safe corners."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from pydantic import ValidationError

from svam.contract import ActionConvention, ContractError, Statistics, VectorStatistics
from svam.episodes.statistics import vector_statistics
from svam.normalisation import denormalise_actions, normalise_actions, normalise_proprioception

NORMALISATIONS = ("minmax", "quantile", "meanstd")


def statistics_of(actions: NDArray[np.float32], normalisation: str, binary: list[int] | None = None) -> Statistics:
    vectors = vector_statistics(lambda: [actions])
    convention = ActionConvention.model_validate(
        {"dimensions": actions.shape[1], "normalisation": normalisation, "binary_dimensions": binary or []}
    )
    return Statistics(convention=convention, actions=vectors, proprioception=vectors)


def test_hand_computed() -> None:
    actions = np.array([[0.0, 10.0], [4.0, 30.0]], dtype=np.float32)
    minmax = statistics_of(actions, "minmax")
    assert normalise_actions(minmax, actions).tolist() == [[-1, -1], [1, 1]]
    assert denormalise_actions(minmax, np.array([[0.5, -2.0]], dtype=np.float32)).tolist() == [[3.0, 10.0]]  # clipped
    meanstd = statistics_of(actions, "meanstd")
    assert normalise_actions(meanstd, actions).tolist() == [[-1, -1], [1, 1]]
    assert denormalise_actions(meanstd, np.array([[0.5, -2.0]], dtype=np.float32)).tolist() == [[3.0, 0.0]]  # not clipped
    quantile = statistics_of(actions, "quantile")  # 1 % and 99 %: 0.04..3.96
    assert normalise_actions(quantile, actions)[1, 0] == pytest.approx(2 / 1.96)
    assert denormalise_actions(quantile, np.array([5.0, 0.0], dtype=np.float32)).tolist() == pytest.approx([3.96, 20.0])


@settings(deadline=None, max_examples=60)
@given(
    arrays(np.float32, st.tuples(st.integers(1, 40), st.just(3)), elements=st.floats(-100, 100, width=32)),
    st.sampled_from(NORMALISATIONS),
)
def test_there_and_back(actions: NDArray[np.float32], normalisation: str) -> None:
    statistics = statistics_of(actions, normalisation)
    back = denormalise_actions(statistics, normalise_actions(statistics, actions))
    expected = actions
    if normalisation == "quantile":  # outliers are clipped to the quantiles, unless these coincide
        low, high = np.array(statistics.actions.q01), np.array(statistics.actions.q99)
        expected = np.where((high - low) / 2 < 1e-6, actions, np.clip(actions, low, high))
    np.testing.assert_allclose(back, expected, rtol=1e-5, atol=1e-4)
    assert back.dtype == np.float32 and np.isfinite(back).all()


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_a_constant_dimension_stays_constant_whatever_the_policy_says(normalisation: str) -> None:
    actions = np.array([[0.1, 0.0], [0.1, 1.0], [0.1, 0.5]], dtype=np.float32)
    statistics = statistics_of(actions, normalisation)
    assert normalise_actions(statistics, actions)[:, 0].tolist() == [0, 0, 0]
    asked = np.array([[-3.0, 0.0], [0.7, 0.0]], dtype=np.float32)
    assert (denormalise_actions(statistics, asked)[:, 0] == np.float32(0.1)).all()


def test_a_rare_movement_survives_quantiles() -> None:
    actions = np.zeros((1000, 1), dtype=np.float32)
    actions[500] = 1.0  # both quantiles are 0
    statistics = statistics_of(actions, "quantile")
    np.testing.assert_array_equal(denormalise_actions(statistics, normalise_actions(statistics, actions)), actions)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_binary_dimensions_snap(normalisation: str) -> None:
    actions = np.array([[-1.0, 2.0], [1.0, 3.0], [1.0, 4.0]], dtype=np.float32)
    statistics = statistics_of(actions, normalisation, binary=[0])
    assert normalise_actions(statistics, actions)[:, 0].tolist() == [-1, 1, 1]
    noisy = np.array([[-0.2, 0.0], [0.1, 0.0]], dtype=np.float32)
    assert denormalise_actions(statistics, noisy)[:, 0].tolist() == [-1, 1]
    # Seen in one position only: still an actuator of two positions.
    one = statistics_of(np.ones((3, 1), dtype=np.float32), normalisation, binary=[0])
    assert denormalise_actions(one, np.array([[-0.9]], dtype=np.float32)).tolist() == [[-1]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dimension", [0, 1])
def test_what_is_not_finite_is_not_hidden_by_a_clip_or_a_snap(value: float, dimension: int) -> None:
    statistics = statistics_of(np.array([[-1.0, 2.0], [1.0, 3.0]], dtype=np.float32), "minmax", binary=[0])
    asked = np.zeros((2, 4, 2), dtype=np.float32)
    asked[1, 3, dimension] = value
    with pytest.raises(ContractError, match=rf"normalised actions: {value} at \(1, 3, {dimension}\)"):
        denormalise_actions(statistics, asked)


def test_proprioception() -> None:
    values = np.array([[1.0, 5.0], [3.0, 5.0]], dtype=np.float32)
    statistics = statistics_of(values, "minmax")
    assert normalise_proprioception(statistics, values).tolist() == [[-1, 0], [1, 0]]
    with pytest.raises(ContractError, match="the data set has none"):
        normalise_proprioception(statistics.model_copy(update={"proprioception": None}), values)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"outside 0\.\.1"):
        ActionConvention(dimensions=2, binary_dimensions=[2], normalisation="minmax")
    with pytest.raises(ValidationError, match="different lengths"):
        VectorStatistics(mean=[0.0], std=[1.0], min=[0.0], max=[0.0], q01=[0.0], q99=[0.0, 1.0], count=1)
