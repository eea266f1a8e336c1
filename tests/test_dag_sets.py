"""The whole pipeline on two real sets and simulated demonstrations together, at a small configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from tests import ROOT
from tests.project import attempt, make_project, ran, run

REAL = ROOT.parent / "shared/realdata"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not here: the real recordings are not part of the project"),
]
ARM: dict[str, Any] = {"source": "lerobot", "path": str(REAL / "lerobot_v2.1/cr5_grasp_cube"), "drop": ["2:"]}
BRIDGE: dict[str, Any] = {"source": "rlds", "path": str(REAL / "rlds_tfds/octo_debug_bridge_dataset"), "rate_hz": 10.0}
SIMULATED: dict[str, Any] = {"source": "metaworld", "resample_hz": 10.0}


def listed(*sets: tuple[str, float, bool, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "weight": weight, "policy": policy, "convert": {"image_size": 32, "crop": "centre", **convert}}
        for name, weight, policy, convert in sets
    ]


def changes(manifest: Path) -> dict[str, Any]:
    """Params of three sets, two of which the policy learns from; real ones have no labels."""
    sets = (("metaworld", 1.0, True, SIMULATED), ("cr5", 2.0, True, ARM), ("bridge", 1.0, False, BRIDGE))
    return {
        "convert": {"sets": listed(*sets), "manifest": str(manifest)},
        "prepare_backbones": {
            "geometric": {"objective": "self_supervised", "family": "dinov2"}, "semantic": {"objective": "self_supervised"},
        },
        "finetune_video": {"stride_seconds": 0.1}, "distill": {"branches": ["geometric"]},
        "train_policy": {"context": ["geometric", "one_step"]}, "evaluate": {"protocols": ["offline"]},
    }  # fmt: skip


def test_two_real_sets_and_simulated_demonstrations(tmp_path: Path) -> None:
    """With offline metrics of the policy's two; a set taken away, and one added, re-run what they must and convert no other."""
    manifest = tmp_path / "sets.json"
    project = make_project(tmp_path / "project", changes(manifest))
    run(project, "python", "-m", "svam.episodes", "manifest", ARM["path"], BRIDGE["path"], str(manifest))
    stages = set(ran(run(project, "dvc", "repro")))
    assert {"convert", "encode", "train_policy", "report"} <= stages
    offline = json.loads((project / "data/results/metrics.json").read_text())["offline"]
    widths = {name: len(one["policy"]["mae_per_dimension"]) for name, one in offline["sets"].items()}
    assert widths == {"metaworld": 4, "cr5": 7} and all(np.isfinite(one["policy"]["mae"]) for one in offline["sets"].values())
    assert ran(run(project, "dvc", "repro")) == []
    yaml = YAML()
    file = project / "params.yaml"
    params = yaml.load(file.read_text())
    bridge = params["convert"]["sets"].pop() | {"weight": 2.0}
    for sets, kept in ((params["convert"]["sets"], 2), ([*params["convert"]["sets"], bridge], 3)):
        params["convert"]["sets"] = sets
        yaml.dump(params, file)
        done = attempt(project, "dvc", "repro", "convert")
        assert ran(done.stdout) == ["code", "check_params", "convert"]
        assert done.stderr.count("is as it was") == kept, done.stderr
        assert "data/episodes.zarr" in run(project, "dvc", "status", "encode")
