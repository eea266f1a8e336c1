"""Vision foundation models as teachers: patch tokens for distillation, and a dense prediction to judge them by.

Published or small and in-domain, they are the same classes; what differs between families is in `svam.models.families`. Every
teacher sees clips, (B, T, 3, H, W) -> (B, T, g, g, C), and single frames; most see a clip frame by frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DepthAnythingForDepthEstimation, PreTrainedModel

from svam.checkpoint import load_tensors, restore, save_tensors
from svam.contract import ContractError
from svam.files import FileError
from svam.models.depth_anything_3 import DepthAnything3, Stage
from svam.models.families import FAMILIES, Family
from svam.models.published import freeze, read_adapter, write_adapter

Objective = Literal["depth", "segmentation", "self_supervised"]
Backbone: TypeAlias = PreTrainedModel | DepthAnything3
FARTHEST = 10.0
"""Metres beyond which a depth is sky rather than scene: nothing a robot reaches for is that far."""


@dataclass(frozen=True)
class TeacherConfig:
    """What the adapter adds to the library's own config.

    image_size: side in pixels to which frames are resized. objective: what an in-domain teacher was trained on (None for
    published weights). outputs: channels of the linear dense head (0: no such head). inverse_mean, inverse_std: of the inverse
    depth in 1/metres over the training annotations; they scale the linear depth head. depth_std: metres, the deviation of the
    valid training depths, the unit of the relative depth error.
    """

    family: Family
    image_size: int
    objective: Objective | None = None
    outputs: int = 0
    inverse_mean: float = 0.0
    inverse_std: float = 1.0
    depth_std: float = 1.0


class Teacher(nn.Module):
    """One frozen vision model (S-VAM section 3.3); owns resizing and normalisation, so that every stage and serving prepare
    frames alike. Whatever the caller's autocast, it computes in float32, or with `bf16` under an autocast of its own."""

    model: Any
    mean: Tensor
    std: Tensor

    def __init__(self, model: Backbone, config: TeacherConfig) -> None:
        """Raises `ContractError` if the model does not take images of this size."""
        super().__init__()
        self.model = model
        self.config = config
        self.family = FAMILIES[config.family]
        vit: Any = model.config
        vit = vit.backbone_config if config.family == "depth_anything_v2" else vit
        patch = vit.patch_size
        self.patch = int(patch if isinstance(patch, int) else patch[0])
        self.channels = int(vit.hidden_size)
        self.special = self.family.special + int(getattr(vit, "num_register_tokens", 0))
        self.tubelet = int(getattr(vit, "tubelet_size", 1))
        self.frames: int | None = getattr(vit, "num_frames", None)
        fixed = getattr(vit, self.family.fixed) if self.family.fixed else config.image_size
        if config.image_size != fixed:
            raise ContractError(f"teacher: image_size {config.image_size}, but this {config.family} takes {fixed} pixels only")
        if config.image_size % self.patch:
            raise ContractError(
                f"teacher: image_size {config.image_size} is no multiple of the model's patch of {self.patch} pixels"
            )
        if config.family == "depth_anything_v2" and vit.out_indices[-1] != vit.num_hidden_layers:
            raise ContractError(
                f"teacher: the depth model reads layers {vit.out_indices}, expected the last of them to be the final layer, "
                f"{vit.num_hidden_layers}"
            )
        self.bf16 = False
        self.head = nn.Linear(self.channels, config.outputs * self.patch**2) if config.outputs else None
        for name, values in zip(("mean", "std"), self.family.statistics, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @property
    def grid(self) -> int:
        return self.config.image_size // self.patch

    @property
    def sees_clips(self) -> bool:
        """Whether tokens of a frame depend on the clip around it."""
        return self.family.sees != "frames"

    @classmethod
    def load(cls, folder: Path) -> Teacher:
        """Read what `save` wrote. Raises `FileError` for missing, broken or unfitting files."""
        folder = Path(folder)
        record = read_adapter(folder, "teacher")
        if record.get("family") not in FAMILIES:
            raise FileError(f"{folder}/svam.json: family is {record.get('family')!r}, expected one of {sorted(FAMILIES)}")
        teacher = cls(FAMILIES[record["family"]].load(folder), TeacherConfig(**record))
        if teacher.head is not None:
            restore(teacher.head, load_tensors(folder / "head.safetensors"), folder / "head.safetensors")
        return freeze(teacher)

    @classmethod
    def load_published(cls, folder: Path, family: Family, image_size: int, stage: Stage = "last") -> Teacher:
        """Read published weights, to be fed frames of `image_size` pixels.

        Args:
            stage: of Depth Anything 3, which of the four depths that its dense head reads.

        Raises:
            FileError: another family's layout, or files that are missing, broken or do not fit.
            ContractError: the model does not take images of this size.
        """
        return freeze(cls(FAMILIES[family].load_published(Path(folder), stage), TeacherConfig(family, image_size)))

    def save(self, folder: Path) -> None:
        """Write the published layout, the dense head where there is one, and `svam.json` into an existing folder."""
        self.family.save(self.model, Path(folder))
        if self.head is not None:
            save_tensors(Path(folder) / "head.safetensors", self.head.state_dict())
        write_adapter(Path(folder), "teacher", **asdict(self.config))

    def prepare(self, frames: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, S, S), resized (bicubic, antialiased) and normalised."""
        if frames.ndim != 4 or frames.shape[1] != 3 or not frames.is_floating_point():
            raise ContractError(
                f"teacher: frames are {frames.dtype} {tuple(frames.shape)}, expected float (B, 3, H, W) in [0, 1]"
            )
        side = self.config.image_size
        if frames.shape[-2:] != (side, side):
            frames = F.interpolate(frames, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0.0, 1.0)
        return (frames - self.mean) / self.std

    @torch.no_grad()
    def features(self, frames: Tensor, length: int = 1) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> patch tokens (B, g, g, channels) float32 of the last layer, after its layer norm.

        Args:
            length: frames of the clips beside whose tokens these are put. A model of video sees the frame so many times over, a
                clip in which nothing moves, and the tokens are the mean over it; the others see it once, Depth Anything 3 as
                the only view of its scene, as in S-VAM's released code.
        """
        with torch.autocast(frames.device.type, torch.bfloat16, self.bf16):
            pixels = self.prepare(frames.float())
            if not self.sees_clips:
                return self.tokens(pixels).float()
            still = pixels[:, None].expand(-1, length if self.family.sees == "video" else 1, -1, -1, -1)
            return self._clip_tokens(still).float().mean(dim=1)

    @torch.no_grad()
    def clip_features(self, clips: Tensor) -> Tensor:
        """(B, T, 3, H, W) float in [0, 1] -> patch tokens (B, T, g, g, channels) float32, each frame's as the model sees it in
        its clip. Where one token spans several frames, each of these has it (nothing is interpolated).

        Raises:
            ContractError: the model takes fewer frames than T.
        """
        if not self.sees_clips:
            return torch.unflatten(self.features(clips.flatten(0, 1)), 0, clips.shape[:2])
        with torch.autocast(clips.device.type, torch.bfloat16, self.bf16):
            return self._clip_tokens(torch.unflatten(self.prepare(clips.flatten(0, 1).float()), 0, clips.shape[:2])).float()

    def _clip_tokens(self, pixels: Tensor) -> Tensor:
        """Prepared (B, T, 3, S, S) -> (B, T, g, g, channels) of a model that sees clips."""
        length = pixels.shape[1]
        if self.frames is not None and length > self.frames:
            raise ContractError(
                f"teacher: clips have {length} frames, but this {self.config.family} takes {self.frames}; set "
                f"finetune_video.frames to {self.frames} or less"
            )
        shown, taken = spread(length, self.frames or -(-length // self.tubelet) * self.tubelet, self.tubelet)
        # Frame by frame: a list of numbers as an index would be a copy from the host, for which it waits.
        sequence = self.family.sequence(self.model, torch.stack([pixels[:, place] for place in shown], dim=1))
        tokens = torch.unflatten(sequence, 1, (-1, self.grid, self.grid))
        return torch.stack([tokens[:, place] for place in taken], dim=1)

    @torch.no_grad()
    def predict(self, frames: Tensor) -> Tensor:
        """The dense prediction at the frames' own size, float32.

        Depth: (B, H, W), in-domain metres up to FARTHEST (published Depth Anything: relative inverse depth). Segmentation:
        class logits (B, K, H, W). Self-supervised: reconstructed, normalised pixels (B, 3, H, W).

        Raises:
            ContractError: published DINOv2 has no dense head.
        """
        with torch.autocast(frames.device.type, torch.bfloat16, self.bf16):
            dense = self.dense(self.prepare(frames.float()))[0].float()
        if dense.shape[-2:] != frames.shape[-2:]:
            dense = F.interpolate(dense, frames.shape[-2:], mode="bilinear", align_corners=False)
        if self.config.objective == "depth":
            return 1.0 / dense[:, 0].clamp(min=1.0 / FARTHEST)
        return dense[:, 0] if self.config.family == "depth_anything_v2" else dense

    def annotate(self, frames: Tensor) -> Tensor:
        """`predict` in the form of the data's annotations: metres or classes (B, H, W)."""
        dense = self.predict(frames)
        return dense.argmax(dim=1) if self.config.objective == "segmentation" else dense

    def on_frames(self, frames_BHWC: Tensor, batch: int, look: Callable[[Tensor], Tensor]) -> Tensor:
        """`look`, for example `features`, on uint8 frames, or clips of frames, `batch` at a time: (B, ...) on the CPU."""
        parts = torch.split(frames_BHWC, batch)
        return torch.cat([look(as_unit(part.to(self.mean.device))).cpu() for part in parts])

    def tokens(self, pixels: Tensor, masked: Tensor | None = None) -> Tensor:
        """Prepared pixels (B, 3, S, S) -> (B, g, g, channels), with gradients; `masked` (B, g * g) bool hides patches (DINOv2
        only). To a model that sees clips each is one of a single frame."""
        if self.sees_clips:
            return self._clip_tokens(pixels[:, None])[:, 0]
        hidden = {} if masked is None else {"bool_masked_pos": masked}
        return self._to_grid(self.family.sequence(self.model, pixels, **hidden))

    def dense(self, pixels: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Prepared pixels -> (dense (B, K, S, S), patch tokens (B, g, g, channels)), with gradients, from one backbone pass.

        Depth is inverse here, in 1/metres.
        """
        if isinstance(self.model, DepthAnythingForDepthEstimation):
            maps = self.model.backbone(pixels).feature_maps
            dense: Tensor = self.model.head(self.model.neck(maps, self.grid, self.grid), self.grid, self.grid)[:, None]
            return dense, self._to_grid(maps[-1])
        if self.head is None:
            raise ContractError(f"teacher: {self.config.family} from published weights has no dense head to predict with")
        tokens = self.tokens(pixels, masked)
        dense = unpatchify(self.head(tokens), self.patch)
        if self.config.objective == "depth":
            dense = dense * self.config.inverse_std + self.config.inverse_mean
        return dense, tokens

    def _to_grid(self, sequence: Any) -> Tensor:
        """Drop class and register tokens of (B, special + g * g, channels)."""
        grid: Tensor = sequence[:, self.special :].unflatten(1, (self.grid, self.grid))
        return grid


def spread(length: int, frames: int, tubelet: int) -> tuple[list[int], list[int]]:
    """How a clip of `length` frames is shown to a model of `frames` >= `length`: (which frame of the clip each of the model's
    frames shows, which token in time each frame of the clip has). Missing frames are made up for by showing some again, evenly;
    tokens span `tubelet` frames, and a frame's is the one at the middle of where it is shown."""
    shown = [place * length // frames for place in range(frames)]
    return shown, [(2 * t + 1) * frames // (2 * length) // tubelet for t in range(length)]


def as_unit(frames_BHWC: Tensor) -> Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32 in [0, 1]."""
    return frames_BHWC.movedim(-1, -3).float() / 255.0


def unpatchify(values: Tensor, patch: int) -> Tensor:
    """(B, g, g, K * patch * patch) -> (B, K, g * patch, g * patch)."""
    return F.pixel_shuffle(values.permute(0, 3, 1, 2), patch)


def to_grid(tokens: Tensor, grid: int) -> Tensor:
    """(..., g, g', C) float tokens resized bilinearly (antialiased) to (..., grid, grid, C), untouched where they are on it."""
    if tokens.shape[-3:-1] == (grid, grid):
        return tokens
    flat = tokens.reshape(-1, *tokens.shape[-3:]).permute(0, 3, 1, 2)
    resized = F.interpolate(flat, (grid, grid), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    return resized.reshape(*tokens.shape[:-3], *resized.shape[1:])
