"""`convert.captions`: sentences in one csv or jsonl file of a data set of any format, in place of those that the set has.

A line is a sentence: `text`, or a name alike (`TEXTS`), of an episode: `episode` names it by number or name, as
`convert.episodes` does, or `file_name` by its file. Several lines of an episode are several sentences; the first is the task.
Lines with `start` and `end`, rows of the recording without the end, describe a part: the episode is cut into its parts. What
other columns say is not read. Every episode needs a line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from svam.contract import Episode, EpisodeShape, EpisodeSource, Segment, SourceDescription
from svam.files import FileError, refuse_lfs_pointer, stamp

TEXTS = ("text", "caption", "sentence", "instruction", "language_instruction")
EPISODES = ("episode", "file_name", "episode_index", "video", "path")
_MORE = ","
"""Key of the values of a csv line that are more than the names in the first."""
Line = tuple[str, str, tuple[int, int] | None]
"""Which episode, what is said, and of which rows, None for all."""


def _objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of each line, but for empty ones."""
    refuse_lfs_pointer(file)
    kind = ".csv" if file.suffix.lower() == ".csv" else ".jsonl"
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if kind == ".csv":
                reader = csv.DictReader(lines, restkey=_MORE, strict=True)
                names = [name for name in reader.fieldnames or [] if name]
                if twice := [name for name in names if names.count(name) > 1]:
                    raise FileError(f"{file}: the column {twice[0]!r} is there twice; rename the one that is not meant")
                yield from ((reader.line_num, row) for row in reader)
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    content = json.loads(line)
                    if not isinstance(content, dict):
                        raise FileError(f"{file}: line {number} is {line.strip()[:80]!r}, expected an object such as {{...}}")
                    yield number, content
    except FileError:
        raise
    except FileNotFoundError:
        raise FileError(f"{file}: no such file, which convert.captions names") from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise FileError(f"{file}: cannot be read as {kind} ({error})") from None


def read_captions(file: Path) -> tuple[list[Line], list[str]]:
    """What each line says, and the keys that are not read.

    Raises:
        FileError: the file cannot be read, or a line lacks an episode, a sentence or one of the ends of its rows.
    """
    lines: list[Line] = []
    unread: dict[str, None] = {}
    for number, content in _objects(file):
        if any(content.pop(_MORE, [])):  # the end of a sentence would be lost
            raise FileError(f"{file}: line {number} has more values than the first has names; quote a text that has commas")
        given = {key: value for key, value in content.items() if value not in (None, "")}
        named, said = (next((key for key in keys if key in given), "") for keys in (EPISODES, TEXTS))
        episode, text = given.get(named), given.get(said)
        unread |= dict.fromkeys(key for key in given if key not in ("", named, said, "start", "end"))
        where = f"{file}: line {number}"
        if not isinstance(episode, str | int) or not isinstance(text, str) or not text.strip():
            raise FileError(
                f"{where} has {', '.join(map(str, given)) or 'nothing'}, expected {' or '.join(EPISODES[:2])}, and {TEXTS[0]}"
            )
        rows = None
        if "start" in given or "end" in given:
            try:
                rows = int(str(given["start"])), int(str(given["end"]))
            except (KeyError, ValueError):
                rows = 0, 0
            if not 0 <= rows[0] < rows[1]:
                raise FileError(
                    f"{where}: start is {given.get('start')!r} and end {given.get('end')!r}, expected rows with start below end"
                )
        lines.append((str(episode), text.strip(), rows))
    if not lines:
        raise FileError(f"{file}: no line in it")
    return lines, list(unread)


class CaptionedEpisodes:
    """The episodes of a source, all of them, with the sentences of a file."""

    def __init__(self, source: EpisodeSource, path: Path, name: str) -> None:
        """`name`: of the file, in the folder `path` (or beside the file `path`).

        Raises:
            FileError: see `read_captions`; the file lies elsewhere, where DVC would not notice a change.
        """
        self.source, self._file = source, (path if path.is_dir() else path.parent) / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise FileError(f"convert.captions is {name}, expected a file below {path}, where DVC notices a change")
        self._lines: dict[str, list[Line]] = {}
        lines, self._unread = read_captions(self._file)
        for line in lines:
            self._lines.setdefault(line[0], []).append(line)
        self._of_file = {PurePosixPath(key).with_suffix("").as_posix(): key for key in self._lines}
        self._used: set[str] = set()
        self._names = set(getattr(source, "names", ()))

    def _said(self, index: int, shape: EpisodeShape) -> list[Line]:
        """The lines of an episode: by its name, its file's, or its number where that is no other's name."""
        keys = (shape.name, self._of_file.get(shape.name, ""), *({str(index)} - self._names))
        key = next((key for key in keys if key in self._lines), None)
        if key is None:
            called = f" ({shape.name})" if shape.name else ""
            raise FileError(f"{self._file}: no line for episode {index}{called}; its first is for {next(iter(self._lines))!r}")
        self._used.add(key)
        return self._lines[key]

    @property
    def notes(self) -> Sequence[str]:
        """The source's, lines of no episode, and keys that are not read."""
        assert self._instructions  # looks at all episodes
        unused = [key for key in self._lines if key not in self._used]
        few = f"{self._file}: {len(unused)} episodes that it names are not there, such as {unused[0]!r}" if unused else ""
        keys = f"{self._file}: not read: {', '.join(self._unread)}" if self._unread else ""
        return [*self.source.notes, *filter(None, (few, keys))]

    @cached_property
    def _instructions(self) -> dict[str, dict[str, list[str]]]:
        said: dict[str, dict[str, list[str]]] = {}
        for index in range(len(self)):
            try:
                shape = self.shape(index)
            except FileError:  # which is told when that episode is chosen
                continue
            for part in shape.segments or [Segment(0, shape.steps, self._sentences(index, shape))]:
                train = said.setdefault(part.sentences[0], {"train": [], "held_out": []})["train"]
                train += [sentence for sentence in part.sentences if sentence not in train]
        return said

    def _sentences(self, index: int, shape: EpisodeShape) -> tuple[str, ...]:
        return tuple(dict.fromkeys(text for _, text, _ in self._said(index, shape)))

    def describe(self) -> SourceDescription:
        """The source's, with the file's sentences."""
        description = self.source.describe()
        provenance = description.provenance | {"captions": self._file.name}
        return description.model_copy(update={"instructions": self._instructions, "provenance": provenance})

    def __len__(self) -> int:
        return len(self.source)

    def shape(self, index: int) -> EpisodeShape:
        """The source's, with the sentences of the file; `FileError` where it has none, or of rows that are not there."""
        shape = self.source.shape(index)
        lines = self._said(index, shape)
        segments: dict[tuple[int, int], list[str]] = {}
        for _, text, rows in lines:
            first, end = rows or (0, shape.steps)
            if end > shape.steps:
                raise FileError(f"{self._file}: rows {first} to {end} of episode {index}, which has {shape.steps}")
            segments.setdefault((first, end), []).append(text)
        parts = tuple(Segment(*rows, tuple(dict.fromkeys(said))) for rows, said in sorted(segments.items()))
        whole = len(parts) == 1 and all(rows is None for _, _, rows in lines)
        return replace(
            shape, task=parts[0].sentences[0], segments=() if whole else parts, stamp=f"{shape.stamp} {stamp(self._file)}"
        )

    def read(self, index: int) -> Episode:
        """The source's, with the first sentence."""
        task = self.shape(index).task
        return replace(self.source.read(index), task=task, instruction=task)
