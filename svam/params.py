"""Every knob of the pipeline: one frozen pydantic section per stage, named as the stage.

`params.yaml` holds the values and this module holds their types, ranges and meaning. It imports no torch, no
simulator and no zarr, so that a typo is reported in well under a second, before anything is computed.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from svam.errors import ParamsError
from svam.measuring import Benchmark, Foresight, Report
from svam.section import Count, Name, Positive, Section, Seed, Share

__all__ = ["Benchmark", "Foresight", "ParamsError", "Report", "Section"]

Branch = Literal["geometric", "semantic"]
Style = Literal["direct", "left", "right", "high"]
Context = Literal["geometric", "semantic", "one_step", "generated", "goal_frame", "observation"]


class Machine(Section):
    """What the computer offers. No stage lists this section, so changing it re-runs nothing."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Count = 2
    cache_gb: Positive = 8.0
    checkpoint_seconds: Annotated[float, Field(ge=0.0)] = 60.0


class Optimiser(Section):
    """The settings of one run of the training loop, shared by every trained part."""

    steps: Count
    batch: Count
    learning_rate: Positive
    warmup: Annotated[int, Field(ge=0)] = 50
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    clip: Positive = 1.0
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    accumulate: Count = 1
    bf16: bool = False

    @model_validator(mode="after")
    def _warmup_fits(self) -> Optimiser:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be smaller than steps ({self.steps})")
        return self


class Collect(Section):
    """MetaWorld demonstrations by the scripted experts. scenes, styles: `svam.simulation.scenes`, `svam.simulation.experts`."""

    tasks: list[Name]
    episodes: Count
    episodes_of: dict[str, Count] = {}
    scenes: Literal["stock", "shared"] = "stock"
    styles: Annotated[list[Style], Field(min_length=1)] = ["direct"]
    noisy_share: Share
    noise_scale: Annotated[float, Field(ge=0.0, le=2.0)]
    image_size: Annotated[int, Field(ge=32, le=512)]
    cameras: Annotated[list[Name], Field(min_length=1)]
    render: Literal["fast", "full"]
    annotate_every: Count
    tail: Annotated[int, Field(ge=0, le=400)]
    max_steps: Annotated[int, Field(ge=10, le=500)]
    attempts: Count

    @field_validator("episodes_of", mode="before")
    @classmethod
    def _null_empties(cls, value: Any) -> Any:  # for `-S`, where {} changes nothing: DVC merges mappings
        return {} if value is None else value

    @model_validator(mode="after")
    def _tasks_are_unique(self) -> Collect:
        repeated = sorted({t for t in self.tasks if self.tasks.count(t) > 1})
        if repeated:
            raise ValueError(f"tasks names {repeated} more than once")
        unknown = sorted(set(self.episodes_of) - set(self.tasks))
        if unknown and self.tasks:
            raise ValueError(f"episodes_of names {unknown}, which tasks does not list")
        if len(set(self.styles)) < len(self.styles):
            raise ValueError(f"styles is {self.styles}, expected each style once")
        return self

    def episodes_for(self, task: str) -> int:
        """How many demonstrations `task` gets."""
        return self.episodes_of.get(task, self.episodes)


class Convert(Section):
    """Any supported dataset to one Zarr store."""

    source: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    path: str
    depends_on: str
    options: dict[str, Any] = {}
    cameras: list[str] = []
    image_size: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    crop: Literal["none", "centre"] = "none"
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)]
    action_kind: Literal["absolute", "relative"]
    binary_dimensions: list[Annotated[int, Field(ge=0)]] = []
    normalisation: Literal["minmax", "quantile", "meanstd"]
    vector_dtype: Literal["float32", "float16"] = "float32"
    chunk_frames: Annotated[int, Field(ge=1, le=65534)] | Literal["auto"] = "auto"
    compression: Literal["lz4", "zstd", "keyed"] = "keyed"
    shard_megabytes: Annotated[float, Field(gt=0.0)]

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return [value, value] if isinstance(value, int) and not isinstance(value, bool) else value


class Backbone(Section):
    """What every backbone has: where it comes from. `path` is a local folder or a hub id (then pinned by `revision`)."""

    source: Literal["in_domain", "pretrained"]
    path: str | None = None
    revision: str | None = None
    training: Optimiser

    @model_validator(mode="after")
    def _pretrained_names_its_weights(self) -> Backbone:
        if self.source == "pretrained" and not self.path:
            raise ValueError("source is 'pretrained' but path is empty: name a local folder or a hub id")
        return self


class Autoencoder(Backbone):
    """Frames to latents and back. In-domain: a small `diffusers.AutoencoderDC`."""

    latent_channels: Count
    channels: Annotated[list[Count], Field(min_length=2)]
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2)]

    @model_validator(mode="after")
    def _one_layer_count_per_level(self) -> Autoencoder:
        if len(self.layers) != len(self.channels):
            raise ValueError(f"layers {self.layers} and channels {self.channels} must have the same length")
        if self.source == "in_domain":
            self._check_sizes()
        return self

    @property
    def unshuffled_levels(self) -> int:
        """How many of the finest levels have no layers: there pixels become channels."""
        return next((level for level, layers in enumerate(self.layers) if layers), len(self.layers))

    def _check_sizes(self) -> None:
        """What `AutoencoderDC` demands of its sizes."""
        used = self.layers[self.unshuffled_levels :]
        if not used or 0 in used:
            raise ValueError(f"layers is {self.layers}; zeros may only come first, and not everywhere")
        if self.channels[-1] % self.latent_channels:
            raise ValueError(f"the last of channels {self.channels} is no multiple of latent_channels {self.latent_channels}")
        channels = self.channels[self.unshuffled_levels :]
        for low, high in pairwise(channels):
            if (4 * low) % high or (4 * high) % low or high % 4:
                raise ValueError(f"channels {low} and {high} of neighbouring levels must divide four times one another")


class Text(Backbone):
    """Instruction to tokens. In-domain: a small CLIP trained on instructions and frames, then frozen."""

    tokens: Annotated[int, Field(ge=4, le=77)]
    width: Count
    layers: Count
    heads: Count

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Text:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        return self


class TeacherModel(Backbone):
    """A vision foundation model. In-domain: a small DINOv2-family ViT with a dense head."""

    family: Literal["dinov2", "dinov2_registers", "depth_anything_v2"]
    objective: Literal["depth", "segmentation", "self_supervised"]
    image_size: Annotated[int, Field(ge=16)]
    patch: Count
    width: Count
    layers: Count
    heads: Count
    reconstructed_share: Share
    blurred_share: Share

    @model_validator(mode="after")
    def _patches_tile_the_image(self) -> TeacherModel:
        if self.image_size % self.patch:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of patch ({self.patch})")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if self.source == "in_domain" and self.family == "depth_anything_v2" and self.objective != "depth":
            raise ValueError(
                f"objective is {self.objective!r}, but family 'depth_anything_v2' trains in-domain on 'depth' only: "
                "set objective depth, or family dinov2 or dinov2_registers"
            )
        if self.reconstructed_share + self.blurred_share > 1.0:
            raise ValueError("reconstructed_share + blurred_share must not exceed 1")
        return self


class PrepareBackbones(Section):
    """The frozen parts, one stage run each."""

    autoencoder: Autoencoder
    text: Text
    geometric: TeacherModel
    semantic: TeacherModel


class UNet(Section):
    """Size of the spatio-temporal U-Net; with `pretrained`, a folder or hub id whose own sizes are then used."""

    pretrained: str | None = None
    revision: str | None = None
    channels: Annotated[list[Annotated[int, Field(ge=32, multiple_of=32)]], Field(min_length=2)]
    layers: Count
    heads: Annotated[list[Count], Field(min_length=2)]

    @model_validator(mode="after")
    def _one_head_count_per_level(self) -> UNet:
        if len(self.heads) != len(self.channels):
            raise ValueError(f"heads {self.heads} and channels {self.channels} must have the same length")
        return self


class FinetuneVideo(Section):
    """The video diffusion model on robot clips. Sigmas are in units of the scaled latents' standard deviation."""

    frames: Annotated[int, Field(ge=2, le=64)]
    stride_seconds: Positive
    unet: UNet
    sigma_max: Positive
    sigma_min: Positive
    log_sigma_mean: float
    log_sigma_std: Positive
    first_sigma_share: Annotated[float, Field(ge=0.1, le=1.0)]
    guidance_dropout: Share
    noise: Literal["fixed", "fresh"]
    training: Optimiser
    evaluation_clips: Count
    evaluation_steps: Count

    @model_validator(mode="after")
    def _sigmas_are_ordered(self) -> FinetuneVideo:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min ({self.sigma_min}) must be smaller than sigma_max ({self.sigma_max})")
        return self


class Generate(Section):
    """One-step features F and multi-step generations V^ of a set of windows, from the same initial noise."""

    windows: Count
    held_out_windows: Count
    up_blocks: Count
    grid: Annotated[int, Field(ge=2)]
    steps: Count
    guidance: Annotated[float, Field(ge=1.0)]
    batch: Count
    bf16: bool
    keep_features: bool
    mantissa_bits: Annotated[int, Field(ge=1, le=10)]


class CacheTeacher(Section):
    """Teacher features of the generations (targets) and of the current frame (reference)."""

    reference: Literal["frame", "reconstruction"]
    batch: Count
    mantissa_bits: Annotated[int, Field(ge=1, le=10)]


class Distill(Section):
    """The decouplers: one class, one configuration, trained once per branch."""

    branches: list[Branch]
    target: Literal["generated", "ground_truth"]
    anchor: Literal["concat", "add"]
    width: Count
    blocks: Count
    heads: Count
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    training: Optimiser

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Distill:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if len(set(self.branches)) != len(self.branches):
            raise ValueError(f"branches names one branch twice: {self.branches}")
        return self


class Perceiver(Section):
    """The Uni-Perceiver: `queries` per frame, then attention along time."""

    queries: Count
    width: Count
    depth: Count
    heads: Count

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Perceiver:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        return self


class ActionTransformer(Section):
    """The diffusion transformer over the K x A action chunk and its EDM sampler."""

    width: Count
    encoder_layers: Count
    decoder_layers: Count
    heads: Count
    sigma_min: Positive
    sigma_max: Positive
    sigma_data: Positive
    steps: Count

    @model_validator(mode="after")
    def _numbers_agree(self) -> ActionTransformer:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min ({self.sigma_min}) must be smaller than sigma_max ({self.sigma_max})")
        return self


class TrainPolicy(Section):
    """Uni-Perceiver and action diffusion transformer on cached foresight."""

    seed: Seed | None = None
    context: Annotated[list[Context], Field(min_length=1)]
    aggregator: Literal["uni_perceiver", "mean_pool"]
    objective: Literal["edm", "epsilon"]
    chunk: Count
    proprioception: bool
    observation_encoder: Literal["trained", "frozen"]
    episodes_per_task: Count | None = None
    observation_stride: Count
    encode_batch: Count
    encode_bf16: bool
    perceiver: Perceiver
    transformer: ActionTransformer
    training: Optimiser
    evaluate_every: Count

    @model_validator(mode="after")
    def _context_is_a_set(self) -> TrainPolicy:
        if len(set(self.context)) != len(self.context):
            raise ValueError(f"context names one entry twice: {self.context}")
        return self


class Evaluate(Section):
    """Closed loop in simulation and/or offline on held-out episodes."""

    protocols: Annotated[list[Literal["metaworld", "offline"]], Field(min_length=1)]
    tasks: list[Name]
    episodes: Count
    held_out_instruction_episodes: Annotated[int, Field(ge=0)]
    max_steps: Annotated[int, Field(ge=10, le=500)]
    execute: Count
    batch: Count
    videos: Annotated[int, Field(ge=0)]
    offline_windows: Count
    offline_samples: Count


class Params(Section):
    """The whole of `params.yaml`."""

    seed: Seed
    threads: Annotated[int, Field(ge=1, le=1024)]
    machine: Machine
    collect: Collect
    convert: Convert
    prepare_backbones: PrepareBackbones
    finetune_video: FinetuneVideo
    generate: Generate
    cache_teacher: CacheTeacher
    distill: Distill
    train_policy: TrainPolicy
    evaluate: Evaluate
    foresight: Foresight = Foresight()
    report: Report
    benchmark: Benchmark

    @model_validator(mode="after")
    def _sections_agree(self) -> Params:
        missing = [b for b in ("geometric", "semantic") if b in self.train_policy.context and b not in self.distill.branches]
        if missing:
            raise ValueError(
                f"train_policy.context asks for {missing}, which distill.branches {self.distill.branches} does not train"
            )
        if self.evaluate.execute > self.train_policy.chunk:
            raise ValueError(
                f"evaluate.execute ({self.evaluate.execute}) must not exceed train_policy.chunk ({self.train_policy.chunk})"
            )
        return self


def describe(error: ValidationError, file: Path | str, prefix: str = "") -> str:
    """One line per problem: `file`, the dotted key (after `prefix`), the value found and what is accepted."""
    lines = []
    for problem in error.errors():
        key = prefix + ".".join(str(part) for part in problem["loc"]) or "(whole file)"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{file}: unknown key '{key}' (value {problem['input']!r}); remove it or correct its name")
        elif problem["type"] == "missing":
            lines.append(f"{file}: key '{key}' is missing")
        elif problem["type"] == "value_error":
            lines.append(f"{file}: {key}: {problem['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"{file}: {key} is {problem['input']!r}; accepted: {problem['msg']}")
    return "\n".join(lines)


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check all of `path` (YAML 1.2, as DVC reads it).

    Raises:
        ParamsError: the file is missing or not YAML, or a key is unknown, missing, of the wrong type or out of range.
    """
    if not path.is_file():
        raise ParamsError(f"{path}: no such file; run from the root of the project")
    try:
        raw: Any = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise ParamsError(describe(error, path)) from None
