"""The benchmark's parts that need a policy: they run on a tiny one, and their figures agree with one another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from svam.episodes.joined import open_store
from svam.files import read_json, sha256
from svam.training.train_policy import choose_rows
from tests import ROOT
from tests.benchmark.common import check_ratio, measured, refused
from tests.tiny import GENERATE, TASKS, make_svam, policy_params, save_all_parts
from tests.tiny_foresight import FRAMES, make_store

EVALUATE = {"metaworld": {"tasks": TASKS[:1], "max_steps": 10}, "execute": 4, "batch": 2}


@pytest.fixture(scope="module")
def root(evaluated: Path) -> Path:
    return evaluated


def options(root: Path) -> list[str]:
    return ["--episodes", str(root / "episodes.zarr"), "--model", str(root / "svam")]


def changes(**benchmark: Any) -> dict[str, Any]:
    policy = policy_params().model_dump(exclude_none=True)
    return {"train_policy": policy, "evaluate": EVALUATE, "benchmark": {"clips": 3, "repeats": 1} | benchmark}


def test_encode_is_one_step_and_what_it_is_compared_with_is_all_of_them(root: Path, tmp_path: Path) -> None:
    found = measured("encode", tmp_path, changes(), *options(root))
    assert found["policy_sha256"] == sha256(root / "svam/manifest.json") and found["device"] == "cpu"
    assert found["sampler"]["steps"] == GENERATE.steps and found["frames"] == FRAMES and found["observations"] == 3
    for name in ("generate", "generate_and_see"):
        check_ratio(found["ratios"][name], found["seconds"], name, "encode")
    times, parts = found["milliseconds"], found["milliseconds_by_part"]
    assert set(parts["encode"]) == {"autoencoder_and_text", "video_model", "teachers", "decouplers", "other"}
    assert set(parts["generate"]) == {"autoencoder_and_text", "video_model", "decoding", "teachers"}
    assert sum(parts["encode"].values()) == pytest.approx(times["encode"], abs=0.01)
    assert sum(parts["generate"].values()) == pytest.approx(times["generate_and_see"], abs=0.01)


def test_features_are_the_same_batches_with_and_without_the_cache(root: Path, tmp_path: Path) -> None:
    found = measured("features", tmp_path, changes(policy_steps=2, repeats=2), *options(root))
    available = len(choose_rows(open_store(root / "episodes.zarr"), "train", 3, None))
    assert (found["steps"], found["batch"]) == (2, 4) and len(found["seconds"]["cached"]) == 2
    check_ratio(found, found["seconds"], "recomputed", "cached")
    assert found["uses_of_an_observation"] == pytest.approx(4 * 4 / available, abs=0.005) and found["ratio_with_filling"] > 0
    assert set(found["difference"]) == {"geometric", "semantic", "one_step"}
    assert all(value < 1e-3 for value in found["difference"].values())


@pytest.mark.parametrize("bf16", [True, False])
def test_control_is_compared_with_float32(bf16: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a processor that only emulates bfloat16."""
    for module in ("svam.precision", "svam.benchmark.policy"):
        monkeypatch.setattr(f"{module}.computes_bfloat16", lambda device: True)
    store = open_store(root / "episodes.zarr")
    make_svam(store, save_all_parts(tmp_path / "parts", store), encode_bf16=bf16).save(tmp_path / "svam")
    found = measured(
        "control", tmp_path, changes(), "--episodes", str(root / "episodes.zarr"), "--model", str(tmp_path / "svam")
    )
    others = {"before", "after", *(["bfloat16"] if bf16 else [])}
    assert found["observations"] == 3 and set(found["milliseconds"]) == set(found["seconds"]) == {"float32", *others}
    check_ratio(found, found["seconds"], "before", "after")
    assert set(found["cosines"]) == set(found["of_range"]) == others
    for name in others:
        assert set(found["cosines"][name]) == {"geometric", "semantic", "one_step"}
        assert all(0.999 < cosine <= 1.0 + 1e-9 for cosine in found["cosines"][name].values())
        assert (0.0 < found["of_range"][name] < 0.01) if bf16 else found["of_range"][name] == 0.0
    assert found["of_range"]["after"] == found["of_range"]["before"]  # a CPU keeps its bits


@pytest.mark.usefixtures("forked_workers")
def test_evaluation_plays_the_same_episodes_side_by_side_and_one_after_another(root: Path, tmp_path: Path) -> None:
    found = measured("evaluation", tmp_path, changes(evaluation_episodes=3) | {"machine": {"workers": 1}}, *options(root))
    assert found["episodes"] == 3 and found["batch"] == {"batched": 2, "one_at_a_time": 1}
    assert found["workers"] == {"batched": 1, "one_at_a_time": 1}
    check_ratio(found, found["seconds"], "one_at_a_time", "batched")
    for name, seconds in found["seconds"].items():
        assert found["episodes_per_minute"][name] == pytest.approx(180 / seconds[0], rel=0.01)
        assert len(found["success"][name]) == 3 and 3 <= found["steps"][name] <= 30


def test_what_cannot_be_compared_is_one_sentence(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = refused("encode", tmp_path, changes(), capfd, "--model", str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in said
    store = make_store(tmp_path / "episodes.zarr")
    make_svam(store, {"text": root / "parts/backbones/text"}, context=["observation"]).save(tmp_path / "svam")
    said = refused("encode", tmp_path, changes(), capfd, *options(tmp_path))
    assert "its context ['observation'] uses no video model" in said
    said = refused("features", tmp_path, changes(), capfd, *options(tmp_path))
    assert "its context ['observation'] has no frozen entry" in said
    said = refused("evaluation", tmp_path, changes(), capfd, *options(tmp_path))
    assert said == f"evaluate.metaworld.tasks: no episode of 'reach' in {tmp_path}/episodes.zarr, which has push, pull"


def test_the_kept_figures_of_control_are_the_pages_and_within_its_bounds() -> None:
    """Of the default policy: what git keeps, what the benchmark's page says of it, and what the models' page promises."""
    kept, models = read_json(ROOT / "data/benchmark/control.json"), (ROOT / "svam/models/README.md").read_text(encoding="utf-8")
    promise = r"Features keep a cosine above (\S+) to the float32 path, actions differ by less than (\S+) % of their range"
    found = re.search(promise, " ".join(models.split()))
    assert found is not None
    cosine, share = float(found[1]), float(found[2]) / 100.0
    assert (cosine, share) == (0.999, 0.01)
    assert set(kept["cosines"]) == set(kept["of_range"]) == {"before", "after", "bfloat16"}
    for form, cosines in kept["cosines"].items():
        assert set(cosines) == {"geometric", "semantic", "one_step"} and min(cosines.values()) > cosine
        assert 0.0 < kept["of_range"][form] < share
    assert kept["cosines"]["after"] == kept["cosines"]["before"] and kept["of_range"]["after"] == kept["of_range"]["before"]
    page = (ROOT / "svam/benchmark/README.md").read_text(encoding="utf-8")
    for form in ("before", "bfloat16"):
        said = ", ".join(f"{kept['cosines'][form][entry]:.6f}"[1:] for entry in ("geometric", "semantic", "one_step"))
        range_said = f"{100 * kept['of_range'][form]:.2f}".lstrip("0")
        assert f"| {kept['milliseconds'][form]:.0f} ms | {said} | {range_said} % |" in page
    assert all(f"| {kept['milliseconds'][form]:.0f} ms |" in page for form in ("float32", "after"))
    low, high = kept["range"]
    assert f"takes {kept['ratio']:.2f} ({low:.2f} to {high:.2f}) times as long" in page
