"""What differs between families of vision models: the library's class, statistics, special tokens, and what they see of a clip.

A family is one entry of `FAMILIES`; everything else is `svam.models.teachers.Teacher`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import transformers
from torch import Tensor

from svam.models.depth_anything_3 import DepthAnything3, Stage
from svam.models.published import load_strict, save_published

Family = Literal[
    "dinov2", "dinov2_registers", "dinov3", "clip", "siglip2", "depth_anything_v2", "depth_anything_3", "videomae", "vjepa2"
]
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: Statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _last_hidden_state(model: Any, pixels: Tensor, **options: Tensor) -> Tensor:
    tokens: Tensor = model(pixels, **options).last_hidden_state
    return tokens


def _last_feature_map(model: Any, pixels: Tensor) -> Tensor:
    tokens: Tensor = model.backbone(pixels).feature_maps[-1]
    return tokens


def _clip_tokens(model: Any, pixels: Tensor) -> Tensor:
    """CLIP's last norm, which the library applies to the class token alone, on all tokens."""
    tokens: Tensor = model.post_layernorm(model(pixels, interpolate_pos_encoding=True).last_hidden_state)
    return tokens


def _siglip_tokens(model: Any, pixels: Tensor) -> Tensor:
    tokens: Tensor = model(pixels, interpolate_pos_encoding=True).last_hidden_state
    return tokens


def _vjepa2_tokens(model: Any, pixels: Tensor) -> Tensor:
    tokens: Tensor = model.get_vision_features(pixels)
    return tokens


@dataclass(frozen=True)
class VisionFamily:
    """One family.

    library: its class in transformers; what it reads: `svam.models.layouts.TEACHERS`. sees: of a clip `frames`, each alone;
    `views`, all frames as views of one scene, of which there may be one; or `video`, all frames as they follow one another.
    statistics: mean and deviation of the channels with which it was published. special: tokens before those of patches, beside
    the registers that the config counts. fixed: the config's name of the only side in pixels that the model takes, where there
    is one. ignored: prefixes of published weights that belong to other parts.
    sequence: (model, pixels (B, 3, S, S), or (B, T, 3, S, S) unless it sees `frames`) -> tokens (B, N, channels).
    """

    library: str
    sees: Literal["frames", "views", "video"] = "frames"
    statistics: Statistics = IMAGENET
    special: int = 1
    fixed: str | None = None
    ignored: tuple[str, ...] = ()
    sequence: Callable[..., Tensor] = _last_hidden_state

    def load(self, folder: Path, ignored: tuple[str, ...] = ()) -> Any:
        """The frozen model of `folder`, whose weights must fit but for those of the prefixes `ignored`. Raises `FileError`."""
        return load_strict(getattr(transformers, self.library), folder, ignored)

    def load_published(self, folder: Path, stage: Stage) -> Any:
        """The frozen published model of `folder`, up to `stage` where it has several depths to read. Raises `FileError`."""
        return self.load(folder, self.ignored)

    def save(self, model: Any, folder: Path) -> None:
        """Write what `load` reads."""
        save_published(model, folder)


class _DepthAnything3(VisionFamily):
    """Not in transformers, with a layout of its own."""

    def load(self, folder: Path, ignored: tuple[str, ...] = ()) -> Any:
        return DepthAnything3.load(folder)

    def load_published(self, folder: Path, stage: Stage) -> Any:
        return DepthAnything3.load(folder, stage)

    def save(self, model: Any, folder: Path) -> None:
        model.save(folder)


FAMILIES: dict[str, VisionFamily] = {
    # Oquab et al. 2023, arXiv 2304.07193; Darcet et al. 2024, arXiv 2309.16588; Simeoni et al. 2025, arXiv 2508.10104
    "dinov2": VisionFamily("Dinov2Model"),
    "dinov2_registers": VisionFamily("Dinov2WithRegistersModel"),
    "dinov3": VisionFamily("DINOv3ViTModel"),
    # Radford et al. 2021, arXiv 2103.00020
    "clip": VisionFamily(
        "CLIPVisionModel", statistics=CLIP, sequence=_clip_tokens,
        ignored=("text_model.", "visual_projection.", "text_projection.", "logit_scale"),
    ),
    # Tschannen et al. 2025, arXiv 2502.14786: the models of one size, which are in the layout of the first SigLIP
    "siglip2": VisionFamily(
        "SiglipVisionModel", statistics=HALF, special=0, sequence=_siglip_tokens,
        ignored=("text_model.", "logit_scale", "logit_bias"),
    ),
    # Yang et al. 2024, arXiv 2406.09414: its backbone is a DINOv2
    "depth_anything_v2": VisionFamily("DepthAnythingForDepthEstimation", sequence=_last_feature_map),
    "depth_anything_3": _DepthAnything3("", sees="views", special=0, sequence=DepthAnything3.__call__),
    # Tong et al. 2022, arXiv 2203.12602: pretrained, or with a classifier
    "videomae": VisionFamily(
        "VideoMAEModel", sees="video", special=0, fixed="image_size",
        ignored=("decoder.", "encoder_to_decoder.", "mask_token", "position_embeddings", "fc_norm.", "classifier."),
    ),
    # Assran et al. 2025, arXiv 2506.09985
    "vjepa2": VisionFamily(
        "VJEPA2Model", sees="video", special=0, fixed="crop_size", sequence=_vjepa2_tokens,
        ignored=("pooler.", "classifier."),
    ),
}  # fmt: skip
"""By their names in params."""
