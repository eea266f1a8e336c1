"""The one attention: it is the library's, and written out and fused it gives the same numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from svam.errors import ParamsError
from svam.models import attention
from svam.models.attention import Attention, Block


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_written_out_and_fused_agree(scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel of a CPU and by that of a GPU, which all networks share: value and gradients."""
    results = []
    for fused in (False, True):
        monkeypatch.setattr(attention, "fused", lambda device, fused=fused: fused)
        q, k, v = (noise(2, 3, length, 4).requires_grad_() for length in (5, 7, 7))
        value = attention.attend(q, k, v, scale)
        value.square().sum().backward()
        results.append([value.detach(), q.grad, k.grad, v.grad])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


NAMES = {
    "attention.qkv": "self_attn.in_proj", "attention.out": "self_attn.out_proj", "attention_norm": "norm1", "mlp_norm": "norm2",
    "mlp.0": "linear1", "mlp.2": "linear2",
}  # fmt: skip
"""Parts of a block -> the library's, whose `in_proj` is no layer of its own."""


def renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    parts = {name: name.rpartition(".") for name in state}
    return {f"{names[a]}{'_' if 'in_proj' in names[a] else '.'}{c}": state[name] for name, (a, _, c) in parts.items()}


@torch.no_grad()
def test_blocks_and_cross_attention_are_the_librarys() -> None:
    torch.manual_seed(0)
    block, x, context = Block(8, 2).eval(), noise(3, 7, 8), noise(3, 5, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 32, activation="gelu", batch_first=True, norm_first=True).eval()
    layer.load_state_dict(renamed(block.state_dict(), NAMES))
    torch.testing.assert_close(block(x), layer(x))
    torch.testing.assert_close(block.attention(x, context), layer.self_attn(x, context, context)[0])


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ParamsError, match=r"width \(8\) must be a multiple of heads \(3\)"):
        Attention(8, 3)
