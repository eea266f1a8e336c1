"""The stage on a small store: all four in-domain backbones, the same bytes twice, errors, and no sight of held-out episodes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder

from stages.prepare_backbones import app
from svam import params
from svam.episodes.convert import convert
from svam.episodes.joined import open_store
from svam.episodes.store import EpisodeStore
from svam.files import read_json, sha256_tree
from svam.models.autoencoder import Autoencoder
from svam.models.published import save_published
from svam.models.teachers import Teacher
from svam.models.text import TextEncoder
from svam.resume import Resume
from svam.training.prepare_backbones import autoencoder, teacher, text
from tests.recorded import SETTINGS, Recorded, make_episode
from tests.toy import ADAM, committed, invoke, merged, write_toy_params

TRAINING = {**ADAM, "steps": 3, "batch": 4, "learning_rate": 0.003}
CHANGES: dict[str, dict[str, Any]] = {
    "autoencoder": {"channels": [8, 8, 16], "layers": [0, 1, 1], "latent_channels": 4, "training": TRAINING},
    "text": {"width": 16, "heads": 2, "layers": 1, "training": TRAINING},
    "geometric": {"image_size": 16, "patch": 4, "width": 12, "heads": 2, "layers": 2, "training": TRAINING},
    "semantic": {"image_size": 16, "patch": 4, "width": 12, "heads": 2, "layers": 2, "training": TRAINING},
}


def episodes(annotations: bool = True) -> list[Any]:
    made = [make_episode(task, 9 + k, k, size=16) for k, task in enumerate(["push"] * 4 + ["pull"] * 4)]
    if not annotations:
        for episode in made:
            episode.annotations.clear()  # type: ignore[attr-defined]
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "episodes.zarr"
    convert(Recorded(episodes()), path, SETTINGS, 0)
    return path


def write_params(path: Path, **changes: dict[str, Any]) -> Path:
    """The project's params with tiny backbones."""
    write_toy_params(path, {"prepare_backbones": merged(CHANGES, changes)})
    return path


def run(*arguments: object) -> tuple[int, str]:
    result = invoke(app, *arguments)
    return result.exit_code, re.sub(r"\s+", " ", result.output)


class Stopping(Resume):
    """A run's state; the run fails once that was saved twice."""

    saved = 0

    def save_record(self, name: str, value: Any, write: Callable[[Path], None] | None = None) -> None:
        super().save_record(name, value, write)
        self.saved += 1
        if self.saved == 2:
            raise InterruptedError


def test_a_self_supervised_teacher_goes_on_to_the_same_bits(store: Path, tmp_path: Path) -> None:
    """The patches that are hidden follow the seed and the batch's number, not what was drawn before."""
    changes = {**CHANGES["semantic"], "objective": "self_supervised", "training": {**TRAINING, "steps": 5}}
    section = params.TeacherModel.model_validate(committed("prepare_backbones.semantic", **changes))
    levels = committed("prepare_backbones.autoencoder", **CHANGES["autoencoder"])
    (tmp_path / "codec").mkdir()
    Autoencoder(autoencoder.build(params.Autoencoder.model_validate(levels), (16, 16))).save(tmp_path / "codec")

    def trained(resume: Resume) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        data, cpu = open_store(store), torch.device("cpu")
        return teacher.train(section, data, 0, cpu, None, resume, "semantic", tmp_path / "codec")[0].state_dict()

    straight = trained(Resume(None))
    with pytest.raises(InterruptedError):
        trained(Stopping(tmp_path, 0))
    resumed = trained(Resume(tmp_path, 0))
    assert all(torch.equal(resumed[name], weights) for name, weights in straight.items())


def test_all_four_in_domain_and_the_same_bytes_twice(store: Path, tmp_path: Path) -> None:
    settings = write_params(tmp_path / "params.yaml")
    for attempt in ("first", "second"):
        for part in CHANGES:
            out = tmp_path / attempt / part
            extra = ["--autoencoder", tmp_path / attempt / "autoencoder"] if part in ("geometric", "semantic") else []
            code, output = run(part, out, "--episodes", store, "--params", settings, "--live", tmp_path / "live" / part, *extra)
            assert code == 0, output
            assert {"config.json", "svam.json", "metrics.json"} <= {file.name for file in out.iterdir()}
    for part in CHANGES:
        assert sha256_tree(tmp_path / "first" / part) == sha256_tree(tmp_path / "second" / part), part

    folder = tmp_path / "first"
    frames = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    assert Autoencoder.load(folder / "autoencoder").encode(frames).shape == (2, 4, 4, 4)
    assert TextEncoder.load(folder / "text").embed(["push a"]).shape == (1, 20, 16)
    geometric, semantic = Teacher.load(folder / "geometric"), Teacher.load(folder / "semantic")
    unit = frames.permute(0, 3, 1, 2).float() / 255
    assert geometric.features(unit).shape == (2, 4, 4, 12) and geometric.predict(unit).shape == (2, 16, 16)
    assert semantic.predict(unit).shape == (2, 7, 16, 16)
    for name, key in (("geometric", "rmse_std"), ("semantic", "mean")):
        metrics = read_json(folder / name / "metrics.json")
        assert set(metrics) == {"real", "reconstructed", "blurred"} and all(key in view for view in metrics.values())


def test_geometric_without_depth_stops_with_one_sentence(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    bare = tmp_path / "bare.zarr"
    convert(Recorded(episodes(annotations=False)), bare, SETTINGS, 0)
    settings = write_params(tmp_path / "params.yaml")
    assert run("autoencoder", tmp_path / "a", "--episodes", store, "--params", settings)[0] == 0
    arguments = [tmp_path / "g", "--episodes", bare, "--autoencoder", tmp_path / "a", "--params"]
    code, output = run("geometric", *arguments, settings)
    assert code == 1 and not (tmp_path / "g").exists() and "Traceback" not in output
    for word in ("prepare_backbones.geometric.source", "no depth annotations", "'pretrained'", "'self_supervised'"):
        assert word in output
    own = write_params(tmp_path / "own.yaml", geometric={"family": "dinov2", "objective": "self_supervised"})
    taken, latents = list[int](), Autoencoder._latents
    monkeypatch.setattr(Autoencoder, "_latents", lambda self, frames: taken.append(len(frames)) or latents(self, frames))
    code, output = run("geometric", *arguments, own)
    assert code == 0, output
    assert max(taken) == params.load_params(own).encode.batch == 16  # frames that the autoencoder takes at a time
    assert set(read_json(tmp_path / "g" / "metrics.json")["real"]) == {"rmse"}


def test_an_imported_autoencoder_needs_no_episodes(tmp_path: Path) -> None:
    model = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, latent_channels=4
    )
    (tmp_path / "svd" / "vae").mkdir(parents=True)
    save_published(model, tmp_path / "svd" / "vae")
    settings = write_params(tmp_path / "params.yaml", autoencoder={"source": "pretrained", "path": str(tmp_path / "svd")})
    arguments = ["autoencoder", tmp_path / "out", "--episodes", tmp_path / "nothing.zarr", "--params", settings]
    code, output = run(*arguments)
    assert code == 0, output
    assert Autoencoder.load(tmp_path / "out").family == "svd"
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    shutil.rmtree(tmp_path / "svd" / "vae")
    code, output = run(*arguments)
    assert code == 1 and "holds no folder 'vae' and no config.json" in output and (tmp_path / "out").exists()


class Watched(EpisodeStore):
    """A store that counts which rows a training reads."""

    seen: list[np.ndarray[Any, Any]]

    def frames(self, rows: Any, camera: str | None = None) -> Any:
        self.seen.append(np.asarray(rows))
        return super().frames(rows, camera)


@pytest.mark.parametrize("part", list(CHANGES))
def test_no_training_sees_a_held_out_frame(store: Path, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(store)
    watched.seen = []
    settings = params.load_params(write_params(tmp_path / "params.yaml")).prepare_backbones
    for module in (autoencoder, text, teacher):
        if hasattr(module, "measure"):
            monkeypatch.setattr(module, "measure", lambda *_: {})  # what follows training may look at held-out episodes
    device = torch.device("cpu")
    if part == "autoencoder":
        autoencoder.train(settings.autoencoder, watched, 0, device, None)
    elif part == "text":
        text.train(settings.text, watched, 0, device, None)
    else:
        Autoencoder(autoencoder.build(settings.autoencoder, (16, 16))).save(tmp_path)
        teacher.train(getattr(settings, part), watched, 0, device, None, Resume(None), part, tmp_path)
    rows = np.unique(np.concatenate(watched.seen))
    held_out = watched.rows("held_out")
    assert len(rows) and not np.isin(rows, held_out).any()
