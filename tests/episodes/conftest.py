"""Stores that several files test: made once, and copied where a test changes one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from svam.episodes.convert import convert
from tests.episodes.stores import SOURCE
from tests.recorded import SETTINGS


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of `SOURCE`, to be left as it is."""
    path = tmp_path_factory.mktemp("store") / "episodes.zarr"
    convert(SOURCE, path, SETTINGS, seed=0)
    return path


@pytest.fixture
def path(kept: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(kept, tmp_path / "episodes.zarr")
    return tmp_path / "episodes.zarr"
