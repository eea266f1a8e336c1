"""The video model: Stable Video Diffusion's spatio-temporal U-Net with EDM's v-prediction, conditioned on frame and text.

Source: S-VAM sections 3.1-3.2; Stable Video Diffusion (Blattmann et al. 2023). The U-Net is diffusers' class at any size.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNetSpatioTemporalConditionModel
from pydantic import Field
from torch import Tensor, nn

from svam.checkpoint import load_config, load_tensors, save_tensors
from svam.contract import CHECKPOINT_SCHEMA, Frozen
from svam.device import sent
from svam.errors import ParamsError
from svam.files import FileError, stated, write_json
from svam.models.attention import UNetAttention
from svam.models.diffusion import EDM, ddim_step, expand_like, karras_sigmas
from svam.models.published import load_strict, save_published
from svam.params import UNet


class VideoConfig(Frozen):
    """What the video model was built for; written beside its weights, and read from there by every later stage."""

    frames: int
    stride: int
    rate_hz: float
    latent_channels: int
    latent_size: tuple[int, int]
    text_tokens: int
    text_width: int
    sigma_min: float
    sigma_max: float
    noise: str
    camera: str
    image_size: tuple[int, int]
    added_time_ids: tuple[float, float, float] = (6.0, 127.0, 0.02)
    """SVD's frame rate - 1, motion bucket and noise augmentation; constants, since clips of one store share them."""
    dropped: Literal["frame_and_text", "text"] = "frame_and_text"
    """What training left out of some clips, and guidance leaves out of its unconditional estimate."""
    more_cameras: list[str] = Field(default=[], exclude_if=operator.not_)
    """Further foresight cameras, whose clips the same model was trained on."""

    @property
    def cameras(self) -> list[str]:
        """All foresight cameras."""
        return [self.camera, *self.more_cameras]

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(T, c, h', w') of the latents of one clip."""
        return (self.frames, self.latent_channels, *self.latent_size)


class SamplerConfig(Frozen):
    """How the video model is read: features of the first `up_blocks` up blocks on a `grid` x `grid` grid, and `steps` and
    `guidance` of the multi-step generation. bf16: whether both run under autocast.

    guidance_last: strength at the last frame, to which it rises linearly from `guidance` at the first; None: the same for all.
    resize: how features of another size come to the grid. feature_time_ids: added time ids of the pass that features are read
    from; None: those of training.
    """

    up_blocks: int
    grid: int
    steps: int
    guidance: float
    bf16: bool
    guidance_last: float | None = None
    resize: Literal["antialiased", "nearest"] = "antialiased"
    feature_time_ids: tuple[float, float, float] | None = None

    @property
    def guided(self) -> bool:
        """Whether generation needs an unconditional estimate beside the conditional one."""
        return (self.guidance, self.guidance_last or self.guidance) != (1.0, 1.0)

    def strengths(self, frames: int, device: torch.device) -> Tensor:
        """Guidance (T, 1, 1, 1) float32 of each frame of a clip."""
        last = self.guidance if self.guidance_last is None else self.guidance_last
        return torch.linspace(self.guidance, last, frames, device=device).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Generation:
    """The outcome of one sampling run: one-step features and the clip, from the same initial noise.

    features: (B, T, h, w, C) of the first evaluation; latents: (B, T, c, h', w') of the clip V^;
    one_step: (B, T, c, h', w'), the denoised estimate after the first evaluation.
    """

    features: Tensor
    latents: Tensor
    one_step: Tensor


class VideoModel(nn.Module):
    """U-Net, EDM preconditioning, and the fixed initial noise (T, c, h', w') that caching, policy and serving share (S-VAM
    section 3.1)."""

    fixed_noise: Tensor

    def __init__(self, unet: UNetSpatioTemporalConditionModel, config: VideoConfig, fixed_noise: Tensor) -> None:
        super().__init__()
        sizes: Any = unet.config
        width = sizes["cross_attention_dim"]
        if not isinstance(width, int) or width % config.text_width:
            raise ParamsError(
                f"the U-Net's cross_attention_dim is {width}, expected a multiple of the text width {config.text_width}"
            )
        inputs, outputs, latent = sizes["in_channels"], sizes["out_channels"], config.latent_channels
        if (inputs, outputs) != (2 * latent, latent):
            raise ParamsError(
                f"the U-Net has {inputs} input and {outputs} output channels; "
                f"the autoencoder's {latent} latent channels need {2 * latent} and {latent}"
            )
        self.unet: Any = unet  # diffusers' classes carry no usable types
        self.unet.set_attn_processor(UNetAttention())
        self.config = config
        self.edm = EDM(sigma_data=1.0, sign=-1.0)
        self.text_repeats = width // config.text_width
        self.register_buffer("fixed_noise", fixed_noise)

    def feature_channels(self, up_blocks: int) -> int:
        """Channels C of the one-step features of the first `up_blocks` up blocks."""
        widths = list(reversed(self.unet.config["block_out_channels"]))
        if not 1 <= up_blocks <= len(widths):
            raise ParamsError(f"generate.up_blocks is {up_blocks}, but this U-Net has {len(widths)} up blocks")
        return int(sum(widths[:up_blocks]))

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """(B, T, c, h', w') unit noise, a clip for each seed: the fixed tensor each time (`noise: fixed`), or a draw."""
        if self.config.noise == "fixed":
            return self.fixed_noise.expand(len(seeds), *self.config.clip_shape)
        return self.seeded_noise(seeds)

    def seeded_noise(self, seeds: Sequence[int]) -> Tensor:
        """(B, T, c, h', w'), one draw per seed on the CPU, so that every device sees the same numbers."""
        draws = [torch.randn(self.config.clip_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return sent(torch.stack(draws), self.fixed_noise.device)

    def raw(
        self, noisy: Tensor, sigma_B: Tensor, condition: Tensor, text: Tensor, up_blocks: int | None = None,
        time_ids: tuple[float, float, float] | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
        """One U-Net evaluation.

        Args:
            noisy: (B, T, c, h', w'). sigma_B: (B,). condition: (B, c, h', w') latents of the observed frame, not noised.
            text: (B, L, D) tokens, repeated on channels to the width that the U-Net expects (doubled for SVD).
            up_blocks: stop after this many up blocks and return their outputs; None runs everything.
            time_ids: in place of the configuration's.

        Returns:
            The outputs of the up blocks that ran, (B*T, C, h_l, w_l) each, and the raw output (B, T, c, h', w') or None.
        """
        unet = self.unet
        batch, frames = noisy.shape[:2]
        scaled = noisy * self.edm.c_in(expand_like(sigma_B, noisy))
        sample = torch.cat([scaled, condition[:, None].expand(-1, frames, -1, -1, -1)], dim=2).flatten(0, 1)
        # Filled where they are used: a copy from the host would make it wait, and cannot be part of a CUDA graph.
        ids = torch.cat([noisy.new_full((batch, 1), number) for number in time_ids or self.config.added_time_ids], dim=1)
        embedding = unet.time_embedding(unet.time_proj(self.edm.c_noise(sigma_B)).to(noisy.dtype))
        embedding = embedding + unet.add_embedding(unet.add_time_proj(ids.flatten()).reshape(batch, -1).to(noisy.dtype))
        embedding = embedding.repeat_interleave(frames, dim=0)
        # Of one clip, a view of stride 0, which `UNetAttention` reads once for all frames and positions.
        tokens = text.repeat(1, 1, self.text_repeats)[:, None].expand(-1, frames, -1, -1).flatten(0, 1)
        image_only = torch.zeros(batch, frames, dtype=noisy.dtype, device=noisy.device)

        # The body of diffusers' forward, block by block, because blocks after layer L need not run (S-VAM section 3.2).
        sample = unet.conv_in(sample)
        skips: tuple[Tensor, ...] = (sample,)
        for block in unet.down_blocks:
            sample, residuals = _run(block, sample, embedding, tokens, image_only)
            skips += residuals
        sample = unet.mid_block(sample, temb=embedding, encoder_hidden_states=tokens, image_only_indicator=image_only)
        maps: list[Tensor] = []
        for block in unet.up_blocks:
            count = len(block.resnets)
            sample = _run(block, sample, embedding, tokens, image_only, skips[-count:])
            skips = skips[:-count]
            maps.append(sample)
            if len(maps) == up_blocks:
                return maps, None
        output = unet.conv_out(unet.conv_act(unet.conv_norm_out(sample)))
        return maps, output.reshape(batch, frames, *output.shape[1:])

    def _features(self, maps: list[Tensor], sampler: SamplerConfig, batch: int) -> Tensor:
        """Resize the maps to (h, w) and join them on channels: (B, T, h, w, C)."""
        size = (sampler.grid, sampler.grid)
        way: Any = {"mode": "nearest"} if sampler.resize == "nearest" else {"mode": "bilinear", "antialias": True}
        resized = [m if m.shape[-2:] == size else F.interpolate(m.float(), size, **way) for m in maps]
        joined = torch.cat([r.float() for r in resized], dim=1)
        return joined.reshape(batch, -1, *joined.shape[1:]).permute(0, 1, 3, 4, 2)

    def one_step(self, condition: Tensor, text: Tensor, noise: Tensor, sampler: SamplerConfig) -> Tensor:
        """One-step features F (B, T, h, w, C) float32: a single evaluation at the first sigma, cut after `up_blocks`
        (S-VAM section 3.2).

        condition (B, c, h', w'), text (B, L, D), noise (B, T, c, h', w') with unit variance.
        """
        self.feature_channels(sampler.up_blocks)
        sigma = noise.new_full((len(noise),), self.config.sigma_max)
        maps, _ = self.raw(self._start(noise), sigma, condition, text, sampler.up_blocks, sampler.feature_time_ids)
        return self._features(maps, sampler, len(noise))

    def _start(self, noise: Tensor) -> Tensor:
        """Pure noise with the variance that a latent of unit variance has at the first sigma."""
        return noise * float((self.config.sigma_max**2 + 1.0) ** 0.5)

    def denoise(
        self, noisy: Tensor, sigma_B: Tensor, condition: Tensor, text: Tensor, guidance: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """(up-block maps, clean estimate (B, T, c, h', w')). `guidance` (T, 1, 1, 1) extrapolates from the unconditional
        estimate, which sees no text, and no frame unless training kept it."""
        maps, output = self.raw(noisy, sigma_B, condition, text)
        assert output is not None
        clean = self.edm.denoised(noisy, output.float(), sigma_B)
        if guidance is None:
            return maps, clean
        kept = condition if self.config.dropped == "text" else torch.zeros_like(condition)
        _, output = self.raw(noisy, sigma_B, kept, torch.zeros_like(text))
        assert output is not None
        unconditional = self.edm.denoised(noisy, output.float(), sigma_B)
        return maps, unconditional + guidance * (clean - unconditional)

    def generate(self, condition: Tensor, text: Tensor, noise: Tensor, sampler: SamplerConfig) -> Generation:
        """The multi-step generation V^ by the deterministic sampler, and F from its first evaluation: the same noise.

        Shapes as in `one_step`; `steps` evaluations on Karras noise levels from sigma_max to sigma_min, then 0. Where features
        have time ids of their own, F is read in a pass beside the first evaluation.
        """
        self.feature_channels(sampler.up_blocks)
        levels = karras_sigmas(sampler.steps, self.config.sigma_min, self.config.sigma_max).tolist()
        guidance = sampler.strengths(self.config.frames, noise.device) if sampler.guided else None
        noisy = self._start(noise)
        features = first = noisy
        for i, sigma in enumerate(levels[:-1]):
            maps, clean = self.denoise(noisy, noisy.new_full((len(noisy),), sigma), condition, text, guidance)
            if i == 0:
                features, first = self._features(maps[: sampler.up_blocks], sampler, len(noisy)), clean
            noisy = ddim_step(noisy, clean, sigma, levels[i + 1])
        if sampler.feature_time_ids is not None:
            features = self.one_step(condition, text, noise, sampler)
        return Generation(features=features, latents=noisy, one_step=first)

    def save(self, directory: Path) -> None:
        """Write `unet/` in the published layout, `noise.safetensors` and `config.json`."""
        save_published(self.unet, directory / "unet")
        save_tensors(directory / "noise.safetensors", {"fixed_noise": self.fixed_noise})
        write_json(directory / "config.json", {"schema_version": CHECKPOINT_SCHEMA, **self.config.model_dump()})

    @classmethod
    def load(cls, directory: Path) -> VideoModel:
        """Read what `save` wrote.

        Raises:
            FileError: a file is missing, truncated, of another schema, or does not fit the others.
        """
        config = stated(VideoConfig, load_config(directory), directory / "config.json")
        noise = load_tensors(directory / "noise.safetensors").get("fixed_noise")
        if noise is None or tuple(noise.shape) != config.clip_shape:
            shape = "missing" if noise is None else tuple(noise.shape)
            raise FileError(f"{directory}/noise.safetensors: fixed_noise is {shape}, expected {config.clip_shape}")
        return cls(load_strict(UNetSpatioTemporalConditionModel, directory / "unet"), config, noise).eval()


def _run(
    block: nn.Module,
    sample: Tensor,
    embedding: Tensor,
    tokens: Tensor,
    image_only: Tensor,
    skips: tuple[Tensor, ...] | None = None,
) -> Any:
    """Run a down block (`skips` None) or an up block of the U-Net, with text where it has cross-attention."""
    arguments: dict[str, Any] = {"hidden_states": sample, "temb": embedding, "image_only_indicator": image_only}
    if getattr(block, "has_cross_attention", False):
        arguments["encoder_hidden_states"] = tokens
    if skips is not None:
        arguments["res_hidden_states_tuple"] = skips
    return block(**arguments)


def build_unet(sizes: UNet, config: VideoConfig) -> UNetSpatioTemporalConditionModel:
    """A fresh U-Net in SVD's form: text and temporal attention at every level but the lowest, whose blocks are convolutions."""
    levels = len(sizes.channels)
    down = ["CrossAttnDownBlockSpatioTemporal"] * (levels - 1) + ["DownBlockSpatioTemporal"]
    up = ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * (levels - 1)
    return UNetSpatioTemporalConditionModel(
        sample_size=min(config.latent_size),
        in_channels=2 * config.latent_channels,
        out_channels=config.latent_channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=tuple(sizes.channels),
        layers_per_block=sizes.layers,
        num_attention_heads=tuple(sizes.heads),
        cross_attention_dim=config.text_width,
        addition_time_embed_dim=sizes.channels[0],
        projection_class_embeddings_input_dim=3 * sizes.channels[0],
        num_frames=config.frames,
    )
