"""Every stage of the toy pipeline killed by SIGKILL at any moment: `dvc repro` again ends with the same bytes as a run that
nothing interrupted. Files run two at a time, and this takes long."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

from svam.seeds import generator
from tests.project import PAUSE, found, locked_stages, mend, run, running
from tests.toy import write_toy_params

pytestmark = pytest.mark.timeout(1500)

STATELESS = ("code", "check_params", "foresight", "report")


def opened_by(root: Path, stage: str) -> set[str]:
    """The processes that have opened the stage's state, those included that were killed."""
    processes = set()
    own = {"collect": ".cache/collect/*/*.lock", "convert": ".cache/convert/*.lock"}
    for file in found(root, own.get(stage, f".ckpt/{stage}/*.lock")):
        with suppress(OSError):
            processes.add(file.read_text())
    return processes - {""}


def kill_after(root: Path, log: Path, stage: str, seconds: float) -> float | None:
    """Run one stage and kill it `seconds` after it has opened its state (after DVC has started it, where it keeps none).

    Returns:
        None, or the seconds that it was at work, where it ended before.
    """
    keeps, before = stage not in STATELESS, opened_by(root, stage)
    begun = seen = 0.0
    with running(root, log, "dvc", "repro", "--single-item", "--force", stage) as process:
        while process.poll() is None:
            if opened_by(root, stage) - before if keeps else f"Running stage '{stage}'" in log.read_text():
                seen = time.monotonic()
                begun = begun or seen
                if seen - begun >= seconds:
                    return None
            time.sleep(PAUSE)
    assert process.returncode == 0 and begun, log.read_text()[-3000:]
    return seen - begun


def kill_once(project: Path, log: Path, stage: str, finished: Path) -> None:
    """Kill a stage before it ends, at a seeded time within what it took in the uninterrupted run."""
    rng = generator(1, "kills", stage)
    seconds = json.loads((finished / f".cache/times/{stage}.json").read_text())["seconds"]
    for _ in range(12):
        lasted = kill_after(project, log, stage, float(rng.uniform(0, seconds)))
        if lasted is not None:  # it had ended: the next begins from nothing, with less time
            seconds = min(seconds, lasted)
            shutil.rmtree(project / ".cache/collect", ignore_errors=True)
            continue
        mend(project)
        return
    pytest.fail(f"{stage} is too quick")


@pytest.mark.slow
def test_kills_of_every_stage_at_any_moment(finished: Path, tmp_path: Path) -> None:
    project = tmp_path / "elsewhere"
    shutil.copytree(finished, project, symlinks=True, ignore=shutil.ignore_patterns(".cache"))  # with no episode or feature
    machine = {"machine": {"checkpoint_seconds": 0.0, "workers": 2}}
    write_toy_params(project / "params.yaml", machine, project / "params.yaml")
    stages = {stage.partition("@")[0]: stage for stage in run(project, "dvc", "stage", "list", "--name-only").split()}
    for stage in stages.values():  # of what is done for two branches the second
        kill_once(project, tmp_path / "log", stage, finished)
        run(project, "dvc", "repro", "--single-item", "--force", stage)
    run(project, "dvc", "repro")  # nothing but what a mended `dvc.lock` no longer names
    assert stages.keys() >= {"collect", "convert", "train_policy", "evaluate"}
    assert locked_stages(project) == locked_stages(finished)
    assert not (project / ".ckpt").exists() and not list((project / "data").rglob("*.partial-*"))
