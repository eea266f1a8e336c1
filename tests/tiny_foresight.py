"""Tiny frozen parts of the real classes, and generated windows made with them or of chosen numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model, VJEPA2Config, VJEPA2Model

from svam import params
from svam.episodes.convert import convert
from svam.episodes.joined import open_store
from svam.episodes.store import EpisodeStore
from svam.files import sha256_tree
from svam.models.autoencoder import Autoencoder
from svam.models.teachers import Objective, Teacher, TeacherConfig
from svam.models.text import TextEncoder
from svam.models.video import VideoConfig, VideoModel, build_unet
from svam.npy import write_arrays
from svam.training.blocks import write_attributes
from svam.training.prepare_backbones import autoencoder as autoencoder_training
from svam.training.prepare_backbones.text import train_tokenizer
from tests.recorded import SETTINGS, Recorded, make_episode
from tests.toy import committed, optimiser

SIZE, FRAMES, GRID = 16, 3, 2
OPTIMISER = optimiser(steps=60, batch=2, learning_rate=0.01, warmup=2, ema=0.0)


def make_store(path: Path, foreseen: int = 1, **changes: Any) -> EpisodeStore:
    """Six episodes of two tasks, 12 steps each, 16 x 16 pixels, every third frame annotated; `changes` of each episode."""
    episodes = [make_episode(task, 12, k, SIZE) for k, task in enumerate(["push", "pull"] * 3)]
    told = [dataclasses.replace(e, instruction=f"{e.task} a", **changes) for e in episodes]  # the text encoder has 8 tokens
    convert(Recorded(told), path, SETTINGS.model_copy(update={"foreseen": foreseen}), 0)
    return open_store(path)


def make_teacher(objective: Objective | None = None) -> Teacher:
    """A DINOv2 of 12 channels on 2 x 2 patches, with a dense head where it has an objective."""
    torch.manual_seed(3)
    config = Dinov2Config(image_size=SIZE, patch_size=8, hidden_size=12, num_hidden_layers=1, num_attention_heads=2)
    outputs = {None: 0, "depth": 1, "segmentation": 7}[objective]  # type: ignore[index]
    record = TeacherConfig("dinov2", SIZE, objective, outputs, depth_std=0.5)
    return Teacher(Dinov2Model(config), record).eval().requires_grad_(False)


def make_video_teacher() -> Teacher:
    """A V-JEPA 2 of 12 channels on 2 x 2 patches, whose tokens span two frames and depend on the whole clip."""
    torch.manual_seed(3)
    config = VJEPA2Config(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, crop_size=SIZE, patch_size=8, initializer_range=0.2,
        pred_hidden_size=12, pred_num_hidden_layers=1, pred_num_attention_heads=2,
    )  # fmt: skip
    return Teacher(VJEPA2Model(config), TeacherConfig("vjepa2", SIZE)).eval().requires_grad_(False)


def reloaded(part: Any, folder: Path) -> Any:
    """The part after it was saved and loaded; saved again it is the same bytes."""
    for name in ("a", "b"):
        (folder / name).mkdir()
    part.save(folder / "a")
    loaded = type(part).load(folder / "a")
    loaded.save(folder / "b")
    assert sha256_tree(folder / "a") == sha256_tree(folder / "b")
    return loaded


def save_parts(folder: Path, store: EpisodeStore, noise: str) -> None:
    """`backbones/{autoencoder,text,geometric}` and `video` below `folder`: untrained, but whole."""
    torch.manual_seed(4)
    section = params.Autoencoder.model_validate(
        committed("prepare_backbones.autoencoder", latent_channels=4, channels=[8, 16, 16], layers=[0, 1, 1])
    )
    tokenizer = train_tokenizer([s for task in store.tasks for s in store.instructions[task]["train"]], 2048)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    latent = SIZE // 4
    video = VideoConfig(
        frames=FRAMES, stride=2, rate_hz=20.0, latent_channels=4, latent_size=(latent, latent), text_tokens=8, text_width=16,
        sigma_min=0.02, sigma_max=80.0, noise=noise, camera=store.cameras[0], more_cameras=store.foreseen[1:],
        image_size=(SIZE, SIZE),
    )  # fmt: skip
    unet = build_unet(params.UNet(pretrained=None, revision=None, channels=[32, 64], layers=1, heads=[2, 4]), video)
    parts: dict[str, Any] = {
        "backbones/autoencoder": Autoencoder(autoencoder_training.build(section, store.image_size)),
        "backbones/text": TextEncoder(text, tokenizer, 8),
        "backbones/geometric": make_teacher("depth"),
        "video": VideoModel(unet, video, torch.randn(FRAMES, 4, latent, latent)),
    }
    for name, part in parts.items():
        (folder / name).mkdir(parents=True)
        part.save(folder / name)


def write_windows(path: Path, rows: np.ndarray[Any, Any], held_out: list[bool], **arrays: np.ndarray[Any, Any]) -> None:
    """A folder of generated windows of chosen arrays; what is not given is random."""
    rng = np.random.default_rng(7)
    shape, held = (FRAMES, SIZE, SIZE, 3), sum(held_out)
    shapes = {
        "frames": (len(rows), *shape), "reconstruction": (len(rows), *shape[1:]), "one_step_frames": (held, *shape),
        "other_noise_frames": (held, *shape),
    }  # fmt: skip
    drawn = {name: rng.integers(0, 256, whole).astype(np.uint8) for name, whole in shapes.items()}
    latents = np.zeros((len(rows), 4, SIZE // 4, SIZE // 4), np.float16)
    write_arrays(path, drawn | {"latents": latents, "rows": rows, "held_out": np.asarray(held_out)} | arrays)
    sampler = {"up_blocks": 2, "grid": GRID, "steps": 2, "guidance": 1.0, "bf16": False}
    write_attributes(path, sampler=sampler, video_sha256="abc", instructions=[], noise_seeds=[])


def encoded(store: EpisodeStore, autoencoder: Autoencoder) -> np.ndarray[Any, Any]:
    """Latents (N, c, h', w') float16 of the store, as the stage `encode` writes them."""
    return np.asarray(autoencoder.encode(torch.from_numpy(store.frames(np.arange(len(store))))).half().numpy())
