"""The measurement of a served policy runs, and says what it compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from svam.benchmark import serving
from svam.files import sha256
from tests.benchmark.common import check_ratio, measured


@pytest.mark.usefixtures("warm_python")
def test_a_served_call_is_measured_against_act(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "CALLS", 1)
    found = measured("serving", tmp_path, {"benchmark": {"repeats": 2}}, "--model", str(model))
    assert found["policy_sha256"] == sha256(model / "manifest.json")
    seconds = found["seconds_per_observation"]
    assert {name: len(values) for name, values in seconds.items()} == {
        f"{how}, {n}": 2 for how in ("act", "served") for n in (1, 4)
    }
    check_ratio(found["served_call"], seconds, "served, 1", "act, 1")
