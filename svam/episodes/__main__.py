"""`python -m svam.episodes`: look into an episode store, check it, see its episodes, export it; list a data set's files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from svam.console import console, one_line_errors
from svam.files import FileError, write_json

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode="markdown", help=__doc__
)
Store = Annotated[Path, typer.Argument(help="Episode store that the convert stage wrote, for example data/episodes.zarr.")]
_WIDTH = 150
"""Columns where the output is no terminal, such as a file."""


def _output() -> Console:
    """Results go to the standard output; progress, times and errors to the standard error."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, markup=False, emoji=False)


@app.command()
@one_line_errors
def inspect(
    path: Annotated[Path, typer.Argument(help="Episode store, for example data/episodes.zarr; or a recording.")],
    tasks: Annotated[int, typer.Option(min=1, help="Show this many tasks, those of most episodes first.")] = 20,
    episodes: Annotated[int, typer.Option(min=1, help="Show this many episodes.")] = 20,
    recording: Annotated[bool, typer.Option("--recording", help="PATH is a data set in the format of convert.source.")] = False,
    params: Annotated[Path, typer.Option(help="Parameter file, for --recording: convert.source, options, cameras.")] = Path(
        "params.yaml"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, for programs.")] = False,
) -> None:
    """Print what is inside the store PATH; of a recording (--recording), its episodes and what convert would note.

    Episodes by number and name (for convert.episodes and convert.drop), notes of the conversion, tasks and instructions, split,
    cameras, vectors with their statistics, labels, provenance, and each array's size on disk.
    Statistics that the store does not keep are computed from its training episodes; no frame is read.
    """
    from svam.episodes.inspection import facts, print_facts, print_recording, recording_facts

    if recording:
        from svam.episodes.options import open_recording
        from svam.params import load_params

        loaded = load_params(params)
        found = recording_facts(open_recording(path, loaded), loaded.convert)
    else:
        found = facts(path)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    elif recording:
        print_recording(found, _output(), episodes)
    else:
        print_facts(found, _output(), tasks, episodes)


@app.command()
@one_line_errors
def validate(
    path: Store,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are faults too.")] = False,
) -> None:
    """Read every byte of the store PATH and check it; exit with status 1 if anything is wrong.

    Faults: missing, damaged or left-over bytes, values out of range or not finite, timestamps that do not increase,
    episodes that are not as they were converted (checksums) or are there twice, statistics that are not those of the
    training episodes. Warnings, which may be meant: gaps in time, blank or frozen cameras, action dimensions that never
    change, outliers, equal frames under different instructions, files that are not the store's.
    """
    from svam.episodes.validation import validate as run

    checks, output = run(path), _output()
    marks = {"fault": ("✗", "red"), "warning": ("!", "yellow"), "fine": ("✓", "green")}
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark, style = marks["fault" if check.faults else "warning" if check.warnings else "fine"]
        output.print(Text.assemble((mark, style), f" {check.name:{width}}  {check.text()}"), soft_wrap=True)
    faults, warnings = sum(len(check.faults) for check in checks), sum(len(check.warnings) for check in checks)
    output.print(f"{path}: {faults} faults, {warnings} warnings", soft_wrap=True)
    if faults or (strict and warnings):
        raise typer.Exit(1)


@app.command()
@one_line_errors
def show(
    path: Store,
    episode: Annotated[int, typer.Option(help="Number of the episode, from 0.")],
    out: Annotated[Path, typer.Option(help="Folder for a picture (.png) and a film (.mp4), named by the number.")],
) -> None:
    """Draw one episode to look at: a contact sheet (PNG), and a film (mp4) of all cameras above the action curves."""
    from svam.episodes.show import show_episode

    for file in show_episode(path, episode, out):
        console.print(str(file), highlight=False, markup=False, soft_wrap=True)


@app.command()
@one_line_errors
def export(
    path: Annotated[Path, typer.Argument(help="Episode store, or the folder of results that evaluate wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, which must not be there.")],
    layout: Annotated[Literal["lerobot"], typer.Option("--format", help="LeRobotDataset v3.0.")] = "lerobot",
    crf: Annotated[int, typer.Option(min=0, max=51, help="Loss of the films' pictures: 0 the least, 51 the most.")] = 10,
    pixel_format: Annotated[
        Literal["yuv420p", "yuv444p"],
        typer.Option(help="yuv420p halves the resolution of colour, which every player shows; yuv444p keeps it."),
    ] = "yuv420p",
) -> None:
    """Write all episodes of PATH to OUT for other software: vectors as they are, pictures as films with a loss that is stated.

    Of results, the rollouts that were recorded (evaluate.videos, evaluate.record_actions). Training episodes come before
    held-out ones. An export that was killed starts over.
    """
    from svam.episodes.export import open_recording
    from svam.episodes.lerobot import write_lerobot

    for line in write_lerobot(open_recording(path), out, crf, pixel_format):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
@one_line_errors
def manifest(
    paths: Annotated[list[Path], typer.Argument(help="Folders of recorded data sets, in any format.", metavar="PATH...")],
    out: Annotated[Path, typer.Argument(help="JSON file to write, outside those folders.")],
) -> None:
    """List the names (with `/`) and sizes of all files below PATH in OUT, sorted and without times; links are followed. Of
    several folders the names begin with the folder's.

    For data sets that are too large for DVC to read and hash file by file: write the manifest, set convert.depends_on to
    it, and write it again whenever the data may have changed. Equal lists are equal bytes, so nothing runs again without
    need. What is then trusted: that a file whose name and size did not change has the same contents. A frame edited in place,
    or a file replaced by another of exactly its size, is not noticed: then convert again with `dvc repro --force convert`.
    """
    sizes: dict[str, int] = {}
    for path in paths:
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(path)):
            raise FileError(f"{out}: lies below {path}, where it would list itself; name a file outside")
        prefix = f"{path.as_posix()}/" if len(paths) > 1 else ""
        sizes |= {f"{prefix}{name}": size for name, size in _sizes(path).items()}
    total = sum(sizes.values())
    write_json(out, {"schema_version": 1, "count": len(sizes), "bytes": total, "files": sizes})
    console.print(f"{out}: {len(sizes)} files, {decimal(total)}", highlight=False, markup=False, soft_wrap=True)


def _sizes(path: Path) -> dict[str, int]:
    """The bytes of all files below a folder, by name."""
    sizes: dict[str, int] = {}
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise error

    try:
        for parent, folders, names in os.walk(path, onerror=refuse, followlinks=True):
            folders.sort()  # which decides by what name a folder is listed that a link leads to as well
            if (real := os.path.realpath(parent)) in seen:  # a link back to where we were
                folders.clear()
                continue
            seen.add(real)
            sizes |= {file.relative_to(path).as_posix(): file.stat().st_size for file in (Path(parent, n) for n in names)}
    except OSError as error:
        raise FileError(f"{error.filename}: {error.strerror or error}") from None
    if not sizes:
        raise FileError(f"{path}: holds no files")
    return sizes


if __name__ == "__main__":
    app(prog_name="python -m svam.episodes")
