"""Python objects that `np.save` wrote into a .npy file, rebuilt without running anything that the file asks for.

Such a file is a program: an ordinary reader imports the names in it and calls them. Here `pickletools` only takes the program
apart, and this module interprets the few operations that build data. Names are never imported: those that numpy writes
for its own arrays are recognised as words (numpy 1 and 2 spell them differently) and the arrays are made here, of checked
lengths; any other name or operation ends the reading. numpy's own functions are not called with what the file says, because a
crafted dtype makes them read foreign memory. Nesting costs no recursion, a reference copies nothing, and sizes are limited by
the bytes that are really there, so that no file can exhaust memory or the stack.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svam.files import FileError

_LARGEST = 2**30
"""Bytes of a file that is still read: annotations with sentence embeddings have tens of megabytes."""
_MULTIARRAY = {f"numpy.{core}.multiarray" for core in ("core", "_core")}
_NUMERIC = {f"numpy.{core}.numeric" for core in ("core", "_core")}
_NAMES: dict[tuple[str, str], str] = {
    **{(module, "_reconstruct"): "array" for module in _MULTIARRAY},
    **{(module, "scalar"): "scalar" for module in _MULTIARRAY},
    **{(module, "_frombuffer"): "buffer" for module in _NUMERIC},
    ("numpy", "ndarray"): "array type",
    ("numpy", "dtype"): "dtype",
    **{(module, name): "set" for module in ("builtins", "__builtin__") for name in ("set", "frozenset")},  # protocols 2 and 3
    ("_codecs", "encode"): "bytes",  # protocol 2
    ("__builtin__", "bytes"): "bytes",  # protocol 2: no bytes at all
}
_DTYPE = re.compile(r"b1|[iu][1248]|f[248]|[SU][1-9][0-9]{0,8}|O8?")
_KEYS = (str, int, float, bytes, type(None))
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONTAINERS: dict[str, type[Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}


class _Refused(ValueError):
    """The file asks for something else than data, or contradicts itself; the message completes "the file ..."."""


@dataclass(frozen=True, eq=False)
class _Name:
    """A name that the file mentions and that is one of `_NAMES`."""

    kind: str


@dataclass(eq=False)
class _Pending:
    """An array or dtype that was announced and whose contents follow; `memo` are the places that refer to it."""

    kind: str
    code: str = ""
    memo: list[int] = field(default_factory=list)


def _dtype(code: str, state: Any) -> np.dtype[Any]:
    """A dtype of numbers, strings or objects from its code ("f4") and state: (version, byte order, and no fields)."""
    if type(state) is not tuple or len(state) < 5 or state[1] not in ("<", ">", "=", "|") or any(state[2:5]):
        raise _Refused(f"has an unsupported dtype {code!r}")
    return np.dtype("O" if code == "O8" else f"{state[1]}{code}")


def _array(shape: Any, dtype: Any, fortran: Any, data: Any) -> NDArray[Any]:
    """An array of exactly the bytes, or objects, that are there."""
    if type(shape) is not tuple or any(type(n) is not int or n < 0 for n in shape) or not isinstance(dtype, np.dtype):
        raise _Refused("has an array without a plain shape and dtype")
    count = math.prod(shape)
    order: Literal["C", "F"] = "F" if fortran is True else "C"
    if dtype.hasobject:
        if type(data) is not list or len(data) != count:
            raise _Refused(f"has an array of shape {shape} without its {count} objects")
        objects = np.empty(count, dtype=object)
        for i, item in enumerate(data):
            objects[i] = item
        return objects.reshape(shape, order=order)
    if not isinstance(data, bytes | bytearray) or len(data) != count * dtype.itemsize:
        raise _Refused(f"has an array {dtype} {shape} without its {count * dtype.itemsize} bytes")
    return np.ndarray(shape, dtype, buffer=data, order=order)


def _hashable(items: list[Any]) -> list[Any]:
    """Keys of plain types: hashing deeply nested tuples would recurse."""
    if not all(isinstance(item, _KEYS) for item in items):
        raise _Refused("has a key or set member that is neither text nor number")
    return items


def _call(name: Any, args: Any) -> Any:
    """What the named constructor makes of its arguments."""
    kind = name.kind if isinstance(name, _Name) and type(args) is tuple else ""
    if kind == "array" and len(args) == 3 and isinstance(args[0], _Name) and args[0].kind == "array type":
        return _Pending("array")
    if kind == "dtype" and args and isinstance(args[0], str) and _DTYPE.fullmatch(args[0]):
        return _Pending("dtype", args[0])
    if kind == "dtype":
        raise _Refused("has a dtype that is neither of numbers nor of strings")
    if kind == "scalar" and len(args) == 2:
        if isinstance(args[0], np.dtype) and args[0].hasobject:
            raise _Refused("has a scalar of dtype object")
        return _array((), args[0], False, args[1])[()]
    if kind == "buffer" and len(args) == 4:
        return _array(args[2], args[1], args[3] == "F", args[0])
    if kind == "set" and len(args) == 1 and type(args[0]) is list:
        return set(_hashable(args[0]))
    if kind == "bytes" and args == ():
        return b""
    if kind == "bytes" and len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
        return args[0].encode("latin1")
    raise _Refused("calls something that makes no array")


class _Reader:
    """The stack and the memo of one file."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def read(self, data: bytes) -> Any:
        """The one object that `data` describes."""
        for operation, argument, _ in pickletools.genops(data):
            if operation.name == "STOP":
                return self._stack.pop()
            self._step(operation.name, argument)
        raise _Refused("ends too early")

    def _items(self) -> list[Any]:
        """What was pushed since the last mark."""
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _put(self, place: int) -> None:
        top = self._stack[-1]
        self._memo[place] = top
        if isinstance(top, _Pending):
            top.memo.append(place)

    def _step(self, name: str, argument: Any) -> None:
        """Carry out one operation."""
        push = self._stack.append
        if name in _LITERALS:
            push(argument)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _CONTAINERS:
            push(_CONTAINERS[name]())
        elif name == "MARK":
            self._marked.append(self._stack)
            self._stack = []
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self._put(len(self._memo) if name == "MEMOIZE" else argument)
        elif name in ("BINGET", "LONG_BINGET"):
            push(self._memo[argument])
        elif name in ("TUPLE", "FROZENSET"):
            items = self._items()
            self._stack.append(tuple(items) if name == "TUPLE" else frozenset(_hashable(items)))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items = [self._stack.pop() for _ in range(count)]
            push(tuple(reversed(items)))
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"):
            self._fill(name)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(argument if name == "GLOBAL" else None)
        elif name == "REDUCE":
            arguments = self._stack.pop()
            self._stack[-1] = _call(self._stack[-1], arguments)
        elif name == "BUILD":
            self._build()
        elif name not in ("PROTO", "FRAME"):
            raise _Refused(f"uses the operation {name}")

    def _fill(self, name: str) -> None:
        """Add to the list, dict or set below."""
        count = {"APPEND": 1, "SETITEM": 2}.get(name)
        items = self._items() if count is None else [self._stack.pop() for _ in range(count)][::-1]
        kinds: dict[str, type[Any]] = {"APPEND": list, "APPENDS": list, "SETITEM": dict, "SETITEMS": dict, "ADDITEMS": set}
        target, kind = self._stack[-1], kinds[name]
        if type(target) is not kind:
            raise _Refused(f"adds items to what is no {kind.__name__}")
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(_hashable(items))
        else:
            target.update(zip(_hashable(items[::2]), items[1::2], strict=True))

    def _name(self, text: str | None) -> None:
        """Push the name of a constructor, if it is one that numpy writes for arrays."""
        if text is None:
            name, module = self._stack.pop(), self._stack.pop()
        else:
            module, name = text.split(" ", 1)
        kind = _NAMES.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if kind is None:
            asked = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "no name"
            raise _Refused(f"asks for {asked[:80]!r}")
        self._stack.append(_Name(kind))

    def _build(self) -> None:
        """Give a pending array or dtype its contents, wherever it is referred to."""
        state, pending = self._stack.pop(), self._stack[-1]
        if not isinstance(pending, _Pending):
            raise _Refused("sets the state of an object")
        made: Any
        if pending.kind == "dtype":
            made = _dtype(pending.code, state)
        elif type(state) is tuple and len(state) == 5:
            made = _array(*state[1:])
        else:
            raise _Refused("has an array without contents")
        self._stack[-1] = made
        for place in pending.memo:
            if self._memo.get(place) is pending:
                self._memo[place] = made


def load_objects(file: Path) -> Any:
    """The object in a .npy file of dtype object and shape (): dicts, lists, tuples, sets, text, numbers, numpy arrays.

    Arrays are read-only. Nothing that the file names is imported or called.

    Raises:
        FileError: the file is missing, damaged, over 1 GiB, no such .npy file, or asks for anything else than that data.
    """
    try:
        if (size := file.stat().st_size) > _LARGEST:
            raise FileError(f"{file}: {size / 2**30:.1f} GiB, expected annotations of at most {_LARGEST // 2**30} GiB")
        data = file.read_bytes()
    except OSError as error:
        raise FileError(f"{file}: cannot be read ({error.strerror or type(error).__name__})") from None
    width = 2 if data[6:7] == b"\x01" else 4
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    header = data[8 + width : start]
    if data[:6] != b"\x93NUMPY" or b"'|O'" not in header or re.search(rb"'shape': *\(\)", header) is None:
        raise FileError(f"{file}: no .npy file with one Python object (dtype object, shape ()), or a damaged one")
    try:
        value = _Reader().read(data[start:])
    except _Refused as error:
        raise FileError(
            f"{file}: it {error}, expected nothing but numpy arrays and plain containers, so it is not read further"
        ) from None
    except (ValueError, LookupError, TypeError, OverflowError, MemoryError, struct.error) as error:
        raise FileError(f"{file}: truncated or damaged ({type(error).__name__})") from None
    if isinstance(value, np.ndarray) and value.shape == () and value.dtype.hasobject:
        return value[()]
    raise FileError(f"{file}: holds a {type(value).__name__}, expected an array of shape () around one object")
