"""What a plan says of parameters and disk is what real models and a real run have, to the byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from svam.params import Params, load_params
from svam.presets import plan
from svam.presets.__main__ import app
from svam.presets.data import Data, estimated, measured
from svam.presets.models import Models
from svam.presets.overlay import overlay_of, with_overlay
from svam.presets.plan import disk, observations_of, parameters, parts_of, saved, stages_of
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
    weights = [load_file(file) for file in (root / "data/svam").rglob("*.safetensors")]
    assert outs["data/svam"] == sum(array.nbytes for arrays in weights for array in arrays.values())
    rows = [file.stat().st_size for file in (root / ".cache/features").glob("*/rows.bin")]
    assert len(rows) == 3 and outs[".cache/features"] == sum(rows)
    assert sum(observations_of(params, data)) == len(np.concatenate([np.arange(0, n, 8) for n in data.lengths]))


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
