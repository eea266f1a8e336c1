"""The action diffusion: golden numbers of its arithmetic, masks, and the sampler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from svam.models.attention import Dropouts
from svam.models.policy import TRAIN_TIMESTEPS, ActionDiffusion, Objective, masked_mean_square
from svam.params import ActionTransformer

OBJECTIVES: list[Objective] = ["edm", "epsilon"]


def build(objective: Objective = "edm", dropouts: Dropouts = Dropouts(), **changes: Any) -> ActionDiffusion:
    torch.manual_seed(0)
    sizes = ActionTransformer(
        width=32, encoder_layers=1, decoder_layers=1, heads=2, attention_dropout=dropouts.attention,
        residual_dropout=dropouts.residual, mlp_dropout=dropouts.mlp, sigma_min=0.001, sigma_max=80.0, sigma_data=0.5, steps=10,
    )  # fmt: skip
    shapes: dict[str, Any] = {"chunk": (3, 2), "context_width": 8, "text_width": 6, "proprioception": None, "action_limit": 1.0}
    return ActionDiffusion(sizes, objective, **(shapes | changes)).eval()


def conditions(batch: int = 4) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(batch, 5, 8, generator=random), torch.randn(batch, 4, 6, generator=random)


def test_padded_actions_count_nothing() -> None:
    error = torch.tensor([[[1.0, 3.0], [100.0, 100.0]], [[2.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[True, False], [True, True]])
    assert masked_mean_square(error, mask).item() == pytest.approx((1 + 9 + 4 + 0 + 0 + 0) / 6)
    assert masked_mean_square(error, torch.zeros(2, 2, dtype=torch.bool)).isnan()  # which ends a training
    narrow = torch.stack([mask, torch.zeros_like(mask)], dim=-1)  # the second dimension is padding
    assert masked_mean_square(error, narrow).item() == pytest.approx(error[..., 0][mask].square().mean().item())


@torch.no_grad()
def test_edm_denoised_by_hand() -> None:
    model = build()
    context = model.encode_context(*conditions(1), None)
    noisy, sigma = torch.full((1, 3, 2), 1.5), 2.0
    raw = model.raw(noisy / math.sqrt(sigma**2 + 0.25), torch.tensor([math.log(sigma) / 4]), context)
    expected = 0.25 / (sigma**2 + 0.25) * noisy + sigma * 0.5 / math.sqrt(sigma**2 + 0.25) * raw
    torch.testing.assert_close(model.denoised(noisy, torch.tensor([sigma]), context), expected)


@torch.no_grad()
def test_the_edm_sampler_visits_the_exponential_schedule() -> None:
    """With a denoiser that always answers c, ten DDIM steps end exactly at c, and each level is 80 (0.001 / 80)^(i / 9)."""
    model = build()
    seen: list[float] = []

    def constant(noisy: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        seen.append(sigma[0].item())
        return torch.full_like(noisy, 0.3)

    model.denoised = constant  # type: ignore[method-assign, assignment]
    sampled = model.sample(torch.zeros(2, 1, 32), torch.randn(2, 3, 2))
    torch.testing.assert_close(sampled, torch.full((2, 3, 2), 0.3))
    assert seen == pytest.approx([80.0 * (0.001 / 80.0) ** (i / 9) for i in range(10)], rel=1e-5)


@torch.no_grad()
def test_the_epsilon_sampler_inverts_the_noising() -> None:
    """With an oracle for the noise of a known chunk, DDIM returns that chunk."""
    model = build("epsilon")
    clean = torch.linspace(-0.9, 0.9, 6).view(1, 3, 2)
    betas = [min(1 - _alpha_bar((i + 1) / 100) / _alpha_bar(i / 100), 0.999) for i in range(TRAIN_TIMESTEPS)]
    alpha_bar = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)

    def oracle(noisy: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        a = alpha_bar[timestep[0]]
        return ((noisy - a.sqrt() * clean) / (1 - a).sqrt()).float()

    model.epsilon = oracle  # type: ignore[method-assign, assignment]
    sampled = model.sample(torch.zeros(1, 1, 32), torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(sampled, clean, rtol=0, atol=1e-4)


def _alpha_bar(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_of_a_fresh_network_and_its_mask(objective: Objective) -> None:
    model = build(objective)
    context = model.encode_context(*conditions(), None)
    actions, mask = torch.zeros(4, 3, 2), torch.ones(4, 3, dtype=torch.bool)
    mask[:, 2] = False

    def loss(actions: Tensor) -> float:
        return model.loss(context, actions, mask, torch.Generator().manual_seed(0)).item()

    fresh = loss(actions)
    assert 0.1 < fresh < 5.0
    real, padded = actions.clone(), actions.clone()
    real[:, 1], padded[:, 2] = 0.7, 0.7
    # A fresh layer's gates are zero: positions do not mix yet, so that a padded action has no way into the loss at all.
    assert loss(padded) == fresh != loss(real)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_chunks_of_one_observation_share_its_keys(objective: Objective) -> None:
    """Four draws against one context equal four contexts."""
    model = build(objective)
    torch.nn.init.normal_(model.decoder[0].modulation.weight, std=0.5)  # a fresh layer's gates are zero
    context = model.encode_context(*conditions(2), None)
    noisy, level = torch.randn(6, 3, 2), torch.rand(6)
    shared = model.raw(noisy, level, context)
    alone = torch.cat([model.raw(noisy[i : i + 1], level[i : i + 1], context[i // 3 : i // 3 + 1]) for i in range(6)])
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)
    assert (model.raw(noisy, level, context.flip(0)) - shared).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", Dropouts._fields)
def test_each_dropout_acts_in_training_alone(kind: str) -> None:
    """In the encoder as in the decoder, and another time differently; what is dropped is no business of evaluation."""
    model, plain = build(dropouts=Dropouts(**{kind: 0.5})), build()
    for part in (model, plain):
        torch.manual_seed(2)
        torch.nn.init.normal_(part.decoder[0].modulation.weight, std=0.5)  # a fresh layer's gates are zero
    context, noisy, level = plain.encode_context(*conditions(2), None), torch.randn(2, 3, 2), torch.rand(2)
    assert torch.equal(model.encode_context(*conditions(2), None), context)
    assert torch.equal(model.raw(noisy, level, context), plain.raw(noisy, level, context))
    model.train()
    assert (model.encode_context(*conditions(2), None) - context).abs().max() > 1e-3
    assert (model.raw(noisy, level, context) - model.raw(noisy, level, context)).abs().max() > 1e-3
    plain.train()
    state = torch.get_rng_state()
    assert torch.equal(plain.raw(noisy, level, context), plain.raw(noisy, level, context))
    assert torch.equal(torch.get_rng_state(), state), "a policy without dropout draws nothing"


def test_proprioception_is_one_more_token_and_never_silently_absent() -> None:
    tokens, text = conditions(2)
    model = build(proprioception=4)
    assert model.encode_context(tokens, text, torch.zeros(2, 4)).shape == (2, 5 + 4 + 1, 32)
    with pytest.raises(ValueError, match="given is False, but the policy was built with proprioception True"):
        model.encode_context(tokens, text, None)
    with pytest.raises(ValueError, match="given is True, but the policy was built with proprioception False"):
        build().encode_context(tokens, text, torch.zeros(2, 4))
