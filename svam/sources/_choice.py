"""What every source does with `svam.contract.Choice`, and at its end."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import EVERYTHING, Choice, ContractError, Episode, Segment
from svam.errors import ParamsError
from svam.files import FileError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""The id of a data set on the hub, owner/name."""
LABELS = "depth and segmentation are of the camera {!r}, with which convert.cameras does not begin: left out"
"""A note on labels of a set's first camera."""
TRAINING = {"train", "training"}
"""How sets call the part that is trained on."""


def chosen_cameras(
    choice: Choice, available: Sequence[str], where: Path, prefix: str = "", forms: Mapping[str, str] | None = None
) -> list[str]:
    """The cameras to read, by the source's names, in the order asked for: all of `available` where none is.

    A name counts with and without the format's `prefix` ("observation.images." for LeRobot); `forms` maps others to names.

    Raises:
        ParamsError: one is asked for that is not there, or twice.
    """
    known = {name.removeprefix(prefix): name for name in available} | {name: name for name in available} | dict(forms or {})
    chosen = [known.get(name) or known.get(name.removeprefix(prefix), "") for name in choice.cameras]
    if "" in chosen:
        absent = choice.cameras[chosen.index("")]
        raise ParamsError(f"convert.cameras names {absent!r}, but {where} has {', '.join(available) or 'none'}")
    if twice := [name for name in chosen if chosen.count(name) > 1]:
        raise ParamsError(f"convert.cameras names {twice[0]!r} twice")
    return chosen or list(available)


def existing_folder(path: Path) -> Path:
    """`path`; `FileError` where it is no folder."""
    if path.is_file():
        raise FileError(f"{path}: it is a file, expected the folder of a data set")
    if not path.is_dir():
        hub = "; to fetch the data set of this id from the hub, set convert.revision to its commit"
        raise FileError(f"{path}: no such directory{hub if HUB_ID.fullmatch(path.as_posix()) else ''}")
    return path


def contents(folder: Path) -> str:
    """The first names in a folder, for a message about what it lacks."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return (", ".join(names[:5]) or "nothing") + ", ..." * (len(names) > 5)


def lies_there(root: Path, path: Path) -> str:
    """For a file below `root` that is missing: what its nearest folder holds."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    return f"{'the folder' if folder == root else folder.relative_to(root)} holds {contents(folder)}"


def chosen_instruction(choice: Choice, own: str | None, where: str) -> str:
    """The sentence of an episode: `convert.instruction`, else its own, else `convert.missing_instruction`.

    Raises:
        FileError: there is none of the three, or it is no text.
    """
    sentence = choice.instruction or (own or "").strip() or choice.missing_instruction
    if not sentence:
        raise FileError(
            f"{where}: no instruction; set convert.missing_instruction to the sentence of episodes without one, or "
            "convert.instruction to one for all"
        )
    try:
        sentence.encode()
    except UnicodeEncodeError:  # JSON can spell half a character
        raise FileError(f"{where}: the instruction {sentence!r} is not Unicode text; set convert.instruction") from None
    return sentence


def own_task(choice: Choice, own: str | None, where: str) -> str:
    """The task of an episode without another name for it: its own sentence, whatever `convert.instruction` says in its place;
    where it has none that is sound, what `chosen_instruction` says, with its errors."""
    with suppress(FileError):
        return chosen_instruction(EVERYTHING, own, where)
    return chosen_instruction(choice, own, where)


def rate_notes(times: NDArray[np.floating[Any]], rate_hz: float, where: str) -> list[str]:
    """A note where timestamps (n,) in seconds are not `rate_hz` apart, to 4 %."""
    step = float(np.median(np.diff(times))) if times.ndim == 1 and len(times) > 1 else 1 / rate_hz
    if abs(step * rate_hz - 1) <= 0.04:
        return []
    hint = f"; if the timestamps are right, set convert.rate_hz to {1 / step:g}" if 0.001 < step < 10 else ""
    return [f"{where}: timestamps are {step:g} s apart, but the rate is {rate_hz:g} Hz, at which it is stored{hint}"]


def segments_of(sentences: Sequence[str]) -> tuple[Segment, ...]:
    """The parts of an episode whose rows say `sentences`; none where all say the same. An empty one goes on with the one before
    (at the start, with the first that is not empty)."""
    told = next((sentence.strip() for sentence in sentences if sentence.strip()), "")
    lines = [told := sentence.strip() or told for sentence in sentences]
    edges = [0, *(row for row in range(1, len(lines)) if lines[row] != lines[row - 1]), len(lines)]
    return tuple(Segment(first, end, (lines[first],)) for first, end in pairwise(edges)) if len(edges) > 2 else ()


def checked(episode: Episode, file: Path | str) -> Episode:
    """The episode, if it keeps the contract; else `ContractError` that names `file`."""
    try:
        episode.check()
    except ContractError as error:
        raise ContractError(f"{file}: {error}") from None
    return episode
