"""What the collect stage recorded, as a source: cameras, success, and files that are not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from svam.contract import Choice
from svam.episodes.options import ChosenEpisodes
from svam.files import sha256
from svam.sources.metaworld import Options, open_source
from tests.recorded import SETTINGS, write_raw
from tests.sources.common import LFS_POINTER, refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two episodes of two cameras; the second did not reach its goal."""
    write_raw(tmp_path, ["reach"], episodes=2)
    reach = tmp_path / "reach"
    arrays = load_file(reach / "episode_0001.safetensors")
    save_file(arrays | {"success": np.zeros_like(arrays["success"])}, reach / "episode_0001.safetensors")
    for file in list(reach.glob("*.corner2.png")):
        shutil.copy(file, file.with_name(file.name.replace("corner2", "wrist")))
    meta = json.loads((reach / "meta.json").read_text())
    meta |= {"cameras": ["corner2", "wrist"], "sha256": {file.name: sha256(file) for file in reach.glob("episode_*")}}
    (reach / "meta.json").write_text(json.dumps(meta))
    return reach


def opened(folder: Path, **choice: Any) -> Any:
    return open_source(folder.parent, Options(), Choice(**choice))


def test_cameras_are_chosen_in_order(folder: Path) -> None:
    """Labels are of the first camera of the recording, and left out where another one comes first."""
    assert opened(folder).describe().cameras == ["corner2", "wrist"] and opened(folder).read(0).annotations
    turned = opened(folder, cameras=["wrist", "corner2"])
    assert turned.describe().cameras == list(turned.read(0).frames) == ["wrist", "corner2"]
    assert not turned.shape(0).annotated and not turned.read(0).annotations
    assert ["depth and segmentation are of the camera 'corner2'" in note for note in turned.notes] == [True]
    (folder / "episode_0000.wrist.png").unlink()
    assert list(opened(folder, cameras=["corner2"]).read(0).frames) == ["corner2"]
    with refused("convert.cameras names 'top', but .* has corner2, wrist"):
        opened(folder, cameras=["top"])


def test_success_is_that_of_any_step(folder: Path) -> None:
    for success, number in ((True, 0), (False, 1)):
        assert ChosenEpisodes(opened(folder), SETTINGS.model_copy(update={"success": success})).numbers == [number]


def test_an_episode_that_cannot_be_read_is_left_out_by_name(folder: Path) -> None:
    (folder / "episode_0000.wrist.png").unlink()
    chosen = ChosenEpisodes(opened(folder), SETTINGS.model_copy(update={"drop": ["reach/episode_0000"]}))
    assert chosen.numbers == [1] and chosen.shape(0).name == "reach/episode_0001"


@pytest.mark.parametrize("name", ["episode_0000.safetensors", "episode_0000.wrist.png"])
def test_files_that_are_not_there(folder: Path, name: str) -> None:
    (folder / name).write_text(LFS_POINTER)
    with refused(f"{name}: a Git LFS pointer"):
        opened(folder).read(0)
    (folder / name).unlink()
    for look in (opened(folder).shape, opened(folder).read):
        with refused(f"{name}: no such file, though meta.json lists its episode; .*reach holds .*episode_0001.safetensors"):
            look(0)
