"""Which source `convert.source` names, whether `convert.options` is what it understands, and which episodes are chosen."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from svam import sources
from svam.contract import Choice, ContractError, Episode, EpisodeShape, EpisodeSource, SourceDescription
from svam.errors import ParamsError
from svam.files import FileError
from svam.params import Convert, Params, describe

LISTED = 5
"""Episodes that a message names, of those that cannot be read."""


def available_sources() -> list[str]:
    """Names that `convert.source` may have."""
    return sorted(module.name for module in pkgutil.iter_modules(sources.__path__) if not module.name.startswith("_"))


def source_options(params: Params) -> tuple[Any, Any]:
    """(module, its `Options`) of `convert.source`. Only that module is imported: others may need libraries that are absent.

    Raises:
        ParamsError: there is no such source, or an option is unknown, missing or of the wrong type.
    """
    name = params.convert.source
    if name not in available_sources():
        raise ParamsError(f"convert.source is {name!r}; available: {', '.join(available_sources())}")
    module = import_module(f"svam.sources.{name}")
    given = dict(params.convert.options)
    if name == "metaworld":  # what was collected last may be less than what lies in the folder
        given.setdefault("tasks", params.collect.tasks)
    try:
        return module, module.Options.model_validate(given)
    except ValidationError as error:
        raise ParamsError(describe(error, f"convert.source {name!r}", "convert.options.")) from None


def open_named_source(path: Path, params: Params) -> EpisodeSource:
    """The reader that `convert.source` names, of the chosen episodes at `path`.

    Raises:
        ParamsError: see `source_options`, and `ChosenEpisodes`.
        FileError: the data is not as the source expects; every episode that cannot be read is listed.
    """
    module, options = source_options(params)
    chosen = params.convert
    choice = Choice(
        cameras=chosen.cameras, rate_hz=chosen.rate_hz, instruction=chosen.instruction,
        missing_instruction=chosen.missing_instruction,
    )  # fmt: skip
    return ChosenEpisodes(module.open_source(path, options, choice), params.convert)


class ChosenEpisodes:
    """The episodes of a source that `convert.episodes`, `drop`, `tasks` and `success` leave, in the source's order."""

    def __init__(self, source: EpisodeSource, chosen: Convert) -> None:
        """Look at every chosen episode.

        Raises:
            ParamsError: a choice names what is not there, or leaves nothing.
            FileError: episodes that cannot be read, all of them listed.
        """
        self.source = source
        numbers = range(len(source))
        names = [self._name(number) for number in numbers] if _has_names(chosen.episodes + chosen.drop) else []
        kept = _listed(chosen.episodes, "episodes", numbers, names) if chosen.episodes else set(numbers)
        kept -= _listed(chosen.drop, "drop", numbers, names)
        shapes: dict[int, EpisodeShape] = {}
        refused: dict[int, str] = {}
        for number in sorted(kept):
            try:
                shapes[number] = source.shape(number)
            except (FileError, ContractError) as error:
                refused[number] = str(error)
        if refused:
            raise FileError(_refusal(refused, len(kept)))
        if chosen.tasks:
            known = {shape.task for shape in shapes.values()}
            if unknown := [task for task in chosen.tasks if task not in known]:
                raise ParamsError(f"convert.tasks names {unknown[0]!r}; tasks are {', '.join(map(repr, sorted(known)))}")
            shapes = {number: shape for number, shape in shapes.items() if shape.task in chosen.tasks}
        if chosen.success is not None:
            if unsaid := [number for number, shape in shapes.items() if shape.success is None]:
                raise ParamsError(
                    f"convert.success is set, but nothing says whether episode {unsaid[0]} succeeded; set it to null"
                )
            shapes = {number: shape for number, shape in shapes.items() if shape.success == chosen.success}
        if not shapes:
            raise ParamsError("convert.episodes, drop, tasks and success leave no episode")
        self._numbers, self._shapes = list(shapes), list(shapes.values())

    def _name(self, number: int) -> str:
        """Of an episode, where it can be read."""
        try:
            return self.source.shape(number).name
        except (FileError, ContractError):
            return ""

    @property
    def notes(self) -> Sequence[str]:
        """The source's."""
        return self.source.notes

    def describe(self) -> SourceDescription:
        """The source's, with the chosen tasks' sentences only."""
        description = self.source.describe()
        tasks = {shape.task for shape in self._shapes}
        sentences = {task: said for task, said in description.instructions.items() if task in tasks}
        return description.model_copy(update={"instructions": sentences or description.instructions})

    def __len__(self) -> int:
        return len(self._numbers)

    def shape(self, index: int) -> EpisodeShape:
        """As it was when the source was opened."""
        return self._shapes[index]

    def read(self, index: int) -> Episode:
        """The source's."""
        return self.source.read(self._numbers[index])


_RANGE = re.compile(r"(\d*):(\d*)")


def _has_names(chosen: list[int | str]) -> bool:
    return any(isinstance(item, str) and not _RANGE.fullmatch(item) for item in chosen)


def _listed(chosen: list[int | str], knob: str, numbers: range, names: list[str]) -> set[int]:
    """The episodes that a list of numbers, ranges and names means."""
    listed: set[int] = set()
    for item in chosen:
        if isinstance(item, str) and (ends := _RANGE.fullmatch(item)):
            first, end = int(ends[1] or 0), int(ends[2] or len(numbers))
            part = set(range(first, end))
        else:
            part = {item} if isinstance(item, int) else {number for number in numbers if names[number] == item}
        if not part or not part <= set(numbers):
            raise ParamsError(
                f"convert.{knob} names {item!r}, which is not there; episodes are 0 to {len(numbers) - 1}"
                + (f", called {', '.join(names[:LISTED])}{', ...' * (len(names) > LISTED)}" if any(names) else "")
            )
        listed |= part
    return listed


def _refusal(refused: dict[int, str], looked_at: int) -> str:
    """One sentence about all episodes that cannot be read, and the way out."""
    first = "; ".join(f"episode {number}: {said}" for number, said in list(refused.items())[:LISTED])
    more = f"; and {len(refused) - LISTED} more" if len(refused) > LISTED else ""
    if len(refused) == looked_at:
        return f"none of {looked_at} episodes can be read: {first}{more}"
    numbers = ", ".join(map(str, refused))
    return (
        f"{len(refused)} of {looked_at} episodes cannot be read: {first}{more}; mend them, or leave them out: "
        f"convert.drop: [{numbers}]"
    )
