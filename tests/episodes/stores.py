"""A small store that the tests of this folder share, and ways to change what lies in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from svam.contract import Episode
from svam.episodes.arrays import ARRAYS, ATTRIBUTES_DIGEST, attributes_digest, write_array
from svam.episodes.rows import RowReader
from svam.files import sha256
from tests.recorded import Recorded, two_tasks

Array = np.ndarray[Any, Any]


def timed(episode: Episode, gap: int | None = None, rate: float = 20.0) -> dict[str, Any]:
    """The fields of an episode with timestamps, from `gap` on 0.4 s later."""
    stamps = 3.0 + np.arange(episode.steps) / rate
    if gap is not None:
        stamps[gap:] += 0.4
    return vars(episode) | {"timestamps": stamps}


def with_timestamps() -> Recorded:
    source = two_tasks()
    return Recorded([Episode(**timed(episode)) for episode in source.episodes])


SOURCE = with_timestamps()


def shards(path: Path, array: str) -> list[Path]:
    """The files of an array, in the order of their rows."""
    files = (file for file in (path / array / "c").rglob("*") if file.is_file())
    return sorted(files, key=lambda file: [int(part) for part in file.relative_to(path / array / "c").parts])


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the store's attributes, with a right checksum."""
    metadata = json.loads((path / "zarr.json").read_text())
    change(metadata["attributes"])
    metadata["attributes"][ATTRIBUTES_DIGEST] = attributes_digest(metadata["attributes"])
    (path / "zarr.json").write_text(json.dumps(metadata))


def replace(path: Path, name: str, change: Callable[[Array], Array]) -> None:
    """Write an array anew, as nobody should: with valid bytes and other values."""
    reader = RowReader(path / name)
    values = change(reader.read_range(0, len(reader)))
    shutil.rmtree(path / name)
    write_array(path / name, values, reader.chunk_rows, reader.shard_rows)
    edit(path, lambda attributes: attributes[ARRAYS].update({name: sha256(path / name / "zarr.json")}))
