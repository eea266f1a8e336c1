"""TFRecord files and the `tf.train.Example` messages in them, read without TensorFlow.

A record is: length (uint64), masked CRC-32C of the length, payload, masked CRC-32C of the payload. An Example is a map from a
feature's name to one list of bytes, float32 or int64. Of a mapped file, what is not asked for, such as pictures, is never read:
libraries read whole records, which for a data set of terabytes takes days. No length is trusted; whatever is damaged is a
`FileError` that begins with `where`.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from svam.files import FileError

HEADER, FOOTER = 12, 4
_VARINT, _LENGTH, _FIXED32 = 0, 2, 5
_BYTES, _FLOATS, _INTEGERS = 1, 2, 3
_LISTS = {_BYTES: "bytes", _FLOATS: "float32", _INTEGERS: "int64"}


def masked_crc(data: bytes) -> int:
    """TFRecord's checksum: CRC-32C, rotated right by 15 bits, plus a constant."""
    crc = int(google_crc32c.value(data))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def mapped(path: Path) -> memoryview:
    """A file's bytes, which are read where they are looked at."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                return memoryview(b"")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None
    content.madvise(mmap.MADV_RANDOM)
    return memoryview(content)


def record_spans(data: memoryview, where: str) -> Iterator[tuple[int, int]]:
    """(offset of the payload, its length) of each record of a file; payloads are skipped, not checked."""
    at = number = 0
    while at < len(data):
        header = bytes(data[at : at + HEADER])
        if number == 0 and header[:2] == b"\x1f\x8b":
            raise FileError(f"{where}: compressed with gzip, which TFDS does not write; put what `zcat` gives in its place")
        length, crc = struct.unpack("<QI", header.ljust(HEADER, b"\0"))
        if len(header) == HEADER and masked_crc(header[:8]) != crc:
            raise FileError(f"{where}: damaged, or no TFRecord file: the checksum of the length of record {number} is wrong")
        if length > len(data) - at - HEADER - FOOTER:
            raise FileError(f"{where}: truncated: the file ends within record {number}")
        yield at + HEADER, length
        at += HEADER + length + FOOTER
        number += 1


def read_record(path: Path, offset: int, length: int, where: str) -> memoryview:
    """One payload, checked against its CRC-32C. `offset` and `length` are those of `record_spans`."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            payload, footer = file.read(length), file.read(FOOTER)
    except OSError as error:
        raise FileError(f"{where}: cannot be read ({error.strerror})") from None
    if len(payload) != length or len(footer) != FOOTER:
        raise FileError(f"{where}: truncated: the file ends within this record")
    if masked_crc(payload) != int.from_bytes(footer, "little"):
        raise FileError(f"{where}: damaged: the checksum of its data is wrong")
    return memoryview(payload)


def _varint(message: memoryview, at: int, where: str) -> tuple[int, int]:
    """(the number at a place, the place after it)."""
    value = 0
    for count, byte in enumerate(message[at : at + 10], 1):
        value |= (byte & 0x7F) << 7 * (count - 1)
        if byte < 0x80:
            return value, at + count
    raise FileError(f"{where}: no valid tf.train.Example (a number without an end)")


def _fields(message: memoryview, where: str, *expected: tuple[int, int]) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of the fields of a protobuf message, whose numbers and wire types must all be `expected`."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at, where)
        number, wire, start = tag >> 3, tag & 7, at
        if (number, wire) not in expected:
            raise FileError(f"{where}: no valid tf.train.Example (field {number} of wire type {wire})")
        if wire == _VARINT:
            _, at = _varint(message, at, where)
        else:
            length, start = _varint(message, at, where) if wire == _LENGTH else (4, at)
            at = start + length
            if at > len(message):
                raise FileError(f"{where}: no valid tf.train.Example (a field of {length} bytes ends after its message)")
        yield number, message[start:at]


def features_of(payload: memoryview, where: str) -> dict[str, memoryview]:
    """Feature name -> its `Feature` message, of a record's payload; nothing is copied."""
    features: dict[str, memoryview] = {}
    for _, group in _fields(payload, where, (1, _LENGTH)):
        for _, entry in _fields(group, where, (1, _LENGTH)):
            parts = dict(_fields(entry, where, (1, _LENGTH), (2, _LENGTH)))
            name = bytes(parts.get(1, b"")).decode("utf-8", "backslashreplace")
            if name in features:
                raise FileError(f"{where}: feature {name!r} is there twice")
            features[name] = parts.get(2, entry[:0])
    return features


def _list_of(feature: memoryview, where: str, *kinds: int) -> tuple[int, memoryview]:
    """(kind, message) of the only list of a feature; an unset feature is an empty list."""
    lists = list(_fields(feature, where, *((kind, _LENGTH) for kind in _LISTS)))
    if len(lists) > 1:
        raise FileError(f"{where}: {len(lists)} lists in one feature, expected one")
    kind, body = lists[0] if lists else (kinds[0], feature[:0])
    if kind not in kinds:
        raise FileError(f"{where}: a list of {_LISTS[kind]}, expected {' or '.join(_LISTS[other] for other in kinds)}")
    return kind, body


def byte_strings(feature: memoryview, where: str) -> list[memoryview]:
    """The elements of a list of bytes."""
    return [content for _, content in _fields(_list_of(feature, where, _BYTES)[1], where, (1, _LENGTH))]


def numbers(feature: memoryview, where: str) -> NDArray[np.float32] | NDArray[np.int64]:
    """(k,) float32 or int64: the elements of a list of either, packed or not."""
    kind, body = _list_of(feature, where, _FLOATS, _INTEGERS)
    single = _VARINT if kind == _INTEGERS else _FIXED32
    data = b"".join(content for _, content in _fields(body, where, (1, _LENGTH), (1, single)))
    if kind == _INTEGERS:
        return _varints(np.frombuffer(data, dtype=np.uint8), where)
    if len(data) % 4:
        raise FileError(f"{where}: {len(data)} bytes of float32 numbers, expected a multiple of 4")
    return np.frombuffer(data, dtype="<f4").astype(np.float32)


def _varints(data: NDArray[np.uint8], where: str) -> NDArray[np.int64]:
    """(k,) int64 of numbers of 1 to 10 bytes, whose last byte alone has its top bit clear."""
    ends = np.flatnonzero(data < 0x80)
    starts = np.append(0, ends + 1)
    lengths = np.diff(starts)
    if starts[-1] != len(data) or lengths.max(initial=0) > 10:
        raise FileError(f"{where}: a list has a number without an end, or of more than 64 bits")
    values = np.zeros(len(ends), dtype=np.uint64)
    for k in range(lengths.max(initial=0)):
        longer = lengths > k
        values[longer] |= (data[starts[:-1][longer] + k].astype(np.uint64) & np.uint64(0x7F)) << np.uint64(7 * k)
    return values.view(np.int64)
