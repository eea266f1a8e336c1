"""Which params of a run are not the project's defaults.

`defaults.yaml` holds the defaults, since `params.yaml` is what a user edits. After a default was changed on purpose,
`python -m svam.report.defaults` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from svam.console import one_line_errors
from svam.files import read_yaml, write_text
from svam.params import Params, load_params

FILE = Path(__file__).with_suffix(".yaml")
ELSEWHERE = ("machine", "foresight", "benchmark")
"""Sections on which nothing that the report shows depends."""
HEAD = "# The defaults that a report compares a run's params with; written by `python -m svam.report.defaults`.\n"


def flat_values(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, of all params but those `ELSEWHERE`. Lists and users' own mappings are values."""
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            values |= flat_values(value, f"{prefix}{name}.") if prefix or name not in ELSEWHERE else {}
        else:
            values[prefix + name] = section.model_dump()[name]
    return values


def changed_params(params: Params) -> list[tuple[str, str, str]]:
    """Key, value and default of every param that is not the default, as JSON; a default that is unknown is empty."""
    defaults = read_yaml(FILE)
    return [
        (key, json.dumps(value, ensure_ascii=False), json.dumps(defaults[key], ensure_ascii=False) if key in defaults else "")
        for key, value in flat_values(params).items()
        if key not in defaults or value != defaults[key]
    ]


def defaults_text(params: Params) -> str:
    """What `defaults.yaml` holds where these params are the defaults: a line for each."""
    return HEAD + "".join(f"{key}: {json.dumps(value)}\n" for key, value in flat_values(params).items())


@one_line_errors
def main() -> None:
    """Make the params of `params.yaml` the defaults."""
    write_text(FILE, defaults_text(load_params()))


if __name__ == "__main__":
    main()
