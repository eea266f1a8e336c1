"""Does a store hold what it says? Every byte of it is read once, row by row, and each finding names its place.

Memory does not grow with the number of rows: one block of chunks of each array is held, the timestamps of one episode, and
a few bytes per episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import SEGMENTATION_CLASSES, VECTORS, ContractError, VectorStatistics
from svam.episodes.arrays import shard_file
from svam.episodes.checksums import EpisodeDigest
from svam.episodes.findings import Check, Outliers, Rows
from svam.episodes.inspection import QUANTITIES, stored_arrays, training_blocks
from svam.episodes.statistics import vector_statistics
from svam.episodes.store import SPLITS, EpisodeStore
from svam.files import FileError

GAP_PERIODS = 1.5
"""A step between two timestamps that lasts longer than this many periods is a gap."""
RATE_TOLERANCE = 0.1
LABELS = ("depth", "segmentation")
Pieces = Iterator[tuple[int, NDArray[Any]]]
"""First row and values of consecutive pieces of an episode."""


class Validation:
    """All checks of one store. `run` reports its progress in rows of cameras, of which there are `total`."""

    def __init__(self, store: EpisodeStore) -> None:
        self.store = store
        self.total = len(store) * len(store.cameras)
        self.checks: dict[str, Check] = {}
        self._arrays = stored_arrays(store.path)
        self._broken = False
        self._stated: list[str] | None = None
        self._seen: dict[bytes, int] = {}
        self._seen_frames: dict[bytes, tuple[int, bytes]] = {}
        self._extremes: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        self._outliers: dict[str, Outliers] = {}

    def check(self, name: str, fine: str = "") -> Check:
        """The line `name`, made when it is first asked for."""
        return self.checks.setdefault(name, Check(name, fine))

    def place(self, row: int) -> str:
        """Episode, row, and step within the episode, for messages."""
        episode = int(self.store.episode_of(np.asarray([row]))[0])
        return f"episode {episode}, row {row} (its step {row - self.store.bounds(episode)[0]})"

    def _damaged(self, name: str, first: int, last: int, error: FileError) -> None:
        self._broken = True
        rows = np.asarray([first, last - 1])
        if name.startswith("annotations/"):
            labelled = self.store.annotation(name.split("/")[1])
            rows = rows if labelled is None else labelled.rows[rows]
        episodes = sorted(set(self.store.episode_of(rows).tolist()))
        where = f"episode {episodes[0]}" if len(episodes) == 1 else f"episodes {episodes[0]} to {episodes[1]}"
        self.check(name).fault(f"rows {rows[0]}..{rows[1]} ({where}) cannot be read: {error}")

    def run(self, advance: Callable[[int], None]) -> list[Check]:
        """Read everything; the checks in the order in which they are printed."""
        store = self.store
        self._declare()
        try:
            self._stated = store.episode_checksums()
        except FileError as error:
            self.check("checksums").fault(str(error))
        self._check_files()
        self._check_split()
        self._check_instructions()
        for name in filter(store.has, VECTORS):
            self._check_statistics(name)
        rows = {name: Rows(name, reader, self._damaged) for name, reader in self._arrays.items()}
        for episode, (start, end) in enumerate(map(store.bounds, range(len(store.episode_ends)))):
            self._broken, digest = False, EpisodeDigest()
            for camera in store.cameras:
                self._camera(episode, rows[f"frames/{camera}"].pieces(start, end, digest), self.check(f"frames/{camera}"))
                advance(end - start)
            for name in filter(store.has, VECTORS):
                self._vector(name, rows[name].pieces(start, end, digest))
            if "timestamps" in rows:
                self._timestamps(episode, rows["timestamps"].pieces(start, end, digest))
            for name in LABELS:
                if (annotated := store.annotation(name)) is not None:
                    self._annotation(annotated.rows, start, end, rows[f"annotations/{name}/values"], digest)
            if not self._broken:
                self._checksum(episode, digest)
        self._summarise()
        return list(self.checks.values())

    def _declare(self) -> None:
        """All lines, in order, with what each says when nothing is wrong."""
        store = self.store
        self.check("files", f"{len(self._arrays)} arrays, all shards there and whole, nothing else")
        for camera in store.cameras:
            height, width = self._arrays[f"frames/{camera}"].shape[1:3]
            self.check(f"frames/{camera}", f"{len(store):,} frames of {width} x {height}")
        for name in filter(store.has, VECTORS):
            self.check(name, f"{len(store):,} rows of {self._arrays[name].shape[1]} finite numbers")
        self.check("timestamps", "increase, without gaps" if "timestamps" in self._arrays else "none kept, nothing to check")
        for name in LABELS:
            if (annotated := store.annotation(name)) is not None:
                self.check(f"annotations/{name}/values", f"{len(annotated.rows):,} frames, in range")
        counts = np.bincount(store.episode_split, minlength=len(SPLITS)).tolist()
        sides = " and ".join(f"{count} episodes {split.replace('_', ' ')}" for count, split in zip(counts, SPLITS, strict=True))
        self.check("split", sides)
        self.check("instructions", f"{len(set(store.episode_instructions)):,} sentences for {len(store.tasks):,} tasks")
        self.check("statistics", "equal those of the training episodes" if store.attributes.statistics else "none: no actions")
        self.check("checksums", f"{len(store.episode_ends):,} episodes as they were converted")
        self.check("duplicates", "none")

    def _check_files(self) -> None:
        """Every shard is there, of the size that its array states, and nothing beside them."""
        path, check = self.store.path, self.check("files")
        expected = {path / name / "zarr.json" for name in self._arrays}
        expected |= {path / parent / "zarr.json" for name in self._arrays for parent in Path(name).parents}
        known = {f"frames/{camera}" for camera in self.store.cameras} | set(VECTORS)
        known |= {"episode_ends", "episode_split", "episode_task", "episode_checksums", "timestamps"}
        known |= {f"annotations/{name}/{part}" for name in LABELS for part in ("values", "index")}
        for name, reader in self._arrays.items():
            if name not in known:
                check.warn(f"array {name} is none of the store's and was not read")
            expected |= {shard_file(reader.path, n, len(reader.shape)) for n in range(-(-len(reader) // reader.shard_rows))}
            try:
                reader.check()
            except FileError as error:
                check.fault(str(error))
        for file in sorted(file for file in path.rglob("*") if file.is_file() and file not in expected):
            check.warn(f"{file} is no file of the store")

    def _check_split(self) -> None:
        store, check = self.store, self.check("split")
        for number, task in enumerate(store.tasks):
            sides = store.episode_split[store.episode_task == number]
            if not len(sides):
                check.warn(f"task {task!r} has no episode")
            elif (sides == SPLITS.index("held_out")).all():
                check.warn(f"task {task!r} has no training episode")

    def _check_instructions(self) -> None:
        store, check = self.store, self.check("instructions")
        for episode, sentence in enumerate(store.episode_instructions):
            if not sentence.strip():
                check.fault(f"episode {episode}: the instruction is empty")
            elif sentence in store.instructions[store.task_of(episode)].get("held_out", []):
                check.warn(f"episode {episode}: its instruction {sentence!r} is one of those held out")

    def _check_statistics(self, name: str) -> None:
        """Computed from the training episodes again; they also say what an outlier is."""
        check = self.check("statistics")
        stored: VectorStatistics | None = getattr(self.store.attributes.statistics, name, None)
        try:
            found = vector_statistics(lambda: training_blocks(self.store, name))
        except (FileError, ContractError):
            if stored is not None:
                check.fault(f"those of {name} cannot be computed: see {name}")
            return
        self._outliers[name] = Outliers.of(found)
        if stored is None:
            return
        if stored.count != found.count:
            check.fault(f"{name}: {stored.count} training rows stated, {found.count} found")
        scale = np.maximum(np.abs(found.min), np.abs(found.max))
        for quantity in QUANTITIES:
            a, b = np.asarray(getattr(stored, quantity)), np.asarray(getattr(found, quantity))
            for d in np.flatnonzero(~(np.abs(a - b) <= 1e-6 * scale)).tolist():
                check.fault(f"{name}: {quantity}[{d}] is {a[d]:.6g} in the store, {b[d]:.6g} by its training episodes")

    def _camera(self, episode: int, pieces: Pieces, check: Check) -> None:
        start, end = self.store.bounds(episode)
        opening: NDArray[np.uint8] | None = None
        first_blank, blanks, same = 0, 0, 0
        for first, block in pieces:
            opening = block[0].copy() if opening is None else opening
            if same == first - start and (block[-1] == opening).all():  # the last frame decides for nearly every block
                same += int((block == opening).all(axis=(1, 2, 3)).sum())
            # Two pixels decide for nearly every frame; only the rest is looked at whole.
            middle = block[:, block.shape[1] // 2, block.shape[2] // 2]
            for k in np.flatnonzero((block[:, 0, 0] == middle).all(axis=1)).tolist():
                if (block[k] == block[k, 0, 0]).all():
                    first_blank, blanks = first_blank if blanks else first + k, blanks + 1
        if blanks:
            check.warn(f"{blanks} of {end - start} frames of episode {episode} are one colour, the first at row {first_blank}")
        elif same == end - start > 1:
            check.warn(f"all {end - start} frames of episode {episode} are the same")

    def _vector(self, name: str, pieces: Pieces) -> None:
        check, kept = self.check(name), self.store.attributes.statistics
        binary = kept.convention.binary_dimensions if kept is not None and name == "actions" else []
        for first, block in pieces:
            wrong = ~np.isfinite(block)
            expected = "a finite number"
            if not wrong.any():
                wrong[:, binary] = ~np.isin(block[:, binary], (-1.0, 1.0))
                expected = "-1 or 1 (binary)"
                low, high = self._extremes.get(name, (block[0], block[0]))
                self._extremes[name] = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
                if name in self._outliers:
                    self._outliers[name].look(first, block)
            if wrong.any():
                at, d = (int(i) for i in np.argwhere(wrong)[0])
                check.fault(f"{self.place(first + at)}: {name}[{d}] is {block[at, d]:g}, expected {expected}")

    def _timestamps(self, episode: int, pieces: Pieces) -> None:
        store, check = self.store, self.check("timestamps")
        found = list(pieces)
        rows = np.concatenate([np.arange(first, first + len(block)) for first, block in found] or [np.zeros(0, np.int64)])
        stamps = np.concatenate([block for _, block in found] or [np.zeros(0)])
        wrong = np.flatnonzero(~np.isfinite(stamps) | ~(np.diff(stamps, prepend=-np.inf) > 0))
        if len(wrong):
            at = int(wrong[0])
            check.fault(f"{self.place(int(rows[at]))}: {stamps[at]:g} s, expected a finite number above the one before")
            return
        steps = np.diff(stamps) * store.rate_hz / np.diff(rows)
        gaps = int((steps > GAP_PERIODS).sum())
        if gaps:
            at = int(np.argmax(steps))
            length = f"{steps[at] / store.rate_hz:.3g} s ({steps[at]:.1f} steps)"
            check.warn(f"episode {episode} has {gaps} gaps, the longest {length} before row {rows[at + 1]}")
        elif len(steps) and abs(steps.mean() - 1.0) > RATE_TOLERANCE:
            rate = store.rate_hz / steps.mean()
            check.warn(f"episode {episode} runs at {rate:.3g} Hz, the store says {store.rate_hz:g} Hz")

    def _annotation(self, labelled: NDArray[np.int64], start: int, end: int, rows: Rows, digest: EpisodeDigest) -> None:
        """labelled: (M,) rows of the store that have labels."""
        a, b = np.searchsorted(labelled, (start, end)).tolist()
        digest.update(rows.name.replace("values", "index"), labelled[a:b] - start)
        for first, block in rows.pieces(a, b, digest):
            if "depth" in rows.name:
                wrong, expected = ~(np.isfinite(block) & (block >= 0)), "metres"
            else:
                wrong, expected = block >= len(SEGMENTATION_CLASSES), f"classes 0..{len(SEGMENTATION_CLASSES) - 1}"
            if wrong.any():
                at, y, x = (int(i) for i in np.argwhere(wrong)[0])
                place = self.place(int(labelled[first + at]))
                self.check(rows.name).fault(f"{place}, pixel ({y}, {x}): {block[at, y, x]}, expected {expected}")

    def _checksum(self, episode: int, digest: EpisodeDigest) -> None:
        store = self.store
        whole, frames = digest.digest(), digest.digest("frames/")
        # Frames with a loss are not those that were converted; their chunks' checksums have told that none is damaged.
        compared = whole if store.attributes.picture_error is None else digest.digest(but="frames/")
        if self._stated is not None and compared.hex() != self._stated[episode]:
            file = store.episode_provenance[episode].get("file")
            self.check("checksums").fault(f"episode {episode}{f' ({file})' if file else ''} is not as it was converted")
        sentence = store.episode_instructions[episode]
        twin = self._seen.setdefault(whole + sentence.encode(errors="replace"), episode)
        other, other_whole = self._seen_frames.setdefault(frames, (episode, whole))
        if twin == episode == other:
            return
        check, first = self.check("duplicates"), twin if twin != episode else other
        leak = "" if store.episode_split[first] == store.episode_split[episode] else ", and one of them is held out"
        if twin != episode:
            check.fault(f"episodes {twin} and {episode} are the same{leak}")
            return
        said = store.episode_instructions[other]
        differences = [f"the instructions {said!r} and {sentence!r}"] if said != sentence else []
        differences += ["other vectors or labels"] if other_whole != whole else []
        text = f"episodes {other} and {episode} have the same frames with {' and '.join(differences)}{leak}"
        (check.fault if leak else check.warn)(text)

    def _summarise(self) -> None:
        """What only all rows together show."""
        if "actions" in self._extremes:
            low, high = self._extremes["actions"]
            if constant := np.flatnonzero(low == high).tolist():
                self.check("actions").warn(f"dimensions that never change: {', '.join(map(str, constant))}")
        for name, outliers in self._outliers.items():
            for d, (_, value, row) in sorted(outliers.worst.items(), key=lambda item: -item[1][0]):
                furthest = f"the furthest {value:g} at {self.place(row)}"
                self.check(name).warn(f"{outliers.count[d]} outliers in dimension {d}, {furthest}")


def validate(path: Path, bar: Callable[[int], Callable[[int], None]]) -> list[Check]:
    """All checks of the store at `path`, in order. `bar` is told the total and returns what is told the progress.

    A store that does not open has one check, `store`, that says why.
    """
    try:
        validation = Validation(EpisodeStore.open(path))
    except (FileError, ContractError) as error:
        check = Check("store")
        check.fault(str(error))
        return [check]
    return validation.run(bar(validation.total))
