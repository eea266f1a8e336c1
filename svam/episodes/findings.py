"""The pieces of a validation: what a check found, an array's rows in order in spite of damage, and outliers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import VectorStatistics
from svam.episodes.checksums import EpisodeDigest
from svam.episodes.rows import RowReader
from svam.files import FileError

OUTLIER_RANGES = 10.0
"""A value this many times the width of the training rows' 1 %..99 % range beyond that range is an outlier."""
_BLOCK_BYTES = 1 << 22
_TOLD = 4
"""Findings of one check that are written out; the others are counted."""


@dataclass
class Check:
    """One line of the report: `faults` make the store invalid, `warnings` a person should see; `fine` is said otherwise."""

    name: str
    fine: str = ""
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    untold: Counter[str] = field(default_factory=Counter)
    """How many more of both there are, by "faults" and "warnings"."""

    def fault(self, text: str) -> None:
        """Something that must not be."""
        self._add("faults", text)

    def warn(self, text: str) -> None:
        """Something that may be meant."""
        self._add("warnings", text)

    def _add(self, kind: str, text: str) -> None:
        if len(told := getattr(self, kind)) < _TOLD:
            told.append(text)
        else:
            self.untold[kind] += 1

    def count(self, kind: str) -> int:
        """Of "faults" or "warnings", those that are not written out included."""
        return len(getattr(self, kind)) + self.untold[kind]

    def text(self) -> str:
        """All that was found, or what is fine."""
        untold = self.untold.total()
        found = [*self.faults, *self.warnings, *([f"and {untold} more"] if untold else [])]
        return "; ".join(found) or self.fine


class Rows:
    """Rows of one array in order, each chunk decoded once. A damaged chunk is reported once."""

    def __init__(self, name: str, reader: RowReader, damaged: Callable[[str, int, int, FileError], None]) -> None:
        self.name, self._reader, self._damaged = name, reader, damaged
        self._step = max(1, _BLOCK_BYTES // max(1, reader.row_bytes * reader.chunk_rows)) * reader.chunk_rows
        self._first = self._last = 0
        self._block: NDArray[Any] | None = None

    def pieces(self, start: int, end: int, digest: EpisodeDigest) -> Iterator[tuple[int, NDArray[Any]]]:
        """First row and values of consecutive pieces of rows start..end - 1, but for damaged ones; all goes into `digest`."""
        digest.update(self.name, np.zeros((0, *self._reader.shape[1:]), self._reader.dtype))
        at = start
        while at < end:
            if not self._first <= at < self._last:
                self._load(at)
            last = min(end, self._last)
            if self._block is not None:
                block = self._block[at - self._first : last - self._first]
                digest.update(self.name, block)
                yield at, block
            at = last

    def _load(self, row: int) -> None:
        chunk, rows = self._reader.chunk_rows, len(self._reader)
        self._first = row // chunk * chunk
        self._block = None  # the old one makes room before the new one is read
        try:
            self._last = min(rows, self._first + self._step)
            self._block = self._reader.read_range(self._first, self._last)
        except FileError:  # which chunk is it? Go on one by one.
            self._last = min(rows, self._first + chunk)
            try:
                self._block = self._reader.read_range(self._first, self._last)
            except FileError as error:
                self._block = None
                self._damaged(self.name, self._first, self._last, error)


@dataclass
class Outliers:
    """Bounds of each dimension of a vector, and the values found beyond them."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    count: NDArray[np.int64]
    worst: dict[int, tuple[float, float, int]] = field(default_factory=dict)
    """Dimension -> distance beyond the bounds, value, row."""

    @classmethod
    def of(cls, statistics: VectorStatistics) -> Outliers:
        low, high = np.asarray(statistics.q01), np.asarray(statistics.q99)
        # A dimension that hardly ever moves has no range to be outside of.
        width = np.where(high - low > 1e-6 * np.maximum(np.abs(low), np.abs(high)), high - low, np.inf)
        return cls(low - OUTLIER_RANGES * width, high + OUTLIER_RANGES * width, np.zeros(len(low), dtype=np.int64))

    def look(self, first_row: int, values: NDArray[np.float32]) -> None:
        beyond = np.maximum(self.low - values, values - self.high)
        self.count += (beyond > 0).sum(axis=0)
        for d in np.flatnonzero((beyond > 0).any(axis=0)).tolist():
            at = int(np.argmax(beyond[:, d]))
            if beyond[at, d] > self.worst.get(d, (0.0,))[0]:
                self.worst[d] = float(beyond[at, d]), float(values[at, d]), first_row + at
