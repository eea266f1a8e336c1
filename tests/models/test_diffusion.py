"""Golden values of the diffusion arithmetic, by hand and against diffusers' scheduler."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from svam.models.diffusion import EDM, ddim_step, exponential_sigmas, karras_sigmas, log_logistic_sigmas, log_normal_sigmas


def test_edm_coefficients_have_their_golden_values() -> None:
    sigma = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    edm = EDM(sigma_data=0.5)
    torch.testing.assert_close(edm.c_skip(sigma), torch.tensor([0.5, 0.2, 0.25 / 9.25], dtype=torch.float64))
    expected = [0.25 / math.sqrt(0.5), 0.5 / math.sqrt(1.25), 1.5 / math.sqrt(9.25)]
    torch.testing.assert_close(edm.c_out(sigma), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(edm.c_in(sigma), 1 / torch.tensor([0.5, 1.25, 9.25], dtype=torch.float64).sqrt())
    torch.testing.assert_close(edm.c_noise(sigma)[2], torch.tensor(math.log(3.0) / 4, dtype=torch.float64))


def test_target_inverts_denoised() -> None:
    random = torch.Generator().manual_seed(0)
    clean, noisy = torch.randn(4, 3, 2, generator=random), torch.randn(4, 3, 2, generator=random)
    sigma = torch.tensor([0.1, 0.5, 2.0, 80.0])
    for edm in (EDM(0.5), EDM(1.0, -1.0)):
        torch.testing.assert_close(edm.denoised(noisy, edm.target(clean, noisy, sigma), sigma), clean, atol=1e-4, rtol=1e-4)


def test_karras_schedule_equals_the_published_scheduler() -> None:
    scheduler = EulerDiscreteScheduler(
        use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0, prediction_type="v_prediction", timestep_type="continuous",
        timestep_spacing="leading",
    )  # fmt: skip
    scheduler.set_timesteps(20)
    torch.testing.assert_close(karras_sigmas(20, 0.002, 700.0).float(), scheduler.sigmas, rtol=2e-5, atol=1e-6)
    assert karras_sigmas(3, 0.1, 10.0)[1].item() == pytest.approx(((10 ** (1 / 7) + 0.1 ** (1 / 7)) / 2) ** 7)


def test_exponential_schedule_is_even_in_log() -> None:
    torch.testing.assert_close(exponential_sigmas(3, 0.01, 1.0), torch.tensor([1.0, 0.1, 0.01, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="sigma_min < sigma_max, found 3, 2"):
        exponential_sigmas(3, 2.0, 1.0)


def test_step_equals_eulers_step_of_the_published_scheduler() -> None:
    scheduler = EulerDiscreteScheduler(
        use_karras_sigmas=True, sigma_min=0.02, sigma_max=80.0, prediction_type="v_prediction", timestep_type="continuous"
    )
    scheduler.set_timesteps(4)
    random = torch.Generator().manual_seed(1)
    noisy, output = torch.randn(2, 3, generator=random) * 80, torch.randn(2, 3, generator=random)
    expected = scheduler.step(output, scheduler.timesteps[0], noisy).prev_sample
    levels = karras_sigmas(4, 0.02, 80.0).tolist()
    clean = EDM(1.0, -1.0).denoised(noisy, output, torch.full((2,), levels[0]))
    torch.testing.assert_close(ddim_step(noisy, clean, levels[0], levels[1]), expected, rtol=1e-4, atol=1e-4)


def test_training_noise_levels_follow_their_distributions() -> None:
    random = torch.Generator().manual_seed(3)
    normal = log_normal_sigmas(20000, 0.7, 1.6, random).log()
    assert normal.mean().item() == pytest.approx(0.7, abs=0.05) and normal.std().item() == pytest.approx(1.6, abs=0.05)
    logistic = log_logistic_sigmas(20000, math.log(0.5), 0.5, 0.001, 80.0, random)
    assert logistic.min() >= 0.001 and logistic.max() <= 80.0
    assert logistic.median().item() == pytest.approx(0.5, rel=0.05)
