"""Where a measurement finds its data, the folder that it may fill, and the policy that it measures."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Inputs:
    """episodes: an episode store. videos: a folder of videos, or None. scratch: a folder for what is made and removed again.
    model: the S-VAM folder of `train_policy`. times: the accounts that stages keep of their time. No part reads all of them.
    """

    episodes: Path
    videos: Path | None
    scratch: Path
    model: Path
    times: Path


@contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """An empty folder that is removed afterwards."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
