"""A content-addressed cache of frozen foresight features, so that no training step ever runs a frozen network.

One folder per context entry and source (`<entry>-<address>`), where the address is the SHA-256 of what computed the
features: the frozen parts' files, the code, the sampler's options, the device. One row per observation, addressed by the
SHA-256 of its frame and instruction. So variants share entries, and more demonstrations reuse the rows of fewer.

    rows.bin     rows of one shape and dtype, one after another: features (T, h, w, C) float16
    index.json   shape, dtype, the source in words, and the observations' addresses in row order

Rows are flushed before the index that lists them is renamed into place: a killed writer leaves rows that no index lists,
and the next writer overwrites them. One run at a time writes; others wait. Its processes, where there are several, take the
batches in turn, each writes rows in their places, and the first lists them. A folder that is deleted to make room stays
readable for those who have it open. Reading is `pread`, row by row: the page cache holds what fits, the process little.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam import processes
from svam.console import console, progress_bar, timed
from svam.contract import ContractError
from svam.errors import MachineError
from svam.files import FileError, locked, named_refusals, read_json, sha256_of_json, write_json

Encode = Callable[[NDArray[np.uint8], list[str], list[str]], Mapping[str, NDArray[Any]]]
"""(frames (B, V H, W, 3) or clips (B, T, V H, W, 3) uint8, instructions, entries) -> entry -> (B, ...) rows; features are
(B, T, h, w, C) float16."""

FLUSH_ROWS = 512
"""Rows between two writes of the index: what a killed run may lose."""


def drawn(entry: str, draw: int) -> str:
    """Name of an entry's features from the `draw`-th noise; the first has the entry's own."""
    return f"{entry}@{draw}" if draw else entry


def observation_address(frame: NDArray[np.uint8], instruction: str) -> str:
    """SHA-256 of a frame (H, W, 3), or a clip, with its shape, and of the sentence that it is encoded with."""
    digest = hashlib.sha256(f"{frame.shape}\0{instruction}\0".encode())
    digest.update(np.ascontiguousarray(frame).tobytes())
    return digest.hexdigest()


class FeatureRows:
    """The rows of one entry and source, open for reading; written to only within `FeatureCache.fill`.

    rows: address of an observation -> number of its row. shape, dtype: of a row; shape is None as long as there is none.
    """

    def __init__(self, directory: Path, source: Mapping[str, Any]) -> None:
        """Open the folder, or begin it anew where its index is missing or lists rows that the file does not hold."""
        self.directory, self.source = directory, dict(source)
        self.shape: tuple[int, ...] | None = None
        self.dtype, self.rows = np.dtype(np.float16), dict[str, int]()
        file, index = directory / "rows.bin", directory / "index.json"
        if index.exists():
            try:
                values = read_json(index)
                self.shape, self.dtype = tuple(int(n) for n in values["shape"]), np.dtype(values["dtype"])
                self.rows = {key: row for row, key in enumerate(values["rows"])}
                whole = file.stat().st_size >= len(self.rows) * self.row_bytes > 0
            except (FileError, OSError, KeyError, TypeError):
                whole = False
            if not whole:
                console.print(f"{directory}: damaged, its features are computed again", style="yellow")
                shutil.rmtree(directory)
                self.shape, self.rows = None, {}
            else:
                os.utime(index)  # making room goes by it
        directory.mkdir(parents=True, exist_ok=True)
        file.touch()
        self._file = file.open("r+b", buffering=0)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; 0 as long as no row has been written."""
        return self.dtype.itemsize * int(np.prod(self.shape)) if self.shape else 0

    def add(self, keys: Iterable[str]) -> None:
        """Give the next rows to these observations, which have none."""
        for key in keys:
            self.rows[key] = len(self.rows)

    def write(self, keys: Sequence[str], values: NDArray[Any]) -> None:
        """Write the rows (B, ...) of observations; they count only once they are listed.

        Raises:
            ContractError: NaN or infinity among the features, or rows of another shape or dtype than those present.
            FileError: the file system refuses.
        """
        if not np.isfinite(values).all():
            raise ContractError(f"{self.directory.name}: a frozen part produced NaN or values beyond float16")
        if self.shape is None:
            self.shape, self.dtype = values.shape[1:], values.dtype
        if (values.shape[1:], values.dtype) != (self.shape, self.dtype):
            rows, present = f"{values.dtype} {values.shape[1:]}", f"{self.dtype} {self.shape}"
            raise ContractError(f"{self.directory.name}: rows are {rows}, those in the cache {present}")
        path = self.directory / "rows.bin"
        for key, row in zip(keys, np.ascontiguousarray(values), strict=True):
            data = memoryview(row).cast("B")
            with named_refusals(path):
                written = os.pwrite(self._file.fileno(), data, self.rows[key] * self.row_bytes)
            if written != len(data):
                raise FileError(f"{path}: the disk took {written} of {len(data)} bytes; is it full?")

    def flush(self) -> None:
        """Make what this process wrote durable."""
        os.fsync(self._file.fileno())

    def list_rows(self, count: int) -> None:
        """State that the first `count` rows are there, and durable."""
        if self.shape is not None:
            rows = list(self.rows)[:count]
            index = {"shape": list(self.shape), "dtype": self.dtype.str, "source": self.source, "rows": rows}
            write_json(self.directory / "index.json", index)

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows by number, (k, ...).

        Raises:
            FileError: the file is shorter than its index says.
        """
        if self.shape is None:
            raise FileError(f"{self.directory}: holds no rows")
        out = np.empty((len(rows), *self.shape), dtype=self.dtype)
        for target, row in zip(out, rows, strict=True):
            if os.preadv(self._file.fileno(), [memoryview(target).cast("B")], int(row) * self.row_bytes) != self.row_bytes:
                raise FileError(f"{self.directory}/rows.bin: truncated at row {int(row)}; delete this folder and run again")
        return out

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class ObservationSet:
    """Observations to have features of: sentences and addresses by position, and how to read frames by position."""

    instructions: list[str]
    frames: Callable[[NDArray[np.int64]], NDArray[np.uint8]]
    addresses: list[str]

    @classmethod
    def of(
        cls, instructions: list[str], frames: Callable[[NDArray[np.int64]], NDArray[np.uint8]], block: int = 1024
    ) -> ObservationSet:
        """Address every observation; reads each frame once, `block` at a time."""
        addresses: list[str] = []
        for start in range(0, len(instructions), block):
            positions = np.arange(start, min(start + block, len(instructions)), dtype=np.int64)
            for position, frame in zip(positions, frames(positions), strict=True):
                addresses.append(observation_address(frame, instructions[position]))
        return cls(instructions, frames, addresses)


class Features:
    """Cached features of a list of observations: entry -> rows, read by the observation's position in that list."""

    def __init__(self, spaces: Mapping[str, FeatureRows], numbers: Mapping[str, NDArray[np.int64]]) -> None:
        """`spaces`: by the names of `drawn`. `numbers`: name -> row of each observation, (n,)."""
        self.spaces, self.numbers = dict(spaces), dict(numbers)
        self.draws: dict[str, list[str]] = {}
        for name in sorted(self.spaces):
            self.draws.setdefault(name.partition("@")[0], []).append(name)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Entry -> (T, h, w, C)."""
        return {entry: self.spaces[entry].shape or () for entry in self.draws}

    def part(self, start: int, end: int) -> Features:
        """The observations `start`..`end - 1`, over the same open files."""
        return Features(self.spaces, {entry: numbers[start:end] for entry, numbers in self.numbers.items()})

    def read(self, positions: NDArray[np.int64], draw: int | None = None) -> dict[str, NDArray[Any]]:
        """Entry -> (k, T, h, w, C) float16; of entries that have several draws the `draw`-th, over and over, else the first."""
        chosen = {entry: names[(draw or 0) % len(names)] for entry, names in self.draws.items()}
        return {entry: self.spaces[name].read(self.numbers[name][positions]) for entry, name in chosen.items()}

    def close(self) -> None:
        for space in self.spaces.values():
            space.close()


class FeatureCache:
    """The folder of all entries, kept within a disk budget by deleting the least recently used."""

    def __init__(self, root: Path, budget_gb: float) -> None:
        self.root = Path(root)
        self.budget = int(budget_gb * 1e9)

    def fill(
        self, observations: ObservationSet, sources: Mapping[str, Mapping[str, Any]], encode: Encode, batch: int
    ) -> Features:
        """Compute what is missing and return the features of `observations`.

        Batches are padded to `batch` observations, so that a row does not depend on which rows were already there.

        Args:
            sources: entry -> everything that decides the numbers of its features, as JSON.

        Raises:
            MachineError: the features of these observations alone exceed the budget.
        """
        with locked(self.root / "writer.lock", wait=True) if processes.first() else nullcontext():
            with processes.first_before_others():  # it begins damaged ones anew
                spaces = {e: FeatureRows(self.root / f"{e}-{sha256_of_json(s)[:16]}", s) for e, s in sorted(sources.items())}
            self._compute(observations, spaces, encode, batch)
        numbers = {e: np.asarray([s.rows[a] for a in observations.addresses], dtype=np.int64) for e, s in spaces.items()}
        return Features(spaces, numbers)

    def _compute(self, observations: ObservationSet, spaces: Mapping[str, FeatureRows], encode: Encode, batch: int) -> None:
        """Encode the observations that some entry lacks, in order, and only the entries that lack them."""
        first = {address: position for position, address in reversed(list(enumerate(observations.addresses)))}
        groups: dict[tuple[str, ...], list[int]] = {}
        for position in sorted(first.values()):
            lacking = tuple(e for e, space in spaces.items() if observations.addresses[position] not in space.rows)
            groups.setdefault(lacking, []).append(position)
        todo = [
            (lacking, np.asarray(positions[start : start + batch], dtype=np.int64))
            for lacking, positions in groups.items()
            if lacking
            for start in range(0, len(positions), batch)
        ]
        listed = {entry: len(space.rows) for entry, space in spaces.items()}
        for lacking, positions in todo:
            for entry in lacking:
                spaces[entry].add(observations.addresses[p] for p in positions)
        count, rounds = processes.count(), range(0, len(todo), processes.count())
        with progress_bar() as bar:
            task = bar.add_task("foresight features", total=sum(len(positions) for _, positions in todo), note="")
            for start in rounds:
                together = todo[start : start + count]
                for lacking, positions in together[processes.number() :][:1]:
                    padded = np.resize(positions, batch)  # repeats the batch's own observations
                    with timed("encoding features"):
                        sentences = [observations.instructions[p] for p in padded]
                        values = encode(observations.frames(padded), sentences, list(lacking))
                    for entry in lacking:
                        spaces[entry].write([observations.addresses[p] for p in positions], values[entry][: len(positions)])
                if start == 0 and processes.first():
                    self._make_room(spaces, observations.addresses)
                for lacking, positions in together:
                    for entry in lacking:
                        listed[entry] += len(positions)
                if (start // count) % max(1, FLUSH_ROWS // (batch * count)) == 0 or start == rounds[-1]:
                    for space in spaces.values():
                        space.flush()
                    processes.wait()
                    if processes.first():
                        for entry, space in spaces.items():
                            space.list_rows(listed[entry])
                bar.advance(task, sum(len(positions) for _, positions in together))
        for space in spaces.values():  # one that wrote no row has not seen any
            space.shape, space.dtype = processes.from_first(lambda: (space.shape, space.dtype))  # noqa: B023

    def _make_room(self, spaces: Mapping[str, FeatureRows], addresses: Sequence[str]) -> None:
        """Print what this run needs, and delete the least recently used folders of others until it fits."""
        count = len(set(addresses))
        needed = count * sum(space.row_bytes for space in spaces.values())
        budget = f"(machine.cache_gb {self.budget / 1e9:g})"
        console.print(f"features of {count} observations: {needed / 1e9:.2f} GB on disk {budget}")
        if needed > self.budget:
            for space in spaces.values():
                if not (space.directory / "index.json").exists():
                    shutil.rmtree(space.directory, ignore_errors=True)
            raise MachineError(
                f"machine.cache_gb is {self.budget / 1e9:g}, but the features of {count} observations take "
                f"{needed / 1e9:.2f} GB; raise it or train_policy.observation_stride, lower train_policy.episodes_per_task, or "
                "set train_policy.features to computed"
            )
        own = {space.directory for space in spaces.values()}
        used = sum(space.row_bytes * len(space.rows.keys() | set(addresses)) for space in spaces.values())
        sizes = {file.parent: file.stat().st_size for file in self.root.glob("*/rows.bin") if file.parent not in own}
        for directory in sorted(sizes, key=_last_use):
            if used + sum(sizes.values()) <= self.budget:
                return
            shutil.rmtree(directory)
            sizes.pop(directory)
            console.print(f"{directory}: deleted to stay within machine.cache_gb")


def _last_use(directory: Path) -> float:
    """When a folder's index was last opened; a folder without one was never complete and goes first."""
    index = directory / "index.json"
    return index.stat().st_mtime if index.exists() else 0.0
