"""The autoencoder behind one adapter that owns preprocessing, latent scaling and SVD's conditioning convention.

Two families: `dc`, a `diffusers.AutoencoderDC` trained on the project's own frames, and `svd`, the published
`AutoencoderKLTemporalDecoder` of Stable Video Diffusion (Blattmann et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKLTemporalDecoder
from torch import Tensor, nn

from svam.contract import ContractError
from svam.files import FileError
from svam.models.published import freeze, load_strict, read_adapter, save_published, write_adapter

Family = Literal["dc", "svd"]
CLASSES: dict[str, type[AutoencoderDC] | type[AutoencoderKLTemporalDecoder]] = {
    "dc": AutoencoderDC,
    "svd": AutoencoderKLTemporalDecoder,
}
PIXELS = 2**20
"""Of the frames that are encoded or decoded together where no param bounds them: 16 frames of 256 x 256, a clip of SVD's, whose
decoding takes 4 GB; 256 of 64 x 64."""


def frames_within(image_size: Sequence[int]) -> int:
    """How many frames of (H, W) pixels have `PIXELS` together, at least one."""
    return max(1, PIXELS // math.prod(image_size))


class Autoencoder(nn.Module):
    """Frames to latents of unit standard deviation and back. Frozen; everything runs in float32 whatever the caller's autocast.

    latent_mean, latent_std: (C, 1, 1) float32, the affine map between the library's latents and the scaled ones:
    scaled = (latents - mean) / std. For `svd` mean is 0 and std is 1 / scaling_factor of the published config.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        model: AutoencoderDC | AutoencoderKLTemporalDecoder,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        batch: int | None = None,
    ) -> None:
        """Args: the library's model, and per-channel statistics of its latents (`dc` only; `svd` brings its own). batch: frames
        that are encoded or decoded at a time, so that memory is bounded; None: all."""
        super().__init__()
        self.batch = batch
        self.family: Family = "dc" if isinstance(model, AutoencoderDC) else "svd"
        self.model = model
        channels = self.latent_channels
        if isinstance(model, AutoencoderKLTemporalDecoder):
            mean, std = [0.0] * channels, [1.0 / float(model.config["scaling_factor"])] * channels
        mean, std = mean or [0.0] * channels, std or [1.0] * channels
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise FileError(f"latent statistics: expected {channels} means and positive deviations, found {mean} and {std}")
        self.register_buffer("latent_mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("latent_std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def latent_channels(self) -> int:
        return int(self.model.config["latent_channels"])

    @property
    def factor(self) -> int:
        """Pixels per latent position along each side."""
        name = "encoder_block_out_channels" if self.family == "dc" else "block_out_channels"
        return int(self.patch * 2 ** (len(self.model.config[name]) - 1))

    @property
    def patch(self) -> int:
        """Side of the squares of pixels that are channels of the library's model (`dc`): convolutions at full resolution
        would cost most of the time, so the in-domain model has none. 1 for `svd`."""
        return math.isqrt(int(self.model.config["in_channels"]) // 3)

    @classmethod
    def load(cls, folder: Path, batch: int | None = None) -> Autoencoder:
        """Read what `save` wrote; `batch` as above. Raises `FileError` for missing, broken or unfitting files."""
        record = read_adapter(Path(folder), "autoencoder")
        if record.get("family") not in CLASSES:
            raise FileError(f"{folder}/svam.json: family is {record.get('family')!r}, expected one of {sorted(CLASSES)}")
        model = load_strict(CLASSES[record["family"]], Path(folder))
        return freeze(cls(model, record.get("latent_mean"), record.get("latent_std"), batch))

    @classmethod
    def load_published(cls, folder: Path) -> Autoencoder:
        """Read SVD's own autoencoder (the repository's `vae` folder)."""
        return freeze(cls(load_strict(AutoencoderKLTemporalDecoder, Path(folder))))

    def save(self, folder: Path) -> None:
        """Write the published layout (`config.json`, safetensors) and `svam.json` into an existing folder."""
        save_published(self.model, Path(folder))
        statistics = {"latent_mean": self.latent_mean.flatten().tolist(), "latent_std": self.latent_std.flatten().tolist()}
        write_adapter(Path(folder), "autoencoder", family=self.family, **(statistics if self.family == "dc" else {}))

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, C, H / factor, W / factor) float32 scaled latents; deterministic (the posterior's mode).

        Rounded to what float16 holds, as the latents that training reads are stored, so that `act` sees the same: on a CPU the
        same bits however many frames are encoded together; a GPU may choose another kernel for another number, and then a
        number is one step of float16 away now and then.

        Raises:
            ContractError: not uint8 RGB, or a side that is no multiple of `factor`.
        """
        parts = torch.split(frames, self.batch or max(1, len(frames)))
        latents = torch.cat([(self._latents(part) - self.latent_mean) / self.latent_std for part in parts])
        return latents.half().float()

    def condition_of(self, latents: Tensor) -> Tensor:
        """Latents (..., C, h, w) of an observed frame, as `encode` gives them, to what the U-Net takes on its extra channels.

        SVD was trained with conditioning latents that are *not* multiplied by the scaling factor; in-domain they are the same.
        """
        return latents * self.latent_std + self.latent_mean if self.family == "svd" else latents

    @torch.no_grad()
    def decode(self, latents: Tensor, frames: int = 1) -> Tensor:
        """(B, C, h, w) scaled latents -> (B, 3, H, W) float32 in [0, 1].

        `frames`: length of the clips that lie one after another on B; SVD's temporal decoder mixes within a clip, the
        in-domain one looks at each frame alone, and clips are never cut. Raises `ContractError` if B is no multiple of it.
        """
        if len(latents) % frames:
            raise ContractError(f"decode: {len(latents)} latents are no whole number of clips of {frames} frames")
        size = frames * max(1, (self.batch or len(latents)) // frames)
        with torch.autocast(latents.device.type, enabled=False):
            parts = (part.float() * self.latent_std + self.latent_mean for part in torch.split(latents, size))
            return torch.cat([(self.decode_pixels(part, frames) / 2 + 0.5).clamp(0.0, 1.0) for part in parts])

    def decode_u8(self, latents: Tensor, frames: int = 1) -> Tensor:
        return (self.decode(latents, frames) * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> unscaled latents, with gradients (training only)."""
        if isinstance(self.model, AutoencoderDC):
            latents: Tensor = self.model.encode(F.pixel_unshuffle(pixels, self.patch)).latent
        else:
            latents = self.model.encode(pixels).latent_dist.mode()
        return latents

    def decode_pixels(self, latents: Tensor, frames: int = 1) -> Tensor:
        """Unscaled latents -> (B, 3, H, W), about [-1, 1], with gradients (training only)."""
        if isinstance(self.model, AutoencoderDC):
            pixels: Tensor = F.pixel_shuffle(self.model.decode(latents).sample, self.patch)
        else:
            pixels = self.model.decode(latents, num_frames=frames).sample
        return pixels

    def _latents(self, frames: Tensor) -> Tensor:
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
            raise ContractError(f"encode: frames are {frames.dtype} {tuple(frames.shape)}, expected uint8 (B, H, W, 3)")
        if frames.shape[1] % self.factor or frames.shape[2] % self.factor:
            raise ContractError(
                f"encode: frames of {frames.shape[1]}x{frames.shape[2]} pixels; both must be multiples of {self.factor}"
            )
        # On CPUs torch convolves a single small picture by another kernel, whose sums differ in the last places.
        lone = len(frames) == 1 and frames.device.type == "cpu"
        with torch.autocast(frames.device.type, enabled=False):
            return self.encode_pixels(to_pixels(frames.expand(2, -1, -1, -1) if lone else frames)).float()[: len(frames)]


def to_pixels(frames: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1], the range of both families."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1.0
