"""The latents of all frames, as `encode` wrote them, and the clips of one side of the split that are drawn from them.

An array mapped to memory: what is drawn is read, and nothing grows with the length of the data but the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svam.episodes.store import EpisodeStore, Split
from svam.episodes.windows import clip_rows
from svam.files import FileError, sha256_tree
from svam.models.autoencoder import Autoencoder
from svam.npy import read_arrays
from svam.training.blocks import read_attributes, stem_of


@dataclass(frozen=True)
class LatentsOfCameras:
    """(V N, c, h', w') float16 of V foresight cameras, by the numbers of pictures. arrays: (N, c, h', w') of each."""

    arrays: list[NDArray[np.float16]]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.arrays[0]
        return (len(self.arrays) * len(first), *first.shape[1:])

    def __getitem__(self, pictures: NDArray[np.int64], /) -> NDArray[np.float16]:
        """(..., c, h', w') of pictures (...)."""
        cameras, rows = np.divmod(pictures, len(self.arrays[0]))
        latents = np.empty((*pictures.shape, *self.shape[1:]), dtype=np.float16)
        for k in np.unique(cameras):
            latents[cameras == k] = self.arrays[k][rows[cameras == k]]
        return latents


Latents: TypeAlias = NDArray[np.float16] | LatentsOfCameras
"""Of all pictures of a store, by their numbers; the array itself where there is one foresight camera."""


def open_latents(folder: Path, store: EpisodeStore, autoencoder: Autoencoder, autoencoder_folder: Path) -> Latents:
    """Latents of the store's foresight cameras, mapped to memory.

    Raises:
        FileError: there are none, or they are of another store or another autoencoder.
    """
    attributes, found = read_attributes(folder, "encode"), read_arrays(folder)
    height, width = store.image_size
    factor, arrays = autoencoder.factor, list[NDArray[np.float16]]()
    expected = (len(store), autoencoder.latent_channels, height // factor, width // factor)
    for camera in store.foreseen:
        latents, file = found.get(stem_of(camera)), folder / f"{stem_of(camera)}.npy"
        if latents is None:
            raise FileError(f"{file}: no such file, but {store.path} has foresight camera {camera}; run the stage encode again")
        if latents.shape != expected or latents.dtype != np.float16:
            raise FileError(
                f"{file}: {latents.dtype} {latents.shape}, but {store.path} has latents float16 {expected}; run the stage "
                "encode again"
            )
        arrays.append(latents)
    if attributes.get("autoencoder_sha256") != sha256_tree(autoencoder_folder):
        raise FileError(f"{file}: made by another autoencoder than {autoencoder_folder}; run the stage encode again")
    return arrays[0] if len(arrays) == 1 else LatentsOfCameras(arrays)


class Clips:
    """Clips of one side of the split; a clip's place is that of its observed frame among the `pictures` of that side, which are
    not listed: what is kept grows with the episodes, not with their rows."""

    def __init__(self, store: EpisodeStore, split: Split, frames: int, stride: int) -> None:
        self.frames, self.stride = frames, stride
        self.episodes = np.tile(store.episodes(split), len(store.foreseen))
        bounds = np.array([store.bounds(int(e)) for e in store.episodes(split)], dtype=np.int64).reshape(-1, 2)
        self._start, self._end = np.concatenate([bounds + k * len(store) for k in range(len(store.foreseen))]).T
        self._places_end = np.cumsum(self._end - self._start)
        self._cameras, (self._rows, self._draws) = len(store.foreseen), np.array(store.shares(split), dtype=np.int64).T

    def __len__(self) -> int:
        return int(self._places_end[-1])

    @property
    def draws(self) -> int:
        """How many clips training draws from: each place once, or several sets by their weights."""
        return int(self._draws.sum())

    def drawn(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of numbers below `draws`."""
        ends = np.cumsum(self._draws)
        part = np.searchsorted(ends, numbers, side="right")
        rows, count = self._rows[part], self._draws[part]
        camera, row = np.divmod((numbers - ends[part] + count) * (rows * self._cameras) // count, rows)
        places: NDArray[np.int64] = camera * self._rows.sum() + (np.cumsum(self._rows) - self._rows)[part] + row
        return places

    def episode_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B,) the store's numbers of the episodes that clips are of."""
        return self.episodes[self._number(places)]

    def clip_rows(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B, T) the numbers of the clips' pictures."""
        number = self._number(places)
        observed = self._end[number] - (self._places_end[number] - places)
        return clip_rows(observed, self._start[number], self._end[number], self.frames, self.stride)

    def _number(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._places_end, places, side="right")


class LatentClips(Clips):
    """The same, with the latents of what they show."""

    def __init__(self, store: EpisodeStore, split: Split, latents: Latents, frames: int, stride: int) -> None:
        super().__init__(store, split, frames, stride)
        self.latents = latents

    def clips(self, places: NDArray[np.int64]) -> Tensor:
        """(B, T, c, h', w') float32."""
        return torch.from_numpy(self.latents[self.clip_rows(places)]).float()
