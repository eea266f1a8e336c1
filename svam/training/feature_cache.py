"""A content-addressed cache of frozen foresight features, so that no training step ever runs a frozen network.

One folder per context entry and source (`<entry>-<address>`), where the address is the SHA-256 of what computed the
features: the frozen parts' files, the code, the sampler's options, the device. One row per observation, addressed by the
SHA-256 of its frame and instruction. So variants share entries, and more demonstrations reuse the rows of fewer.

    rows.bin     rows of one shape and dtype, one after another: features (T, h, w, C) float16
    index.json   shape, dtype, the source in words, and the observations' addresses in row order

Rows are flushed before the index that lists them is renamed into place: a killed writer leaves rows that no index lists,
and the next writer overwrites them. Reading is `pread`, row by row: the page cache holds what fits, the process little.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from svam.console import console, progress_bar, timed
from svam.contract import ContractError
from svam.errors import MachineError
from svam.files import FileError, read_json, write_json

Encode = Callable[[NDArray[np.uint8], list[str], list[str]], Mapping[str, NDArray[Any]]]
"""(frames (B, H, W, 3) uint8, instructions, entries) -> entry -> (B, ...) rows; features are (B, T, h, w, C) float16."""

FORMAT = 1
FLUSH_ROWS = 512
"""Rows between two writes of the index: what a killed run may lose."""


def address_of(source: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON-able description, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()


def observation_address(frame: NDArray[np.uint8], instruction: str) -> str:
    """SHA-256 of a frame (H, W, 3) with its shape, and of the sentence that it is encoded with."""
    digest = hashlib.sha256(f"{frame.shape}\0{instruction}\0".encode())
    digest.update(np.ascontiguousarray(frame).tobytes())
    return digest.hexdigest()


class FeatureRows:
    """The rows of one entry and source, open for reading; appended to only within `FeatureCache.fill`."""

    def __init__(self, directory: Path, source: Mapping[str, Any]) -> None:
        self.directory = directory
        self.source = dict(source)
        self.shape: tuple[int, ...] | None = None
        self.dtype = np.dtype(np.float16)
        self.rows: dict[str, int] = {}
        directory.mkdir(parents=True, exist_ok=True)
        self._in_use: IO[bytes] = (directory / "in_use.lock").open("ab")
        fcntl.flock(self._in_use, fcntl.LOCK_SH)
        self._file = os.open(directory / "rows.bin", os.O_RDWR | os.O_CREAT, 0o644)
        self.reload()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; 0 as long as no row has been written."""
        return self.dtype.itemsize * int(np.prod(self.shape)) if self.shape else 0

    def reload(self) -> None:
        """Read the index again; rows that it lists but the file does not hold make the whole folder worthless."""
        index_file = self.directory / "index.json"
        if not index_file.exists():
            return
        try:
            index = read_json(index_file)
            shape, dtype, keys = tuple(int(n) for n in index["shape"]), np.dtype(index["dtype"]), list(index["rows"])
        except (FileError, KeyError, TypeError):
            shape, dtype, keys = (0,), self.dtype, [""]
        if not all(shape) or os.fstat(self._file).st_size < len(keys) * dtype.itemsize * int(np.prod(shape)):
            console.print(f"{self.directory}: damaged, its features are computed again", style="yellow", highlight=False)
            index_file.unlink()
            self.shape, self.rows = None, {}
            return
        self.shape, self.dtype, self.rows = shape, dtype, {key: row for row, key in enumerate(keys)}
        os.utime(index_file)  # what the eviction of the least recently used goes by

    def append(self, keys: Sequence[str], values: NDArray[Any]) -> None:
        """Write rows (B, ...); they count only once `flush` has listed them.

        Raises:
            ValueError: NaN or infinity among the features, or rows of another shape or dtype than those present.
        """
        if not np.isfinite(values).all():
            raise ContractError(f"{self.directory.name}: a frozen part produced NaN or values beyond float16")
        if self.shape is None:
            self.shape, self.dtype = values.shape[1:], values.dtype
        if (values.shape[1:], values.dtype) != (self.shape, self.dtype):
            found, present = f"{values.dtype} {values.shape[1:]}", f"{self.dtype} {self.shape}"
            raise ContractError(f"{self.directory.name}: rows are {found}, those in the cache {present}")
        for key, row in zip(keys, np.ascontiguousarray(values), strict=True):
            if key in self.rows:
                continue
            data, place = memoryview(row).cast("B"), len(self.rows) * self.row_bytes
            try:
                written = os.pwrite(self._file, data, place)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.directory / "rows.bin")) from None
            if written != len(data):
                raise FileError(f"{self.directory}/rows.bin: the disk took {written} of {len(data)} bytes; is it full?")
            self.rows[key] = len(self.rows)

    def flush(self) -> None:
        """Make every row written so far durable, then list it."""
        if self.shape is None:
            return
        os.fsync(self._file)
        what = {"format": FORMAT, "shape": list(self.shape), "dtype": self.dtype.str, "source": self.source}
        write_json(self.directory / "index.json", {**what, "rows": list(self.rows)})

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows by number, (k, ...).

        Raises:
            FileError: the file is shorter than its index says.
        """
        if self.shape is None:
            raise FileError(f"{self.directory}: holds no rows")
        out = np.empty((len(rows), *self.shape), dtype=self.dtype)
        for target, row in zip(out, rows, strict=True):
            if os.preadv(self._file, [memoryview(target).cast("B")], int(row) * self.row_bytes) != self.row_bytes:
                raise FileError(f"{self.directory}/rows.bin: truncated at row {int(row)}; delete this folder and run again")
        return out

    def close(self) -> None:
        """Release the file and the mark that it is in use."""
        os.close(self._file)
        self._in_use.close()


@dataclass(frozen=True)
class Wanted:
    """Observations to have features of: addresses and sentences by position, and how to read frames by position."""

    instructions: list[str]
    frames: Callable[[NDArray[np.int64]], NDArray[np.uint8]]
    addresses: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, instructions: list[str], frames: Callable[[NDArray[np.int64]], NDArray[np.uint8]], block: int = 1024) -> Wanted:
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
        """`numbers`: entry -> row of each observation, (n,)."""
        self.spaces, self.numbers = dict(spaces), dict(numbers)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Entry -> (T, h, w, C)."""
        return {entry: space.shape or () for entry, space in self.spaces.items()}

    def part(self, start: int, end: int) -> Features:
        """The observations `start`..`end - 1`, over the same open files."""
        return Features(self.spaces, {entry: numbers[start:end] for entry, numbers in self.numbers.items()})

    def read(self, positions: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Entry -> (k, T, h, w, C) float16."""
        return {entry: space.read(self.numbers[entry][positions]) for entry, space in self.spaces.items()}

    def close(self) -> None:
        """Close every file."""
        for space in self.spaces.values():
            space.close()


class FeatureCache:
    """The folder of all entries, kept within a disk budget by deleting the least recently used."""

    def __init__(self, root: Path, budget_gb: float) -> None:
        self.root = Path(root)
        self.budget = int(budget_gb * 1e9)
        self.root.mkdir(parents=True, exist_ok=True)

    def fill(self, wanted: Wanted, sources: Mapping[str, Mapping[str, Any]], encode: Encode, batch: int) -> Features:
        """Compute what is missing and return the features of `wanted`.

        Batches are padded to `batch` observations, so that a row does not depend on which rows were already there.

        Args:
            sources: entry -> everything that decides the numbers of its features, as JSON.

        Raises:
            MachineError: the features of these observations alone exceed the budget.
        """
        spaces = {e: FeatureRows(self.root / f"{e}-{address_of(s)[:16]}", s) for e, s in sorted(sources.items())}
        locks = [(space.directory / "writer.lock").open("ab") for space in spaces.values()]
        try:
            for lock in locks:  # in sorted order, so that two runs cannot wait for one another
                fcntl.flock(lock, fcntl.LOCK_EX)
            for space in spaces.values():
                space.reload()
            self._compute(wanted, spaces, encode, batch)
        finally:
            for lock in locks:
                lock.close()
        numbers = {e: np.asarray([s.rows[a] for a in wanted.addresses], dtype=np.int64) for e, s in spaces.items()}
        return Features(spaces, numbers)

    def _compute(self, wanted: Wanted, spaces: Mapping[str, FeatureRows], encode: Encode, batch: int) -> None:
        """Encode the observations that some entry lacks, in order, asking for exactly the entries that are lacking."""
        groups: dict[tuple[str, ...], list[int]] = {}
        seen: set[str] = set()
        for position, address in enumerate(wanted.addresses):
            lacking = tuple(e for e, space in spaces.items() if address not in space.rows)
            if lacking and address not in seen:
                groups.setdefault(lacking, []).append(position)
                seen.add(address)
        total = sum(len(positions) for positions in groups.values())
        if not total:
            return
        room_made = False
        with progress_bar() as bar:
            task = bar.add_task("foresight features", total=total, note="")
            for lacking, positions in groups.items():
                for start in range(0, len(positions), batch):
                    real = np.asarray(positions[start : start + batch], dtype=np.int64)
                    padded = np.resize(real, batch)  # repeats the batch's own observations
                    with timed("encoding features"):
                        values = encode(wanted.frames(padded), [wanted.instructions[p] for p in padded], list(lacking))
                    for entry in lacking:
                        spaces[entry].append([wanted.addresses[p] for p in real], values[entry][: len(real)])
                    if not room_made and all(space.shape for space in spaces.values()):
                        self._make_room(spaces, wanted.addresses)
                        room_made = True
                    if start // batch % max(1, FLUSH_ROWS // batch) == 0:
                        for entry in lacking:
                            spaces[entry].flush()
                    bar.advance(task, len(real))
                for entry in lacking:
                    spaces[entry].flush()

    def _make_room(self, spaces: Mapping[str, FeatureRows], addresses: Sequence[str]) -> None:
        """Print what this run needs, and delete the least recently used folders that nobody reads until it fits."""
        count = len(set(addresses))
        needed = count * sum(space.row_bytes for space in spaces.values())
        console.print(
            f"features of {count} observations: {needed / 1e9:.2f} GB on disk (machine.cache_gb {self.budget / 1e9:g})",
            highlight=False,
        )
        own = {space.directory.name for space in spaces.values()}
        others = [d for d in self.root.iterdir() if d.is_dir() and d.name not in own]
        if needed > self.budget:
            for space in spaces.values():
                if not (space.directory / "index.json").exists():
                    shutil.rmtree(space.directory, ignore_errors=True)
            raise MachineError(
                f"machine.cache_gb is {self.budget / 1e9:g}, but the features of {count} observations take "
                f"{needed / 1e9:.2f} GB; raise it or train_policy.observation_stride, or lower train_policy.episodes_per_task"
            )
        used = sum(space.row_bytes * len(space.rows.keys() | set(addresses)) for space in spaces.values())
        sizes = {d: (d / "rows.bin").stat().st_size for d in others if (d / "rows.bin").exists()}
        for directory in sorted(sizes, key=_last_use):
            if used + sum(sizes.values()) <= self.budget:
                return
            if _evict(directory):
                console.print(f"{directory}: deleted to stay within machine.cache_gb", highlight=False)
                sizes.pop(directory)


def _last_use(directory: Path) -> float:
    """When a folder's index was last opened; a folder without one was never complete and goes first."""
    index = directory / "index.json"
    return index.stat().st_mtime if index.exists() else 0.0


def _evict(directory: Path) -> bool:
    """Delete a folder unless some process has it open."""
    try:
        with (directory / "in_use.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory)
    except OSError:
        return False
    return True
