"""The message format: what the documented one says, both ways, and what is refused before memory is taken for it."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from svam.serving.protocol import ProtocolError, pack, unpack
from tests.serving.peers import as_map, decoded, encoded

DTYPES = ("|b1", "|u1", "<i2", ">i4", "<i8", "<f2", "<f4", ">f8")


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(
    st.sampled_from(DTYPES).flatmap(lambda d: arrays(np.dtype(d), array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
)
def test_arrays_arrive_as_they_were(array: np.ndarray[Any, Any]) -> None:
    for found in (unpack(pack({"a": array}))["a"], unpack(encoded({"a": array}))["a"], decoded(pack({"a": array}))["a"]):
        assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()


def test_values_that_are_no_arrays() -> None:
    value = {"text": "grüß", "none": None, "list": [1, -2, 2.5, True], "map": {"k": b"bytes"}}
    assert unpack(pack(value)) == value
    for scalar in (np.float32(1.5), np.uint8(200), np.int64(-3), np.bool_(True)):
        found = unpack(pack({"s": scalar}))["s"]
        assert found == scalar and found.dtype == scalar.dtype
    # The very bytes that the format names, written out by hand: {"a": array([1, 2], '<u2')}.
    assert pack({"a": np.array([1, 2], "<u2")}) == (
        b"\x81\xa1a\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x04\x01\x00\x02\x00\xc4\x05dtype\xa3<u2\xc4\x05shape\x91\x02"
    )
    assert unpack(pack(np.asfortranarray(np.arange(6.0).reshape(2, 3)))).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "value",
    [np.array([None]), np.zeros(1, "c8"), np.zeros(1, "V4"), np.complex64(1), object(), {1, 2}],
    ids=["objects", "complex", "records", "a complex scalar", "an object", "a set"],  # equal in every process
)
def test_what_cannot_be_sent_is_named(value: Any) -> None:
    with pytest.raises(ProtocolError, match="cannot be sent"):
        pack({"a": value})


def of(**changes: Any) -> dict[bytes, Any]:
    return as_map(np.zeros((2, 3), np.float32)) | {key.encode(): value for key, value in changes.items()}


BAD: list[tuple[Any, str]] = [
    (of(dtype="|O"), "'|O', expected a boolean, integer or float"), (of(dtype="<c8"), "dtype"), (of(dtype="|V4"), "dtype"),
    (of(dtype="<U1"), "dtype"), (of(dtype="<M8[s]"), "dtype"), (of(dtype=b"<f4"), "dtype"), (of(dtype="f4,f4"), "dtype"),
    (of(shape=[2, 4]), r"shape \(2, 4\) has 24 bytes"), (of(shape=[-2, -3]), "sizes"), (of(shape=6), "sizes"),
    (of(shape=[2**62, 2**62, 2**62]), "24 bytes"), (of(shape=[1] * 9), "sizes"), (of(shape=[True, 6]), "sizes"),
    (of(shape=[2, 3.0]), "sizes"), (of(data="text"), "data is str"), (of(data=b""), "0 bytes"),
    ({b"__ndarray__": True}, "dtype"), ({b"__npgeneric__": True, b"dtype": "|u1", b"data": 300}, "cannot hold 300"),
    ({b"__npgeneric__": True, b"dtype": "|u1", b"data": "x"}, "holds a str"), (list(range(257)), "not msgpack"),
    ([[]] * 256, "more than 256 lists and maps"), (msgpack.ExtType(5, b"abc"), "not msgpack"), ("x" * 70000, "not msgpack"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_message_that_is_not_of_the_format_is_one_sentence(value: Any, message: str) -> None:
    with pytest.raises(ProtocolError, match=message) as caught:
        unpack(msgpack.packb({"a": value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("message", [b"", b"\xc1", b"\x81", b"\x81\xa1a\xc4\xff", b"\xa1\xff", b"\x81\x01\x02", b"\x01\x02"])
def test_bytes_that_are_no_message(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(message)


def test_claimed_lengths_take_no_memory() -> None:
    """Lists within lists, each of which claims as many items as there may be; a list that claims 4 G; and empty lists."""
    nested, claimed = b"\xdc\x01\x00" * 900, b"\xdd\xff\xff\xff\xff" + b"\x01" * 100_000
    empty = b"\xdc\x01\x00" + b"\x90" * 10**6
    tracemalloc.start()
    try:
        for message in (nested, claimed, empty):
            with pytest.raises(ProtocolError):
                unpack(message)
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
