"""Which examples the n-th batch holds: a function of seed and n, so that a resumed training goes on with the data it would have
seen, and batches can be drawn in any order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from svam.seeds import generator


class EndlessOrder:
    """Numbers 0..count - 1 in random order, each once, then all again in a new order, and so on; cut into batches."""

    def __init__(self, count: int, size: int, *key: object) -> None:
        """`key`: what seeds the orders."""
        self.count, self.size, self.key = count, size, key
        self._orders: dict[int, NDArray[np.int64]] = {}

    def batch(self, number: int) -> NDArray[np.int64]:
        """(size,) int64, sorted: batch `number` from 0 on. A batch that spans two rounds may hold a number twice."""
        places = number * self.size + np.arange(self.size, dtype=np.int64)
        rounds = places // self.count
        needed = range(int(rounds[0]), int(rounds[-1]) + 1)
        self._orders = {r: self._orders[r] if r in self._orders else self._order(r) for r in needed}
        return np.sort(np.concatenate([self._orders[r][places[rounds == r] % self.count] for r in needed]))

    def _order(self, number: int) -> NDArray[np.int64]:
        return generator(*self.key, number).permutation(self.count).astype(np.int64)
