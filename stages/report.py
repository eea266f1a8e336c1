"""Stage `report`: one flat metrics file, tables and figures of a run; cheap, and what git and `dvc exp show` see."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svam.console import console, one_line_errors
from svam.files import whole_directory, write_json
from svam.params import load_params

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_line_errors
def main(
    out: Annotated[Path, typer.Argument(help="Folder for metrics.json, results.md, the figures (PNG) and plots/ (JSON).")],
    results: Annotated[Path, typer.Option(help="Folder that evaluate wrote.")],
    models: Annotated[Path, typer.Option(help="Folder that holds video/ and decouplers/.")],
    backbones: Annotated[Path, typer.Option(help="Folder that holds the four backbones.")],
    live: Annotated[Path, typer.Option(help="Folder of DVCLive's training curves.")],
    params: Annotated[Path, typer.Option(help="Parameter file: `report`, `distill.branches`.")] = Path("params.yaml"),
) -> None:
    """Gather the metrics of every stage; print the flat ones."""
    everything = load_params(params)
    from svam.report import tables
    from svam.report.drawing import draw_all

    branches = everything.distill.branches
    measured = tables.gather(results, models, backbones, branches)
    curves = tables.curves_of(live, branches)
    with whole_directory(out) as folder:
        flat = tables.flat_metrics(measured)
        write_json(folder / "metrics.json", flat)
        (folder / "results.md").write_text(tables.markdown(measured), encoding="utf-8")
        for name, lines in tables.plot_tables(measured, curves).items():
            write_json(folder / "plots" / f"{name}.json", lines)
        draw_all(folder, measured, curves, results, models, everything.report)
    console.print(flat, highlight=False)
    console.print(f"tables and figures: {out}/results.md, {out}/*.png", highlight=False)


if __name__ == "__main__":
    app()
