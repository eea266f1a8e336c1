"""The one attention: it is the library's, and written out and fused it gives the same numbers and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from svam.errors import ParamsError
from svam.models import attention
from svam.models.attention import Attention, Block
from svam.models.decoupler import Decoupler
from svam.models.perceiver import UniPerceiver
from svam.models.policy import ActionDiffusion
from svam.params import Perceiver
from tests.models import test_decoupler, test_policy, test_video


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def decoupler() -> tuple[nn.Module, Callable[[Decoupler], Tensor]]:
    features, reference, targets = test_decoupler.inputs()
    return test_decoupler.awake(), lambda model: model.loss(features, reference, targets)


def perceiver() -> tuple[nn.Module, Callable[[UniPerceiver], Tensor]]:
    model = UniPerceiver(Perceiver(queries=2, width=16, depth=2, heads=4), (3, 2, 4, 5))
    return model, lambda model: model(noise(2, 3, 2, 4, 5)).square().mean()


def policy() -> tuple[nn.Module, Callable[[ActionDiffusion], Tensor]]:
    model = test_policy.build()
    nn.init.normal_(model.decoder[0].modulation.weight, std=0.5)  # type: ignore[union-attr, arg-type]
    mask = torch.ones(4, 3, dtype=torch.bool)

    def loss(model: ActionDiffusion) -> Tensor:
        context = model.encode_context(*test_policy.conditions(), None)
        return model.loss(context, noise(4, 3, 2), mask, torch.Generator().manual_seed(0))

    return model, loss


def video() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    condition, text, clip = test_video.inputs(1)  # of one clip: the sentence's keys are computed once
    return test_video.tiny(), lambda model: model.raw(clip, torch.ones(1), condition, text)[1].square().mean()


@pytest.mark.parametrize("build", [decoupler, perceiver, policy, video])
def test_written_out_and_fused_agree(build: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]],
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Every network, by the kernel of a CPU and by that of a GPU: value and gradients to 1e-5."""
    torch.manual_seed(0)
    model, loss = build()
    results = []
    for fused in (False, True):
        calls: list[Tensor] = []
        monkeypatch.setattr(attention, "fused", lambda device, fused=fused, calls=calls: bool(calls.append(device)) or fused)
        model.zero_grad()
        value = loss(model)
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert calls
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
