"""TFRecord files and the `tf.train.Example` messages in them, read without TensorFlow.

A record is: length (uint64), masked CRC-32C of the length, payload, masked CRC-32C of the payload. An Example is a map from a
feature's name to one list of bytes, float32 or int64. The parser knows these messages only, and refuses anything else. No
length is trusted: each is held against what encloses it. It works on a mapped file too, where what it is not asked for, such as
pictures, is never read: libraries read whole records, which for a data set of terabytes takes days.
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
_LISTS = {1: "bytes", 2: "float32", 3: "int64"}


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
        raise FileError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from None
    content.madvise(mmap.MADV_RANDOM)
    return memoryview(content)


def record_spans(data: memoryview, where: str) -> Iterator[tuple[int, int]]:
    """(offset of the payload, its length) of each record of a file; payloads are skipped, not checked.

    Raises:
        FileError: a length's checksum is wrong, or the file ends within a record.
    """
    at = number = 0
    while at < len(data):
        header = bytes(data[at : at + HEADER])
        if number == 0 and header[:2] == b"\x1f\x8b":
            raise FileError(f"{where}: compressed with gzip, which TFDS does not write; decompress it with gunzip first")
        length, crc = struct.unpack("<QI", header.ljust(HEADER, b"\0"))
        if len(header) == HEADER and masked_crc(header[:8]) != crc:
            raise FileError(f"{where}: damaged, or no TFRecord file: the checksum of the length of record {number} is wrong")
        if length > len(data) - at - HEADER - FOOTER:
            raise FileError(f"{where}: truncated: the file ends within record {number}")
        yield at + HEADER, length
        at += HEADER + length + FOOTER
        number += 1


def read_record(path: Path, offset: int, length: int, where: str) -> memoryview:
    """One payload, checked against its CRC-32C. `offset` and `length` are those of `record_spans`.

    Raises:
        FileError: the file is missing or ends too early, or the checksum is wrong.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            payload, footer = file.read(length), file.read(FOOTER)
    except OSError as error:
        raise FileError(f"{where}: cannot be read ({error.strerror or type(error).__name__})") from None
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
        if byte < 0x80 and value < 2**64:
            return value, at + count
    raise FileError(f"{where}: no valid tf.train.Example (a number without an end, or of more than 64 bits)")


def _fields(message: memoryview, where: str) -> Iterator[tuple[int, int, memoryview]]:
    """(number, wire type, content) of the fields of a protobuf message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at, where)
        start, wire = at, tag & 7
        if wire == _VARINT:
            _, at = _varint(message, at, where)
        elif wire in (_LENGTH, _FIXED32):
            length, start = _varint(message, at, where) if wire == _LENGTH else (4, at)
            at = start + length
            if at > len(message):
                raise FileError(f"{where}: no valid tf.train.Example (a field of {length} bytes ends after its message)")
        else:
            raise FileError(f"{where}: no valid tf.train.Example (wire type {wire})")
        yield tag >> 3, wire, message[start:at]


def _parts(message: memoryview, where: str, *expected: int) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of the fields, which must all have a length and an expected number."""
    for number, wire, content in _fields(message, where):
        if wire != _LENGTH or number not in expected:
            raise FileError(f"{where}: no valid tf.train.Example (field {number} of wire type {wire})")
        yield number, content


def features_of(payload: memoryview, where: str) -> dict[str, memoryview]:
    """Feature name -> its `Feature` message, of a record's payload; nothing is copied.

    Raises:
        FileError: it is no Example, or a name appears twice.
    """
    features: dict[str, memoryview] = {}
    for _, group in _parts(payload, where, 1):
        for _, entry in _parts(group, where, 1):
            parts = dict(_parts(entry, where, 1, 2))
            name = bytes(parts.get(1, b"")).decode("utf-8", "backslashreplace")
            if name in features:
                raise FileError(f"{where}: feature {name!r} is there twice")
            features[name] = parts.get(2, entry[:0])
    return features


def _list_of(feature: memoryview, where: str) -> tuple[str, memoryview]:
    """(kind of the list, its message); an unset feature is an empty list of kind ""."""
    lists = list(_parts(feature, where, *_LISTS))
    if len(lists) > 1:
        raise FileError(f"{where}: {len(lists)} lists in one feature, expected one")
    return (_LISTS[lists[0][0]], lists[0][1]) if lists else ("", feature[:0])


def byte_strings(feature: memoryview, where: str) -> list[memoryview]:
    """The elements of a list of bytes.

    Raises:
        FileError: it is another kind of list, or damaged.
    """
    kind, body = _list_of(feature, where)
    if kind not in ("bytes", ""):
        raise FileError(f"{where}: a list of {kind}, expected bytes")
    return [content for _, content in _parts(body, where, 1)]


def numbers(feature: memoryview, where: str) -> NDArray[np.float32] | NDArray[np.int64]:
    """(k,) float32 or int64: the elements of a list of either, packed or not.

    Raises:
        FileError: it is a list of bytes, or damaged.
    """
    kind, body = _list_of(feature, where)
    if kind == "bytes":
        raise FileError(f"{where}: a list of bytes, expected numbers")
    single = _VARINT if kind == "int64" else _FIXED32
    parts = []
    for number, wire, content in _fields(body, where):
        if number != 1 or wire not in (_LENGTH, single):
            raise FileError(f"{where}: field {number} of wire type {wire} in a list of {kind}")
        parts.append(content)
    joined = b"".join(parts)
    if kind == "int64":
        return _varints(joined, where)
    if len(joined) % 4:
        raise FileError(f"{where}: {len(joined)} bytes of float32 numbers, expected a multiple of 4")
    return np.frombuffer(joined, dtype="<f4").astype(np.float32)


def _varints(data: bytes, where: str) -> NDArray[np.int64]:
    """(k,) int64 of numbers of 1 to 10 bytes, whose last byte alone has its top bit clear."""
    raw = np.frombuffer(data, dtype=np.uint8)
    if not len(raw):
        return np.zeros(0, dtype=np.int64)
    ends = np.flatnonzero(raw < 0x80)
    if raw[-1] >= 0x80:
        raise FileError(f"{where}: the last number of a list has no end")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10 or (raw[ends[lengths == 10]] > 1).any():
        raise FileError(f"{where}: a number of more than 64 bits")
    values = np.zeros(len(ends), dtype=np.uint64)
    for k in range(int(lengths.max())):
        longer = lengths > k
        values[longer] |= (raw[starts[longer] + k].astype(np.uint64) & np.uint64(0x7F)) << np.uint64(7 * k)
    return values.view(np.int64)
