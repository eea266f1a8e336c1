"""One-step features computed again, where `generate` did not keep them, and what foresight costs beside its alternative."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from svam.console import console
from svam.contract import ContractError
from svam.episodes.store import EpisodeStore
from svam.files import sha256_tree
from svam.models.decoupler import Decoupler
from svam.models.foresight import ForesightModel, Needs
from svam.models.generator import SamplerConfig
from svam.training.distill_data import GeneratedWindows, TeacherWindows


def load_foresight(
    windows: GeneratedWindows, teacher: TeacherWindows, backbones: Path, video: Path, branch: str
) -> ForesightModel:
    """The frozen parts that made the windows, and the branch's teacher.

    Raises:
        ContractError: `video` is not the model that the windows were generated with.
    """
    if sha256_tree(video) != windows.attributes.get("video_sha256"):
        raise ContractError(f"{video}: not the video model that {windows.path} was generated with; run generate again")
    folders = {"autoencoder": backbones / "autoencoder", "text": backbones / "text", "video": video}
    sampler = SamplerConfig.model_validate(windows.attributes["sampler"])
    needs = Needs(video=True, teachers=(branch,), decouplers=())
    reference = teacher.attributes["reference"]
    return ForesightModel.load_parts(needs, sampler, folders | {f"teacher_{branch}": backbones / branch}, reference)


class OneStepFeatures:
    """F of the windows: the same frame, instruction and noise through the same model as in `generate`."""

    def __init__(self, windows: GeneratedWindows, store: EpisodeStore, model: ForesightModel) -> None:
        self.windows, self.store, self.model = windows, store, model

    def inputs(self, rows: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(observed frames uint8, condition latents, text, initial noise) of windows by number."""
        attributes = self.windows.attributes
        first = torch.from_numpy(self.store.frames(self.windows.rows[rows, 0])).to(self.model.device)
        condition, text = self.model.prepare(first, [attributes["instructions"][i] for i in rows])
        noise = self.model.video_model.initial_noise([attributes["noise_seeds"][i] for i in rows])
        return first, condition, text, noise

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """(k, T, h, w, C_F) float16 of windows by number."""
        _, condition, text, noise = self.inputs(rows)
        return self.model.one_step(condition, text, noise).cpu().numpy().astype(np.float16)


@torch.no_grad()
def print_latency(one_step: OneStepFeatures, decoupler: Decoupler, branch: str, batch: int = 16, repeats: int = 3) -> None:
    """Print milliseconds per observation of the branch's foresight, beside the other way to get it in one step.

    Both start from the observed frame: `distilled` is the truncated U-Net, the teacher on that frame and the decoupler;
    `decoded` is the whole U-Net, the decoder and the teacher on T frames. Only printed: timings are in no output.
    """
    model = one_step.model
    model.decouplers[branch] = decoupler
    first, condition, text, noise = one_step.inputs(one_step.windows.test[:batch])
    features = model.one_step(condition, text, noise)
    reference = model.reference_features(branch, first)
    video, bf16 = model.video_model, model.sampler.bf16

    def whole() -> torch.Tensor:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
            return video.denoise(noise, noise.new_full((len(noise),), 1.0), condition, text)[1]

    latents = whole()
    clips = model.decode(latents).flatten(0, 1)
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "distilled": {
            "truncated U-Net": lambda: model.one_step(condition, text, noise),
            "reference": lambda: model.reference_features(branch, first),
            "decoupler": lambda: model.decouple(branch, features, reference),
        },
        "decoded one-step prediction": {
            "whole U-Net": whole,
            "decoder": lambda: model.decode(latents),
            "teacher on the clip": lambda: model.teacher_features(branch, clips),
        },
    }
    for way, parts in calls.items():
        spent = {name: milliseconds(call, model.device, repeats) / len(first) for name, call in parts.items()}
        details = ", ".join(f"{name} {value:.1f}" for name, value in spent.items())
        total = f"{sum(spent.values()):.1f} ms an observation in batches of {len(first)}"
        console.print(f"{branch} foresight, {way}: {total} ({details})", highlight=False)


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median wall time of a call, after one to warm up."""
    spent = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(1e3 * (time.perf_counter() - start))
    return float(np.median(spent[1:]))
