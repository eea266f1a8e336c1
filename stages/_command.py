"""What the commands of all stages share: the parameter file, errors in one line, the account of time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from svam.console import one_line_errors
from svam.params import load_params

ParamsFile = Annotated[Path, typer.Option("--params", help="Parameter file.")]


def stage_command(function: Callable[..., None]) -> typer.Typer:
    """The command line of a stage: `function`'s own arguments, and `--params`, whose checked content it gets as `params`."""
    signature = inspect.signature(function, eval_str=True)

    @one_line_errors
    @wraps(function)
    def command(**arguments: Any) -> None:
        function(**{**arguments, "params": load_params(arguments["params"])})

    own = [parameter for name, parameter in signature.parameters.items() if name != "params"]
    file = inspect.Parameter("params", inspect.Parameter.KEYWORD_ONLY, default=Path("params.yaml"), annotation=ParamsFile)
    command.__signature__ = signature.replace(parameters=[*own, file])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, file]}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return app
