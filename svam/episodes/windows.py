"""Which rows of the flat time axis a window consists of. Pure index arithmetic: no data, no state.

An episode is the half-open row range [start, end). All functions take one window or an array of them: a `row` (and,
where it varies, `start` and `end`) may be an integer or an int64 array of shape (...), which then leads the result's shape.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from svam.errors import ParamsError


def stride_of(seconds: float, rate_hz: float) -> int:
    """The whole number of steps that last `seconds` at `rate_hz`.

    Raises:
        ValueError: that is less than one step, or further than 1 % of a step from a whole number.
    """
    steps = seconds * rate_hz
    if not math.isfinite(steps) or steps < 0.99:
        raise ParamsError(
            f"stride_seconds is {seconds:g} s, less than one step at the data's {rate_hz:g} Hz; "
            f"use a multiple of {1 / rate_hz:g} s"
        )
    whole = round(steps)
    if abs(steps - whole) > 0.01:
        near = sorted({max(1, math.floor(steps)), math.ceil(steps)})
        raise ParamsError(
            f"stride_seconds is {seconds:g} s, which is {steps:g} steps at the data's {rate_hz:g} Hz; "
            f"use a whole number of steps, for example {' or '.join(f'{n / rate_hz:g}' for n in near)} s"
        )
    return whole


def _checked(row: ArrayLike, start: ArrayLike, end: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`row` and `end` as int64 of one shape, with `start` <= `row` < `end` established."""
    rows, starts, ends = np.broadcast_arrays(
        np.asarray(row, dtype=np.int64), np.asarray(start, dtype=np.int64), np.asarray(end, dtype=np.int64)
    )
    outside = np.flatnonzero((rows < starts) | (rows >= ends))
    if len(outside):
        i = int(outside[0])
        raise ValueError(f"row {rows.flat[i]} is outside its episode's rows {starts.flat[i]}..{ends.flat[i] - 1}")
    return rows, ends


def clip_rows(row: ArrayLike, start: ArrayLike, end: ArrayLike, frames: int, stride: int) -> NDArray[np.int64]:
    """Rows (..., frames) of a clip: the observed `row`, `row + stride`, ...; past the episode's end its last row is repeated.
    `ValueError` where `row` is outside the episode."""
    rows, ends = _checked(row, start, end)
    clip: NDArray[np.int64] = np.minimum(rows[..., None] + np.arange(frames, dtype=np.int64) * stride, ends[..., None] - 1)
    return clip


def action_rows(row: ArrayLike, start: ArrayLike, end: ArrayLike, chunk: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Rows (..., chunk) of the actions executed from `row` on, and which of them the episode really has.

    Past the end the last action's row is repeated and marked False. `ValueError` where `row` is outside the episode.
    """
    rows, ends = _checked(row, start, end)
    wanted = rows[..., None] + np.arange(chunk, dtype=np.int64)
    return np.minimum(wanted, ends[..., None] - 1), wanted < ends[..., None]


def window_starts(start: int, end: int, every: int = 1) -> NDArray[np.int64]:
    """First rows of an episode's windows, which may run past its end (and are clamped): `start`, `start + every`, ..."""
    return np.arange(start, end, every, dtype=np.int64)
