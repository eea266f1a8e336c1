"""Memory for clips: used again when nothing shows it any more, never before."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from svam.episodes import memory
from svam.episodes.memory import page_aligned

SHAPE = (16, 96, 96, 3)


@pytest.fixture(autouse=True)
def _nothing_waits() -> None:
    gc.collect()
    memory._waiting.clear()


def test_it_begins_on_a_page_and_is_used_again() -> None:
    first = page_aligned(SHAPE, np.uint8)
    address = first.ctypes.data
    assert first.shape == SHAPE and first.flags.c_contiguous and first.flags.writeable and address % 4096 == 0
    second = page_aligned(SHAPE, np.float16)
    assert second.ctypes.data != address and second.dtype == np.float16
    del first
    assert page_aligned(SHAPE, np.uint8).ctypes.data == address


@pytest.mark.parametrize("show", [lambda a: a[3:, 1], lambda a: a.view(np.int8).reshape(-1), memoryview, torch.from_numpy])
def test_what_shows_it_keeps_it(show: object) -> None:
    first = page_aligned(SHAPE, np.uint8)
    first[...] = 7
    view = show(first)  # type: ignore[operator]
    del first
    others = [page_aligned(SHAPE, np.uint8) for _ in range(3)]
    for other in others:
        other[...] = 0
    assert (np.asarray(view) == 7).all()


def test_what_waits_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_KEPT_BYTES", 3 << 20)
    for count in (16, 32, 48):  # 0.4 to 1.3 MB
        arrays = [page_aligned((count, 96, 96, 3), np.uint8) for _ in range(4)]
        del arrays
        assert 0 < sum(size * len(rooms) for size, rooms in memory._waiting.items()) <= 3 << 20
    page_aligned((200, 96, 96, 3), np.uint8)  # larger than all that may wait
    assert sum(size * len(rooms) for size, rooms in memory._waiting.items()) <= 3 << 20


def test_small_arrays_are_the_libraries_own() -> None:
    assert page_aligned((4, 4), np.float32).base is None
