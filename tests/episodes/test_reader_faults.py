"""Whatever happens to the files of a store: its values as they were written, or one sentence; never other values."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from svam.contract import ContractError
from svam.episodes.arrays import write_array
from svam.episodes.convert import convert
from svam.episodes.joined import open_store
from svam.episodes.rows import RowReader
from svam.episodes.store import EpisodeStore
from svam.episodes.validation import validate
from svam.files import FileError
from tests.episodes.stores import shards
from tests.recorded import SETTINGS, Recorded, make_episode, two_tasks

Values = dict[str, NDArray[Any]]
quickly = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def everything(path: Path, store: EpisodeStore | None = None) -> Values:
    """Every array of a store, through the readers that training uses."""
    store = open_store(path) if store is None else store
    rows = np.arange(len(store), dtype=np.int64)
    found = {f"frames/{camera}": store.frames(rows, camera) for camera in store.cameras}
    found |= {name: store.vector(name, rows) for name in ("actions", "expert_actions", "proprioception")}
    for name in ("depth", "segmentation"):
        labels = store.annotation(name)
        found |= {name: labels.values(np.arange(len(labels.rows))), f"{name}/rows": labels.rows}
    stated = np.frombuffer(store.attributes.model_dump_json().encode(), dtype=np.uint8)
    return found | {"ends": store.episode_ends, "split": store.episode_split, "task": store.episode_task, "stated": stated}


def same_or_one_sentence(read: Callable[[], Values], truth: Values) -> None:
    try:
        found = read()
    except (FileError, ContractError) as error:
        assert "\n" not in str(error) and 20 < len(str(error)) < 500
        return
    same(found, truth)


def same(found: Values, truth: Values) -> None:
    assert found.keys() == truth.keys()
    for name, values in truth.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.fixture(scope="module", params=["zstd", "blosc"])
def kept(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Values]:
    path = tmp_path_factory.mktemp("faults") / "episodes.zarr"
    convert(two_tasks(), path, SETTINGS.model_copy(update={"compression": request.param}), seed=0)
    return path, everything(path)


def damaged(data: bytes, how: str, where: float, bit: int) -> bytes | None:
    """`data` after an accident at the share `where` of its length; None: the file is gone."""
    at = min(int(where * len(data)), max(len(data) - 1, 0))
    if how == "gone":
        return None
    if how == "truncated":
        return data[:at]
    if how == "longer":
        return data + bytes(bit + 1)
    if how == "a byte is missing":
        return data[:at] + data[at + 1 :]
    if how == "zeros":
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    changed = bytearray(data)
    if changed:
        changed[at] ^= 1 << bit
    return bytes(changed)


accidents = st.tuples(
    st.sampled_from(["flipped", "flipped", "flipped", "truncated", "gone", "longer", "a byte is missing", "zeros"]),
    st.floats(0, 1, exclude_max=True), st.integers(0, 7),
)  # fmt: skip


@contextmanager
def happened(file: Path, accident: tuple[str, float, int], renamed: bool = False) -> Iterator[None]:
    """The accident to a file, in place or by a rename; undone at the end."""
    whole = file.read_bytes()
    data = damaged(whole, *accident)
    try:
        if data is None:
            file.unlink()
        elif renamed:
            file.with_name("new").write_bytes(data)
            file.with_name("new").rename(file)
        else:
            file.write_bytes(data)
        yield
    finally:
        file.write_bytes(whole)


@settings(quickly, max_examples=15)
@given(which=st.integers(-20, 10**6), accident=accidents)
def test_any_accident_to_any_file(kept: tuple[Path, Values], which: int, accident: tuple[str, float, int]) -> None:
    path, truth = kept
    files = sorted(file for file in path.rglob("*") if file.is_file())
    # Instructions, statistics and provenance lie in `zarr.json`: a changed letter is noticed all the same.
    with happened(files[which % len(files)] if which >= 0 else path / "zarr.json", accident):
        same_or_one_sentence(lambda: everything(path), truth)
        if not any(check.faults for check in validate(path)):
            same(everything(path), truth)


@quickly
@given(accident=accidents, renamed=st.booleans())
@example(accident=("flipped", 0.2, 3), renamed=True)
@example(accident=("gone", 0.0, 0), renamed=False)
def test_an_accident_while_the_store_is_open(
    kept: tuple[Path, Values], accident: tuple[str, float, int], renamed: bool
) -> None:
    """Shards stay open between reads: what happens to them meanwhile, in place or by a rename, must not go unnoticed."""
    path, truth = kept
    store = open_store(path)
    everything(path, store)
    with happened(shards(path, "frames/front")[1], accident, renamed):
        same_or_one_sentence(lambda: everything(path, store), truth)


def test_another_store_in_its_place_is_noticed(kept: tuple[Path, Values], tmp_path: Path) -> None:
    """Rows of two stores must not mix, even where both are whole, and in a copy that another process opened late."""
    place = tmp_path / "copy.zarr"
    shutil.copytree(kept[0], place)
    touched = open_store(place)
    sent = copy.deepcopy(touched)
    touched.frames(np.array([3]))
    other = Recorded([make_episode(e.task, e.steps, 100 + k) for k, e in enumerate(two_tasks().episodes)])
    convert(other, place, SETTINGS, seed=0)
    for store in (touched, sent):
        with pytest.raises(FileError, match="replaced or changed while it was in use; open it again"):
            store.frames(np.array([3]))
    np.testing.assert_array_equal(open_store(place).frames(np.array([3]))[0], other.episodes[0].frames["front"][3])


@settings(deadline=None, max_examples=30)
@given(shape=st.sampled_from([(), (2,), (40, 3)]), chunk=st.sampled_from([1, 3, 8]), count=st.integers(1, 60), data=st.data())
def test_rows_of_any_pattern(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], chunk: int, count: int, data: st.DataObject
) -> None:
    """Ranges, strides, repeats, backwards, whole chunks at odd places of the result: always what numpy's indexing gives."""
    values = np.random.default_rng(count).integers(0, 60000, (count, *shape)).astype(np.uint16)
    folder = tmp_path_factory.mktemp("rows")
    write_array(folder / "x", values, chunk, 2 * chunk)
    reader = RowReader(folder / "x")
    number = st.integers(0, count - 1)
    for _ in range(3):
        start, end, step = data.draw(number), data.draw(number), data.draw(st.sampled_from([1, 2, 5, -1]))
        parts = [np.arange(start, end + 1, step), np.array(data.draw(st.lists(number, max_size=6)), dtype=np.int64)]
        rows = np.concatenate(parts if data.draw(st.booleans()) else parts[:1]).astype(np.int64)
        np.testing.assert_array_equal(reader.read(rows), values[rows])
    shutil.rmtree(folder)
