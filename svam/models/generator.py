"""Frame and instruction to one-step features F and multi-step generations V^: text encoder, autoencoder and video model.

Nothing here knows of teachers or decouplers, so that an edit of those does not generate anew. Source: S-VAM sections 3.2-3.3.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from svam.device import compile_layers, computes_beside
from svam.models.autoencoder import Autoencoder
from svam.models.text import TextEncoder
from svam.models.video import Generation, SamplerConfig, VideoModel
from svam.precision import computes_bfloat16, mixed_precision, round_weights

SENTENCES = 256
"""Embeddings that are remembered: a robot is told the same sentence at every step; a published embedding is 40 kB."""


class VideoGenerator(nn.Module):
    """The frozen text encoder, autoencoder and video model. The last two may be absent; to use an absent one raises."""

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
        self._embedded: OrderedDict[tuple[str, torch.device, bool], Tensor] = OrderedDict()
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, sampler: SamplerConfig, folders: Mapping[str, Path], batch: int | None = None) -> VideoGenerator:
        """Load `folders["text"]`, `folders["autoencoder"]` (for `batch` frames at a time) and `folders["video"]`.

        Raises:
            FileError: a part is missing or damaged; the message names its folder.
        """
        autoencoder, video = Autoencoder.load(folders["autoencoder"], batch), VideoModel.load(folders["video"])
        return cls(TextEncoder.load(folders["text"]), sampler, autoencoder, video)

    def frozen_on(self, device: torch.device, compiled: bool = False) -> Self:
        """Move to `device`. Where the sampler computes in bfloat16, the weights of what runs under its autocast are stored so
        (`round_weights`), and the device never holds them in float32. `compiled`: on a GPU they are compiled, each for the
        shapes that it meets."""
        rounded = self.sampler.bf16 and computes_bfloat16(device)
        for part in self._under_autocast():
            if rounded:
                round_weights(part)
            if compiled and computes_beside(device):
                compile_layers(part)
        return self.to(device)

    def _under_autocast(self) -> list[nn.Module]:
        """Video model and decouplers, which is also what takes the time: text encoder, autoencoder and teachers are small."""
        return [] if self.video is None else [self.video]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def video_model(self) -> VideoModel:
        """The video model; raises `ValueError` where there is none."""
        if self.video is None:
            raise ValueError("the foresight model was assembled without its video model")
        return self.video

    @property
    def frame_autoencoder(self) -> Autoencoder:
        """The autoencoder; raises `ValueError` where there is none."""
        if self.autoencoder is None:
            raise ValueError("the foresight model was assembled without its autoencoder")
        return self.autoencoder

    def embed_text(self, instructions: Sequence[str], pooled: bool = False) -> Tensor:
        """(B, L, D) float32 tokens, or `pooled` ones, (B, 1, D). Each instruction is embedded alone, so that its bits do not
        depend on those beside it, and once: the last `SENTENCES` embeddings are remembered."""
        device, tokens = self.device, {}
        for instruction in sorted(set(instructions)):
            key = (instruction, device, pooled)
            if key not in self._embedded:
                self._embedded[key] = self.text.pool([instruction]) if pooled else self.text.embed([instruction])
                if len(self._embedded) > SENTENCES:
                    self._embedded.popitem(last=False)
            self._embedded.move_to_end(key)
            tokens[instruction] = self._embedded[key]
        return torch.cat([tokens[instruction] for instruction in instructions])

    @torch.no_grad()
    def condition(self, frames_BHWC: Tensor) -> Tensor:
        """Latents (B, c, h', w') of observed uint8 frames, as the video model is conditioned on them."""
        autoencoder = self.frame_autoencoder
        return autoencoder.condition_of(autoencoder.encode(frames_BHWC.to(self.device)))

    @torch.no_grad()
    def one_step(self, condition: Tensor, text: Tensor, noise: Tensor) -> Tensor:
        """F (B, T, h, w, C) float32; see `VideoModel.one_step`."""
        with mixed_precision(self.device, self.sampler.bf16):
            return self.video_model.one_step(condition, text, noise, self.sampler)

    @torch.no_grad()
    def generate(self, condition: Tensor, text: Tensor, noise: Tensor) -> Generation:
        """F, V^ and the one-step prediction from the same noise; see `VideoModel.generate`."""
        with mixed_precision(self.device, self.sampler.bf16):
            return self.video_model.generate(condition, text, noise, self.sampler)

    @torch.no_grad()
    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """(B, T, H, W, 3) uint8 pixels of latent clips."""
        batch = len(latents_BTCHW)
        frames = self.frame_autoencoder.decode_u8(latents_BTCHW.flatten(0, 1).float(), frames=latents_BTCHW.shape[1])
        return frames.reshape(batch, -1, *frames.shape[1:])

    @torch.no_grad()
    def reconstruct(self, frames_BHWC: Tensor) -> Tensor:
        """(B, H, W, 3) uint8: frames through the autoencoder and back, as generated frames come out of it."""
        autoencoder = self.frame_autoencoder
        return autoencoder.decode_u8(autoencoder.encode(frames_BHWC.to(self.device)))
