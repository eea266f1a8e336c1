"""What the commands of all stages share."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest
from typer.testing import CliRunner

from tests import ROOT

STAGES = sorted(file.stem for file in (ROOT / "stages").glob("[a-z]*.py"))


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own in which nothing about OpenMP is set."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "DVC_"))}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_says_how_it_is_called(stage: str) -> None:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(import_module(f"stages.{stage}").app, ["--help"])
    assert done.exit_code == 0, done.output
    assert "--params" in done.stdout and "default: params.yaml" in done.stdout


def test_openmp_waits_passively_after_a_while_in_stages_and_workers() -> None:
    """OpenMP itself says so when torch loads it, in a fresh process that imports a stage and in a worker of that process."""
    code = """
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
import stages.train_policy
assert "torch" not in sys.modules
if __name__ == "__main__":
    import torch
    print("stage", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(import_module, "svam.training.loop").exception()
"""
    done = run("-c", code, OMP_DISPLAY_ENV="verbose")
    assert done.returncode == 0, done.stderr
    for heard in done.stderr.split("stage\n"):
        assert "OMP_WAIT_POLICY = 'PASSIVE'" in heard, done.stderr
        assert "GOMP_SPINCOUNT = '2000'" in heard, done.stderr


def test_a_wait_policy_that_the_user_sets_stays() -> None:
    code = "import os, svam; print(os.environ['OMP_WAIT_POLICY'], 'GOMP_SPINCOUNT' in os.environ)"
    assert run("-c", code, OMP_WAIT_POLICY="ACTIVE").stdout == "ACTIVE False\n"
