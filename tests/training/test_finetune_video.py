"""Fine-tuning of the video model: what is dropped for guidance, weights that are taken as they are, and pictures on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from svam.episodes.joined import open_store
from svam.episodes.store import SPLITS, EpisodeStore
from svam.files import sha256_tree
from svam.models.autoencoder import Autoencoder
from svam.models.text import TextEncoder
from svam.models.video import VideoModel
from svam.params import FinetuneVideo
from svam.resume import NO_RESUME, Resume
from svam.training import finetune_video
from svam.training.finetune_video import TextTable, new_video_model, train_video
from svam.training.latents import LatentClips
from tests.killing import kill
from tests.presets.weights import write_weights
from tests.tiny_foresight import FRAMES, encoded
from tests.toy import committed

CPU = torch.device("cpu")
TRAINING = {"steps": 4, "batch": 2, "warmup": 1, "bf16": False}


def section(parts: Path, steps: int = 4, weights: Path | None = None, **changes: Any) -> FinetuneVideo:
    """Fine-tuning of the tiny video model that an earlier run has left, or of other `weights`."""
    values = committed(
        "finetune_video", frames=FRAMES, stride_seconds=0.1, unet={"pretrained": str(weights or parts / "video")},
        evaluation_clips=2, evaluation_steps=2, training=TRAINING | {"steps": steps},
    )  # fmt: skip
    return FinetuneVideo.model_validate(values | changes)


def trained(parts: Path, params: FinetuneVideo, live: Path | None = None, resume: Resume = NO_RESUME) -> VideoModel:
    torch.manual_seed(0)
    store = open_store(parts / "episodes.zarr")
    autoencoder, text = Autoencoder.load(parts / "backbones/autoencoder"), TextEncoder.load(parts / "backbones/text")
    model, latents = new_video_model(params, store, autoencoder, text, 0), encoded(store, autoencoder)
    clips = [LatentClips(store, side, latents, params.frames, model.config.stride) for side in SPLITS]
    train_video(model, params, *clips, autoencoder, TextTable.build(store, text), 0, CPU, live, resume)
    return model


@pytest.mark.parametrize("dropped", ["frame_and_text", "text"])
def test_what_is_dropped_is_zero_and_the_rest_stays(dropped: str, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    loss = finetune_video.denoising_loss

    def watched(model: VideoModel, clean: Tensor, sigma: Tensor, noise: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        seen.extend((bool(c.any()), bool(t.any())) for c, t in zip(condition, text, strict=True))
        return loss(model, clean, sigma, noise, condition, text)

    monkeypatch.setattr(finetune_video, "denoising_loss", watched)
    for share in (0.0, 1.0, 0.5):
        seen.clear()
        model = trained(parts, section(parts, dropped=dropped, guidance_dropout=share))
        without = (dropped == "text", False)
        assert set(seen) == {0.0: {(True, True)}, 1.0: {without}, 0.5: {(True, True), without}}[share]
    assert model.config.dropped == dropped


@pytest.mark.parametrize("origin", ["earlier", "published"])
def test_no_steps_leave_weights_as_they_are(origin: str, parts: Path, tmp_path: Path) -> None:
    """Those of an earlier run and published ones; and the folder of curves, which DVC expects, is there."""
    weights = parts / "video"
    if origin == "published":
        write_weights(tmp_path / "weights", ["push a"], 8)
        weights = tmp_path / "weights/stable-video-diffusion-img2vid"
    model = trained(parts, section(parts, 0, weights), tmp_path / "live")
    assert (tmp_path / "live/metrics.json").is_file()
    before = load_file(weights / "unet/diffusion_pytorch_model.safetensors")
    (tmp_path / "out").mkdir()
    model.save(tmp_path / "out")
    for unet in (model.unet, VideoModel.load(tmp_path / "out").unet):
        assert unet.state_dict().keys() == before.keys()
        assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())
    more = trained(parts, section(parts, weights=weights)).unet.state_dict()
    assert any((weight != before[name]).any() for name, weight in more.items())


def test_clips_are_shown_on_the_way(store: EpisodeStore, parts: Path, tmp_path: Path) -> None:
    """Truth above generation, frames from left to right; they change no weight, and a killed run has all of them too."""
    params = section(parts, show_every=2, steps=5)
    shown, plain = trained(parts, params, tmp_path / "live"), trained(parts, section(parts, steps=5), tmp_path / "plain")
    assert all(torch.equal(a, b) for a, b in zip(shown.unet.parameters(), plain.unet.parameters(), strict=True))
    assert not (tmp_path / "plain/clips").exists()
    names = [f"{step:07d}.png" for step in (2, 4, 5)]
    assert sorted(file.name for file in (tmp_path / "live/clips").iterdir()) == names
    picture = np.asarray(Image.open(tmp_path / "live/clips" / names[-1]))
    height, width = store.image_size
    assert picture.shape == (2 * finetune_video.SHOWN_CLIPS * height, FRAMES * width, 3)
    assert (picture[:height] != picture[height : 2 * height]).any()
    curve = tmp_path / "live/plots/metrics/held_out/error_share_of_repeat.tsv"
    assert [line.split("\t")[0] for line in curve.read_text().splitlines()] == ["step", "2", "4", "5"]

    (tmp_path / "state").mkdir()
    kill(3, trained, parts, params, tmp_path / "killed", Resume(tmp_path / "state", 0))
    trained(parts, params, tmp_path / "resumed", Resume(tmp_path / "state", 0))
    assert sha256_tree(tmp_path / "resumed") == sha256_tree(tmp_path / "live")
