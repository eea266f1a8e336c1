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

from svam.contract import ContractError, Foresight
from svam.device import branch_of_graph, sent
from svam.files import sha256_tree
from svam.models.autoencoder import Autoencoder, frames_within
from svam.models.decoupler import Decoupler
from svam.models.generator import VideoGenerator
from svam.models.teachers import Teacher, as_unit, to_grid
from svam.models.text import TextEncoder
from svam.models.video import SamplerConfig, VideoModel
from svam.models.views import apart, together
from svam.precision import mixed_precision
from svam.seeds import seed_of

BRANCHES = ("geometric", "semantic")
Reference = Literal["frame", "reconstruction"]
"""What the teacher sees for the reference of the current frame: the frame itself, or its reconstruction by the autoencoder."""


@dataclass(frozen=True)
class FrozenParts:
    """Which frozen parts some context entries need; what is not needed is neither loaded, run nor saved."""

    video: bool = True
    teachers: tuple[str, ...] = ()
    decouplers: tuple[str, ...] = ()

    @classmethod
    def of_entries(cls, entries: Sequence[str]) -> FrozenParts:
        """The parts behind frozen entries of `train_policy.context`; `observation` is the frozen teachers' here. The video
        model says how long and how dense the clips of `recorded` are."""
        decouplers = tuple(b for b in BRANCHES if b in entries)
        teachers = BRANCHES if {"generated", "goal_frame", "recorded", "observation"} & set(entries) else decouplers
        return cls(bool(set(entries) - {"observation"}), teachers, decouplers)

    @property
    def names(self) -> list[str]:
        """Part names in the order in which they are saved. Text always conditions the policy."""
        video = ["autoencoder", "video"] if self.video else []
        return ["text", *video, *(f"teacher_{b}" for b in self.teachers), *(f"decoupler_{b}" for b in self.decouplers)]


def part_folders(backbones: Path, video: Path, decouplers: Path | None = None) -> dict[str, Path]:
    """Part name -> the folder in which the pipeline's stages leave it. `decouplers` holds a folder for each branch."""
    folders = {"autoencoder": backbones / "autoencoder", "text": backbones / "text", "video": video}
    folders |= {f"teacher_{branch}": backbones / branch for branch in BRANCHES}
    return folders | ({f"decoupler_{branch}": decouplers / branch for branch in BRANCHES} if decouplers else {})


class ForesightModel(VideoGenerator):
    """The frozen parts. Any of them may be absent; asking for an entry that needs an absent part raises.

    `views`: the cameras V of an observation, whose pictures lie below one another, see `svam.models.views`. Those who use the
    model set it. What has no views in its name is computed of one camera's pictures at a time.
    """

    def __init__(
        self,
        text: TextEncoder,
        sampler: SamplerConfig,
        autoencoder: Autoencoder | None = None,
        video: VideoModel | None = None,
        teachers: Mapping[str, Teacher] | None = None,
        decouplers: Mapping[str, Decoupler] | None = None,
    ) -> None:
        """Raises `ContractError` if the decouplers were distilled with different references."""
        super().__init__(text, sampler, autoencoder, video)
        self.teachers = nn.ModuleDict(dict(teachers or {}))
        self.decouplers = nn.ModuleDict(dict(decouplers or {}))
        references = {branch: decoupler.config.reference for branch, decoupler in (decouplers or {}).items()}
        if len(set(references.values())) > 1:
            raise ContractError(
                f"the decouplers were distilled with different references, {references}; run cache_teacher and distill again"
            )
        self.reference: Reference = next(iter(references.values()), "frame")
        self.views = 1
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load_parts(
        cls, parts: FrozenParts, sampler: SamplerConfig, folders: Mapping[str, Path], video_sha256: str | None = None
    ) -> ForesightModel:
        """Load just `parts`, each from its own folder in `folders` (see `part_folders`).

        Args:
            video_sha256: of the video model that made the generated windows which these parts are to be used with.

        Raises:
            FileError: a part is missing or damaged; the message names its folder.
            ContractError: the video model is another one than `video_sha256`, or the decouplers have different references.
        """
        if video_sha256 is not None and sha256_tree(folders["video"]) != video_sha256:
            raise ContractError(f"{folders['video']}: not the video model that made the generated windows; run generate again")
        video = VideoModel.load(folders["video"]) if parts.video else None
        bound = None if video is None else frames_within(video.config.image_size)
        return cls(
            text=TextEncoder.load(folders["text"]),
            sampler=sampler,
            autoencoder=Autoencoder.load(folders["autoencoder"], bound) if parts.video else None,
            video=video,
            teachers={b: Teacher.load(folders[f"teacher_{b}"]) for b in parts.teachers},
            decouplers={b: Decoupler.load(folders[f"decoupler_{b}"]) for b in parts.decouplers},
        )

    def _under_autocast(self) -> list[nn.Module]:
        return [*super()._under_autocast(), self.decouplers]

    def part(self, name: str) -> nn.Module:
        """A part by its name in `FrozenParts.names`; every one has `save(directory)`."""
        kind, _, branch = name.partition("_")
        if not branch:
            return self.video_model if name == "video" else self.frame_autoencoder if name == "autoencoder" else self.text
        return {"teacher": self.teachers, "decoupler": self.decouplers}[kind][branch]

    def _teacher(self, branch: str) -> Teacher:
        if branch not in self.teachers:
            raise ValueError(f"the foresight model was assembled without its {branch} teacher")
        return self.teachers[branch]  # type: ignore[return-value]

    def sees_clips(self, branch: str) -> bool:
        """Whether what the teacher says of a frame depends on the clip around it."""
        return self._teacher(branch).sees_clips

    @torch.no_grad()
    def teacher_features(self, branch: str, frames_BHWC: Tensor, length: int = 1) -> Tensor:
        """(B, h, w, C) float32 patch tokens of uint8 frames, on the sampler's grid; `length` as in `Teacher.features`."""
        return to_grid(self._teacher(branch).features(as_unit(frames_BHWC.to(self.device)), length), self.sampler.grid)

    @torch.no_grad()
    def clip_features(self, branch: str, clips_BTHWC: Tensor) -> Tensor:
        """(B, T, h, w, C) float32 patch tokens of uint8 clips, on the sampler's grid."""
        return to_grid(self._teacher(branch).clip_features(as_unit(clips_BTHWC.to(self.device))), self.sampler.grid)

    def _as_reference(self, frames_BHWC: Tensor) -> Tensor:
        return self.reconstruct(frames_BHWC) if self.reference == "reconstruction" else frames_BHWC

    def teacher_tokens(self, clips_BTHWC: Tensor) -> Tensor:
        """All teachers' tokens of uint8 clips, side by side on channels: (B, T, h, w, C) float32."""
        return torch.cat([self.clip_features(b, clips_BTHWC) for b in BRANCHES], dim=-1)

    def tokens_of_views(self, clips_BTHWC: Tensor) -> Tensor:
        """(B, T, V h, w, C) float32 of recorded clips (B, T, V H, W, 3) uint8 of all views: the context entry `recorded`."""
        return together(self.teacher_tokens(apart(clips_BTHWC, self.views)), self.views)

    def reference_features(self, branch: str, frames_BHWC: Tensor) -> Tensor:
        """Y^ref (B, h, w, C): the teacher on the current frame, or on its reconstruction (`cache_teacher.reference`)."""
        length = self.video.config.frames if self.video is not None else 1
        return self.teacher_features(branch, self._as_reference(frames_BHWC), length)

    def recorded_features(self, branch: str, clips_BTHWC: Tensor) -> Tensor:
        """(B, T, h, w, C): the teacher on recorded clips, whose frames are prepared as those of references are."""
        seen = torch.unflatten(self._as_reference(clips_BTHWC.flatten(0, 1)), 0, clips_BTHWC.shape[:2])
        return self.clip_features(branch, seen)

    @torch.no_grad()
    def decouple(self, branch: str, features: Tensor, reference: Tensor) -> Tensor:
        """(B, T, h, w, C_i) float32 foresight of one branch, in the teacher's units."""
        with mixed_precision(self.device, self.sampler.bf16):
            return self.decouplers[branch](features, reference).float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(
        self, frames_BHWC: Tensor, instructions: Sequence[str], entries: Sequence[str], noise_seeds: Sequence[int]
    ) -> Foresight:
        """Observed frames and instructions to context entries.

        Args:
            frames_BHWC: (B, V H, W, 3) uint8 of the foresight cameras.
            entries: names of `train_policy.context`, but for `recorded`, which no frame tells; `observation` here means the
                frozen teachers' tokens.
            noise_seeds: one per observation, used where the video model draws fresh noise: another for each camera.
        """
        text = self.embed_text(instructions)
        seeds = [seed_of(seed, "camera", k) if k else seed for seed in noise_seeds for k in range(self.views)]
        noise = self.video_model.initial_noise(seeds) if FrozenParts.of_entries(entries).video else None
        return Foresight(entries=self.foresee(sent(frames_BHWC, self.device), text, noise, entries), text=text)

    @torch.no_grad()
    def foresee(self, frames_BHWC: Tensor, text: Tensor, noise: Tensor | None, entries: Sequence[str]) -> dict[str, Tensor]:
        """What `encode` computes, from tensors on the device alone: frames, sentences as `embed_text` gives them, and the video
        model's initial noise (B V, T, c, h', w'), None where the entries need no video model.

        While a CUDA graph is captured (`svam.models.control`), what teachers see of the frames becomes a branch of the graph,
        which runs beside the video model.
        """
        parts, frames_BHWC = FrozenParts.of_entries(entries), apart(frames_BHWC, self.views)
        text = text if self.views == 1 else text.repeat_interleave(self.views, dim=0)
        encoded, references = dict[str, Tensor](), dict[str, Tensor]()
        with branch_of_graph(self.device) as joined:
            if "observation" in entries:
                encoded["observation"] = self.teacher_tokens(frames_BHWC[:, None])
            for branch in parts.decouplers:
                references[branch] = self.reference_features(branch, frames_BHWC)
        if noise is not None:
            condition = self.condition(frames_BHWC)
            if "generated" in entries or "goal_frame" in entries:
                generation = self.generate(condition, text, noise)
                features = generation.features
                encoded |= self._generated(generation.latents, entries)
            else:
                features = self.one_step(condition, text, noise)
            if "one_step" in entries:
                encoded["one_step"] = features
        joined()
        for branch, reference in references.items():
            encoded[branch] = self.decouple(branch, features, reference)
        return {e: together(encoded[e], self.views) for e in entries if e in encoded}

    def _generated(self, latents: Tensor, entries: Sequence[str]) -> dict[str, Tensor]:
        """Teacher features of the generated clip (multi-step VAM) and of its last frame (SuSIE-like)."""
        whole = "generated" in entries or any(map(self.sees_clips, self.teachers))
        tokens = self.teacher_tokens(self.decode(latents if whole else latents[:, -1:]))
        return {"generated": tokens, "goal_frame": tokens[:, -1:]}
