"""Which operations compute in bfloat16."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MATRICES = (nn.Linear, nn.Conv2d, nn.Conv3d)
"""Layers that compute in bfloat16 under autocast, and whose weights and biases it rounds to bfloat16 at every call."""
CONVOLUTIONS = frozenset({torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d})


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16. Processors without AVX-512 only emulate it, ten times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def round_weights(module: nn.Module) -> None:
    """Store in bfloat16, in place, the weights of all layers that autocast rounds: half of the memory, no rounding at every
    call, and the same numbers under autocast. The module can no longer be trained or saved."""
    for layer in module.modules():
        if isinstance(layer, MATRICES):
            layer.to(torch.bfloat16)


@contextmanager
def mixed_precision(device: torch.device, bf16: bool) -> Generator[None]:
    """Autocast to bfloat16 where `bf16` says so and the device computes in it; float32 otherwise. On CPUs the gradients of
    convolutions' weights are computed in float32 always (`Float32WeightGradients`)."""
    if not (bf16 and computes_bfloat16(device)):
        yield
    elif device.type == "cpu":
        with torch.autocast("cpu", dtype=torch.bfloat16), Float32WeightGradients():
            yield
    else:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield


class Float32WeightGradients(TorchFunctionMode):
    """Takes the gradients of convolutions' weights out of autocast on CPUs; and convolutions altogether that are transposed or
    have the padding "same".

    In bfloat16 oneDNN computes these gradients with a barrier of its own that spins, which no setting of OpenMP reaches: beside
    another training those of a 3x3 convolution of 128 channels took 241 ms, in float32 3 ms (alone 1.2 and 2.1). Outputs and
    gradients of inputs have no such barrier, and take half the time of float32 (two cores with AVX-512).
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """`function`, and where it is a convolution that may be trained, with the gradients above."""
        named = named or {}
        if function not in CONVOLUTIONS or not torch.is_grad_enabled():
            return function(*arguments, **named)
        with torch.autocast("cpu", enabled=False):
            if function is torch.conv_transpose2d or "same" in (named.get("padding"), *arguments[4:5]):
                return function(*map(_single, arguments), **{name: _single(value) for name, value in named.items()})
            return _convolution(*arguments, **named)


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Any:  # fmt: skip
    """With the arguments of torch's convolutions."""
    if padding == "valid":
        padding = 0
    dimensions = input.ndim - 2
    sizes = [[size] * dimensions if isinstance(size, int) else list(size) for size in (stride, padding, dilation)]
    return _Convolution.apply(input, weight, bias, *sizes, groups)  # type: ignore[no-untyped-call]


class _Convolution(torch.autograd.Function):
    """A convolution in bfloat16 whose gradients of weight and bias are computed in float32."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
        dilation: list[int], groups: int,
    ) -> Tensor:  # fmt: skip
        """The output, in bfloat16."""
        input = input.bfloat16()
        ctx.save_for_backward(input, weight)
        ctx.biases = None if bias is None else [len(bias)]
        ctx.sizes = (stride, padding, dilation, False, [0] * len(stride), groups)
        return torch.convolution(input, weight.bfloat16(), None if bias is None else bias.bfloat16(), *ctx.sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input (bfloat16), weight and bias (float32), where they are wanted."""
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        convolution_backward = torch.ops.aten.convolution_backward
        inputs = weights = biases = None
        if of_input:
            given = (gradient.bfloat16(), input, weight.bfloat16(), None, *ctx.sizes)
            inputs, _, _ = convolution_backward(*given, [True, False, False])
        if of_weight or of_bias:
            given = (gradient.float(), input.float(), weight.float(), ctx.biases, *ctx.sizes)
            _, weights, biases = convolution_backward(*given, [False, of_weight, of_bias])
        return inputs, weights, biases, None, None, None, None
