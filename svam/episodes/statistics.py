"""Per-dimension statistics of long vectors in constant memory: mean, deviation, extremes and exact quantiles.

Values arrive as one block per episode. Sums are taken per block and merged in order (Chan et al. 1983), in float64, so
the result depends on the given episodes only, never on how they lie on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svam.contract import ContractError, VectorStatistics

Blocks = Callable[[], Iterable[NDArray[np.float32]]]
"""Yields the same (n, D) float32 blocks each time it is called."""
QUANTILES = (0.01, 0.99)
_HALF = 1 << 16


def _sortable(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Floats to integers of the same order: the sign bit flipped for positives, all bits for negatives."""
    bits = np.ascontiguousarray(values + np.float32(0)).view(np.uint32)  # + 0 turns -0 into 0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint32)


def _float_of(code: int) -> float:
    """Inverse of `_sortable` for one number."""
    bits = code ^ (1 << 31) if code >> 31 else ~code & 0xFFFFFFFF
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def _order_statistics(blocks: Blocks, high: NDArray[np.int64], ranks: list[int]) -> NDArray[np.float64]:
    """The values at sorted positions `ranks` of every dimension, (len(ranks), D).

    `high` (D, 65536) counts the upper halves of the sortable codes; one more pass counts the lower halves of those
    codes whose upper half a rank falls into, which makes the answer exact.
    """
    cumulative = np.cumsum(high, axis=1)
    bins = np.array([np.searchsorted(counts, ranks, side="right") for counts in cumulative])
    before = np.take_along_axis(cumulative - high, bins, axis=1)
    low = np.zeros((*bins.shape, _HALF), dtype=np.int64)
    for block in blocks():
        codes = _sortable(block)
        for d, r in np.ndindex(bins.shape):
            np.add.at(low[d, r], codes[codes[:, d] >> 16 == bins[d, r], d] & (_HALF - 1), 1)
    found = np.empty((len(ranks), len(high)))
    for d, r in np.ndindex(bins.shape):
        lower = np.searchsorted(np.cumsum(low[d, r]), ranks[r] - before[d, r], side="right")
        found[r, d] = _float_of(int(bins[d, r]) << 16 | int(lower))
    return found


@dataclass(frozen=True)
class Summary:
    """Of `count` rows of D dimensions: mean, std, min, max (D,) float64, and `quantiles` (q, D) in the order asked for."""

    count: int
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    min: NDArray[np.float64]
    max: NDArray[np.float64]
    quantiles: NDArray[np.float64]


def summary(blocks: Blocks, quantiles: Sequence[float]) -> Summary:
    """Statistics of all rows of all blocks; `std` is the population's, quantiles interpolate linearly as `numpy.quantile`.

    `blocks` is called twice. Memory: about a megabyte for each dimension and quantile, whatever the number of rows.

    Raises:
        ContractError: there are no rows, or a value is not finite.
    """
    count, mean, squares, low, high = 0, np.zeros(1), np.zeros(1), np.full(1, np.inf), np.full(1, -np.inf)
    for block in blocks():
        if block.dtype != np.float32 or block.ndim != 2:
            raise ContractError(f"statistics: a block is {block.dtype} {block.shape}, expected float32 (n, dimensions)")
        if not len(block):
            continue
        if not np.isfinite(block).all():
            raise ContractError("statistics: a value is not finite")
        if count == 0:
            histogram = np.zeros((block.shape[1], _HALF), dtype=np.int64)
        values = block.astype(np.float64)
        n, block_mean = len(values), values.mean(axis=0)
        block_squares = np.square(values - block_mean).sum(axis=0)
        delta, total = block_mean - mean, count + n
        mean = mean + delta * (n / total)
        squares = squares + block_squares + np.square(delta) * (count * n / total)
        low, high, count = np.minimum(low, values.min(axis=0)), np.maximum(high, values.max(axis=0)), total
        np.add.at(histogram, (np.arange(len(histogram)), _sortable(block) >> 16), 1)
    if count == 0:
        raise ContractError("statistics: no training episode has a single row")
    positions = [q * (count - 1) for q in quantiles]
    ranks = [rank for p in positions for rank in (int(np.floor(p)), int(np.ceil(p)))]
    ordered = _order_statistics(blocks, histogram, ranks)
    between = [
        below + (above - below) * (p - np.floor(p))
        for below, above, p in zip(ordered[::2], ordered[1::2], positions, strict=True)
    ]
    # The merged mean of a constant dimension may miss it by a rounding; state it exactly.
    constant = low == high
    mean, std = np.where(constant, low, mean), np.where(constant, 0.0, np.sqrt(squares / count))
    return Summary(count, mean, std, low, high, np.stack(between))


def vector_statistics(blocks: Blocks) -> VectorStatistics:
    """`summary` as the store keeps it."""
    found = summary(blocks, QUANTILES)
    q01, q99 = found.quantiles
    return VectorStatistics(
        mean=found.mean.tolist(), std=found.std.tolist(), min=found.min.tolist(), max=found.max.tolist(), q01=q01.tolist(),
        q99=q99.tolist(), count=found.count,
    )  # fmt: skip
