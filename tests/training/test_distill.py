"""Distillation: statistics and probe by hand, no leak from held-out windows, baselines in their places, and the stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages import cache_teacher
from stages import distill as distill_stage
from svam.contract import ContractError
from svam.episodes.store import EpisodeStore
from svam.files import sha256_tree
from svam.models.decoupler import Decoupler
from svam.models.foresight import part_folders
from svam.models.generator import VideoGenerator
from svam.models.video import SamplerConfig
from svam.npy import write_arrays
from svam.params import Distill
from svam.training.blocks import write_attributes
from svam.training.distill import DistillationData, TrainingStatistics, build, distill, evaluate, predictors, score
from svam.training.distill_data import GeneratedWindows, TeacherWindows
from svam.training.generate import choose_windows, generate_windows
from svam.training.one_step import OneStepFeatures, load_for_windows
from tests.tiny import GENERATE
from tests.tiny_foresight import FRAMES, GRID, encoded, save_parts, write_windows
from tests.toy import invoke, optimiser, write_toy_params

CPU = torch.device("cpu")
TRAIN, TEST, C_F, C_I = 40, 8, 5, 4
HELD_OUT = [False] * TRAIN + [True] * TEST
SECTION = Distill(
    branches=["geometric"], target="generated", anchor="concat", input_norm="statistics", positions=True, width=16, blocks=1,
    heads=2, dropout=0.0,
    training=optimiser(steps=100, batch=8, learning_rate=0.01, warmup=5, ema=0.9),
)  # fmt: skip


def arrays() -> dict[str, Any]:
    """Targets = reference + a product of two channels of F: nothing for a linear probe, easy for a decoupler."""
    rng = np.random.default_rng(0)
    windows, clip = TRAIN + TEST, (FRAMES, GRID, GRID)
    features = rng.normal(2.0, 3.0, (windows, *clip, C_F))
    reference = rng.normal(-1.0, 2.0, (windows, GRID, GRID, C_I))
    change = (features[..., :1] - 2.0) * (features[..., 1:2] - 2.0) / 5.0
    targets = reference[:, None] + change * np.asarray([1.0, -1.0, 0.5, 2.0])
    moved = np.abs(change[..., 0]) > 0.5
    return {
        "features": features.astype(np.float16), "reference": reference.astype(np.float16),
        "targets": targets.astype(np.float16), "moved": moved, "one_step": targets[TRAIN:].astype(np.float16),
        "other_noise": np.broadcast_to(reference[TRAIN:, None], targets[TRAIN:].shape).astype(np.float16),
    }  # fmt: skip


def open_data(folder: Path, values: dict[str, Any]) -> DistillationData:
    """Write both stores and open them."""
    folder.mkdir(exist_ok=True)
    rows = np.arange((TRAIN + TEST) * FRAMES, dtype=np.int64).reshape(-1, FRAMES)
    write_windows(folder / "generated", rows, HELD_OUT, features=values["features"])
    write_arrays(folder / "teacher", values | {"rows": rows, "held_out": np.asarray(HELD_OUT)})
    write_attributes(folder / "teacher", video_sha256="abc", target="generated", reference="frame", metrics={})
    windows = GeneratedWindows(folder / "generated")
    assert windows.features is not None
    return DistillationData(windows, TeacherWindows(folder / "teacher", windows), windows.features)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DistillationData:
    return open_data(tmp_path_factory.mktemp("distill"), arrays())


def test_statistics_by_hand(data: DistillationData) -> None:
    statistics, values = TrainingStatistics(data, block=7), arrays()
    for name, array in (("feature", "features"), ("teacher", "targets")):
        flat = values[array][:TRAIN].astype(np.float64).reshape(-1, values[array].shape[-1])
        np.testing.assert_allclose(getattr(statistics, f"{name}_mean"), flat.mean(axis=0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(getattr(statistics, f"{name}_std"), flat.std(axis=0), rtol=1e-4)
    expected = values["targets"][:TRAIN, 1:].astype(np.float64).mean(axis=(0, 1))
    np.testing.assert_allclose(statistics.centre, expected, rtol=1e-4, atol=1e-4)


def test_the_probe_is_ridge_regression_per_token(tmp_path: Path) -> None:
    values = arrays()
    mixing = np.random.default_rng(1).normal(size=(C_F, C_I))
    values["targets"] = (values["features"].astype(np.float64) @ mixing + 3.0).astype(np.float16)
    data = open_data(tmp_path, values)
    statistics = TrainingStatistics(data)
    np.testing.assert_allclose(statistics.weight, mixing, atol=0.01)
    np.testing.assert_allclose(statistics.bias, 3.0, atol=0.03)
    guesses = predictors(data, statistics, build(data, statistics, SECTION), CPU, bf16=False)
    scores = score(data, statistics, guesses, data.windows.test)
    assert scores["linear_probe"]["explained"] > 0.999 and scores["linear_probe"]["cosine_moved"] > 0.999


def test_held_out_windows_leak_into_nothing_that_is_trained(tmp_path: Path, data: DistillationData) -> None:
    values = arrays()
    for name in ("features", "targets", "reference"):
        values[name][TRAIN:] = 7.0 * values[name][TRAIN:] + 1.0
    other = open_data(tmp_path, values)
    first, second = TrainingStatistics(data), TrainingStatistics(other)
    assert all(np.array_equal(getattr(first, key), getattr(second, key)) for key in vars(first))
    short = SECTION.model_copy(update={"training": optimiser(steps=4, batch=8, learning_rate=0.01, warmup=1)})
    states = [distill(d, short, 0, CPU)[0].state_dict() for d in (data, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_each_baseline_is_what_its_name_says(data: DistillationData) -> None:
    statistics = TrainingStatistics(data)
    untrained = build(data, statistics, SECTION).eval()
    metrics = evaluate(data, statistics, untrained, CPU, bf16=False)
    assert metrics["held_out_windows"] == TEST
    assert metrics["moved_share"] == pytest.approx(arrays()["moved"][TRAIN:, 1:].mean())
    assert metrics["repeat_reference"]["explained"] == 0.0
    for name in ("decoupler", "other_noise"):  # untrained, and given the reference: both repeat it
        assert metrics[name] == pytest.approx(metrics["repeat_reference"], abs=1e-3)
    assert metrics["decoded_one_step"]["explained"] == 1.0  # given the targets
    assert metrics["decoded_one_step"]["cosine_moved"] == pytest.approx(1.0)
    values = {k: v.astype(np.float64) for k, v in arrays().items()}
    errors = (values["reference"][TRAIN:, None] - values["targets"][TRAIN:])[:, 1:] / statistics.teacher_std
    assert metrics["repeat_reference"]["mse"] == pytest.approx(np.square(errors).mean(), rel=1e-3)
    moved = values["moved"][TRAIN:, 1:].astype(bool)
    assert metrics["repeat_reference"]["mse_moved"] == pytest.approx(np.square(errors).mean(-1)[moved].mean(), rel=1e-3)


def test_it_beats_its_baselines_where_there_is_something_to_learn(data: DistillationData, tmp_path: Path) -> None:
    decoupler, metrics = distill(data, SECTION, 0, CPU, live=tmp_path / "live")
    probe = metrics["linear_probe"]
    assert metrics["decoupler"]["explained"] > max(0.8, probe["explained"])
    assert metrics["decoupler"]["cosine_moved"] > max(probe["cosine_moved"], metrics["repeat_reference"]["cosine_moved"])
    curves = json.loads((tmp_path / "live" / "metrics.json").read_text())
    assert curves["held_out"]["explained"] == pytest.approx(metrics["decoupler"]["explained"], abs=1e-4)  # the averaged weights
    again, _ = distill(data, SECTION, 0, CPU)
    assert all(torch.equal(a, b) for a, b in zip(decoupler.state_dict().values(), again.state_dict().values(), strict=True))


def test_features_and_targets_must_agree(data: DistillationData) -> None:
    wrong = arrays()["features"][:, :, :1]
    with pytest.raises(ContractError, match=r"both must begin with \(3, 2, 2\)"):
        DistillationData(data.windows, data.teacher, wrong)


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
def test_features_that_were_not_kept_are_computed_again(noise: str, parts: Path, store: EpisodeStore, tmp_path: Path) -> None:
    """The same windows with and without `features`: F read back and computed again agree; the stages run on the latter."""
    save_parts(tmp_path, store, noise)
    section = GENERATE.model_copy(update={"windows": 6, "held_out_windows": 4, "up_blocks": 2})
    sampler = SamplerConfig.model_validate(section.model_dump(include=set(SamplerConfig.model_fields)))
    folders = part_folders(tmp_path / "backbones", tmp_path / "video")
    model = VideoGenerator.load(sampler, folders)
    chosen = choose_windows(store, section, model.video_model.config, 0)
    for name, keep in (("with", True), ("without", False)):
        changed = section.model_copy(update={"keep_features": keep})
        (tmp_path / name).mkdir()
        latents = encoded(store, model.frame_autoencoder)
        generate_windows(tmp_path / name, latents, model, chosen, changed, 0, sha256_tree(tmp_path / "video"))
    stored, absent = GeneratedWindows(tmp_path / "with"), GeneratedWindows(tmp_path / "without")
    assert stored.features is not None and absent.features is None
    again = load_for_windows(absent, folders)
    rows = np.asarray([7, 2, 0])
    source = OneStepFeatures(absent, again)
    computed = source[rows]
    assert torch.equal(source.on_device(rows), torch.from_numpy(computed))
    np.testing.assert_allclose(computed.astype(float), stored.features[rows].astype(float), rtol=2e-3, atol=2e-3)
    assert not np.allclose(computed[0], computed[1], atol=1e-2)
    if noise == "fresh":  # which is nothing to the stages
        return

    write_toy_params(tmp_path / "params.yaml", {"cache_teacher": {"reference": "reconstruction"}})
    common = ["--backbones", tmp_path / "backbones", "--params", tmp_path / "params.yaml", "--generated", tmp_path / "without"]
    cache, out = tmp_path / "teachers" / "geometric", tmp_path / "decoupler"
    assert invoke(cache_teacher.app, "geometric", cache, *common, "--episodes", parts / "episodes.zarr").exit_code == 0
    arguments = [out, *common, "--teacher", cache, "--video", tmp_path / "video"]
    done = invoke(distill_stage.app, "geometric", *arguments)
    assert done.exit_code == 0, done.output
    assert {p.name for p in out.iterdir()} == {"config.json", "metrics.json", "model.safetensors"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["teacher"]) == {"reference", "dense"} and metrics["target"] == "generated"
    assert Decoupler.load(out).config.reference == "reconstruction"

    failed = invoke(distill_stage.app, "semantic", *arguments)
    assert failed.exit_code == 1 and "branch is 'geometric', expected 'semantic'" in failed.stderr
    (tmp_path / "video" / "extra.json").write_text("{}")
    stored_too = [*arguments, "--generated", tmp_path / "with"]  # where features are stored, no video model is read
    assert invoke(distill_stage.app, "geometric", *stored_too).exit_code == 0
    failed = invoke(distill_stage.app, "geometric", *arguments)
    assert failed.exit_code == 1 and "not the video model that" in failed.stderr
