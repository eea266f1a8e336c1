"""All models of some params, by default on torch's meta device, where tensors have shapes and no values; and their FLOPs.

They are the pipeline's own classes; torch's counter reads the FLOPs of matrix products and convolutions off the pipeline's own
forward and backward passes. T frames, h w grid, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from svam.contract import SEGMENTATION_CLASSES, ActionConvention, Statistics, VectorStatistics
from svam.errors import ParamsError
from svam.models.autoencoder import Autoencoder
from svam.models.decoupler import Decoupler, DecouplerConfig
from svam.models.depth_anything_3 import DepthAnything3, DepthAnything3Config
from svam.models.foresight import BRANCHES
from svam.models.layouts import NETS
from svam.models.svam import Inputs, PolicyNetwork, Shape, SVAMConfig, frozen_entries
from svam.models.teachers import Teacher, TeacherConfig
from svam.models.video import SamplerConfig, VideoConfig, VideoModel, build_unet
from svam.params import Params, TeacherModel
from svam.presets.data import Data
from svam.simulation.metaworld import RATE_HZ
from svam.training.finetune_video import denoising_loss
from svam.training.prepare_backbones import autoencoder as own_autoencoder
from svam.training.prepare_backbones import teacher as own_teacher
from svam.training.prepare_backbones import text as own_text


def _large_depth_anything() -> DepthAnythingForDepthEstimation:
    vit = Dinov2Config(
        image_size=518, patch_size=14, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
        out_indices=[5, 12, 18, 24], reshape_hidden_states=False,
    )  # fmt: skip
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=vit, reassemble_hidden_size=1024, neck_hidden_sizes=[256, 512, 1024, 1024], fusion_hidden_size=256
        )
    )


PUBLISHED: dict[tuple[str, str], Callable[[], Any]] = {
    ("autoencoder", "stable-video-diffusion-img2vid"): lambda: AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512), layers_per_block=2
    ),
    ("unet", "stable-video-diffusion-img2vid"): lambda: UNetSpatioTemporalConditionModel(in_channels=8),
    ("text", "clip-vit-base-patch32"): lambda: CLIPTextModelWithProjection(CLIPTextConfig()),
    ("teacher", "dinov2-with-registers-base"): lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(image_size=518, patch_size=14)
    ),
    ("teacher", "Depth-Anything-V2-Large-hf"): _large_depth_anything,
    ("teacher", "DA3-LARGE"): lambda: DepthAnything3(DepthAnything3Config(**NETS["da3-large"], width=1024)),
}
"""(kind, last name of the path) -> the published model, untrained."""


def _published(kind: str, path: str | None, key: str) -> Any:
    name = Path(str(path)).name
    if (kind, name) not in PUBLISHED:
        known = ", ".join(other for of_kind, other in PUBLISHED if of_kind == kind)
        raise ParamsError(f"{key} is {path!r}; a plan knows the sizes of {known} alone: end the path with one of these names")
    return PUBLISHED[kind, name]()


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _flops(call: Callable[..., Tensor], *arguments: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*arguments)
    return int(counter.get_total_flops())


def _both_flops(loss: Callable[..., Tensor], *arguments: Any) -> tuple[int, int]:
    """Of the forward pass, and with the backward pass."""
    with FlopCounterMode(display=False) as counter:
        value = loss(*arguments).sum()
        forward = int(counter.get_total_flops())
        value.backward()  # type: ignore[no-untyped-call]
    return forward, int(counter.get_total_flops())


def _training_flops(loss: Callable[..., Tensor], *arguments: Any) -> int:
    return _both_flops(loss, *arguments)[1]


def _numbers(dimensions: int | None) -> VectorStatistics | None:
    """Statistics of numbers between -1 and 1."""
    low, zero, high = ([value] * (dimensions or 0) for value in (-1.0, 0.0, 1.0))
    return VectorStatistics(mean=zero, std=high, min=low, max=high, q01=low, q99=high, count=1) if dimensions else None


def _teacher(section: TeacherModel, key: str) -> Teacher:
    """Published, or as `svam.training.prepare_backbones.teacher.train` builds it."""
    if section.source == "pretrained":
        model, objective, outputs = _published("teacher", section.path, key), None, 0
        model = model.until(section.stage) if isinstance(model, DepthAnything3) else model
    else:
        model, objective = own_teacher.build(section), section.objective
        outputs = {"depth": 1, "segmentation": len(SEGMENTATION_CLASSES), "self_supervised": 3}[section.objective]
    outputs = 0 if section.family == "depth_anything_v2" else outputs
    return Teacher(model, TeacherConfig(section.family, section.image_size, objective, outputs))


class _FullTokenizer:
    """What `own_text.build` asks of a tokenizer, of so many tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.bos_token_id, self.eos_token_id, self.pad_token_id = tokens, tokens - 2, tokens - 1, tokens - 1

    def __len__(self) -> int:
        return self.tokens


class Models:
    """text, autoencoder, video, teachers, decouplers and policy, untrained. contrast: the CLIP whose text half is trained
    in-domain, or None. entries: frozen entries of the policy's context, and their shapes (T, h, w, C)."""

    def __init__(self, params: Params, data: Data, device: str = "meta") -> None:
        """Raises `ParamsError` for published weights of unknown size."""
        self.params, self.data, self.device = params, data, device
        backbones, video, grid = params.prepare_backbones, params.finetune_video, params.generate.grid
        self.sampler = SamplerConfig.model_validate(params.generate.model_dump(include=set(SamplerConfig.model_fields)))
        with torch.device(device):
            own, text = backbones.autoencoder, backbones.text
            vae: Any = (
                _published("autoencoder", own.path, "prepare_backbones.autoencoder") if own.source == "pretrained" else None
            )
            self.autoencoder = Autoencoder(vae or own_autoencoder.build(own, data.size)).to(device)
            self.contrast: Any = self._contrast() if text.source == "in_domain" else None
            clip = self.contrast.clip.text_model if self.contrast else _published("text", text.path, "prepare_backbones.text")
            self.text: Any = clip.to(device)
            height, width = (side // self.autoencoder.factor for side in data.size)
            config = VideoConfig(
                frames=video.frames, latent_channels=self.autoencoder.latent_channels, latent_size=(height, width),
                text_tokens=text.tokens, text_width=self.text.config.hidden_size, image_size=data.size, noise=video.noise,
                sigma_min=video.sigma_min, sigma_max=video.sigma_max, stride=1, rate_hz=RATE_HZ, camera="",
            )  # fmt: skip
            path = video.unet.pretrained
            unet = _published("unet", path, "finetune_video.unet") if path else build_unet(video.unet, config)
            self.video = VideoModel(unet, config, torch.randn(config.clip_shape)).to(device)
            self.teachers = {b: _teacher(getattr(backbones, b), f"prepare_backbones.{b}").to(device) for b in BRANCHES}
            channels = {branch: teacher.channels for branch, teacher in self.teachers.items()}
            shared: dict[str, Any] = params.distill.model_dump(include=set(DecouplerConfig.model_fields)) | {
                "feature_channels": self.video.feature_channels(self.sampler.up_blocks), "frames": video.frames,
                "grid": (grid, grid), "reference": params.cache_teacher.reference,
            }  # fmt: skip
            self.decouplers: dict[str, Decoupler] = {
                branch: Decoupler(DecouplerConfig(teacher_channels=channels[branch], **shared))
                for branch in params.distill.branches
            }
            both = sum(channels.values())
            channels |= {"one_step": shared["feature_channels"], "observation": both}
            channels |= {"generated": both, "goal_frame": both, "recorded": both}
            self.entries = frozen_entries(params.train_policy.context, params.train_policy.observation_encoder)
            single = ("goal_frame", "observation")
            self.shapes: dict[str, Shape] = {
                entry: (1 if entry in single else video.frames, params.convert.parts[0].foreseen * grid, grid, channels[entry])
                for entry in self.entries
            }
            self.policy = self._policy()

    @property
    def guesses_vocabulary(self) -> bool:
        """Whether the text encoder is trained on sentences that nobody knows yet: it then has as many tokens as it may."""
        return self.contrast is not None and self.data.sentences is None

    def _contrast(self) -> own_text.Contrast:
        section, sentences = self.params.prepare_backbones.text, self.data.sentences
        tokenizer: Any = _FullTokenizer(section.vocabulary)
        if sentences is not None:
            tokenizer = own_text.train_tokenizer(sentences, section.vocabulary)
        return own_text.Contrast(own_text.build(section, tokenizer, self.data.size)).to(self.device)

    def _policy(self) -> PolicyNetwork:
        data, config, section = self.data, self.video.config, self.params.train_policy
        convention = ActionConvention(dimensions=data.actions, normalisation=self.params.convert.normalisation)
        numbers: Any = {"actions": _numbers(data.actions), "proprioception": _numbers(data.proprioception)}
        statistics = self.statistics = Statistics(convention=convention, **numbers)
        pooled = self.text.config.projection_dim if hasattr(self.text, "text_projection") else config.text_width
        text = SimpleNamespace(tokens=config.text_tokens, width=config.text_width, pooled_width=pooled)
        foresight: Any = SimpleNamespace(text=text, sampler=self.sampler)
        cameras = [str(k) for k in range(self.params.convert.parts[0].foreseen)]
        built = SVAMConfig.of(section, foresight, self.shapes, statistics, cameras, data.size, config.rate_hz)
        return PolicyNetwork(built, statistics)

    @cached_property
    def flops(self) -> dict[str, int]:
        """What is computed -> its FLOPs, of one frame, clip or observation; `train_...` with the backward pass. Sentences, each
        embedded once, resizing and normalising count nothing."""
        video, autoencoder, config = self.video, self.autoencoder, self.video.config
        clip, sigma, frame = _meta(1, *config.clip_shape), _meta(1), _meta(1, 3, *self.data.size)
        observed, text = clip[:, 0], _meta(1, config.text_tokens, config.text_width)
        noisy = (video, clip, sigma, clip, observed, text)

        def features() -> Tensor:
            return video.raw(clip, sigma, observed, text, self.sampler.up_blocks)[0][-1]

        def rebuilt() -> Tensor:
            return autoencoder.decode_pixels(autoencoder.encode_pixels(frame))

        unet, train_unet = _both_flops(denoising_loss, *noisy)
        count = {
            "encode": _flops(autoencoder.encode_pixels, frame),
            "decode": _flops(autoencoder.decode_pixels, clip[0], config.frames),
            "one_step": _flops(features),
            "unet": unet,
            "train_unet": train_unet,
        }
        if self.params.prepare_backbones.autoencoder.source == "in_domain":
            count["train_autoencoder"] = _training_flops(rebuilt)
        if self.contrast:
            side, ids = self.contrast.clip.config.vision_config.image_size, _meta(1, config.text_tokens, dtype=torch.int64)
            halves = ((self.contrast.clip.vision_model, _meta(1, 3, side, side)), (self.contrast.clip.text_model, ids))
            count["train_text"] = sum(_training_flops(lambda half=half, x=x: half(x)[0]) for half, x in halves)
        for branch, teacher in self.teachers.items():
            side = teacher.config.image_size
            count[f"teacher_{branch}"] = _flops(teacher.tokens, _meta(1, 3, side, side))
            if teacher.config.objective is not None:
                count[f"train_{branch}"] = _training_flops(lambda x, look=teacher.dense: look(x)[0], _meta(1, 3, side, side))
        for branch, decoupler in self.decouplers.items():
            c = decoupler.config
            seen, wanted = (_meta(1, c.frames, *c.grid, n) for n in (c.feature_channels, c.teacher_channels))
            count[f"decoupler_{branch}"] = _flops(decoupler, seen, wanted[:, 0])
            count[f"train_decoupler_{branch}"] = _training_flops(decoupler.loss, seen, wanted[:, 0], wanted)
        with FakeTensorMode():  # the Uni-Perceiver asks for autocast, which the meta device does not have
            return count | self._policy_flops()

    def _policy_flops(self) -> dict[str, int]:
        policy, section = self._policy(), self.params.train_policy
        state, views, (height, width) = policy.config.proprioception, self.params.convert.parts[0].foreseen, self.data.size
        inputs = Inputs(
            {entry: torch.empty(1, *shape) for entry, shape in self.shapes.items()},
            torch.empty(1, *policy.config.text), torch.empty(1, views * height, width, 3, dtype=torch.uint8),
            torch.empty(1, state) if state else None,
        )  # fmt: skip

        def denoised(draws: int) -> Tensor:
            actions = torch.empty(draws, section.chunk, self.data.actions)
            return policy.diffusion.raw(actions, torch.empty(draws), policy.context(inputs))

        context = _flops(policy.context, inputs)
        training = _training_flops(denoised, section.noise_draws)
        return {"context": context, "denoise": _flops(denoised, 1) - context, "train_policy": training}
