"""What a plan says of parameters and disk is what real models and a real run have: weights and arrays to the byte, without the
headers of safetensors and what lies beside them as text."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from stages import finetune_video
from svam.files import read_yaml
from svam.params import Params, load_params
from svam.presets import plan
from svam.presets.__main__ import app
from svam.presets.data import Data, estimated, measured
from svam.presets.models import Models
from svam.presets.overlay import overlay_of, preset_names, with_overlay
from svam.presets.plan import (
    CARDS,
    NOT_COUNTED,
    Out,
    Stage,
    disk,
    observations_of,
    parameters,
    parts_of,
    saved,
    stages_of,
    without_room,
)
from tests import ROOT
from tests.toy import write_toy_params

pytestmark = pytest.mark.timeout(900)  # the first test to ask for it waits for the toy project's run


@pytest.fixture(scope="module")
def toy(finished: Path) -> tuple[Path, Params, Data, Models]:
    params = load_params(finished / "params.yaml")
    data = measured(finished / "data/episodes.zarr")
    return finished, params, data, Models(params, data)


def bytes_of(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file())


def test_weights_are_those_of_a_run(toy: tuple[Path, Params, Data, Models]) -> None:
    root, _, _, models = toy
    folders = {"text": "backbones/text", "autoencoder": "backbones/autoencoder", "video": "models/video"}
    folders |= {f"teacher_{b}": f"backbones/{b}" for b in models.teachers}
    folders |= {f"decoupler_{b}": f"models/decouplers/{b}" for b in models.decouplers} | {"policy": "svam/policy"}
    for name, part in (parts_of(models) | {"policy": models.policy}).items():
        files = [load_file(file) for file in (root / "data" / folders[name]).rglob("*.safetensors")]
        assert sum(array.nbytes for arrays in files for array in arrays.values()) == saved(part), name
    assert parameters(models.video.unet) == sum(
        array.size for array in load_file(root / "data/models/video/unet/diffusion_pytorch_model.safetensors").values()
    )


def test_arrays_are_those_of_a_run(toy: tuple[Path, Params, Data, Models]) -> None:
    root, params, data, models = toy
    outs = {out.path: out.size for out in disk(params, data, models)}
    for folder in ("data/latents", "data/generated", "data/teachers/geometric", "data/teachers/semantic"):
        assert outs[folder] == bytes_of(root / folder, "*.npy"), folder
    assert outs["data/episodes.zarr"] == bytes_of(root / "data/episodes.zarr", "*")
    for folder in ("data/svam", "data/models/video"):
        weights = [load_file(file) for file in (root / folder).rglob("*.safetensors")]
        clips = bytes_of(root / folder, "*.npy")
        assert outs[folder] == sum(array.nbytes for arrays in weights for array in arrays.values()) + clips, folder
        assert bool(clips) == (folder == "data/models/video")
    assert plan.SAMPLES == finetune_video.SAMPLES
    assert 0.7 * outs["data/results"] < bytes_of(root / "data/results", "*.npy") <= 1.1 * outs["data/results"]
    assert outs[".cache/collect"] == outs["data/raw/metaworld"]
    assert bytes_of(root / ".cache/collect", "*") == pytest.approx(bytes_of(root / "data/raw/metaworld", "*"), rel=0.1)
    rows = [file.stat().st_size for file in (root / ".cache/features").glob("*/rows.bin")]
    assert len(rows) == 3 and outs[".cache/features"] == sum(rows)
    assert sum(observations_of(params, data)) == len(np.concatenate([np.arange(0, n, 8) for n in data.lengths]))


PIPELINE: dict[str, dict[str, Any]] = read_yaml(ROOT / "dvc.yaml")["stages"]
BRANCHES = ("geometric", "semantic")


def of_branches(name: str, stage: dict[str, Any], text: str) -> list[str]:
    """A name or path of dvc.yaml, once for each branch where the stage has some."""
    return [text.replace("${item.branch}", b) for b in BRANCHES] if "branch" in stage.get("matrix", {}) else [text]


def test_every_stage_that_loads_models_is_in_a_plan(toy: tuple[Path, Params, Data, Models]) -> None:
    """But for the report, which reads what was measured of them, and the benchmark, which runs nothing unless asked."""
    _, params, data, models = toy
    loading = set[str]()
    for name, stage in PIPELINE.items():
        paths = [next(iter(path)) if isinstance(path, dict) else path for path in (*stage["deps"], *stage["outs"])]
        if any(path.startswith(("data/backbones", "data/models", "data/svam")) for path in paths):
            loading |= set(of_branches(name, stage, name + "@${item.branch}" * ("matrix" in stage)))
    loading -= {"report", "benchmark@${item.branch}"}
    assert {re.split("[, ]", stage.name)[0] for stage in stages_of(params, data, models)} == loading


def test_every_out_is_in_a_plan_or_named_as_left_out(toy: tuple[Path, Params, Data, Models]) -> None:
    _, params, data, models = toy
    counted = {out.path for out in disk(params, data, models)}
    left_out = [path for paths in NOT_COUNTED.values() for path in paths]
    for name, stage in PIPELINE.items():
        for path in (next(iter(path)) if isinstance(path, dict) else path for path in stage["outs"]):
            for out in of_branches(name, stage, path):
                known = [k for k in (*counted, *left_out) if out == k or out.startswith(f"{k}/")]
                assert len(known) == 1, (out, known)


def test_what_the_disk_has_no_room_for_is_said_with_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC keeps a copy of what lies in data/; what is there already takes nothing more."""
    outs = [Out("data/generated", 3 * 10**9), Out("data/svam", 10**9), Out(".cache/features", 2 * 10**9)]
    room = type("Usage", (), {"free": 10 * 10**9})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: room)
    assert not list(without_room(outs, tmp_path))
    room.free -= 1  # type: ignore[attr-defined]
    (said,) = without_room(outs, tmp_path)
    assert f"the disk of {tmp_path} has 10.0 GB free; what is not there yet takes 6.0, and 10.0 with DVC's copies" in said
    assert "most of it data/generated (3.0): set generate.keep_features to false, or lower generate.windows" in said
    (tmp_path / "data/svam").mkdir(parents=True)
    (tmp_path / "data/svam/policy").write_bytes(b"1")
    assert not list(without_room(outs, tmp_path))
    (said,) = without_room([Out("data/backbones/text", 10**11)], tmp_path)
    assert said.endswith(": choose smaller models")


def test_an_estimate_splits_as_convert_does_and_says_so(toy: tuple[Path, Params, Data, Models]) -> None:
    _, params, data, _ = toy
    guess = estimated(params, None, None)
    assert (guess.held_out == data.held_out).all() and guess.tasks == data.tasks
    assert (guess.size, guess.actions, guess.proprioception) == (data.size, data.actions, data.proprioception)
    assert sorted(guess.sentences or []) == sorted(data.sentences or []) and guess.stored is None


def test_the_published_sizes() -> None:
    """Parameters as their authors state them, and the FLOPs of SVD's U-Net on 16 frames of 32 x 32 latents: 4.71 TFLOP, cut
    after two up blocks 2.75; training takes three times a forward pass, and layers that are computed twice one more."""
    params, _ = with_overlay(overlay_of("paper-metaworld"), ROOT / "params.yaml", "paper-metaworld")
    models = Models(params, estimated(params, None, None))
    millions = {name: round(parameters(part) / 1e6, 1) for name, part in parts_of(models).items()}
    expected = {"text": 63.4, "autoencoder": 97.7, "video": 1524.6, "teacher_geometric": 153.2, "teacher_semantic": 86.6}
    assert {name: millions[name] for name in expected} == expected
    one = models.flops
    assert (round(one["unet"] / 1e12, 2), round(one["one_step"] / 1e12, 2)) == (4.71, 2.75)
    assert one["train_unet"] == pytest.approx(3 * one["unet"], rel=0.01)
    finetuning = next(stage for stage in stages_of(params, models.data, models) if stage.name == "finetune_video")
    assert params.machine.checkpointing
    assert finetuning.flops == pytest.approx(100_000 * 24 * (one["train_unet"] + one["unet"]), rel=0.01)


def test_the_text_of_a_plan_and_what_it_cannot_know(tmp_path: Path) -> None:
    write_toy_params(tmp_path / "params.yaml", {"machine": {"cache_gb": 0.000001}})
    params = ["--params", str(tmp_path / "params.yaml")]
    done = CliRunner().invoke(app, ["plan", "quick", *params, "--card", "rtx3090", "--store", str(tmp_path / "none.zarr")])
    assert done.exit_code == 0, done.output
    assert "an estimate, there is no store of these params" in done.stdout and "71 TFLOP/s of rtx3090" in done.stdout
    assert "fine-tuning with 4 clips at a time" in done.stdout and "machine.checkpointing: true, machine.average" in done.stdout
    assert "does not fit: the policy's features take" in done.stdout and "raise it, or train_policy" in done.stdout
    for arguments, said in (
        (["paper-calvin"], "convert.source is 'calvin' and there is no store of it to measure: pass --rows and --actions"),
        (["quick", "--card", "h1000"], "--card is 'h1000'; expected one of rtx3090, rtx4090, a100, h100, h200, cpu"),
    ):
        done = CliRunner().invoke(app, ["plan", *arguments, "--params", str(ROOT / "params.yaml"), "--store", "none.zarr"])
        assert done.exit_code == 1 and said in done.stderr


@pytest.mark.parametrize("device, card", [("cpu", "0.9 TFLOP/s of cpu"), ("cuda", "989 TFLOP/s of h100")])
def test_the_card_is_by_default_that_of_the_device(
    device: str, card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a processor no cards are asked for; what stages take is left out here."""
    monkeypatch.setattr(plan, "stages_of", lambda *_: iter(()))
    monkeypatch.setattr(plan, "_fit_lines", lambda *_: ["fine-tuning with"])
    write_toy_params(tmp_path / "params.yaml", {"machine": {"device": device}})
    arguments = ["plan", "quick", "--params", str(tmp_path / "params.yaml"), "--store", str(tmp_path / "none.zarr")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and card in done.stdout, done.output
    assert ("fine-tuning with" in done.stdout) == (device == "cuda")
    assert device == "cuda" or "GPU" not in done.stdout


QUICK = ("calvin-small", "mt12-cpu", "quick")
"""Presets whose plans take seconds; of others the models are larger, or the ways to fine-tune are compared."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in preset_names()])
def test_every_preset_has_a_plan(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose hours are FLOPs over the share of the peak."""
    stages = list[Stage]()

    def counted(*arguments: Any) -> list[Stage]:
        stages.extend(stages_of(*arguments))
        return stages

    monkeypatch.setattr(plan, "stages_of", counted)
    params, _ = with_overlay(overlay_of(name), ROOT / "params.yaml", name)
    arguments = ["plan", name, "--params", str(ROOT / "params.yaml"), "--store", str(tmp_path / "none.zarr"), "--share", "0.01"]
    card = "cpu" if name in (*QUICK, "default", "metaworld-50") else "h100"  # on which they take hours, not seconds
    if params.convert.source != "metaworld":
        arguments += ["--rows", "50000", "--actions", "7"]
    if name == "calvin-small":
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 1 and "no store that says its dimensions: pass --proprioception" in done.stderr
        arguments += ["--proprioception", "15"]
    done = CliRunner().invoke(app, [*arguments, "--card", card])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    guessed = params.convert.source != "metaworld" and params.prepare_backbones.text.source == "in_domain"
    assert ("as many tokens as prepare_backbones.text.vocabulary allows" in done.stdout) == guessed
    assert any(line.startswith("  data/backbones/text") and line.endswith("~") == guessed for line in lines)
    assert "exact: arrays and weights, without headers" in done.stdout
    assert all(path in done.stdout for paths in NOT_COUNTED.values() for path in paths)
    start = next(number for number, line in enumerate(lines) if line.startswith("  stage"))
    *rows, together = (line.split() for line in lines[start + 1 : start + 2 + len(stages)])
    hours = [stage.flops / (0.01 * CARDS[card][0]) / 3600 for stage in stages]
    for stage, spent, line, row in zip(stages, hours, lines[start + 1 :], rows, strict=False):  # each printed with two digits
        assert line.startswith(f"  {stage.name} ")
        assert float(row[-2].replace(",", "")) == pytest.approx(stage.flops / 1e15, abs=0.0051)
        assert float(row[-1]) == pytest.approx(spent, abs=0.0051), stage.name
    assert together[0] == "together" and float(together[1]) == pytest.approx(sum(hours), abs=0.0051) and sum(hours) > 0.1
    assert all(stage.flops > 0 for stage in stages)
