"""Does a store hold what it says? Every byte of it is read once, row by row, and each finding names its place.

Memory does not grow with the number of rows: one block of chunks of each array is held, the timestamps of one episode, and
a few bytes per episode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.console import track
from svam.contract import SEGMENTATION_CLASSES, VECTORS, ContractError, VectorStatistics
from svam.episodes.arrays import shard_file
from svam.episodes.checksums import EpisodeDigest
from svam.episodes.inspection import QUANTITIES, training_blocks
from svam.episodes.statistics import vector_statistics
from svam.episodes.store import SPLITS, EpisodeStore
from svam.files import FileError

GAP_PERIODS = 1.5
"""A step between two timestamps that lasts longer than this many periods is a gap."""
RATE_TOLERANCE = 0.1
OUTLIER_RANGES = 10.0
"""A value this many times the width of the training rows' 1 %..99 % range beyond that range is an outlier."""
LABELS = ("depth", "segmentation")
_BLOCK_BYTES = 1 << 22
_TOLD = 4
"""Faults, and warnings, of one check that are written out; the others are counted."""
Pieces = Iterator[tuple[int, NDArray[Any]]]
"""First row and values of consecutive pieces of an episode."""


@dataclass
class Check:
    """One line of the report: `faults` make the store invalid, `warnings` a person should see; `fine` is said otherwise."""

    name: str
    fine: str = ""
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def text(self) -> str:
        """What was found, or what is fine."""
        told = [*self.faults[:_TOLD], *self.warnings[:_TOLD]]
        untold = len(self.faults) + len(self.warnings) - len(told)
        return "; ".join([*told, *([f"and {untold} more"] if untold else [])]) or self.fine


class Validation:
    """All checks of one store, by name, in the order in which they are printed."""

    def __init__(self, store: EpisodeStore) -> None:
        self.store = store
        self._arrays = store.arrays
        self._labelled = {name: found.rows for name in LABELS if (found := store.annotation(name)) is not None}
        sizes = {camera: self._arrays[f"frames/{camera}"].shape[1:3] for camera in store.cameras}
        counts = np.bincount(store.episode_split, minlength=len(SPLITS)).tolist()
        fine = {
            "files": f"{len(self._arrays)} arrays, all shards there and whole, nothing else",
            **{f"frames/{name}": f"{len(store):,} frames of {width} x {height}" for name, (height, width) in sizes.items()},
            **{
                name: f"{len(store):,} rows of {self._arrays[name].shape[1]} finite numbers"
                for name in filter(store.has, VECTORS)
            },
            "timestamps": "increase, without gaps" if "timestamps" in self._arrays else "none kept, nothing to check",
            **{f"annotations/{name}/values": f"{len(rows):,} frames, in range" for name, rows in self._labelled.items()},
            "split": " and ".join(f"{n} episodes {split.replace('_', ' ')}" for n, split in zip(counts, SPLITS, strict=True)),
            "instructions": f"{len(set(store.episode_instructions)):,} sentences for {len(store.tasks):,} tasks",
            "statistics": "equal those of the training episodes" if store.attributes.statistics else "none: no actions",
            "checksums": f"{len(store.episode_ends):,} episodes as they were converted",
            "duplicates": "none",
        }  # fmt: skip
        self.checks = {name: Check(name, text) for name, text in fine.items()}
        self._broken = False
        self._held: dict[str, tuple[int, list[tuple[int, NDArray[Any]]]]] = {}
        self._stated: list[str] | None = None
        self._seen: dict[bytes, int] = {}
        self._seen_frames: dict[bytes, tuple[int, bytes]] = {}
        self._extremes: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        self._statistics: dict[str, VectorStatistics] = {}

    def place(self, row: int) -> str:
        """Episode, row, and step within the episode, for messages."""
        episode = int(self.store.episode_of(np.asarray([row]))[0])
        return f"episode {episode}, row {row} (its step {row - self.store.bounds(episode)[0]})"

    def run(self) -> None:
        """Read everything."""
        store = self.store
        try:
            self._stated = store.episode_checksums()
        except FileError as error:
            self.checks["checksums"].faults.append(str(error))
        self._check_files()
        self._check_split()
        self._check_instructions()
        for name in filter(store.has, VECTORS):
            self._check_statistics(name)
        episodes = len(store.episode_ends)
        for episode in track(range(episodes), "episodes", episodes):
            start, end = store.bounds(episode)
            self._broken, digest = False, EpisodeDigest()
            for camera in store.cameras:
                self._camera(episode, f"frames/{camera}", digest)
            for name in filter(store.has, VECTORS):
                self._vector(name, self._pieces(name, start, end, digest))
            if "timestamps" in self._arrays:
                self._timestamps(episode, self._pieces("timestamps", start, end, digest))
            for name, rows in self._labelled.items():
                self._annotation(name, rows, start, end, digest)
            if not self._broken:
                self._checksum(episode, digest)
        self._check_ranges()

    def _pieces(self, name: str, start: int, end: int, digest: EpisodeDigest) -> Pieces:
        """Pieces of rows start..end - 1 of an array in order, but for damaged ones; all goes into `digest`. The block of chunks
        that was read last is held, since it may go on with the next episode."""
        reader = self._arrays[name]
        step = max(1, _BLOCK_BYTES // max(1, reader.row_bytes * reader.chunk_rows)) * reader.chunk_rows
        digest.update(name, np.zeros((0, *reader.shape[1:]), reader.dtype))
        missing = end - start
        for first in range(start // step * step, end, step):
            if name not in self._held or self._held[name][0] != first:
                self._held[name] = first, self._load(name, first, min(first + step, len(reader)))
            for at, block in self._held[name][1]:
                low, high = max(at, start), min(at + len(block), end)
                if low < high:
                    piece = block[low - at : high - at]
                    digest.update(name, piece)
                    missing -= len(piece)
                    yield low, piece
        self._broken |= missing > 0

    def _load(self, name: str, first: int, last: int) -> list[tuple[int, NDArray[Any]]]:
        """First row and values of what can be read of rows first..last - 1; a chunk that cannot is a fault."""
        reader = self._arrays[name]
        try:
            return [(first, reader.read_range(first, last))]
        except FileError as error:  # which chunk is it?
            if last - first > reader.chunk_rows:
                starts = range(first, last, reader.chunk_rows)
                return [one for at in starts for one in self._load(name, at, min(at + reader.chunk_rows, last))]
            self._damaged(name, first, last, error)
            return []

    def _damaged(self, name: str, first: int, last: int, error: FileError) -> None:
        rows = np.asarray([first, last - 1])
        if name.startswith("annotations/"):
            rows = self._labelled[name.split("/")[1]][rows]
        episodes = sorted(set(self.store.episode_of(rows).tolist()))
        where = f"episode {episodes[0]}" if len(episodes) == 1 else f"episodes {episodes[0]} to {episodes[1]}"
        self.checks[name].faults.append(f"rows {rows[0]}..{rows[1]} ({where}) cannot be read: {error}")

    def _check_files(self) -> None:
        """Nothing lies beside the files of the store; that these are whole was seen when it was opened."""
        path, check = self.store.path, self.checks["files"]
        expected = {path / parent / "zarr.json" for name in self._arrays for parent in [Path(name), *Path(name).parents]}
        for reader in self._arrays.values():
            expected |= {shard_file(reader.path, n, len(reader.shape)) for n in range(-(-len(reader) // reader.shard_rows))}
        for file in sorted(file for file in path.rglob("*") if file.is_file() and file not in expected):
            check.warnings.append(f"{file} is no file of the store")

    def _check_split(self) -> None:
        store, check = self.store, self.checks["split"]
        for number, task in enumerate(store.tasks):
            sides = store.episode_split[store.episode_task == number]
            if not len(sides):
                check.warnings.append(f"task {task!r} has no episode")
            elif (sides == SPLITS.index("held_out")).all():
                check.warnings.append(f"task {task!r} has no training episode")

    def _check_instructions(self) -> None:
        store, check = self.store, self.checks["instructions"]
        for episode, sentence in enumerate(store.episode_instructions):
            if not sentence.strip():
                check.faults.append(f"episode {episode}: the instruction is empty")
            elif sentence in store.instructions[store.task_of(episode)].get("held_out", []):
                check.warnings.append(f"episode {episode}: its instruction {sentence!r} is one of those held out")

    def _check_statistics(self, name: str) -> None:
        """Computed from the training episodes again; they also say what an outlier is."""
        check = self.checks["statistics"]
        stored: VectorStatistics | None = getattr(self.store.attributes.statistics, name, None)
        try:
            found = vector_statistics(lambda: training_blocks(self.store, name))
        except (FileError, ContractError):
            if stored is not None:
                check.faults.append(f"those of {name} cannot be computed: see {name}")
            return
        self._statistics[name] = found
        if stored is None:
            return
        if stored.count != found.count:
            check.faults.append(f"{name}: {stored.count} training rows stated, {found.count} found")
        scale = np.maximum(np.abs(found.min), np.abs(found.max))
        for quantity in QUANTITIES:
            a, b = np.asarray(getattr(stored, quantity)), np.asarray(getattr(found, quantity))
            for d in np.flatnonzero(~(np.abs(a - b) <= 1e-6 * scale)).tolist():
                said = f"{name}: {quantity}[{d}] is {a[d]:.6g} in the store, {b[d]:.6g} by its training episodes"
                check.faults.append(said)

    def _camera(self, episode: int, name: str, digest: EpisodeDigest) -> None:
        start, end = self.store.bounds(episode)
        opening: NDArray[np.uint8] | None = None
        first_blank, blanks, same = 0, 0, 0
        for first, block in self._pieces(name, start, end, digest):
            opening = block[0].copy() if opening is None else opening
            if same == first - start and (block[-1] == opening).all():  # the last frame decides for nearly every block
                same += int((block == opening).all(axis=(1, 2, 3)).sum())
            # Two pixels decide for nearly every frame; only the rest is looked at whole.
            middle = block[:, block.shape[1] // 2, block.shape[2] // 2]
            for k in np.flatnonzero((block[:, 0, 0] == middle).all(axis=1)).tolist():
                if (block[k] == block[k, 0, 0]).all():
                    first_blank, blanks = first_blank if blanks else first + k, blanks + 1
        warnings = self.checks[name].warnings
        if blanks:
            where = f"of episode {episode} are one colour, the first at row {first_blank}"
            warnings.append(f"{blanks} of {end - start} frames {where}")
        elif same == end - start > 1:
            warnings.append(f"all {end - start} frames of episode {episode} are the same")

    def _vector(self, name: str, pieces: Pieces) -> None:
        kept = self.store.attributes.statistics
        binary = kept.convention.binary_dimensions if kept is not None and name == "actions" else []
        for first, block in pieces:
            wrong = ~np.isfinite(block)
            expected = "a finite number"
            if not wrong.any():
                wrong[:, binary] = ~np.isin(block[:, binary], (-1.0, 1.0))
                expected = "-1 or 1 (binary)"
                low, high = self._extremes.get(name, (block[0], block[0]))
                self._extremes[name] = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
            if wrong.any():
                at, d = (int(i) for i in np.argwhere(wrong)[0])
                said = f"{self.place(first + at)}: {name}[{d}] is {block[at, d]:g}, expected {expected}"
                self.checks[name].faults.append(said)

    def _timestamps(self, episode: int, pieces: Pieces) -> None:
        store, check = self.store, self.checks["timestamps"]
        found = list(pieces)
        rows = np.concatenate([np.arange(first, first + len(block)) for first, block in found] or [np.zeros(0, np.int64)])
        stamps = np.concatenate([block for _, block in found] or [np.zeros(0)])
        wrong = np.flatnonzero(~np.isfinite(stamps) | ~(np.diff(stamps, prepend=-np.inf) > 0))
        if len(wrong):
            at = int(wrong[0])
            check.faults.append(f"{self.place(int(rows[at]))}: {stamps[at]:g} s, expected a finite number above the one before")
            return
        steps = np.diff(stamps) * store.rate_hz / np.diff(rows)
        gaps = int((steps > GAP_PERIODS).sum())
        if gaps:
            at = int(np.argmax(steps))
            length = f"{steps[at] / store.rate_hz:.3g} s ({steps[at]:.1f} steps)"
            check.warnings.append(f"episode {episode} has {gaps} gaps, the longest {length} before row {rows[at + 1]}")
        elif len(steps) and abs(steps.mean() - 1.0) > RATE_TOLERANCE:
            rate = store.rate_hz / steps.mean()
            check.warnings.append(f"episode {episode} runs at {rate:.3g} Hz, the store says {store.rate_hz:g} Hz")

    def _annotation(self, label: str, labelled: NDArray[np.int64], start: int, end: int, digest: EpisodeDigest) -> None:
        """labelled: (M,) rows of the store that have the label."""
        a, b = np.searchsorted(labelled, (start, end)).tolist()
        name = f"annotations/{label}/values"
        digest.update(f"annotations/{label}/index", labelled[a:b] - start)
        for first, block in self._pieces(name, a, b, digest):
            if label == "depth":
                wrong, expected = ~(np.isfinite(block) & (block >= 0)), "metres"
            else:
                wrong, expected = block >= len(SEGMENTATION_CLASSES), f"classes 0..{len(SEGMENTATION_CLASSES) - 1}"
            if wrong.any():
                at, y, x = (int(i) for i in np.argwhere(wrong)[0])
                place = self.place(int(labelled[first + at]))
                self.checks[name].faults.append(f"{place}, pixel ({y}, {x}): {block[at, y, x]}, expected {expected}")

    def _checksum(self, episode: int, digest: EpisodeDigest) -> None:
        store = self.store
        whole, frames = digest.digest(), digest.digest("frames/")
        # Frames with a loss are not those that were converted; their chunks' checksums have told that none is damaged.
        compared = whole if store.attributes.picture_error is None else digest.digest(but="frames/")
        if self._stated is not None and compared.hex() != self._stated[episode]:
            file = store.episode_provenance[episode].get("file")
            said = f"episode {episode}{f' ({file})' if file else ''} is not as it was converted"
            self.checks["checksums"].faults.append(said)
        sentence = store.episode_instructions[episode]
        twin = self._seen.setdefault(whole + sentence.encode(errors="replace"), episode)
        other, other_whole = self._seen_frames.setdefault(frames, (episode, whole))
        if twin == episode == other:
            return
        check, first = self.checks["duplicates"], twin if twin != episode else other
        leak = "" if store.episode_split[first] == store.episode_split[episode] else ", and one of them is held out"
        if twin != episode:
            check.faults.append(f"episodes {twin} and {episode} are the same{leak}")
            return
        said = store.episode_instructions[other]
        differences = [f"the instructions {said!r} and {sentence!r}"] if said != sentence else []
        differences += ["other vectors or labels"] if other_whole != whole else []
        text = f"episodes {other} and {episode} have the same frames with {' and '.join(differences)}{leak}"
        (check.faults if leak else check.warnings).append(text)

    def _check_ranges(self) -> None:
        """What only all rows of a vector together show."""
        for name, (low, high) in self._extremes.items():
            warnings = self.checks[name].warnings
            if name == "actions" and (constant := np.flatnonzero(low == high).tolist()):
                warnings.append(f"dimensions that never change: {', '.join(map(str, constant))}")
            if (statistics := self._statistics.get(name)) is None:
                continue
            q01, q99 = np.asarray(statistics.q01), np.asarray(statistics.q99)
            beyond = np.maximum(q01 - low, high - q99) > OUTLIER_RANGES * (q99 - q01)
            # A dimension that hardly ever moves has no range to be outside of.
            moves = q99 - q01 > 1e-6 * np.maximum(np.abs(q01), np.abs(q99))
            for d in np.flatnonzero(beyond & moves).tolist():
                usual = f"98 % of the training rows from {q01[d]:.4g} to {q99[d]:.4g}"
                warnings.append(f"outliers in dimension {d}, which lies from {low[d]:g} to {high[d]:g}, {usual}")


def validate(path: Path) -> list[Check]:
    """All checks of the store at `path`, in order. A store that does not open has one check, `store`, that says why."""
    try:
        validation = Validation(EpisodeStore(path))
    except (FileError, ContractError) as error:
        return [Check("store", faults=[str(error)])]
    validation.run()
    return list(validation.checks.values())
