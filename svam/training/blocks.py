"""A folder of `.npy` files that is computed block by block: in constant memory, and a killed run goes on where it was.

Files grow by plain writes, so that a full disk is an error with a name; a file that is not whole cannot be opened as an array.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from svam.console import console, track
from svam.contract import ContractError
from svam.files import FileError, named_refusals, read_json, write_json
from svam.npy import read_arrays
from svam.resume import Resume

ATTRIBUTES = "attributes.json"
"""What the folder states beside its arrays."""
RECORD = "blocks"
"""Name of the record, in the state of a run, of how far it has come."""


class GrowingArray:
    """One `.npy` file of a known final shape and dtype, to which rows are appended."""

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: type[np.generic], rows: int = 0) -> None:
        """Begin it, or go on after its first `rows` rows.

        Raises:
            FileError: the file does not hold these rows, or is of another array.
        """
        self.file, self.shape, self.dtype, self.rows = file, shape, np.dtype(dtype), rows
        header = io.BytesIO()
        description = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, description)
        size = len(header.getvalue()) + rows * self.row_bytes
        if rows:
            with file.open("rb") as opened:
                same = opened.read(len(header.getvalue())) == header.getvalue()
            if not same or file.stat().st_size < size:
                raise FileError(f"{file}: does not hold the {rows} rows that were written")
        self._opened: BinaryIO = file.open("r+b" if rows else "w+b")
        if not rows:
            self._opened.write(header.getvalue())
        self._opened.truncate(size)
        self._opened.seek(size)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def append(self, values: NDArray[Any]) -> None:
        """Add rows (k, ...).

        Raises:
            ContractError: they are of another shape or dtype, too many, or hold NaN or infinity.
            FileError: the file system refuses.
        """
        if values.dtype != self.dtype or values.shape[1:] != self.shape[1:] or self.rows + len(values) > self.shape[0]:
            expected = f"{self.dtype} rows up to {self.shape}"
            raise ContractError(f"{self.file.stem}: {values.dtype} {values.shape} after row {self.rows}, expected {expected}")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            where = np.argwhere(~np.isfinite(values))[0]
            at = ", ".join(str(i) for i in (self.rows + where[0], *where[1:]))
            raise ContractError(f"{self.file.stem}[{at}] is {values[tuple(where)]} as {self.dtype}, expected a finite number")
        with named_refusals(self.file):
            self._opened.write(np.ascontiguousarray(values).data)
        self.rows += len(values)

    def flush(self) -> None:
        """Make what was appended durable."""
        with named_refusals(self.file):
            self._opened.flush()
            os.fsync(self._opened.fileno())

    def close(self) -> None:
        """Release the file."""
        self._opened.close()


def write_blocks(
    folder: Path,
    arrays: Mapping[str, tuple[tuple[int, ...], type[np.generic]]],
    blocks: Sequence[slice],
    compute: Callable[[slice], Mapping[str, NDArray[Any]]],
    resume: Resume,
    stage: str,
) -> dict[str, NDArray[Any]]:
    """Compute `arrays`, name -> (shape, dtype), into `folder`, which `Resume.directory` gives; returns them mapped to memory.

    Args:
        blocks: what is computed together, in the order of the rows; see `in_batches`.
        compute: a block -> rows of arrays, to be appended; a function of the block alone.

    Raises:
        ContractError: `compute` gives rows that do not fit, or not as many as were announced.
        FileError: the file system refuses.
    """
    _announce(stage, arrays)
    with ExitStack() as stack:
        opened, done = _opened(folder, arrays, resume)
        for array in opened.values():
            stack.callback(array.close)
        for number in track(range(done, len(blocks)), stage, len(blocks) - done):
            for name, values in compute(blocks[number]).items():
                opened[name].append(values)
            if resume.due():
                for array in opened.values():
                    array.flush()
                rows = {name: array.rows for name, array in opened.items()}
                resume.save_record(RECORD, {"blocks": number + 1, "rows": rows})
        for array in opened.values():
            array.flush()
    for name, array in opened.items():
        if array.rows != array.shape[0]:
            raise ContractError(f"{folder}: {name} got {array.rows} rows, expected {array.shape[0]}")
    return dict(read_arrays(folder))


def _opened(
    folder: Path, arrays: Mapping[str, tuple[tuple[int, ...], type[np.generic]]], resume: Resume
) -> tuple[dict[str, GrowingArray], int]:
    """The arrays and the number of blocks in them: as an earlier run left them, or empty."""
    record = resume.load_record(RECORD)
    if record is not None:
        try:
            rows = record.value["rows"]
            opened = {name: GrowingArray(folder / f"{name}.npy", *array, rows[name]) for name, array in arrays.items()}
            return opened, int(record.value["blocks"])
        except (FileError, OSError, KeyError) as error:
            console.print(f"{error}; it is computed anew", style="yellow", highlight=False, soft_wrap=True)
    return {name: GrowingArray(folder / f"{name}.npy", *array) for name, array in arrays.items()}, 0


def _announce(stage: str, arrays: Mapping[str, tuple[tuple[int, ...], type[np.generic]]]) -> None:
    """Say how much is about to be written, before it is."""
    sizes = {name: int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize for name, (shape, dtype) in arrays.items()}
    parts = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
    console.print(f"{stage}: writes {sum(sizes.values()) / 1e9:.3f} GB ({parts})", highlight=False, soft_wrap=True)


def write_attributes(folder: Path, **attributes: Any) -> None:
    """Write what the folder states beside its arrays."""
    write_json(folder / ATTRIBUTES, attributes)


def read_attributes(folder: Path, stage: str) -> dict[str, Any]:
    """What `write_attributes` wrote.

    Raises:
        FileError: there is none; `stage` writes it.
    """
    if not (folder / ATTRIBUTES).is_file():
        raise FileError(f"{folder}: no {ATTRIBUTES} in it; run the stage {stage}")
    values = read_json(folder / ATTRIBUTES)
    if not isinstance(values, dict):
        raise FileError(f"{folder / ATTRIBUTES}: not what {stage} writes; run it again")
    return values


def stem_of(camera: str) -> str:
    """A camera's name as that of a file: some formats separate its parts by slashes."""
    return camera.replace("/", ".")


def in_batches(size: int, *ends: int) -> list[slice]:
    """0..ends[0] - 1, then on to ends[1] - 1, and so on: `size` at a time, none across an end."""
    starts = (0, *ends)
    return [slice(i, min(i + size, end)) for start, end in pairwise(starts) for i in range(start, end, size)]
