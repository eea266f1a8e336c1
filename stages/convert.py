"""Stage `convert`: a recorded data set of any supported format to one episode store, split and with statistics."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from svam.contract import EpisodeSource
from svam.episodes import sources
from svam.episodes.conversion import convert
from svam.machine import console, one_line_errors
from svam.params import Params, ParamsError, load_params

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def open_named_source(path: Path, params: Params) -> EpisodeSource:
    """The reader that `convert.source` names, imported only now: others may need libraries that are not installed."""
    name = params.convert.source
    available = sorted(module.name for module in pkgutil.iter_modules(sources.__path__))
    if name not in available:
        raise ParamsError(f"convert.source is {name!r}; available: {', '.join(available)}")
    only = params.collect.tasks or None if name == "metaworld" else None
    source: EpisodeSource = import_module(f"svam.episodes.sources.{name}").open_source(path, only)
    return source


@app.command()
@one_line_errors
def main(
    source_path: Annotated[Path, typer.Argument(help="The recorded data, in the format that convert.source names.")],
    out: Annotated[Path, typer.Argument(help="Store to write, a folder; replaces a previous one when it is whole.")],
    params: Annotated[Path, typer.Option(help="Parameter file: `convert`, `collect.tasks`, `seed`.")] = Path("params.yaml"),
) -> None:
    """Convert the data at SOURCE_PATH to the episode store OUT."""
    settings = load_params(params)
    source = open_named_source(source_path, settings)
    for note in source.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    convert(source, out, settings.convert, settings.seed)
    files = [file for file in out.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    console.print(f"{out}: {len(source)} episodes, {size:.1f} MB in {len(files)} files", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
