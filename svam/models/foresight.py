"""Frame and instruction to foresight: the frozen half of S-VAM, assembled.

Caching, training, simulation and serving all call the same `encode`, so they cannot disagree. Nothing here knows of
perceivers or policies. Source: S-VAM sections 3.2-3.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from svam.contract import Foresight
from svam.models.autoencoder import Autoencoder
from svam.models.decoupler import Decoupler
from svam.models.teachers import Teacher
from svam.models.text import TextEncoder
from svam.models.tokens import to_grid
from svam.models.video import Generation, VideoModel

BRANCHES = ("geometric", "semantic")


class SamplerConfig(BaseModel):
    """How the video model is read: which features, and how the multi-step generation is sampled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    up_blocks: int
    grid: int
    steps: int
    guidance: float
    bf16: bool


@dataclass(frozen=True)
class Needs:
    """Which frozen parts a list of context entries needs; what is not needed is neither loaded, run nor saved."""

    video: bool
    teachers: tuple[str, ...]
    decouplers: tuple[str, ...]

    @property
    def parts(self) -> list[str]:
        """Part names in the order in which they are saved. Text always conditions the policy."""
        return (
            ["text"] + ["autoencoder", "video"] * self.video
            + [f"teacher_{b}" for b in self.teachers] + [f"decoupler_{b}" for b in self.decouplers]
        )  # fmt: skip


def needs_of(entries: Sequence[str], frozen_observation: bool = False) -> Needs:
    """The parts that `entries` of `train_policy.context` need. A trained observation encoder needs none of them."""
    distilled = tuple(b for b in BRANCHES if b in entries)
    generated = "generated" in entries or "goal_frame" in entries
    teachers = set(BRANCHES) if generated else set(distilled)
    if frozen_observation and "observation" in entries:
        teachers.add("semantic")
    video = generated or bool(distilled) or "one_step" in entries
    return Needs(video=video, teachers=tuple(b for b in BRANCHES if b in teachers), decouplers=distilled)


class ForesightModel(nn.Module):
    """The frozen parts. Any of them may be absent; asking for an entry that needs an absent part raises."""

    def __init__(
        self,
        text: TextEncoder,
        sampler: SamplerConfig,
        autoencoder: Autoencoder | None = None,
        video: VideoModel | None = None,
        teachers: Mapping[str, Teacher] | None = None,
        decouplers: Mapping[str, Decoupler] | None = None,
        reference: Literal["frame", "reconstruction"] = "reconstruction",
    ) -> None:
        super().__init__()
        self.text = text
        self.sampler = sampler
        self.autoencoder = autoencoder
        self.video = video
        self.teachers = nn.ModuleDict(dict(teachers or {}))
        self.decouplers = nn.ModuleDict(dict(decouplers or {}))
        self.reference: Literal["frame", "reconstruction"] = reference
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load_parts(
        cls,
        needs: Needs,
        sampler: SamplerConfig,
        folders: Mapping[str, Path],
        reference: Literal["frame", "reconstruction"] = "reconstruction",
    ) -> ForesightModel:
        """Load just the parts of `needs`; `folders` maps part names (`Needs.parts`) to their directories.

        Raises:
            ValueError: a part is missing or truncated; the message names its folder.
        """
        return cls(
            text=TextEncoder.load(folders["text"]),
            sampler=sampler,
            autoencoder=Autoencoder.load(folders["autoencoder"]) if needs.video else None,
            video=VideoModel.load(folders["video"]) if needs.video else None,
            teachers={b: Teacher.load(folders[f"teacher_{b}"]) for b in needs.teachers},
            decouplers={b: Decoupler.load(folders[f"decoupler_{b}"]) for b in needs.decouplers},
            reference=reference,
        )

    def part(self, name: str) -> nn.Module:
        """A part by its name in `Needs.parts`; every one has `save(directory)`."""
        kind, _, branch = name.partition("_")
        found = {"teacher": self.teachers, "decoupler": self.decouplers}[kind][branch] if branch else getattr(self, name)
        if found is None:
            raise ValueError(f"the foresight model was assembled without its {name}")
        return found

    @property
    def device(self) -> torch.device:
        """Where the parts live."""
        return next(self.parameters()).device

    def entry_channels(self, entry: str) -> int:
        """Channels C of a context entry."""
        if entry == "one_step":
            return self.video_model.feature_channels(self.sampler.up_blocks)
        if entry in ("generated", "goal_frame"):
            return sum(self._teacher(b).channels for b in self.teachers)
        if entry == "observation":
            return self._teacher("semantic").channels
        return self._teacher(entry).channels

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

    def _teacher(self, branch: str) -> Teacher:
        if branch not in self.teachers:
            raise ValueError(f"the foresight model was assembled without its {branch} teacher")
        return self.teachers[branch]  # type: ignore[return-value]

    def embed_text(self, instructions: Sequence[str]) -> Tensor:
        """(B, L, D) float32 tokens; equal instructions are embedded once, and each alone, so that an instruction's bits do
        not depend on what came with it."""
        unique = sorted(set(instructions))
        tokens = torch.cat([self.text.embed([instruction]) for instruction in unique])
        return tokens[[unique.index(i) for i in instructions]]

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

    @torch.no_grad()
    def teacher_features(self, branch: str, frames_BHWC: Tensor) -> Tensor:
        """(B, h, w, C) float32 patch tokens of uint8 frames, on the sampler's grid."""
        images = frames_BHWC.to(self.device).permute(0, 3, 1, 2).float() / 255.0
        tokens = self._teacher(branch).features(images).float()
        return to_grid(tokens, self.sampler.grid)

    def reference_features(self, branch: str, frames_BHWC: Tensor) -> Tensor:
        """Y^ref (B, h, w, C): the teacher on the current frame, or on its reconstruction (`cache_teacher.reference`)."""
        seen = self.reconstruct(frames_BHWC) if self.reference == "reconstruction" else frames_BHWC
        return self.teacher_features(branch, seen)

    @torch.no_grad()
    def decouple(self, branch: str, features: Tensor, reference: Tensor) -> Tensor:
        """(B, T, h, w, C_i) float32 foresight of one branch, in the teacher's units."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.sampler.bf16):
            return self.decouplers[branch](features, reference).float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(
        self,
        frames_BHWC: Tensor,
        instructions: Sequence[str],
        entries: Sequence[str],
        noise_seeds: list[int] | None = None,
    ) -> Foresight:
        """Observed frames and instructions to the asked context entries.

        Args:
            frames_BHWC: (B, H, W, 3) uint8 of the foresight camera.
            entries: names of `train_policy.context`; `observation` here means the frozen encoder's tokens.
            noise_seeds: one per observation, used where the video model draws fresh noise.
        """
        frames = frames_BHWC.to(self.device)
        needs = needs_of(entries, frozen_observation=True)
        found: dict[str, Tensor] = {}
        if "observation" in entries:
            found["observation"] = self.teacher_features("semantic", frames)[:, None]
        if not needs.video:
            return Foresight(entries=found, text=self.embed_text(instructions))
        condition, text = self.prepare(frames, instructions)
        noise = self.video_model.initial_noise(noise_seeds if noise_seeds is not None else len(frames))
        if "generated" in entries or "goal_frame" in entries:
            generation = self.generate(condition, text, noise)
            features = generation.features
            found |= self._generated(generation.latents, entries)
        else:
            features = self.one_step(condition, text, noise)
        if "one_step" in entries:
            found["one_step"] = features
        for branch in needs.decouplers:
            found[branch] = self.decouple(branch, features, self.reference_features(branch, frames))
        return Foresight(entries={e: found[e] for e in entries if e in found}, text=text)

    def _generated(self, latents: Tensor, entries: Sequence[str]) -> dict[str, Tensor]:
        """Teacher features of the generated clip (multi-step VAM) and of its last frame (SuSIE-like)."""
        found: dict[str, Tensor] = {}
        clips = self.decode(latents if "generated" in entries else latents[:, -1:])
        batch, frames = clips.shape[:2]
        tokens = torch.cat([self.teacher_features(b, clips.flatten(0, 1)) for b in self.teachers], dim=-1)
        tokens = tokens.reshape(batch, frames, *tokens.shape[1:])
        if "generated" in entries:
            found["generated"] = tokens
        if "goal_frame" in entries:
            found["goal_frame"] = tokens[:, -1:]
        return found
