"""Which examples the n-th batch holds: a function of seed and n, so that a resumed training goes on with the data it would have
seen, and batches can be drawn in any order."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from svam.seeds import generator

ROUNDS = 6
"""Of the Feistel network; four are enough to look random."""
DRAWN = 4096
"""Numbers that are drawn together, at most: numpy takes hardly longer for as many than for the few of one batch."""


class EndlessOrder:
    """Numbers 0..count - 1 in random order, each once, then all again in a new order, and so on; cut into batches.

    An order is never held: a Feistel network permutes the numbers of the least power of four that is not below `count`, and is
    applied again to what falls outside ("cycle walking"; Black and Rogaway 2002). So memory does not grow with the data.
    """

    def __init__(self, count: int, size: int, *key: object) -> None:
        """`key`: what seeds the orders."""
        self.count, self.size, self.key = count, size, key
        self._bits = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))  # of each half of a number
        self._together = max(1, min(DRAWN, count) // size)  # batches
        self._drawn = lru_cache(maxsize=1)(self._draw)

    def batch(self, number: int) -> NDArray[np.int64]:
        """(size,) int64, sorted: batch `number` from 0 on. A batch that spans two rounds may hold a number twice."""
        block, row = divmod(number, self._together)
        return np.sort(self._drawn(block)[row])

    def _draw(self, block: int) -> NDArray[np.int64]:
        """(batches drawn together, size) int64, each batch in the order of the draw."""
        numbers = self._together * self.size
        places = block * numbers + np.arange(numbers, dtype=np.int64)
        rounds = places // self.count
        parts = [self._permuted(places[rounds == r] % self.count, int(r)) for r in np.unique(rounds)]
        return np.concatenate(parts).reshape(self._together, self.size)

    def _permuted(self, places: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        """The numbers at `places` of the order of round `number`."""
        keys = generator(*self.key, number).integers(0, 2**64, ROUNDS, dtype=np.uint64)
        values, outside = places.astype(np.uint64), np.ones(len(places), dtype=bool)
        while outside.any():
            values[outside] = self._feistel(values[outside], keys)
            outside = values >= self.count
        return values.astype(np.int64)

    def _feistel(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        mask = (np.uint64(1) << self._bits) - np.uint64(1)
        left, right = values >> self._bits, values & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        return np.asarray(left << self._bits | right)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every bit depends on every bit."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
