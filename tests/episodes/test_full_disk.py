"""Stages on a file system that is really full: one sentence that names the file, nothing lost, and after making room the same
command goes on to the bytes that it would have written at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from stages.prepare_backbones import app as backbones_app
from svam.files import sha256_tree
from tests import ROOT
from tests.killing import kill, run_stage
from tests.tiny_foresight import make_store
from tests.toy import write_toy_params


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no `mount` here")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, room: int) -> Path:
    """A file that leaves `room` bytes."""
    ballast = disk / "ballast"
    found = os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - room)
    return ballast


def refused(app: typer.Typer, *arguments: object) -> str:
    """The one sentence with which a stage fails."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1 and "Traceback" not in result.output, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    (sentence,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert result.output.rstrip().endswith(sentence)
    return sentence


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """The command that trains a text encoder, six steps with a checkpoint after each, but for the folder to write."""
    monkeypatch.setattr("stages._command._check_code", lambda source: None)
    write_toy_params(ROOT / "params.yaml", tmp_path / "params.yaml", {"machine": {"checkpoint_seconds": 0.0}})
    make_store(tmp_path / "episodes.zarr")
    return "text", "--episodes", tmp_path / "episodes.zarr", "--params", tmp_path / "params.yaml"


def steps_kept(root: Path) -> int:
    (record,) = (root / ".ckpt/prepare_backbones_text").glob("*/training.json")
    return int(json.loads(record.read_text())["value"]["step"])


def test_a_checkpoint_that_finds_no_room(
    text: tuple[object, ...], disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    run_stage(backbones_app, *text, tmp_path / "straight")
    monkeypatch.setenv("DVC_ROOT", str(disk))
    kill(2, run_stage, backbones_app, *text, tmp_path / "out")
    state = sum(file.stat().st_size for file in disk.rglob("*") if file.is_file())
    ballast = fill(disk, state // 2)
    sentence = refused(backbones_app, *text, tmp_path / "out")
    assert (
        str(disk / ".ckpt/prepare_backbones_text") in sentence
        and "No space left on device" in sentence
        and "make room" in sentence
    )
    assert steps_kept(disk) == 2 and not (tmp_path / "out").exists()
    ballast.unlink()
    run_stage(backbones_app, *text, tmp_path / "out")
    assert sha256_tree(tmp_path / "out") == sha256_tree(tmp_path / "straight") and not (disk / ".ckpt").exists()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_trained_part_that_finds_no_room(
    text: tuple[object, ...], disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """No room at all, or for half of what is written."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    run_stage(backbones_app, *text, tmp_path / "straight")
    (disk / "out").mkdir()
    (disk / "out/file").write_text("of another run")
    size = sum(file.stat().st_size for file in (tmp_path / "straight").iterdir())
    ballast = fill(disk, int(share * size))
    sentence = refused(backbones_app, *text, disk / "out")
    assert str(disk / "out") in sentence and "No space left on device" in sentence
    assert {file.name for file in disk.iterdir()} == {"ballast", "out"}
    assert (disk / "out/file").read_text() == "of another run" and steps_kept(tmp_path) == 6
    ballast.unlink()
    run_stage(backbones_app, *text, disk / "out")
    assert sha256_tree(disk / "out") == sha256_tree(tmp_path / "straight") and not (tmp_path / ".ckpt").exists()


def test_curves_that_find_no_room(
    text: tuple[object, ...], disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    fill(disk, 8192)
    sentence = refused(backbones_app, *text, tmp_path / "out", "--live", disk / "live")
    assert str(disk / "live") in sentence and "No space left on device" in sentence and not (tmp_path / "out").exists()
