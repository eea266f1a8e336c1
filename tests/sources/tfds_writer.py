"""Writes small RLDS data sets as TFDS lays them out, independently of the code under test."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from PIL import Image

TENSOR = dict[str, Any]


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = b""
    while value >= 128:
        out, value = out + bytes([value % 128 + 128]), value // 128
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(content)) + content


def feature(values: Any, packed: bool = True) -> bytes:
    """A `Feature`: of bytes or str a list of bytes, of floats and of integers their lists."""
    if isinstance(values, bytes):  # as it is
        return values
    if isinstance(values, list):
        return field(1, b"".join(field(1, v.encode() if isinstance(v, str) else v) for v in values))
    values = np.asarray(values)
    if values.dtype.kind == "f":
        numbers = [struct.pack("<f", v) for v in values.ravel()]
        return field(2, field(1, b"".join(numbers)) if packed else b"".join(b"\x0d" + v for v in numbers))
    numbers = [varint(int(v)) for v in values.ravel()]
    return field(3, field(1, b"".join(numbers)) if packed else b"".join(b"\x08" + v for v in numbers))


def example(features: Mapping[str, Any], packed: bool = True) -> bytes:
    return field(1, b"".join(field(1, field(1, k.encode()) + field(2, feature(v, packed))) for k, v in features.items()))


def masked(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)


def framed(payloads: Sequence[bytes]) -> bytes:
    out = b""
    for payload in payloads:
        length = struct.pack("<Q", len(payload))
        out += length + masked(length) + payload + masked(payload)
    return out


def tensor(*shape: int, dtype: str = "float32", encoding: str = "none") -> TENSOR:
    dimensions = {"dimensions": [str(n) for n in shape]} if shape else {}
    return {"tensor": {"shape": dimensions, "dtype": dtype, "encoding": encoding}}


def image(*shape: int, dtype: str = "uint8", encoding: str = "png") -> TENSOR:
    return {"image": {"shape": {"dimensions": [str(n) for n in shape]}, "dtype": dtype, "encodingFormat": encoding}}


TEXT: TENSOR = {"text": {}}


def _tree(flat: Mapping[str, TENSOR]) -> TENSOR:
    children: dict[str, Any] = {}
    for name, leaf in flat.items():
        head, _, rest = name.partition("/")
        children.setdefault(head, {})[rest] = leaf
    return {"featuresDict": {"features": {k: v[""] if "" in v else _tree(v) for k, v in children.items()}}}


def write_json_files(folder: Path, features: Mapping[str, TENSOR], splits: Mapping[str, Sequence[int]], **info: Any) -> None:
    steps = {name.removeprefix("steps/"): leaf for name, leaf in features.items() if name.startswith("steps/")}
    root = _tree({name: leaf for name, leaf in features.items() if not name.startswith("steps/")})
    root["featuresDict"]["features"]["steps"] = {"sequence": {"feature": _tree(steps), "length": "-1"}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "features.json").write_text(json.dumps(root))
    declared = [{"name": name, "shardLengths": [str(n) for n in lengths]} for name, lengths in splits.items()]
    written = {"name": "toy", "version": "1.0.0", "fileFormat": "tfrecord", "splits": declared, **info}
    (folder / "dataset_info.json").write_text(json.dumps(written))


def write_set(folder: Path, features: Mapping[str, TENSOR], splits: Mapping[str, Sequence[Sequence[Any]]], **info: Any) -> None:
    """`splits`: name -> shards -> episodes, each a mapping of values or a finished payload."""
    write_json_files(folder, features, {name: [len(s) for s in shards] for name, shards in splits.items()}, **info)
    for name, shards in splits.items():
        for at, episodes in enumerate(shards):
            payloads = [e if isinstance(e, bytes) else example(e) for e in episodes]
            (folder / f"toy-{name}.tfrecord-{at:05d}-of-{len(shards):05d}").write_bytes(framed(payloads))


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
