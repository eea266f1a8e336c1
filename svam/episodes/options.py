"""Which source `convert.source` names, whether `convert.options` is what it understands, which episodes are chosen, and with
what sentences and changes."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from svam import sources
from svam.contract import Choice, ContractError, Episode, EpisodeShape, EpisodeSource, SourceDescription
from svam.episodes.captions import CaptionedEpisodes
from svam.episodes.changes import changed
from svam.errors import ParamsError, describe, did_you_mean
from svam.files import FileError
from svam.params import Convert, Params
from svam.sources._hub import fetched
from svam.sources._layouts import recognised

LISTED = 5
"""Reasons in the sentence about episodes that cannot be read; of the others, below it, only those about missing files."""


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
        raise ParamsError(
            f"convert.source is {name!r}; available: {', '.join(available_sources())}{did_you_mean(name, available_sources())}"
        )
    module = import_module(f"svam.sources.{name}")
    known, given = list(module.Options.model_fields), dict(params.convert.options)
    for key in given:
        if key not in known and key in Convert.model_fields:
            raise ParamsError(f"convert.options.{key}: it is convert.{key}, the same for every source")
        if key not in known:
            raise ParamsError(
                f"convert.options of {name!r} are {', '.join(known) or 'none, {}'}, not {key!r}{did_you_mean(key, known)}"
            )
    if name == "metaworld":  # what was collected last may be less than what lies in the folder
        given.setdefault("tasks", params.collect.tasks)
    try:
        return module, module.Options.model_validate(given)
    except ValidationError as error:
        raise ParamsError(describe(error, f"convert.source {name!r}", "convert.options.")) from None


def open_recording(path: Path, params: Params) -> EpisodeSource:
    """The reader that `convert.source` names, of all episodes at `path`, or of the hub's data set of that id; with their
    captions.

    Raises:
        ParamsError: see `source_options`.
        FileError: the data is not as the source expects, or cannot be fetched.
    """
    module, options = source_options(params)
    convert = params.convert
    choice = Choice(**{name: getattr(convert, name) for name in Choice.model_fields})
    if convert.captions is not None:  # which stand for all sentences of the set: it need not have any
        choice = choice.model_copy(update={"instruction": convert.captions, "segments": False})
    if convert.revision is not None:
        path = fetched(path.as_posix(), convert.revision)
    try:
        source: EpisodeSource = module.open_source(path, options, choice)
    except FileError as error:
        raise _of_another_format(error, path, convert.source) from None
    return source if convert.captions is None else CaptionedEpisodes(source, path, convert.captions)


def open_named_source(path: Path, params: Params) -> EpisodeSource:
    """The same of the chosen episodes, changed as `convert` says.

    Raises:
        ParamsError: see `source_options`, `ChosenEpisodes` and `changed`.
        FileError: the data is not as the source expects; every episode that cannot be read is listed.
    """
    source = open_recording(path, params)
    try:
        chosen = ChosenEpisodes(source, params.convert)
    except UnreadableError as error:
        raise _of_another_format(error, path, params.convert.source) from None
    return changed(chosen, params.convert)


class UnreadableError(FileError):
    """Of all episodes that were looked at none can be read."""


def _of_another_format(error: FileError, path: Path, source: str) -> FileError:
    """The error, with what `path` looks like where that is not what `source` reads."""
    hint = recognised(path, source)
    sentence, *below = str(error).split("\n")
    return FileError("\n".join([f"{sentence}; {hint}" if hint else sentence, *below]))


class ChosenEpisodes:
    """The episodes of a source that `convert.episodes`, `drop`, `tasks` and `success` leave, in the source's order: `numbers`
    are those that they have in `source`."""

    def __init__(self, source: EpisodeSource, chosen: Convert) -> None:
        """Look at every chosen episode once; where one is chosen by name, at all.

        Raises:
            ParamsError: a choice names what is not there, or leaves nothing.
            FileError: episodes that cannot be read, all of them listed; `UnreadableError` where none can.
        """
        self.source, self._total = source, len(source)
        shapes: dict[int, EpisodeShape] = {}
        refused: dict[int, str] = {}

        def look(numbers: Iterable[int]) -> None:
            for number in sorted(set(numbers) - shapes.keys() - refused.keys()):
                try:
                    shapes[number] = source.shape(number)
                except (FileError, ContractError) as error:
                    refused[number] = str(error)

        if any(isinstance(item, str) and not _RANGE.fullmatch(item) for item in chosen.episodes + chosen.drop):
            look(range(self._total))
        names = {number: shape.name for number, shape in shapes.items() if shape.name}
        inner: Any = getattr(source, "source", source)
        names |= {number: inner.names[number] for number in refused if hasattr(inner, "names")}
        numbers = _numbers(chosen.episodes or [":"], "episodes", self._total, names, refused) - _numbers(
            chosen.drop, "drop", self._total, names, refused
        )
        look(numbers)
        if unreadable := {number: refused[number] for number in sorted(numbers & refused.keys())}:
            raise _refusal(unreadable, len(numbers))
        self._shapes = {number: shapes[number] for number in sorted(numbers)}
        if chosen.tasks:
            known = {task for shape in self._shapes.values() for task in _tasks(shape)}
            if unknown := [task for task in chosen.tasks if task not in known]:
                tasks = ", ".join(map(repr, sorted(known)))
                raise ParamsError(f"convert.tasks names {unknown[0]!r}; tasks are {tasks}{did_you_mean(unknown[0], known)}")
            self._shapes = {n: shape for n, shape in self._shapes.items() if not _tasks(shape).isdisjoint(chosen.tasks)}
        if chosen.success is not None:
            if unsaid := [number for number, shape in self._shapes.items() if shape.success is None]:
                raise ParamsError(
                    f"convert.success is set, but nothing says whether episode {unsaid[0]} succeeded; set it to null"
                )
            self._shapes = {number: shape for number, shape in self._shapes.items() if shape.success == chosen.success}
        if not self._shapes and self._total:
            raise ParamsError(f"convert.episodes, drop, tasks and success leave none of {self._total} episodes")
        self.numbers = list(self._shapes)

    @property
    def notes(self) -> Sequence[str]:
        """The source's, and how many episodes are left out by choice."""
        left_out = self._total - len(self)
        return [*self.source.notes, *([f"{left_out} of {self._total} episodes are left out by choice"] if left_out else [])]

    def describe(self) -> SourceDescription:
        """The source's, with the chosen tasks' sentences only."""
        description = self.source.describe()
        tasks = {task for shape in self._shapes.values() for task in _tasks(shape)}
        sentences = {task: said for task, said in description.instructions.items() if task in tasks}
        return description.model_copy(update={"instructions": sentences or description.instructions})

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, index: int) -> EpisodeShape:
        """As it was when the source was opened."""
        return self._shapes[self.numbers[index]]

    def read(self, index: int) -> Episode:
        """The source's."""
        return self.source.read(self.numbers[index])


def _tasks(shape: EpisodeShape) -> set[str]:
    return {segment.sentences[0] for segment in shape.segments} or {shape.task}


_RANGE = re.compile(r"(\d*):(\d*)")


def _numbers(chosen: list[int | str], knob: str, total: int, names: Mapping[int, str], refused: Iterable[int]) -> set[int]:
    """The episodes that a list of numbers, ranges and names means; some of those that cannot be read have numbers alone."""
    numbers: set[int] = set()
    unnamed = sorted(set(refused) - names.keys())
    for item in chosen:
        if isinstance(item, int):
            part = {item}
        elif ends := _RANGE.fullmatch(item.strip()):
            part = set(range(int(ends[1] or 0), int(ends[2] or total)))
        elif not (part := {number for number, name in names.items() if name == item}) and item.strip().isdecimal():
            part = set() if any(name.isdecimal() for name in names.values()) else {int(item)}
        if total and (not part or min(part) < 0 or max(part) >= total):
            called = list(names.values())[:LISTED] + ["..."] * (len(names) > LISTED)
            raise ParamsError(
                f'convert.{knob} names {item!r}, which is not there: episodes are 0 to {total - 1} ("0:{total}" for all)'
                + (f", or {', '.join(called)}{did_you_mean(item, names.values())}" if names else "")
                + (f"; those that cannot be read go by number: {', '.join(_ranges(unnamed))}" if unnamed else "")
            )
        numbers |= part
    return numbers


def _refusal(refused: Mapping[int, str], looked_at: int) -> FileError:
    """One sentence about all episodes that cannot be read, those of one reason together, and the way out; below it a line for
    each further missing file, which must be fetched and not only be left out."""
    reasons: dict[str, list[int]] = {}
    for number, reason in refused.items():
        reasons.setdefault(reason, []).append(number)
    lines = [f"episode{'s' * (len(n) > 1)} {', '.join(_ranges(n))}: {reason}" for reason, n in reasons.items()]
    said = "; ".join(lines[:LISTED])
    if more := sum(map(len, list(reasons.values())[LISTED:])):
        said += f"; and {more} more, `python -m svam.episodes inspect --recording --json PATH` lists all"
    missing = "".join(f"\n{line}" for line in lines[LISTED:] if "no such file" in line)
    if len(refused) == looked_at:
        return UnreadableError(f"none of {looked_at} episodes can be read: {said}{missing}")
    return FileError(
        f"{len(refused)} of {looked_at} episodes cannot be read: {said}; mend them, or leave them out: "
        f"convert.drop: [{', '.join(_ranges(refused))}]{missing}"
    )


def _ranges(numbers: Iterable[int]) -> list[str]:
    """Increasing numbers as `convert.drop` takes them, neighbours as a range."""
    ranges = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        ranges += [f'"{run[0]}:{run[-1] + 1}"'] if len(run) > 2 else [str(number) for number in run]
    return ranges
