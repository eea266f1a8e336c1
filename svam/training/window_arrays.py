"""How `generate` and `cache_teacher` write arrays of windows: announced first, in batches, one window a chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.console import console
from svam.episodes.arrays import ArrayWriter, GroupWriter

SHARD_BYTES = 32 << 20
"""About what one shard takes: it bounds the writer's memory whatever the width of the features."""


@dataclass(frozen=True)
class WindowArray:
    """An array to be written: `rows` windows of `shape`. mantissa_bits: what floats are rounded to; None keeps them all."""

    rows: int
    shape: tuple[int, ...]
    dtype: type[np.generic]
    mantissa_bits: int | None = None

    @property
    def row_bytes(self) -> int:
        """Uncompressed bytes of one window."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def announce(stage: str, arrays: Mapping[str, WindowArray]) -> None:
    """Say how much is about to be written, before it is."""
    parts = ", ".join(f"{name} {array.rows} x {array.row_bytes / 1e6:.3f} MB" for name, array in arrays.items())
    total = sum(array.rows * array.row_bytes for array in arrays.values())
    console.print(
        f"{stage}: {total / 1e9:.3f} GB before compression ({parts}); until the run is done, as much again in .ckpt",
        highlight=False,
    )


def open_arrays(writer: GroupWriter, arrays: Mapping[str, WindowArray]) -> dict[str, ArrayWriter]:
    """The arrays by name, a chunk for each window, since training draws windows at random."""
    return {
        name: writer.array(
            name, a.shape, a.dtype, chunk_rows=1, shard_rows=max(1, min(1024, SHARD_BYTES // a.row_bytes)),
            mantissa_bits=a.mantissa_bits,
        )
        for name, a in arrays.items()
    }  # fmt: skip


def batches(held_out: NDArray[np.bool_], size: int) -> list[NDArray[np.int64]]:
    """Window numbers in order, in batches that do not mix the two sides of the split (training windows come first)."""
    sides = [np.flatnonzero(~held_out), np.flatnonzero(held_out)]
    return [side[i : i + size] for side in sides for i in range(0, len(side), size)]


def to_stored(values: Any) -> NDArray[np.float16]:
    """A tensor of features as the arrays hold it but for the rounding: float16 on the CPU. So what an unfinished run keeps is
    no larger than what it writes."""
    array: NDArray[np.float16] = values.half().cpu().numpy()
    return array
