"""Stage `report`: one flat metrics file, tables, figures and a page of a run; cheap, and what git and `dvc exp show` see."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages._command import stage_command
from svam.console import console
from svam.files import whole_directory, write_json
from svam.params import Params


@stage_command
def app(
    params: Params,
    out: Annotated[Path, typer.Argument(help="Folder for index.html, metrics.json, results.md, figures (PNG), plots/.")],
    films: Annotated[Path, typer.Option(help="Folder for a film of every recorded rollout.")],
    results: Annotated[Path, typer.Option(help="Folder that evaluate wrote.")],
    video: Annotated[Path, typer.Option(help="Video model of the finetune_video stage.")],
    decouplers: Annotated[Path, typer.Option(help="Folder of the distill stage that holds one folder per branch.")],
    backbones: Annotated[Path, typer.Option(help="Folder that holds the four backbones.")],
    live: Annotated[Path, typer.Option(help="Folder of DVCLive's training curves.")],
    manifest: Annotated[Path, typer.Option(help="Manifest of the S-VAM folder: the weights' sizes and SHA-256.")],
    foresight: Annotated[Path, typer.Option(help="Folder of the foresight stage, whose figures the page points to.")],
    compare: Annotated[Path, typer.Option(help="Folder of comparisons, which the page points to.")],
) -> None:
    """Gather the metrics of every stage; print the flat ones."""
    from svam.report import tables
    from svam.report.figures import draw_all
    from svam.report.films import draw_films
    from svam.report.page import Beside, write_page

    branches = params.distill.branches
    run = tables.gather(results, video, decouplers, backbones, branches)
    curves = tables.curves_of(live, branches)
    with whole_directory(films) as folder:
        posters = draw_films(folder, results, run.rates_hz)
    with whole_directory(out) as folder:
        flat = tables.flat_metrics(run)
        write_json(folder / "metrics.json", flat)
        (folder / "results.md").write_text(tables.markdown(run, params.report.note), encoding="utf-8")
        for name, lines in tables.plot_tables(run, curves).items():
            write_json(folder / "plots" / f"{name}.json", lines)
        draw_all(folder, run, curves, results, video, params.report)
        write_page(folder, run, params, Beside(out, films, foresight, compare, posters), results, manifest)
    console.print(flat)
    console.print(f"on one page: {out}/index.html; tables and figures: {out}/results.md, {out}/*.png")


if __name__ == "__main__":
    app()
