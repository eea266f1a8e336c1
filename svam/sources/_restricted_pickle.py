"""Python objects that `np.save` wrote into a .npy file, read by the recipe of pickle's documentation: `find_class` knows a few
names and refuses every other.

Such a file is a program: an ordinary reader imports the names in it and calls them. This one imports nothing. For the names
that numpy writes for its own arrays (numpy 1 and 2 spell them differently) it has stand-ins that check what the file says:
numpy's own would read foreign memory if a crafted dtype or list says so. Protocols 3 and 4 are read, which numpy has written
since 1.17, the first version for CALVIN's Python 3.8.
"""

from __future__ import annotations

import io
import math
import pickle  # the base of a reader that imports nothing
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np

from svam.files import FileError, refuse_lfs_pointer

_NUMBERS_TEXT_OBJECTS = re.compile(r"b1|[iu][1248]|f[248]|[SU][0-9]{1,9}|O8?")


class _Refused(ValueError):
    """The file asks for something else than data; the message completes "it ..."."""


class _DType:
    """Stands for numpy.dtype: of numbers, text or objects only. Its byte order comes with the state."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _NUMBERS_TEXT_OBJECTS.fullmatch(code):
            raise _Refused("has a dtype that is neither of numbers nor of strings")
        self.dtype = np.dtype(code.removesuffix("8") if code.startswith("O") else code)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    """An array whose contents come with its state; numpy does not compare their number with the shape."""

    def __setstate__(self, state: Any) -> None:
        _, shape, stand_in, fortran, data = state
        dtype, plain = stand_in.dtype, all(type(n) is int and n >= 0 for n in shape)  # numpy's integers would overflow
        kind, size = (list, 1) if dtype.hasobject else (bytes, dtype.itemsize)
        if not plain or not size or type(data) is not kind or len(data) != math.prod(shape) * size:
            raise _Refused(f"has an array {dtype} {shape} without its contents")
        super().__setstate__((1, shape, dtype, fortran, data))


def _array(*_: Any) -> _Array:
    return _Array((0,), dtype=np.int8)


def _scalar(dtype: Any, data: bytes) -> Any:
    return np.frombuffer(data, dtype.dtype)[0] if data else dtype.dtype.type()  # numpy refuses objects; a text may be empty


def _ndarray(*_: Any) -> None:  # numpy only passes it on
    raise _Refused("calls something that makes no array")


_STAND_INS = {
    "numpy.core.multiarray._reconstruct": _array, "numpy._core.multiarray._reconstruct": _array,
    "numpy.core.multiarray.scalar": _scalar, "numpy._core.multiarray.scalar": _scalar,
    "numpy.ndarray": _ndarray, "numpy.dtype": _DType,
}  # fmt: skip


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (known := _STAND_INS.get(f"{module}.{name}")) is None:
            raise _Refused(f"asks for {f'{module}.{name}'[:80]!r}")
        return known


def load_objects(file: Path) -> Any:
    """The object in a .npy file of dtype object and shape (): dicts, lists, tuples, text, numbers, numpy arrays.

    Raises:
        FileError: the file is missing, damaged, no such .npy file, or asks for anything else than that data.
    """
    refuse_lfs_pointer(file)
    try:
        stream = io.BytesIO(file.read_bytes())
    except OSError as error:
        raise FileError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception:  # numpy's parser of headers raises a dozen types on damaged bytes
        shape, dtype = None, np.dtype(int)
    if shape != () or not dtype.hasobject:
        raise FileError(f"{file}: no .npy file with one Python object (dtype object, shape ()), or a damaged one")
    try:
        start, size = stream.tell(), len(stream.getbuffer())
        for operation, argument, _ in pickletools.genops(stream):
            if "PUT" in operation.name and int(argument or 0) > size:  # memory would be taken for them
                raise _Refused("numbers more objects than it has bytes")
        stream.seek(start)
        value = _Reader(stream).load()
    except _Refused as error:
        raise FileError(f"{file}: it {error}, expected plain containers and arrays; write it anew with those alone") from None
    except Exception as error:  # so does the unpickler
        raise FileError(f"{file}: truncated, damaged or not written by numpy ({type(error).__name__})") from None
    if not isinstance(value, _Array) or value.shape != () or not value.dtype.hasobject:
        kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise FileError(f"{file}: holds {kind}, expected an array of shape () around one object")
    return value[()]
