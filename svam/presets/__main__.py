"""`python -m svam.presets`: show overlays of params.yaml, write one into it, and say what a run with it would cost."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from svam.agreement import lacking, notes
from svam.console import console, one_line_errors
from svam.errors import ParamsError, shown
from svam.params import load_params
from svam.presets.overlay import Change, about, as_arguments, changes_by, check, overlay_of, preset_names, with_overlay, write

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
Name = Annotated[str, typer.Argument(help="As `list` prints them.")]
ParamsFile = Annotated[Path, typer.Option("--params", help="Parameter file.")]
PARAMS = Path("params.yaml")
STORE = Path("data/episodes.zarr")


def _changes(name: str, params: Path) -> list[Change]:
    return [change for change in changes_by(overlay_of(name), params) if change.old != change.new]


@app.command("list")
@one_line_errors
def list_presets() -> None:
    """Print each preset with what it is for."""
    for name in preset_names():
        typer.echo(f"{name:16s} {about(name)}")


@app.command()
@one_line_errors
def show(name: Name, params: ParamsFile = PARAMS) -> None:
    """Print what a preset sets, and which values that replaces."""
    for key, old, new in changes_by(overlay_of(name), params):
        typer.echo(f"{key}: {shown(new)}   # {'as it is' if old == new else f'in place of {shown(old)}'}")


@app.command("apply")
@one_line_errors
def apply_preset(
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Also into sections with edits that git does not have.")] = False,
    params: ParamsFile = PARAMS,
) -> None:
    """Write a preset into params.yaml, whose comments and other values stay, and print what changed."""
    changes = _changes(name, params)
    applied, text = with_overlay(overlay_of(name), params, name)
    check(applied, params, name)
    write(text, params, changes, force)
    for key, old, new in changes:
        typer.echo(f"{key}: {shown(old)} -> {shown(new)}")
    for note in (*lacking(applied), *notes(applied)):
        console.print(f"NOTE {note}", style="yellow", soft_wrap=True)
    console.print(f"{params}: {len(changes)} values changed", highlight=False)


@app.command()
@one_line_errors
def args(name: Name, params: ParamsFile = PARAMS) -> None:
    """Print as arguments of `dvc exp run` what a preset would change, quoted for a shell."""
    with_overlay(overlay_of(name), params, name)
    changes = _changes(name, params)
    arguments = as_arguments({key: new for key, _, new in changes}, {key: old for key, old, _ in changes})
    typer.echo(shlex.join(word for argument in arguments for word in ("-S", argument)))


@app.command()
@one_line_errors
def plan(
    name: Name,
    params: ParamsFile = PARAMS,
    card: Annotated[
        str | None,
        typer.Option(
            help="Whose peak and memory: rtx3090, rtx4090, a100, h100, h200, or cpu (two cores). Without it that of "
            "machine.device: cpu, or an h100."
        ),
    ] = None,
    share: Annotated[float, typer.Option(min=0.001, max=1.0, help="Of the peak that is reached.")] = 0.15,
    store: Annotated[Path, typer.Option(help="Measured, where its data is what the preset asks for.")] = STORE,
    rows: Annotated[int | None, typer.Option(min=2, help="Time steps of data that is not collected here.")] = None,
    actions: Annotated[int | None, typer.Option(min=1, help="Dimensions of its actions.")] = None,
    proprioception: Annotated[int | None, typer.Option(min=1, help="Dimensions of its proprioception.")] = None,
) -> None:
    """Print what a run with a preset would take: parameters, disk, memory, FLOPs and hours. Nothing is run."""
    planned, _ = with_overlay(overlay_of(name), params, name)
    present = load_params(params)
    same = all(getattr(present, section) == getattr(planned, section) for section in ("seed", "collect", "convert"))
    from svam.presets.data import estimated, measured
    from svam.presets.plan import CARDS, report

    card = card or ("cpu" if planned.machine.device == "cpu" else "h100")
    if card not in CARDS:
        raise ParamsError(f"--card is {card!r}; expected one of {', '.join(CARDS)}")
    data = measured(store) if same and store.exists() else estimated(planned, rows, actions, proprioception)
    typer.echo(report(planned, data, card, share, params.absolute().parent))


if __name__ == "__main__":
    app(prog_name="python -m svam.presets")
