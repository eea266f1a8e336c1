"""The loop for real: DVC experiments of the toy pipeline, killed after the first, and the table of what they left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from svam.experiments.records import PATTERN, read_record
from svam.files import read_json
from tests.project import attempt, make_project, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CHANGES = {
    "collect": {"tasks": ["button-press-topdown"], "episodes": 3, "episodes_of": {}},
    "compare": {
        "seeds": [1], "episodes_per_task": [1], "episodes": 2, "steps": 4, "ablations": [], "collection": "small",
        "collections": {"small": ["evaluate.tasks=[button-press-topdown]"]},
        "trail": {"as_it_is": [], "shorter": ["distill.training.steps=3"]}, "trail_policies": ["shorter"],
        "ablation_size": 1, "ablation_episodes": 1,
    },
}  # fmt: skip
RECORDS = Path("data/compare/small")
LOOP = (sys.executable, "-m", "svam.experiments", "run", "--only", "svam", "--only", "vpp")


def records(root: Path) -> list[Path]:
    return sorted((root / RECORDS).glob(PATTERN))


def start_and_kill(root: Path, until: int) -> None:
    """Start the loop in a process group of its own, and kill the group when so many records are there."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with (root / "loop.log").open("w") as log:
        loop = subprocess.Popen(LOOP, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True)
        while len(records(root)) < until:
            assert loop.poll() is None, (root / "loop.log").read_text()[-6000:]
            time.sleep(0.2)
        # While DVC takes up the next experiment, for which it borrows the workspace.
        # (Looking takes no lock of git's index, which DVC would run into.)
        while "params.yaml" not in run(root, "git", "--no-optional-locks", "status", "--porcelain", "--untracked-files=no"):
            assert loop.poll() is None, (root / "loop.log").read_text()[-6000:]
        os.killpg(loop.pid, signal.SIGKILL)
        loop.wait()
        with suppress(ProcessLookupError):  # DVC takes a process for alive until it has been waited for
            while True:
                os.killpg(loop.pid, 0)
                time.sleep(0.1)


def test_the_loop(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", CHANGES)
    with (root / "dvc.yaml").open("a", encoding="utf-8") as file:
        file.write("# not committed\n")
    status = run(root, "git", "status", "--porcelain", "--untracked-files=no", "--branch")
    start_and_kill(root, until=1)
    (first,) = records(root)
    before = first.read_bytes()

    # The loop puts the workspace back and goes on with the second run; stages before the policy are not run again.
    done = attempt(root, *LOOP)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert run(root, "git", "status", "--porcelain", "--untracked-files=no", "--branch") == status
    assert not (root / "data/svam").exists()
    ran = [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")]
    assert set(ran) <= {"check_params", "train_policy", "evaluate", "report"}
    assert first.read_bytes() == before
    svam, vpp = (read_record(file) for file in records(root))
    assert (svam.name, vpp.name) == ("svam-1-seed1-small", "vpp-1-seed1-small")
    for record in (svam, vpp):
        assert record.budget.policy_steps == 4 and record.budget.demonstrations == 1
        assert [(e.task, e.index) for e in record.episodes] == [("button-press-topdown", 0), ("button-press-topdown", 1)]
        assert run(root, "git", "rev-parse", "--verify", record.revision).strip() == record.revision
    assert [e.seed for e in svam.episodes] == [e.seed for e in vpp.episodes]
    assert svam.budget == vpp.budget and svam.policy != vpp.policy and svam.parameters > vpp.parameters
    assert (
        svam.policy_training and svam.evaluation and svam.distillation and vpp.distillation == 0.0 and vpp.video == svam.video
    )

    # Nothing is left to do; also in a clone that has the records and no data.
    run(root, "git", "add", "data/compare")
    run(root, "git", "commit", "--quiet", "--message", "records")
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "--quiet", str(root), str(clone))
    assert "# 2 runs, 2 finished" in run(clone, *LOOP)
    refused = attempt(clone, sys.executable, "-m", "svam.experiments", "run", "--only", "nothing")
    assert refused.returncode == 1 and "no run of the plan has such a name" in refused.stderr

    # The table, with latencies of the policies that DVC's cache has; the clone keeps those.
    page = run(root, sys.executable, "-m", "svam.report", "compare")
    assert page.count("not distinguishable") == 1 and "not measured" not in page
    assert set(read_json(root / RECORDS / "latency.json")["variants"]) == {"svam", "vpp"}
    (clone / RECORDS / "latency.json").write_bytes((root / RECORDS / "latency.json").read_bytes())
    assert run(clone, sys.executable, "-m", "svam.report", "compare", "--no-latency") == page

    # The trail distils, measures and acts, in a workspace that stays as it was; its records are enough for the page.
    page = run(root, sys.executable, "-m", "svam.report", "trail")
    assert "2 of 2 entries" in page and page.count("not distinguishable") == 2  # of each branch
    assert re.search(r"\| `shorter` \| \d+% \[\d+, \d+\] of 1 \|", page[page.index("## Success") :])
    assert run(root, "git", "status", "--porcelain", "--untracked-files=no", "--branch") == status
    again = run(root, sys.executable, "-m", "svam.report", "trail", "--minutes", "0")
    assert again.endswith(page[page.index("# The trail") :])
    assert not list((root / ".cache/compare").glob("tmp*"))

    # Changed work is run again: the code of the distillation is none of VPP's.
    with (root / "svam/training/distill.py").open("a", encoding="utf-8") as file:
        file.write("# edited\n")
    plan = run(root, sys.executable, "-m", "svam.experiments", "plan", "--only", "svam", "--only", "vpp")
    assert [line.rpartition("# ")[2].split()[0] for line in plan.splitlines()[:2]] == ["about", "finished"]
