"""One-step features computed again, where `generate` did not keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svam.device import sent
from svam.models.foresight import ForesightModel, FrozenParts
from svam.models.video import SamplerConfig
from svam.training.distill_data import GeneratedWindows


def load_for_windows(
    windows: GeneratedWindows, folders: Mapping[str, Path], teachers: Sequence[str] = (), decouplers: Sequence[str] = ()
) -> ForesightModel:
    """The frozen parts that made the windows, sampled as they were, and the named branches' teachers and decouplers.

    Raises:
        ContractError: the video model in `folders` (see `part_folders`) is not the one that made the windows.
        FileError: a part is missing or damaged.
    """
    sampler = SamplerConfig.model_validate(windows.attributes["sampler"])
    parts = FrozenParts(video=True, teachers=tuple(teachers), decouplers=tuple(decouplers))
    return ForesightModel.load_parts(parts, sampler, folders, video_sha256=windows.attributes["video_sha256"])


class OneStepFeatures:
    """F of the windows: the same latents, instruction and noise through the same model as in `generate`, at every read. A
    training and its evaluation may read at once."""

    def __init__(self, windows: GeneratedWindows, model: ForesightModel) -> None:
        self.windows, self.model = windows, model
        self._lock = Lock()

    def __getitem__(self, numbers: NDArray[np.int64], /) -> NDArray[np.float16]:
        """(k, T, h, w, C_F) float16 of windows by number, for statistics and scores."""
        return np.asarray(self.on_device(numbers).cpu().numpy())

    def on_device(self, numbers: NDArray[np.int64]) -> Tensor:
        """The same on the model's device, for training: the host waits for none of it."""
        attributes, model = self.windows.attributes, self.model
        latents = sent(torch.from_numpy(self.windows.latents[numbers]), model.device).float()
        with self._lock:
            text = model.embed_text([attributes["instructions"][i] for i in numbers])
            noise = model.video_model.initial_noise([attributes["noise_seeds"][i] for i in numbers])
            return model.one_step(model.frame_autoencoder.condition_of(latents), text, noise).half()
