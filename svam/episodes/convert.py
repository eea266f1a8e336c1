"""Any source of episodes to one store, by several processes, in memory that does not grow with the data set.

The episodes are cut into units of about a thousand steps. A worker writes the shards that lie in a unit, and saves the rest for
whoever writes the shards that units share (see `svam.episodes.shards`). Bytes do not depend on the number of workers, and a
conversion that was killed goes on with the units that are missing. The store appears when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.code import ROOT, code_of, library_versions, module_file
from svam.console import console, progress_bar
from svam.contract import (
    STORE_SCHEMA,
    VECTORS,
    ActionConvention,
    ContractError,
    Episode,
    EpisodeShape,
    EpisodeSource,
    FrameBlocks,
    SourceDescription,
    Statistics,
    VectorStatistics,
    frame_blocks,
)
from svam.device import become_worker
from svam.episodes.arrays import write_array, write_groups
from svam.episodes.checksums import EpisodeDigest
from svam.episodes.frames import prepared
from svam.episodes.lossy import LOSSY, PictureError, picture_codec, stated_error
from svam.episodes.rows import RowReader
from svam.episodes.shards import DamagedPieceError, Layout, Rows, ShardedArray
from svam.episodes.split import split_episodes
from svam.episodes.statistics import vector_statistics
from svam.errors import ParamsError
from svam.files import FileError, locked, whole_directory, write_json
from svam.params import Convert
from svam.sources._pictures import NoColourError

UNIT_STEPS = 1024
"""About so many steps are a unit, in whole episodes: few enough to share among workers and to lose to a kill."""
_VECTOR_CHUNK, _ANNOTATION_CHUNK = 4096, 4
"""Rows compressed together: vectors are small; labels are read in random order, so few."""
OF_EPISODES = ("episode_ends", "episode_split", "episode_task", "episode_checksums")
ONE_EPISODE = "no episode is held out, as all are of one recording: the stages that need one refuse the store"
OWN_SPLIT = "the source's own split holds out none of the chosen episodes: a split is drawn, as convert.held_out says"


def _arrays_of(episode: Episode) -> dict[str, NDArray[Any] | FrameBlocks]:
    """Array name -> what an episode adds to it."""
    arrays: dict[str, Any] = {f"frames/{camera}": images for camera, images in episode.frames.items()}
    arrays |= {name: values for name in (*VECTORS, "timestamps") if (values := getattr(episode, name)) is not None}
    for name, labels in sorted(episode.annotations.items()):
        arrays |= {f"annotations/{name}/values": labels.values, f"annotations/{name}/index": labels.index}
    return arrays


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
        description = source.describe()
        if not len(source):
            raise ContractError("the source has no episodes")
        shapes = [source.shape(e) for e in range(len(source))]
        with _way_out(source, 0):
            first = prepared(source.read(0), description.cameras, params)
            first.check()
        arrays = _arrays_of(first)
        starts = {name: np.cumsum([0, *(_rows_of(name, shape) for shape in shapes)], dtype=np.int64) for name in arrays}
        layouts = {
            name: Layout.of(
                int(starts[name][-1]), values.shape[1:], _stored(name, values.dtype, params), _chunk_rows(name, values, params),
                params.shard_megabytes * 2**20, *((params.compression, params.quality) if name.startswith("frames/") else ()),
            )
            for name, values in arrays.items()
        }  # fmt: skip
        foreseen = description.cameras[: params.foreseen]
        sizes = {camera: layouts[f"frames/{camera}"].row_shape[:2] for camera in foreseen}
        if len(foreseen) < params.foreseen:
            raise ContractError(f"convert.foreseen is {params.foreseen}, but there are only the cameras {foreseen}")
        if len(set(sizes.values())) > 1:
            raise ContractError(
                f"convert.foreseen is {params.foreseen}, but their pictures differ in size, {sizes}: set convert.image_size"
            )
        steps = np.cumsum([shape.steps for shape in shapes])
        last = np.unique(steps // UNIT_STEPS, return_index=True)[1].tolist()  # the first episode that ends in each stretch
        edges = sorted({0, *last, len(shapes)})
        return cls(source, description, params, layouts, starts, list(pairwise(edges))), shapes

    def rows(self, name: str, unit: int) -> tuple[int, int]:
        """The rows of an array that a unit has: the first, and the one after its last."""
        first, end = self.units[unit]
        return int(self.starts[name][first]), int(self.starts[name][end])

    def shared(self) -> list[tuple[str, int, list[int]]]:
        """Array, number and units of every shard that several units share."""
        shared: dict[tuple[str, int], list[int]] = {}
        for name, layout in self.layouts.items():
            array = ShardedArray(Path(), layout)
            for unit in range(len(self.units)):
                rows = self.rows(name, unit)
                for shard in array.shards(*rows):
                    if not array.within(shard, *rows):
                        shared.setdefault((name, shard), []).append(unit)
        return [(name, shard, units) for (name, shard), units in shared.items()]

    def key(self, shapes: Sequence[EpisodeShape]) -> str:
        """Changes with anything that the units depend on: params, description, lengths, the inputs' stamps, this code."""
        inner: Any = self.source
        while hasattr(inner, "source"):  # of `svam.episodes.options.ChosenEpisodes` and its kin
            inner = inner.source
        names = ("svam.episodes.convert", "svam.episodes.changes", "svam.episodes.captions", type(inner).__module__)
        files = [module_file(name) for name in names]
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


def _chunk_rows(name: str, values: NDArray[Any] | FrameBlocks, params: Convert) -> int:
    """Rows compressed together; of large pictures and labels fewer than usual, so that files are no larger than asked for."""
    if name.startswith("frames/"):
        rows = 1 if params.compression in LOSSY else params.chunk_frames
    elif name.endswith("/values"):
        rows = _ANNOTATION_CHUNK
    else:
        return _VECTOR_CHUNK
    row_bytes = max(1, math.prod(values.shape[1:]) * values.dtype.itemsize)
    return max(1, min(rows, int(params.shard_megabytes * 2**20) // row_bytes))


@contextmanager
def _way_out(source: EpisodeSource, index: int) -> Iterator[None]:
    """An episode that cannot be read or stored is told with the number that it has for `convert.drop`."""
    try:
        yield
    except NoColourError:  # which is a fault of the camera, and names its own way out
        raise
    except (FileError, ContractError) as error:
        number = list(getattr(source, "numbers", range(len(source))))[index]
        raise type(error)(f"{error}; mend episode {number}, or leave it out: convert.drop: [{number}]") from None


def _checked(plan: Plan, number: int) -> tuple[Episode, str]:
    """Episode `number`, as it goes into the store, and how messages call it.

    Raises:
        ContractError: it breaks the contract or differs in kind from the first one. ParamsError: all do, by the params.
    """
    episode = plan.source.read(number)
    where = f"{episode.provenance.get('file', episode.task)}"
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
    columns = [] if episode.actions is None else list(episode.actions.T)
    for d in params.binary_dimensions if columns else ():
        if d >= len(columns):
            raise ParamsError(f"convert.binary_dimensions lists {d}, but actions have {len(columns)} dimensions, from 0 on")
        if not np.isin(columns[d], (-1.0, 1.0)).all():
            told = f"must be -1 or 1, as convert.binary_dimensions lists {d}; set convert.binary_values to its two values"
            raise ParamsError(f"{where}: actions[:, {d}] {told}, or leave it out there")
    arrays = _arrays_of(episode)
    if set(arrays) != set(plan.layouts):
        more, less = sorted(set(arrays) - set(plan.layouts)), sorted(set(plan.layouts) - set(arrays))
        raise ContractError(f"{where}: differs from the first episode: lacks {less or 'nothing'}, adds {more or 'nothing'}")
    for name, values in arrays.items():
        layout, expected = plan.layouts[name], int(plan.starts[name][number + 1] - plan.starts[name][number])
        if (values.shape[1:], _stored(name, values.dtype, params)) != (layout.row_shape, layout.dtype):
            resize = "; convert.image_size makes pictures alike" if name.startswith("frames/") else ""
            raise ContractError(
                f"{where}: {name} differs from the first episode's: its rows are {values.dtype} {values.shape[1:]}, "
                f"expected {layout.dtype} {layout.row_shape}{resize}"
            )
        if len(values) != expected:
            raise ContractError(f"{where}: {name} has {len(values)} rows, {expected} were announced")
    return episode, where


@dataclass(frozen=True)
class _Work:
    """A plan, and the folder in which it becomes arrays and units."""

    plan: Plan
    folder: Path

    def unit(self, number: int) -> Path:
        """Where the facts and pieces of a unit are."""
        return self.folder / f"unit_{number:06d}"

    def array(self, name: str) -> ShardedArray:
        """By its name."""
        return ShardedArray(self.folder / "arrays" / name, self.plan.layouts[name])

    def piece(self, name: str) -> str:
        """What the names of the pieces of an array begin with."""
        return f"{list(self.plan.layouts).index(name)}_"

    def has(self, number: int) -> bool:
        """Whether a unit is done, and its shards are there."""
        if not (self.unit(number) / "episodes.json").is_file():
            return False
        return all(
            array.has(shard)
            for array, rows in ((self.array(name), self.plan.rows(name, number)) for name in self.plan.layouts)
            for shard in array.shards(*rows) if array.within(shard, *rows)
        )  # fmt: skip

    def write_unit(self, number: int) -> None:
        """Its shards; and its pieces, checksums and facts in a folder that appears when it is whole."""
        plan, layouts, params = self.plan, self.plan.layouts, self.plan.params
        with whole_directory(self.unit(number)) as folder:
            written = {name: Rows(self.array(name), *plan.rows(name, number), folder / self.piece(name)) for name in layouts}
            facts: list[dict[str, Any]] = []
            codec = picture_codec(params.compression, params.quality) if params.compression in LOSSY else None
            for e in range(*plan.units[number]):
                digest, errors = EpisodeDigest(), dict[str, PictureError]()
                with _way_out(plan.source, e):
                    episode, where = _checked(plan, e)
                    for name, values in _arrays_of(episode).items():
                        shift = int(plan.starts[next(iter(plan.layouts))][e]) if name.endswith("/index") else 0
                        try:
                            for block in frame_blocks(values):
                                if codec is not None and name.startswith("frames/"):  # one picture of a block is measured
                                    errors.setdefault(name, PictureError()).measure(codec, block[0])
                                else:
                                    digest.update(name, block)
                                written[name].append(block + shift if shift else block.astype(layouts[name].dtype, copy=False))
                        except ContractError as error:
                            raise ContractError(f"{where}: {name}: {error}") from None
                facts.append({
                    "task": episode.task, "instruction": episode.instruction, "provenance": dict(episode.provenance),
                    "checksum": digest.digest().hex(), "errors": {name: vars(error) for name, error in errors.items()},
                })  # fmt: skip
            write_json(folder / "episodes.json", facts)

    def write_shared(self, name: str, shard: int, units: Sequence[int]) -> None:
        """A shard, of what its units saved."""
        self.array(name).join(shard, [self.unit(unit) / f"{self.piece(name)}{shard}.npy" for unit in units])

    def facts(self) -> list[dict[str, Any]]:
        """Of all episodes."""
        texts = ((self.unit(n) / "episodes.json").read_text(encoding="utf-8") for n in range(len(self.plan.units)))
        return [fact for text in texts for fact in json.loads(text)]


Job = int | tuple[str, int, list[int]]
"""A unit, or a shard that units share."""
_worker: _Work | None = None


def _set_up(work: _Work) -> None:
    """In a worker: what it works on."""
    global _worker
    become_worker()
    _worker = work


def _do(job: Job, work: _Work | None = None) -> None:
    """One job, in a worker or here."""
    work = work or _worker
    if work is None:
        raise RuntimeError("the worker was not set up")
    if isinstance(job, int):
        work.write_unit(job)
    else:
        work.write_shared(*job)


def _done(work: _Work, jobs: deque[Job], next_jobs: Callable[[Job], list[Job]], workers: int) -> Iterator[Job]:
    """Do `jobs`, and after each what `next_jobs` names, by `workers` processes (by this one if it is 1); yield those done."""
    if workers <= 1 or len(jobs) <= 1:
        while jobs:
            job = jobs.popleft()
            _do(job, work)
            yield job
            jobs.extendleft(next_jobs(job))
        return
    running: dict[Future[None], Job] = {}
    with ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=get_context("spawn"), initializer=_set_up, initargs=(work,)
    ) as pool:
        try:
            while jobs or running:
                while jobs and len(running) <= workers:
                    job = jobs.popleft()
                    running[pool.submit(_do, job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    future.result()
                    yield job
                    jobs.extendleft(next_jobs(job))
        except BrokenProcessPool:
            raise FileError("convert: a worker process ended, perhaps for want of memory; run the same command again") from None
        finally:
            for future in running:
                future.cancel()


@contextmanager
def _scratch_folder(scratch: Path | None, folder: Path, key: str) -> Iterator[Path]:
    """Where arrays and units are made: with `scratch`, a folder that outlives a kill, but no success or wrong data."""
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
        except (ContractError, ParamsError, DamagedPieceError):  # what was made is of no use; after a full disk it is
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
    with whole_directory(Path(out)) as folder, _scratch_folder(scratch, folder, plan.key(shapes)) as place:
        work = _Work(plan, place)
        _write_arrays(work, workers, [shape.steps for shape in shapes])
        facts = work.facts()
        split = split_episodes([fact["task"] for fact in facts], shapes, params.held_out, seed)
        attributes = _write_episodes(work, folder, facts, shapes, split)
        for name in plan.layouts:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(work.array(name).path, folder / name)
        write_groups(folder, [*plan.layouts, *OF_EPISODES], attributes)


def _write_arrays(work: _Work, workers: int, steps: Sequence[int]) -> None:
    """Do what is not done yet, with a bar in frames."""
    plan = work.plan
    for leftover in work.folder.rglob("*.partial"):  # of a shard that was being written when the process was killed
        leftover.unlink()
    for name in plan.layouts:
        work.array(name).create()
    sizes = [sum(steps[a:b]) for a, b in plan.units]
    missing = {n for n in range(len(sizes)) if not work.has(n)}
    shared = [job for job in plan.shared() if not work.array(job[0]).has(job[1])]
    by_unit: dict[int, list[Job]] = {}
    for job in shared:
        for unit in job[2]:
            by_unit.setdefault(unit, []).append(job)
    jobs: deque[Job] = deque([*(job for job in shared if missing.isdisjoint(job[2])), *sorted(missing)])

    def next_jobs(job: Job) -> list[Job]:
        if not isinstance(job, int):
            return []
        missing.discard(job)
        return [one for one in by_unit.get(job, []) if isinstance(one, tuple) and missing.isdisjoint(one[2])]

    with progress_bar() as bar:
        todo = sum(sizes[n] for n in missing)
        if done := sum(sizes) - todo:
            console.print(f"convert: going on after {done} of {sum(sizes)} steps", highlight=False)
        task = bar.add_task("convert, steps", total=todo, note="")
        with closing(_done(work, jobs, next_jobs, workers)) as finished:  # type: ignore[type-var]
            for one in finished:
                bar.advance(task, sizes[one] if isinstance(one, int) else 0)
    for name in plan.layouts:
        work.array(name).close()


def _write_episodes(
    work: _Work, folder: Path, facts: list[dict[str, Any]], shapes: Sequence[EpisodeShape], split: NDArray[np.uint8]
) -> dict[str, Any]:  # fmt: skip
    """Ends, split, tasks and checksums as the arrays `OF_EPISODES`; the store's attributes are returned."""
    plan = work.plan
    tasks = list(dict.fromkeys(fact["task"] for fact in facts))
    ends = plan.starts[f"frames/{plan.description.cameras[0]}"][1:]
    checksums = np.frombuffer(b"".join(bytes.fromhex(fact["checksum"]) for fact in facts), dtype=np.uint8)
    of_episodes: dict[str, NDArray[Any]] = {
        "episode_ends": ends, "episode_split": split, "episode_checksums": checksums.reshape(len(facts), -1),
        "episode_task": np.asarray([tasks.index(fact["task"]) for fact in facts], dtype=np.int64),
    }  # fmt: skip
    for name, values in of_episodes.items():
        write_array(folder / name, values)
    statistics = _statistics(work, ends, split)
    own = []
    for vector, names in plan.description.provenance.get("dimension_names", {}).items():
        width = plan.layouts[vector].row_shape[0] if vector in plan.layouts else len(names)
        if 1 < len(names) != width:
            own.append(f"the source names {len(names)} dimensions of {vector}, which has {width}: the names are not used")
    sides = {shape.held_out for shape in shapes}
    own += [ONE_EPISODE] if not split.any() else [OWN_SPLIT] if False in sides and True not in sides else []
    for note in own:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    return {
        "schema_version": STORE_SCHEMA, "source": plan.description.model_dump(mode="json"), "tasks": tasks,
        "notes": [*plan.source.notes, *own], "compression": plan.params.compression,
        "picture_error": _picture_error(plan, facts),
        "episode_instructions": [fact["instruction"] for fact in facts],
        "episode_provenance": [fact["provenance"] for fact in facts],
        "episode_numbers": list(getattr(plan.source, "numbers", range(len(facts)))),
        "episode_names": [shape.name for shape in shapes],
        "statistics": None if statistics is None else statistics.model_dump(mode="json"),
        **({"foreseen": plan.params.foreseen} if plan.params.foreseen > 1 else {}),
    }  # fmt: skip


def _picture_error(plan: Plan, facts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """By camera what was lost, and the quality that was asked for; None where nothing was."""
    if plan.params.compression not in LOSSY:
        return None
    measured = {camera: [fact["errors"][f"frames/{camera}"] for fact in facts] for camera in plan.description.cameras}
    return {"quality": plan.params.quality, **{camera: stated_error(errors) for camera, errors in measured.items()}}


def _statistics(work: _Work, ends: NDArray[np.int64], split: NDArray[np.uint8]) -> Statistics | None:
    """Of the training episodes alone, read back from the written arrays one episode at a time; None without actions."""
    plan = work.plan
    if "actions" not in plan.layouts:
        return None
    starts = np.concatenate([[0], ends[:-1]])
    training = [(int(starts[e]), int(ends[e])) for e in np.flatnonzero(split == 0)]

    def of(name: str) -> VectorStatistics:
        reader = RowReader(work.array(name).path)
        return vector_statistics(lambda: (reader.read_range(*b).astype(np.float32, copy=False) for b in training))

    actions, params = of("actions"), plan.params
    convention = ActionConvention(
        dimensions=len(actions.mean), binary_dimensions=params.binary_dimensions, normalisation=params.normalisation,
        binary_values=None if params.binary_values == [-1.0, 1.0] else params.binary_values, unwrap=params.unwrap,
        differences=params.differences, limits=params.limits,
    )  # fmt: skip
    proprioception = of("proprioception") if "proprioception" in plan.layouts else None
    return Statistics(convention=convention, actions=actions, proprioception=proprioception)
