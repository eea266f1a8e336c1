"""`python -m svam.benchmark`: write what `stages.benchmark gpu` measured between two marks of the benchmark's README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svam.benchmark.gpu import table
from svam.console import one_line_errors
from svam.files import FileError, read_json
from svam.report.readme import replace_between

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
BEGIN, END = "<!-- gpu -->", "<!-- /gpu -->"


@app.command()
@one_line_errors
def main(
    measured: Annotated[Path, typer.Argument(help="What the part gpu wrote.")] = Path("data/benchmark/gpu.json"),
    readme: Annotated[Path, typer.Option(help="The page to rewrite.")] = Path(__file__).with_name("README.md"),
) -> None:
    """Replace what stands between the marks."""
    found = read_json(measured)
    if not isinstance(found, dict) or found.get("part") != "gpu":
        raise FileError(f"{measured}: expected what `python -m stages.benchmark gpu {measured}` writes")
    replace_between(readme, BEGIN, END, table(found))


if __name__ == "__main__":
    app()
