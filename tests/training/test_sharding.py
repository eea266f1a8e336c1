"""Weights in shards: what each process keeps of a training, and an ordinary module between and after its steps."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from svam import processes
from svam.training.finetune_video import denoising_loss
from svam.training.loop import SharedLoss
from svam.training.sharding import Shards
from svam.training.small_cards import LAYERS
from svam.training.state import AveragedWeights
from tests.models.test_video import inputs, tiny
from tests.together import together

CPU = torch.device("cpu")


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def keep_shards(out: Path) -> None:
    """Writes the bytes that this process keeps of a U-Net in training."""
    model = tiny().train()
    kinds = [type(module) for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    condition, text, noise = inputs()
    sigma = torch.tensor([80.0, 0.7])
    model_loss = SharedLoss(model, lambda _: denoising_loss(model, noise, sigma, noise, condition, text).mean())
    expected = model_loss(None).detach()
    shards = Shards(model_loss, LAYERS, CPU)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    assert len(units) == sum(isinstance(module, LAYERS) for module in model.modules()) > 3
    adam, average = torch.optim.AdamW(shards.rows, fused=True), AveragedWeights(shards.rows, 0.9)
    loss = model_loss(None)
    assert torch.equal(loss, expected)
    loss.backward()
    with shards.made_whole():
        assert [type(module) for module in model.modules()] == kinds
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model_loss(None), expected)
    shards.clip(1.0)
    gradients = [rows.grad for rows in shards.rows if rows.grad is not None]
    adam.step()
    moments = [adam.state[rows][kind] for rows in shards.rows for kind in ("exp_avg", "exp_avg_sq")]
    counts = [size(list(kept)) for kept in (shards.rows, gradients, moments, average.average)]
    (out / str(processes.number())).write_text(" ".join(map(str, counts)))
    model_loss(None).backward()
    shards.make_whole()
    assert [type(module) for module in model.modules()] == kinds
    assert not torch.equal(model.unet.conv_in.weight, before["unet.conv_in.weight"])


def test_each_process_keeps_its_part(tmp_path: Path) -> None:
    """Together exactly what one process keeps, and none much more than its share: of a tensor with an odd number of rows the
    first keeps one more."""
    assert together(keep_shards, tmp_path) == [0, 0]
    counts = [[int(word) for word in (tmp_path / str(number)).read_text().split()] for number in (0, 1)]
    whole = size(list(tiny().parameters()))
    assert [sum(pair) for pair in zip(*counts, strict=True)] == [whole, whole, 2 * whole, whole]
    assert 0.49 * whole < counts[1][0] <= counts[0][0] < 0.51 * whole
