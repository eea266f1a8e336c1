"""The whole pipeline with two foresight cameras, at the toy configuration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.project import make_project, ran, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_two_cameras_through_every_stage(tmp_path: Path) -> None:
    changes = {"collect": {"cameras": ["corner2", "topview"]}, "convert": {"foreseen": 2}}
    project = make_project(tmp_path / "project", changes)
    assert "report" in ran(run(project, "dvc", "repro"))
    assert {file.name for file in (project / "data/latents").glob("*.npy")} == {"corner2.npy", "topview.npy"}
    rows, latents = np.load(project / "data/generated/rows.npy"), np.load(project / "data/latents/topview.npy")
    assert rows.max() >= len(latents) > rows.min()
    config = json.loads((project / "data/svam/policy/config.json").read_text())["svam"]
    assert [config["camera"], *config["more_cameras"]] == ["corner2", "topview"]
    assert all(shape[1:3] == [8, 4] for shape in config["shapes"].values())
    results = json.loads((project / "data/results/metrics.json").read_text())
    assert results["metaworld"]["setting"]["cameras"] == ["corner2", "topview"] and "offline" in results
    assert {"gap", "attention"} <= set(json.loads((project / "data/foresight/metrics.json").read_text()))
    assert list((project / "data/films").glob("*.mp4"))
