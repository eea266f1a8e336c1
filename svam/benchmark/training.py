"""Trainings of untrained models on batches of random numbers, by the project's own loop: samples a second, and memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from svam.benchmark.timing import ENDLESS, Measured
from svam.models.svam import Batch, Inputs
from svam.params import Machine, Params
from svam.presets.data import estimated
from svam.presets.models import Models
from svam.training.finetune_video import TextTable, train_video
from svam.training.loop import fit

WARM_UP, STEPS = 8, 20
"""Steps before the clock starts, in which layers are compiled, and steps that are timed."""
FEW = (2, 5)
"""The same of a training that is measured for its memory: moments are there from the end of the first step on."""


def forget(device: torch.device) -> None:
    """Give memory that nothing uses back to the card, and begin to look for a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: torch.device) -> float:
    """Most memory that tensors took since `forget`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def seconds_of_steps(
    module: nn.Module, train: Callable[[], object], device: torch.device, steps: tuple[int, int] | None = None
) -> float:  # fmt: skip
    """Mean seconds from one call of `module` to the next, on the clock of the device, while `train` runs; it is ended then.
    `steps`: in place of `WARM_UP` and `STEPS`."""
    (warm_up, timed), marks = steps or (WARM_UP, STEPS), list[Any]()

    def mark(*_: object) -> None:
        if device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            marks[-1].record()
        else:
            marks.append(time.perf_counter())
        if len(marks) > warm_up + timed:
            raise Measured

    handle = module.register_forward_pre_hook(mark)
    with suppress(Measured):
        train()
    handle.remove()
    first, last = marks[warm_up], marks[-1]
    if device.type == "cuda":
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / timed
    return float(last - first) / timed


class Clips:
    """Random latents, in the place of `svam.training.latents.LatentClips`."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._latents = torch.randn(64, *shape)

    @property
    def draws(self) -> int:
        return len(self._latents)

    def drawn(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return numbers

    def clips(self, places: NDArray[np.int64]) -> Tensor:
        return self._latents[torch.from_numpy(places)]

    def episode_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.zeros(len(places), np.int64)


def finetuning(
    params: Params, device: torch.device, machine: Machine, lora_rank: int | None = None, steps: tuple[int, int] | None = None
) -> dict[str, float]:  # fmt: skip
    """Clips a second (`per_second`) of `finetune_video`, a step for each batch, and peak memory in GB. `steps` as above."""
    models = Models(params, estimated(params, None, None), device.type)
    video, autoencoder, config = models.video, models.autoencoder, models.video.config
    del models
    forget(device)
    training = params.finetune_video.training.model_copy(update={"steps": ENDLESS, "accumulate": 1})
    section = params.finetune_video.model_copy(update={"training": training, "lora_rank": lora_rank, "show_every": None})
    table = TextTable(torch.randn(1, config.text_tokens, config.text_width, device=device), [[0]])
    clips: Any = Clips(config.clip_shape)
    seconds = seconds_of_steps(
        video.unet.conv_in,
        lambda: train_video(video, section, clips, clips, autoencoder, table, 0, device, None, machine=machine), device, steps,
    )  # fmt: skip
    return {"per_second": training.batch / seconds, "peak_gb": peak_gb(device)}


def policy(params: Params, device: torch.device, machine: Machine) -> dict[str, float]:
    """Samples a second of `train_policy` on features that lie on the device, as `machine` says and without (`eager`); and
    their ratio."""
    eager, fast = (_policy(params, device, given) for given in (None, machine))
    return {"ratio": fast / eager, "per_second": fast, "eager": eager}


def _policy(params: Params, device: torch.device, machine: Machine | None) -> float:
    models = Models(params, estimated(params, None, None), device.type)
    network, section, shapes = models.policy, params.train_policy, models.shapes
    dimensions = models.statistics.convention.dimensions
    del models
    forget(device)
    training = section.training.model_copy(update={"steps": ENDLESS, "accumulate": 1})
    size = training.batch
    batch = Batch(
        Inputs(
            {entry: torch.randn(size, *shape, device=device, dtype=torch.float16) for entry, shape in shapes.items()},
            torch.randn(size, *network.config.text, device=device),
        ),
        torch.randn(size, section.chunk, dimensions, device=device).clamp(-1, 1),
        torch.ones(size, section.chunk, dtype=torch.bool, device=device),
    )
    noise = torch.Generator().manual_seed(0)

    def loss(given: Batch) -> Tensor:
        return network.diffusion.loss(network.context(given.inputs), given.actions, given.mask, noise, section.noise_draws)

    seconds = seconds_of_steps(
        network.diffusion.from_actions,
        lambda: fit(network, loss, lambda _: batch, training, device, "policy", machine=machine), device,
    )  # fmt: skip
    return size / seconds
