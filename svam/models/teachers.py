"""Vision foundation models as teachers: patch tokens for distillation, and a dense prediction to judge them by.

Families: `dinov2`, `dinov2_registers` (Oquab et al. 2023; Darcet et al. 2024) and `depth_anything_v2` (Yang et al. 2024,
whose backbone is a DINOv2). Published or small and in-domain, they are the same classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DepthAnythingForDepthEstimation, Dinov2Model, Dinov2WithRegistersModel

from svam.checkpoint import load_tensors, restore, save_tensors
from svam.contract import ContractError
from svam.files import FileError
from svam.models.published import freeze, load_strict, read_adapter, save_published, write_adapter

Family = Literal["dinov2", "dinov2_registers", "depth_anything_v2"]
Objective = Literal["depth", "segmentation", "self_supervised"]
Backbone: TypeAlias = Dinov2Model | Dinov2WithRegistersModel | DepthAnythingForDepthEstimation
CLASSES: dict[str, type[Backbone]] = {
    "dinov2": Dinov2Model,
    "dinov2_registers": Dinov2WithRegistersModel,
    "depth_anything_v2": DepthAnythingForDepthEstimation,
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's channel statistics, with which every family here was published."""
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
    frames alike."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Backbone, config: TeacherConfig) -> None:
        """Raises `ContractError` if the image size is no multiple of the model's patch."""
        super().__init__()
        self.model = model
        self.config = config
        vit = model.config.backbone_config if config.family == "depth_anything_v2" else model.config
        patch = vit.patch_size
        self.patch = int(patch if isinstance(patch, int) else patch[0])
        self.channels = int(vit.hidden_size)
        self.special = 1 + int(getattr(vit, "num_register_tokens", 0))
        if config.image_size % self.patch:
            raise ContractError(
                f"teacher: image_size {config.image_size} is no multiple of the model's patch of {self.patch} pixels"
            )
        if config.family == "depth_anything_v2" and model.config.backbone_config.out_indices[-1] != vit.num_hidden_layers:
            raise ContractError(
                f"teacher: the depth model reads layers {model.config.backbone_config.out_indices}, expected the last of them "
                f"to be the final layer, {vit.num_hidden_layers}"
            )
        self.head = nn.Linear(self.channels, config.outputs * self.patch**2) if config.outputs else None
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    @property
    def grid(self) -> int:
        return self.config.image_size // self.patch

    @classmethod
    def load(cls, folder: Path) -> Teacher:
        """Read what `save` wrote. Raises `FileError` for missing, broken or unfitting files."""
        folder = Path(folder)
        record = read_adapter(folder, "teacher")
        if record.get("family") not in CLASSES:
            raise FileError(f"{folder}/svam.json: family is {record.get('family')!r}, expected one of {sorted(CLASSES)}")
        teacher = cls(load_strict(CLASSES[record["family"]], folder), TeacherConfig(**record))
        if teacher.head is not None:
            restore(teacher.head, load_tensors(folder / "head.safetensors"), folder / "head.safetensors")
        return freeze(teacher)

    @classmethod
    def load_published(cls, folder: Path, family: Family, image_size: int) -> Teacher:
        """Read published weights in the transformers layout, to be fed frames of `image_size` pixels."""
        return freeze(cls(load_strict(CLASSES[family], Path(folder)), TeacherConfig(family, image_size)))

    def save(self, folder: Path) -> None:
        """Write the published layout, the dense head where there is one, and `svam.json` into an existing folder."""
        save_published(self.model, Path(folder))
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
    def features(self, frames: Tensor) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> patch tokens (B, g, g, channels) float32 of the last layer, after its layer norm."""
        with torch.autocast(frames.device.type, enabled=False):
            return self.tokens(self.prepare(frames.float()))

    @torch.no_grad()
    def predict(self, frames: Tensor) -> Tensor:
        """The dense prediction at the frames' own size, float32.

        Depth: (B, H, W), in-domain metres up to FARTHEST (published Depth Anything: relative inverse depth). Segmentation:
        class logits (B, K, H, W). Self-supervised: reconstructed, normalised pixels (B, 3, H, W).

        Raises:
            ContractError: published DINOv2 has no dense head.
        """
        with torch.autocast(frames.device.type, enabled=False):
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
        """`look`, for example `features`, on uint8 frames, `batch` at a time: (B, ...) on the CPU."""
        parts = torch.split(frames_BHWC, batch)
        return torch.cat([look(as_unit(part.to(self.mean.device))).cpu() for part in parts])

    def tokens(self, pixels: Tensor, masked: Tensor | None = None) -> Tensor:
        """Prepared pixels -> (B, g, g, channels), with gradients; `masked` (B, g * g) bool hides patches (DINOv2 only)."""
        if isinstance(self.model, DepthAnythingForDepthEstimation):
            return self._to_grid(self.model.backbone(pixels).feature_maps[-1])
        return self._to_grid(self.model(pixels, bool_masked_pos=masked).last_hidden_state)

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


def as_unit(frames_BHWC: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return frames_BHWC.permute(0, 3, 1, 2).float() / 255.0


def unpatchify(values: Tensor, patch: int) -> Tensor:
    """(B, g, g, K * patch * patch) -> (B, K, g * patch, g * patch)."""
    return F.pixel_shuffle(values.permute(0, 3, 1, 2), patch)


def to_grid(tokens: Tensor, grid: int) -> Tensor:
    """(B, g, g', C) float tokens resized bilinearly (antialiased) to (B, grid, grid, C); untouched where that is its grid."""
    if tokens.shape[1:3] == (grid, grid):
        return tokens
    return F.interpolate(tokens.permute(0, 3, 1, 2), (grid, grid), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
