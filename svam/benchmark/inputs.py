"""What a part of the benchmark reads, and the folder that it may fill."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Inputs:
    """episodes: an episode store. videos: a folder of videos, or None. scratch: an empty folder, removed afterwards. model: the
    S-VAM folder of `train_policy`. times: the accounts that stages keep of their time. No part reads all of them."""

    episodes: Path
    videos: Path | None
    scratch: Path
    model: Path
    times: Path
