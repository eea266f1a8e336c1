"""What the commands of all stages share: the parameter file, errors in one line, and that DVC knows the code that runs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from svam.code import first_difference, stage_code
from svam.console import one_line_errors
from svam.errors import SvamError
from svam.launch import launch
from svam.params import Params, load_params

ParamsFile = Annotated[Path, typer.Option("--params", help="Parameter file.")]


def stage_command(function: Callable[..., None]) -> typer.Typer:
    """The command line of a stage: `function`'s own arguments, and `--params`, whose checked content it gets as `params`."""
    signature = inspect.signature(function, eval_str=True)

    @one_line_errors
    @wraps(function)
    def command(**arguments: Any) -> None:
        params = load_params(arguments["params"])
        _check_code(params)
        launch(params, Path(inspect.getfile(function)).stem)
        function(**{**arguments, "params": params})

    own = [parameter for name, parameter in signature.parameters.items() if name != "params"]
    file = inspect.Parameter("params", inspect.Parameter.KEYWORD_ONLY, default=Path("params.yaml"), annotation=ParamsFile)
    command.__signature__ = signature.replace(parameters=[*own, file])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, file]}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return app


def _check_code(params: Params) -> None:
    """Under DVC, stop a stage whose digests are not of the code that would run: DVC would record new results for old code.

    Raises:
        SvamError: the stage `code` has not run since a module changed.
    """
    stage = os.environ.get("DVC_STAGE", "code").partition("@")[0]
    recorded = Path(f"data/code/{stage}.txt")
    if stage == "code":
        return
    text = recorded.read_text(encoding="utf-8") if recorded.is_file() else ""
    module = first_difference(stage_code(stage, params.modules), text)
    if module is not None:
        raise SvamError(
            f"{recorded} is not of the code that is here: {module} differs; run `dvc repro code`, then the stage again"
        )
