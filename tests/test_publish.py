"""A project's model as a folder for a hub: it loads, its card says what was measured, and of nothing else."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from svam.errors import MachineError
from svam.files import sha256
from svam.models.svam import SVAM
from svam.publish import upload
from tests.project import environment

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore:'svam.publish' found in sys.modules")]


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`python -m svam.publish` within this process, in a folder; what it says when it refuses."""
    monkeypatch.setenv("PATH", environment()["PATH"])

    def refused(folder: Path, *arguments: str) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["publish.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("svam.publish", run_name="__main__")
        assert end.value.code == 1
        return capsys.readouterr().err

    return refused


def test_a_finished_project(finished: Path, tmp_path: Path, publish: Callable[..., str]) -> None:
    """Then the model that is there is another one than was evaluated."""
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    said, out = publish(project, "out/toy", "--license", "apache-2.0", "--to", "someone/toy"), project / "out/toy"
    assert "the hub did not take it" in said and "out/toy is whole" in said, said
    svam = SVAM.load(out)
    assert svam.act([svam.example()]).shape[0] == 1
    card, flat = ModelCard.load(out / "README.md"), json.loads((project / "data/report/metrics.json").read_text())
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "robotics"
    assert card.data.eval_results is not None and card.data.eval_results[0].metric_value == round(100 * flat["success"], 1)
    assert f"`{sha256(out / 'manifest.json')}`" in card.text and 'snapshot_download("someone/toy")' in card.text
    assert sha256(out / "policy/model.safetensors") in card.text and "## Success in closed loop" in card.text
    assert re.search(r"\| mean of tasks \(macro\) \| \d+% \(\d+% to \d+%\)", card.text)
    assert (out / "params.yaml").read_bytes() == (project / "params.yaml").read_bytes()

    assert "is there already" in publish(project, "out/toy")
    (project / "params.yaml").write_text((project / "params.yaml").read_text() + "# a comment is no change\n")
    config = project / "data/svam/manifest.json"
    config.write_text(config.read_text() + " ")
    said = publish(project, "out/other")
    assert "data/svam, data/svam/manifest.json: not what the last evaluation used" in said, said
    assert not (project / "out/other").exists()


def test_outside_a_project(evaluated: Path, tmp_path: Path, publish: Callable[..., str]) -> None:
    said = publish(tmp_path, "out", "--model", str(evaluated / "svam"))
    assert "DVC does not know whose results these are" in said, said


def test_what_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[Any, ...]] = []

    class Hub:
        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
            sent.append((repository, private, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> str:
            sent.append((repo_id, folder_path))
            return "address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert upload(tmp_path, "me/toy", private=True) == "address"
    assert sent == [("me/toy", True, True), ("me/toy", tmp_path)]
    monkeypatch.undo()
    with pytest.raises(
        MachineError, match="me/toy: the hub did not take it .*; .* is whole: send it later by `hf upload me/toy"
    ):
        upload(tmp_path, "me/toy", private=True)
