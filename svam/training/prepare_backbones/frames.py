"""Which frames the frozen backbones train on, and how they reach memory."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svam.episodes.store import EpisodeStore

MEMORY = 2**30
"""Bytes of training frames held at once; larger data sets are sampled evenly."""


def frames_that_fit(store: EpisodeStore, rows: NDArray[np.int64], memory: int = MEMORY) -> NDArray[np.int64]:
    """`rows`, or pictures' numbers, or an evenly spaced part of them whose frames take at most `memory` bytes."""
    height, width = store.image_size
    most = max(1, memory // (height * width * 3))
    return evenly(rows, most)


def evenly(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]


def load_frames(store: EpisodeStore, rows: NDArray[np.int64]) -> Tensor:
    """Frames by the pictures' numbers, (k, H, W, 3) uint8 on the CPU."""
    return torch.from_numpy(store.frames(rows))
