"""Precision that the device has."""

from __future__ import annotations

import pytest
import torch

from svam import device


@pytest.mark.parametrize(
    ("computes", "bf16", "expected"), [(True, True, torch.bfloat16), (False, True, torch.float32), (True, False, torch.float32)]
)
def test_bfloat16_is_used_where_it_is_computed(
    monkeypatch: pytest.MonkeyPatch, computes: bool, bf16: bool, expected: torch.dtype
) -> None:
    """Processors that emulate it would take ten times as long."""
    monkeypatch.setattr(device, "computes_bfloat16", lambda _: computes)
    with device.mixed_precision(torch.device("cpu"), bf16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
