"""Every published family by a random checkpoint in its authors' layout: tokens are the library's, of frames and of clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from svam import params
from svam.contract import ContractError
from svam.files import sha256_tree, write_json
from svam.models.families import CLIP, FAMILIES, HALF, IMAGENET, Family, Statistics
from svam.models.layouts import TEACHERS, check_layout
from svam.models.published import save_published
from svam.models.teachers import Teacher, TeacherConfig, spread
from tests.models.test_depth_anything_3 import NET
from tests.models.test_depth_anything_3 import make as make_depth_anything_3
from tests.sources.common import refused
from tests.tiny_foresight import make_teacher

SIZE, PATCH, WIDTH, FRAMES = 32, 8, 24, 4
VIT: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": SIZE,
    "patch_size": PATCH,
}  # fmt: skip
WORDS: dict[str, Any] = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
VIDEO = VIT | {"num_frames": FRAMES, "decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
JEPA: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "crop_size": SIZE, "patch_size": PATCH,
    "frames_per_clip": 8, "pred_hidden_size": 12, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2,
    "num_pooler_layers": 1,
}  # fmt: skip


def clip_model() -> Any:
    config = transformers.CLIPConfig(text_config=WORDS, vision_config=VIT, projection_dim=8)
    return transformers.CLIPModel(config)


def siglip_model() -> Any:
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=WORDS, vision_config=VIT))


def clip_sequence(model: Any, pixels: Tensor) -> Tensor:
    vision = model.vision_model
    seen: Tensor = vision.post_layernorm(vision(pixels, interpolate_pos_encoding=True).last_hidden_state)
    return seen[:, 1:]


Sequence = Callable[[Any, Tensor], Tensor]
# Family, a checkpoint as it is published, one of its names there, statistics, and its own patch tokens of (B, [T,] 3, S, S).
PUBLISHED: dict[str, tuple[Family, Callable[[], Any], str, Statistics, Sequence]] = {
    "dinov3": (
        "dinov3", lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VIT, num_register_tokens=4)),
        "layer.0.norm1.weight", IMAGENET, lambda model, pixels: model(pixels).last_hidden_state[:, 5:],
    ),
    "clip": ("clip", clip_model, "vision_model.embeddings.class_embedding", CLIP, clip_sequence),
    "siglip2": (
        "siglip2", siglip_model, "vision_model.post_layernorm.weight", HALF,
        lambda model, pixels: model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state,
    ),
    "videomae, pretrained": (
        "videomae", lambda: transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**VIDEO, use_mean_pooling=False)),
        "videomae.encoder.layer.0.attention.attention.q_bias", IMAGENET,
        lambda model, pixels: model.videomae(pixels).last_hidden_state,
    ),
    "videomae, with a classifier": (
        "videomae", lambda: transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**VIDEO)),
        "videomae.embeddings.patch_embeddings.projection.weight", IMAGENET,
        lambda model, pixels: model.videomae(pixels).last_hidden_state,
    ),
    "vjepa2": (
        "vjepa2", lambda: transformers.VJEPA2Model(transformers.VJEPA2Config(**JEPA)), "encoder.layer.0.norm1.weight", IMAGENET,
        lambda model, pixels: model.encoder(pixels).last_hidden_state,
    ),
    "vjepa2, with a classifier": (
        "vjepa2", lambda: transformers.VJEPA2ForVideoClassification(transformers.VJEPA2Config(**JEPA)),
        "vjepa2.encoder.layer.0.norm1.weight", IMAGENET, lambda model, pixels: model.vjepa2.encoder(pixels).last_hidden_state,
    ),
}  # fmt: skip


def publish(folder: Path, build: Callable[[], Any]) -> Any:
    """A checkpoint in a new folder; every weight is random, also those that start at zero or one."""
    folder.mkdir()
    torch.manual_seed(0)
    model = build()
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape)
    save_published(model, folder)
    return model.eval()


@pytest.fixture
def clips() -> Tensor:
    return torch.rand(2, FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_tokens_are_the_librarys_of_a_published_checkpoint(name: str, clips: Tensor, tmp_path: Path) -> None:
    family, build, key, statistics, sequence = PUBLISHED[name]
    model = publish(tmp_path / "model", build)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        assert key in file.keys()  # noqa: SIM118
    teacher = Teacher.load_published(tmp_path / "model", family, SIZE)
    assert (teacher.grid, teacher.channels, teacher.sees_clips) == (SIZE // PATCH, WIDTH, name.startswith("v"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    pixels = (clips - mean) / std
    tokens = teacher.clip_features(clips)
    assert tokens.shape == (2, FRAMES, 4, 4, WIDTH) and tokens.dtype == torch.float32 and tokens.std() > 0.01
    if teacher.sees_clips:  # tokens span two frames each
        expected = sequence(model, pixels).unflatten(1, (FRAMES // 2, 4, 4)).repeat_interleave(2, dim=1)
    else:
        expected = sequence(model, pixels.flatten(0, 1)).unflatten(1, (4, 4)).unflatten(0, (2, FRAMES))
        torch.testing.assert_close(teacher.features(clips[:, 1]), tokens[:, 1])
    torch.testing.assert_close(tokens, expected)
    for copy in ("a", "b"):
        (tmp_path / copy).mkdir()
    teacher.save(tmp_path / "a")
    again = Teacher.load(tmp_path / "a")
    again.save(tmp_path / "b")
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b") and again.config == TeacherConfig(family, SIZE)
    assert torch.equal(again.clip_features(clips), tokens)
    with pytest.raises(ContractError, match="no dense head"):
        teacher.predict(clips[:, 0])


@torch.no_grad()
def test_depth_anything_3_sees_a_clip_as_views_and_one_frame_alone(tmp_path: Path) -> None:
    model = make_depth_anything_3(tmp_path / "model", NET)
    teacher = Teacher.load_published(tmp_path / "model", "depth_anything_3", 42)
    clips = torch.rand(2, 3, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    pixels = teacher.prepare(clips.flatten(0, 1)).unflatten(0, (2, 3))
    tokens = teacher.clip_features(clips)
    assert (teacher.grid, teacher.channels, tokens.shape) == (3, 256, (2, 3, 3, 3, 256))
    torch.testing.assert_close(tokens, model(pixels).unflatten(1, (3, 3, 3)))
    alone = teacher.features(clips[:, 0])
    torch.testing.assert_close(alone, model(pixels[:, :1]).unflatten(1, (3, 3)))
    assert torch.equal(teacher.features(clips[:, 0], length=5), alone) and not torch.allclose(alone, tokens[:, 0], atol=1e-3)
    first = Teacher.load_published(tmp_path / "model", "depth_anything_3", 42, "first")
    assert first.clip_features(clips).shape == tokens.shape and not torch.allclose(first.features(clips[:, 0]), alone)
    (tmp_path / "own").mkdir()
    first.save(tmp_path / "own")
    assert torch.equal(Teacher.load(tmp_path / "own").clip_features(clips), first.clip_features(clips))
    with pytest.raises(ContractError, match="image_size 64 is no multiple of the model's patch of 14"):
        Teacher.load_published(tmp_path / "model", "depth_anything_3", 64)


@torch.no_grad()
@pytest.mark.parametrize("name", ["videomae, pretrained", "vjepa2"])
def test_one_frame_of_video_is_a_clip_in_which_nothing_moves(name: str, clips: Tensor, tmp_path: Path) -> None:
    family, build, *_ = PUBLISHED[name]
    publish(tmp_path / "model", build)
    teacher = Teacher.load_published(tmp_path / "model", family, SIZE)
    still = teacher.clip_features(clips[:, :1].expand(-1, FRAMES, -1, -1, -1))
    torch.testing.assert_close(teacher.features(clips[:, 0], FRAMES), still.mean(dim=1))
    assert teacher.features(clips[:, 0]).shape == still[:, 0].shape
    moving = teacher.clip_features(clips)
    assert not torch.allclose(moving[:, 0], still[:, 0], atol=1e-3)
    later = torch.cat([clips[:, :2], clips[:, 2:].flip(-1)], dim=1)
    assert not torch.allclose(teacher.clip_features(later)[:, 0], moving[:, 0], atol=1e-4)  # a token sees the whole clip
    with pytest.raises(ContractError, match=f"image_size 64, but this {family} takes {SIZE} pixels only"):
        Teacher.load_published(tmp_path / "model", family, 64)
    if family == "videomae":
        with pytest.raises(ContractError, match="clips have 5 frames, but this videomae takes 4; set finetune_video.frames"):
            teacher.clip_features(torch.cat([clips, clips[:, :1]], dim=1))
    else:
        assert teacher.clip_features(clips[:, :3]).shape[1] == 3  # one is shown twice


def test_how_clips_are_spread_over_a_models_frames() -> None:
    assert spread(4, 4, 2) == ([0, 1, 2, 3], [0, 0, 1, 1])
    assert spread(2, 4, 2) == ([0, 0, 1, 1], [0, 1])
    assert spread(3, 4, 2) == ([0, 0, 1, 2], [0, 1, 1])
    assert spread(1, 16, 2) == ([0] * 16, [4])
    assert spread(3, 3, 1) == ([0, 1, 2], [0, 1, 2])


def test_a_family_that_sees_frames_sees_a_clip_frame_by_frame() -> None:
    teacher = make_teacher()
    clips = torch.rand(2, 3, 3, 16, 16)
    assert torch.equal(teacher.clip_features(clips), teacher.features(clips.flatten(0, 1)).unflatten(0, (2, 3)))
    assert torch.equal(teacher.features(clips[:, 0], length=5), teacher.features(clips[:, 0]))


@pytest.mark.parametrize("name", ["clip", "dinov3", "siglip2"])
def test_other_sizes_of_pictures_are_taken_where_positions_can_be(name: str, tmp_path: Path) -> None:
    family, build, *_ = PUBLISHED[name]
    publish(tmp_path / "model", build)
    teacher = Teacher.load_published(tmp_path / "model", family, 2 * SIZE)
    assert teacher.features(torch.rand(1, 3, 20, 30)).shape == (1, 8, 8, WIDTH)


def test_weights_of_another_family_say_which(tmp_path: Path) -> None:
    publish(tmp_path / "clip", clip_model)
    with refused(r"clip/config.json: model_type is 'clip', expected 'dinov2'; set family to 'clip'", "semantic.path: "):
        check_layout(tmp_path / "clip", TEACHERS["dinov2"], "semantic.path")
    write_json(tmp_path / "clip" / "config.json", {"model_type": "bert"})
    with refused("model_type is 'bert', expected 'siglip' or 'siglip_vision_model'; name weights of that kind"):
        check_layout(tmp_path / "clip", TEACHERS["siglip2"], "semantic.path")
    with refused("expected the layout of Depth Anything 3"):
        check_layout(tmp_path / "clip", TEACHERS["depth_anything_3"], "semantic.path")
    with refused("expected the layout of Depth Anything 3"):
        Teacher.load_published(tmp_path / "clip", "depth_anything_3", SIZE)


def test_params_know_every_family() -> None:
    field = params.TeacherModel.model_fields
    assert set(get_args(field["family"].annotation)) == set(get_args(Family)) == set(FAMILIES) == set(TEACHERS)
    assert all(hasattr(transformers, family.library) for name, family in FAMILIES.items() if name != "depth_anything_3")
