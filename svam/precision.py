"""Which operations compute in bfloat16."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = frozenset({torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d})


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16. Processors without AVX-512 only emulate it, ten times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def mixed_precision(device: torch.device, bf16: bool) -> Generator[None]:
    """Autocast to bfloat16 where `bf16` says so and the device computes in it; float32 otherwise. On CPUs convolutions compute
    in float32 always (`Float32Convolutions`)."""
    if not (bf16 and computes_bfloat16(device)):
        yield
    elif device.type == "cpu":
        with torch.autocast("cpu", dtype=torch.bfloat16), Float32Convolutions():
            yield
    else:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield


class Float32Convolutions(TorchFunctionMode):
    """Takes convolutions out of autocast on CPUs.

    In bfloat16 oneDNN's have a barrier of their own that spins, which no setting of OpenMP reaches: beside another busy process
    a training step of the video model took 6.0 s with them and 0.9 without, alone 0.33 and 0.36 (two cores with AVX-512).
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """`function`, with floating-point arguments in float32 where it is a convolution."""
        named = named or {}
        if function not in CONVOLUTIONS:
            return function(*arguments, **named)
        with torch.autocast("cpu", enabled=False):
            return function(*map(_single, arguments), **{name: _single(value) for name, value in named.items()})


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) else value
