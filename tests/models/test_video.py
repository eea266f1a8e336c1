"""The video model: the block-by-block forward is diffusers' own, F and V^ share their noise, and it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from svam.files import FileError
from svam.models.diffusion import log_normal_sigmas
from svam.models.video import SamplerConfig, VideoConfig, VideoModel, build_unet
from svam.params import FinetuneVideo, UNet
from svam.training.finetune_video import denoising_loss, draw_sigmas
from svam.training.loop import fit
from tests.toy import optimiser

CONFIG = VideoConfig(
    frames=3, stride=2, rate_hz=10.0, latent_channels=4, latent_size=(4, 4), text_tokens=5, text_width=16, sigma_min=0.02,
    sigma_max=80.0, noise="fixed", camera="front", image_size=(32, 32),
)  # fmt: skip

UNET = UNet(pretrained=None, revision=None, channels=[32, 64], layers=1, heads=[2, 4])
SAMPLER = SamplerConfig(up_blocks=2, grid=4, steps=3, guidance=1.0, bf16=False)


def sampler(**changes: Any) -> SamplerConfig:
    return SAMPLER.model_copy(update=changes)


def tiny(**changes: str) -> VideoModel:
    torch.manual_seed(0)
    unet = build_unet(UNET, CONFIG.model_copy(update={"text_width": 32}))  # twice the text's width, as SVD
    fixed = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return VideoModel(unet, CONFIG.model_copy(update=changes), fixed).eval()


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    return (
        torch.randn(batch, 4, 4, 4, generator=random),
        torch.randn(batch, 5, 16, generator=random),
        torch.randn(batch, 3, 4, 4, 4, generator=random),
    )


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_the_forward_is_the_librarys_own(batch: int) -> None:
    model = tiny()
    condition, text, noise = inputs(batch)
    sigma = torch.tensor([80.0, 0.7])[:batch]
    library = type(model.unet).from_config(model.unet.config).eval()  # with the library's own attention
    library.load_state_dict(model.unet.state_dict())
    caught: list[Tensor] = []
    for block in library.up_blocks:
        block.register_forward_hook(lambda _m, _i, out: caught.append(out))
    scaled = noise * model.edm.c_in(sigma.view(-1, 1, 1, 1, 1))
    expected = library(
        torch.cat([scaled, condition[:, None].expand(-1, 3, -1, -1, -1)], 2), model.edm.c_noise(sigma), text.repeat(1, 1, 2),
        torch.tensor([CONFIG.added_time_ids] * batch),
    ).sample  # fmt: skip
    maps, output = model.raw(noise, sigma, condition, text)
    assert output is not None
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(maps, caught)


@torch.no_grad()
def test_features_and_generation_start_from_the_same_noise() -> None:
    model = tiny()
    condition, text, _ = inputs()
    noise = model.initial_noise([0, 1])
    features = model.one_step(condition, text, noise, SAMPLER)
    generation = model.generate(condition, text, noise, SAMPLER)
    assert features.shape == (2, 3, 4, 4, 96)
    assert torch.equal(features, generation.features)
    other = model.generate(condition, text, model.seeded_noise([5, 6]), SAMPLER)
    assert not torch.allclose(other.features, features)
    assert generation.latents.shape == generation.one_step.shape == (2, 3, 4, 4, 4)


@torch.no_grad()
def test_blocks_after_the_last_used_do_not_run() -> None:
    model = tiny()
    condition, text, noise = inputs()
    model.unet.up_blocks[1].register_forward_hook(lambda *_: pytest.fail("the second up block ran"))
    assert model.one_step(condition, text, noise, sampler(up_blocks=1, grid=2)).shape == (2, 3, 2, 2, 64)
    with pytest.raises(ValueError, match="up_blocks is 3, but this U-Net has 2"):
        model.one_step(condition, text, noise, sampler(up_blocks=3))


@torch.no_grad()
def test_one_step_sampling_is_the_denoised_estimate() -> None:
    model = tiny()
    condition, text, noise = inputs()
    generation = model.generate(condition, text, noise, sampler(steps=1))
    torch.testing.assert_close(generation.latents, generation.one_step)
    guided = model.generate(condition, text, noise, sampler(steps=1, guidance=3.0))
    free = model.generate(condition * 0, text * 0, noise, sampler(steps=1))
    torch.testing.assert_close(guided.latents, free.latents + 3 * (generation.latents - free.latents), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dropped", ["frame_and_text", "text"])
def test_guidance_rises_over_frames_from_what_training_dropped(dropped: str) -> None:
    """One to three over three frames: the first is the conditional estimate itself."""
    model = tiny(dropped=dropped)
    condition, text, noise = inputs()
    one = model.generate(condition, text, noise, sampler(steps=1)).latents
    free = model.generate(condition * (dropped == "text"), text * 0, noise, sampler(steps=1)).latents
    guided = model.generate(condition, text, noise, sampler(steps=1, guidance_last=3.0)).latents
    by_hand = torch.stack([free[:, t] + strength * (one - free)[:, t] for t, strength in enumerate((1.0, 2.0, 3.0))], dim=1)
    torch.testing.assert_close(guided, by_hand, rtol=1e-4, atol=1e-4)
    assert (guided - one)[:, 1:].abs().max() > 1e-3
    assert not sampler(guidance_last=1.0).guided and sampler(guidance=2.0).guided


@torch.no_grad()
def test_features_may_have_time_ids_of_their_own() -> None:
    """They are what a model with those ids computes; the clip is that of the ids of training."""
    model, other = tiny(), tiny(added_time_ids=(4.0, 127.0, 0.0))
    condition, text, noise = inputs()
    own = sampler(feature_time_ids=(4.0, 127.0, 0.0))
    generation, plain = model.generate(condition, text, noise, own), model.generate(condition, text, noise, SAMPLER)
    assert torch.equal(generation.features, model.one_step(condition, text, noise, own))
    torch.testing.assert_close(generation.features, other.one_step(condition, text, noise, SAMPLER))
    assert torch.equal(generation.latents, plain.latents) and (generation.features - plain.features).abs().max() > 1e-4


@torch.no_grad()
def test_features_are_resized_as_the_sampler_says() -> None:
    """The first map, 4 x 4 here, on a grid of 8 x 8: nearest repeats each value, and the other way does not."""
    model = tiny()
    condition, text, noise = inputs()
    first = model.raw(model._start(noise), torch.full((2,), 80.0), condition, text, up_blocks=1)[0][0]
    assert first.shape[-2:] == (4, 4)
    nearest, smooth = (
        model.one_step(condition, text, noise, sampler(up_blocks=1, grid=8, resize=way)) for way in ("nearest", "antialiased")
    )
    repeated = first.repeat_interleave(2, -1).repeat_interleave(2, -2).unflatten(0, (2, 3)).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(nearest, repeated)
    assert (nearest - smooth).abs().max() > 1e-3


@torch.no_grad()
def test_saved_and_loaded_models_agree_to_the_bit(tmp_path: Path) -> None:
    model = tiny().requires_grad_(False)  # as loaded: torch multiplies by another kernel where weights could have gradients
    model.save(tmp_path)
    condition, text, noise = inputs()
    again = VideoModel.load(tmp_path).one_step(condition, text, noise, SAMPLER)
    assert torch.equal(again, model.one_step(condition, text, noise, SAMPLER))
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"frames": 3', '"frames": "three"'))
    with pytest.raises(FileError, match="config.json: frames is 'three'; expected a whole number"):
        VideoModel.load(tmp_path)
    (tmp_path / "config.json").write_text(config)
    save_file({"fixed_noise": torch.zeros(2)}, str(tmp_path / "noise.safetensors"))
    with pytest.raises(FileError, match=r"fixed_noise is \(2,\), expected \(3, 4, 4, 4\)"):
        VideoModel.load(tmp_path)


def test_sizes_that_do_not_fit_are_named() -> None:
    unet = build_unet(UNET, CONFIG.model_copy(update={"text_width": 32, "latent_channels": 8}))
    with pytest.raises(ValueError, match="16 input and 8 output channels.*need 8 and 4"):
        VideoModel(unet, CONFIG, torch.zeros(3, 4, 4, 4))
    with pytest.raises(ValueError, match="cross_attention_dim is 32, expected a multiple of the text width 24"):
        VideoModel(unet, CONFIG.model_copy(update={"text_width": 24}), torch.zeros(3, 4, 4, 4))


def test_the_share_of_levels_at_the_first_inference_sigma() -> None:
    """Without a share the levels are the log-normal ones, of which 0.3 % are clamped to it; a share leaves the others as they
    are."""
    section = FinetuneVideo.model_construct(
        log_sigma_mean=0.0, log_sigma_std=1.6, sigma_min=0.02, sigma_max=80.0, first_sigma_share=0.1
    )
    sigma, none = (
        draw_sigmas(section.model_copy(update={"first_sigma_share": share}), 20000, torch.Generator().manual_seed(0))
        for share in (0.1, 0.0)
    )
    assert 0.09 < (sigma == 80.0).float().mean() < 0.13
    assert sigma.min() >= 0.02
    drawn = log_normal_sigmas(20000, 0.0, 1.6, torch.Generator().manual_seed(0))
    assert torch.equal(none, drawn.clamp(0.02, 80.0)) and 0 < (none == 80.0).sum() < 100
    assert torch.equal(sigma[sigma < 80.0], none[sigma < 80.0])


def test_it_overfits_one_batch() -> None:
    model = tiny()
    condition, text, noise = inputs()
    clean = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    sigma = torch.tensor([80.0, 1.0])
    losses: list[float] = []

    def loss(_: int) -> Tensor:
        value = denoising_loss(model, clean, sigma, noise, condition, text).mean()
        losses.append(value.item())
        return value

    settings = optimiser(steps=40, batch=2, learning_rate=0.003, warmup=5)
    fit(model, loss, lambda number: number, settings, torch.device("cpu"), "one batch")
    assert losses[-1] < 0.2 * losses[0]
