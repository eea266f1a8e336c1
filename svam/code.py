"""Which modules decide the numbers of a stage, with a digest of each: what "the same code" means here.

`data/code/<stage>.txt` holds it for DVC; a resumed run, the conversion and the feature cache ask for it as well. A digest is
of a module's syntax tree, without what changes no number: comments, docstrings, annotations for type checkers, the words of
errors, of the console, of progress bars and of `--help`. It is the same on Python 3.11 and 3.12 (`ast.dump` is not).

A module may keep values in a YAML file beside it of the same name (`instructions.yaml` of `instructions.py`), which counts with
the module, by its parsed content. Of other data files nothing is known here.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
UNTRACKED = {
    "stages/_command.py": "reads the command line",
    "stages/code.py": "writes the digests",
    "svam/__init__.py": "sets how threads wait, not what they compute",
    "svam/code.py": "says what is tracked",
    "svam/conversion.py": "checks params, whose values are tracked by themselves",
    "svam/console.py": "prints, and measures time",
    "svam/errors.py": "names errors",
    "svam/files.py": "renames finished files into place",
    "svam/processes.py": "lets processes wait for one another; what they compute of a batch is tracked, `svam/shares.py`",
    "svam/launch.py": "starts the processes of a stage",
    "svam/params.py": "checks params, whose values are tracked by themselves",
    "svam/protocols.py": "checks the params of evaluate, which are tracked by themselves",
    "svam/sections.py": "bases of params, which are tracked by themselves",
    "svam/resume.py": "saves the state of an unfinished run; a resumed run ends with the same bytes",
}
"""Modules that change no number, with the reason. What they import counts all the same."""
LIBRARIES = ("diffusers", "metaworld", "mujoco", "numpy", "pybullet", "torch", "transformers", "zarr")
BACKBONES = ("autoencoder", "text", "teacher")
"""`stages/prepare_backbones.py` is a stage for each of these modules of `svam.training.prepare_backbones`."""


def stage_names(root: Path = ROOT) -> list[str]:
    """The stages of `dvc.yaml` (without their matrix) that depend on code, which are all but `code` itself."""
    files = sorted(file.stem for file in (root / "stages").glob("[a-z]*.py"))
    names = {"code": [], "prepare_backbones": [f"prepare_backbones_{part}" for part in BACKBONES]}
    return [name for file in files for name in names.get(file, [file])]


def stage_code(stage: str, chosen: Mapping[str, Sequence[str]], root: Path = ROOT) -> dict[str, str]:
    """Path of each module that a stage runs, and of its YAML file -> its digest. `chosen`: `Params.modules`, see `code_of`."""
    part = stage.removeprefix("prepare_backbones_")
    file = "stages/prepare_backbones.py" if part in BACKBONES else f"stages/{stage}.py"
    return code_of([file], {**chosen, "svam.training.prepare_backbones.": [part]}, root)


def code_text(code: Mapping[str, str]) -> str:
    """A line for each file, as `data/code/<stage>.txt` has them."""
    return "".join(f"{digest} {path}\n" for path, digest in code.items())


def first_difference(code: Mapping[str, str], text: str) -> str | None:
    """The first file in which `text` (see `code_text`) is not `code`; None where they agree."""
    recorded = {path: digest for digest, _, path in (line.partition(" ") for line in text.splitlines())}
    return min((path for path, _ in code.items() ^ recorded.items()), default=None)


def code_of(modules: Iterable[str], chosen: Mapping[str, Sequence[str]] | None = None, root: Path = ROOT) -> dict[str, str]:
    """Path -> digest of the given modules, of all that they import, also within functions, and of their YAML files; paths are
    relative to `root`.

    Args:
        chosen: of `import_module(f"a.{name}")`: "a." -> the names.

    Raises:
        ValueError: a module is chosen by name that `chosen` does not tell.
    """
    code: dict[str, str] = {}
    waiting, seen = [root / module for module in modules], set[Path]()
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        path = file.relative_to(root).as_posix()
        digest, imported = _read(file.read_text(encoding="utf-8"))
        if path not in UNTRACKED and digest != _EMPTY:
            code[path] = digest
        data = file.with_suffix(".yaml")
        if path not in UNTRACKED and data.is_file():
            code[data.relative_to(root).as_posix()] = digest_of_data(data.read_text(encoding="utf-8"))
        for name in imported:
            if name.endswith(".") and name.startswith(("svam.", "stages.")) and name not in (chosen or {}):
                raise ValueError(f"{path} chooses a module of {name}* by name: `svam.code` must say which")
            found = [name + last for last in (chosen or {}).get(name, [""])]
            waiting += [module for one in found if (module := module_file(one, root)) is not None]
    return dict(sorted(code.items()))


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that decide numbers. DVC does not track them; caches must."""
    versions = {"python": sys.version}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def module_file(name: str, root: Path = ROOT) -> Path | None:
    """The file of one of our modules; None for any other name."""
    parts = name.split(".")
    if parts[0] not in ("svam", "stages"):
        return None
    base = root.joinpath(*parts)
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


@cache
def _read(source: str) -> tuple[str, frozenset[str]]:
    words, names = _words_and_names(source)
    return _digest(words), frozenset(names)


def imported_names(source: str) -> set[str]:
    """Dotted names that the source imports anywhere (functions included), but for `if TYPE_CHECKING:`, which never runs.

    `from a import b` gives both `a` and `a.b`. `import_module("a.b")` counts too; of `import_module(f"a.{x}")` the constant
    beginning is given, "a.".

    Raises:
        ValueError: an import is relative, or the name given to `import_module` does not begin with a constant.
    """
    return _words_and_names(source)[1]


def _words_and_names(source: str) -> tuple[list[str], set[str]]:
    """What `_write` makes of the module, and `imported_names` of it: parsed and gone through once, since every stage waits."""
    words: list[str] = []
    nodes: list[ast.Import | ast.ImportFrom | ast.Call] = []
    _write(_for_machines(source), words, nodes)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module is None or node.level:
                raise ValueError(f"line {node.lineno}: a relative import; write the whole name")
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif node.args and _called(node) in ("import_module", "__import__"):
            first = node.args[0]
            first = first.values[0] if isinstance(first, ast.JoinedStr) and first.values else first
            if not isinstance(first, ast.Constant) or not isinstance(first.value, str):
                raise ValueError(f"line {node.lineno}: the beginning of the imported name must be written out")
            names.add(first.value)
    return words, names


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def digest_of(source: str) -> str:
    """Sixteen hexadecimal digits that change with whatever in a module can change a number."""
    return _digest(_words_and_names(source)[0])


def _digest(words: list[str]) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


@cache
def digest_of_data(text: str) -> str:
    """Sixteen hexadecimal digits of what a YAML file says: comments, quotes and indentation do not count, order does."""
    from ruamel.yaml import YAML  # only where there is such a file: reading code needs the standard library alone

    values = YAML(typ="safe", pure=True).load(text)
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]


def _write(value: Any, words: list[str], nodes: list[Any]) -> None:
    """The tree as a list of words; and its imports and calls. Fields that are None or empty are left out: which of them exist
    depends on Python."""
    if isinstance(value, ast.AST):
        words.append(type(value).__name__)
        if isinstance(value, _IMPORTING):
            nodes.append(value)
        for name in value._fields:
            inner = getattr(value, name, None)
            if inner is not None and inner != []:
                words.append(name)
                _write(inner, words, nodes)
        words.append(")")
    elif isinstance(value, list):
        for item in value:
            _write(item, words, nodes)
        words.append("]")
    else:
        words.append(ascii(value))


_IMPORTING = (ast.Import, ast.ImportFrom, ast.Call)


class _Words(ast.NodeTransformer):
    """Takes what only people read out of a module's tree."""

    def __init__(self, tree: ast.Module, source: str) -> None:
        nodes = list(ast.walk(tree)) if "svam.console" in source else []
        console = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "svam.console"]
        self.console = {alias.name for node in console for alias in node.names}
        opened = [item for node in nodes if isinstance(node, ast.With) for item in node.items]
        self.bars = {getattr(item.optional_vars, "id", "") for item in opened if self._is(item.context_expr, "progress_bar")}

    def _is(self, node: ast.AST, name: str) -> bool:
        """Whether a node calls this function of `svam.console`."""
        return name in self.console and isinstance(node, ast.Call) and getattr(node.func, "id", "") == name

    def _shows(self, node: ast.AST) -> bool:
        """Whether a node calls a method of the console or of a progress bar."""
        method = node.func if isinstance(node, ast.Call) else None
        owner = getattr(method.value, "id", "") if isinstance(method, ast.Attribute) else ""
        return owner in self.bars or (owner == "console" and owner in self.console)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text or self._shows(node.value) else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> Any:
        if getattr(node.test, "attr", getattr(node.test, "id", "")) != "TYPE_CHECKING":
            return self.generic_visit(node)
        return [self.visit(child) for child in node.orelse]

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        return self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        """Python 3.12 puts empty constants between the parts."""
        node.values = [part for part in node.values if getattr(part, "value", None) != ""]
        return self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if self._shows(node) or self._is(node, "timed"):
            node.args, node.keywords = [], []
        elif self._is(node, "track"):
            node.args, node.keywords = node.args[:1], []
        elif _called(node) in ("Argument", "Option"):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "help"]
        return self.generic_visit(node)


def _for_machines(source: str) -> ast.AST:
    """The module's tree without what only people and type checkers read."""
    tree = ast.parse(source)
    remaining: ast.AST = _Words(tree, source).visit(tree)
    return remaining


_EMPTY = digest_of("")
