"""All randomness derives from one seed and from what it is for."""

from __future__ import annotations

import hashlib

import numpy as np


def seed_of(*parts: object) -> int:
    """A 63-bit seed from what it is for, e.g. `seed_of(params.seed, "collect", task, index, attempt)`."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(*parts: object) -> np.random.Generator:
    return np.random.default_rng(seed_of(*parts))
