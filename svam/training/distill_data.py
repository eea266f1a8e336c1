"""Readers of what distillation learns from: the generated windows, and one teacher's view of them.

`data/generated` is written by `svam.training.generate`, `data/teachers/<branch>` by `svam.training.cache_teacher`: folders of
`.npy` files, mapped to memory, and `attributes.json`. Both hold W windows, training ones first, with `held_out` (W,) and the
ground truth's `rows` (W, T), as the store numbers pictures; arrays of held-out windows only have Wh rows, in the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from svam.contract import ContractError
from svam.episodes.store import EpisodeStore
from svam.files import FileError
from svam.npy import read_arrays
from svam.training.blocks import read_attributes


class Rows(Protocol):
    """Anything that returns rows by number: an array mapped to memory, or computed when asked for."""

    def __getitem__(self, numbers: NDArray[np.int64], /) -> NDArray[Any]:
        """(k, ...) in the order asked for."""
        ...


class WindowGroup:
    """What both stores have in common.

    Attributes: `rows` (W, T) int64, `held_out` (W,) bool, `attributes`, and `train`, `test`: window numbers by side.
    """

    def __init__(self, path: Path, stage: str) -> None:
        """Raises `FileError` if the folder or an array in it is missing or truncated."""
        self.path, self.stage = Path(path), stage
        self.attributes = read_attributes(self.path, stage)
        self._arrays = read_arrays(self.path)
        self.rows: NDArray[np.int64] = np.array(self.array("rows"))
        self.held_out: NDArray[np.bool_] = np.array(self.array("held_out"))
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

    def array(self, name: str, rows: int | None = None) -> NDArray[Any]:
        """One array.

        Raises:
            FileError: it is missing, or does not have the `rows` rows expected.
        """
        if name not in self._arrays:
            raise FileError(f"{self.path}: no {name}.npy in it; run {self.stage} again")
        array = self._arrays[name]
        if rows is not None and len(array) != rows:
            raise FileError(f"{self.path}: {name} has {len(array)} rows, expected {rows}; run {self.stage} again")
        return array


def annotated_frames(rows: NDArray[np.int64], labelled: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places (n, 2) of (window, frame) in `rows` (k, T) whose store row is among `labelled` (increasing), never the observed
    frame; a window that runs past its episode repeats the last row, which counts once."""
    if not len(labelled):
        return np.empty((0, 2), dtype=np.int64)
    places = np.searchsorted(labelled, rows).clip(max=len(labelled) - 1)
    known = labelled[places] == rows
    known[:, 0] = False
    known[:, 1:] &= rows[:, 1:] != rows[:, :-1]
    return np.argwhere(known).astype(np.int64)


def recorded(store: EpisodeStore, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Recorded frames (k, T, H, W, 3) of pictures (k, T), by their numbers in the store."""
    flat = store.frames(rows.reshape(-1))
    return flat.reshape(*rows.shape, *flat.shape[1:])


class GeneratedWindows(WindowGroup):
    """`data/generated`: `frames` V^ (W, T, H, W', 3), `reconstruction` (W, H, W', 3), `one_step_frames` and
    `other_noise_frames` (Wh, T, H, W', 3), all uint8; `latents` (W, c, h', w') float16 of the observed frame; `features` F
    (W, T, h, w, C_F) float16, or None where not kept."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "generate")
        self.frames = self.array("frames", len(self))
        self.reconstruction = self.array("reconstruction", len(self))
        self.latents = self.array("latents", len(self))
        self.one_step_frames = self.array("one_step_frames", len(self.test))
        self.other_noise_frames = self.array("other_noise_frames", len(self.test))
        self.features = self.array("features", len(self)) if "features" in self._arrays else None
        if "sampler" not in self.attributes:
            raise FileError(f"{self.path}: attribute sampler is missing; run generate again")

    @property
    def grid(self) -> int:
        """h = w of the features."""
        return int(self.attributes["sampler"]["grid"])


class TeacherWindows(WindowGroup):
    """`data/teachers/<branch>`: `targets` (W, T, h, w, C_i) and `reference` (W, h, w, C_i) float16; `moved` (W, T, h, w) bool;
    of held-out windows `one_step` and `other_noise` (Wh, T, h, w, C_i) float16."""

    def __init__(self, path: Path, generated: GeneratedWindows) -> None:
        """Raises `FileError` also if the cache was made from other windows than `generated`."""
        super().__init__(path, "cache_teacher")
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
