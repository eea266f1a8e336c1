"""An English instruction for each of MetaWorld's 50 tasks, from `instructions.yaml`: several for training, one held out."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from pathlib import Path

from svam.errors import ParamsError
from svam.files import read_yaml


@cache
def _sentences() -> dict[str, dict[str, list[str]]]:
    return dict(read_yaml(Path(__file__).with_suffix(".yaml")))


def instructions_of(task: str) -> dict[str, list[str]]:
    """`{"train": [several sentences], "held_out": [one sentence]}` of MetaWorld task `task` (name without version).

    Raises:
        ParamsError: the table has no such task.
    """
    if task not in _sentences():
        raise ParamsError(f"no instruction for task {task!r}: {likely_task(task)}")
    return _sentences()[task]


def described_tasks() -> list[str]:
    """The tasks that have instructions, sorted."""
    return sorted(_sentences())


def likely_task(name: str) -> str:
    """What was probably meant by a name that is none of `described_tasks`, for the end of a sentence."""
    close = get_close_matches(name.removesuffix("-v3"), described_tasks(), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(described_tasks())}"
