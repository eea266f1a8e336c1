"""Each stage's code dependencies in `dvc.yaml` are exactly what it imports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stage_deps import ROOT, UNTRACKED, closure, corrected, stages

STAGES = stages()


@pytest.mark.parametrize("name", STAGES)
def test_deps_are_the_import_closure(name: str) -> None:
    file, listed = STAGES[name]
    wanted = closure(name, file)
    assert listed == wanted, (
        f"{name}: missing {sorted(wanted - listed)}, superfluous {sorted(listed - wanted)}; "
        "`python -m tests.stage_deps --write` corrects dvc.yaml"
    )


def test_every_stage_file_is_in_the_pipeline() -> None:
    files = {p.name for p in (ROOT / "stages").glob("*.py")} - {"__init__.py", "_command.py"}
    assert files == {file.name for file, _ in STAGES.values()}


def test_what_is_untracked_holds_no_computation() -> None:
    """Params and contract import none of our other modules, so that leaving them out hides nothing."""
    for name in UNTRACKED - {"stages/_command.py"}:
        assert closure("none", ROOT / name) == set()


def test_a_function_level_import_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "svam").mkdir()
    (tmp_path / "svam/__init__.py").write_text('"""Docstring."""\n')
    (tmp_path / "svam/deep.py").write_text("x = 1\n")
    (tmp_path / "svam/middle.py").write_text("def f():\n    from svam.deep import x\n    return x\n")
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/one.py").write_text("from svam import middle\n")
    monkeypatch.setattr("tests.stage_deps.ROOT", tmp_path)
    assert closure("one", tmp_path / "stages/one.py") == {"stages/one.py", "svam/middle.py", "svam/deep.py"}


def test_correcting_changes_code_deps_only() -> None:
    text = "stages:\n  one:\n    cmd: x\n    deps:\n      - data/a   # why\n      - svam/old.py\n    params:\n      - seed\n"
    expected = text.replace("svam/old.py", "stages/one.py\n      - svam/new.py")
    assert corrected(text, {"one": {"svam/new.py", "stages/one.py"}}) == expected
