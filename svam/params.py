"""Every knob of the pipeline: one frozen pydantic section per stage, named as the stage.

`params.yaml` holds the values, all of them: a default here would decide numbers that DVC does not see. This module holds
their types, ranges and meaning. It imports no torch, no simulator and no zarr, so that a typo is reported in well under a
second, before anything is computed.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from svam.conversion import Convert as Convert
from svam.errors import ParamsError, describe
from svam.protocols import Evaluate
from svam.sections import Attention, Count, Distinct, Name, NoiseLevels, NotNegative, Positive, Section, Seed, Share, Words

Branch = Literal["geometric", "semantic"]
Style = Literal["direct", "left", "right", "high"]
BenchmarkPart = Literal[
    "store", "conversion", "loader", "times", "encode", "features", "control", "evaluation", "serving", "calvin", "gpu"
]
Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]
TimeIds = Annotated[list[NotNegative], Field(min_length=3, max_length=3)]
Moments = Literal["float32", "int8"]
Context = Literal["geometric", "semantic", "one_step", "generated", "goal_frame", "observation", "recorded"]


class Machine(Section):
    """What the computer offers, and what training does to fit it. No stage lists this section, so changing it re-runs nothing,
    and an unfinished run goes on with what it says now, but for the number of processes.

    launch: how the processes of a stage start, see `svam.launch`; processes: how many, where it is torchrun; shard:
    whether each trains a part of the weights, see `svam.training.sharding`.
    """

    device: Literal["auto", "cpu", "cuda"]
    workers: Count
    cache_gb: Positive
    checkpoint_seconds: NotNegative
    checkpointing: bool
    average: Literal["device", "host"]
    compile: bool
    launch: Words
    processes: Count
    shard: bool


class Optimiser(Section):
    """One run of the training loop, the same for every trained part: AdamW, its schedule, and averaged (EMA) weights."""

    steps: Count
    batch: Count
    learning_rate: Positive
    ema: Annotated[float, Field(ge=0.0, lt=1.0)]
    bf16: bool
    schedule: Literal["cosine", "constant"]
    warmup: Annotated[int, Field(ge=0)]
    betas: Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)]
    weight_decay: NotNegative
    clip: Positive
    accumulate: Count

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup >= self.steps > 0:
            raise ValueError(f"warmup ({self.warmup}) must be smaller than steps ({self.steps})")
        return self


class FineTuning(Optimiser):
    """A training of weights that may already be what is wanted: 0 steps take them as they are."""

    steps: Annotated[int, Field(ge=0)]


class Collect(Section):
    """MetaWorld demonstrations by the scripted experts. scenes, styles, looks: `svam.simulation.scenes`,
    `svam.simulation.experts`, `svam.simulation.looks`. unlabelled: those of `looks` that are recorded without actions."""

    tasks: Annotated[list[Name], Distinct]
    episodes: Count
    episodes_of: dict[str, Count]
    scenes: Literal["stock", "shared"]
    styles: Annotated[list[Style], Field(min_length=1), Distinct]
    looks: Annotated[list[Name], Field(min_length=1), Distinct]
    unlabelled: Annotated[list[Name], Distinct]
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
    def _exceptions_are_tasks(self) -> Self:
        unknown = sorted(set(self.episodes_of) - set(self.tasks))
        if unknown and self.tasks:
            raise ValueError(f"episodes_of names {unknown}, which tasks does not list")
        return self

    @model_validator(mode="after")
    def _some_looks_have_actions(self) -> Self:
        if unknown := sorted(set(self.unlabelled) - set(self.looks)):
            raise ValueError(f"unlabelled names {unknown}, which looks {self.looks} does not list")
        if len(self.unlabelled) == len(self.looks):
            raise ValueError(f"unlabelled names all of looks {self.looks}, which leaves a policy nothing: leave one out")
        return self

    def episodes_for(self, task: str) -> int:
        return self.episodes_of.get(task, self.episodes)


class Backbone(Section):
    """What every backbone has: where it comes from. `path` is a local folder or a hub id (then pinned by `revision`)."""

    source: Literal["in_domain", "pretrained"]
    path: str | None
    revision: str | None
    training: Optimiser

    @model_validator(mode="after")
    def _pretrained_names_its_weights(self) -> Self:
        if self.source == "pretrained" and not self.path:
            raise ValueError("source is 'pretrained' but path is empty: name a local folder or a hub id")
        return self


class AutoencoderLoss(Section):
    """Weights of the in-domain autoencoder's loss; see `svam.training.prepare_backbones.autoencoder.moving_weight`."""

    squared: NotNegative
    moving: NotNegative
    moving_threshold: Annotated[float, Field(gt=0.0, le=1.0)]
    contrast: NotNegative
    contrast_reach: Count
    latent_noise: NotNegative


class Autoencoder(Backbone):
    """Frames to latents and back. In-domain: a small `diffusers.AutoencoderDC`."""

    latent_channels: Count
    channels: Annotated[list[Count], Field(min_length=2)]
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2)]
    loss: AutoencoderLoss

    @property
    def factor(self) -> int:
        """Side of a frame over side of its latents; SVD's is 8."""
        return 2 ** (len(self.channels) - 1) if self.source == "in_domain" else 8

    @property
    def unshuffled_levels(self) -> int:
        """How many of the finest levels have no layers: there pixels become channels."""
        return next((level for level, layers in enumerate(self.layers) if layers), len(self.layers))

    @model_validator(mode="after")
    def _sizes_are_those_of_an_autoencoder(self) -> Self:
        if len(self.layers) != len(self.channels):
            raise ValueError(f"layers {self.layers} and channels {self.channels} must have the same length")
        layers, channels = self.layers[self.unshuffled_levels :], self.channels[self.unshuffled_levels :]
        if not layers or 0 in layers:
            raise ValueError(f"layers is {self.layers}; zeros may only come first, and not everywhere")
        if self.channels[-1] % self.latent_channels:
            raise ValueError(f"the last of channels {self.channels} is no multiple of latent_channels {self.latent_channels}")
        for low, high in pairwise(channels):
            if (4 * low) % high or (4 * high) % low or high % 4:
                raise ValueError(f"channels {low} and {high} of neighbouring levels must divide four times one another")
        return self


class Text(Backbone, Attention):
    """Instruction to tokens. In-domain: a small CLIP trained on instructions and frames, then frozen."""

    tokens: Annotated[int, Field(ge=4, le=77)]
    layers: Count
    vocabulary: Annotated[int, Field(ge=514)]
    word_dropout: Dropout


class TeacherModel(Backbone, Attention):
    """A vision foundation model, see `svam.models.families`. In-domain: a small DINOv2-family ViT with a dense head."""

    family: Literal[
        "dinov2", "dinov2_registers", "dinov3", "clip", "siglip2", "depth_anything_v2", "depth_anything_3", "videomae", "vjepa2"
    ]
    stage: Literal["first", "second", "third", "last"]
    objective: Literal["depth", "segmentation", "self_supervised"]
    image_size: Annotated[int, Field(ge=16)]
    patch: Count
    layers: Count
    reconstructed_share: Share
    blurred_share: Share
    blur: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    masked_share: Annotated[float, Field(gt=0.0, lt=1.0)]
    rare_class_power: Share
    dice_weight: NotNegative
    metric_weight: NotNegative

    @model_validator(mode="after")
    def _patches_tile_the_image(self) -> Self:
        if self.image_size % self.patch:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of patch ({self.patch})")
        if self.source == "in_domain" and self.family not in ("dinov2", "dinov2_registers", "depth_anything_v2"):
            raise ValueError(
                f"family {self.family!r} is not trained in-domain: set source to 'pretrained' with a path, or family to "
                "dinov2, dinov2_registers or depth_anything_v2"
            )
        if self.stage != "last" and self.family != "depth_anything_3":
            raise ValueError(f"stage is {self.stage!r}, but family {self.family!r} has the last only: set stage to 'last'")
        if self.source == "in_domain" and self.family == "depth_anything_v2" and self.objective != "depth":
            raise ValueError(
                f"objective is {self.objective!r}, but family 'depth_anything_v2' trains in-domain on 'depth' only: "
                "set objective depth, or family dinov2 or dinov2_registers"
            )
        if self.reconstructed_share + self.blurred_share > 1.0:
            raise ValueError("reconstructed_share + blurred_share must not exceed 1")
        return self


class PrepareBackbones(Section):
    autoencoder: Autoencoder
    text: Text
    geometric: TeacherModel
    semantic: TeacherModel


class UNet(Section):
    """Size of the spatio-temporal U-Net; with `pretrained`, a folder or hub id whose own sizes are then used."""

    pretrained: str | None
    revision: str | None
    channels: Annotated[list[Annotated[int, Field(ge=32, multiple_of=32)]], Field(min_length=2)]
    layers: Count
    heads: Annotated[list[Count], Field(min_length=2)]

    @model_validator(mode="after")
    def _one_head_count_per_level(self) -> Self:
        if len(self.heads) != len(self.channels):
            raise ValueError(f"heads {self.heads} and channels {self.channels} must have the same length")
        if any(channels % heads for channels, heads in zip(self.channels, self.heads, strict=True)):
            raise ValueError(f"each of channels {self.channels} must be a multiple of its number of heads {self.heads}")
        return self


class Encode(Section):
    """Latents of all frames."""

    batch: Count


class FinetuneVideo(NoiseLevels):
    """The video diffusion model on robot clips."""

    frames: Annotated[int, Field(ge=2, le=64)]
    stride_seconds: Positive
    unet: UNet
    log_sigma_mean: float
    log_sigma_std: Positive
    first_sigma_share: Share
    guidance_dropout: Share
    dropped: Literal["frame_and_text", "text"]
    added_time_ids: TimeIds
    noise: Literal["fixed", "fresh"]
    lora_rank: Count | None
    moments: Moments
    training: FineTuning
    show_every: Count | None
    evaluation_clips: Count
    evaluation_steps: Count

    @model_validator(mode="after")
    def _there_are_weights(self) -> Self:
        if not self.training.steps and not self.unet.pretrained:
            raise ValueError(
                "training.steps is 0, but unet.pretrained is null: name weights to take as they are, or train for some steps"
            )
        if self.lora_rank is not None and not self.unet.pretrained:
            raise ValueError(
                f"lora_rank is {self.lora_rank}, but unet.pretrained is null, and adapters of random weights learn nothing: "
                "name a published U-Net, or set lora_rank to null"
            )
        return self


class Generate(Section):
    """One-step features F and multi-step generations V^ of a set of windows, from the same initial noise."""

    windows: Count
    held_out_windows: Count
    up_blocks: Count
    grid: Annotated[int, Field(ge=2)]
    steps: Count
    guidance: Annotated[float, Field(ge=1.0)]
    guidance_last: Annotated[float, Field(ge=1.0)] | None
    resize: Literal["antialiased", "nearest"]
    feature_time_ids: TimeIds | None
    batch: Count
    bf16: bool
    keep_features: bool


class CacheTeacher(Section):
    """Teacher features of the generations (targets) and of the current frame (reference)."""

    reference: Literal["frame", "reconstruction"]
    batch: Count


class Distill(Attention):
    """The decouplers: one class, one configuration, trained once per branch."""

    branches: Annotated[list[Branch], Distinct]
    target: Literal["generated", "ground_truth"]
    anchor: Literal["concat", "add"]
    input_norm: Literal["statistics", "layer"]
    positions: bool
    blocks: Count
    dropout: Dropout
    training: Optimiser


class Perceiver(Attention):
    """The Uni-Perceiver: `queries` per frame, then attention along time."""

    queries: Count
    free_queries: bool
    depth: Count
    head_width: Count | None
    embedding: Count | None


class ActionTransformer(Attention, NoiseLevels):
    """The diffusion transformer over the K x A action chunk and its EDM sampler."""

    encoder_layers: Count
    decoder_layers: Count
    attention_dropout: Dropout
    residual_dropout: Dropout
    mlp_dropout: Dropout
    sigma_data: Positive
    steps: Count


class TrainPolicy(Section):
    """Uni-Perceiver and action diffusion transformer on foresight."""

    seed: Seed | None
    features: Literal["cached", "computed"]
    context: Annotated[list[Context], Field(min_length=1), Distinct]
    sentence: Literal["tokens", "pooled"]
    aggregator: Literal["uni_perceiver", "mean_pool"]
    objective: Literal["edm", "epsilon"]
    chunk: Count
    proprioception: bool
    observation_encoder: Literal["trained", "frozen"]
    episodes_per_task: Count | None
    observation_stride: Count
    feature_draws: Count
    encode_batch: Count
    encode_bf16: bool
    perceiver: Perceiver
    transformer: ActionTransformer
    noise_draws: Count
    training: Optimiser
    evaluate_every: Count
    evaluation_observations: Count

    @model_validator(mode="after")
    def _what_is_computed_is_seen(self) -> Self:
        if self.features == "computed" and "recorded" in self.context:
            raise ValueError(
                "features is 'computed', but context has recorded, which is read from the cache alone: set features to cached"
            )
        if self.features == "computed" and self.feature_draws != 1:
            raise ValueError(
                f"features is 'computed', which draws anew at each step, but feature_draws is {self.feature_draws}: set it to 1"
            )
        return self


class Foresight(Section):
    """What foresight holds, on held-out windows."""

    clips: Count
    dpi: Annotated[int, Field(ge=50, le=300)]
    probe_frames: Count
    resamples: Annotated[int, Field(ge=1000)]
    batch: Count


class Report(Section):
    """Tables, figures and the page."""

    note: str
    clips: Count
    dpi: Annotated[int, Field(ge=50, le=300)]


class Benchmark(Section):
    parts: list[BenchmarkPart]
    videos: str | None
    frames: Count
    conversion_frames: Count
    image_sizes: Annotated[list[Count], Field(min_length=1)]
    clip_frames: Count
    clips: Count
    policy_steps: Count
    evaluation_episodes: Count
    repeats: Count


class Params(Section):
    """The whole of `params.yaml`. What its sections demand of one another: `svam.agreement`."""

    seed: Seed
    threads: Annotated[int, Field(ge=1, le=1024)]
    machine: Machine
    collect: Collect
    convert: Convert
    prepare_backbones: PrepareBackbones
    encode: Encode
    finetune_video: FinetuneVideo
    generate: Generate
    cache_teacher: CacheTeacher
    distill: Distill
    train_policy: TrainPolicy
    evaluate: Evaluate
    foresight: Foresight
    report: Report
    benchmark: Benchmark

    @property
    def modules(self) -> dict[str, list[str]]:
        """What the params choose by name: package -> modules of it, as `svam.code` takes them."""
        evaluate = self.evaluate  # of its policies only `remote` is a module there
        sources = list(dict.fromkeys(part.source for part in self.convert.parts))
        return {"svam.sources.": sources, "svam.evaluation.": [*evaluate.protocols, evaluate.policy]}


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
