"""Windows are pure index arithmetic: hand-computed arrays at the edges, and what must hold for all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svam.episodes.windows import action_rows, clip_rows, stride_of, window_starts


def test_a_clip_in_the_middle_at_the_end_and_past_it() -> None:
    assert clip_rows(10, 10, 20, frames=4, stride=3).tolist() == [10, 13, 16, 19]
    assert clip_rows(11, 10, 20, frames=4, stride=3).tolist() == [11, 14, 17, 19]
    assert clip_rows(19, 10, 20, frames=4, stride=3).tolist() == [19, 19, 19, 19]
    assert clip_rows(0, 0, 1, frames=2, stride=1).tolist() == [0, 0]
    assert clip_rows(3, 0, 5, frames=1, stride=7).tolist() == [3]


def test_many_clips_at_once_each_with_its_own_episode() -> None:
    rows = clip_rows([0, 4, 5], [0, 0, 5], [5, 5, 9], frames=3, stride=2)
    assert rows.tolist() == [[0, 2, 4], [4, 4, 4], [5, 7, 8]]
    assert rows.dtype == np.int64


def test_action_chunks_repeat_the_last_action_and_say_so() -> None:
    rows, valid = action_rows(3, 0, 10, chunk=3)
    assert rows.tolist() == [3, 4, 5] and valid.tolist() == [True, True, True]
    rows, valid = action_rows(8, 0, 10, chunk=4)
    assert rows.tolist() == [8, 9, 9, 9] and valid.tolist() == [True, True, False, False]
    rows, valid = action_rows([9, 10], [0, 10], [10, 12], chunk=2)
    assert rows.tolist() == [[9, 9], [10, 11]] and valid.tolist() == [[True, False], [True, True]]


def test_window_starts() -> None:
    assert window_starts(4, 8).tolist() == [4, 5, 6, 7]
    assert window_starts(4, 9, every=2).tolist() == [4, 6, 8]


def test_strides_are_whole_steps() -> None:
    assert stride_of(0.05, 80.0) == 4
    assert stride_of(1 / 30, 30.0) == 1
    assert stride_of(0.1, 29.97) == 3  # 2.997 steps: within 1 %
    with pytest.raises(ValueError, match=r"0\.01 s, less than one step at the data's 80 Hz; use a multiple of 0\.0125 s"):
        stride_of(0.01, 80.0)
    with pytest.raises(ValueError, match=r"0\.03 s, which is 2\.4 steps at the data's 80 Hz.*0\.025 or 0\.0375 s"):
        stride_of(0.03, 80.0)
    with pytest.raises(ValueError, match="less than one step"):
        stride_of(-1.0, 80.0)


@pytest.mark.parametrize("row", [9, 20, -1])
def test_a_row_outside_its_episode_is_refused(row: int) -> None:
    for rows in (lambda: clip_rows(row, 10, 20, frames=2, stride=1), lambda: action_rows([10, row], 10, 20, chunk=2)):
        with pytest.raises(ValueError, match=rf"row {row} is outside its episode's rows 10\.\.19"):
            rows()


@given(st.integers(0, 1000), st.integers(0, 60), st.integers(0, 60), st.integers(1, 20), st.integers(1, 9))
def test_a_clip_never_leaves_its_episode(start: int, before: int, after: int, frames: int, stride: int) -> None:
    rows = clip_rows(start + before, start, end := start + before + after + 1, frames, stride)
    assert rows.tolist() == [min(start + before + t * stride, end - 1) for t in range(frames)]
