"""The autoencoder's adapter (preprocessing, scaling, SVD's conventions) and its in-domain training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder
from pydantic import ValidationError

from svam import params
from svam.contract import ContractError
from svam.models.autoencoder import Autoencoder, to_pixels
from svam.models.published import save_published
from svam.training.prepare_backbones.autoencoder import build, moving_weight, psnr, with_statistics
from tests.tiny_foresight import reloaded
from tests.toy import committed


def section(**changes: object) -> params.Autoencoder:
    base = {"latent_channels": 4, "channels": [8, 16, 16], "layers": [0, 1, 1]}
    return params.Autoencoder.model_validate(committed("prepare_backbones.autoencoder", **{**base, **changes}))


@pytest.fixture
def frames() -> torch.Tensor:
    torch.manual_seed(0)
    smooth = torch.rand(2, 3, 4, 4)
    return (torch.nn.functional.interpolate(smooth, (16, 16), mode="bilinear") * 255).byte().permute(0, 2, 3, 1).contiguous()


@pytest.fixture
def svd(tmp_path: Path) -> tuple[Autoencoder, AutoencoderKLTemporalDecoder]:
    """A randomly initialised autoencoder of SVD's class, saved in SVD's layout and imported."""
    torch.manual_seed(0)
    model = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, latent_channels=4
    ).eval()
    save_published(model, tmp_path)
    return Autoencoder.load_published(tmp_path), model


def test_shapes_and_scaling_in_domain(frames: torch.Tensor) -> None:
    model = build(section(), (16, 16))
    autoencoder = Autoencoder(model, [1.0, 0.0, -1.0, 2.0], [0.5, 1.0, 2.0, 4.0])
    latents = autoencoder.encode(frames)
    assert autoencoder.factor == 4 and latents.shape == (2, 4, 4, 4) and latents.dtype == torch.float32
    assert autoencoder.patch == 2 and model.config["in_channels"] == 12
    pixels = frames.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    raw = model.encode(torch.nn.functional.pixel_unshuffle(pixels, 2)).latent
    scaled = (raw - torch.tensor([1.0, 0.0, -1.0, 2.0]).view(-1, 1, 1)) / torch.tensor([0.5, 1.0, 2.0, 4.0]).view(-1, 1, 1)
    assert torch.equal(latents, scaled.half().float())
    assert torch.equal(autoencoder.condition_of(autoencoder.encode(frames)), latents)
    decoded = autoencoder.decode(latents)
    rounded = autoencoder.latent_mean + latents * autoencoder.latent_std
    drawn = torch.nn.functional.pixel_shuffle(model.decode(rounded).sample, 2)
    torch.testing.assert_close(decoded, (drawn / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    assert torch.equal(autoencoder.decode_u8(latents), (decoded * 255).round().byte().permute(0, 2, 3, 1))


def test_statistics_make_the_latents_standard(frames: torch.Tensor) -> None:
    autoencoder = with_statistics(Autoencoder(build(section(), (16, 16))), frames)
    latents = autoencoder.encode(frames)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def test_svd_conditioning_latents_are_not_multiplied_by_the_scaling_factor(
    svd: tuple[Autoencoder, AutoencoderKLTemporalDecoder], frames: torch.Tensor
) -> None:
    autoencoder, model = svd
    mode = model.encode(to_pixels(frames)).latent_dist.mode()
    torch.testing.assert_close(autoencoder.encode(frames), mode * 0.18215, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(autoencoder.condition_of(autoencoder.encode(frames)), mode, rtol=1e-3, atol=1e-6)


def test_svd_decodes_clips(svd: tuple[Autoencoder, AutoencoderKLTemporalDecoder], frames: torch.Tensor) -> None:
    autoencoder, model = svd
    latents = torch.randn(6, 4, 8, 8)
    expected = (model.decode(latents / 0.18215, num_frames=3).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(autoencoder.decode(latents, frames=3), expected)
    assert not torch.allclose(autoencoder.decode(latents, frames=1), expected)
    with pytest.raises(ContractError, match="6 latents are no whole number of clips of 4"):
        autoencoder.decode(latents, frames=4)


@pytest.mark.parametrize("family", ["dc", "svd"])
def test_saving_and_loading_is_exact(
    family: str, svd: tuple[Autoencoder, AutoencoderKLTemporalDecoder], frames: torch.Tensor, tmp_path: Path
) -> None:
    first = svd[0] if family == "svd" else with_statistics(Autoencoder(build(section(), (16, 16))), frames)
    second = reloaded(first, tmp_path)
    assert second.family == family and torch.equal(first.encode(frames), second.encode(frames))
    assert torch.equal(first.decode(first.encode(frames)), second.decode(second.encode(frames)))


def test_autocast_changes_no_bits(frames: torch.Tensor) -> None:
    autoencoder = Autoencoder(build(section(), (16, 16)))
    plain = autoencoder.encode(frames)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(autoencoder.encode(frames), plain)
        assert torch.equal(autoencoder.decode(plain), autoencoder.decode(plain.clone()))


def test_wrong_frames_are_named() -> None:
    autoencoder = Autoencoder(build(section(), (16, 16)))
    with pytest.raises(ContractError, match="expected uint8"):
        autoencoder.encode(torch.rand(1, 16, 16, 3))
    with pytest.raises(ContractError, match="18x16 pixels; both must be multiples of 4"):
        autoencoder.encode(torch.zeros(1, 18, 16, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 5}, "no multiple of latent_channels 5"),
        ({"channels": [8, 16, 24]}, "16 and 24 of neighbouring levels"),
        ({"layers": [1, 0, 1]}, "zeros may only come first"),
        ({"layers": [0, 0, 0]}, "not everywhere"),
    ],
)
def test_sizes_that_the_class_cannot_have(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(**changes)


def test_frames_that_the_levels_do_not_divide() -> None:
    with pytest.raises(ContractError, match="a factor of 4, but the frames are 18x16"):
        build(section(), (18, 16))


def test_moving_weight_by_hand() -> None:
    weights = section().loss
    background = torch.zeros(1, 3, 15, 15)
    pixels = torch.zeros(1, 3, 15, 15)
    assert torch.equal(moving_weight(pixels, background, weights), torch.ones(1, 1, 15, 15))
    # A step of 0.08 in [-1, 1] is half the threshold of 0.08 in [0, 1]; everywhere, it has no contrast.
    flat = moving_weight(pixels + 0.08, background, weights)
    torch.testing.assert_close(flat, torch.full_like(flat, 1.0 + weights.moving / 2))
    pixels[0, 1, 7, 7] = -1.0  # one pixel, 0.5 in [0, 1], against a neighbourhood of 49 that holds it
    point = moving_weight(pixels, background, weights)[0, 0]
    assert point[7, 7].item() == pytest.approx(1.0 + weights.moving + weights.contrast * 0.5 * 48 / 49)
    assert point[7, 6].item() == 1.0


def test_psnr_by_hand() -> None:
    assert psnr(0.01) == pytest.approx(20.0) and psnr(0.0) == 100.0
