"""The latents of all frames, as `encode` wrote them, and the clips of one side of the split that are drawn from them.

An array mapped to memory: what is drawn is read, and nothing grows with the length of the data but the file.
"""

from __future__ import annotations

from pathlib import Path

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


def open_latents(folder: Path, store: EpisodeStore, autoencoder: Autoencoder, autoencoder_folder: Path) -> NDArray[np.float16]:
    """Latents (N, c, h', w') float16 of the store's foresight camera, mapped to memory.

    Raises:
        FileError: there are none, or they are of another store or another autoencoder.
    """
    attributes, camera = read_attributes(folder, "encode"), store.cameras[0]
    latents = read_arrays(folder).get(stem_of(camera))
    height, width = store.image_size
    factor, file = autoencoder.factor, folder / f"{stem_of(camera)}.npy"
    expected = (len(store), autoencoder.latent_channels, height // factor, width // factor)
    if latents is None:
        raise FileError(f"{file}: no such file, but {camera} is the first camera of {store.path}; run the stage encode again")
    if latents.shape != expected or latents.dtype != np.float16:
        raise FileError(
            f"{file}: {latents.dtype} {latents.shape}, but {store.path} has latents float16 {expected}; run the stage encode "
            "again"
        )
    if attributes.get("autoencoder_sha256") != sha256_tree(autoencoder_folder):
        raise FileError(f"{file}: made by another autoencoder than {autoencoder_folder}; run the stage encode again")
    return latents


class LatentClips:
    """Clips of one side of the split; a clip's place is that of its observed frame among all frames of that side."""

    def __init__(self, store: EpisodeStore, split: Split, latents: NDArray[np.float16], frames: int, stride: int) -> None:
        self.latents, self.frames, self.stride = latents, frames, stride
        self.episodes = store.episodes(split)
        bounds = np.array([store.bounds(int(e)) for e in self.episodes], dtype=np.int64).reshape(-1, 2)
        self._start, self._end = bounds.T
        self._places_end = np.cumsum(self._end - self._start)
        rows = store.rows(split) if store.sets else None
        self._drawn = None if rows is None else np.searchsorted(rows, store.drawn(rows))

    def __len__(self) -> int:
        return int(self._places_end[-1])

    @property
    def draws(self) -> int:
        """How many clips training draws from: each place once, or several sets by their weights."""
        return len(self) if self._drawn is None else len(self._drawn)

    def drawn(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of numbers below `draws`."""
        return numbers if self._drawn is None else self._drawn[numbers]

    def episode_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B,) the store's numbers of the episodes that clips are of."""
        return self.episodes[self._number(places)]

    def clip_rows(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        number = self._number(places)
        observed = self._end[number] - (self._places_end[number] - places)
        return clip_rows(observed, self._start[number], self._end[number], self.frames, self.stride)

    def clips(self, places: NDArray[np.int64]) -> Tensor:
        """(B, T, c, h', w') float32."""
        return torch.from_numpy(self.latents[self.clip_rows(places)]).float()

    def _number(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._places_end, places, side="right")
