"""Stages of the toy pipeline killed by SIGKILL while they keep something, in another folder and with other workers: `dvc repro`
again ends with the same bytes as a run that nothing interrupted."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.project import PAUSE, attempt, found, locked_stages, mend, ran, run, running
from tests.toy import write_toy_params

pytestmark = pytest.mark.timeout(1500)


def killed_at_first_record(root: Path, log: Path, stage: str) -> bool:
    """Run the stage from nothing and kill it when it has kept something; whether it was killed before it ended."""
    kept = f".ckpt/{stage}/*/*.json"
    with running(root, log, "dvc", "repro", "--single-item", "--force", stage) as process:
        while process.poll() is None and not found(root, kept):
            time.sleep(PAUSE)
    mend(root)
    assert process.returncode in (0, -signal.SIGKILL), log.read_text()[-3000:]
    return bool(found(root, kept))


def test_killed_stages_go_on(finished: Path, tmp_path: Path) -> None:
    """A training with features, and episodes; of a conversion `test_convert_workers.py`, of the others
    `test_dag_killed_anytime.py`."""
    project = tmp_path / "another folder"
    shutil.copytree(finished, project, symlinks=True)
    # `machine` is listed by no stage, so that no hash differs.
    machine = {"machine": {"checkpoint_seconds": 0.0, "workers": 2}}
    write_toy_params(project / "params.yaml", machine, project / "params.yaml")
    for stage in ("train_policy", "evaluate"):
        assert any(killed_at_first_record(project, tmp_path / "log", stage) for _ in range(5)), f"{stage} is too quick"
        again = attempt(project, "dvc", "repro", "--single-item", "--force", stage)
        said = again.stdout + again.stderr
        assert again.returncode == 0 and f"{stage}: goes on from what" in said, said[-3000:]
    assert ran(run(project, "dvc", "repro")) == []
    assert locked_stages(project) == locked_stages(finished)
    assert not (project / ".ckpt").exists()
    assert not list((project / "data").rglob("*.partial-*")), "what the killed runs left half is gone"


@pytest.mark.slow
def test_what_a_killed_dvc_leaves(finished: Path, tmp_path: Path) -> None:
    """Its lock files cut in the middle of writing: what the README says to do."""
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    dead = 2**22 + 1
    rwlock, lock = project / ".dvc/tmp/rwlock", project / "dvc.lock"
    by, out = {"pid": dead, "cmd": "dvc repro"}, str(project / "data/svam")
    held = json.dumps({"write": {out: by}, "read": {out: [by]}})
    rwlock.write_text(held)
    assert ran(run(project, "dvc", "repro")) == []
    rwlock.write_text(held[:30])
    refused = attempt(project, "dvc", "repro")
    assert refused.returncode != 0 and "JSON structure is corrupted" in refused.stdout + refused.stderr
    rwlock.unlink()

    whole = lock.read_bytes()
    cut = whole[: whole.index(b"hash: md5", len(whole) // 2) + 2]  # in the middle of a word, which is no YAML
    for restore in (lambda: run(project, "git", "checkout", "dvc.lock"), lock.unlink):
        lock.write_bytes(cut)
        refused = attempt(project, "dvc", "repro")
        assert refused.returncode != 0 and "dvc.lock" in refused.stdout + refused.stderr
        restore()
        assert set(ran(run(project, "dvc", "repro"))) <= {"code", "foresight", "report"}, "only what DVC does not cache"
        assert locked_stages(project) == locked_stages(finished)
