"""Any source of episodes to one store: one episode in memory at a time, and the store appears only when it is whole."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from svam.contract import (
    STORE_SCHEMA,
    VECTORS,
    ActionConvention,
    ContractError,
    Episode,
    EpisodeSource,
    SourceDescription,
    Statistics,
    VectorStatistics,
)
from svam.episodes.arrays import ArrayWriter, GroupWriter, RowReader
from svam.episodes.statistics import vector_statistics
from svam.files import whole_directory
from svam.machine import generator, track
from svam.params import Convert

_VECTOR_CHUNK, _VECTOR_SHARD = 256, 65536
_ANNOTATION_CHUNK = 4


def split_episodes(tasks: list[str], held_out: float, seed: int) -> NDArray[np.uint8]:
    """(E,) uint8, 1 for held-out episodes: of each task's episodes the share `held_out`, rounded, at least one.

    Which ones depends on the seed, the task and its number of episodes only.

    Raises:
        ContractError: a task has a single episode, which cannot be both trained on and held out.
    """
    split = np.zeros(len(tasks), dtype=np.uint8)
    for task in dict.fromkeys(tasks):
        members = np.flatnonzero([name == task for name in tasks])
        if len(members) < 2:
            raise ContractError(f"task {task!r} has 1 episode; at least 2 are needed, one of which is held out")
        count = min(max(1, round(held_out * len(members))), len(members) - 1)
        split[generator(seed, "split", task).permutation(members)[:count]] = 1
    return split


class _Writer:
    """Appends episodes to the arrays of one store; the first episode decides which arrays there are and their widths."""

    def __init__(self, group: GroupWriter, description: SourceDescription, params: Convert) -> None:
        self._group, self._description, self._params = group, description, params
        self._arrays: dict[str, ArrayWriter] = {}
        self.ends: list[int] = []
        self.tasks: list[str] = []
        self.instructions: list[str] = []
        self.provenance: list[dict[str, Any]] = []

    def _parts(self, episode: Episode) -> dict[str, NDArray[Any]]:
        start = self.ends[-1] if self.ends else 0
        parts: dict[str, NDArray[Any]] = {f"frames/{name}": episode.frames[name] for name in self._description.cameras}
        parts |= {name: values for name in VECTORS if (values := getattr(episode, name)) is not None}
        for name, annotation in sorted(episode.annotations.items()):
            parts[f"annotations/{name}/values"] = annotation.values
            parts[f"annotations/{name}/index"] = annotation.index + start
        return parts

    def _create(self, name: str, values: NDArray[Any]) -> ArrayWriter:
        if name.startswith("frames/"):
            chunk, shard = self._params.chunk_frames, self._params.shard_frames
        elif name.endswith("/values"):  # annotated frames are read in random order: small chunks
            chunk = _ANNOTATION_CHUNK
            shard = -(-self._params.shard_frames // chunk) * chunk
        else:
            chunk, shard = _VECTOR_CHUNK, _VECTOR_SHARD
        return self._group.array(name, values.shape[1:], values.dtype, chunk, shard)

    def append(self, episode: Episode) -> None:
        """Check one episode against the contract and against the first one, and append it."""
        where = f"episode {len(self.ends)} ({episode.provenance.get('file', episode.task)})"
        episode.check()
        if list(episode.frames) != self._description.cameras:
            raise ContractError(f"{where}: cameras are {list(episode.frames)}, expected {self._description.cameras}")
        if episode.rate_hz != self._description.rate_hz:
            raise ContractError(f"{where}: rate_hz is {episode.rate_hz:g}, expected {self._description.rate_hz:g}")
        if episode.task not in self._description.instructions:
            raise ContractError(f"{where}: its task is not in the source's instructions")
        for d in self._params.binary_dimensions:
            if d < episode.actions.shape[1] and not np.isin(episode.actions[:, d], (-1.0, 1.0)).all():
                raise ContractError(f"{where}: actions[:, {d}] must be -1 or 1, as convert.binary_dimensions lists {d}")
        parts = self._parts(episode)
        if not self.ends:
            self._arrays = {name: self._create(name, values) for name, values in parts.items()}
        if set(parts) != set(self._arrays):
            more, less = sorted(set(parts) - set(self._arrays)), sorted(set(self._arrays) - set(parts))
            raise ContractError(f"{where}: differs from the first episode: lacks {less or 'nothing'}, adds {more or 'nothing'}")
        for name, values in parts.items():
            try:
                self._arrays[name].append(values)
            except ContractError as error:
                raise ContractError(f"{where}: {name} differs from the first episode's: {error}") from None
        self.ends.append((self.ends[-1] if self.ends else 0) + len(episode.actions))
        self.tasks.append(episode.task)
        self.instructions.append(episode.instruction)
        self.provenance.append(dict(episode.provenance))

    def finish_arrays(self) -> None:
        """Write what is still in memory, so that the arrays can be read."""
        for array in self._arrays.values():
            array.close()

    def statistics(self, split: NDArray[np.uint8]) -> Statistics:
        """Of the training episodes alone, read back from the written arrays one episode at a time."""
        training = [(self.ends[e - 1] if e else 0, self.ends[e]) for e in np.flatnonzero(split == 0)]

        def of(name: str) -> VectorStatistics:
            reader = RowReader(self._group.path / name)
            return vector_statistics(lambda: (reader.read_range(*bounds) for bounds in training))

        actions = of("actions")
        convention = ActionConvention(
            kind=self._params.action_kind, dimensions=len(actions.mean),
            binary_dimensions=self._params.binary_dimensions, normalisation=self._params.normalisation,
        )  # fmt: skip
        proprioception = of("proprioception") if "proprioception" in self._arrays else None
        return Statistics(convention=convention, actions=actions, proprioception=proprioception)


def convert(source: EpisodeSource, out: Path, params: Convert, seed: int) -> None:
    """Write the store `out` from all episodes of `source`, in the source's order.

    Equal input gives equal bytes. On any error nothing is left behind, and what stood at `out` before still stands.

    Raises:
        ContractError: an episode breaks the contract or differs in kind from the others.
        FileError: a file of the source is damaged, or writing fails.
    """
    description = source.describe()
    with whole_directory(Path(out)) as folder, GroupWriter(folder) as group:
        writer = _Writer(group, description, params)
        with closing(track(source, "episodes", len(source))) as episodes:
            for episode in episodes:
                writer.append(episode)
        if not writer.ends:
            raise ContractError("the source has no episodes")
        writer.finish_arrays()
        split = split_episodes(writer.tasks, params.held_out, seed)
        try:
            statistics = writer.statistics(split)
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ContractError(f"convert: {message}") from None
        tasks = list(dict.fromkeys(writer.tasks))
        group.write("episode_ends", np.asarray(writer.ends, dtype=np.int64))
        group.write("episode_split", split)
        group.write("episode_task", np.asarray([tasks.index(task) for task in writer.tasks], dtype=np.int64))
        group.attributes = {
            "schema_version": STORE_SCHEMA, "source": description.model_dump(mode="json"), "tasks": tasks,
            "episode_instructions": writer.instructions, "episode_provenance": writer.provenance,
            "statistics": statistics.model_dump(mode="json"),
        }  # fmt: skip
