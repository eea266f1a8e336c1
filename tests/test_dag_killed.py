"""The whole toy pipeline killed by SIGKILL while it keeps something, in another folder and with other workers: `dvc repro`
again ends with the same bytes as a run that nothing interrupted."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.project import PAUSE, attempt, found, locked_stages, make_project, mend, ran, run, running_repro

pytestmark = pytest.mark.timeout(1500)

# One of each kind that keeps state, in the order in which they run; every stage is killed in `test_dag_killed_anytime.py`.
LONG = ("collect", "convert", "finetune_video", "generate", "cache_teacher@geometric", "train_policy", "evaluate")
WENT_ON = {
    "collect": r"collect: [1-9]\d* of \d+ episodes were collected before",
    "convert": r"convert: going on after [1-9]\d* of \d+ steps",
}
# Listed by no stage, so that no hash differs.
MACHINE = {"machine": {"checkpoint_seconds": 0.0, "workers": 1}}


def kept(root: Path, stage: str) -> list[Path]:
    """What an unfinished run of a stage has kept so far."""
    own = {"collect": ".cache/collect/*/*/*.json", "convert": ".cache/convert/*/unit_*/episodes.json"}
    return found(root, own.get(stage, f".ckpt/{stage}/*/*.json"))


def kill_at_first_record(root: Path, log: Path, stages: list[str], *options: str) -> tuple[str | None, int]:
    """Run `dvc repro` and kill it when one of `stages` has kept something.

    Returns:
        That stage, or None if the run or the stage ended before it was killed; and the exit status.
    """
    due = None
    with running_repro(root, log, *options) as process:
        while process.poll() is None and due is None:
            due = next((stage for stage in stages if kept(root, stage)), None)
            time.sleep(PAUSE)
    mend(root)
    return (due if due is not None and kept(root, due) else None), process.returncode


def test_every_long_stage_is_killed_once_and_goes_on(finished: Path, tmp_path: Path) -> None:
    project = make_project(tmp_path / "another folder", MACHINE)
    waiting = list(LONG)
    last: str | None = None  # the stage that the run before was killed in
    options: list[str] = []
    for number in range(2 * len(LONG)):
        log = tmp_path / f"{number}.log"
        killed, status = kill_at_first_record(project, log, waiting, *options)
        said, options = log.read_text(), []
        if last is not None:
            assert re.search(WENT_ON.get(last, f"{last}: goes on from what"), said), f"{last} did not go on: {said[-3000:]}"
        last = killed
        if killed is not None:
            waiting.remove(killed)
            continue
        assert status in (0, -signal.SIGKILL), said[-3000:]
        if status == 0 and not waiting:
            break
        if status == 0:  # too quick to be seen at work: once more, from nothing
            options = ["--single-item", "--force", waiting[0]]
    assert not waiting, f"never killed while something was kept: {waiting}"
    assert locked_stages(project) == locked_stages(finished)
    for file in sorted(path for path in (finished / "data/report").rglob("*") if path.is_file()):
        assert (project / file.relative_to(finished)).read_bytes() == file.read_bytes(), file.name
    assert not (project / ".ckpt").exists() and not any((project / ".cache/convert").iterdir())
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
    assert ran(run(project, "dvc", "repro")) == []

    whole = lock.read_bytes()
    cut = whole[: whole.index(b"hash: md5", len(whole) // 2) + 2]  # in the middle of a word, which is no YAML
    for restore in (lambda: run(project, "git", "checkout", "dvc.lock"), lock.unlink):
        lock.write_bytes(cut)
        refused = attempt(project, "dvc", "repro")
        assert refused.returncode != 0 and "dvc.lock" in refused.stdout + refused.stderr
        restore()
        assert set(ran(run(project, "dvc", "repro"))) <= {"foresight", "report"}, "only what DVC does not cache runs again"
        assert locked_stages(project) == locked_stages(finished)
