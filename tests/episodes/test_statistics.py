"""Statistics against hand-computed numbers and numpy, and their independence of how the rows are cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from svam.contract import ContractError, VectorStatistics
from svam.episodes.statistics import vector_statistics


def of(*blocks: NDArray[np.float32]) -> VectorStatistics:
    return vector_statistics(lambda: iter(blocks))


def test_hand_computed() -> None:
    first = np.array([[0.0, 5.0], [2.0, 5.0]], dtype=np.float32)
    second = np.array([[4.0, 5.0]], dtype=np.float32)
    found = of(first, second)
    assert found.count == 3
    assert found.mean == [2.0, 5.0]
    assert found.std == pytest.approx([np.sqrt(8 / 3), 0.0])
    assert (found.min, found.max) == ([0.0, 5.0], [4.0, 5.0])
    assert found.q01 == pytest.approx([0.04, 5.0])  # positions 0.02 and 1.98 of 0..2
    assert found.q99 == pytest.approx([3.96, 5.0])


def test_a_constant_dimension_is_exactly_constant() -> None:
    found = of(*(np.full((n, 1), 0.1, dtype=np.float32) for n in (3, 7, 11)))
    assert found.mean == found.min == found.max == found.q01 == found.q99 and found.std == [0.0]


@settings(deadline=None, max_examples=40)
@given(
    arrays(np.float32, st.tuples(st.integers(1, 300), st.integers(1, 3)), elements=st.floats(-1e4, 1e4, width=32)),
    st.lists(st.integers(0, 300), max_size=4),
)
def test_any_cut_equals_numpy_on_the_whole(values: NDArray[np.float32], cuts: list[int]) -> None:
    found = of(*np.split(values, sorted(cuts)))
    wide = values.astype(np.float64)
    assert found.count == len(values)
    np.testing.assert_allclose(found.mean, wide.mean(axis=0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.std, wide.std(axis=0), rtol=1e-7, atol=1e-9)
    np.testing.assert_array_equal(found.min, wide.min(axis=0))
    np.testing.assert_array_equal(found.max, wide.max(axis=0))
    np.testing.assert_allclose([found.q01, found.q99], np.quantile(wide, (0.01, 0.99), axis=0), rtol=1e-12, atol=1e-12)


def test_what_cannot_be_summarised_is_refused() -> None:
    with pytest.raises(ContractError, match="no training episode"):
        of()
    with pytest.raises(ContractError, match="not finite"):
        of(np.array([[np.nan]], dtype=np.float32))
    with pytest.raises(ContractError, match=r"float64 \(2,\)"):
        of(np.zeros(2))  # type: ignore[arg-type]
