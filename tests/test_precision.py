"""Precision that the device has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from svam import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("computes", "bf16", "expected"), [(True, True, torch.bfloat16), (False, True, torch.float32), (True, False, torch.float32)]
)
def test_bfloat16_is_used_where_it_is_computed(
    monkeypatch: pytest.MonkeyPatch, computes: bool, bf16: bool, expected: torch.dtype
) -> None:
    """Processors that emulate it would take ten times as long."""
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: computes)
    with precision.mixed_precision(CPU, bf16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


def test_convolutions_on_cpus_stay_in_float32_with_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between products in bfloat16; in bfloat16 themselves they spin beside other processes."""
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: True)
    generator = torch.Generator().manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3)
    picture = torch.randn(2, 3, 8, 8, generator=generator).bfloat16()
    expected = convolution(picture.float())
    (wanted,) = torch.autograd.grad(expected.square().sum(), convolution.weight)
    with precision.mixed_precision(CPU, bf16=True):
        found = convolution(picture)
        product = found.flatten(2) @ found.flatten(2).mT
    (gradient,) = torch.autograd.grad(found.square().sum(), convolution.weight)
    assert found.dtype == torch.float32 and torch.equal(found, expected) and torch.equal(gradient, wanted)
    assert product.dtype == torch.bfloat16
