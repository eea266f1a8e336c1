"""Per-dimension statistics of long vectors in constant memory: mean, deviation, extremes and exact quantiles.

Values arrive as one block per episode. Sums are taken per block and merged in order (Chan et al. 1983), in float64, so
the result depends on the given episodes only, never on how they lie on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

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
    dimensions = len(high)
    cumulative = np.cumsum(high, axis=1)
    bins = np.stack([[int(np.searchsorted(cumulative[d], rank, side="right")) for rank in ranks] for d in range(dimensions)])
    low = np.zeros((dimensions, len(ranks), _HALF), dtype=np.int64)
    for block in blocks():
        codes = _sortable(block)
        for d in range(dimensions):
            for r in range(len(ranks)):
                matching = codes[:, d][(codes[:, d] >> 16) == bins[d, r]]
                np.add.at(low[d, r], matching & (_HALF - 1), 1)
    found = np.empty((len(ranks), dimensions))
    for d in range(dimensions):
        for r, rank in enumerate(ranks):
            before = int(cumulative[d, bins[d, r]] - high[d, bins[d, r]])
            lower = int(np.searchsorted(np.cumsum(low[d, r]), rank - before, side="right"))
            found[r, d] = _float_of(int(bins[d, r]) << 16 | lower)
    return found


def vector_statistics(blocks: Blocks) -> VectorStatistics:
    """Statistics of all rows of all blocks; `std` is the population's, quantiles interpolate linearly as `numpy.quantile`.

    `blocks` is called twice. Memory: a few hundred kilobytes per dimension, whatever the number of rows.

    Raises:
        ContractError: there are no rows, or a value is not finite.
    """
    count, mean, squares = 0, np.zeros(0), np.zeros(0)
    low, high_end, histogram = np.zeros(0), np.zeros(0), np.zeros((0, _HALF), dtype=np.int64)
    for block in blocks():
        if block.dtype != np.float32 or block.ndim != 2:
            raise ContractError(f"statistics: a block is {block.dtype} {block.shape}, expected float32 (n, dimensions)")
        if not len(block):
            continue
        if not np.isfinite(block).all():
            raise ContractError("statistics: a value is not finite")
        values = block.astype(np.float64)
        n, block_mean = len(values), values.mean(axis=0)
        block_squares = np.square(values - block_mean).sum(axis=0)
        if count == 0:
            mean, squares, low, high_end = block_mean, block_squares, values.min(axis=0), values.max(axis=0)
            histogram = np.zeros((block.shape[1], _HALF), dtype=np.int64)
        else:
            delta, total = block_mean - mean, count + n
            mean = mean + delta * (n / total)
            squares = squares + block_squares + np.square(delta) * (count * n / total)
            low, high_end = np.minimum(low, values.min(axis=0)), np.maximum(high_end, values.max(axis=0))
        count += n
        codes = _sortable(block) >> 16
        for d in range(block.shape[1]):
            np.add.at(histogram[d], codes[:, d], 1)
    if count == 0:
        raise ContractError("statistics: no training episode has a single row")
    positions = [q * (count - 1) for q in QUANTILES]
    ranks = [rank for p in positions for rank in (int(np.floor(p)), int(np.ceil(p)))]
    ordered = _order_statistics(blocks, histogram, ranks)
    quantiles = [
        ordered[2 * i] + (ordered[2 * i + 1] - ordered[2 * i]) * (position - np.floor(position))
        for i, position in enumerate(positions)
    ]
    # The merged mean of a constant dimension may miss it by a rounding; state it exactly.
    constant = low == high_end
    return VectorStatistics(
        mean=np.where(constant, low, mean).tolist(),
        std=np.where(constant, 0.0, np.sqrt(squares / count)).tolist(),
        min=low.tolist(), max=high_end.tolist(),
        q01=quantiles[0].tolist(), q99=quantiles[1].tolist(), count=count,
    )  # fmt: skip
