"""The message format of openpi's policy server: msgpack, in which a numpy array is a small map.

An array is `{b"__ndarray__": True, b"data": bytes in C order, b"dtype": "<f4", b"shape": [2, 3]}`, a numpy scalar
`{b"__npgeneric__": True, b"data": number, b"dtype": "<f4"}`. On connect the server sends one message of metadata; each request
is a message with an observation, each reply one with `actions` (K, A) and `server_timing`. A *text* frame is an error.
Source: `msgpack_numpy` and the websocket policy of openpi's client package.

What comes from outside is bounded before memory is taken for it: a map or list says its length first, and the decoder would
reserve room for that many items, once for each level of nesting.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from svam.errors import SvamError

ITEMS = 256
"""Most items of one list or map."""
CONTAINERS = 256
"""Most lists and maps in one message: an empty list is one byte there and 56 in memory."""
TEXT = 2**16
"""Most bytes of one text."""
DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248])")
"""Booleans, integers and floats. Objects, records, complex numbers, texts and dates are refused."""


class ProtocolError(SvamError, ValueError):
    """A message that is not of the format, or a value that cannot be sent; the message names it."""


class ServingError(SvamError, RuntimeError):
    """A policy cannot be served, or a server cannot be asked; the message says which, why, and the way out."""


def pack(value: Any) -> bytes:
    """A message of dicts, lists, texts, numbers, None, numpy arrays and numpy scalars.

    Raises:
        ProtocolError: something else is in it, or an array of objects, records or complex numbers.
    """
    try:
        return bytes(msgpack.packb(value, default=_encoded))
    except (TypeError, ValueError, OverflowError) as error:
        raise error if isinstance(error, ProtocolError) else ProtocolError(f"cannot be sent: {error}") from None


def unpack(message: bytes) -> Any:
    """What `pack` packed. Arrays are read-only views of the message's bytes.

    Raises:
        ProtocolError: the message is not msgpack or above a limit; or an array's dtype, shape and number of bytes disagree.
    """
    containers = 0

    def counted(value: Any) -> Any:
        nonlocal containers
        containers += 1
        if containers > CONTAINERS:
            raise ProtocolError(f"the message holds more than {CONTAINERS} lists and maps")
        return _decoded(value) if isinstance(value, dict) else value

    try:
        return msgpack.unpackb(
            message, object_hook=counted, list_hook=counted, max_array_len=ITEMS, max_map_len=ITEMS, max_str_len=TEXT,
            max_ext_len=0,
        )  # fmt: skip
    except ProtocolError:
        raise
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise ProtocolError(f"the message is not msgpack as expected: {str(error) or type(error).__name__}") from None


def _encoded(value: Any) -> Any:
    """The map of an array or a numpy scalar."""
    if not isinstance(value, np.ndarray | np.generic):
        raise ProtocolError(f"a {type(value).__name__} cannot be sent; turn it into a numpy array, number or text")
    if value.dtype.kind in "OVc":
        raise ProtocolError(f"an array of dtype {value.dtype} cannot be sent, only booleans, integers and floats")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def _decoded(value: dict[Any, Any]) -> Any:
    """The array or the scalar that a map stands for; other maps as they are."""
    if b"__ndarray__" in value:
        return _array(value)
    if b"__npgeneric__" not in value:
        return value
    dtype, number = _dtype(value), value.get(b"data")
    if not isinstance(number, bool | int | float):
        raise ProtocolError(f"a scalar of dtype {dtype} holds a {type(number).__name__}, expected a number")
    try:
        return dtype.type(number)
    except (ValueError, OverflowError):
        raise ProtocolError(f"a scalar of dtype {dtype} cannot hold {number}") from None


def _array(value: dict[Any, Any]) -> NDArray[Any]:
    dtype, data, shape = _dtype(value), value.get(b"data"), value.get(b"shape")
    if not isinstance(data, bytes):
        raise ProtocolError(f"an array's data is {type(data).__name__}, expected bytes")
    if not isinstance(shape, list) or len(shape) > 8 or any(type(size) is not int or size < 0 for size in shape):
        raise ProtocolError("an array's shape is expected to be a list of at most eight sizes")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ProtocolError(f"an array of dtype {dtype} and shape {tuple(shape)} has {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def _dtype(value: dict[Any, Any]) -> np.dtype[Any]:
    name = value.get(b"dtype")
    if not isinstance(name, str) or not DTYPE.fullmatch(name):
        found = repr(name)[:40]
        raise ProtocolError(f"an array's dtype is {found}, expected a boolean, integer or float such as '<f4' or '|u1'")
    return np.dtype(name)
