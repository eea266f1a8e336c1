"""The whole pipeline on a real robot's recordings, with no simulator: a LeRobot set of others, at a small configuration."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import ROOT
from tests.project import make_project, ran, run

REAL = ROOT.parent / "shared/realdata/lerobot_v2.1/cr5_grasp_cube"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not here: the real recordings are not part of the project"),
]


def test_recordings_of_a_real_robot_become_a_policy(tmp_path: Path) -> None:
    """From parquet and AV1 to offline metrics, by the params that the README shows and one branch."""
    changes = {
        "collect": {"tasks": [], "episodes_of": {}},
        "convert": {
            "source": "lerobot", "path": str(REAL), "depends_on": str(REAL / "meta"), "image_size": 32, "crop": "centre",
            "normalisation": "quantile",
        },
        "prepare_backbones": {
            "geometric": {"objective": "self_supervised", "family": "dinov2"}, "semantic": {"objective": "self_supervised"},
        },
        "finetune_video": {"stride_seconds": 0.1}, "distill": {"branches": ["geometric"]},
        "train_policy": {"context": ["geometric", "one_step"]},
        "evaluate": {"protocols": ["offline"]},
    }  # fmt: skip
    project = make_project(tmp_path / "project", changes)
    stages = ran(run(project, sys.executable, "-m", "dvc", "repro"))  # as users start it
    assert "report" in stages and len(stages) == 17 and not any((project / "data/raw/metaworld").iterdir())
    results = json.loads((project / "data/results/metrics.json").read_text())
    assert "offline" in results and "metaworld" not in results
    flat = json.loads((project / "data/report/metrics.json").read_text())
    assert np.isfinite(flat["action_error"]) and "success" not in flat
    # No depth, no segmentation: what they would tell is left out, each with a sentence.
    assert len(json.loads((project / "data/foresight/metrics.json").read_text())["left_out"]) == 2
    assert ran(run(project, "dvc", "repro")) == []
