"""What each of several processes computes of a batch, and how they make one step of it (`svam.processes`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from svam.errors import ParamsError
from svam.processes import count, number


def own_rows(rows: int) -> slice:
    """This process's part of the rows of a batch.

    Raises:
        ParamsError: the parts would not be equal, so that gradients would not be those of the batch.
    """
    size, rest = divmod(rows, count())
    if rest:
        raise ParamsError(f"a batch of {rows} does not divide by {count()} processes; change the batch, or how many there are")
    return slice(number() * size, (number() + 1) * size)


def share(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """This process's `rows` of what `draw` draws for the whole batch: of one seed, so that no row's depends on how many
    processes there are."""
    return draw(rows * count())[own_rows(rows * count())]


def synchronised(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, each backward pass through whose `forward` leaves the mean of the gradients of all processes (DDP)."""
    if count() == 1:
        return module
    from accelerate import Accelerator

    prepared: nn.Module = Accelerator(cpu=device.type == "cpu", mixed_precision="no").prepare_model(module)
    return prepared


def unsynchronised(module: nn.Module) -> AbstractContextManager[None]:
    """Within the block a backward pass adds up each process's own gradients, for a later one to take the mean of."""
    return nullcontext() if count() == 1 else module.no_sync()  # type: ignore[operator]


def mean(value: Tensor) -> Tensor:
    """The mean over all processes."""
    if count() == 1:
        return value
    from accelerate.utils import reduce

    return reduce(value, "mean")  # type: ignore[no-any-return]
