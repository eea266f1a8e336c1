"""The key of a run: what DVC would compare to decide that its evaluation need not run again.

It is a hash of the command, params and code of every stage that the evaluation rests on, read from `dvc.yaml`, so it needs
no data: a fresh clone with nothing but records knows which runs are finished. Data that no stage makes count by their hash
in `dvc.lock`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from svam.files import FileError, sha256

CONSTANT = "check_params"
"""The stage whose output is always the same: nothing that follows from it changes."""


@dataclass(frozen=True)
class Stage:
    """A stage of `dvc.yaml` with its templates filled in."""

    command: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    params: tuple[str, ...]


@dataclass(frozen=True)
class Project:
    """What of a project decides keys, read once: `dvc.yaml`, the entries of `dvc.lock`, and the hashes of code."""

    pipeline: Mapping[str, Any]
    locked: Mapping[str, Any]
    code: Mapping[str, str]

    @classmethod
    def read(cls, root: Path) -> Project:
        """The project in a folder.

        Raises:
            FileError: there is no `dvc.yaml`.
        """
        lock = root / "dvc.lock"
        files = [file for folder in ("svam", "stages") for file in (root / folder).rglob("*.py")]
        return cls(
            pipeline=read_yaml(root / "dvc.yaml"), locked=read_yaml(lock)["stages"] if lock.is_file() else {},
            code={file.relative_to(root).as_posix(): sha256(file) for file in files},
        )  # fmt: skip


def read_yaml(file: Path) -> Any:
    """The values of a YAML file.

    Raises:
        FileError: there is none.
    """
    if not file.is_file():
        raise FileError(f"{file}: no such file; run from the root of the project")
    return YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))


def value_of(values: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key of the params."""
    found: Any = values
    for part in key.split("."):
        found = found[part]
    return found


def stages_of(pipeline: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Stage]:
    """Name, as DVC writes it (`distill@geometric`), -> stage, for these params; one without a matrix item is absent."""
    stages: dict[str, Stage] = {}

    def filled(text: str, item: Mapping[str, Any]) -> str:
        def value(match: re.Match[str]) -> str:
            key = match[1]
            return str(item[key.removeprefix("item.")] if key.startswith("item.") else value_of(values, key))

        return re.sub(r"\$\{([\w.]+)\}", value, text)

    for name, stage in pipeline["stages"].items():
        matrix = {
            key: value_of(values, items[2:-1]) if isinstance(items, str) else items
            for key, items in stage.get("matrix", {}).items()
        }
        for choice in product(*matrix.values()):
            item = dict(zip(matrix, choice, strict=True))
            outs = [out if isinstance(out, str) else next(iter(out)) for out in stage["outs"]]
            suffix = "@" + "-".join(map(str, choice)) if matrix else ""
            texts = (stage["deps"], outs, stage.get("params", []))
            stages[name + suffix] = Stage(filled(stage["cmd"], item), *(tuple(filled(t, item) for t in part) for part in texts))
    return stages


def _overlap(one: str, other: str) -> bool:
    """Whether one path is the other or lies below it."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def upstream(stages: Mapping[str, Stage], last: str = "evaluate") -> list[str]:
    """The names of a stage and of all that it rests on, but for the constant one, sorted."""
    found, todo = {last}, [last]
    while todo:
        deps = stages[todo.pop()].deps
        for name, stage in stages.items():
            if name not in found and name != CONSTANT and any(_overlap(dep, out) for dep in deps for out in stage.outs):
                found.add(name)
                todo.append(name)
    return sorted(found)


def work_of(project: Project, values: Mapping[str, Any], last: str = "evaluate") -> dict[str, Any]:
    """Everything that decides the evaluation: stage -> {command, params, code, data}.

    `values`: the params, with the run's arguments applied.
    """
    stages = stages_of(project.pipeline, values)
    made = [out for stage in stages.values() for out in stage.outs]
    work: dict[str, Any] = {}
    for name in upstream(stages, last):
        stage = stages[name]
        given = [dep for dep in stage.deps if not any(_overlap(dep, out) for out in made)]
        hashes = {dep["path"]: dep["md5"] for dep in project.locked.get(name, {}).get("deps", []) if "md5" in dep}
        work[name] = {
            "command": stage.command, "params": {key: value_of(values, key) for key in stage.params},
            "code": {dep: project.code[dep] for dep in given if dep in project.code},
            "data": {dep: hashes.get(dep, "unknown") for dep in given if dep not in project.code},
        }  # fmt: skip
    return work


def key_of(project: Project, values: Mapping[str, Any]) -> str:
    """The key of a run: `work_of` as a hash of 32 digits."""
    return digest(work_of(project, values))


def digest(value: Any) -> str:
    """A hash of JSON values, of 32 digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
