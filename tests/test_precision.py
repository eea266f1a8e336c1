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


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, padding="valid", bias=False), (2, 4, 8)),
    (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2), groups=2), (2, 4, 8, 9)),
    (nn.Conv3d(4, 6, (3, 1, 1), padding=(1, 0, 0)), (2, 4, 5, 3, 3)),
]


@pytest.mark.parametrize(("convolution", "shape"), CONVOLUTIONS)
def test_gradients_of_convolutions_weights_on_cpus_are_computed_in_float32(
    monkeypatch: pytest.MonkeyPatch, convolution: nn.Module, shape: tuple[int, ...]
) -> None:
    """In bfloat16 they would spin beside other processes. What they are computed from is rounded to bfloat16, like outputs."""
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: True)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).bfloat16().requires_grad_()
    wanted = torch.randn(convolution(values.float()).shape, generator=generator).bfloat16()
    learned = list(convolution.parameters())
    with torch.no_grad():
        for parameter in learned:
            parameter.copy_(parameter.bfloat16())
    exact = convolution(values.float())
    expected = torch.autograd.grad(exact, [values, *learned], wanted.float())
    with precision.mixed_precision(CPU, bf16=True):
        found = convolution(values)
    gradients = torch.autograd.grad(found, [values, *learned], wanted)
    assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), exact, rtol=1e-2, atol=1e-2)
    assert gradients[0].dtype == torch.bfloat16 and torch.allclose(
        gradients[0].float(), expected[0].float(), rtol=1e-2, atol=1e-2
    )
    for gradient, other in zip(gradients[1:], expected[1:], strict=True):
        assert gradient.dtype == torch.float32 and torch.allclose(gradient, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exact", [nn.ConvTranspose2d(3, 3, 2, 2), nn.Conv2d(3, 3, 2, padding="same")])
def test_frozen_convolutions_have_no_gradients_and_some_stay_in_float32(
    monkeypatch: pytest.MonkeyPatch, exact: nn.Module
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: True)
    frozen = nn.Conv2d(3, 3, 3).requires_grad_(False)
    picture = torch.randn(2, 3, 8, 8, requires_grad=True)
    with precision.mixed_precision(CPU, bf16=True):
        seen = frozen(picture)
        larger = exact(seen)
        with torch.no_grad():
            assert exact(picture).dtype == frozen(picture).dtype == torch.bfloat16
    assert (seen.dtype, larger.dtype) == (torch.bfloat16, torch.float32)
    larger.square().sum().backward()
    assert picture.grad is not None and picture.grad.abs().sum() > 0 and frozen.weight.grad is None
