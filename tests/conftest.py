"""What all tests share: one thread each, so that results do not depend on the machine, nothing that reaches the network, and
what takes long to make, once for all processes that run tests."""

from __future__ import annotations

import fcntl
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

import svam  # noqa: F401  (before torch: sets how OpenMP's threads wait)

if TYPE_CHECKING:
    from svam.episodes.store import EpisodeStore

# Before torch or any library with an own thread pool is imported.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


# Begun first, in this order, since they take longest; when `test_dag.py` is due, `finished` is there.
FIRST = (
    "test_dag_killed", "test_dag_killed_anytime", "test_dag_sets", "test_dag_external", "test_dag_cameras", "test_running",
    "test_processes", "test_rerun", "test_policies", "test_evaluate", "test_dag", "test_publish", "test_benchmark_gpu",
    "test_convert_workers", "test_realdata", "test_metaworld", "test_plan", "test_finetune_video", "test_server", "test_memory",
    "test_train_policy", "test_svam", "test_collect", "test_params", "test_foresight_report_stage", "test_fuzz", "test_presets",
    "test_reader_faults", "test_scenes", "test_source_lerobot", "test_benchmark_serving", "test_resume",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Once, for all processes that run tests: which library draws, tried in a process of its own, for seconds, and the process
    from which others are forked, as these processes are themselves, and the workers that they start."""
    from tests.warm import VARIABLE, executable, parse_once

    parse_once()
    if config.getoption("numprocesses", None):
        from svam.errors import MachineError
        from svam.simulation.rendering import choose_backend

        with suppress(MachineError):
            choose_backend()
        config.option.tx = [f"popen//python={executable()}" for _ in config.option.tx]
    if hasattr(config, "workerinput"):
        sys.executable = sys.orig_argv[0]  # unless a test asks for it, a command is started as users start it
    if VARIABLE in os.environ:
        multiprocessing.set_executable(executable())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


def pytest_collection_finish() -> None:
    """What has been imported stays, and no collection of garbage looks through it again, which takes a third of a second."""
    gc.collect()
    gc.freeze()


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Once:
    """`once(name, make)`: the folder that `make` has made, for the first process that asks. No test changes what is in it."""
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / "once" / name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "whole").exists():
                make(folder / "made")
                (folder / "whole").touch()
        return folder / "made"

    return made


@pytest.fixture(scope="session")
def finished(once: Once) -> Path:
    """A toy project after an uninterrupted `dvc repro`, with dvc.lock and the report committed."""
    from tests.project import make_finished

    return once("toy", make_finished)


@pytest.fixture(scope="session")
def evaluated(once: Once) -> Path:
    """`episodes.zarr` of MetaWorld's goals, an untrained but whole `svam` on it, and its `parts`."""
    from tests.tiny import save_run

    return once("run", save_run)


@pytest.fixture(scope="session")
def parts(once: Once) -> Path:
    """`episodes.zarr`, and `backbones/*`, `video` and `decouplers/*` of it, untrained."""
    from tests.tiny import save_all

    return once("parts", save_all)


@pytest.fixture(scope="session")
def folders(parts: Path) -> dict[str, Path]:
    """Those of `parts` by the names that `train_policy` has for them."""
    from svam.models.foresight import part_folders

    return part_folders(parts / "backbones", parts / "video", parts / "decouplers")


@pytest.fixture(scope="session")
def store(parts: Path) -> EpisodeStore:
    """Six episodes of two tasks, 12 steps each."""
    from svam.episodes.joined import open_store

    return open_store(parts / "episodes.zarr")


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of the closed loop are forked from a process that has imported the simulator and their own modules; spawned, as
    they are for users and in `test_dag_killed.py`, each would import the modules anew."""
    from svam.evaluation import rollout
    from tests.killing import PROCESSES

    monkeypatch.setattr(rollout, "multiprocessing", SimpleNamespace(get_context=lambda _: PROCESSES))


@pytest.fixture
def warm_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreters that this process starts are forked: see `tests/warm.py`."""
    from tests.warm import executable

    monkeypatch.setattr(sys, "executable", executable())


@pytest.fixture(autouse=True)
def usual_priority() -> Iterator[None]:
    """The AV1 encoder, run by root, makes its process a real-time one, which would starve all others."""
    yield
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
