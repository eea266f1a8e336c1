"""`python -m svam.analysis`: what more than one trained policy foresees and does."""

from __future__ import annotations

import typer

from svam.analysis.side_by_side import side_by_side

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def commands() -> None:
    """Look at trained policies."""


app.command("side-by-side")(side_by_side)


if __name__ == "__main__":
    app()
