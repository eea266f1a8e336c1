"""Which of our modules a stage runs: the closure of its imports, read from the source. `dvc.yaml` must list exactly these.

`python -m tests.stage_deps` says where `dvc.yaml` differs; with `--write` it corrects the file.
"""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("svam", "stages")
# Modules of params and contract only: values are tracked as params, versions are stored in outputs and checked on reading.
UNTRACKED = {
    "svam/params.py",
    "svam/contract.py",
    "svam/errors.py",
    "svam/__init__.py",
    "stages/_command.py",
}
# `import_module(f"<prefix>{name}")`: the name that each stage's command chooses; where a param does, how dvc.yaml spells it.
CHOSEN = {
    "svam.sources.": {"check_params": "${convert.source}", "convert": "${convert.source}"},
    "svam.training.prepare_backbones.": {
        "prepare_backbones_autoencoder": "autoencoder",
        "prepare_backbones_text": "text",
        "prepare_backbones_teacher": "teacher",
    },
}


def path_of(module: str) -> Path | None:
    """The file of one of our modules, or None for other names."""
    base = ROOT.joinpath(*module.split("."))
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if module.split(".")[0] in PACKAGES and file.is_file():
            return file
    return None


def is_docstring_only(file: Path) -> bool:
    """Whether a module holds nothing that could change a result."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def _is_typing_only(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imported_names(source: str, package: str = "") -> set[str]:
    """Dotted names that the source imports anywhere (functions included), but for `if TYPE_CHECKING:`, which never runs.

    `from a import b` gives both `a` and `a.b`. `import_module("a.b")` counts too; of `import_module(f"a.{x}")` the constant
    beginning is given, "a.". `package` resolves relative imports.
    """
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and _is_typing_only(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            argument = node.args[0]
            if called in ("import_module", "__import__"):
                first = argument.values[0] if isinstance(argument, ast.JoinedStr) and argument.values else argument
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    names.add(first.value)
                else:
                    raise ValueError(f"line {node.lineno}: the beginning of the imported name must be written out")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return names


@cache
def direct_imports(file: Path) -> frozenset[str]:
    """What one file imports; names of packages on the way (`a`, `a.b` of `a.b.c`) are left out, being docstrings only."""
    relative = file.relative_to(ROOT).with_suffix("")
    return frozenset(imported_names(file.read_text(encoding="utf-8"), ".".join(relative.parts[:-1])))


def closure(stage: str, stage_file: Path) -> set[str]:
    """Paths, relative to the root, that `dvc.yaml` must list for a stage, a module chosen by a param as a template."""
    found: set[str] = set()
    templated: set[Path] = set()
    todo, seen = [stage_file], {stage_file}
    while todo:
        file = todo.pop()
        relative = file.relative_to(ROOT).as_posix()
        empty = file.name == "__init__.py" and is_docstring_only(file)
        # A templated module is listed once, as the template; what it imports counts, whichever is chosen.
        if relative not in UNTRACKED and not empty and file not in templated:
            found.add(relative)
        for name in direct_imports(file):
            following = [path_of(name)]
            if name.endswith(".") and name.split(".")[0] in PACKAGES:
                chosen = CHOSEN.get(name, {}).get(stage)
                if chosen is None:
                    raise ValueError(f"{relative} chooses a module of {name}* by name: add what {stage} chooses to CHOSEN")
                following = [path_of(f"{name}{chosen}")]
                if chosen.startswith("${"):
                    folder = ROOT.joinpath(*name.strip(".").split("."))
                    found.add(f"{folder.relative_to(ROOT).as_posix()}/{chosen}.py")
                    following = [module for module in sorted(folder.glob("*.py")) if not module.name.startswith("_")]
                    templated.update(module for module in following if module is not None)
            for module in following:
                if module is not None and module not in seen:
                    seen.add(module)
                    todo.append(module)
    return found


def is_code(path: str) -> bool:
    """Whether a dependency is one of our modules, rather than data."""
    return path.endswith(".py") and path.split("/")[0] in PACKAGES


def stages() -> dict[str, tuple[Path, set[str]]]:
    """Stage name (without its matrix) -> its file and the code that `dvc.yaml` lists."""
    table = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    result = {}
    for name, stage in table.items():
        match = re.match(r"python -m (stages\.\w+)", stage["cmd"])
        if match is None:
            raise ValueError(f"dvc.yaml: the command of {name} is {stage['cmd']!r}, expected `python -m stages.<name> ...`")
        result[name] = (ROOT.joinpath(*match[1].split(".")).with_suffix(".py"), {d for d in stage["deps"] if is_code(d)})
    return result


def corrected(text: str, wanted: dict[str, set[str]]) -> str:
    """`dvc.yaml` with the code deps of each stage replaced by `wanted`; all else stays as it was."""
    lines: list[str] = []
    stage, inside = "", False
    for line in [*text.splitlines(), ""]:
        if inside and not line.startswith("      - "):
            lines += [f"      - {path}" for path in sorted(wanted[stage])]
            inside = False
        if match := re.match(r"  (\w+):$", line):
            stage = match[1]
        if line == "    deps:" and stage in wanted:
            inside = True
        if not (inside and line.startswith("      - ") and is_code(line[8:].strip())):
            lines.append(line)
    return "\n".join(lines).rstrip("\n") + "\n"


def main() -> int:
    """Print what differs; `--write` corrects `dvc.yaml`."""
    wanted, differs = {}, False
    for name, (file, listed) in stages().items():
        if not file.is_file():
            print(f"{name}: {file.relative_to(ROOT)} does not exist")
            differs = True
            continue
        wanted[name] = closure(name, file)
        for path in sorted(wanted[name] - listed):
            print(f"{name}: + {path}")
        for path in sorted(listed - wanted[name]):
            print(f"{name}: - {path}")
        differs |= wanted[name] != listed
    if "--write" in sys.argv[1:]:
        file = ROOT / "dvc.yaml"
        file.write_text(corrected(file.read_text(encoding="utf-8"), wanted), encoding="utf-8")
        return 0
    print("dvc.yaml differs from the imports" if differs else "dvc.yaml lists what the stages import")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
