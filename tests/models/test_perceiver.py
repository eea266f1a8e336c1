"""The aggregators: cheap attention is attention, a query sees its own frame, positions and times are told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from svam.models.perceiver import AGGREGATORS, FrameCrossAttention, MeanPool, UniPerceiver
from svam.params import Perceiver

SIZES = Perceiver(queries=2, free_queries=False, width=16, depth=2, heads=4, head_width=None, embedding=None)


def perceiver(**changes: Any) -> UniPerceiver:
    torch.manual_seed(0)
    return UniPerceiver(SIZES.model_copy(update=changes), (3, 2, 4, 5)).eval()


def context(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 2, 4, 5, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("head_width", [None, 6])
def test_reordered_attention_equals_the_textbook(head_width: int | None) -> None:
    torch.manual_seed(0)
    attention, d = FrameCrossAttention(8, 2, head_width), head_width or 4
    queries, tokens = torch.randn(3, 2, 8), torch.randn(3, 5, 8)
    q = attention.to_query(attention.norm(queries)).view(3, 2, 2, d).transpose(1, 2)
    k, v = (layer(tokens).view(3, 5, 2, d).transpose(1, 2) for layer in (attention.to_key, attention.to_value))
    weights = (q @ k.transpose(-1, -2) / d**0.5).softmax(-1)  # (M, heads, N, S)
    expected = attention.out((weights @ v).transpose(1, 2).reshape(3, 2, 2 * d))
    torch.testing.assert_close(attention(queries, tokens), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention.weights(queries, tokens), weights.transpose(1, 2), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_tokens_and_attention_have_the_stated_shapes() -> None:
    tokens, weights = perceiver()(context()), perceiver().attention(context())
    assert tokens.shape == (2, 6, 16) and weights.shape == (2, 3, 2, 2, 4)
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, 3, 2))


def changed_frames(model: UniPerceiver, frame: int) -> list[bool]:
    """Which frames' tokens (first sample) notice a change of one frame of the context."""
    before = context()
    after = before.clone()
    after[0, frame] += 1.0
    difference = (model(before) - model(after)).abs().amax(-1)
    assert not difference[1].any()  # the other sample never does
    return (difference[0].view(3, 2).amax(1) > 0).tolist()


@torch.no_grad()
def test_frames_meet_along_time_only() -> None:
    assert changed_frames(perceiver(), 1) == [True, True, True]
    alone = perceiver()
    for layer in alone.along_time:  # without the exchange along time, cross-attention stays within its frame
        layer.attention.out.weight.zero_()
    assert changed_frames(alone, 1) == [False, True, False]


@torch.no_grad()
@pytest.mark.parametrize("aggregator", ["uni_perceiver", "mean_pool"])
def test_times_are_told_apart(aggregator: str) -> None:
    torch.manual_seed(0)
    model = AGGREGATORS[aggregator](SIZES, (3, 2, 4, 5)).eval()
    same = torch.ones(1, 3, 2, 4, 5)
    tokens = model(same).view(1, 3, -1, 16)
    assert (tokens[0, 0] - tokens[0, 1]).abs().max() > 1e-3


@torch.no_grad()
def test_positions_are_told_apart() -> None:
    here, there = torch.zeros(1, 3, 2, 4, 5), torch.zeros(1, 3, 2, 4, 5)
    here[0, :, 0, 0], there[0, :, 1, 3] = 3.0, 3.0
    model = perceiver()
    assert (model(here) - model(there)).abs().max() > 1e-3
    model.embed.position.zero_()
    assert (model(here) - model(there)).abs().max() < 1e-5


@torch.no_grad()
def test_free_queries_of_a_frame_are_its_own() -> None:
    """Without the exchange along time, a changed query of one frame changes nothing but its token."""
    model = perceiver(free_queries=True)
    assert model.queries.shape == (3, 2, 16) and model.query_time is None
    for layer in model.along_time:
        layer.attention.out.weight.zero_()
    before = model(context()).view(2, 3, 2, 16)
    model.queries[1, 0] = torch.randn(16)  # a constant would be undone by the layer norm
    changed = (model(context()).view(2, 3, 2, 16) - before).abs().amax(-1) > 1e-4
    assert changed.tolist() == [[[False, False], [True, False], [False, False]]] * 2


@torch.no_grad()
@pytest.mark.parametrize("aggregator", ["uni_perceiver", "mean_pool"])
def test_the_embedding_may_have_two_layers(aggregator: str) -> None:
    torch.manual_seed(0)
    model = AGGREGATORS[aggregator](SIZES.model_copy(update={"embedding": 24}), (3, 2, 4, 5)).eval()
    layers: Any = model.embed.project
    first, _, second = layers
    assert (first.weight.shape, second.weight.shape) == ((24, 5), (16, 24))
    tokens = second(torch.nn.functional.gelu(first(context()))).flatten(2, 3) + model.embed.position + model.embed.time
    torch.testing.assert_close(model.embed(context()), model.embed.norm(tokens))
    assert model(context()).shape[-1] == 16


def test_released_sizes_are_params() -> None:
    """8 heads of 64 at width 384, whose attention is 512 channels wide."""
    sizes = Perceiver(queries=14, free_queries=True, width=384, depth=1, heads=8, head_width=64, embedding=768)
    with torch.device("meta"):
        model: Any = UniPerceiver(sizes, (16, 16, 16, 5376))
    assert model.cross[0].to_query.weight.shape == (512, 384) and model.cross[0].out.weight.shape == (384, 512)
    assert model.along_time[0].attention.qkv.weight.shape == (3 * 512, 384)
    assert model.queries.numel() == 224 * 384 and model.embed.project[0].weight.shape == (768, 5376)


@torch.no_grad()
def test_mean_pooling_is_the_mean_of_the_embedded_tokens() -> None:
    torch.manual_seed(0)
    model = MeanPool(SIZES, (3, 2, 4, 5))
    assert model(context()).shape == (2, 3, 16)
    torch.testing.assert_close(model(context()), model.embed(context()).mean(2))


def test_a_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"found \(T, h, w, C\) = \(3, 2, 4, 6\), expected \(3, 2, 4, 5\)"):
        perceiver()(torch.zeros(1, 3, 2, 4, 6))
