"""TFRecord files and the `tf.train.Example` messages in them, read without TensorFlow.

A record is: length (uint64), masked CRC-32C of the length, payload, masked CRC-32C of the payload. No length is trusted:
each is held against what encloses it before anything is read or allocated, so that memory is bounded by one record.

An Example is a map from a feature's name to one list of bytes, float32 or int64. The parser knows these messages only, and
refuses anything else. It works on a place in a file too, where it skips what it is not asked for, such as pictures.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from svam.files import FileError

HEADER, FOOTER = 12, 4
MAX_RECORD = 2**31 - 1
"""Largest payload: protobuf's own limit for a message."""
_MAX_KEY = 2**12
_VARINT, _LENGTH, _FIXED32 = 0, 2, 5
_LISTS = {1: "bytes", 2: "float32", 3: "int64"}
Fetch = Callable[[int, int], bytes | memoryview]


def masked_crc(data: bytes) -> int:
    """TFRecord's checksum: CRC-32C, rotated right by 15 bits, plus a constant."""
    crc = int(google_crc32c.value(data))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def record_spans(file: BinaryIO, size: int, where: str) -> Iterator[tuple[int, int]]:
    """(offset of the payload, its length) of each record of a file of `size` bytes; payloads are skipped, not checked.

    Raises:
        FileError: a length's checksum is wrong, or the file ends within a record.
    """
    at = number = 0
    while at < size:
        file.seek(at)
        header = file.read(HEADER)
        if number == 0 and header[:2] == b"\x1f\x8b":
            raise FileError(f"{where}: compressed with gzip, which TFDS does not write; decompress it with gunzip first")
        if len(header) < HEADER:
            raise FileError(f"{where}: truncated: the file ends within record {number}")
        length, crc = struct.unpack("<QI", header)
        if masked_crc(header[:8]) != crc:
            raise FileError(f"{where}: damaged, or no TFRecord file: the checksum of the length of record {number} is wrong")
        if length > MAX_RECORD:
            raise FileError(f"{where}: record {number} states {length} bytes, expected at most {MAX_RECORD}")
        if length > size - at - HEADER - FOOTER:
            raise FileError(f"{where}: truncated: the file ends within record {number}")
        yield at + HEADER, length
        at += HEADER + length + FOOTER
        number += 1


def read_record(path: Path, offset: int, length: int, where: str) -> bytes:
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
    return payload


class _Message:
    """A protobuf message between two places; iterating gives its fields as (number, wire type, start, end of the content)."""

    def __init__(self, fetch: Fetch, start: int, end: int, where: str) -> None:
        """`fetch(a, b)` gives the bytes from a to b."""
        self._fetch, self._at, self._end, self._where = fetch, start, end, where

    def _fail(self, what: str) -> NoReturn:
        raise FileError(f"{self._where}: no valid tf.train.Example ({what})")

    def varint(self) -> int:
        """The next number, of at most 64 bits."""
        value = shift = 0
        for byte in self._fetch(self._at, min(self._at + 10, self._end)):
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        else:
            self._fail("a number without an end")
        if value >= 2**64:
            self._fail("a number of more than 64 bits")
        self._at += shift // 7
        return value

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        while self._at < self._end:
            tag = self.varint()
            number, wire = tag >> 3, tag & 7
            start = self._at
            if wire == _VARINT:
                self.varint()
            elif wire in (_LENGTH, _FIXED32):
                length = self.varint() if wire == _LENGTH else 4
                start = self._at
                if length > self._end - start:
                    self._fail(f"a field of {length} bytes where {self._end - start} are left")
                self._at = start + length
            else:
                self._fail(f"wire type {wire}")
            yield number, wire, start, self._at

    def parts(self, numbers: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
        """(number, start, end) of the fields, which must all have a length and be among `numbers`."""
        for number, wire, start, end in self:
            if wire != _LENGTH or number not in numbers:
                self._fail(f"field {number} of wire type {wire}, expected {' or '.join(map(str, numbers))} with a length")
            yield number, start, end


def feature_spans(fetch: Fetch, start: int, end: int, where: str) -> dict[str, tuple[int, int]]:
    """Feature name -> (start, end) of its `Feature` message, in the Example that lies between `start` and `end`.

    Raises:
        FileError: it is no Example, or a name appears twice.
    """
    spans: dict[str, tuple[int, int]] = {}
    for _, features_start, features_end in _Message(fetch, start, end, where).parts((1,)):
        for _, entry_start, entry_end in _Message(fetch, features_start, features_end, where).parts((1,)):
            name, span = b"", (entry_end, entry_end)
            for number, a, b in _Message(fetch, entry_start, entry_end, where).parts((1, 2)):
                if number == 2:
                    span = (a, b)
                elif b - a > _MAX_KEY:
                    raise FileError(f"{where}: the name of a feature has {b - a} bytes, expected at most {_MAX_KEY}")
                else:
                    name = bytes(fetch(a, b))
            try:
                key = name.decode("utf-8")
            except UnicodeDecodeError:
                raise FileError(f"{where}: the name {name[:40]!r} of a feature is not UTF-8") from None
            if key in spans:
                raise FileError(f"{where}: feature {key!r} is there twice")
            spans[key] = span
    return spans


def fetch_from_file(file: BinaryIO, where: str) -> Fetch:
    """`fetch` for an open file."""

    def fetch(start: int, end: int) -> bytes:
        file.seek(start)
        data = file.read(end - start)
        if len(data) != end - start:
            raise FileError(f"{where}: truncated while it was read")
        return data

    return fetch


def features_of(payload: bytes, where: str) -> dict[str, memoryview]:
    """Feature name -> its `Feature` message, of a record's payload; nothing is copied."""
    view = memoryview(payload)
    return {name: view[start:end] for name, (start, end) in feature_spans(lambda a, b: view[a:b], 0, len(view), where).items()}


def _list_of(feature: memoryview, where: str) -> tuple[str, memoryview]:
    """(kind of the list, its message); an unset feature is an empty list of kind ""."""
    found = [
        (_LISTS[n], feature[a:b]) for n, a, b in _Message(lambda a, b: feature[a:b], 0, len(feature), where).parts((1, 2, 3))
    ]
    if len(found) > 1:
        raise FileError(f"{where}: {len(found)} lists in one feature, expected one")
    return found[0] if found else ("", feature[:0])


def byte_strings(feature: memoryview, where: str) -> list[memoryview]:
    """The elements of a list of bytes.

    Raises:
        FileError: it is another kind of list, or damaged.
    """
    kind, body = _list_of(feature, where)
    if kind not in ("bytes", ""):
        raise FileError(f"{where}: a list of {kind}, expected bytes")
    return [body[a:b] for _, a, b in _Message(lambda a, b: body[a:b], 0, len(body), where).parts((1,))]


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
    for number, wire, start, end in _Message(lambda a, b: body[a:b], 0, len(body), where):
        if number != 1 or wire not in (_LENGTH, single):
            raise FileError(f"{where}: field {number} of wire type {wire} in a list of {kind}")
        parts.append(body[start:end])
    joined = bytes(parts[0]) if len(parts) == 1 else b"".join(parts)
    if kind == "int64":
        return _varints(joined, where)
    if len(joined) % 4:
        raise FileError(f"{where}: {len(joined)} bytes of float32 numbers, expected a multiple of 4")
    return np.frombuffer(joined, dtype="<f4").astype(np.float32)


def _varints(data: bytes, where: str) -> NDArray[np.int64]:
    """(k,) int64 of numbers of 1 to 10 bytes, whose last byte alone has its top bit clear."""
    raw = np.frombuffer(data, dtype=np.uint8)
    ends = np.flatnonzero(raw < 0x80)
    if len(raw) and (not len(ends) or ends[-1] != len(raw) - 1):
        raise FileError(f"{where}: the last number of a list has no end")
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    lengths = ends - starts + 1
    if len(ends) and (lengths.max() > 10 or (raw[ends[lengths == 10]] > 1).any()):
        raise FileError(f"{where}: a number of more than 64 bits")
    values = np.zeros(len(ends), dtype=np.uint64)
    for k in range(int(lengths.max()) if len(ends) else 0):
        longer = lengths > k
        values[longer] |= (raw[starts[longer] + k].astype(np.uint64) & np.uint64(0x7F)) << np.uint64(7 * k)
    return values.view(np.int64)
