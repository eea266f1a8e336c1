"""Fine-tuning the video model on robot clips (S-VAM section 4.1; EDM training as in Stable Video Diffusion)."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNetSpatioTemporalConditionModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from svam import processes
from svam.console import track
from svam.contract import ContractError
from svam.device import sent
from svam.episodes.store import EpisodeStore
from svam.episodes.windows import stride_of
from svam.files import named_refusals, whole_file
from svam.models.autoencoder import Autoencoder
from svam.models.diffusion import expand_like, log_normal_sigmas
from svam.models.layouts import UNET
from svam.models.published import load_strict, resolve_weights
from svam.models.text import TextEncoder
from svam.models.video import SamplerConfig, VideoConfig, VideoModel, build_unet
from svam.params import FinetuneVideo, Machine
from svam.precision import mixed_precision
from svam.resume import NO_RESUME, Resume
from svam.seeds import generator, seed_of
from svam.shares import own_rows
from svam.training.batch_order import EndlessOrder
from svam.training.latents import LatentClips
from svam.training.loop import fit
from svam.training.small_cards import LAYERS, adapted, checkpointed, rounded_by
from svam.training.state import Curves

SIGMA_BANDS = ((0.02, 0.2), (0.2, 1.0), (1.0, 5.0), (5.0, 20.0))
"""Noise levels between which the held-out denoising loss is reported, beside the first inference sigma."""
EXACT_PSNR = 100.0
"""Decibels that an exactly equal picture counts for, as in the autoencoder's metrics; JSON has no infinity. A GPU decodes equal
latents to equal pixels, so a clip that stands still has such pictures where its first frame is repeated."""
SHOWN_CLIPS = 4
"""Held-out clips in a picture of `show_every`."""
EMBEDDED_TOGETHER = 256
"""Sentences that the text encoder embeds at a time; a data set may have one for each episode."""


@dataclass(frozen=True)
class TextTable:
    """The sentences that training may speak, embedded once: tokens (sentences, L, D), and which ones each episode may use."""

    tokens: Tensor
    of_episode: list[list[int]]

    @classmethod
    def build(cls, store: EpisodeStore, text: TextEncoder) -> TextTable:
        """An episode may use its task's training paraphrases; where there is no such list, its own instruction."""
        choices = [
            store.instructions[store.task_of(e)].get("train", []) or [store.episode_instructions[e]]
            for e in range(len(store.episode_ends))
        ]
        sentences = sorted({s for options in choices for s in options})
        number = {s: i for i, s in enumerate(sentences)}
        parts = [text.embed(sentences[i : i + EMBEDDED_TOGETHER]) for i in range(0, len(sentences), EMBEDDED_TOGETHER)]
        return cls(torch.cat(parts), [[number[s] for s in options] for options in choices])

    def draw(self, episodes: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        """(B, L, D): a random allowed sentence for each episode."""
        choices = [self.of_episode[int(e)] for e in episodes]
        drawn = torch.tensor([options[int(rng.integers(len(options)))] for options in choices])
        return self.tokens[sent(drawn, self.tokens.device)]


def new_video_model(
    params: FinetuneVideo, store: EpisodeStore, autoencoder: Autoencoder, text: TextEncoder, seed: int
) -> VideoModel:
    """A fresh or published U-Net with the sizes that follow from the data and the frozen backbones.

    Raises:
        ValueError: the stride does not fit the store's rate, the image does not divide by the autoencoder's factor, or a
            published U-Net does not fit the autoencoder or the text encoder.
    """
    height, width = store.image_size
    if height % autoencoder.factor or width % autoencoder.factor:
        raise ContractError(f"frames are {height}x{width}; the autoencoder needs multiples of {autoencoder.factor}")
    first, second, third = params.added_time_ids
    config = VideoConfig(
        frames=params.frames, stride=stride_of(params.stride_seconds, store.rate_hz), rate_hz=store.rate_hz,
        latent_channels=autoencoder.latent_channels, latent_size=(height // autoencoder.factor, width // autoencoder.factor),
        text_tokens=text.tokens, text_width=text.width, sigma_min=params.sigma_min, sigma_max=params.sigma_max,
        noise=params.noise, camera=store.foreseen[0], more_cameras=store.foreseen[1:], image_size=(height, width),
        added_time_ids=(first, second, third), dropped=params.dropped,
    )  # fmt: skip
    if params.unet.pretrained:
        folder = resolve_weights(params.unet.pretrained, params.unet.revision, UNET, "finetune_video.unet.pretrained")
        unet = load_strict(UNetSpatioTemporalConditionModel, folder)
        unet.requires_grad_(True)
    else:
        unet = build_unet(params.unet, config)
    noise = torch.randn(config.clip_shape, generator=torch.Generator().manual_seed(seed_of(seed, "initial noise")))
    return VideoModel(unet, config, noise)


def draw_sigmas(params: FinetuneVideo, batch: int, random: torch.Generator) -> Tensor:
    """(batch,) noise levels: log-normal, and a fixed share at sigma_max, where the one-step features are read."""
    sigma = log_normal_sigmas(batch, params.log_sigma_mean, params.log_sigma_std, random)
    sigma = sigma.clamp(params.sigma_min, params.sigma_max)
    first = torch.rand(batch, generator=random) < params.first_sigma_share
    return torch.where(first, torch.full_like(sigma, params.sigma_max), sigma)


def denoising_loss(model: VideoModel, clean: Tensor, sigma_B: Tensor, noise: Tensor, condition: Tensor, text: Tensor) -> Tensor:
    """(B,) squared error of the raw output against EDM's target: EDM's weighted loss on the denoised clip."""
    noisy = clean + expand_like(sigma_B, clean) * noise
    _, output = model.raw(noisy, sigma_B, condition, text)
    assert output is not None
    return (output.float() - model.edm.target(clean, noisy, sigma_B)).square().flatten(1).mean(1)


def train_video(
    model: VideoModel, params: FinetuneVideo, clips: LatentClips, held_out: LatentClips, autoencoder: Autoencoder,
    table: TextTable, seed: int, device: torch.device, live: Path | None, resume: Resume = NO_RESUME,
    machine: Machine | None = None,
) -> None:  # fmt: skip
    """Fine-tune in place on `clips`; the averaged weights are in `model` afterwards. Zero steps leave it as it is.
    `machine`: as for `fit`; it also says whether layers are computed twice, see `checkpointed`.

    Every `show_every` steps generations of a few clips of `held_out` go to `live`, as `clips/<step>.png`, and their errors to
    its curves.

    Raises:
        DivergedError: the loss is not finite.
        MachineError: what `params.lora_rank` or `params.moments` needs is not installed.
    """
    if not params.training.steps:
        processes.only_first_goes_on()
        Curves(live).end()
        return
    order = EndlessOrder(clips.draws, params.training.batch, seed, "finetune_video batches")
    own = own_rows(params.training.batch)

    def batch_of(number: int) -> tuple[Tensor, ...]:
        """What is random is drawn for the whole batch; of the data, this process reads its own."""
        random = torch.Generator().manual_seed(seed_of(seed, "finetune_video noise", number))
        places = clips.drawn(order.batch(number))
        clean = sent(clips.clips(places[own]), device)
        text = table.draw(clips.episode_of(places), generator(seed, "finetune_video sentences", number))[own].to(device)
        condition = autoencoder.condition_of(clean[:, 0])
        # Guidance dropout: what guidance extrapolates from.
        shown = sent((torch.rand(len(places), generator=random) >= params.guidance_dropout)[own].float(), device)
        sigma = sent(draw_sigmas(params, len(places), random)[own], device)
        noise = sent(torch.randn((len(places), *clean.shape[1:]), generator=random)[own], device)
        if params.dropped == "frame_and_text":
            condition = condition * expand_like(shown, condition)
        return clean, sigma, noise, condition, text * expand_like(shown, text)

    few = params.model_copy(update={"evaluation_clips": SHOWN_CLIPS})

    def show(step: int) -> dict[str, float]:
        metrics, pictures = evaluate_video(model, few, held_out, autoencoder, table, seed, device)
        if live is not None:
            write_picture(live / "clips", f"{step:07d}.png", pictures, resume)
        return {key: metrics[key] for key in ("loss_sigma_first", "error_share_of_repeat", "latent_error_share_of_repeat")}

    with ExitStack() as stack:
        if params.lora_rank is not None:
            stack.enter_context(adapted(model.unet, params.lora_rank, seed, rounded_by(device, params.training.bf16)))
        if machine is not None and machine.checkpointing:
            stack.enter_context(checkpointed(model.unet, device, params.training.bf16))
        fit(
            model, lambda b: denoising_loss(model, *b).mean(), batch_of, params.training, device, "finetune video", live,
            show if params.show_every else None, params.show_every, resume=resume, machine=machine, moments=params.moments,
            layers=LAYERS,
        )  # fmt: skip
    processes.only_first_goes_on()


def write_picture(folder: Path, name: str, pictures: NDArray[np.uint8], resume: Resume) -> None:
    """Write (clips, 2, T, H, W, 3) pictures as one PNG, a row for each clip's truth and one for its generation; and, of a run
    that was killed, the PNGs that it had written. Raises `FileError` if the file system refuses."""
    clips, rows, frames, height, width, _ = pictures.shape
    joined = pictures.transpose(0, 1, 3, 2, 4, 5).reshape(clips * rows * height, frames * width, 3)
    kept = resume.folder / folder.name if resume.folder else folder
    with named_refusals(kept):
        kept.mkdir(parents=True, exist_ok=True)
        with whole_file(kept / name) as temporary:
            Image.fromarray(joined).save(temporary, format="PNG")
        if kept != folder:
            shutil.copytree(kept, folder, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)


@torch.no_grad()
def evaluate_video(
    model: VideoModel, params: FinetuneVideo, clips: LatentClips, autoencoder: Autoencoder, table: TextTable, seed: int,
    device: torch.device,
) -> tuple[dict[str, float], NDArray[np.uint8]]:  # fmt: skip
    """Metrics on `clips` of held-out episodes, and sample pictures.

    Errors of generated clips are against the autoencoder's reconstruction of the truth, over frames 1..T-1, beside
    "repeat the first frame". Returns (metrics, pictures (clips, 2, T, H, W, 3) uint8: truth and generation).
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    sampler = SamplerConfig(
        up_blocks=1, grid=2, steps=params.evaluation_steps, guidance=1.0, bf16=params.training.bf16
    )  # its features, which nothing here looks at, are small
    rng = generator(seed, "finetune_video held out")
    places = np.sort(rng.choice(len(clips), size=min(params.evaluation_clips, len(clips)), replace=False))
    text = table.draw(clips.episode_of(places), rng)
    losses: dict[str, list[Tensor]] = {}
    sums: dict[str, float] = {}
    pictures = []
    blocks = np.array_split(np.arange(len(places)), -(-len(places) // params.training.batch))
    for block in track(blocks, "evaluate video", len(blocks)):
        random = torch.Generator().manual_seed(seed_of(seed, "finetune_video held out", int(block[0])))
        clean, tokens = clips.clips(places[block]).to(device), text[torch.from_numpy(block)].to(device)
        condition = autoencoder.condition_of(clean[:, 0])
        noise = torch.randn(clean.shape, generator=random).to(device)
        with mixed_precision(device, params.training.bf16):
            for low, high in (*SIGMA_BANDS, (params.sigma_max, params.sigma_max)):
                level = torch.rand(len(block), generator=random) * np.log(high / low) + np.log(low)
                key = f"loss_sigma_{low:g}_{high:g}" if high > low else "loss_sigma_first"
                losses.setdefault(key, []).append(
                    denoising_loss(model, clean, level.exp().to(device), noise, condition, tokens).cpu()
                )
            seeds = [seed_of(seed, "held-out noise", int(p)) for p in places[block]]
            made = model.generate(condition, tokens, model.initial_noise(seeds), sampler)
        repeated = clean[:, :1].expand_as(clean)
        truth = _decoded(autoencoder, clean)
        for name, latents in (("generated", made.latents), ("repeated", repeated), ("one_step", made.one_step)):
            pixels = _decoded(autoencoder, latents)
            future, expected = pixels[:, 1:].flatten(0, 1), truth[:, 1:].flatten(0, 1)
            share = len(block) / len(places)
            for key, value in (
                ("latent_mse", (latents[:, 1:] - clean[:, 1:]).square().mean()),
                ("mse", (future - expected).square().mean()),
                ("psnr", _psnr(future, expected)),
                ("ssim", structural_similarity_index_measure(future, expected, data_range=1.0)),
            ):
                sums[f"{name}_{key}"] = sums.get(f"{name}_{key}", 0.0) + share * float(value)
            if name == "generated":
                pictures.append(torch.stack([truth, pixels], dim=1).mul(255).round().byte().permute(0, 1, 2, 4, 5, 3).cpu())
    metrics = {key: float(torch.cat(values).mean()) for key, values in losses.items()} | sums
    metrics["error_share_of_repeat"] = sums["generated_mse"] / max(sums["repeated_mse"], 1e-12)
    metrics["latent_error_share_of_repeat"] = sums["generated_latent_mse"] / max(sums["repeated_latent_mse"], 1e-12)
    return metrics, torch.cat(pictures).numpy()


def _psnr(pictures: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures (k, 3, H, W) in [0, 1], in decibels, averaged over them; see `EXACT_PSNR`."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    each: Tensor = peak_signal_noise_ratio(pictures, truth, data_range=1.0, dim=(1, 2, 3), reduction="none")
    return each.nan_to_num(posinf=EXACT_PSNR).mean()


def _decoded(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """(B, T, 3, H, W) in [0, 1]."""
    pixels = autoencoder.decode(latents.flatten(0, 1), frames=latents.shape[1])
    return pixels.reshape(*latents.shape[:2], *pixels.shape[1:])
