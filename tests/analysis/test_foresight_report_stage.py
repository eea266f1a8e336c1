"""The stage `foresight` and the side-by-side command on tiny parts: whole outputs, the same bytes, and what is absent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from stages.foresight import app
from svam.analysis import foresight as report
from svam.analysis.side_by_side import Prediction, picture_rows, side_by_side
from svam.episodes.store import EpisodeStore
from svam.files import read_json, sha256_tree
from svam.models.foresight import BRANCHES, ForesightModel
from svam.models.generator import VideoGenerator
from svam.models.svam import SVAM
from svam.models.video import SamplerConfig
from svam.training import one_step
from svam.training.distill_data import GeneratedWindows
from svam.training.generate import choose_windows, generate_windows
from svam.training.one_step import load_for_windows
from tests.tiny import GENERATE, make_svam
from tests.tiny_foresight import FRAMES, SIZE, encoded, make_store, make_teacher, make_video_teacher
from tests.toy import committed, invoke, write_toy_params

GENERATED = GENERATE.model_copy(update={"windows": 8, "held_out_windows": 6})
ENTRIES = ["geometric", "semantic", "one_step"]
FIGURES = {"measures", "sequence_0", "sequence_1", "depth", "attention"}
PLOTS = {"gap", "depth", "attention"}

FORESIGHT = report.Foresight.model_validate(committed("foresight", batch=5))


@pytest.fixture(scope="module")
def root(parts: Path, folders: dict[str, Path], store: EpisodeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `parts`, with generated windows and four policies."""
    root = tmp_path_factory.mktemp("foresight") / "root"
    shutil.copytree(parts, root)
    sampler = SamplerConfig(**GENERATED.model_dump(include=set(SamplerConfig.model_fields)))
    model = VideoGenerator.load(sampler, folders)
    windows = choose_windows(store, GENERATED, model.video_model.config, 0)
    (root / "generated").mkdir()
    latents = encoded(store, model.frame_autoencoder)
    generate_windows(root / "generated", latents, model, windows, GENERATED, 0, sha256_tree(root / "video"))
    policies: dict[str, dict[str, Any]] = {
        "svam": {}, "vpp": {"context": ["one_step"]}, "pooled": {"context": ["one_step"], "aggregator": "mean_pool"},
        "blind": {"context": ["observation"]},
    }  # fmt: skip
    for name, changes in policies.items():
        make_svam(store, folders, **changes).save(root / name)
    return root


def foresight(root: Path, out: Path, policy: str = "svam", branches: tuple[str, ...] = ("geometric", "semantic")) -> Any:
    changes = {"distill": {"branches": list(branches)}, "train_policy": {"context": ["one_step"]}}
    write_toy_params(root / "params.yaml", changes)
    options = {name: name for name in ("generated", "backbones", "video", "decouplers")}
    options |= {"episodes": "episodes.zarr", "policy": policy, "params": "params.yaml"}
    return invoke(app, out, *(f"--{name}={root / file}" for name, file in options.items()))


def test_the_stage_writes_everything_and_the_same_bytes_again(root: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        result = foresight(root, tmp_path / name)
        assert result.exit_code == 0, result.output
    out = tmp_path / "one"
    assert sha256_tree(out) == sha256_tree(tmp_path / "two")
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert names == ({"metrics.json", "foresight.md"} | {f"{n}.png" for n in FIGURES} | {f"plots/{n}.json" for n in PLOTS})
    for name in FIGURES:
        picture = Image.open(out / f"{name}.png")
        assert "Software" not in picture.info and np.asarray(picture).std() > 5
    metrics = read_json(out / "metrics.json")
    assert metrics["left_out"] == [] and metrics["gap"]["windows"] == 6 and metrics["gap"]["episodes"] == 2
    values = metrics["gap"]["values"]
    assert values["repeat"]["error"] == values["repeat"]["change_error"] == 1.0 and values["repeat"]["motion_found"] == 0.0
    assert values["reconstruction"]["sharpness"] == values["reconstruction"]["sharpness_moved"] == 1.0
    assert set(values["seed_to_seed"]) >= {"agree_robot", "error"} and "iou_robot" not in values["seed_to_seed"]
    assert {"iou_robot", "agree_object"} <= set(metrics["gap"]["difference"])
    assert metrics["gap"]["verdict"].startswith("No verdict: 2 held-out episodes")
    assert set(metrics["depth"]["sources"]) == {"geometric", "repeat", "one_step", "generated", "truth", "mean"}
    assert [line["frame"] for line in metrics["attention"]] == list(range(1, FRAMES))
    page = (out / "foresight.md").read_text()
    assert "## Depth of the future" in page and "## Attention of the policy" in page and "Left out" not in page
    assert len(read_json(out / "plots/depth.json")) == 6


def test_one_copy_of_the_frozen_parts_lies_on_the_device_at_a_time(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are measured are gone when the policy brings its own, and both are stored as they compute."""
    measured, frozen, read = list[ForesightModel](), list[ForesightModel](), SVAM.load
    freeze = ForesightModel.frozen_on

    def load(*arguments: Any) -> ForesightModel:
        measured.append(load_for_windows(*arguments))
        return measured[-1]

    def frozen_on(self: ForesightModel, device: torch.device) -> ForesightModel:
        frozen.append(self)
        return freeze(self, device)

    def load_policy(*arguments: Any) -> SVAM:
        assert all(weight.is_meta for weight in measured[0].parameters())
        return read(*arguments)

    monkeypatch.setattr(one_step, "load_for_windows", load)
    monkeypatch.setattr(ForesightModel, "frozen_on", frozen_on)
    monkeypatch.setattr(SVAM, "load", load_policy)
    result = foresight(root, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert len(measured) == 1 and len(frozen) == 2 and frozen[0] is measured[0]


def test_the_gap_is_measured_on_the_windows_themselves(root: Path, folders: dict[str, Path], store: EpisodeStore) -> None:
    """Errors of V^ and of the decoded one-step prediction, computed again from the arrays."""
    windows = GeneratedWindows(root / "generated")
    model = load_for_windows(windows, folders, BRANCHES, ["geometric"])
    subject = report.AnalysisInputs(windows, store, model, ["geometric"], FORESIGHT, 0)
    sums = report.measure_gap(subject)
    truth = store.frames(windows.rows[windows.test].reshape(-1)).reshape(6, FRAMES, SIZE, SIZE, 3).astype(float)
    unit = np.square(truth[:, 1:] - truth[:, :1]).sum(axis=(1, 2, 3, 4))
    predicted = {"multi_step": windows.frames[windows.test], "one_step": windows.one_step_frames[:]}
    for row, clips in predicted.items():
        np.testing.assert_allclose(
            sums[row]["error"].numerator, np.square(clips - truth)[:, 1:].sum(axis=(1, 2, 3, 4)), rtol=1e-5
        )
        np.testing.assert_allclose(sums[row]["error"].denominator, unit, rtol=1e-5)


def test_what_a_teacher_of_video_says_of_a_frame_is_read_in_its_clip(
    root: Path, folders: dict[str, Path], store: EpisodeStore
) -> None:
    windows = GeneratedWindows(root / "generated")
    model = load_for_windows(windows, folders, BRANCHES, ["geometric"])
    features = report.probe_features(report.AnalysisInputs(windows, store, model, ["geometric"], FORESIGHT, 0))
    numbers, frames = windows.test[:3], np.asarray([1, 2, 1])
    by_frame = features(numbers, frames)
    model.teachers["geometric"] = make_video_teacher()
    by_clip = features(numbers, frames)
    assert {name: values.shape for name, values in by_clip.items()} == {n: v.shape for n, v in by_frame.items()}
    clips = torch.from_numpy(windows.frames[numbers])
    expected = model.clip_features("geometric", clips)[torch.arange(3), frames]
    np.testing.assert_allclose(by_clip["generated"], expected.numpy(), rtol=1e-5, atol=1e-5)
    truth = torch.from_numpy(store.frames(windows.rows[numbers].reshape(-1))).unflatten(0, (3, FRAMES))
    expected = model.recorded_features("geometric", truth)[torch.arange(3), frames]
    np.testing.assert_allclose(by_clip["truth"], expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "branches", "absent", "sentences"),
    [
        ("vpp", (), {"sequence_0", "sequence_1"}, ["no branch is distilled", "that branch is not distilled"]),
        ("pooled", ("geometric",), {"attention"}, ["Attention over foreseen frames: context ['one_step'] with mean_pool"]),
        ("blind", ("geometric",), {"attention"}, ["context ['observation'] with uni_perceiver has none"]),
    ],
)
def test_what_a_variant_does_not_have_is_absent(
    root: Path, tmp_path: Path, policy: str, branches: tuple[str, ...], absent: set[str], sentences: list[str]
) -> None:
    result = foresight(root, tmp_path / "out", policy, branches)
    assert result.exit_code == 0, result.output
    metrics = read_json(tmp_path / "out/metrics.json")
    assert len(metrics["left_out"]) == len(sentences)
    assert all(sentence in " ".join(metrics["left_out"]) for sentence in sentences)
    assert {p.stem for p in (tmp_path / "out").glob("*.png")} == FIGURES - absent
    assert ("geometric" in metrics["depth"]["sources"]) == ("geometric" in branches)
    assert {p.stem for p in (tmp_path / "out/plots").glob("*.json")} == PLOTS


def test_recordings_without_labels_or_such_a_teacher(root: Path, tmp_path: Path) -> None:
    """As of a real robot: no depth, no segmentation, self-supervised teachers."""
    make_store(tmp_path / "episodes.zarr", annotations={})
    for name in ("generated", "backbones", "video", "decouplers", "svam"):
        shutil.copytree(root / name, tmp_path / name)
    for labels, sentence in ((True, "the teacher's own view remains"), (False, "no teacher was trained on segmentation")):
        result = foresight(tmp_path, tmp_path / "out")
        assert result.exit_code == 0, result.output
        metrics = read_json(tmp_path / "out/metrics.json")
        assert sentence in metrics["left_out"][0] and "no frame with depth" in metrics["left_out"][1]
        assert ("agree_robot" in metrics["gap"]["difference"]) == labels
        assert "depth" not in metrics and "iou_robot" not in metrics["gap"]["difference"]
        assert not (tmp_path / "out/depth.png").exists() and read_json(tmp_path / "out/plots/depth.json") == []
        shutil.rmtree(tmp_path / "backbones/semantic")
        (tmp_path / "backbones/semantic").mkdir()
        make_teacher().save(tmp_path / "backbones/semantic")


def test_examples_come_from_every_task_in_turn() -> None:
    moved, episodes, tasks = np.array([5, 9, 8, 7, 1, 6]), np.array([0, 0, 1, 2, 3, 3]), np.array([4, 4, 4, 4, 7, 7])
    assert report.most_moving(moved, episodes, tasks, 2).tolist() == [1, 5]  # the best of task 4, then of task 7
    assert report.most_moving(moved, episodes, tasks, 3).tolist() == [1, 2, 5]
    assert report.most_moving(moved, episodes, tasks, 9).tolist() == [1, 2, 3, 5]


def compare(root: Path, out: Path, *more: str, second: str = "vpp") -> Any:
    command = typer.Typer()
    command.command()(side_by_side)
    arguments = [root / "svam", root / second, f"--episodes={root / 'episodes.zarr'}", f"--out={out}"]
    return invoke(command, *arguments, "--windows=2", "--threads=1", *more)


def test_two_policies_side_by_side(root: Path, tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        result = compare(root, tmp_path / name)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert np.asarray(Image.open(tmp_path / "one.png")).std() > 5
    other = compare(root, tmp_path / "other.png", "--seed=1", "--names=a,b")
    assert other.exit_code == 0 and (tmp_path / "other.png").read_bytes() != (tmp_path / "one.png").read_bytes()


def test_single_pictures_stand_where_their_time_is() -> None:
    clip = np.zeros((3, 4, 4, 3), np.uint8)
    entries = {name: np.ones((1, 1, 2, 2, 5), np.float32) for name in ("observation", "goal_frame")}
    rows = picture_rows(clip, [Prediction("x", entries, None, np.zeros((1, 4, 3), np.float32))], 0)
    assert [label for label, _ in rows] == ["recorded", "x\nobservation", "x\ngoal-frame"]
    assert [[picture is not None for picture in pictures] for _, pictures in rows[1:]] == [
        [True, False, False],
        [False, False, True],
    ]


def test_side_by_side_refuses_in_one_sentence(root: Path, tmp_path: Path) -> None:
    assert "expected two names with a comma" in compare(root, tmp_path / "x.png", "--names=S-VAM").output.replace("\n", " ")
    missing = compare(root, tmp_path / "x.png", second="nowhere")
    assert missing.exit_code == 1 and "nowhere" in missing.output.replace("\n", "") and not (tmp_path / "x.png").exists()
