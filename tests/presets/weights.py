"""The published weights that presets name: the published classes and layouts, randomly initialised, at sizes for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import nn
from transformers import CLIPConfig, CLIPModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from svam.models.published import save_published
from svam.training.prepare_backbones.text import train_tokenizer
from tests.models.test_depth_anything_3 import NET, make

TEACHER = 28
"""Pixels of the teachers' frames: two of the published patches of 14."""


def write_weights(folder: Path, sentences: list[str], tokens: int) -> None:
    """`folder/<name of the hub's repository>` of each; CLIP's tokenizer knows `sentences` and takes `tokens`."""
    torch.manual_seed(5)
    svd, clip = folder / "stable-video-diffusion-img2vid", folder / "clip-vit-base-patch32"
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, latent_channels=4
    )
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), num_attention_heads=(2, 4),
        cross_attention_dim=32, addition_time_embed_dim=32, projection_class_embeddings_input_dim=96, num_frames=3,
    )  # fmt: skip
    tokenizer = train_tokenizer(sentences, 2048)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    language = {**shared, **special, "vocab_size": len(tokenizer), "max_position_embeddings": tokens}
    vision = {**shared, "image_size": 16, "patch_size": 8}
    registers = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(image_size=TEACHER, patch_size=14, **{**shared, "hidden_size": 12}, num_register_tokens=4)
    )
    models: dict[Path, nn.Module] = {
        svd / "vae": vae,
        svd / "unet": unet,
        clip: CLIPModel(CLIPConfig(text_config=language, vision_config=vision, projection_dim=8)),
        folder / "dinov2-with-registers-base": registers,
    }
    for place, model in models.items():
        place.mkdir(parents=True)
        save_published(model, place)
    tokenizer.save_pretrained(str(clip))
    make(folder / "DA3-LARGE", NET)
