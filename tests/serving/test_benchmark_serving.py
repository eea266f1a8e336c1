"""The measurement of a served policy runs, and says what it compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svam.benchmark import serving
from svam.files import sha256


def test_a_served_call_is_measured_against_act(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        serving.app([str(model), str(tmp_path / "out.json"), "--repeats", "2", "--calls", "1", "--threads", "1"])
    assert ended.value.code == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["model_sha256"] == sha256(model / "manifest.json") and found["threads"] == 1
    seconds = found["seconds_per_observation"]
    assert {name: len(values) for name, values in seconds.items()} == {
        f"{how}, {n}": 2 for how in ("act", "served") for n in (1, 4)
    }
    ratios = [served / act for served, act in zip(seconds["served, 1"], seconds["act, 1"], strict=True)]
    assert found["served_call"]["range"] == pytest.approx(sorted(ratios), abs=1e-3)
