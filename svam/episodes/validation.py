"""Does a store hold what it says? Every byte of it is read once, row by row, and each finding names its place.

Memory does not grow with the number of rows: one block of chunks of each array is held, and a few bytes per episode.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
        for name in VECTORS:
            if store.has(name):
                self._check_statistics(name)
        vectors = {name: Rows(name, self._arrays[name], self._damaged) for name in VECTORS if store.has(name)}
        cameras = {
            camera: Rows(f"frames/{camera}", self._arrays[f"frames/{camera}"], self._damaged) for camera in store.cameras
        }
        labels = {
            name: Rows(f"annotations/{name}/values", self._arrays[f"annotations/{name}/values"], self._damaged)
            for name in ("depth", "segmentation") if store.annotation(name) is not None
        }  # fmt: skip
        stamps = Rows("timestamps", self._arrays["timestamps"], self._damaged) if "timestamps" in self._arrays else None
        for episode in range(len(store.episode_ends)):
            self._broken, digest = False, EpisodeDigest()
            for camera, rows in cameras.items():
                self._camera(episode, camera, rows, digest, advance)
            for name, rows in vectors.items():
                self._vector(episode, name, rows, digest)
            if stamps is not None:
                self._timestamps(episode, stamps, digest)
            for name, rows in labels.items():
                self._annotation(episode, name, rows, digest)
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
        for name in VECTORS:
            if store.has(name):
                self.check(name, f"{len(store):,} rows of {self._arrays[name].shape[1]} finite numbers")
        self.check("timestamps", "increase, without gaps" if "timestamps" in self._arrays else "none kept, nothing to check")
        for name in ("depth", "segmentation"):
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
        known |= {f"annotations/{name}/{part}" for name in ("depth", "segmentation") for part in ("values", "index")}
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
        check, kept = self.check("statistics"), self.store.attributes.statistics
        try:
            found = vector_statistics(lambda: training_blocks(self.store, name))
        except (FileError, ContractError):
            if kept is not None and getattr(kept, name, None) is not None:
                check.fault(f"those of {name} cannot be computed: see {name}")
            return
        self._outliers[name] = Outliers.of(found)
        stored: VectorStatistics | None = getattr(kept, name, None) if kept is not None else None
        if stored is None:
            return
        if stored.count != found.count:
            check.fault(f"{name}: {stored.count} training rows stated, {found.count} found")
        scale = np.maximum(np.abs(found.min), np.abs(found.max))
        for quantity in QUANTITIES:
            a, b = np.asarray(getattr(stored, quantity)), np.asarray(getattr(found, quantity))
            for d in np.flatnonzero(~(np.abs(a - b) <= 1e-6 * scale)).tolist():
                check.fault(f"{name}: {quantity}[{d}] is {a[d]:.6g} in the store, {b[d]:.6g} by its training episodes")

    def _camera(
        self, episode: int, camera: str, rows: Rows, digest: EpisodeDigest, advance: Callable[[int], None]
    ) -> None:  # fmt: skip
        start, end = self.store.bounds(episode)
        opening: NDArray[np.uint8] | None = None
        blank: list[int] = []
        blanks, still = 0, end - start > 1
        for first, last, block in rows.pieces(start, end):
            advance(last - first)
            if block is None:
                still = False
                continue
            digest.update(rows.name, block)
            opening = block[0].copy() if opening is None else opening
            still = still and bool((block[-1] == opening).all()) and bool((block == opening).all())
            # Two pixels decide for nearly every frame; only the rest is looked at whole.
            middle = block[:, block.shape[1] // 2, block.shape[2] // 2]
            for k in np.flatnonzero((block[:, 0, 0] == middle).all(axis=1)).tolist():
                if (block[k] == block[k, 0, 0]).all():
                    blanks += 1
                    blank = blank or [first + k]
        if blanks:
            check = self.check(f"frames/{camera}")
            check.warn(f"{blanks} of {end - start} frames of episode {episode} are one colour, the first at row {blank[0]}")
        elif still:
            self.check(f"frames/{camera}").warn(f"all {end - start} frames of episode {episode} are the same")

    def _vector(self, episode: int, name: str, rows: Rows, digest: EpisodeDigest) -> None:
        check, kept = self.check(name), self.store.attributes.statistics
        binary = kept.convention.binary_dimensions if kept is not None and name == "actions" else []
        for first, _, block in rows.pieces(*self.store.bounds(episode)):
            if block is None:
                continue
            digest.update(name, block)
            finite = np.isfinite(block)
            if not finite.all():
                at, d = (int(i) for i in np.argwhere(~finite)[0])
                check.fault(f"{self.place(first + at)}: {name}[{d}] is {block[at, d]}, expected a finite number")
                continue
            for d in binary:
                wrong = np.flatnonzero(~np.isin(block[:, d], (-1.0, 1.0)))
                if len(wrong):
                    at = int(wrong[0])
                    check.fault(f"{self.place(first + at)}: {name}[{d}] is {block[at, d]:g}, expected -1 or 1 (binary)")
            low, high = self._extremes.get(name, (block[0], block[0]))
            self._extremes[name] = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
            if name in self._outliers:
                self._outliers[name].look(first, block)

    def _timestamps(self, episode: int, rows: Rows, digest: EpisodeDigest) -> None:
        store, check = self.store, self.check("timestamps")
        start, end = store.bounds(episode)
        period = 1.0 / store.rate_hz
        gaps, longest, where, before, opening = 0, 0.0, 0, -np.inf, np.nan
        for first, _, block in rows.pieces(start, end):
            if block is None:
                before = -np.inf
                continue
            digest.update("timestamps", block)
            steps = np.diff(block, prepend=before)
            wrong = np.flatnonzero(~np.isfinite(block) | ~(steps > 0))
            if len(wrong):
                at = int(wrong[0])
                check.fault(f"{self.place(first + at)}: {block[at]:g} s, expected a finite number above the one before")
                return
            opening = block[0] if np.isnan(opening) else opening
            before = float(block[-1])
            steps = np.where(np.isfinite(steps), steps, 0.0)
            gaps += int((steps > GAP_PERIODS * period).sum())
            if steps.max() > longest:
                longest, where = float(steps.max()), first + int(np.argmax(steps))
        if gaps:
            length = f"{longest:.3g} s ({longest / period:.1f} steps)"
            check.warn(f"episode {episode} has {gaps} gaps, the longest {length} before row {where}")
        elif end - start > 1 and abs((before - opening) / (end - start - 1) / period - 1.0) > RATE_TOLERANCE:
            rate = (end - start - 1) / (before - opening)
            check.warn(f"episode {episode} runs at {rate:.3g} Hz, the store says {store.rate_hz:g} Hz")

    def _annotation(self, episode: int, name: str, rows: Rows, digest: EpisodeDigest) -> None:
        annotated = self.store.annotation(name)
        if annotated is None:
            return
        start, end = self.store.bounds(episode)
        a, b = np.searchsorted(annotated.rows, (start, end)).tolist()
        digest.update(f"annotations/{name}/index", annotated.rows[a:b] - start)
        if a == b:
            digest.update(rows.name, np.zeros((0, *self._arrays[rows.name].shape[1:]), self._arrays[rows.name].dtype))
        for first, _, block in rows.pieces(a, b):
            if block is None:
                continue
            digest.update(rows.name, block)
            if name == "depth":
                wrong, expected = ~(np.isfinite(block) & (block >= 0)), "metres"
            else:
                wrong, expected = block >= len(SEGMENTATION_CLASSES), f"classes 0..{len(SEGMENTATION_CLASSES) - 1}"
            if wrong.any():
                at, y, x = (int(i) for i in np.argwhere(wrong)[0])
                row = int(annotated.rows[first + at])
                self.check(rows.name).fault(f"{self.place(row)}, pixel ({y}, {x}): {block[at, y, x]}, expected {expected}")

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
        check = self.check("duplicates")
        leak = "" if store.episode_split[twin if twin != episode else other] == store.episode_split[episode] else (
            ", and one of them is held out"
        )  # fmt: skip
        if twin != episode:
            check.fault(f"episodes {twin} and {episode} are the same{leak}")
            return
        differences = []
        if (first := store.episode_instructions[other]) != sentence:
            differences.append(f"the instructions {first!r} and {sentence!r}")
        if other_whole != whole:
            differences.append("other vectors or labels")
        text = f"episodes {other} and {episode} have the same frames with {' and '.join(differences)}{leak}"
        (check.fault if leak else check.warn)(text)

    def _summarise(self) -> None:
        """What only all rows together show."""
        if "actions" in self._extremes:
            low, high = self._extremes["actions"]
            if len(constant := np.flatnonzero(low == high).tolist()):
                self.check("actions").warn(f"dimensions that never change: {', '.join(str(d) for d in constant)}")
        for name, outliers in self._outliers.items():
            for d, (_, value, row) in sorted(outliers.worst.items(), key=lambda item: -item[1][0]):
                self.check(name).warn(
                    f"{outliers.count[d]} outliers in dimension {d}, the furthest {value:g} at {self.place(row)}"
                )


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
