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
from torch import Tensor, nn

from svam.contract import Foresight
from svam.models.autoencoder import Autoencoder
from svam.models.decoupler import Decoupler
from svam.models.generator import SamplerConfig, VideoForesight
from svam.models.teachers import Teacher
from svam.models.text import TextEncoder
from svam.models.tokens import to_grid
from svam.models.video import VideoModel

BRANCHES = ("geometric", "semantic")


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


class ForesightModel(VideoForesight):
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
        super().__init__(text, sampler, autoencoder, video)
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

    def entry_channels(self, entry: str) -> int:
        """Channels C of a context entry."""
        if entry == "one_step":
            return self.one_step_channels
        if entry in ("generated", "goal_frame"):
            return sum(self._teacher(b).channels for b in self.teachers)
        if entry == "observation":
            return self._teacher("semantic").channels
        return self._teacher(entry).channels

    def _teacher(self, branch: str) -> Teacher:
        if branch not in self.teachers:
            raise ValueError(f"the foresight model was assembled without its {branch} teacher")
        return self.teachers[branch]  # type: ignore[return-value]

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
