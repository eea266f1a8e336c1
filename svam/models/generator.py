"""Frame and instruction to one-step features F and multi-step generations V^: the video half of the foresight, assembled.

It knows neither teachers nor decouplers, so that editing those never generates anew. Source: S-VAM sections 3.2-3.3.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from svam.models.autoencoder import Autoencoder
from svam.models.text import TextEncoder
from svam.models.video import Generation, VideoModel

SENTENCES = 256
"""Sentences whose embedding is kept: a robot says the same one at every step, a published one is 40 kB."""


class SamplerConfig(BaseModel):
    """How the video model is read: which features, and how the multi-step generation is sampled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    up_blocks: int
    grid: int
    steps: int
    guidance: float
    bf16: bool


class VideoForesight(nn.Module):
    """The frozen text encoder, autoencoder and video model. The last two may be absent; asking for an absent one raises."""

    def __init__(
        self,
        text: TextEncoder,
        sampler: SamplerConfig,
        autoencoder: Autoencoder | None = None,
        video: VideoModel | None = None,
    ) -> None:
        super().__init__()
        self.text = text
        self.sampler = sampler
        self.autoencoder = autoencoder
        self.video = video
        self._embedded: OrderedDict[tuple[str, torch.device], Tensor] = OrderedDict()
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, sampler: SamplerConfig, folders: Mapping[str, Path]) -> VideoForesight:
        """Load `folders["text"]`, `folders["autoencoder"]` and `folders["video"]`.

        Raises:
            ValueError: a part is missing or truncated; the message names its folder.
        """
        return cls(
            TextEncoder.load(folders["text"]), sampler,
            Autoencoder.load(folders["autoencoder"]), VideoModel.load(folders["video"]),
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where the parts live."""
        return next(self.parameters()).device

    @property
    def video_model(self) -> VideoModel:
        """The video model; raises `ValueError` where the foresight was assembled without it."""
        if self.video is None:
            raise ValueError("the foresight model was assembled without its video model")
        return self.video

    def _autoencoder(self) -> Autoencoder:
        if self.autoencoder is None:
            raise ValueError("the foresight model was assembled without its autoencoder")
        return self.autoencoder

    @property
    def one_step_channels(self) -> int:
        """C_F, the channels of the one-step features."""
        return self.video_model.feature_channels(self.sampler.up_blocks)

    def embed_text(self, instructions: Sequence[str]) -> Tensor:
        """(B, L, D) float32 tokens; equal instructions are embedded once, and each alone, so that an instruction's bits do
        not depend on what came with it. The last `SENTENCES` are kept: the text encoder is frozen."""
        device, found = self.device, {}
        for instruction in sorted(set(instructions)):
            key = (instruction, device)
            if key not in self._embedded:
                self._embedded[key] = self.text.embed([instruction])
                if len(self._embedded) > SENTENCES:
                    self._embedded.popitem(last=False)
            self._embedded.move_to_end(key)
            found[instruction] = self._embedded[key]
        return torch.cat([found[instruction] for instruction in instructions])

    @torch.no_grad()
    def prepare(self, frames_BHWC: Tensor, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(condition latents (B, c, h', w'), text (B, L, D)) of observed uint8 frames."""
        return self._autoencoder().encode_condition(frames_BHWC.to(self.device)), self.embed_text(instructions)

    @torch.no_grad()
    def one_step(self, condition: Tensor, text: Tensor, noise: Tensor) -> Tensor:
        """F (B, T, h, w, C) float32; see `VideoModel.one_step`."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.sampler.bf16):
            return self.video_model.one_step(condition, text, noise, self.sampler.up_blocks, self.sampler.grid).float()

    @torch.no_grad()
    def generate(self, condition: Tensor, text: Tensor, noise: Tensor) -> Generation:
        """F, V^ and the one-step prediction from the same noise; see `VideoModel.generate`."""
        s = self.sampler
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=s.bf16):
            return self.video_model.generate(condition, text, noise, s.steps, s.guidance, s.up_blocks, s.grid)

    @torch.no_grad()
    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """(B, T, H, W, 3) uint8 pixels of latent clips."""
        batch = len(latents_BTCHW)
        frames = self._autoencoder().decode_u8(latents_BTCHW.flatten(0, 1).float(), frames=latents_BTCHW.shape[1])
        return frames.reshape(batch, -1, *frames.shape[1:])

    @torch.no_grad()
    def reconstruct(self, frames_BHWC: Tensor) -> Tensor:
        """(B, H, W, 3) uint8: frames through the autoencoder and back, as generated frames come out of it."""
        autoencoder = self._autoencoder()
        return autoencoder.decode_u8(autoencoder.encode(frames_BHWC.to(self.device)))
