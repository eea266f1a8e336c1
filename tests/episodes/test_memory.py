"""Memory for clips: used again when nothing shows it any more, never before."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from svam.episodes import memory
from svam.episodes.memory import page_aligned

SHAPE = (16, 96, 96, 3)


@pytest.mark.parametrize("show", [lambda a: a[3:, 1], lambda a: a.view(np.int8).reshape(-1), memoryview, torch.from_numpy])
def test_what_shows_it_keeps_it(show: object) -> None:
    gc.collect()
    memory._waiting.clear()
    first = page_aligned(SHAPE, np.uint8)
    address = first.ctypes.data
    first[...] = 7
    view = show(first)  # type: ignore[operator]
    del first
    for other in [page_aligned(SHAPE, np.uint8) for _ in range(3)]:
        other[...] = 0
    assert (np.asarray(view) == 7).all()
    del other, view
    assert address in [page_aligned(SHAPE, np.uint8).ctypes.data for _ in range(4)], "it is used again"
