"""What training and inference hold on a GPU at the least, read off the pipeline's own passes on fake tensors, which have shapes
and no values.

Of a training step that is what lies there between steps, and what autograd keeps of the forward pass for the backward pass; of
a pass without gradients, inputs and outputs of its largest layer. What an operation needs for itself, what the allocator loses
and what libraries take is not in it, so every number is a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from svam.analysis.foresight import MOMENTS
from svam.models import attention
from svam.models.autoencoder import frames_within
from svam.models.foresight import FrozenParts
from svam.models.svam import Inputs
from svam.models.teachers import Teacher
from svam.models.video import VideoModel
from svam.params import Moments, Optimiser, Params
from svam.precision import MATRICES
from svam.presets.data import Data
from svam.presets.models import Models
from svam.training.finetune_video import denoising_loss
from svam.training.small_cards import ADAPTED, LAYERS, checkpointed

BLOCK, SMALL = 256, 4096
"""Values of 8-bit moments that share a float32 scale; a tensor of fewer values than that has float32 moments (bitsandbytes)."""


class Held(NamedTuple):
    """Bytes on the card. accumulated: a step has several batches, and gradients lie there in the second one's forward pass."""

    weights: int
    gradients: int = 0
    moments: int = 0
    average: int = 0
    activations: int = 0
    accumulated: bool = False

    @property
    def least(self) -> int:
        """The bytes that lie there at one time, at the least: without accumulation gradients come as activations go."""
        both = self.gradients + self.activations if self.accumulated else max(self.gradients, self.activations)
        return self.weights + self.moments + self.average + both


class Means(NamedTuple):
    """By what fine-tuning the U-Net is made to fit a card: the params of these names."""

    lora_rank: int | None = None
    checkpointing: bool = False
    average: str = "device"
    moments: Moments = "float32"

    @classmethod
    def of(cls, params: Params) -> Means:
        video, machine = params.finetune_video, params.machine
        return cls(video.lora_rank, machine.checkpointing, machine.average, video.moments)

    def __str__(self) -> str:
        """What differs from the first of `LADDER`, as keys and values."""
        keys = {"lora_rank": "finetune_video", "moments": "finetune_video", "checkpointing": "machine", "average": "machine"}
        changed = [key for key in self._fields if getattr(self, key) != self._field_defaults[key]]
        return ", ".join(f"{keys[key]}.{key}: {str(getattr(self, key)).lower()}" for key in changed) or "none"


LADDER = (
    Means(),
    Means(checkpointing=True),
    Means(checkpointing=True, average="host"),
    Means(checkpointing=True, moments="int8"),
    Means(checkpointing=True, average="host", moments="int8"),
    Means(lora_rank=16),
    Means(lora_rank=16, checkpointing=True),
)
"""What a plan compares, from no means at all to adapters and layers that are computed twice."""


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def moment_bytes(values: int, moments: Moments) -> int:
    """Of AdamW's two moments of a tensor with so many values."""
    if moments == "float32" or values < SMALL:
        return 8 * values
    return 2 * (values + 4 * -(-values // BLOCK))


def held_by(module: nn.Module, optimiser: Optimiser, activations: int, means: Means = Means(), shards: int = 1) -> Held:
    """What training `module` holds: its weights and buffers, and the rest for what requires gradients; of all but activations
    one of so many `shards`."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return Held(
        bytes_of([*module.parameters(), *module.buffers()]) // shards,
        bytes_of(trained) // shards,
        sum(moment_bytes(p.numel(), means.moments) for p in trained) // shards,
        bytes_of(trained) // shards if optimiser.ema and means.average == "device" else 0,
        activations,
        optimiser.accumulate > 1,
    )


def state_bytes(module: nn.Module, optimiser: Optimiser, moments: Moments = "float32", best: bool = False) -> int:
    """What `svam.training.state.TrainingState` saves of a training, but for what is small beside it: trained parameters and
    buffers, moments, the average, and where checkpoints are compared the `best` one's."""
    trained = [p for p in module.parameters() if p.requires_grad]
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    saved = [tensor for name, tensor in module.state_dict().items() if name not in frozen]
    averages = (bool(optimiser.ema) + best) * bytes_of(trained)
    return bytes_of(saved) + averages + sum(moment_bytes(p.numel(), moments) for p in trained)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout that keeps a mask of bool."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


class _Operations(TorchFunctionMode):
    """Where the operations of a GPU keep something else than a CPU's: under autocast its norms compute in float32, its fused
    attention takes dropout, and its dropout keeps a mask of bool."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = dict(named or {})
        if function in (functional.layer_norm, functional.group_norm) and torch.is_autocast_enabled("cpu"):
            arguments = (arguments[0].float(), *arguments[1:])
        elif function is functional.scaled_dot_product_attention:
            named["dropout_p"] = 0.0
        elif function is functional.dropout:
            function = _dropout
        return function(*arguments, **named)


@contextmanager
def as_on_a_gpu(bf16: bool) -> Iterator[None]:
    """Within the block the CPU keeps what a GPU would: attention is fused, and where `bf16` matrix products and convolutions
    are of bfloat16."""
    fused, attention.fused = attention.fused, lambda device: True
    try:
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]),
            _Operations(),
        ):
            yield
    finally:
        attention.fused = fused


def kept_for_backward(
    module: nn.Module, loss: Callable[[], Tensor], layers: Sequence[nn.Module] = ()
) -> tuple[int, list[tuple[int, int]]]:
    """Bytes that autograd keeps of `loss()` for the backward pass beside the weights of `module`; and those that it had kept
    when each of `layers` began, and when it ended."""
    seen = {storage._cdata: storage for storage in (t.untyped_storage() for t in (*module.parameters(), *module.buffers()))}
    total, marks = 0, list[int]()

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:  # and none that comes later has its number, since it is held here
            seen[storage._cdata] = storage
            total += storage.nbytes()
        return tensor

    def mark(*_: object) -> None:
        marks.append(total)

    hooks = [hook for m in layers for hook in (m.register_forward_pre_hook(mark), m.register_forward_hook(mark))]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss()
    finally:
        for hook in hooks:
            hook.remove()
    return total, list(zip(marks[::2], marks[1::2], strict=True))


def widest(module: nn.Module, call: Callable[[], object]) -> int:
    """Bytes of inputs and outputs of the layer of `module` that has most of them in `call()`, which no gradients follow."""
    most = 0

    def look(_: nn.Module, inputs: Any, outputs: Any) -> None:
        nonlocal most
        storages = [t.untyped_storage() for t in tree_leaves((inputs, outputs)) if isinstance(t, Tensor)]
        most = max(most, sum({storage._cdata: storage.nbytes() for storage in storages}.values()))

    hooks = [m.register_forward_hook(look) for m in module.modules() if not any(m.children())]
    try:
        with torch.no_grad():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return most


def _make_fake(module: nn.Module) -> None:
    """Within a mode of fake tensors: what a module holds on the meta device becomes a fake tensor of the CPU."""
    made: dict[Tensor, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter not in made:
                made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
            part._parameters[name] = None if parameter is None else made[parameter]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


class _Adapter(nn.Module):
    """A linear layer that stays as it is, and a low-rank one beside it that learns, in the place of peft's."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        read: Tensor = self.layer(x) + self.up(self.down(x))
        return read


def _adapt(unet: Any, rank: int, bf16: bool) -> None:
    """Make a U-Net on the meta device what it is within `svam.training.small_cards.adapted`."""
    unet.requires_grad_(False)
    for name, module in list(unet.named_modules()):
        if bf16 and isinstance(module, MATRICES):
            module.to(torch.bfloat16)
        if name.endswith(tuple(f".{layer}" for layer in ADAPTED)):
            with torch.device("meta"):
                unet.set_submodule(name, _Adapter(module, rank))


class Account:
    """The memory of a run on one card, by stage. Its models are built anew, of fake tensors."""

    def __init__(self, params: Params, data: Data) -> None:
        """Raises as `Models`."""
        self.params, self.fake = params, FakeTensorMode()
        self.models = models = Models(params, data)
        parts = [models.autoencoder, models.contrast or models.text, models.video, models.policy]
        with self.fake:
            _make_fake(nn.ModuleList([*parts, *models.teachers.values(), *models.decouplers.values()]))
        self._videos: dict[int | None, VideoModel] = {None: models.video}
        self._passes: dict[tuple[int | None, bool, int], tuple[int, list[tuple[int, int]]]] = {}

    @property
    def cards(self) -> int:
        machine = self.params.machine
        return machine.processes if machine.launch == "torchrun" else 1

    @property
    def shards(self) -> int:
        return self.cards if self.params.machine.shard else 1

    def own(self, batch: int) -> int:
        """A card's part of a batch."""
        return -(-batch // self.cards)

    def video(self, lora_rank: int | None = None) -> VideoModel:
        """The video model; with adapters of this rank, if any."""
        if lora_rank is not None and lora_rank not in self._videos:
            video = Models(self.params, self.models.data).video
            _adapt(video.unet, lora_rank, self.params.finetune_video.training.bf16)
            with self.fake:
                _make_fake(video)
            self._videos[lora_rank] = video
        return self._videos[lora_rank]

    def kept(self, means: Means, batch: int) -> list[int]:
        """Bytes that autograd keeps of a pass over so many clips and, where layers are computed twice, those that are there
        when the backward pass has computed each of them again, with what was kept before it. From two clips on all are linear
        in the batch."""
        kept, whole = self._pass(means.lora_rank, False, batch)
        if not means.checkpointing:
            return [kept]
        kept, begun = self._pass(means.lora_rank, True, batch)
        return [kept, *(before + end - start for (before, _), (start, end) in zip(begun, whole, strict=True))]

    def _pass(self, lora_rank: int | None, checkpointing: bool, batch: int) -> tuple[int, list[tuple[int, int]]]:
        """What `kept_for_backward` says of a training pass over so many clips, by the layers that can be computed twice."""
        key = (lora_rank, checkpointing, batch)
        if key not in self._passes:
            video, bf16 = self.video(lora_rank), self.params.finetune_video.training.bf16
            config, layers = video.config, [m for m in video.unet.modules() if isinstance(m, LAYERS)]

            def loss() -> Tensor:
                clip, text = torch.empty(batch, *config.clip_shape), torch.empty(batch, config.text_tokens, config.text_width)
                return denoising_loss(video, clip, torch.empty(batch), clip, clip[:, 0], text).mean()

            twice = checkpointed(video.unet, torch.device("cuda"), bf16) if checkpointing else nullcontext()
            with self.fake, as_on_a_gpu(bf16), twice:
                self._passes[key] = kept_for_backward(video, loss, layers)
        return self._passes[key]

    def fine_tuning(self, means: Means, batch: int) -> Held:
        """Of `finetune_video` at so many clips at a time."""
        training = self.params.finetune_video.training
        return held_by(self.video(means.lora_rank), training, max(self.kept(means, batch)), means, self.shards)

    def training(self, stage: str) -> Held | None:
        """What a stage holds of what it trains; None where it trains nothing."""
        if stage == "finetune_video" and self.params.finetune_video.training.steps:
            return self.fine_tuning(Means.of(self.params), self.own(self.params.finetune_video.training.batch))
        if stage not in (trainings := self._trainings()):
            return None
        module, optimiser, loss = trainings[stage]
        alone = stage.startswith("prepare_backbones")  # in one process
        batch, shards = (optimiser.batch, 1) if alone else (self.own(optimiser.batch), self.shards)
        with self.fake, as_on_a_gpu(optimiser.bf16):
            kept, _ = kept_for_backward(module, lambda: loss(batch))
            return held_by(module, optimiser, kept, shards=shards)

    def _trainings(self) -> dict[str, tuple[nn.Module, Optimiser, Callable[[int], Tensor]]]:
        """Stage -> what it trains, how, and the part of its loss that is computed by weights, of so many samples."""
        models, backbones, size = self.models, self.params.prepare_backbones, self.models.data.size
        autoencoder, contrast, tokens = models.autoencoder, models.contrast, backbones.text.tokens
        found = dict[str, tuple[nn.Module, Optimiser, Callable[[int], Tensor]]]()
        if backbones.autoencoder.source == "in_domain":
            found["prepare_backbones_autoencoder"] = (
                autoencoder, backbones.autoencoder.training,
                lambda n: autoencoder.decode_pixels(autoencoder.encode_pixels(torch.empty(n, 3, *size))),
            )  # fmt: skip
        if contrast:
            side = contrast.clip.config.vision_config.image_size

            def both(n: int) -> Tensor:
                seen = contrast.clip.vision_model(torch.empty(n, 3, side, side))[0].sum()
                return seen + contrast.clip.text_model(torch.zeros(n, tokens, dtype=torch.int64))[0].sum()  # type: ignore[no-any-return]

            found["prepare_backbones_text"] = (contrast, backbones.text.training, both)
        for branch, teacher in models.teachers.items():

            def dense(n: int, teacher: Teacher = teacher) -> Tensor:
                return teacher.dense(torch.empty(n, 3, teacher.config.image_size, teacher.config.image_size))[0]

            if teacher.config.objective is not None:
                found[f"prepare_backbones_teacher@{branch}"] = (teacher, getattr(backbones, branch).training, dense)
        for branch, decoupler in models.decouplers.items():

            def distilled(n: int, decoupler: Any = decoupler) -> Tensor:
                c, half = decoupler.config, torch.float16
                targets = torch.empty(n, c.frames, *c.grid, c.teacher_channels, dtype=half)
                features = torch.empty(n, c.frames, *c.grid, c.feature_channels, dtype=half)
                return decoupler.loss(features, targets[:, 0], targets)  # type: ignore[no-any-return]

            found[f"distill@{branch}"] = (decoupler, self.params.distill.training, distilled)
        section, (height, width), views = self.params.train_policy, size, self.params.convert.parts[0].foreseen

        def denoised(n: int) -> Tensor:
            state, config = models.policy.config.proprioception, models.policy.config
            inputs = Inputs(
                {entry: torch.empty(n, *shape, dtype=torch.float16) for entry, shape in models.shapes.items()},
                torch.empty(n, *config.text), torch.empty(n, views * height, width, 3, dtype=torch.uint8),
                torch.empty(n, state) if state else None,
            )  # fmt: skip
            chunks = torch.empty(n * section.noise_draws, section.chunk, models.data.actions)
            return models.policy.diffusion.raw(chunks, chunks[:, 0, 0], models.policy.context(inputs))

        return found | {"train_policy": (models.policy, section.training, denoised)}

    def passes(self, stage: str) -> int:
        """Bytes of the largest layer of what a stage computes without gradients; 0 where that is not looked at."""
        params, models, name = self.params, self.models, stage.split()[0]
        autoencoder, video, config, (height, width) = models.autoencoder, models.video, models.video.config, models.data.size
        frames = config.frames

        def encode(n: int) -> int:
            return widest(autoencoder, lambda: autoencoder.encode_pixels(torch.empty(n, 3, height, width)))

        def decode(clips: int, length: int = frames, most: int = params.encode.batch) -> int:
            together = length * min(clips, max(1, most // length))
            latents = torch.empty(together, *config.clip_shape[1:])
            return widest(autoencoder, lambda: autoencoder.decode_pixels(latents, length))

        def look(branch: str, n: int) -> int:
            teacher, side = models.teachers[branch], models.teachers[branch].config.image_size
            return widest(teacher, lambda: teacher.tokens(torch.empty(n, 3, side, side)))

        def unet(n: int, up_blocks: int | None, bf16: bool) -> int:
            clip, text = torch.empty(n, *config.clip_shape), torch.empty(n, config.text_tokens, config.text_width)
            with as_on_a_gpu(bf16):
                return widest(video, lambda: video.raw(clip, torch.empty(n), clip[:, 0], text, up_blocks))

        def encoded(n: int) -> int:
            needs, entries = FrozenParts.of_entries(models.entries), set(models.entries)
            if not needs.video:
                return 0
            n *= params.convert.parts[0].foreseen  # the cameras of an observation are a batch
            most, generated = frames_within((height, width)), bool(entries & {"generated", "goal_frame"})
            blocks = None if generated else models.sampler.up_blocks
            found = [encode(min(n, most)), unet(n, blocks, params.train_policy.encode_bf16)]
            if generated:  # as `ForesightModel` decodes it: the last frame alone may do
                whole = "generated" in entries or any(teacher.sees_clips for teacher in models.teachers.values())
                found.append(decode(n, frames if whole else 1, most))
            if needs.decouplers and params.cache_teacher.reference == "reconstruction":
                found.append(decode(n, 1, most))
            return max(found)

        with self.fake, as_on_a_gpu(False):
            if name == "encode":
                return encode(params.encode.batch)
            if name == "generate":
                return max(unet(params.generate.batch, None, params.generate.bf16), decode(params.generate.batch))
            if name.startswith("cache_teacher@"):
                return look(name.split("@")[1], params.cache_teacher.batch)
            if name == "foresight":
                features = MOMENTS if params.generate.keep_features else params.foresight.batch
                found = [look(branch, MOMENTS * frames) for branch in models.decouplers]
                found.append(decode(params.foresight.batch, 1, frames_within((height, width))))
                return max(unet(features, models.sampler.up_blocks, params.generate.bf16), *found)
            if name == "foresight,":  # and attention
                return encoded(params.foresight.batch)
            if name == "train_policy":
                return encoded(params.train_policy.encode_batch)
            return encoded(params.evaluate.batch) if name == "evaluate" else 0
