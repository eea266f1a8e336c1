"""Readers of what distillation learns from: the generated windows, and one teacher's view of them.

`generated.zarr` is written by `svam.training.generate`, `teachers/<branch>.zarr` by `svam.training.cache_teacher`. Both hold
W windows, training ones first, with `held_out` (W,) and the ground truth's store `rows` (W, T); arrays of held-out windows
only have Wh rows, in the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from svam.console import track
from svam.contract import ContractError
from svam.episodes.arrays import read_attributes
from svam.episodes.rows import RowReader
from svam.files import FileError

TEACHER_SCHEMA = 1
"""Version of the teacher cache's layout; written into it and checked when it is opened."""
IN_MEMORY_BYTES = 1 << 30
"""Arrays up to this size are held in memory, larger ones are read window by window (a chunk is a window)."""


class Rows(Protocol):
    """Anything that returns rows by number: an array on disk, in memory, or computed when asked for."""

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """(k, ...) in the order asked for."""
        ...


class InMemory:
    """Rows of an array in memory."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """(k, ...) copies."""
        return self.values[rows]


def in_memory_if_small(
    rows: Rows, count: int, row_bytes: int, what: str, limit: int = IN_MEMORY_BYTES, block: int = 16
) -> Rows:
    """All `count` rows in memory where they fit in `limit` bytes, else `rows` itself."""
    if count * row_bytes > limit:
        return rows
    starts = range(0, count, block)
    values: NDArray[Any] | None = None
    for start in track(starts, what, len(starts)):
        part = rows.read(np.arange(start, min(start + block, count), dtype=np.int64))
        values = np.empty((count, *part.shape[1:]), dtype=part.dtype) if values is None else values
        values[start : start + len(part)] = part
    return rows if values is None else InMemory(values)


class WindowGroup:
    """What both stores have in common.

    Attributes: `rows` (W, T) int64, `held_out` (W,) bool, `attributes`, and `train`, `test`: window numbers by side.
    """

    def __init__(self, path: Path, stage: str) -> None:
        """Raises `FileError` if the store or a shard of it is missing, truncated or damaged."""
        self.path, self.stage = Path(path), stage
        self.attributes: dict[str, Any] = read_attributes(self.path)
        rows, held_out = self.array("rows"), self.array("held_out")
        self.rows: NDArray[np.int64] = rows.read_range(0, len(rows)).astype(np.int64)
        self.held_out = held_out.read_range(0, len(held_out)).astype(bool)
        if self.rows.ndim != 2 or self.held_out.shape != self.rows.shape[:1]:
            raise ContractError(
                f"{self.path}: rows {self.rows.shape} and held_out {self.held_out.shape} must be (W, T) and (W,); "
                f"run {stage} again"
            )
        self.train, self.test = np.flatnonzero(~self.held_out), np.flatnonzero(self.held_out)
        for side, numbers in (("training", self.train), ("held-out", self.test)):
            if not len(numbers):
                raise ContractError(f"{self.path}: no {side} window; run {stage} again")

    def __len__(self) -> int:
        """W."""
        return len(self.rows)

    @property
    def frames_per_clip(self) -> int:
        """T."""
        return int(self.rows.shape[1])

    def array(self, name: str, rows: int | None = None) -> RowReader:
        """One array, its shards checked.

        Raises:
            FileError: it is missing, truncated or damaged, or does not have the `rows` rows expected.
        """
        reader = RowReader(self.path / name)
        reader.check()
        if rows is not None and len(reader) != rows:
            raise FileError(f"{self.path}: {name} has {len(reader)} rows, expected {rows}; run {self.stage} again")
        return reader


class GeneratedWindows(WindowGroup):
    """`generated.zarr`: `frames` V^ (W, T, H, W', 3), `reconstruction` (W, H, W', 3), `one_step_frames` and
    `other_noise_frames` (Wh, T, H, W', 3), all uint8; `features` F (W, T, h, w, C_F) float16, or None where not kept."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "generate")
        self.frames = self.array("frames", len(self))
        self.reconstruction = self.array("reconstruction", len(self))
        self.one_step_frames = self.array("one_step_frames", len(self.test))
        self.other_noise_frames = self.array("other_noise_frames", len(self.test))
        self.features = self.array("features", len(self)) if (self.path / "features").exists() else None
        if "sampler" not in self.attributes:
            raise FileError(f"{self.path}: attribute sampler is missing; run generate again")

    @property
    def grid(self) -> int:
        """h = w of the features."""
        return int(self.attributes["sampler"]["grid"])


class TeacherWindows(WindowGroup):
    """`teachers/<branch>.zarr`: `targets` (W, T, h, w, C_i) and `reference` (W, h, w, C_i) float16; `moved` (W, T, h, w) bool,
    stored as uint8; of held-out windows `one_step` and `other_noise` (Wh, T, h, w, C_i) float16."""

    def __init__(self, path: Path, generated: GeneratedWindows) -> None:
        """Raises `FileError` also if the cache is of another schema or was made from other windows than `generated`."""
        super().__init__(path, "cache_teacher")
        version = self.attributes.get("schema_version")
        if version != TEACHER_SCHEMA:
            raise FileError(
                f"{self.path}: schema_version is {version!r}, this code reads {TEACHER_SCHEMA}; run cache_teacher again"
            )
        same = np.array_equal(self.rows, generated.rows) and np.array_equal(self.held_out, generated.held_out)
        if not same or self.attributes.get("video_sha256") != generated.attributes.get("video_sha256"):
            raise FileError(f"{self.path}: made from other windows than {generated.path} holds; run cache_teacher again")
        self.targets = self.array("targets", len(self))
        self.reference = self.array("reference", len(self))
        self.moved = self.array("moved", len(self))
        self.one_step = self.array("one_step", len(self.test))
        self.other_noise = self.array("other_noise", len(self.test))

    def expect(self, **attributes: str) -> None:
        """Raise `FileError` unless the cache was made with these `branch`, `target`, ..."""
        for name, expected in attributes.items():
            value = self.attributes.get(name)
            if value != expected:
                raise FileError(f"{self.path}: {name} is {value!r}, expected {expected!r}; run cache_teacher again")

    @property
    def channels(self) -> int:
        """C_i."""
        return int(self.targets.shape[-1])
