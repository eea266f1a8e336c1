"""Checksums of episodes: of the values alone, whatever the chunks, shards or blocks they travel in."""

from __future__ import annotations

import hashlib
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

_LARGE_ROW = 1024


class EpisodeDigest:
    """SHA-256 of one episode's arrays, fed in row order, in blocks of any length; of pictures, whose bytes would take a tenth
    of a conversion's time, that of each row's CRC-32C.

    Names are those of the store: `frames/<camera>`, the vectors, `timestamps`, `annotations/<name>/values` and
    `annotations/<name>/index` (frame numbers within the episode). The order among arrays does not matter.
    """

    def __init__(self) -> None:
        self._of: dict[str, Any] = {}

    def update(self, name: str, block: NDArray[Any]) -> None:
        """Add rows (k, ...) of the array `name`."""
        if name not in self._of:
            self._of[name] = hashlib.sha256(f"{np.dtype(block.dtype).str} {block.shape[1:]}".encode())
        rows = np.ascontiguousarray(block)
        if block.size and rows[0].nbytes >= _LARGE_ROW:
            rows = np.array([google_crc32c.value(row) for row in rows.reshape(len(rows), -1).view(np.uint8)], dtype="<u4")
        self._of[name].update(rows.data)

    def digest(self, only: str = "", but: str | None = None) -> bytes:
        """32 bytes, of all arrays; or of those whose names begin with `only`, and not with `but`."""
        whole = hashlib.sha256()
        for name in sorted(name for name in self._of if name.startswith(only) and not (but and name.startswith(but))):
            whole.update(f"{name}\0{self._of[name].hexdigest()}\n".encode())
        return whole.digest()
