"""One-step features computed again, where `generate` did not keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from svam.episodes.store import EpisodeStore
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
    """F of the windows: the same frame, instruction and noise through the same model as in `generate`."""

    def __init__(self, windows: GeneratedWindows, store: EpisodeStore, model: ForesightModel) -> None:
        self.windows, self.store, self.model = windows, store, model

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """(k, T, h, w, C_F) float16 of windows by number."""
        attributes = self.windows.attributes
        frames = torch.from_numpy(self.store.frames(self.windows.rows[rows, 0]))
        condition, text = self.model.prepare(frames, [attributes["instructions"][i] for i in rows])
        noise = self.model.video_model.initial_noise([attributes["noise_seeds"][i] for i in rows])
        return self.model.one_step(condition, text, noise).cpu().numpy().astype(np.float16)
