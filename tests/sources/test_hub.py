"""A data set of the hub: found in its cache without a network, or one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from svam.episodes.options import open_named_source
from svam.params import Convert
from tests.episodes.test_options import raw_params
from tests.sources.common import refused
from tests.sources.test_source_raw import ONE_TASK, arrays_of, write

COMMIT = "0123456789" * 4


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub client's own cache, empty, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_set_in_the_cache(cache: Path) -> None:
    snapshots = cache / "datasets--lab--pushes/snapshots"
    snapshots.mkdir(parents=True)
    write(snapshots / COMMIT, ONE_TASK, a=arrays_of(0, 4), b=arrays_of(1, 5))
    source = open_named_source(Path("lab/pushes"), raw_params(revision=COMMIT))
    assert [source.read(index).steps for index in range(len(source))] == [4, 5]


def test_without_a_network(cache: Path) -> None:
    with refused("the data set lab/pushes at 012345678901 cannot be fetched from the hub .*check id, commit and network"):
        open_named_source(Path("lab/pushes"), raw_params(revision=COMMIT))


@pytest.mark.parametrize("choice, message", [
    ({"path": "/data/pushes", "revision": COMMIT}, "'/data/pushes' is no id of a data set on the hub"),
])  # fmt: skip
def test_what_is_no_id(choice: dict[str, Any], message: str) -> None:
    with refused(message):
        open_named_source(Path(choice["path"]), raw_params(**choice))


def test_an_id_without_a_revision() -> None:
    with refused("^lab/pushes: no such directory; to fetch the data set of this id from the hub, set convert.revision"):
        open_named_source(Path("lab/pushes"), raw_params())


def test_a_revision_is_a_commit() -> None:
    with pytest.raises(ValueError, match="revision"):
        Convert.model_validate(raw_params().convert.model_dump() | {"revision": "main"})
