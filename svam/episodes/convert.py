"""Any source of episodes to one store, by several processes, in memory that does not grow with the data set.

The episodes are cut into units of about a thousand steps. A worker turns a unit into pieces of the store's arrays (see
`svam.episodes.shards`) in a scratch folder; meanwhile one process joins the units that are there, in order. Bytes do not depend
on the number of workers, and a conversion that was killed goes on with the units that are missing. The store appears when it is
whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from svam.code import ROOT, code_of, library_versions, module_file
from svam.console import console, progress_bar, timed
from svam.contract import (
    STORE_SCHEMA,
    VECTORS,
    ActionConvention,
    ContractError,
    Episode,
    EpisodeShape,
    EpisodeSource,
    SourceDescription,
    Statistics,
    VectorStatistics,
    frame_blocks,
)
from svam.device import become_worker
from svam.episodes.arrays import GroupWriter
from svam.episodes.checksums import EpisodeDigest
from svam.episodes.chunks import frames_together
from svam.episodes.frames import prepared
from svam.episodes.rows import RowReader
from svam.episodes.shards import DamagedPieceError, Layout, Piece, ShardJoiner
from svam.episodes.statistics import vector_statistics
from svam.files import FileError, locked, whole_directory, write_json
from svam.params import Convert
from svam.seeds import generator

UNIT_STEPS, UNIT_CHUNKS = 1024, 16
"""About so many steps are a unit, or chunks of frames where those are more, in whole episodes: few enough to share among
workers and to lose to a kill; enough for the joining process, which compresses a chunk a unit, to keep up with many."""
_VECTOR_CHUNK, _ANNOTATION_CHUNK = 256, 4
_SAMPLE_FRAMES = 64
"""Of the first episode, by which `convert.chunk_frames: auto` chooses."""


def split_episodes(tasks: Sequence[str], shapes: Sequence[EpisodeShape], held_out: float, seed: int) -> NDArray[np.uint8]:
    """(E,) uint8, 1 for held-out episodes: the source's own split where it has one, else of each task's episodes the share
    `held_out`, rounded, at least one. A task's only episode is trained on; where that leaves none, all are one pool.
    Where episodes share frames (`EpisodeShape.group`), whole groups are drawn instead, until they are that share of all.

    Which ones are drawn depends on the seed, the task and its number of episodes only; of groups, on the seed and their sizes.

    Raises:
        ContractError: there is a single episode or group, or the source's own split leaves one side empty.
    """
    split = np.zeros(len(tasks), dtype=np.uint8)
    if any(shape.held_out is not None for shape in shapes):
        split[:] = [shape.held_out is True for shape in shapes]
        if split.all() or not split.any():
            sides = f"{len(split) - split.sum()} training and {split.sum()} held-out episodes"
            raise ContractError(f"the source's own split has {sides}, expected some of both")
        return split
    if len(tasks) < 2:
        raise ContractError(f"{len(tasks)} episode in all; at least 2 are needed, one of which is held out")
    if any(shape.group for shape in shapes):
        return _split_groups([shape.group or str(number) for number, shape in enumerate(shapes)], held_out, seed)
    groups = {task: np.flatnonzero([name == task for name in tasks]) for task in dict.fromkeys(tasks)}
    if max(map(len, groups.values())) == 1:
        groups = {"": np.arange(len(tasks))}
    for task, members in groups.items():
        if len(members) > 1:
            count = min(max(1, round(held_out * len(members))), len(members) - 1)
            split[generator(seed, "split", task).permutation(members)[:count]] = 1
    return split


def _split_groups(groups: Sequence[str], held_out: float, seed: int) -> NDArray[np.uint8]:
    """As `split_episodes`: whole groups, in an order that is drawn, as many as fit into the share; or the smallest one."""
    names, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise ContractError(
            f"all {len(groups)} episodes share frames with each other, so none can be held out; convert more recordings"
        )
    left, chosen = min(round(held_out * len(groups)), len(groups) - 1), []
    for number in generator(seed, "split").permutation(len(names)):
        if sizes[number] <= left:
            chosen.append(number)
            left -= sizes[number]
    return np.isin(group, chosen or [int(np.argmin(sizes))]).astype(np.uint8)


def _parts(episode: Episode) -> dict[str, tuple[tuple[int, ...], np.dtype[Any], int]]:
    """Array name -> (row shape, dtype, number of rows) of what an episode adds to a store."""
    parts: dict[str, tuple[tuple[int, ...], np.dtype[Any], int]] = {
        f"frames/{camera}": (tuple(images.shape[1:]), np.dtype(np.uint8), len(images))
        for camera, images in episode.frames.items()
    }
    for name in (*VECTORS, "timestamps"):
        if (values := getattr(episode, name)) is not None:
            parts[name] = (values.shape[1:], values.dtype, len(values))
    for name, labels in sorted(episode.annotations.items()):
        parts[f"annotations/{name}/values"] = (labels.values.shape[1:], labels.values.dtype, len(labels.values))
        parts[f"annotations/{name}/index"] = ((), np.dtype(np.int64), len(labels.index))
    return parts


def _rows_of(name: str, shape: EpisodeShape) -> int:
    """Rows that an episode of `shape` adds to the array `name`."""
    return shape.annotated.get(name.split("/")[1], 0) if name.startswith("annotations/") else shape.steps


@dataclass(frozen=True)
class Plan:
    """What is to be written: known before any frame is decoded, the same for all workers."""

    source: EpisodeSource
    description: SourceDescription
    params: Convert
    layouts: Mapping[str, Layout]
    starts: Mapping[str, NDArray[np.int64]]
    """Array name -> (E + 1,) first row of each episode, and the array's length."""
    units: list[tuple[int, int]]
    """First episode of each unit, and the one after its last."""

    @classmethod
    def of(cls, source: EpisodeSource, params: Convert) -> tuple[Plan, list[EpisodeShape]]:
        """Look at all lengths, and at the first episode for the arrays' kinds."""
        description = _chosen_cameras(source.describe(), params)
        if not len(source):
            raise ContractError("the source has no episodes")
        shapes = [source.shape(e) for e in range(len(source))]
        first = prepared(source.read(0), description.cameras, params)
        first.check()
        parts = _parts(first)
        starts = {name: np.cumsum([0, *(_rows_of(name, shape) for shape in shapes)], dtype=np.int64) for name in parts}
        shard_bytes = params.shard_megabytes * 2**20
        layouts = {}
        for name, (row_shape, dtype, _) in parts.items():
            rows, pictures = int(starts[name][-1]), params.compression if name.startswith("frames/") else None
            kept, chunk = _stored(name, dtype, params), _chunk_rows(name, first, params)
            layouts[name] = Layout.of(row_shape, kept, chunk, shard_bytes, rows, pictures)
        steps = np.cumsum([shape.steps for shape in shapes])
        size = max(UNIT_STEPS, *(UNIT_CHUNKS * layout.chunk_rows for layout in layouts.values() if layout.pictures))
        last = np.unique(steps // size, return_index=True)[1].tolist()  # the first episode that ends in each stretch
        edges = sorted({0, *last, len(shapes)})
        return cls(source, description, params, layouts, starts, list(pairwise(edges))), shapes

    def key(self, shapes: Sequence[EpisodeShape]) -> str:
        """Changes with anything that the units depend on: params, description, lengths, the inputs' stamps, this code."""
        files = [module_file(name) for name in ("svam.episodes.convert", type(self.source).__module__)]
        code = code_of(file.relative_to(ROOT).as_posix() for file in files if file is not None)
        layouts = {name: str(layout) for name, layout in self.layouts.items()}
        known = [
            self.params.model_dump_json(), self.description.model_dump_json(), json.dumps(layouts), str(list(shapes)),
            STORE_SCHEMA, json.dumps([code, library_versions()]),
        ]  # fmt: skip
        return hashlib.sha256("\0".join(map(str, known)).encode()).hexdigest()[:16]


def _stored(name: str, dtype: np.dtype[Any], params: Convert) -> np.dtype[Any]:
    """The dtype on disk of an array whose values have `dtype`."""
    return np.dtype(params.vector_dtype) if name in VECTORS else dtype


def _chunk_rows(name: str, first: Episode, params: Convert) -> int:
    """Rows compressed together: frames along time, by the first episode's if so asked; labels in random order, so few; vectors
    are small."""
    if not name.startswith("frames/"):
        return _ANNOTATION_CHUNK if name.endswith("/values") else _VECTOR_CHUNK
    if params.chunk_frames != "auto":
        return params.chunk_frames
    blocks: list[NDArray[np.uint8]] = []
    for block in frame_blocks(first.frames[name.removeprefix("frames/")]):
        blocks.append(block[:_SAMPLE_FRAMES])
        if sum(map(len, blocks)) >= _SAMPLE_FRAMES:
            break
    return frames_together(np.concatenate(blocks)[:_SAMPLE_FRAMES], params.compression)


def _chosen_cameras(description: SourceDescription, params: Convert) -> SourceDescription:
    """The description with the cameras of `convert.cameras`, in that order."""
    unknown = [camera for camera in params.cameras if camera not in description.cameras]
    if unknown and len(params.cameras) == len(description.cameras):
        return description  # the source has chosen them, by another form of their names
    if unknown:
        raise ContractError(f"convert.cameras names {unknown[0]!r}; the source has {', '.join(description.cameras)}")
    return description.model_copy(update={"cameras": params.cameras or description.cameras})


def _checked(plan: Plan, number: int) -> Episode:
    """Episode `number`, as it goes into the store.

    Raises:
        ContractError: it breaks the contract or differs in kind from the first one.
    """
    episode = plan.source.read(number)
    where = f"episode {number} ({episode.provenance.get('file', episode.task)})"
    description, params = plan.description, plan.params
    missing = [camera for camera in description.cameras if camera not in episode.frames]
    if missing:
        raise ContractError(f"{where}: cameras are {list(episode.frames)}, expected {description.cameras}")
    episode = prepared(episode, description.cameras, params)
    episode.check()
    if episode.rate_hz != description.rate_hz:
        raise ContractError(f"{where}: rate_hz is {episode.rate_hz:g}, expected {description.rate_hz:g}")
    if episode.task not in description.instructions:
        raise ContractError(f"{where}: its task is not in the source's instructions")
    for d in params.binary_dimensions:
        column = None if episode.actions is None or d >= episode.actions.shape[1] else episode.actions[:, d]
        if column is not None and not np.isin(column, (-1.0, 1.0)).all():
            raise ContractError(f"{where}: actions[:, {d}] must be -1 or 1, as convert.binary_dimensions lists {d}")
    parts = _parts(episode)
    if set(parts) != set(plan.layouts):
        more, less = sorted(set(parts) - set(plan.layouts)), sorted(set(plan.layouts) - set(parts))
        raise ContractError(f"{where}: differs from the first episode: lacks {less or 'nothing'}, adds {more or 'nothing'}")
    for name, (row_shape, dtype, rows) in parts.items():
        layout, expected = plan.layouts[name], int(plan.starts[name][number + 1] - plan.starts[name][number])
        if (row_shape, _stored(name, dtype, params)) != (layout.row_shape, layout.dtype):
            raise ContractError(
                f"{where}: {name} differs from the first episode's: its rows are {dtype} {row_shape}, "
                f"expected {layout.dtype} {layout.row_shape}"
            )
        if rows != expected:
            raise ContractError(f"{where}: {name} has {rows} rows, {expected} were announced")
    return episode


def _blocks(episode: Episode, name: str) -> Iterable[NDArray[Any]]:
    """An array of an episode, in blocks."""
    if name.startswith("frames/"):
        return frame_blocks(episode.frames[name.removeprefix("frames/")])
    if name.startswith("annotations/"):
        _, label, kind = name.split("/")
        return [getattr(episode.annotations[label], kind)]
    return [getattr(episode, name)]


def _write_unit(plan: Plan, number: int, scratch: Path) -> None:
    """Episodes of one unit as pieces, checksums and facts, in a folder that appears when it is whole."""
    first, end = plan.units[number]
    with whole_directory(_unit_folder(scratch, number)) as folder, ExitStack() as stack:
        pieces: dict[str, Piece] = {}
        for at, name in enumerate(plan.layouts):
            pieces[name] = Piece(folder / str(at), int(plan.starts[name][first]), plan.layouts[name])
            stack.callback(pieces[name].abandon)
        facts = []
        for e in range(first, end):
            episode, digest = _checked(plan, e), EpisodeDigest()
            where = f"episode {e} ({episode.provenance.get('file', episode.task)})"
            for name, piece in pieces.items():
                shift = int(plan.starts[next(iter(plan.layouts))][e]) if name.endswith("/index") else 0
                try:
                    for block in _blocks(episode, name):
                        digest.update(name, block)
                        piece.append(block + shift if shift else block.astype(piece.layout.dtype, copy=False))
                except ContractError as error:
                    raise ContractError(f"{where}: {name}: {error}") from None
            facts.append({
                "task": episode.task, "instruction": episode.instruction, "provenance": dict(episode.provenance),
                "checksum": digest.hexdigest(),
            })  # fmt: skip
        for piece in pieces.values():
            piece.close()
        write_json(folder / "episodes.json", facts)


def _unit_folder(scratch: Path, number: int) -> Path:
    return scratch / f"unit_{number:06d}"


_worker: tuple[Plan, Path] | None = None


def _set_up(plan: Plan, scratch: Path) -> None:
    """In a worker: what it works on."""
    global _worker
    become_worker()
    _worker = (plan, scratch)


def _work(number: int) -> int:
    """In a worker: one unit."""
    if _worker is None:
        raise RuntimeError("the worker was not set up")
    plan, scratch = _worker
    _write_unit(plan, number, scratch)
    return number


def _finished(plan: Plan, todo: Sequence[int], scratch: Path, workers: int) -> Iterator[int]:
    """Write the units, by `workers` processes (by this one if it is 1), and yield their numbers as they are done, in order."""
    if workers <= 1 or len(todo) <= 1:
        for number in todo:
            _write_unit(plan, number, scratch)
            yield number
        return
    with ProcessPoolExecutor(
        min(workers, len(todo)), mp_context=get_context("spawn"), initializer=_set_up, initargs=(plan, scratch)
    ) as pool:
        futures: list[Future[int]] = [pool.submit(_work, number) for number in todo]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool:
            raise FileError("convert: a worker process ended, perhaps for want of memory; run the same command again") from None
        finally:
            for future in futures:
                future.cancel()


@contextmanager
def _scratch_folder(scratch: Path | None, folder: Path, key: str) -> Iterator[Path]:
    """Where units are kept: with `scratch`, a folder of this work's own that outlives a kill, but no success or wrong data."""
    if scratch is None:
        yield folder / ".units"
        shutil.rmtree(folder / ".units", ignore_errors=True)
        return
    place = scratch / key
    with locked(scratch / f"{key}.lock"):
        for stale in [p for p in scratch.iterdir() if p.is_dir() and p != place]:
            with suppress(FileError), locked(scratch / f"{stale.name}.lock"):  # not where another process is at work
                shutil.rmtree(stale, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        try:
            yield place
        except (ContractError, DamagedPieceError):  # what was made is of no use; after a full disk it is
            shutil.rmtree(place, ignore_errors=True)
            raise
        except KeyboardInterrupt as stop:
            stop.add_note("interrupted; run the same command again to go on with the units that are missing")
            raise
        shutil.rmtree(place, ignore_errors=True)


def convert(
    source: EpisodeSource, out: Path, params: Convert, seed: int, workers: int = 1, scratch: Path | None = None
) -> None:
    """Write the store `out` from all episodes of `source`, in the source's order.

    Equal input gives equal bytes, whatever `workers`. On an error nothing is left behind, and what stood at `out` before
    still stands; when killed, the next call goes on from what is in `scratch` (without it, from the start).

    Raises:
        ContractError: an episode breaks the contract or differs in kind from the others.
        FileError: a file of the source is damaged, or writing fails.
    """
    plan, shapes = Plan.of(source, params)
    # Whether there can be a split follows from the lengths; the tasks are known when all episodes have been read.
    split_episodes([""] * len(shapes), shapes, params.held_out, seed)
    with (
        whole_directory(Path(out)) as folder, _scratch_folder(scratch, folder, plan.key(shapes)) as units,
        GroupWriter(folder) as group,
    ):  # fmt: skip
        _write_arrays(plan, group, units, workers, [shape.steps for shape in shapes])
        facts = [fact for n in range(len(plan.units)) for fact in _facts(units, n)]
        _describe(plan, group, facts, split_episodes([fact["task"] for fact in facts], shapes, params.held_out, seed))


def _write_arrays(plan: Plan, group: GroupWriter, units: Path, workers: int, steps: Sequence[int]) -> None:
    """Write the units that are not there yet, with a bar in frames, and every array as the units it consists of are there."""
    sizes = [sum(steps[a:b]) for a, b in plan.units]
    todo = [n for n in range(len(sizes)) if not (_unit_folder(units, n) / "episodes.json").is_file()]
    with ExitStack() as stack, progress_bar() as bar:
        joiners = []
        for name, layout in plan.layouts.items():
            joiners.append(ShardJoiner(group.adopt(name), int(plan.starts[name][-1]), layout))
            stack.callback(joiners[-1].abandon)
        if done := sum(sizes) - sum(sizes[n] for n in todo):
            console.print(f"convert: going on after {done} of {sum(sizes)} steps", highlight=False)
        task = bar.add_task("convert, steps", total=sum(sizes[n] for n in todo), note="")
        finished = stack.enter_context(closing(_finished(plan, todo, units, workers)))  # type: ignore[type-var]
        missing = set(todo)
        for number, size in enumerate(sizes):
            if number in missing:
                next(finished)
                bar.advance(task, size)
            with timed("join"):
                for at, joiner in enumerate(joiners):
                    joiner.join(_unit_folder(units, number) / str(at))
        for joiner in joiners:
            joiner.close()


def _facts(units: Path, number: int) -> list[dict[str, Any]]:
    text = (_unit_folder(units, number) / "episodes.json").read_text(encoding="utf-8")
    return list(json.loads(text))


def _describe(plan: Plan, group: GroupWriter, facts: list[dict[str, Any]], split: NDArray[np.uint8]) -> None:
    """Episodes, split, checksums, statistics and the source's description."""
    tasks = list(dict.fromkeys(fact["task"] for fact in facts))
    ends = plan.starts[f"frames/{plan.description.cameras[0]}"][1:]
    group.write("episode_ends", ends)
    group.write("episode_split", split)
    group.write("episode_task", np.asarray([tasks.index(fact["task"]) for fact in facts], dtype=np.int64))
    checksums = np.frombuffer(b"".join(bytes.fromhex(fact["checksum"]) for fact in facts), dtype=np.uint8)
    group.write("episode_checksums", checksums.reshape(len(facts), -1))
    try:
        statistics = _statistics(plan, group.path, ends, split)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ContractError(f"convert: {message}") from None
    group.attributes = {
        "schema_version": STORE_SCHEMA, "source": plan.description.model_dump(mode="json"), "tasks": tasks,
        "episode_instructions": [fact["instruction"] for fact in facts],
        "episode_provenance": [fact["provenance"] for fact in facts],
        "statistics": None if statistics is None else statistics.model_dump(mode="json"),
    }  # fmt: skip


def _statistics(plan: Plan, path: Path, ends: NDArray[np.int64], split: NDArray[np.uint8]) -> Statistics | None:
    """Of the training episodes alone, read back from the written arrays one episode at a time; None without actions."""
    if "actions" not in plan.layouts:
        return None
    starts = np.concatenate([[0], ends[:-1]])
    training = [(int(starts[e]), int(ends[e])) for e in np.flatnonzero(split == 0)]

    def of(name: str) -> VectorStatistics:
        reader = RowReader(path / name)
        return vector_statistics(lambda: (reader.read_range(*b).astype(np.float32, copy=False) for b in training))

    actions, params = of("actions"), plan.params
    convention = ActionConvention(
        kind=params.action_kind, dimensions=len(actions.mean), binary_dimensions=params.binary_dimensions,
        normalisation=params.normalisation,
    )  # fmt: skip
    proprioception = of("proprioception") if "proprioception" in plan.layouts else None
    return Statistics(convention=convention, actions=actions, proprioception=proprioception)
