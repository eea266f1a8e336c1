"""What all tests share: one thread each, so that results do not depend on the machine, nothing that reaches the network, and
one run of the whole pipeline."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import svam  # noqa: F401  (before torch: sets how OpenMP's threads wait)

# Before torch or any library with an own thread pool is imported.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy project after an uninterrupted `dvc repro`, with dvc.lock and the report committed. Tests leave its results as
    they are."""
    from tests.project import make_project, ran, run

    project = make_project(tmp_path_factory.mktemp("toy") / "project")
    expected = run(project, "dvc", "stage", "list", "--name-only").split()
    assert sorted(ran(run(project, "dvc", "repro"))) == sorted(expected)
    assert len(expected) == 18  # two tasks and two branches; every other stage once
    run(project, "git", "add", ".")
    run(project, "git", "commit", "--quiet", "--message", "run")
    return project
