"""The autoencoder: a small `AutoencoderDC` trained on the data set's own frames, or SVD's own imported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from numpy.typing import NDArray
from torch import Tensor

from svam import params
from svam.console import track
from svam.contract import ContractError
from svam.episodes.store import EpisodeStore
from svam.models.autoencoder import Autoencoder, to_pixels
from svam.models.layouts import AUTOENCODER
from svam.models.published import freeze, resolve_weights
from svam.resume import NO_RESUME, Resume
from svam.training.batch_order import EndlessOrder
from svam.training.loop import fit
from svam.training.prepare_backbones.frames import evenly, frames_that_fit, load_frames

BACKGROUND_FRAMES = 101
"""Frames of each task whose median is its background: more would give the same picture."""


def published(section: params.Autoencoder, key: str) -> Autoencoder:
    """The published weights that the params name. `key` is the section's, for messages."""
    return Autoencoder.load_published(resolve_weights(str(section.path), section.revision, AUTOENCODER, f"{key}.path"))


def build(section: params.Autoencoder, image_size: tuple[int, int]) -> AutoencoderDC:
    """An untrained `AutoencoderDC` of the levels that have layers; the finer ones become channels by pixel-unshuffle.

    Raises:
        ContractError: the frames' sides are no multiples of its factor.
    """
    if image_size[0] % section.factor or image_size[1] % section.factor:
        raise ContractError(
            f"prepare_backbones.autoencoder.channels has {len(section.channels)} levels, a factor of {section.factor}, "
            f"but the frames are {image_size[0]}x{image_size[1]} pixels"
        )
    first = section.unshuffled_levels
    channels, layers = tuple(section.channels[first:]), tuple(section.layers[first:])
    return AutoencoderDC(
        in_channels=3 * 4**first,
        latent_channels=section.latent_channels,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((),) * len(layers),
        decoder_qkv_multiscales=((),) * len(layers),
    )


def backgrounds(store: EpisodeStore) -> Tensor:
    """Median training picture of each task by each camera, (tasks x cameras, 3, H, W) in [-1, 1]; zeros for a task without
    training episodes."""
    rows = store.pictures("train")
    tasks = task_of_rows(store, rows)
    height, width = store.image_size
    pictures = torch.zeros(len(store.tasks) * len(store.foreseen), 3, height, width)
    for task in np.unique(tasks):
        chosen = evenly(rows[tasks == task], BACKGROUND_FRAMES)
        pictures[task] = to_pixels(load_frames(store, chosen)).median(dim=0).values
    return pictures


def task_of_rows(store: EpisodeStore, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place in `backgrounds` of pictures, by their numbers."""
    return store.episode_task[store.episode_of(rows % len(store))] + rows // len(store) * len(store.tasks)


def moving_weight(pixels: Tensor, background: Tensor, weights: params.AutoencoderLoss) -> Tensor:
    """(B, 1, H, W) weights: 1 on the background, more where a frame differs from it and its surroundings; both in [-1, 1].

    Without them the loss is all background, and the gripper's fingers and a goal marker of two pixels vanish; of the arm,
    which is large and easy, the edges matter.
    """
    moving = ((pixels - background).abs().amax(dim=1, keepdim=True) / 2 / weights.moving_threshold).clamp(max=1.0)
    reach = weights.contrast_reach
    around = F.avg_pool2d(F.pad(pixels, (reach,) * 4, mode="replicate"), 2 * reach + 1, stride=1)
    contrast = (pixels - around).abs().amax(dim=1, keepdim=True) / 2
    return 1.0 + moving * (weights.moving + weights.contrast * contrast)


def train(
    section: params.Autoencoder, store: EpisodeStore, seed: int, device: torch.device, live: Path | None,
    resume: Resume = NO_RESUME,
) -> tuple[Autoencoder, dict[str, float]]:  # fmt: skip
    """Train on training episodes only; measure the latents' statistics there too, and the errors on held-out episodes."""
    autoencoder = Autoencoder(build(section, store.image_size)).to(device)
    rows = frames_that_fit(store, store.drawn(store.pictures("train")))
    frames = load_frames(store, rows)
    pictures = backgrounds(store)
    tasks = torch.from_numpy(task_of_rows(store, rows))
    order = EndlessOrder(len(rows), section.training.batch, seed, "autoencoder batches")

    def batch_of(number: int) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(order.batch(number))
        return to_pixels(frames[chosen].to(device)), pictures[tasks[chosen]].to(device)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, background = batch
        latents = autoencoder.encode_pixels(pixels)
        spread = latents.detach().float().std(dim=(0, 2, 3), keepdim=True)
        decoded = autoencoder.decode_pixels(latents + section.loss.latent_noise * spread * torch.randn_like(latents))
        weight = moving_weight(pixels, background, section.loss)
        difference = decoded.float() - pixels
        return ((difference.abs() + section.loss.squared * difference.square()) * weight).mean() / weight.mean()

    fit(autoencoder, loss, batch_of, section.training, device, "autoencoder", live, resume=resume)
    autoencoder = freeze(with_statistics(autoencoder, frames))
    return autoencoder, measure(autoencoder, store, pictures, section.loss.moving_threshold)


def with_statistics(autoencoder: Autoencoder, frames: Tensor, count: int = 1024) -> Autoencoder:
    """The same model with the per-channel mean and deviation of its latents over `count` of the training frames."""
    device = autoencoder.latent_mean.device
    chosen = frames[torch.linspace(0, len(frames) - 1, min(count, len(frames))).round().long()]
    with torch.no_grad():
        parts = torch.split(chosen, 64)
        latents = torch.cat([autoencoder.encode_pixels(to_pixels(part.to(device))).double() for part in parts])
    mean = latents.mean(dim=(0, 2, 3)).tolist()
    std = latents.std(dim=(0, 2, 3)).clamp(min=1e-4).tolist()
    model = autoencoder.model
    return Autoencoder(model, [round(m, 6) for m in mean], [round(s, 6) for s in std]).to(device)


def measure(
    autoencoder: Autoencoder, store: EpisodeStore, pictures: Tensor, threshold: float, count: int = 512
) -> dict[str, float]:
    """PSNR (dB, frames in [0, 1]) of reconstructions of held-out frames: of whole frames, and of the pixels alone that differ
    by more than `threshold` from their task's median picture in `pictures`, beside the error which that picture makes there."""
    device = autoencoder.latent_mean.device
    rows = evenly(store.pictures("held_out"), count)
    whole = moving = still = pixels_moving = 0.0
    for part in track(np.array_split(rows, -(-len(rows) // 64)), "autoencoder: held-out frames", -(-len(rows) // 64)):
        frames = load_frames(store, part).to(device)
        truth = to_pixels(frames) / 2 + 0.5
        background = pictures[torch.from_numpy(task_of_rows(store, part))].to(device) / 2 + 0.5
        error = (autoencoder.decode(autoencoder.encode(frames)) - truth).square().mean(dim=1)
        mask = (truth - background).abs().amax(dim=1) > threshold
        whole += float(error.sum())
        moving += float(error[mask].sum())
        still += float((truth - background).square().mean(dim=1)[mask].sum())
        pixels_moving += float(mask.sum())
    pixels = len(rows) * pictures.shape[-1] * pictures.shape[-2]
    return {
        "psnr": psnr(whole / pixels),
        "psnr_moving": psnr(moving / max(1.0, pixels_moving)),
        "psnr_moving_of_background": psnr(still / max(1.0, pixels_moving)),
    }


def psnr(error: float) -> float:
    """Decibels of a mean squared error of values in [0, 1]; capped at 100."""
    return float(-10.0 * np.log10(max(error, 1e-10)))
