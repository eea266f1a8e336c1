"""Arrays as a folder of `.npy` files: plain, mapped to memory, and the same bytes everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.files import FileError


def write_arrays(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write `<name>.npy` for each array into an existing or new folder. (An .npz would not do: equal arrays are other bytes
    under another version of Python, which writes its zip headers.)"""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", np.ascontiguousarray(values))


def read_arrays(folder: Path) -> dict[str, np.memmap[Any, Any]]:
    """The arrays of a folder by name, in its order, mapped to memory.

    Raises:
        FileError: there is none, or one is truncated or no plain array.
    """
    arrays = {}
    for file in sorted(folder.glob("*.npy")):
        try:
            arrays[file.stem] = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise FileError(f"{file}: truncated or no array ({error})") from None
    if not arrays:
        raise FileError(f"{folder}: no .npy file in it")
    return arrays
