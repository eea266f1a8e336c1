"""Frames of the store -> latents, once for all: what fine-tuning and generation read instead of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from svam import processes
from svam.episodes.store import EpisodeStore
from svam.models.autoencoder import Autoencoder
from svam.resume import NO_RESUME, Resume
from svam.training.blocks import in_batches, stem_of, write_attributes, write_blocks


def encode_frames(
    folder: Path, store: EpisodeStore, autoencoder: Autoencoder, autoencoder_sha256: str, batch: int, device: torch.device,
    resume: Resume = NO_RESUME,
) -> None:  # fmt: skip
    """Write `<camera>.npy`, (N, c, h', w') float16 with the rows of the store, of each foresight camera, those that training
    reads. `batch` frames are read and encoded at a time."""
    names = [stem_of(camera) for camera in store.foreseen]

    def compute(block: slice) -> dict[str, NDArray[Any]]:
        rows = np.arange(block.start, block.stop, dtype=np.int64)
        pictures = [torch.from_numpy(store.frames(rows + k * len(store))) for k in range(len(names))]
        return {name: autoencoder.encode(p.to(device)).half().cpu().numpy() for name, p in zip(names, pictures, strict=True)}

    height, width = store.image_size
    factor = autoencoder.factor
    shape = (len(store), autoencoder.latent_channels, height // factor, width // factor)
    write_blocks(folder, dict.fromkeys(names, (shape, np.float16)), in_batches(batch, len(store)), compute, resume, "encode")
    processes.only_first_goes_on()
    write_attributes(folder, autoencoder_sha256=autoencoder_sha256)
