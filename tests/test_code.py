"""Digests of code: what changes them, what does not, which modules a stage runs, and that DVC's files agree."""

from __future__ import annotations

import ast
from hashlib import sha256
from pathlib import Path

import pytest

from svam.code import (
    UNTRACKED,
    code_of,
    code_text,
    digest_of,
    digest_of_data,
    first_difference,
    imported_names,
    stage_code,
    stage_names,
)
from svam.files import read_yaml
from svam.params import load_params
from tests import ROOT

MODULES = load_params(ROOT / "params.yaml").modules
PIPELINE = read_yaml(ROOT / "dvc.yaml")["stages"]
MODULE = '''
"""A module."""
from typing import TYPE_CHECKING, Annotated
import typer
from svam.console import console, progress_bar, timed, track

if TYPE_CHECKING:
    from a import b

class Loud:
    """A class."""
    value: int = 3
    """What it is."""

def f(items, out: Annotated[str, typer.Argument(help="Where.")], scale=2.0):
    """A function."""
    with timed("part one"):
        total = sum(scale * x for x in track(items, "items", len(items)))
    with progress_bar() as bar:
        task = bar.add_task("bar", total=3, note="")
        bar.update(task, note=f"loss {total:.3f}")
    console.print(f"total {total!r}", style="red")
    assert total > 0, "nothing there"
    if total > 9:
        raise ValueError(f"{total} is too much", 5) from None
    return total
'''
SILENT = [
    ('"""A module."""', '"""Another text."""'),
    ('    """A class."""\n', ""),
    ('"""What it is."""', '"""What it was."""'),
    ("import typer", "import typer  # a comment"),
    ("    from a import b", "    from a import c"),
    ("Where.", "Whither."),
    ("part one", "part two"),
    ('"items", len(items)', 'f"all {items}", 5'),
    ('"bar", total=3', '"foo", total=4'),
    ("loss {total:.3f}", "{total}"),
    ("total {total!r}", "the total"),
    ('    console.print(f"total {total!r}", style="red")\n', ""),
    ("nothing there", "it is empty"),
    ("is too much", "exceeds 9"),
    ("scale * x for x", "scale  *  x for   x"),
]
HEARD = [
    ("scale=2.0", "scale=2.5"),
    ("scale * x", "scale + x"),
    ("value: int = 3", "value: int = 4"),
    ("total > 9", "total > 8"),
    ("total > 0,", "total >= 0,"),
    ("raise ValueError", "raise KeyError"),
    ("track(items,", "track(items[1:],"),
    ("return total", "return None"),
    ("import typer", "import typing as typer"),
]


@pytest.mark.parametrize(("old", "new"), SILENT, ids=[old for old, _ in SILENT])
def test_words_do_not_count(old: str, new: str) -> None:
    assert old in MODULE
    assert digest_of(MODULE.replace(old, new)) == digest_of(MODULE)


@pytest.mark.parametrize(("old", "new"), HEARD, ids=[old for old, _ in HEARD])
def test_what_can_change_a_number_counts(old: str, new: str) -> None:
    assert old in MODULE
    assert digest_of(MODULE.replace(old, new)) != digest_of(MODULE)


def test_only_our_console_is_silent() -> None:
    """A function of the same name that comes from elsewhere may compute."""
    for line in ("timed(model)", "track(x, 1)", "console.print(x)"):
        source = f"from svam.measures import console, timed, track\n{line}\n"
        assert digest_of(source) != digest_of(source.replace("(model)", "(other)").replace("1)", "2)").replace("(x)", "(y)"))


def test_a_digest_does_not_depend_on_pythons_version() -> None:
    """Recorded on 3.11."""
    assert digest_of(MODULE) == "a935480766055d2b"
    assert digest_of("f'{a}' f''") == digest_of("f'{a}'")


def test_a_stages_code_is_the_closure_of_its_imports(tmp_path: Path) -> None:
    """Within functions too, not for type checkers, through untracked modules, and of modules chosen by name one."""
    files = {
        "svam/__init__.py": '"""Docstring."""',
        "svam/deep.py": "x = 1",
        "svam/middle.py": "def f():\n    from svam.deep import x\n    return x",
        "svam/middle.yaml": "# Words.\na: [1, 2.5]\nb: text",
        "svam/unused.py": "x = 2",
        "svam/unused.yaml": "c: 1",
        "svam/files.py": "from svam.far import y",
        "svam/far.py": "y = 3",
        "svam/sources/__init__.py": "",
        "svam/sources/one.py": "from svam.sources import _shared",
        "svam/sources/two.py": "",
        "svam/sources/_shared.py": "z = 4",
        "stages/run.py": "from typing import TYPE_CHECKING\nfrom svam import files, middle\n"
        "if TYPE_CHECKING:\n    import svam.unused\n"
        "def f(name):\n    import_module(f'svam.sources.{name}')",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    code = stage_code("run", {"svam.sources.": ["one"]}, tmp_path)
    assert list(code) == [
        "stages/run.py", "svam/deep.py", "svam/far.py", "svam/middle.py", "svam/middle.yaml", "svam/sources/_shared.py",
        "svam/sources/one.py",
    ]  # fmt: skip
    text = code_text(code)
    assert first_difference(code, text) is None
    assert first_difference(code, text.replace(code["svam/middle.py"], "0")) == "svam/middle.py"
    assert first_difference(code, "") == "stages/run.py"
    with pytest.raises(ValueError, match="stages/run.py chooses a module of svam.sources"):
        code_of(["stages/run.py"], root=tmp_path)


def test_the_client_counts_where_a_server_is_evaluated() -> None:
    params = load_params(ROOT / "params.yaml")
    remote = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"policy": "remote"})})
    client = {"svam/evaluation/remote.py", "svam/serving/client.py", "svam/serving/protocol.py"}
    assert client <= set(stage_code("evaluate", remote.modules)) and not client & set(stage_code("evaluate", params.modules))


def test_data_counts_by_what_it_says() -> None:
    """The digest is that of the values as JSON, which is the same everywhere."""
    text = "# Words.\na: [1, 2.5]\nb: text\n"
    assert digest_of_data(text) == sha256(b'{"a": [1, 2.5], "b": "text"}').hexdigest()[:16]
    assert digest_of_data("a:\n- 1\n- 2.5  # more words\nb: 'text'\n") == digest_of_data(text)
    assert len({digest_of_data(other) for other in (text, "b: text\na: [1, 2.5]", text.replace("2.5", "2"))}) == 3


def test_every_data_file_is_counted() -> None:
    """All YAML files of `svam` that a stage may read are named as the module that reads them."""
    data = [file for file in (ROOT / "svam").rglob("*.yaml") if file.parent.name not in ("presets", "experiments")]
    assert data and all(file.with_suffix(".py").is_file() for file in data)
    assert {"svam/episodes/instructions.py", "svam/episodes/instructions.yaml"} <= set(stage_code("collect", MODULES))


def test_imports_are_read_wherever_they_stand() -> None:
    source = """
from typing import TYPE_CHECKING
import a.b as c
if TYPE_CHECKING:
    import never
else:
    import ever
def f():
    from d.e import g
    class H:
        import i
    import_module(f"j.k.{name}")
    importlib.import_module("l.m")
"""
    names = imported_names(source)
    assert {"a.b", "d.e", "d.e.g", "i", "j.k.", "l.m", "ever"} <= names
    assert "never" not in names
    with pytest.raises(ValueError, match="written out"):
        imported_names("import_module(name)")
    for relative in ("from . import n", "from ..q import r"):
        with pytest.raises(ValueError, match="relative"):
            imported_names(relative)


def test_the_pipeline_lists_a_file_for_each_stage() -> None:
    """`code` writes the files that its outs name, and every other stage depends on its own, first."""
    names = set(PIPELINE) - {"code"}
    assert set(stage_names()) == names
    assert [next(iter(out)) for out in PIPELINE["code"]["outs"]] == [
        f"data/code/{name}.txt" for name in PIPELINE if name != "code"
    ]
    for name in names:
        code = [path for path in PIPELINE[name]["deps"] if path.endswith(".py") or "data/code" in path]
        assert code == [f"data/code/{name}.txt"] == PIPELINE[name]["deps"][:1]
        assert f"python -m {next(iter(stage_code(name, MODULES)))[:-3].replace('/', '.')} " in PIPELINE[name]["cmd"]


@pytest.mark.parametrize("name", UNTRACKED)
def test_untracked_modules_compute_nothing(name: str) -> None:
    """They neither import a library of arithmetic nor a module of ours that is tracked, but for the types of arrays, how they
    are laid out in a file, and how torch starts processes."""
    source = (ROOT / name).read_text(encoding="utf-8")
    imported = {module.split(".")[0] for module in imported_names(source)}
    allowed = {"svam/resume.py": {"numpy", "safetensors"}, "svam/processes.py": {"torch"}, "svam/launch.py": {"torch"}}
    libraries = {"numpy", "torch", "scipy", "safetensors", "zarr", "diffusers", "transformers"}
    assert not imported & libraries - allowed.get(name, set())
    arrays = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
              and isinstance(node.value, ast.Name) and node.value.id == "np"}  # fmt: skip
    assert arrays <= {"ascontiguousarray"}
    assert set(code_of([name])) <= {"svam/contract.py"}
