"""Fine-tuning a large U-Net on a small card: layers computed twice, and adapters in place of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from svam.errors import MachineError
from svam.precision import MATRICES, computes_bfloat16, mixed_precision
from svam.seeds import seed_of

ADAPTED = ("to_q", "to_k", "to_v", "to_out.0")
"""The linear layers of attention, over space, time and text, which get adapters."""
LAYERS = (SpatioTemporalResBlock, TransformerSpatioTemporalModel)
"""The layers of a spatio-temporal U-Net, which are computed twice, or gathered from shards, one at a time."""


def rounded_by(device: torch.device, bf16: bool) -> tuple[type[nn.Module], ...]:
    """Kinds of modules whose weights `mixed_precision` rounds to bfloat16 at every use."""
    return MATRICES if bf16 and computes_bfloat16(device) else ()


@contextmanager
def checkpointed(unet: nn.Module, device: torch.device, bf16: bool) -> Iterator[None]:
    """Within the block each layer of a spatio-temporal U-Net keeps its inputs alone, and the backward pass computes it again
    (Chen et al. 2016, arXiv 1604.06174). The gradients are the same to the bit, since the layers draw no random numbers.

    diffusers' own switch leaves out attention over time, which is half of the activations. bf16: the forward pass is under
    `mixed_precision`.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if device.type == "cpu":  # torch restores autocast by itself, but not what keeps gradients out of it
        options["context_fn"] = lambda: (nullcontext(), mixed_precision(device, bf16))
    layers = [m for m in unet.modules() if isinstance(m, LAYERS)]

    def twice(forward: Callable[..., Any]) -> Callable[..., Any]:
        # A function of our own: torch.compile passes over torch's, and would not compile a layer whose forward is one of them.
        def compute(*arguments: Any, **named: Any) -> Any:
            return checkpoint(forward, *arguments, **options, **named)

        return compute

    for layer in layers:
        layer.forward = twice(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def adapted(unet: nn.Module, rank: int, seed: int, rounded: tuple[type[nn.Module], ...] = ()) -> Iterator[None]:
    """Within the block low-rank adapters of attention (LoRA, Hu et al. 2022) are all that is trained of the U-Net; after it
    they are merged into its weights, and it is an ordinary one again.

    rounded: see `rounded_by`; frozen weights of these kinds are kept in bfloat16 meanwhile: half the memory, the same numbers.

    Raises:
        MachineError: peft is not installed.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError:
        raise MachineError(
            f"finetune_video.lora_rank is {rank}, but peft is not installed: pip install -c constraints.txt -e '.[cards]' "
            "brings it, or set lora_rank to null"
        ) from None
    torch.manual_seed(seed_of(seed, "adapters"))
    tuner = LoraModel(unet, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ADAPTED)), "default")
    matrices = [m for m in unet.modules() if isinstance(m, rounded)]
    frozen = [p for matrix in matrices for p in matrix.parameters(recurse=False) if not p.requires_grad]
    exact = [p.detach().to("cpu", copy=True) for p in frozen]
    for parameter in frozen:
        parameter.data = parameter.data.bfloat16()
    yield
    for parameter, value in zip(frozen, exact, strict=True):
        parameter.data = value.to(parameter.device)
    tuner.merge_and_unload()
    unet.requires_grad_(True)
