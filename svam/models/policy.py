"""The action diffusion transformer: a K x A chunk of actions, denoised while looking at the aggregated context.

Two objectives (S-VAM section 3.4): `edm`, the released code's (Karras et al. 2022 preconditioning, log-logistic noise
levels as in MDT, Reuss et al. 2024, DDIM on an exponential schedule), and `epsilon`, the paper's (DDPM, Ho et al. 2020).
All actions in this module are normalised; physical units are the business of `svam.normalisation.Statistics`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional

from svam.device import sent
from svam.models.attention import Attention, Block, Dropouts, mlp
from svam.models.diffusion import EDM, ddim_step, expand_like, exponential_sigmas, log_logistic_sigmas
from svam.params import ActionTransformer
from svam.shares import share

Objective = Literal["edm", "epsilon"]
LOG_LOGISTIC_SCALE = 0.5
"""Spread of the training noise levels; their location is ln(sigma_data) (MDT's `loglogistic`)."""
TRAIN_TIMESTEPS = 100
"""Length of the DDPM chain of the `epsilon` objective (Diffusion Policy's)."""


def masked_mean_square(error_BKA: Tensor, mask_BK: Tensor) -> Tensor:
    """Mean of the squared error over the actions whose mask is true; padded actions count nothing. NaN where none is real. The
    mask may also be (B, K, A), where sets have actions of different width."""
    if mask_BK.ndim == 3:
        return (error_BKA.square() * mask_BK).sum() / mask_BK.sum()
    return (error_BKA.square() * mask_BK[..., None]).sum() / (mask_BK.sum() * error_BKA.shape[-1])


class LevelEmbedding(nn.Module):
    """The noise level, as a number of about [-2, 2], to a vector: Fourier features and an MLP."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-1, 1.5, width // 2) * math.pi, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * (width // 2), width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, level_B: Tensor) -> Tensor:
        """(B,) to (B, width)."""
        angle = level_B.float()[:, None] * self.frequencies
        embedded: Tensor = self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))
        return embedded


class DecoderLayer(nn.Module):
    """Self-attention over the chunk, cross-attention to the context, MLP; the noise level scales, shifts and gates each
    (adaLN-Zero, Peebles & Xie 2023: a layer starts as the identity)."""

    def __init__(self, width: int, heads: int, dropouts: Dropouts = Dropouts()) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 9 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.self_attention = Attention(width, heads, dropout=dropouts.attention)
        self.cross_attention = Attention(width, heads, dropout=dropouts.attention)
        self.mlp = mlp(width)
        self.residual_dropout, self.mlp_dropout = nn.Dropout(dropouts.residual), nn.Dropout(dropouts.mlp)

    def forward(self, x_BKD: Tensor, context_BSD: Tensor, level_BD: Tensor) -> Tensor:
        """The chunks' tokens (B*R, K, D) after this layer; R chunks in a row share one context of (B, S, D)."""
        part = self.modulation(functional.silu(level_BD))[:, None].chunk(9, dim=-1)

        def modulated(index: int) -> Tensor:
            h: Tensor = self.norms[index](x_BKD) * (1 + part[3 * index]) + part[3 * index + 1]
            return h

        x_BKD = x_BKD + part[2] * self.residual_dropout(self.self_attention(modulated(0)))
        # The keys of a context are computed once for all of its chunks.
        queries_BLD = modulated(1).reshape(len(context_BSD), -1, x_BKD.shape[-1])
        read = self.cross_attention(queries_BLD, context_BSD).view_as(x_BKD)
        x_BKD = x_BKD + part[5] * self.residual_dropout(read)
        x_BKD = x_BKD + part[8] * self.mlp_dropout(self.mlp(modulated(2)))
        return x_BKD


class ActionDiffusion(nn.Module):
    """Encoder over the context (aggregated tokens, text, proprioception) and denoising decoder over the chunk (S-VAM
    section 3.4).

    Released sizes: width 384, 4 encoder and 4 decoder layers, dropout .3 of attention weights, .1 after attention and .05 after
    the MLP, sigma 0.001..80, sigma_data 0.5, 10 steps.
    """

    def __init__(
        self,
        config: ActionTransformer,
        objective: Objective,
        chunk: tuple[int, int],
        context_width: int,
        text_width: int,
        proprioception: int | None,
        action_limit: float,
    ) -> None:
        """Args: sizes and noise levels; (K, A) of the chunk; channels of aggregated and of text tokens; dimensions P of the
        proprioception, if any; the largest magnitude of a normalised action, to which `epsilon`'s estimates are clipped."""
        super().__init__()
        self.config, self.objective, self.edm = config, objective, EDM(config.sigma_data)
        width, heads = config.width, config.heads
        dropouts = Dropouts(config.attention_dropout, config.residual_dropout, config.mlp_dropout)
        self.from_context = nn.Sequential(nn.LayerNorm(context_width), nn.Linear(context_width, width))
        self.from_text = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.from_proprioception = nn.Linear(proprioception, width) if proprioception else None
        self.kind = nn.Parameter(torch.randn(3, width) * 0.02)
        blocks = (Block(width, heads, dropouts) for _ in range(config.encoder_layers))
        self.encoder = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.level = LevelEmbedding(width)
        self.from_actions = nn.Linear(chunk[1], width)
        self.position = nn.Parameter(torch.randn(chunk[0], width) * 0.02)
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, dropouts) for _ in range(config.decoder_layers))
        self.to_actions = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, chunk[1]))
        self._chain = {
            "num_train_timesteps": TRAIN_TIMESTEPS, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon",
            "clip_sample": True, "clip_sample_range": action_limit,
        }  # fmt: skip
        self._noising = DDPMScheduler(**self._chain)  # keeps its levels on the device where it was called last

    def encode_context(self, tokens_BMD: Tensor, text_BLE: Tensor, proprioception_BP: Tensor | None) -> Tensor:
        """Everything the decoder attends to: (B, M + L [+ 1], width).

        Raises:
            ValueError: proprioception is missing where the policy was built for it, or given where it was not.
        """
        parts = [self.from_context(tokens_BMD) + self.kind[0], self.from_text(text_BLE) + self.kind[1]]
        if (self.from_proprioception is None) != (proprioception_BP is None):
            given, expected = proprioception_BP is not None, self.from_proprioception is not None
            raise ValueError(f"proprioception: given is {given}, but the policy was built with proprioception {expected}")
        if self.from_proprioception is not None and proprioception_BP is not None:
            parts.append(self.from_proprioception(proprioception_BP)[:, None] + self.kind[2])
        context: Tensor = self.encoder(torch.cat(parts, dim=1))
        return context

    def raw(self, actions_BKA: Tensor, level_B: Tensor, context_BSD: Tensor) -> Tensor:
        """The network's output (B, K, A) for scaled noisy actions at a noise level of about [-2, 2]."""
        x = self.from_actions(actions_BKA) + self.position
        level = self.level(level_B)
        for layer in self.decoder:
            x = layer(x, context_BSD, level)
        output: Tensor = self.to_actions(x)
        return output

    def denoised(self, noisy_BKA: Tensor, sigma_B: Tensor, context_BSD: Tensor) -> Tensor:
        """EDM's D(x; sigma): the estimate of the clean chunk."""
        scaled = noisy_BKA * self.edm.c_in(expand_like(sigma_B, noisy_BKA))
        return self.edm.denoised(noisy_BKA, self.raw(scaled, self.edm.c_noise(sigma_B), context_BSD).float(), sigma_B)

    def epsilon(self, noisy_BKA: Tensor, timestep_B: Tensor, context_BSD: Tensor) -> Tensor:
        """The noise estimate of the `epsilon` objective at integer timesteps 0..99."""
        return self.raw(noisy_BKA, timestep_B.float() * (4.0 / TRAIN_TIMESTEPS) - 2.0, context_BSD)

    def loss(
        self, context_BSD: Tensor, actions_BKA: Tensor, mask_BK: Tensor, generator: torch.Generator, draws: int = 1
    ) -> Tensor:
        """Scalar training loss over `draws` noise levels per chunk; `generator` lives on the CPU, so that a run's noise does
        not depend on the device; of several processes each takes its rows of what is drawn for the whole batch. EDM: squared
        error of the raw output, which is EDM's weighting; epsilon: of the noise."""
        device = actions_BKA.device
        clean, mask = (x.repeat_interleave(draws, dim=0) for x in (actions_BKA, mask_BK))
        noise = sent(share(lambda rows: torch.randn((rows, *clean.shape[1:]), generator=generator), len(clean)), device)
        if self.objective == "epsilon":
            timestep = share(lambda rows: torch.randint(0, TRAIN_TIMESTEPS, (rows,), generator=generator), len(clean))
            timestep = sent(timestep, device)
            noisy = self._noising.add_noise(clean, noise, timestep)
            return masked_mean_square(self.epsilon(noisy, timestep, context_BSD).float() - noise, mask)
        c, location = self.config, math.log(self.config.sigma_data)
        sigma = share(
            lambda rows: log_logistic_sigmas(rows, location, LOG_LOGISTIC_SCALE, c.sigma_min, c.sigma_max, generator),
            len(clean),
        )
        sigma = sent(sigma, device)
        noisy = clean + noise * expand_like(sigma, clean)
        scaled = noisy * self.edm.c_in(expand_like(sigma, noisy))
        output = self.raw(scaled, self.edm.c_noise(sigma), context_BSD).float()
        return masked_mean_square(output - self.edm.target(clean, noisy, sigma), mask)

    @torch.no_grad()
    def sample(self, context_BSD: Tensor, noise_BKA: Tensor) -> Tensor:
        """Normalised actions (B, K, A) from unit noise: `steps` deterministic DDIM steps."""
        if self.objective == "epsilon":
            scheduler = DDIMScheduler(**self._chain, timestep_spacing="trailing")
            scheduler.set_timesteps(self.config.steps)
            x = noise_BKA
            for timestep in scheduler.timesteps.tolist():
                level = torch.full((len(x),), timestep, device=x.device)
                x = scheduler.step(self.epsilon(x, level, context_BSD).float(), timestep, x).prev_sample
            return x
        levels = exponential_sigmas(self.config.steps, self.config.sigma_min, self.config.sigma_max).tolist()
        x = noise_BKA * levels[0]
        for sigma, sigma_next in pairwise(levels):
            estimate = self.denoised(x, torch.full((len(x),), sigma, device=x.device), context_BSD)
            x = ddim_step(x, estimate, sigma, sigma_next)
        return x
