"""Damaged RLDS data sets give the same values or one sentence, never another exception."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import tfds_writer as tfds
from tests.sources.test_source_rlds import ERRORS, episode, opened, pictures, toy

TOLD = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def everything(path: Path) -> list[tuple[Any, ...]]:
    source = opened(path)
    read = [source.read(n) for n in range(len(source))]
    return [(e.instruction, np.asarray(e.actions).tobytes(), pictures(e).tobytes()) for e in read]


def damaged(data: bytes, draw: st.DataObject) -> bytes:
    if draw.draw(st.booleans(), "truncate"):
        return data[: draw.draw(st.integers(0, len(data) - 1), "length")]
    out = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3), "flips")):
        out[draw.draw(st.integers(0, len(data) - 1), "where")] ^= draw.draw(st.integers(1, 255), "with")
    return bytes(out)


@pytest.mark.parametrize("name", ["toy-train.tfrecord-00000-of-00001", "features.json", "dataset_info.json"])
def test_fuzzed_files_give_the_same_values_or_one_sentence(tmp_path: Path, name: str) -> None:
    toy(tmp_path, episode(0, n=2), episode(1, n=2))
    good, expected = (tmp_path / name).read_bytes(), everything(tmp_path)

    @TOLD
    @given(st.data())
    def check(data: st.DataObject) -> None:
        (tmp_path / name).write_bytes(damaged(good, data))
        try:
            found = everything(tmp_path)
        except ERRORS as error:
            assert "\n" not in str(error)
        else:
            assert found == expected

    check()


def test_fuzzed_payloads_with_right_checksums_raise_nothing_else(tmp_path: Path) -> None:
    good = tfds.example(episode(0, n=2))
    toy(tmp_path, good)

    @TOLD
    @given(st.data())
    def check(data: st.DataObject) -> None:
        (tmp_path / "toy-train.tfrecord-00000-of-00001").write_bytes(tfds.framed([damaged(good, data)]))
        try:
            everything(tmp_path)
        except ERRORS as error:
            assert "\n" not in str(error)

    check()
