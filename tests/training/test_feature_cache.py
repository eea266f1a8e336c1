"""The feature cache: computes once, shares between variants, survives being killed, stays within its budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from svam.errors import MachineError
from svam.files import FileError, sha256_of_json
from svam.training.feature_cache import FeatureCache, Features, ObservationSet, observation_address

SHAPE = (2, 3, 3, 4)
ROW = 2 * 2 * 3 * 3 * 4
FRAMES = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
SENTENCES = [f"do {i % 3}" for i in range(10)]


def expected(frame: NDArray[np.uint8], sentence: str, entry: str) -> NDArray[np.float16]:
    """A number that depends on all three."""
    value = frame.astype(np.float64).mean() + 10 * len(entry) + int(sentence[-1])
    return np.full(SHAPE, value, dtype=np.float16)


class Encoder:
    """Records what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, tuple[str, ...]]] = []

    def __call__(self, frames: NDArray[np.uint8], sentences: list[str], entries: list[str]) -> dict[str, NDArray[Any]]:
        self.calls.append((len(frames), tuple(entries)))
        pairs = list(zip(frames, sentences, strict=True))
        return {e: np.stack([expected(f, s, e) for f, s in pairs]) for e in entries}


def wanted(count: int = 10) -> ObservationSet:
    return ObservationSet.of(SENTENCES[:count], lambda p: FRAMES[p], block=3)


def sources(*entries: str, parts: str = "abc") -> dict[str, dict[str, Any]]:
    return {e: {"entry": e, "parts": parts} for e in entries}


def fill(cache: FeatureCache, entries: tuple[str, ...], count: int = 10, parts: str = "abc") -> tuple[Features, Encoder]:
    encoder = Encoder()
    return cache.fill(wanted(count), sources(*entries, parts=parts), encoder, batch=4), encoder


def check(features: Features, positions: list[int]) -> None:
    for entry, values in features.read(np.asarray(positions)).items():
        assert values.dtype == np.float16 and values.shape == (len(positions), *SHAPE)
        for value, p in zip(values, positions, strict=True):
            np.testing.assert_array_equal(value, expected(FRAMES[p], SENTENCES[p], entry))


def test_rows_come_back_and_are_computed_once(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 1.0)
    features, encoder = fill(cache, ("one", "second"))
    assert encoder.calls == [(4, ("one", "second"))] * 3  # ten observations, the last batch padded
    check(features, [9, 0, 3, 3])
    np.testing.assert_array_equal(features.part(4, 10).read(np.array([1]))["one"], features.read(np.array([5]))["one"])
    assert features.shapes == {"one": SHAPE, "second": SHAPE}
    again, encoder = fill(FeatureCache(tmp_path, 1.0), ("one", "second"))
    assert encoder.calls == []
    check(again, list(range(10)))


def test_variants_share_entries_and_more_data_reuses_rows(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 1.0)
    fill(cache, ("one",), count=4)
    features, encoder = fill(cache, ("one", "second"), count=6)
    assert sorted(encoder.calls) == [(4, ("one", "second")), (4, ("second",))]
    check(features, list(range(6)))


def test_another_part_sentence_or_frame_is_another_row(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 1.0)
    fill(cache, ("one",))
    _, encoder = fill(cache, ("one",), parts="other weights")
    assert len(encoder.calls) == 3
    assert len(list(tmp_path.glob("one-*"))) == 2
    a = observation_address(FRAMES[0], "do 0")
    assert len({a, observation_address(FRAMES[0], "do 1"), observation_address(FRAMES[1], "do 0")}) == 3
    assert sha256_of_json({"a": 1, "b": 2}) == sha256_of_json({"b": 2, "a": 1}) != sha256_of_json({"a": 1, "b": 3})


def test_equal_observations_are_computed_once(tmp_path: Path) -> None:
    twice = ObservationSet.of(["x 1"] * 3, lambda p: FRAMES[p * 0])
    encoder = Encoder()
    features = FeatureCache(tmp_path, 1.0).fill(twice, sources("one"), encoder, batch=1)
    assert len(encoder.calls) == 1 and features.numbers["one"].tolist() == [0, 0, 0]


KILLED = """
import os, sys
from pathlib import Path
from svam.training.feature_cache import FeatureCache, ObservationSet
import tests.training.test_feature_cache as t
class Dying(t.Encoder):
    def __call__(self, *arguments):
        if len(self.calls) == 2:
            os._exit(9)
        return super().__call__(*arguments)
FeatureCache(Path(sys.argv[1]), 1.0).fill(t.wanted(), t.sources("one"), Dying(), batch=4)
"""


@pytest.mark.usefixtures("warm_python")
def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == 9
    (folder,) = tmp_path.glob("one-*")
    listed = json.loads((folder / "index.json").read_text())["rows"]
    assert len(listed) == 4 and (folder / "rows.bin").stat().st_size == 8 * ROW  # written, flushed, and lost with the process
    features, encoder = fill(FeatureCache(tmp_path, 1.0), ("one",))
    assert len(encoder.calls) == 2
    check(features, list(range(10)))


@pytest.mark.parametrize("damage", ["shorter", "no json", "no shape"])
def test_damage_is_noticed_and_repaired(tmp_path: Path, damage: str) -> None:
    fill(FeatureCache(tmp_path, 1.0), ("one",))[0].close()
    (folder,) = tmp_path.glob("one-*")
    if damage == "shorter":
        os.truncate(folder / "rows.bin", 5 * ROW + 1)
    else:
        (folder / "index.json").write_text("{" if damage == "no json" else "{}")
    features, encoder = fill(FeatureCache(tmp_path, 1.0), ("one",))
    assert len(encoder.calls) == 3
    check(features, list(range(10)))


def test_a_file_that_shrinks_while_open_fails_loudly(tmp_path: Path) -> None:
    features, _ = fill(FeatureCache(tmp_path, 1.0), ("one",))
    (folder,) = tmp_path.glob("one-*")
    os.truncate(folder / "rows.bin", 0)
    with pytest.raises(FileError, match="truncated at row 7"):
        features.read(np.array([7]))


def test_nan_is_refused(tmp_path: Path) -> None:
    def broken(frames: Any, sentences: Any, entries: list[str]) -> dict[str, NDArray[Any]]:
        return {e: np.full((len(frames), *SHAPE), np.nan, dtype=np.float16) for e in entries}

    with pytest.raises(ValueError, match="a frozen part produced NaN"):
        FeatureCache(tmp_path, 1.0).fill(wanted(), sources("one"), broken, batch=4)
    assert not list(tmp_path.glob("*/index.json"))


def test_too_small_a_budget_is_one_sentence_before_the_work(tmp_path: Path) -> None:
    encoder = Encoder()
    with pytest.raises(MachineError, match=r"machine.cache_gb is 1e-06, but the features of 10 observations take 0.00 GB"):
        FeatureCache(tmp_path, 1000 / 1e9).fill(wanted(), sources("one"), encoder, batch=4)
    assert len(encoder.calls) == 1
    assert not list(tmp_path.iterdir())


def test_the_least_recently_used_is_deleted_and_stays_readable_for_its_users(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 35 * ROW / 1e9)  # room for three sets of ten
    for number, parts in enumerate(["a", "b", "c"]):
        features, _ = fill(cache, ("one",), parts=parts)
        features.close()
        folder = features.spaces["one"].directory
        os.utime(folder / "index.json", (time.time() + number - 100,) * 2)
    first, second, third = (tmp_path / f"one-{sha256_of_json(sources('one', parts=p)['one'])[:16]}" for p in "abc")
    fill(cache, ("one",), parts="a")[0].close()  # used again: now b is the oldest
    fill(cache, ("one",), parts="d")[0].close()
    assert (first.exists(), second.exists(), third.exists()) == (True, False, True)
    held, _ = fill(cache, ("one",), parts="c")
    os.utime(third / "index.json", (0, 0))
    fill(cache, ("one",), parts="e")[0].close()
    assert not third.exists() and first.exists()
    check(held, list(range(10)))
    held.close()


def test_two_writers_that_make_room_for_themselves_do_not_meet(tmp_path: Path) -> None:
    """Each deletes the folder of the other: they take turns, and both get all of their rows."""
    cache, failed = FeatureCache(tmp_path, 15 * ROW / 1e9), list[BaseException]()  # room for one set of ten

    def write(parts: str) -> None:
        try:
            for _ in range(15):
                features, _ = fill(cache, ("one",), parts=parts)
                check(features, list(range(10)))
                features.close()
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(parts,)) for parts in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed and not list(tmp_path.glob("*.lock"))
