"""A folder of `.npy` files that is computed block by block: in constant memory, and a killed run goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam import processes
from svam.console import console, track
from svam.contract import ContractError
from svam.files import FileError, named_refusals, read_json, write_json
from svam.npy import read_arrays
from svam.resume import Resume

ATTRIBUTES = "attributes.json"
"""What a folder states beside its arrays."""
RECORD = "blocks"
"""Name of the record, in the state of a run, of how many blocks are done."""
Arrays = Mapping[str, tuple[tuple[int, ...], type[np.generic]]]
"""Name -> (shape, dtype)."""


def write_blocks(
    folder: Path,
    arrays: Arrays,
    blocks: Sequence[slice],
    compute: Callable[[slice], Mapping[str, NDArray[Any]]],
    resume: Resume,
    stage: str,
) -> dict[str, NDArray[Any]]:
    """Compute `arrays` into `folder`, which `Resume.directory` gives; returns them mapped to memory.

    The room is reserved first and written by plain writes, so that a full disk is an error with a name, and soon. Several
    processes (`svam.processes`) take the blocks in turn, and each writes those that it computed.

    Args:
        blocks: what is computed together, see `in_batches`: rows of the longest arrays. Shorter arrays have the last of them.
        compute: a block -> its rows of the arrays that have any; a function of the block alone.

    Raises:
        ContractError: `compute` gives rows that do not fit, NaN or infinity.
        FileError: the file system refuses.
    """
    files = {name: folder / f"{name}.npy" for name in arrays}
    sizes = {name: np.empty(0, dtype).itemsize * int(np.prod(shape, dtype=np.int64)) for name, (shape, dtype) in arrays.items()}
    parts = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
    console.print(f"{stage}: writes {sum(sizes.values()) / 1e9:.3f} GB ({parts})", soft_wrap=True)

    def begin() -> int:
        record = resume.load_record(RECORD)
        if record is not None and _reserved(folder, arrays):
            return int(record.value)
        for name, (shape, dtype) in arrays.items():
            _reserve(files[name], shape, dtype)
        return 0

    done = processes.from_first(begin)
    rows = max(shape[0] for shape, _ in arrays.values())
    with ExitStack() as stack:
        opened = {name: stack.enter_context(file.open("r+b")) for name, file in files.items()}
        rounds = range(done, len(blocks), processes.count())
        for start in track(rounds, stage, len(rounds)):
            ending = min(start + processes.count(), len(blocks))
            for block in blocks[start:ending][processes.number() :][:1]:
                for name, values in compute(block).items():
                    whole, dtype = arrays[name]
                    first = block.start - (rows - whole[0])
                    _check_rows(name, values, first, (block.stop - block.start, *whole[1:]), np.dtype(dtype))
                    with named_refusals(files[name]):  # from the end, whatever the length of the header
                        opened[name].seek(first * values[:1].nbytes - sizes[name], os.SEEK_END)
                        opened[name].write(np.ascontiguousarray(values).data)
            if processes.from_first(resume.due):
                for name, file in opened.items():
                    with named_refusals(files[name]):
                        file.flush()
                        os.fsync(file.fileno())
                processes.wait()
                if processes.first():
                    resume.save_record(RECORD, ending)
    return dict(read_arrays(folder))


def _reserve(file: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    """An array of zeros whose room on the disk is taken."""
    with named_refusals(file):
        np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with file.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


def _reserved(folder: Path, arrays: Arrays) -> bool:
    try:
        present = read_arrays(folder)
    except FileError as error:
        console.print(f"{error}; it is computed anew", style="yellow", soft_wrap=True)
        return False
    return all(name in present and (present[name].shape, present[name].dtype) == array for name, array in arrays.items())


def _check_rows(name: str, values: NDArray[Any], first: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if values.shape != shape or values.dtype != dtype:
        raise ContractError(f"{name} from row {first}: {values.dtype} {values.shape}, expected {dtype} {shape}")
    if dtype.kind == "f" and not np.isfinite(values).all():
        where = np.argwhere(~np.isfinite(values))[0]
        at = ", ".join(str(i) for i in (first + where[0], *where[1:]))
        raise ContractError(f"{name}[{at}] is {values[tuple(where)]} as {dtype}, expected a finite number")


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
    return [slice(i, min(i + size, end)) for start, end in pairwise((0, *ends)) for i in range(start, end, size)]
