"""The stage `benchmark` run by a test, on toy params."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.benchmark import app
from tests.toy import invoke, write_toy_params


def called(part: str, folder: Path, changes: dict[str, Any], *options: str) -> Any:
    """The finished command, its params with `changes` and all that it writes below `folder`."""
    folder.mkdir(exist_ok=True)
    write_toy_params(folder / "params.yaml", changes)
    arguments = [part, folder / "out.json", "--scratch", folder / "scratch", "--params", folder / "params.yaml"]
    return invoke(app, *arguments, *options)


def measured(part: str, folder: Path, changes: dict[str, Any], *options: str) -> dict[str, Any]:
    """What the command writes."""
    done = called(part, folder, changes, *options)
    assert done.exit_code == 0, done.output
    assert not any((folder / "scratch").glob("*"))
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    assert found["part"] == part and found["machine"]["cores"] >= 1 and found["machine"]["load_before"] >= 0.0
    return found


def refused(part: str, folder: Path, changes: dict[str, Any], capfd: pytest.CaptureFixture[str], *options: str) -> str:
    """The one sentence with which the command stops; nothing is written."""
    capfd.readouterr()
    done = called(part, folder, changes, *options)
    said = (done.output + capfd.readouterr().err).strip().splitlines()
    assert done.exit_code == 1 and not (folder / "out.json").exists()
    assert [line.startswith("error: ") for line in said].count(True) == 1 and said[-1].startswith("error: ")
    return said[-1].removeprefix("error: ")


def check_ratio(found: dict[str, Any], seconds: dict[str, list[float]], slow: str, fast: str) -> None:
    """A ratio is the median over the repeats of the quotients of the seconds that stand beside it."""
    quotients = np.asarray(seconds[slow]) / np.asarray(seconds[fast])
    assert found["ratio"] == pytest.approx(np.median(quotients), rel=0.01, abs=0.001)
    assert found["range"] == pytest.approx([quotients.min(), quotients.max()], rel=0.01, abs=0.001)
