"""The whole S-VAM as one object: frozen foresight, what is trained with the policy, statistics and configuration.

Training, evaluation and serving all use it, so there is one path from an observation to an action:
observation -> `encode` (frozen, cacheable) -> `PolicyNetwork.context` -> `ActionDiffusion.sample` -> physical units.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from svam.actions import undone
from svam.checkpoint import load_state, restore, save_module
from svam.contract import ContractError, Foresight, Frozen, Observation, Statistics
from svam.files import FileError, stated, whole_directory
from svam.models.foresight import ForesightModel, FrozenParts
from svam.models.manifest import verify_manifest, write_manifest
from svam.models.observation import ObservationEncoder
from svam.models.perceiver import AGGREGATORS, UniPerceiver
from svam.models.policy import ActionDiffusion
from svam.models.video import SamplerConfig
from svam.normalisation import denormalise_actions, normalise_proprioception
from svam.params import ActionTransformer, Context, Perceiver, TrainPolicy
from svam.precision import mixed_precision
from svam.seeds import seed_of

Shape = tuple[int, int, int, int]
"""(T, h, w, C) of a context entry."""


OLDER: dict[str, dict[str, Any]] = {
    "perceiver": {"free_queries": False, "head_width": None, "embedding": None},
    "transformer": {"attention_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0},
}
"""What saved policies had before these were params."""


class SVAMConfig(Frozen):
    """Everything that decides shapes and inputs; the checkpoint carries it, so that nothing is typed twice.

    shapes: frozen context entry -> (T, h, w, C), where h counts the rows of all cameras. text: (L, D) of the instruction's
    tokens, or of its one pooled token. camera, more_cameras, image_size: whose frames the policy looks at, each of (H, W)
    pixels. rate_hz: actions per second. proprioception: its dimensions P, or None. action_dimensions: A of the network where it
    learnt from several sets, the widest of theirs; else the statistics'.
    """

    context: list[Context]
    aggregator: Literal["uni_perceiver", "mean_pool"]
    objective: Literal["edm", "epsilon"]
    chunk: int
    observation_encoder: Literal["trained", "frozen"]
    perceiver: Perceiver
    transformer: ActionTransformer
    proprioception: int | None
    sentence: Literal["tokens", "pooled"] = "tokens"
    shapes: dict[str, Shape]
    text: tuple[int, int]
    camera: str
    more_cameras: list[str] = Field(default=[], exclude_if=operator.not_)
    image_size: tuple[int, int]
    rate_hz: float
    sampler: SamplerConfig
    action_dimensions: int | None = Field(default=None, exclude_if=lambda value: value is None)

    @model_validator(mode="before")
    @classmethod
    def _of_older_folders(cls, raw: Any) -> Any:
        """Complete what a folder of before these were params says."""
        if not isinstance(raw, dict):
            return raw
        return raw | {name: {**OLDER[name], **raw[name]} for name in OLDER if isinstance(raw.get(name), dict)}

    @classmethod
    def of(
        cls, section: TrainPolicy, foresight: ForesightModel, shapes: Mapping[str, Shape], statistics: Statistics,
        cameras: Sequence[str], image_size: tuple[int, int], rate_hz: float,
    ) -> SVAMConfig:  # fmt: skip
        """The configuration that a params section asks for, on data and frozen parts that state the rest.

        Raises:
            ContractError: proprioception is asked for and the data has none.
        """
        text, dimensions = foresight.text, len(statistics.proprioception.mean) if statistics.proprioception else None
        if section.proprioception and dimensions is None:
            raise ContractError("train_policy.proprioception is true, but the episodes hold no proprioception")
        return cls(
            **section.model_dump(include=set(cls.model_fields) - {"proprioception"}),
            proprioception=dimensions if section.proprioception else None,
            shapes=dict(shapes),
            text=(1, text.pooled_width) if section.sentence == "pooled" else (text.tokens, text.width),
            camera=cameras[0],
            more_cameras=list(cameras[1:]),
            image_size=image_size,
            rate_hz=rate_hz,
            sampler=foresight.sampler,
        )

    @property
    def cameras(self) -> list[str]:
        """The cameras that an observation must hold, in the order in which their pictures are put below one another."""
        return [self.camera, *self.more_cameras]

    @property
    def frozen_entries(self) -> list[Context]:
        """The context entries that frozen parts compute; a trained observation encoder is none."""
        return frozen_entries(self.context, self.observation_encoder)

    @property
    def frozen_parts(self) -> FrozenParts:
        """The frozen parts behind `frozen_entries`, and the text encoder."""
        return FrozenParts.of_entries(self.frozen_entries)


class ActingSet(Frozen):
    """One of several sets that a policy learnt from: its name and those of its foresight cameras, and its conventions."""

    name: str
    camera: str
    more_cameras: list[str] = Field(default=[], exclude_if=operator.not_)
    statistics: Statistics


class PolicyRecord(Frozen):
    """`policy/config.json` of a saved S-VAM. selected: the held-out values of the saved weights and their step. sets: where it
    learnt from several; statistics are then those of the first."""

    svam: SVAMConfig
    statistics: Statistics
    sets: list[ActingSet] = Field(default=[], exclude_if=lambda value: not value)
    selected: dict[str, int | float]


def frozen_entries(context: Sequence[Context], observation_encoder: str) -> list[Context]:
    """Those entries of a context that can be cached."""
    return [e for e in context if e != "observation" or observation_encoder == "frozen"]


@dataclass(frozen=True)
class Inputs:
    """What the policy is conditioned on, for B observations.

    entries: frozen context entry -> (B, T, h, w, C) of any float dtype. text: (B, L, D) float32. frames: (B, V H, W, 3) uint8
    where an observation encoder is trained, else None. proprioception: (B, P) normalised, or None.
    """

    entries: Mapping[str, Tensor]
    text: Tensor
    frames: Tensor | None = None
    proprioception: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Training pairs: inputs, actions (B, K, A) float32 normalised, and mask (B, K) bool, true where an action is real."""

    inputs: Inputs
    actions: Tensor
    mask: Tensor


class PolicyNetwork(nn.Module):
    """Everything that is trained with the policy. Context entries of equal (T, h, w) are concatenated on channels, as the
    paper does, and each group has its own aggregator (S-VAM section 3.4)."""

    def __init__(self, config: SVAMConfig, statistics: Statistics) -> None:
        super().__init__()
        self.config = config
        self.bf16 = False
        sizes, shapes = config.perceiver, dict(config.shapes)
        trained = "observation" in config.context and config.observation_encoder == "trained"
        views = len(config.cameras)
        self.observation = ObservationEncoder(config.image_size, sizes.width, views) if trained else None
        if self.observation is not None:
            shapes["observation"] = self.observation.shape
        self.groups: dict[tuple[int, ...], list[str]] = {}
        for entry in config.context:
            self.groups.setdefault(shapes[entry][:3], []).append(entry)
        joined = [(*shapes[entries[0]][:3], sum(shapes[entry][3] for entry in entries)) for entries in self.groups.values()]
        self.aggregators = nn.ModuleList(AGGREGATORS[config.aggregator](sizes, shape) for shape in joined)
        for entry in config.frozen_entries:  # statistics of the training observations, so that no entry drowns another
            self.register_buffer(f"mean_{entry}", torch.zeros(shapes[entry][3]))
            self.register_buffer(f"std_{entry}", torch.ones(shapes[entry][3]))
        self.diffusion = ActionDiffusion(
            config.transformer,
            config.objective,
            chunk=(config.chunk, config.action_dimensions or statistics.convention.dimensions),
            context_width=sizes.width,
            text_width=config.text[1],
            proprioception=config.proprioception,
            action_limit=5.0 if statistics.convention.normalisation == "meanstd" else 1.0,
        )

    @torch.no_grad()
    def set_input_statistics(self, entry: str, mean: Tensor, std: Tensor) -> None:
        """Per-channel mean and deviation (C,) of one entry over training observations; a constant channel is left as it is."""
        getattr(self, f"mean_{entry}").copy_(mean)
        getattr(self, f"std_{entry}").copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def _group(self, entries: Sequence[str], inputs: Inputs, crops: torch.Generator | None = None) -> Tensor:
        """(B, T, h, w, C) of one group: normalised frozen entries and the trained observation's tokens; `crops` draws those."""
        parts: list[Tensor] = []
        for entry in entries:
            if entry == "observation" and self.observation is not None:
                if inputs.frames is None:
                    raise ContractError("observation: the policy's trained encoder needs frames, found none")
                parts.append(self.observation(inputs.frames, crops))
            else:
                values = inputs.entries[entry].float()
                parts.append((values - getattr(self, f"mean_{entry}")).div_(getattr(self, f"std_{entry}")))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def context(self, inputs: Inputs, crops: torch.Generator | None = None) -> Tensor:
        """Everything the action decoder attends to, (B, S, width). `crops`: see `ObservationEncoder`."""
        groups = zip(self.aggregators, self.groups.values(), strict=True)
        tokens = torch.cat([aggregator(self._group(entries, inputs, crops)) for aggregator, entries in groups], dim=1)
        return self.diffusion.encode_context(tokens, inputs.text, inputs.proprioception)

    @torch.no_grad()
    def denoise(self, inputs: Inputs, noise_BKA: Tensor) -> Tensor:
        """Normalised actions (B, K, A), sampled from unit noise. Where `bf16` is set, the context is encoded in bfloat16."""
        with mixed_precision(noise_BKA.device, self.bf16):
            context = self.context(inputs)
        return self.diffusion.sample(context.float(), noise_BKA)

    def attention(self, inputs: Inputs) -> dict[str, Tensor]:
        """Group of entries ("geometric+semantic+one_step") -> head-averaged weights of the Uni-Perceiver's last
        cross-attention, (B, T, N, h, w); empty for mean pooling."""
        groups = zip(self.aggregators, self.groups.values(), strict=True)
        perceivers = [(a, entries) for a, entries in groups if isinstance(a, UniPerceiver)]
        return {"+".join(entries): a.attention(self._group(entries, inputs)) for a, entries in perceivers}


class SVAM:
    """The whole model (S-VAM section 3): `encode`, `loss`, `act`, `save`, `load`.

    `pad_to`: size of every batch that `act` and `encode` compute (the last observation is repeated to fill it), so that
    the bits of an action do not depend on how many observations came with it; None computes just what came.
    `selected`: the held-out values of the saved weights and their step, for the record.
    `sets`: those that it learnt from, where there were several; it acts as one of them, the first unless `acting_as` says.
    """

    def __init__(
        self, config: SVAMConfig, statistics: Statistics, foresight: ForesightModel, network: PolicyNetwork | None = None,
        sets: Sequence[ActingSet] = (),
    ) -> None:  # fmt: skip
        """`network` None builds an untrained one from torch's global seed."""
        self.config, self.statistics, self.foresight = config, statistics, foresight
        self.sets = {one.name: one for one in sets}
        foresight.views = len(config.cameras)
        self.network = network if network is not None else PolicyNetwork(config, statistics)
        self.network.eval()
        self.pad_to: int | None = None
        self.selected: dict[str, float] = {}

    def acting_as(self, name: str) -> SVAM:
        """The same policy with the cameras and the action convention of one of its sets.

        Raises:
            ContractError: it learnt from no such set.
        """
        if name not in self.sets:
            raise ContractError(f"the policy learnt from no set {name!r}; its sets are {', '.join(self.sets) or 'none'}")
        one = self.sets[name]
        config = self.config.model_copy(update={"camera": one.camera, "more_cameras": one.more_cameras})
        svam = SVAM(config, one.statistics, self.foresight, self.network, list(self.sets.values()))
        svam.pad_to, svam.selected = self.pad_to, self.selected
        return svam

    @property
    def chunk(self) -> int:
        """K, the actions that `act` returns for each observation."""
        return self.config.chunk

    @property
    def cameras(self) -> list[str]:
        """Names of the cameras that an observation must hold."""
        return self.config.cameras

    @property
    def proprioception(self) -> int | None:
        """P of the proprioception that an observation must hold, for the network or since actions are differences from it (see
        `svam.actions`); None where it needs none."""
        own = self.statistics.proprioception
        needed = self.config.proprioception is not None or bool(self.statistics.convention.differences)
        return len(own.mean) if needed and own is not None else None

    @property
    def needs_proprioception(self) -> bool:
        """Whether an observation must hold proprioception."""
        return self.proprioception is not None

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device) -> SVAM:
        self.foresight.to(device)
        self.network.to(device)
        return self

    def example(self, number: int = 0) -> Observation:
        """An observation of noise that fits the policy, another for each number: to warm up and to time."""
        rng = np.random.default_rng(number)
        frames = {c: rng.integers(0, 256, (*self.config.image_size, 3), dtype=np.uint8) for c in self.cameras}
        state = np.zeros(self.proprioception, np.float32) if self.proprioception is not None else None
        return Observation(frames, "go", state)

    def check(self, observation: Observation) -> None:
        """Raise `ContractError` unless cameras, images and proprioception are what the policy was trained on."""
        size = (*self.config.image_size, 3)
        for camera in self.cameras:
            if camera not in observation.frames:
                raise ContractError(
                    f"observation: no camera '{camera}', on which the policy was trained; found {sorted(observation.frames)}"
                )
            frame = observation.frames[camera]
            if frame.dtype != np.uint8 or frame.shape != size:
                raise ContractError(f"observation: camera '{camera}' gives {frame.dtype} {frame.shape}, expected uint8 {size}")
        if self.proprioception is None:
            return
        shape = None if observation.proprioception is None else observation.proprioception.shape
        if shape != (self.proprioception,):
            raise ContractError(f"observation: proprioception has shape {shape}, expected {(self.proprioception,)}")
        if not np.isfinite(observation.proprioception).all():  # type: ignore[arg-type]
            raise ContractError("observation: proprioception holds NaN or infinity")

    def encode_frames(
        self,
        frames_BHWC: NDArray[np.uint8],
        instructions: Sequence[str],
        entries: Sequence[str],
        noise_seeds: Sequence[int],
        recorded: NDArray[np.uint8] | None = None,
    ) -> Foresight:
        """Frozen entries as float16, which is what the cache holds and so what the policy is trained on; text float32.

        Shapes and arguments as `ForesightModel.encode`. The video model's seeds are derived from `noise_seeds`, which `sample`
        uses as they are: with equal seeds the chunk's noise would be the first numbers of the video noise, unlike in training.
        `recorded`: the clips (B, T, V H, W, 3) uint8 that followed, for the entry of that name.

        Raises:
            ContractError: `recorded` is among the entries, and no clips are given, as whenever a policy acts.
        """
        values: dict[str, Tensor] = {}
        if "recorded" in entries:
            if recorded is None:
                raise ContractError(
                    "the policy's context holds 'recorded', what the teachers see in the recorded future, which nobody has who "
                    "acts: evaluate it by the protocol offline alone, or train with another train_policy.context"
                )
            values["recorded"] = self.foresight.tokens_of_views(torch.from_numpy(recorded))
        frames, seeds = torch.from_numpy(np.ascontiguousarray(frames_BHWC)), [seed_of(s, "video noise") for s in noise_seeds]
        foresight = self.foresight.encode(frames, instructions, [e for e in entries if e != "recorded"], seeds)
        values |= foresight.entries
        text = foresight.text if self.config.sentence == "tokens" else self.embed_text(instructions)
        return Foresight(entries={e: v.half() for e, v in values.items()}, text=text)

    def embed_text(self, instructions: Sequence[str]) -> Tensor:
        """(B, L, D) float32, what the policy sees of each instruction."""
        return self.foresight.embed_text(instructions, pooled=self.config.sentence == "pooled")

    def encode(
        self,
        observations: Sequence[Observation],
        noise_seeds: Sequence[int] | None = None,
        recorded: NDArray[np.uint8] | None = None,
    ) -> Inputs:
        """Observations to what the policy is conditioned on. `noise_seeds` as in `act`, `recorded` as in `encode_frames`.

        Raises:
            ContractError: an observation without a camera of the policy, of another image size, or without proprioception; or
                what `encode_frames` raises.
        """
        for observation in observations:
            self.check(observation)
        frames = np.stack([np.concatenate([o.frames[camera] for camera in self.cameras]) for o in observations])
        seeds = _seeds(observations, noise_seeds)
        sentences = [o.instruction for o in observations]
        foresight = self.encode_frames(frames, sentences, self.config.frozen_entries, seeds, recorded)
        proprioception = None
        if self.config.proprioception is not None:
            stacked = np.stack([np.asarray(o.proprioception, dtype=np.float32) for o in observations])
            own = normalise_proprioception(self.statistics, stacked)
            wide = np.pad(own, ((0, 0), (0, self.config.proprioception - own.shape[1])))
            proprioception = torch.from_numpy(wide).to(self.device)
        trained = self.network.observation is not None
        pixels = torch.from_numpy(frames).to(self.device) if trained else None
        return Inputs(entries=foresight.entries, text=foresight.text, frames=pixels, proprioception=proprioception)

    def loss(self, batch: Batch, generator: torch.Generator, draws: int = 1) -> Tensor:
        """Scalar loss of the denoised action chunk at `draws` noise levels each; padded actions count nothing. `generator`
        (CPU) draws the crops of a trained observation encoder, and the noise."""
        context = self.network.context(batch.inputs, generator)
        return self.network.diffusion.loss(context, batch.actions, batch.mask, generator, draws)

    @torch.no_grad()
    def sample(self, inputs: Inputs, noise_seeds: Sequence[int]) -> NDArray[np.float32]:
        """Actions (B, K, A) float32 in physical units, as the store has them, one noise seed per row.

        Raises:
            ContractError: the network returned NaN or infinity.
        """
        dimensions = self.statistics.convention.dimensions
        return denormalise_actions(self.statistics, self.normalised(inputs, noise_seeds)[..., :dimensions])

    @torch.no_grad()
    def normalised(self, inputs: Inputs, noise_seeds: Sequence[int]) -> NDArray[np.float32]:
        """The same in the policy's own units, of all its dimensions."""
        shape = (self.config.chunk, self.config.action_dimensions or self.statistics.convention.dimensions)
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in noise_seeds])
        normalised: NDArray[np.float32] = self.network.denoise(inputs, noise.to(self.device)).float().cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(normalised).all(axis=(1, 2)))
        if len(bad):
            raise ContractError(f"the policy returned NaN or infinity for observation {bad[0]} of {len(normalised)}")
        return normalised

    def executable(self, actions: NDArray[np.float32], observations: Sequence[Observation]) -> NDArray[np.float32]:
        """What `sample` gave for observations, (B, K, A), in the numbers of the data set, which its robot takes: what the
        conversion made of them is undone (`svam.actions`)."""
        pairs = zip(actions, observations, strict=True)
        convention = self.statistics.convention
        return np.stack([undone(convention, chunk, observation.proprioception) for chunk, observation in pairs])

    def act(self, observations: Sequence[Observation], noise_seeds: Sequence[int] | None = None) -> NDArray[np.float32]:
        """The next action chunk of each observation: (B, K, A) float32, in the data set's own numbers, B may be 0.

        `noise_seeds`: one per observation; they decide the sampler's initial noise (and the video model's, where that is
        fresh). None means 0, 1, ...

        Raises:
            ContractError: an observation that does not fit (see `encode`), or NaN out of the network.
        """
        seeds = _seeds(observations, noise_seeds)
        size = self.pad_to or max(1, len(observations))
        chunks = [np.empty((0, self.config.chunk, self.statistics.convention.dimensions), dtype=np.float32)]
        for start in range(0, len(observations), size):
            part, part_seeds = list(observations[start : start + size]), seeds[start : start + size]
            missing = (self.pad_to or len(part)) - len(part)
            filled, filled_seeds = part + [part[-1]] * missing, part_seeds + [part_seeds[-1]] * missing
            actions = self.sample(self.encode(filled, filled_seeds), filled_seeds)[: len(part)]
            chunks.append(self.executable(actions, part))
        return np.concatenate(chunks)

    def save(self, directory: Path, folders: Mapping[str, Path] | None = None) -> None:
        """Write one self-contained folder: `policy/`, every frozen part that this variant uses, and `manifest.json`.

        folders: part name -> folder from which frozen parts are read anew, since `frozen_on` may have rounded those in memory.
        """
        with whole_directory(Path(directory)) as partial:
            sets = list(self.sets.values())
            record = PolicyRecord(svam=self.config, statistics=self.statistics, sets=sets, selected=self.selected)
            save_module(partial / "policy", self.network, record.model_dump(mode="json"))
            for name in self.config.frozen_parts.names:
                (partial / name).mkdir()
                part: Any = self.foresight.part(name)
                (part if folders is None else type(part).load(folders[name])).save(partial / name)
            write_manifest(partial)

    @classmethod
    def load(cls, directory: Path, device: torch.device | str = "cpu") -> SVAM:
        """Read what `save` wrote, after checking every file against the manifest.

        Raises:
            FileError: a part is missing, truncated, changed or does not fit the others; the sentence names it.
        """
        directory = Path(directory)
        present = verify_manifest(directory)
        if "policy" not in present:
            raise FileError(f"{directory}: part 'policy' is not in the manifest")
        state, raw = load_state(directory / "policy")
        record = stated(PolicyRecord, raw, directory / "policy/config.json")
        config, statistics = record.svam, record.statistics
        folders = {name: directory / name for name in config.frozen_parts.names}
        missing = [name for name in folders if name not in present]
        if missing:
            raise FileError(f"{directory}: part '{missing[0]}' is not in the manifest, but the policy's context needs it")
        foresight = ForesightModel.load_parts(config.frozen_parts, config.sampler, folders)
        network = PolicyNetwork(config, statistics)
        restore(network, state, directory / "policy")
        svam = cls(config, statistics, foresight, network, record.sets).to(torch.device(device))
        svam.selected = record.selected
        return svam


def _seeds(observations: Sequence[Observation], noise_seeds: Sequence[int] | None) -> list[int]:
    seeds = list(range(len(observations))) if noise_seeds is None else [int(s) for s in noise_seeds]
    if len(seeds) != len(observations):
        raise ContractError(f"noise_seeds: found {len(seeds)}, expected one for each of {len(observations)} observations")
    return seeds
