"""Reading overlays, `<name>.yaml` beside this module (a dotted key and its value a line), and writing them into params.yaml.

An overlay may begin with `extends: [<name>, ...]`, whose keys it then has too.
"""

from __future__ import annotations

import json
import re
import subprocess
import textwrap
from collections.abc import Iterator, Mapping
from decimal import Decimal
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node

from svam.agreement import check_agreement
from svam.errors import ParamsError, describe, did_you_mean, shown
from svam.files import write_text
from svam.params import Params, load_params

FOLDER = Path(__file__).parent
WIDTH = 128
PLAIN = re.compile(r"(?!(?:true|false|null|yes|no|on|off|y|n)$)[A-Za-z][\w./-]*", re.IGNORECASE)
"""Texts that no reader of YAML takes for anything else without quotes."""


class Change(NamedTuple):
    """A dotted key that a preset sets, its value in params.yaml, and the preset's."""

    key: str
    old: Any
    new: Any


def preset_names() -> list[str]:
    """Those that can be applied; a name that begins with `_` is for others to extend."""
    return sorted(file.stem for file in FOLDER.glob("[a-z]*.yaml"))


def overlay_of(name: str) -> dict[str, Any]:
    """Dotted key -> value.

    Raises:
        ParamsError: there is no such preset.
    """
    if name not in preset_names():
        raise ParamsError(f"{name!r} is no preset{did_you_mean(name, preset_names())}; those are {', '.join(preset_names())}")
    return _read_overlay(name)


def _read_overlay(name: str) -> dict[str, Any]:
    values: dict[str, Any] = _load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    extended = [_read_overlay(other) for other in values.pop("extends", [])]
    return {key: value for overlay in [*extended, values] for key, value in overlay.items()}


def about(name: str) -> str:
    """The first sentence of the overlay's comment."""
    comment = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("\n\n")[0]
    lines = [line.removeprefix("#").strip() for line in comment.splitlines() if line.startswith("#")]
    return re.split(r"(?<=\.)\s", " ".join(lines))[0]


def _load(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def changes_by(overlay: Mapping[str, Any], file: Path) -> list[Change]:
    """What the overlay sets, also where `file` has that value, in the file's order.

    Raises:
        ParamsError: `file` is no valid params, or lacks a key.
    """
    load_params(file)
    text = file.read_text(encoding="utf-8")
    values = _load(text)
    return [Change(key, reduce(getitem, key.split("."), values), overlay[key]) for key in _places(text, overlay, file)]


def as_arguments(overlay: Mapping[str, Any], present: Mapping[str, Any] | None = None) -> list[str]:
    """key=value, as `dvc exp run -S` takes them; ++key=value of a mapping, which may bring names that are not there yet.

    present: the values that the params have. DVC adds to a mapping that has entries, and takes none away.

    Raises:
        ParamsError: such an entry would have to go, or a name in a mapping is none that DVC reads.
    """
    for key, value in overlay.items():
        if staying := _staying((present or {}).get(key), value):
            raise ParamsError(
                f"{key} is {shown((present or {})[key])} and would be {shown(value)}, but DVC adds to a mapping and takes "
                f"nothing away, so that {', '.join(staying)} would stay: use `apply`"
            )
    return [f"{'++' if isinstance(value, dict) else ''}{key}={_argument(value, key)}" for key, value in overlay.items()]


def _staying(old: Any, new: Any) -> list[str]:
    """The names in a mapping that another one, merged into it, does not replace and does not have."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return []
    below = (f"{name}.{inner}" for name in old.keys() & new.keys() for inner in _staying(old[name], new[name]))
    return sorted([*map(str, old.keys() - new.keys()), *below])


def _argument(value: Any, key: str) -> str:
    """A value as DVC's parser of overrides takes it: texts in quotes, but for the names in a mapping, which have none."""
    if isinstance(value, list):
        return f"[{', '.join(_argument(item, key) for item in value)}]"
    if isinstance(value, dict):
        if strange := [name for name in value if not PLAIN.fullmatch(str(name))]:
            raise ParamsError(f"{key} has the name {strange[0]!r}, which no argument of DVC can have: use `apply`")
        return f"{{{', '.join(f'{name}: {_argument(item, key)}' for name, item in value.items())}}}"
    if isinstance(value, str):  # before a quote, and nowhere else, the parser takes a backslash for an escape
        return '"' + re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), value) + '"'
    return json.dumps(value)


def with_overlay(overlay: Mapping[str, Any], file: Path, name: str) -> tuple[Params, str]:
    """The params that `file` would hold, and its text.

    Raises:
        ParamsError: a key that `file` lacks, or a value that is not accepted; the message names the preset.
    """
    text = with_values(file.read_text(encoding="utf-8"), overlay, file)
    try:
        return Params.model_validate(_load(text)), text
    except ValidationError as error:
        raise ParamsError(describe(error, f"{file} with preset {name}")) from None


def check(params: Params, file: Path, name: str) -> None:
    """As `stages.check_params` does; raises `ParamsError` that names the preset, or `MachineError` for a missing simulator."""
    try:
        check_agreement(params)
    except ParamsError as error:
        raise ParamsError(f"{file} with preset {name}: {error}") from None


def with_values(text: str, values: Mapping[str, Any], file: Path) -> str:
    """The text of `file` with other values; what they do not replace stays as it is, to the byte.

    Raises:
        ParamsError: a key is not there.
    """
    for key, node in reversed(_places(text, values, file).items()):
        start, value = node.start_mark.index, _written(values[key])
        if isinstance(values[key], list):
            value = _folded(value, start - text.rfind("\n", 0, start) - 1)
        apart = text[start - 1] == ":" or _has_lines(node)  # of nothing there is only a colon; lines may begin below their key
        text = text[:start] + " " * apart + value + text[_end(node) :]
    return text


def write(text: str, file: Path, changes: list[Change], force: bool) -> None:
    """Write params, unless edits that git does not have are in the sections that change.

    Raises:
        ParamsError: there are such edits, or git has no commit of the file to tell, and not `force`.
    """
    if changes and not force:
        committed, here = _load(_committed(file)) or {}, _load(file.read_text(encoding="utf-8"))
        sections = dict.fromkeys(change.key.split(".")[0] for change in changes)
        if edited := [section for section in sections if committed.get(section) != here[section]]:
            raise ParamsError(
                f"{file}: git's last commit has other values in {', '.join(edited)}; commit them, or pass --force"
            )
    write_text(file, text)


def _committed(file: Path) -> str:
    """The file's text in git's last commit; raises `ParamsError` where there is none."""
    command, folder = ["git", "show", f"HEAD:./{file.name}"], file.absolute().parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=False)
    except OSError as error:
        said = f"git cannot be run ({error.strerror})"
    else:
        if done.returncode == 0:
            return done.stdout
        said = f"git has no commit of it ({(done.stderr.strip() or 'no reason given').splitlines()[0]})"
    raise ParamsError(f"{file}: {said}, so what would be replaced might be nowhere else; commit it, or pass --force")


def _places(text: str, keys: Mapping[str, Any], file: Path) -> dict[str, Node]:
    """Of each key, where its value is in the text; in the text's order.

    Raises:
        ParamsError: a key is not there.
    """
    found = dict(_nodes(YAML(pure=True).compose(text)))
    for key in keys:
        if key not in found:
            raise ParamsError(f"{file}: has no key {key!r}, which the preset sets{did_you_mean(key, found)}")
    return {key: node for key, node in found.items() if key in keys}


def _nodes(mapping: MappingNode, prefix: str = "") -> Iterator[tuple[str, Node]]:
    for key, node in mapping.value:
        yield prefix + str(key.value), node
        if isinstance(node, MappingNode):
            yield from _nodes(node, f"{prefix}{key.value}.")


def _has_lines(node: Node) -> bool:
    """Whether a value is a list or mapping over several lines, without brackets."""
    return isinstance(node, CollectionNode) and not node.flow_style and bool(node.value)


def _end(node: Node) -> int:
    """The place after a value; of several lines, after the last one's."""
    if _has_lines(node):
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _written(value: Any) -> str:
    """A value in YAML, as a person writes it: texts without quotes where they need none, numbers without an exponent, which
    readers of YAML 1.1 take for text."""
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_written(k)}: {_written(v)}' for k, v in value.items())}}}"
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f")
    return value if isinstance(value, str) and PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def _folded(line: str, column: int) -> str:
    """A list that begins at `column`, over several lines if need be; not within texts in quotes, which would change them."""
    if '"' in line:
        return line
    wrapper = textwrap.TextWrapper(WIDTH - column, break_long_words=False, break_on_hyphens=False)
    wrapper.subsequent_indent = " " * (column + 1)
    return wrapper.fill(line)
