"""What all tests share: one thread each, so that results do not depend on the machine, nothing that reaches the network, and
one run of the whole pipeline."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import svam  # noqa: F401  (before torch: sets how OpenMP's threads wait)

# Before torch or any library with an own thread pool is imported.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


# Begun first, in this order, since they take longest; when `test_dag.py` is due, `finished` is there.
FIRST = (
    "test_dag_killed", "test_dag_external", "test_dag_killed_anytime", "test_rerun", "test_resume", "test_evaluate",
    "test_source_lerobot", "test_collect", "test_dag",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A toy project after an uninterrupted `dvc repro`, with dvc.lock and the report committed; one for all processes that run
    tests. They leave its results as they are."""
    from tests.project import make_project, ran, run

    here = tmp_path_factory.getbasetemp()
    project = (here if worker_id == "master" else here.parent) / "toy/project"
    with (project.parent.parent / "toy.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (project.parent / "whole").exists():
            return project
        make_project(project)
        expected = run(project, "dvc", "stage", "list", "--name-only").split()
        assert sorted(ran(run(project, "dvc", "repro"))) == sorted(expected)
        assert len(expected) == 19  # two branches; every other stage once
        run(project, "git", "add", ".")
        run(project, "git", "commit", "--quiet", "--message", "run")
        (project.parent / "whole").touch()
    return project


@pytest.fixture(autouse=True)
def usual_priority() -> Iterator[None]:
    """The AV1 encoder, run by root, makes its process a real-time one, which would starve all others."""
    yield
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
