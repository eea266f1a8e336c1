"""The one base of errors that a user can cause and mend: their message is one true sentence with the way out. And the words in
which pydantic's errors are told."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails


class SvamError(Exception):
    """What the user's files, parameters or machine are not, in one sentence. Anything else that is raised is a fault of this
    code, and keeps its traceback."""


class ParamsError(SvamError, ValueError):
    """A parameter is missing, unknown, out of range, or contradicts another or the data; the message names the key, its
    value and what is accepted."""


class MachineError(SvamError, RuntimeError):
    """The computer lacks something that a parameter asks for; the message says what and how to get it."""


_ACCEPTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "int_parsing": "a whole number", "float_type": "a number",
    "finite_number": "a finite number", "string_type": "a text", "bool_type": "true or false", "bool_parsing": "true or false",
    "list_type": "a list, such as [a, b]", "tuple_type": "a list, such as [a, b]",
    "dict_type": "keys and values, such as {{a: 1}}", "model_type": "keys and values, such as {{a: 1}}",
    "greater_than": "more than {gt}", "greater_than_equal": "at least {ge}", "less_than": "less than {lt}",
    "less_than_equal": "at most {le}", "multiple_of": "a multiple of {multiple_of}", "literal_error": "{expected}",
    "too_short": "a list of at least {min_length}", "too_long": "a list of at most {max_length}",
}  # fmt: skip
"""What a person may write instead, for each kind of error of pydantic."""
OF_PATTERN = {
    r"\S": "a sentence",
    r"^[0-9a-f]{7,40}$": "a commit, 7 to 40 of the digits 0-9 and a-f",
    r"^[0-9a-f]{40}$": "a whole commit, 40 of the digits 0-9 and a-f",
    r"^[0-9a-f]{64}$": "a SHA-256, 64 of the digits 0-9 and a-f",
    r"^wss?://\S+$": "an address such as ws://localhost:8000",
    r"^(actions|expert_actions|state|proprioception)(?:\[(\d{1,6})(?::(\d{1,6}))?\])?$":
        "a vector, one of its columns or some of them, such as actions, state[6] or proprioception[0:6]; the vectors are "
        "actions, expert_actions, state and proprioception",
    r"^[A-Za-z0-9_-]+$": "a name of letters, digits, '_' and '-'",
    r"^[A-Za-z0-9][A-Za-z0-9_.-]*$": "a name of letters, digits, '_', '.' and '-' that begins with a letter or digit",
}  # fmt: skip
"""The same for each pattern of a text; of others, the names that they list."""
_UNION = re.compile(r"int|str|float|bool|constrained-\w+|literal\[.*\]|\w+\[.*\]")


def _accepted(problem: ErrorDetails) -> str:
    context = problem.get("ctx", {})
    if problem["type"] == "string_pattern_mismatch":
        names = context["pattern"].strip("^()$").split("|")
        said = OF_PATTERN.get(context["pattern"])
        return said or f"one of {', '.join(names)}{did_you_mean(problem['input'], names)}"
    words = _ACCEPTED.get(problem["type"])
    if words is None:
        return problem["msg"]
    close = re.findall(r"'(.*?)'", context.get("expected", ""))
    return words.format(**context) + did_you_mean(problem["input"], close)


def did_you_mean(value: object, names: Iterable[str]) -> str:
    """ "; did you mean ...?" where one of `names` is near `value`, else nothing."""
    close = get_close_matches(str(value).lower(), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value: object) -> str:
    """A value as a person writes it in YAML, cut after 80 characters."""
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def describe(error: ValidationError, file: Path | str, prefix: str = "") -> str:
    """One line per key: `file`, the dotted key (after `prefix`), the value there and what is accepted."""
    lines: dict[str, list[str]] = {}
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        if len(path) > 1 and _UNION.fullmatch(path[-1]):  # one of several types that a value may have
            path.pop()
        key = prefix + ".".join(path) or "(whole file)"
        if problem["type"] == "extra_forbidden":
            lines[f"unknown key '{key}' (value {shown(problem['input'])}); remove it or correct its name"] = []
        elif problem["type"] == "missing":
            lines[f"key '{key}' is missing"] = []
        elif problem["type"] == "value_error":
            lines[f"{key}: {problem['msg'].removeprefix('Value error, ')}"] = []
        else:
            lines.setdefault(f"{key} is {shown(problem['input'])}; expected ", []).append(_accepted(problem))
    return "\n".join(f"{file}: {line}{' or '.join(accepted)}" for line, accepted in lines.items())
