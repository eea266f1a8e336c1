"""The decoupler: shapes, both anchors, what it starts as, and that a saved one is the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from svam.contract import ContractError
from svam.models.decoupler import Decoupler, DecouplerConfig, FactorisedBlock
from tests.tiny_foresight import reloaded


def config(anchor: Literal["concat", "add"] = "concat", **changes: Any) -> DecouplerConfig:
    return DecouplerConfig(
        feature_channels=5, teacher_channels=6, frames=3, grid=(2, 4), reference="frame", anchor=anchor, width=8, blocks=2,
        heads=2, **changes,
    )  # fmt: skip


def fresh(anchor: Literal["concat", "add"] = "concat", **changes: Any) -> Decoupler:
    torch.manual_seed(0)
    decoupler = Decoupler(config(anchor, **changes))
    decoupler.set_statistics((torch.full((5,), 2.0), torch.full((5,), 3.0)), (torch.full((6,), -1.0), torch.full((6,), 4.0)))
    return decoupler


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return (
        2.0 + 3.0 * torch.randn(batch, 3, 2, 4, 5, generator=random),
        -1.0 + 4.0 * torch.randn(batch, 2, 4, 6, generator=random),
        -1.0 + 4.0 * torch.randn(batch, 3, 2, 4, 6, generator=random),
    )


def awake(anchor: Literal["concat", "add"] = "concat", **changes: Any) -> Decoupler:
    """A decoupler whose output depends on everything, as after training."""
    decoupler = fresh(anchor, **changes).eval()
    torch.nn.init.normal_(decoupler.project.weight)
    return decoupler


@pytest.mark.parametrize("anchor", ["concat", "add"])
def test_it_starts_as_repeat_the_reference(anchor: Literal["concat", "add"]) -> None:
    features, reference, targets = inputs()
    decoupler = fresh(anchor)
    prediction = decoupler(features, reference)
    assert prediction.shape == (2, 3, 2, 4, 6) and prediction.dtype == torch.float32
    torch.testing.assert_close(prediction, reference[:, None].expand_as(prediction))
    expected = ((reference[:, None] - targets) / 4.0).square().mean()
    torch.testing.assert_close(decoupler.loss(features, reference, targets), expected)


def test_the_anchors_are_the_papers_and_the_released_codes() -> None:
    """`concat`: a linear embedding of (F, Y^ref) joined on channels. `add`: of F plus a 1x1 convolution of Y^ref."""
    features, reference, _ = inputs()
    f, y = (features - 2.0) / 3.0, ((reference + 1.0) / 4.0)[:, None].expand(-1, 3, -1, -1, -1)
    concat, add = awake("concat"), awake("add")
    seen: list[Tensor] = []
    for decoupler in (concat, add):
        decoupler.blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        decoupler(features, reference)
    joined = torch.cat([concat.embed.weight, concat.anchor.weight], dim=1)
    bias = concat.embed.bias + concat.anchor.bias
    positions = [d.spatial_position + d.temporal_position for d in (concat, add)]
    torch.testing.assert_close(seen[0] - positions[0], functional.linear(torch.cat([f, y], -1), joined, bias).flatten(2, 3))
    kernel = add.anchor.weight[:, :, None, None]
    convolved = functional.conv2d(y.flatten(0, 1).permute(0, 3, 1, 2), kernel, add.anchor.bias).permute(0, 2, 3, 1)
    torch.testing.assert_close(seen[1] - positions[1], add.embed(f + convolved.view(2, 3, 2, 4, 5)).flatten(2, 3))


@torch.no_grad()
def test_inside_as_in_the_released_code() -> None:
    """A layer norm of F and the added reference, whatever the statistics of F, and tokens that do not know where they are."""
    features, reference, _ = inputs()
    decoupler = awake("add", input_norm="layer", positions=False)
    torch.nn.init.normal_(decoupler.input_norm.weight)
    seen: list[Tensor] = []
    decoupler.blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    prediction = decoupler(features, reference)
    y = decoupler.anchor((reference + 1.0) / 4.0)[:, None]
    by_hand = functional.layer_norm(features + y, (5,), decoupler.input_norm.weight, decoupler.input_norm.bias)
    torch.testing.assert_close(seen[0], decoupler.embed(by_hand).flatten(2, 3))
    torch.testing.assert_close(decoupler(features.flip(1), reference).flip(1), prediction)
    torch.testing.assert_close(decoupler(features.flip(3), reference.flip(2)).flip(3), prediction)
    alone = awake("concat", input_norm="layer")
    assert not torch.allclose(alone(features * 2.0, reference), awake("concat")(features * 2.0, reference))


@torch.no_grad()
def test_attention_is_factorised() -> None:
    """One block: a change at (t, s) reaches its frame through space and from there every frame through time; space alone
    must not reach other frames."""
    torch.manual_seed(0)
    block = FactorisedBlock(8, 2, 0.0).eval()
    x = torch.randn(1, 3, 4, 8)
    other = x.clone()
    other[0, 1, 2] = torch.randn(8)  # adding a constant would be undone by the layer norm
    spatial = [block.spatial(v.reshape(3, 4, 8)) for v in (x, other)]
    changed = (spatial[0] - spatial[1]).abs().amax(dim=-1) > 1e-6
    assert changed.tolist() == [[False] * 4, [True] * 4, [False] * 4]
    assert ((block(x) - block(other)).abs().amax(dim=-1) > 1e-7).all()
    assert block(x).shape == x.shape


@torch.no_grad()
def test_order_of_frames_and_places_matters_and_observations_do_not_mix() -> None:
    decoupler = awake()
    features, reference, _ = inputs()
    prediction = decoupler(features, reference)
    torch.testing.assert_close(decoupler(features[:1], reference[:1]), prediction[:1])
    assert not torch.allclose(decoupler(features.flip(1), reference).flip(1), prediction)
    assert not torch.allclose(decoupler(features.flip(3), reference.flip(2)).flip(3), prediction)


@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    decoupler = awake("add")
    features, reference, _ = inputs()
    loaded = reloaded(decoupler, tmp_path)
    assert loaded.config == decoupler.config and not loaded.training
    assert torch.equal(loaded(features, reference), decoupler(features, reference))


def test_shapes_it_was_not_built_for_are_named() -> None:
    features, reference, _ = inputs()
    with pytest.raises(ContractError, match=r"features have shape \(2, 2, 2, 4, 5\), .* \(B, 3, 2, 4, 5\)"):
        fresh()(features[:, :2], reference)
    with pytest.raises(ContractError, match=r"reference has shape \(1, 2, 4, 6\), .* \(2, 2, 4, 6\)"):
        fresh()(features, reference[:1])


def test_a_constant_channel_is_safe() -> None:
    decoupler = fresh()
    decoupler.set_statistics((torch.zeros(5), torch.zeros(5)), (torch.zeros(6), torch.tensor([0.0, 1, 1, 1, 1, 1])))
    features, reference, targets = inputs()
    assert torch.isfinite(decoupler.loss(features, reference, targets))
    assert decoupler.feature_std.tolist() == [1.0] * 5 and decoupler.teacher_std.tolist() == [1.0] * 6
