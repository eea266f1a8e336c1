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

from stages.prepare_backbones import app
from svam.files import sha256_tree
from tests.killing import kill, run_stage
from tests.toy import invoke, write_toy_params

Command = tuple[object, ...]


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


def refused(*arguments: object) -> str:
    """The one sentence with which the stage fails."""
    result = invoke(app, *arguments)
    assert result.exit_code == 1 and "Traceback" not in result.output, result.output
    (sentence,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert result.output.rstrip().endswith(sentence) and "No space left on device" in sentence
    return sentence


@pytest.fixture(scope="module")
def straight(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder that was trained with room enough, and beside it its params: six steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("straight")
    write_toy_params(folder / "params.yaml", {"machine": {"checkpoint_seconds": 0.0}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        run_stage(app, "text", folder / "text", "--episodes", parts / "episodes.zarr", "--params", folder / "params.yaml")
    return folder / "text"


@pytest.fixture
def text(straight: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command that trains it, but for the folder to write. Its state is kept below `tmp_path`."""
    monkeypatch.setattr("stages._command._check_code", lambda source: None)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return "text", "--episodes", parts / "episodes.zarr", "--params", straight.with_name("params.yaml")


def steps_kept(root: Path) -> int:
    (record,) = (root / ".ckpt/prepare_backbones_text").glob("*/training.json")
    return int(json.loads(record.read_text())["value"]["step"])


def test_a_checkpoint_that_finds_no_room(
    text: Command, straight: Path, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(disk))
    kill(2, run_stage, app, *text, tmp_path / "out")
    state = sum(file.stat().st_size for file in disk.rglob("*") if file.is_file())
    ballast = fill(disk, state // 2)
    sentence = refused(*text, tmp_path / "out")
    assert str(disk / ".ckpt/prepare_backbones_text") in sentence and "make room" in sentence
    assert steps_kept(disk) == 2 and not (tmp_path / "out").exists()
    ballast.unlink()
    run_stage(app, *text, tmp_path / "out")
    assert sha256_tree(tmp_path / "out") == sha256_tree(straight) and not (disk / ".ckpt").exists()


def test_a_trained_part_that_finds_no_room(text: Command, straight: Path, disk: Path, tmp_path: Path) -> None:
    """No room at all, or for half of what is written."""
    (disk / "out").mkdir()
    (disk / "out/file").write_text("of another run")
    for share in (0.0, 0.5):
        ballast = fill(disk, int(share * sum(file.stat().st_size for file in straight.iterdir())))
        assert str(disk / "out") in refused(*text, disk / "out")
        assert {file.name for file in disk.iterdir()} == {"ballast", "out"}
        assert (disk / "out/file").read_text() == "of another run" and steps_kept(tmp_path) == 6
        ballast.unlink()
    run_stage(app, *text, disk / "out")
    assert sha256_tree(disk / "out") == sha256_tree(straight) and not (tmp_path / ".ckpt").exists()


def test_curves_that_find_no_room(text: Command, disk: Path, tmp_path: Path) -> None:
    fill(disk, 8192)
    assert str(disk / "live") in refused(*text, tmp_path / "out", "--live", disk / "live")
    assert not (tmp_path / "out").exists()
