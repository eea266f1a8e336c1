"""Weights in shards (ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054; FSDP, Zhao et al. 2023, arXiv 2304.11277): of each tensor
every process keeps some rows, with their gradients, moments and average, and has the others while a layer computes."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from svam import processes, shares

KEPT = ("_buffers", "training")
"""What training changes of a module's attributes, besides its parameters."""


class Shards:
    """The parameters of a module in shards, by torch's `fully_shard`; the means of all processes' gradients in the same shards.

    rows: of each trained parameter those that this process keeps, along the first dimension, perhaps none: leaves that the
        optimiser changes, and that have gradients from `clip` on.
    """

    def __init__(self, shared: nn.Module, layers: tuple[type[nn.Module], ...], device: torch.device) -> None:
        """shared: through whose `forward` all that uses the parameters goes; equal in all processes. layers: kinds of its
        modules that are gathered one at a time; what belongs to none of them is gathered together."""
        self._modules = list(shared.modules())
        self._plain = [_attributes(module) for module in self._modules]
        self._whole = list(shared.parameters())
        # Of layers that return a view; nothing here changes what a layer returns.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(device.type, (processes.count(),))
        for module in (*(module for module in self._modules[1:] if isinstance(module, layers)), shared):
            fully_shard(module, mesh=mesh)
        self._sharded: list[Any] = list(shared.parameters())  # DTensor, of which torch's stubs say Parameter
        for parameter in self._whole:
            parameter.data = parameter.data.new_empty(0)
        trained = [sharded for sharded in self._sharded if sharded.requires_grad]
        self._of = {nn.Parameter(sharded.detach().to_local()): sharded for sharded in trained}
        self.rows = list(self._of)

    def clip(self, limit: float) -> None:
        """Give the rows the gradients that backward passes have left, made smaller where the norm of all is above `limit`."""
        for rows, sharded in self._of.items():
            rows.grad = None if sharded.grad is None else sharded.grad.to_local()
            sharded.grad = None
        own = nn.utils.get_total_norm([rows.grad for rows in self.rows if rows.grad is not None])
        norm = (shares.mean(own.square()) * processes.count()).sqrt()
        nn.utils.clip_grads_with_norm_(self.rows, limit, norm)

    def own(self, value: Tensor, rows: Tensor) -> Tensor:
        """This process's rows of a value of a whole parameter's shape; another value, such as a number of steps, as it is."""
        sharded = self._of[rows]  # type: ignore[index]
        return _own(value) if value.shape == sharded.shape else value

    def whole(self, value: Tensor, rows: Tensor) -> Tensor:
        """In the host's memory of the first process, of all processes' rows the whole; another value as it is. All call it."""
        return _gathered(_like(self._of[rows], value)) if value.shape == rows.shape else value  # type: ignore[index]

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """That of the module, whole, in the first process. All call it."""
        return {name: _gathered(t) if isinstance(t, DTensor) else t for name, t in module.state_dict().items()}

    def sharded_state_dict(self, module: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """That of the module, with whole `values` of parameters and buffers, as its `load_state_dict` takes it."""
        state = module.state_dict()
        for name, value in values.items():
            state[name] = _like(state[name], _own(value)) if isinstance(state.get(name), DTensor) else value
        return state

    def make_whole(self) -> None:
        """Make the modules ordinary ones again, each process's with all weights. All call it."""
        for parameter, sharded in zip(self._whole, self._sharded, strict=True):
            parameter.data = sharded.detach().full_tensor()
        self._put(self._plain)

    @contextmanager
    def made_whole(self) -> Iterator[None]:
        """Within the block the modules are ordinary ones, whose weights are to be read alone. All enter it."""
        sharded = [_attributes(module) for module in self._modules]
        self.make_whole()
        try:
            yield
        finally:
            for parameter in self._whole:
                parameter.data = parameter.data.new_empty(0)
            self._put(sharded)

    def _put(self, attributes: list[tuple[type[nn.Module], dict[str, Any]]]) -> None:
        """torch has no way back from `fully_shard`, which changes a module's class, its hooks and its parameters."""
        for module, (kind, values) in zip(self._modules, attributes, strict=True):
            kept = {name: vars(module)[name] for name in KEPT}
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(values | kept)


def _attributes(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]]:
    """A module's class and attributes; those that list parameters or hooks are copied."""
    values = {name: value.copy() if type(value) in (dict, OrderedDict) else value for name, value in vars(module).items()}
    return type(module), values


def _own(value: Tensor) -> Tensor:
    """The rows of a whole tensor that `fully_shard` leaves to this process: as many as to any before it, or what there is."""
    size = -(-len(value) // processes.count())
    return value[processes.number() * size : (processes.number() + 1) * size]


def _like(sharded: DTensor, rows: Tensor) -> DTensor:
    """The tensor of which these are this process's rows, in the shards of another."""
    mesh, shape, stride = sharded.device_mesh, sharded.shape, sharded.stride()
    return DTensor.from_local(rows, mesh, sharded.placements, run_check=False, shape=shape, stride=stride)


def _gathered(sharded: DTensor) -> Tensor:
    """The whole tensor, in the host's memory of the first process; none in the others, which call this as well."""
    whole = sharded.full_tensor().detach()
    return whole.cpu() if processes.first() else whole.new_empty(0)
