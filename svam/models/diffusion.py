"""Diffusion arithmetic shared by the video model and the policy: preconditioning, noise levels, one sampler step.

Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM), table 1 and
section 5; Stable Video Diffusion (Blattmann et al. 2023, appendix D) uses the same with sigma_data = 1 and the
sign of a v-prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def expand_like(values_B: Tensor, like: Tensor) -> Tensor:
    """(B,) reshaped to (B, 1, ...) so that it broadcasts against `like` (B, ...)."""
    return values_B.reshape(-1, *([1] * (like.ndim - 1)))


@dataclass(frozen=True)
class EDM:
    """Preconditioning D(x; s) = c_skip x + c_out F(c_in x; c_noise).

    `sign` is -1 for SVD's v-prediction (the network outputs minus the EDM network's target), else +1.
    """

    sigma_data: float = 1.0
    sign: float = 1.0

    def c_skip(self, sigma: Tensor) -> Tensor:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        return self.sign * sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def c_in(self, sigma: Tensor) -> Tensor:
        return 1.0 / (sigma**2 + self.sigma_data**2).sqrt()

    def c_noise(self, sigma: Tensor) -> Tensor:
        return 0.25 * sigma.log()

    def denoised(self, noisy: Tensor, output: Tensor, sigma_B: Tensor) -> Tensor:
        """The clean estimate D from the network's raw output; all (B, ...), sigma_B (B,)."""
        sigma = expand_like(sigma_B, noisy)
        return self.c_skip(sigma) * noisy + self.c_out(sigma) * output

    def target(self, clean: Tensor, noisy: Tensor, sigma_B: Tensor) -> Tensor:
        """What the raw output should be. Its squared error is EDM's loss weight (s^2 + sd^2) / (s sd)^2 times that of D."""
        sigma = expand_like(sigma_B, noisy)
        return (clean - self.c_skip(sigma) * noisy) / self.c_out(sigma)


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """(steps + 1,) float64 noise levels from sigma_max down to sigma_min and then 0 (EDM equation 5).

    Raises:
        ValueError: steps < 1, or not 0 < sigma_min < sigma_max.
    """
    _check_levels(steps, sigma_min, sigma_max)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def exponential_sigmas(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """(steps + 1,) float64 noise levels, evenly spaced in log, then 0 (the policy's schedule in the released code)."""
    _check_levels(steps, sigma_min, sigma_max)
    levels = torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, dtype=torch.float64).exp()
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def _check_levels(steps: int, sigma_min: float, sigma_max: float) -> None:
    if steps < 1 or not 0 < sigma_min < sigma_max:
        raise ValueError(f"noise levels need steps >= 1 and 0 < sigma_min < sigma_max, found {steps}, {sigma_min}, {sigma_max}")


def ddim_step(noisy: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Deterministic step from noise level `sigma` to `sigma_next` (DDIM, which is Euler on EDM's probability-flow ODE)."""
    return denoised + (noisy - denoised) * (sigma_next / sigma)


def log_normal_sigmas(batch: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """(batch,) float32 noise levels, ln s ~ N(mean, std^2) (EDM section 5)."""
    return (mean + std * torch.randn(batch, generator=generator)).exp()


def log_logistic_sigmas(
    batch: int, location: float, scale: float, sigma_min: float, sigma_max: float, generator: torch.Generator
) -> Tensor:
    """(batch,) float32 noise levels, log-logistic and truncated to [sigma_min, sigma_max] (the policy's training levels).

    Drawn by inversion between the quantiles of the two bounds, so none is thrown away.
    """

    def cdf(sigma: float) -> float:
        return 1.0 / (1.0 + math.exp(-(math.log(sigma) - location) / scale))

    low, high = cdf(sigma_min), cdf(sigma_max)
    u = torch.rand(batch, generator=generator, dtype=torch.float64) * (high - low) + low
    return (location + scale * torch.logit(u)).exp().clamp(sigma_min, sigma_max).float()
