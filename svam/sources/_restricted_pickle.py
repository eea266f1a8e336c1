"""Python objects that `np.save` wrote into a .npy file, read by an unpickler that knows no names but those of arrays.

Such a file is a program: an ordinary reader imports the names in it and calls them. This one imports nothing: `find_class`
gives functions of this module for the names that numpy writes for its own arrays (numpy 1 and 2 spell them differently), and
refuses every other. numpy's own are not called with what the file says: a crafted dtype makes them read foreign memory.
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

_LARGEST = 2**30
"""Bytes of a file that is still read: annotations with sentence embeddings have tens of megabytes."""
_DTYPE = re.compile(r"b1|[iu][1248]|f[248]|[SU][1-9][0-9]{0,8}|O8?")


class _Refused(ValueError):
    """The file asks for something else than data; the message completes "the file ..."."""


class _DType:
    """A dtype of numbers, strings or objects; its byte order comes with the state."""

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise _Refused("has a dtype that is neither of numbers nor of strings")
        self.dtype = np.dtype("O" if code == "O8" else code)

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 5 or state[1] not in ("<", ">", "=", "|") or any(state[2:5]):
            raise _Refused("has an unsupported dtype")
        self.dtype = self.dtype.newbyteorder(state[1])


def _dtype(code: Any, *_: Any) -> _DType:
    return _DType(code)  # a function, so that the file gets no class to make anything else of


def _checked(shape: Any, dtype: Any, data: Any) -> np.dtype[Any]:
    """The dtype, if `data` are just the bytes, or objects, of such an array."""
    if type(shape) is not tuple or any(type(n) is not int or n < 0 for n in shape) or not isinstance(dtype, _DType):
        raise _Refused("has an array without a plain shape and dtype")
    objects = dtype.dtype.hasobject
    expected = math.prod(shape) * (1 if objects else dtype.dtype.itemsize)
    if not isinstance(data, list if objects else bytes | bytearray) or len(data) != expected:
        raise _Refused(f"has an array {dtype.dtype} {shape} without its contents")
    return dtype.dtype


class _Array(np.ndarray[Any, Any]):
    """An array whose contents follow, and are checked when they come."""

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise _Refused("has an array without contents")
        _, shape, dtype, fortran, data = state
        super().__setstate__((1, shape, _checked(shape, dtype, data), fortran is True, data))  # type: ignore[arg-type]


def _array(kind: Any, *_: Any) -> _Array:
    if kind is not _no_call:
        raise _Refused("calls something that makes no array")
    return _Array((0,), dtype=np.int8)


def _no_call(*_: Any) -> None:
    raise _Refused("calls something that makes no array")


def _scalar(dtype: Any, data: Any) -> Any:
    if isinstance(dtype, _DType) and dtype.dtype.hasobject:
        raise _Refused("has a scalar of dtype object")
    return np.frombuffer(data, _checked((), dtype, data))[0]


def _buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Any:
    if isinstance(dtype, _DType) and dtype.dtype.hasobject:
        raise _Refused("has a buffer of dtype object")
    return np.frombuffer(data, _checked(shape, dtype, data)).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: Any, codec: Any) -> bytes:
    if not isinstance(text, str) or codec != "latin1":
        raise _Refused("calls something that makes no array")
    return text.encode("latin1")


_KNOWN: dict[str, Any] = {
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _buffer for core in ("core", "_core")},
    "numpy.ndarray": _no_call, "numpy.dtype": _dtype,
    "builtins.set": lambda items=(): set(items), "builtins.frozenset": lambda items=(): frozenset(items),  # protocols 2 and 3
    "_codecs.encode": _encode, "builtins.bytes": lambda: b"",  # protocol 2
}  # fmt: skip


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get(f"{module.replace('__builtin__', 'builtins')}.{name}")  # protocol 2 spells it so
        if known is None:
            raise _Refused(f"asks for {f'{module}.{name}'[:80]!r}")
        return known


def load_objects(file: Path) -> Any:
    """The object in a .npy file of dtype object and shape (): dicts, lists, tuples, sets, text, numbers, numpy arrays.

    Nothing that the file names is imported or called.

    Raises:
        FileError: the file is missing, damaged, over 1 GiB, no such .npy file, or asks for anything else than that data.
    """
    refuse_lfs_pointer(file)
    try:
        if (size := file.stat().st_size) > _LARGEST:
            raise FileError(f"{file}: {size / 2**30:.1f} GiB, expected annotations of at most {_LARGEST // 2**30} GiB")
        stream = io.BytesIO(file.read_bytes())
    except OSError as error:
        raise FileError(f"{file}: cannot be read ({error.strerror or type(error).__name__})") from None
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except Exception:  # numpy's parser of headers raises a dozen types on damaged bytes
        shape, dtype = None, np.dtype(int)
    if shape != () or not dtype.hasobject:
        raise FileError(f"{file}: no .npy file with one Python object (dtype object, shape ()), or a damaged one")
    try:
        start = stream.tell()
        for operation, argument, _ in pickletools.genops(stream):  # lengths are checked against the bytes that are there
            if "PUT" in operation.name and int(argument or 0) > size:
                raise _Refused("numbers more objects than it has bytes")  # for which memory would be taken
        stream.seek(start)
        value = _Reader(stream).load()
    except _Refused as error:
        raise FileError(
            f"{file}: it {error}, expected nothing but numpy arrays and plain containers, so it is not read further"
        ) from None
    except Exception as error:  # so does the unpickler
        raise FileError(f"{file}: truncated or damaged ({type(error).__name__})") from None
    if isinstance(value, np.ndarray) and value.shape == () and value.dtype.hasobject:
        return value[()]
    kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
    raise FileError(f"{file}: holds {kind}, expected an array of shape () around one object")
