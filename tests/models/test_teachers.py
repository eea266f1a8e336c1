"""Teachers: features equal the library's, preprocessing is the adapter's, dense predictions, losses and metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DepthAnythingForDepthEstimation, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from svam import params
from svam.contract import ContractError
from svam.models.families import Family
from svam.models.published import save_published
from svam.models.teachers import FARTHEST, Backbone, Teacher, TeacherConfig, to_grid, unpatchify
from svam.training.prepare_backbones.teacher import Views, as_unit, blur, build, inverse_depth, objective_of, soft_dice
from svam.training.teacher_metrics import confusion, depth_error, intersection_over_union, valid_depth
from tests.toy import committed

SIZE = 16


def section(family: Family, objective: str, **changed: float) -> params.TeacherModel:
    values = committed(
        "prepare_backbones.semantic", family=family, objective=objective, image_size=SIZE, patch=4, width=12, layers=2, heads=2,
        reconstructed_share=0.25, blurred_share=0.25, training={"steps": 60, "batch": 3, "warmup": 2}, **changed,
    )  # fmt: skip
    return params.TeacherModel.model_validate(values)


def library_tokens(model: Backbone, pixels: torch.Tensor) -> torch.Tensor:
    """(B, g * g, channels): the patch tokens as the library returns them."""
    if isinstance(model, DepthAnythingForDepthEstimation):
        return model.backbone(pixels).feature_maps[-1][:, 1:]
    skipped = 5 if isinstance(model, Dinov2WithRegistersModel) else 1
    return model(pixels).last_hidden_state[:, skipped:]


@pytest.fixture
def frames() -> torch.Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["dinov2", "dinov2_registers", "depth_anything_v2"])
def test_published_features_equal_the_librarys(family: Family, frames: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(section(family, "depth")).eval()
    save_published(model, tmp_path)
    teacher = Teacher.load_published(tmp_path, family, SIZE)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (frames - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = library_tokens(model, pixels)
    features = teacher.features(frames)
    assert (teacher.grid, teacher.channels, features.shape) == (4, 12, (2, 4, 4, 12))
    torch.testing.assert_close(features.flatten(1, 2), expected)
    if isinstance(model, DepthAnythingForDepthEstimation):
        with torch.no_grad():
            torch.testing.assert_close(teacher.predict(frames), model(pixels).predicted_depth)
    else:
        with pytest.raises(ContractError, match="no dense head"):
            teacher.predict(frames)


def test_frames_of_any_size_are_resized_by_the_adapter(tmp_path: Path) -> None:
    config = Dinov2WithRegistersConfig(image_size=28, patch_size=14, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    teacher = Teacher(Dinov2WithRegistersModel(config), TeacherConfig("dinov2_registers", 56)).eval()
    assert teacher.prepare(torch.rand(1, 3, 20, 30)).shape == (1, 3, 56, 56)
    assert teacher.features(torch.rand(1, 3, 20, 30)).shape == (1, 4, 4, 8)  # positions are interpolated by the library
    white = teacher.prepare(torch.ones(1, 3, 20, 20))[0, :, 0, 0]
    torch.testing.assert_close(white, torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]))
    with pytest.raises(ContractError, match="image_size 64 is no multiple of the model's patch of 14"):
        Teacher(Dinov2WithRegistersModel(config), TeacherConfig("dinov2_registers", 64))
    with pytest.raises(ContractError, match=r"expected float \(B, 3, H, W\)"):
        teacher.features(torch.zeros(1, 20, 20, 3))


# Family, objective, channels of the head (0: the family's own), and what is predicted for each frame.
CASES: list[tuple[Family, str, int, tuple[int, ...]]] = [
    ("depth_anything_v2", "depth", 0, ()), ("dinov2", "depth", 1, ()), ("dinov2_registers", "segmentation", 7, (7,)),
    ("dinov2", "self_supervised", 3, (3,)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "objective", "outputs", "shape"), CASES)
def test_saving_and_loading_is_exact(
    family: Family, objective: str, outputs: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = TeacherConfig(family, SIZE, objective, outputs, 0.7, 0.3, 0.2)  # type: ignore[arg-type]
    first = Teacher(build(section(family, objective)), config).eval()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first.save(tmp_path / "a")
    second = Teacher.load(tmp_path / "a")
    second.save(tmp_path / "b")
    frames = torch.rand(2, 3, 24, 24)
    assert second.config == config and second.predict(frames).shape == (2, *shape, 24, 24)
    assert torch.equal(first.features(frames), second.features(frames))
    assert torch.equal(first.predict(frames), second.predict(frames))
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_the_linear_depth_head_predicts_metres(frames: torch.Tensor) -> None:
    config = TeacherConfig("dinov2", SIZE, "depth", 1, inverse_mean=0.5, inverse_std=2.0)
    teacher = Teacher(build(section("dinov2", "depth")), config)
    assert teacher.head is not None
    torch.nn.init.zeros_(teacher.head.weight)
    torch.nn.init.zeros_(teacher.head.bias)
    torch.testing.assert_close(teacher.predict(frames), torch.full((2, SIZE, SIZE), 2.0))  # 1 / (0 * 2 + 0.5)
    torch.nn.init.constant_(teacher.head.bias, -1.0)
    torch.testing.assert_close(teacher.predict(frames), torch.full((2, SIZE, SIZE), FARTHEST))  # never behind the sky


def test_unpatchify_by_hand() -> None:
    tokens = torch.tensor([[[[0.0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11], [12, 13, 14, 15]]]])
    expected = torch.tensor([[[[0.0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]])
    assert torch.equal(unpatchify(tokens, 2), expected)


def test_a_depth_model_that_skips_its_last_layer_is_refused() -> None:
    model = build(section("depth_anything_v2", "depth"))
    model.config.backbone_config.num_hidden_layers = 3
    with pytest.raises(ContractError, match="expected the last of them to be the final layer, 3"):
        Teacher(model, TeacherConfig("depth_anything_v2", SIZE))


@pytest.mark.parametrize(("family", "objective", "outputs"), [case[:3] for case in CASES])
def test_each_objective_overfits_one_batch(family: Family, objective: str, outputs: int, frames: torch.Tensor) -> None:
    torch.manual_seed(0)
    settings = section(family, objective)
    config = TeacherConfig(family, SIZE, objective, outputs, inverse_mean=1.0, inverse_std=0.3)  # type: ignore[arg-type]
    teacher = Teacher(build(settings), config)
    column = torch.arange(SIZE).expand(2, SIZE, SIZE)
    hidden = torch.rand(2, teacher.grid**2, generator=torch.Generator().manual_seed(1)) < 0.5
    labels = {"depth": 0.5 + column / SIZE, "segmentation": (column // 8).byte(), "self_supervised": hidden}[objective]
    module, loss = objective_of(teacher, settings, np.array([128, 128, 0, 0, 0, 0, 0]))
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.005)
    values = []
    smooth = torch.nn.functional.avg_pool2d(frames, 5, 1, 2)
    for _ in range(50):
        value = loss((smooth, smooth, labels) if objective == "self_supervised" else (smooth, labels))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert np.mean(values[-5:]) < 0.5 * values[0]


def test_the_depth_loss_weighs_metres_beside_their_inverse(frames: torch.Tensor) -> None:
    config = TeacherConfig("dinov2", SIZE, "depth", 1, inverse_mean=0.5, inverse_std=0.4, depth_std=2.0)
    teacher = Teacher(build(section("dinov2", "depth")), config)
    assert teacher.head is not None
    torch.nn.init.zeros_(teacher.head.weight)
    torch.nn.init.zeros_(teacher.head.bias)  # it predicts 0.5 / m, 2 m
    truth = torch.full((2, SIZE, SIZE), 0.25)
    truth[:, 0], truth[:, 1] = 0.0, torch.nan  # the sky, which lies at FARTHEST; a hole
    seen = SIZE - 1
    for weight in (0.0, 3.0):
        _, loss = objective_of(teacher, section("dinov2", "depth", metric_weight=weight), np.array([1]))
        inverse, metres = ((seen - 1) * 0.25 + 0.5) / seen, ((seen - 1) * 2.0**2 + (FARTHEST - 2.0) ** 2) / seen
        assert loss((frames, truth)).item() == pytest.approx(inverse + weight * 0.4 / 2.0**2 * metres, rel=1e-5)


def test_soft_dice_by_hand() -> None:
    classes = torch.tensor([[[0, 0, 1]]])
    likely = torch.tensor([[[[1.0, 0.5, 0.0]], [[0.0, 0.5, 1.0]], [[0.0, 0.0, 0.0]]]])
    values = soft_dice(likely, classes)
    assert values.tolist() == pytest.approx([1 - 2 * 1.5 / 3.5, 1 - 2 * 1.0 / 2.5, 1.0])


def test_dice_weighs_the_classes_that_occur(frames: torch.Tensor) -> None:
    teacher = Teacher(build(section("dinov2", "segmentation")), TeacherConfig("dinov2", SIZE, "segmentation", 3))
    assert teacher.head is not None
    torch.nn.init.zeros_(teacher.head.weight)
    torch.nn.init.zeros_(teacher.head.bias)  # each class with a third
    labels = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
    labels[0] = 1
    values = [
        objective_of(teacher, section("dinov2", "segmentation", dice_weight=weight), np.array([5, 5, 0]))[1](
            (frames, labels)
        ).item()
        for weight in (0.0, 2.0)
    ]
    assert values[1] - values[0] == pytest.approx(2.0 * (1 - 2 * (1 / 3) / (2 / 3 + 1)))  # the third class is in no picture


def test_views_keep_to_their_shares() -> None:
    frames = torch.zeros(8, SIZE, SIZE, 3, dtype=torch.uint8)
    frames[:, :8] = 255
    rebuilt = torch.full_like(frames, 51)
    views = Views(frames, rebuilt, torch.arange(8))
    rng = np.random.default_rng(0)
    kinds = {"clean": 0, "reconstructed": 0, "blurred": 0}
    for _ in range(60):
        chosen = torch.from_numpy(rng.choice(8, 3, replace=False))
        seen, labels = views.batch(chosen, section("dinov2", "depth"), rng, torch.device("cpu")).look()
        assert labels.tolist() == chosen.tolist()
        for one, original in zip(seen, as_unit(frames[chosen]), strict=True):
            rebuilt_one = torch.allclose(one, torch.full_like(one, 0.2))
            kinds["reconstructed" if rebuilt_one else "clean" if torch.equal(one, original) else "blurred"] += 1
    assert 70 < kinds["clean"] < 110 and 30 < kinds["reconstructed"] < 60 and 30 < kinds["blurred"] < 60


def test_blur_keeps_the_mean_and_spreads_a_point() -> None:
    image = torch.zeros(1, 3, 64, 64)
    image[..., 32, 32] = 1.0
    blurred = blur(image, 1.0)
    assert blurred.sum().item() == pytest.approx(3.0, abs=1e-4)
    assert blurred[0, 0, 32, 32].item() == pytest.approx(1 / (2 * np.pi), rel=0.02)  # peak of a 2-D Gaussian of width 1
    assert blurred[0, 0, 32, 33] == blurred[0, 0, 33, 32]


def test_inverse_depth_by_hand() -> None:
    depth = np.array([[[0.5, 2.0], [0.0, np.inf]]], np.float32)
    values = inverse_depth(depth, 2)[0]
    assert values[0].tolist() == [2.0, 0.5] and torch.isnan(values[1]).all()


def test_depth_error_by_hand() -> None:
    truth = np.array([[[1.0, 2.0], [113.0, np.nan]]])
    predicted = np.array([[[1.3, 1.6], [5.0, 5.0]]])
    assert valid_depth(truth).tolist() == [[[True, True], [False, False]]]
    error = depth_error(predicted, truth, 0.5)
    assert error["rmse_m"] == pytest.approx(np.sqrt((0.09 + 0.16) / 2))
    assert error["rmse_std"] == pytest.approx(2 * error["rmse_m"])
    assert error["abs_rel"] == pytest.approx((0.3 / 1.0 + 0.4 / 2.0) / 2)
    with pytest.raises(ValueError, match="0 valid pixels"):
        depth_error(predicted, np.zeros_like(truth), 0.5)


def test_intersection_over_union_by_hand() -> None:
    truth = np.array([0, 0, 0, 1, 1, 3])
    predicted = np.array([0, 0, 1, 1, 0, 3])
    counts = confusion(predicted, truth, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    values = intersection_over_union(counts, ["a", "b", "c", "d"])
    assert values["a"] == 2 / 4 and values["b"] == 1 / 3 and values["d"] == 1.0 and "c" not in values
    assert values["mean"] == pytest.approx((0.5 + 1 / 3 + 1) / 3) and values["accuracy"] == 4 / 6


def test_tokens_go_to_another_grid() -> None:
    tokens = torch.arange(16.0).view(1, 4, 4, 1)
    assert to_grid(tokens, 4) is tokens
    assert torch.equal(to_grid(tokens[None], 2)[0], to_grid(tokens, 2))
    small = to_grid(tokens, 2)
    assert small.shape == (1, 2, 2, 1) and abs(float(small.mean()) - 7.5) < 1e-5
    assert small[0, 0, 0, 0] < small[0, 0, 1, 0] < small[0, 1, 0, 0] < small[0, 1, 1, 0]
