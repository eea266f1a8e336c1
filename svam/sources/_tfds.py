"""What TFDS writes beside its records: `dataset_info.json` (splits, shards) and `features.json` (names, shapes, encodings)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svam.errors import ParamsError
from svam.files import FileError, read_json
from svam.sources._tfrecord import byte_strings, numbers

_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_NUMERIC = {
    "bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
}  # fmt: skip
_ENCODINGS = ("none", "", "bytes", "zlib")
_STRINGS = {"string", "object", "object_", "str", "bytes"}
_MAX_STEP_BYTES = 2**28


@dataclass(frozen=True)
class Feature:
    """One leaf of `features.json`. shape: without the axis of the steps, None where a size is not fixed. encoding: of a
    tensor "none", "bytes" or "zlib", of an image "jpeg", "png" or ""."""

    kind: Literal["tensor", "image", "text", "other"]
    shape: tuple[int | None, ...] = ()
    dtype: str = ""
    encoding: str = ""

    @property
    def size(self) -> int:
        """Numbers per step of a numeric tensor of fixed shape and a known encoding; 0 for everything else."""
        if self.kind != "tensor" or self.dtype not in _NUMERIC or self.encoding not in _ENCODINGS or None in self.shape:
            return 0
        return math.prod(n for n in self.shape if n is not None)

    def __str__(self) -> str:
        sizes = ", ".join("?" if n is None else str(n) for n in self.shape)
        return f"{self.kind} {self.dtype} ({sizes})" if self.kind in ("tensor", "image") else self.kind


@dataclass(frozen=True)
class Shard:
    """One record file: its split, name and number of records."""

    split: str
    name: str
    records: int


@dataclass(frozen=True)
class DatasetInfo:
    """Name, version, and the shards of each split."""

    name: str
    version: str
    splits: Mapping[str, list[Shard]]


def find_version(path: Path, version: str) -> Path:
    """The folder that holds `dataset_info.json`: `path`, or the only one at most three levels below, or what `version` names.

    Raises:
        FileError: there is none.
        ParamsError: there are several, or none that `version` names.
    """
    if not path.is_dir():
        raise FileError(f"{path}: no such directory")
    if not version and (path / "dataset_info.json").is_file():
        return path
    found = sorted(
        file.parent
        for depth in ("", "*/", "*/*/", "*/*/*/")
        for file in path.glob(f"{depth}dataset_info.json")
        if file.is_file()
    )
    if not found:
        raise FileError(
            f"{path}: no dataset_info.json in it or up to three folders below; expected a TFDS folder such as 1.0.0"
        )
    names = {folder: folder.relative_to(path).as_posix() for folder in found}
    chosen = (
        found if not version else [f for f in found if f"/{path.name}/{names[f]}".removesuffix("/.").endswith(f"/{version}")]
    )
    if len(chosen) != 1:
        wanted = (
            f"convert.options.version is {version!r}, which fits {len(chosen)}"
            if version
            else "say which by convert.options.version"
        )
        raise ParamsError(f"{path}: {len(found)} data sets ({', '.join(names.values())}); {wanted}, expected one")
    return chosen[0]


def _json(file: Path) -> dict[str, Any]:
    try:
        value = read_json(file)
    except RecursionError:
        raise FileError(f"{file}: nested too deeply") from None
    if not isinstance(value, dict):
        raise FileError(f"{file}: {type(value).__name__}, expected an object")
    return value


def _whole_number(value: Any) -> int | None:
    """A number as protobuf's JSON has it, "25" or 25; None where it is none."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def read_dataset_info(folder: Path) -> DatasetInfo:
    """Parse `dataset_info.json`.

    Raises:
        FileError: it is missing, damaged, of another file format than tfrecord, or names files outside its folder.
    """
    file = folder / "dataset_info.json"
    info = _json(file)
    name, version, file_format = info.get("name"), info.get("version", folder.name), info.get("fileFormat", "tfrecord")
    if not isinstance(name, str) or not name or not isinstance(version, str):
        raise FileError(f"{file}: name is {name!r} and version {version!r}, expected strings")
    if file_format != "tfrecord":
        raise FileError(f"{file}: fileFormat is {file_format!r}, this reader knows 'tfrecord'")
    splits: dict[str, list[Shard]] = {}
    declared = info.get("splits")
    if not isinstance(declared, list) or not declared:
        raise FileError(f"{file}: splits is missing or empty")
    for at, split in enumerate(declared):
        if (
            not isinstance(split, dict)
            or not isinstance(split.get("name"), str)
            or not isinstance(split.get("shardLengths"), list)
        ):
            raise FileError(f"{file}: splits[{at}] lacks a name or a list of shardLengths")
        if split["name"] in splits:
            raise FileError(f"{file}: split {split['name']!r} is there twice")
        template = split.get("filepathTemplate") or _TEMPLATE
        lengths = split["shardLengths"]
        shards = []
        for number, length in enumerate(lengths):
            records = _whole_number(length)
            if records is None or not isinstance(template, str):
                raise FileError(
                    f"{file}: splits[{at}].shardLengths[{number}] is {length!r}, expected a number (template {template!r})"
                )
            values = {
                "DATASET": name, "SPLIT": split["name"], "FILEFORMAT": "tfrecord", "SHARD_INDEX": f"{number:05d}",
                "NUM_SHARDS": f"{len(lengths):05d}", "SHARD_X_OF_Y": f"{number:05d}-of-{len(lengths):05d}",
            }  # fmt: skip
            shard = template
            for key, value in values.items():
                shard = shard.replace("{" + key + "}", value)
            if "{" in shard or "/" in shard or "\\" in shard or "\0" in shard or shard in ("", ".", ".."):
                raise FileError(
                    f"{file}: filepathTemplate {template!r} gives {shard!r}, expected the name of a file in this folder"
                )
            shards.append(Shard(split["name"], shard, records))
        if len({shard.name for shard in shards}) != len(shards):
            raise FileError(f"{file}: filepathTemplate {template!r} gives several shards one name")
        splits[split["name"]] = shards
    return DatasetInfo(name, version, splits)


def read_features(folder: Path) -> dict[str, Feature]:
    """Flattened name (`steps/observation/image_0`) -> feature, of `features.json`, in its order.

    Raises:
        FileError: it is missing, damaged, in the form of early TFDS versions, or has no `steps`.
    """
    file = folder / "features.json"
    root = _json(file)
    if "content" in root and "featuresDict" not in root:
        raise FileError(
            f"{file}: in the form of early TFDS versions (type, content), expected featuresDict; rewrite it with a newer TFDS"
        )
    try:
        features = dict(_leaves(root, "", file, 0))
    except RecursionError:
        raise FileError(f"{file}: nested too deeply") from None
    if not any(name.startswith("steps/") for name in features):
        raise FileError(
            f"{file}: no features under 'steps', so this is no RLDS data set; it has {', '.join(features)[:200] or 'none'}"
        )
    return features


def _leaves(node: Any, name: str, file: Path, depth: int) -> Iterator[tuple[str, Feature]]:
    """The leaves below a node of `features.json`. Only the sequence `steps` is entered: others have no fixed length a step."""
    where = f"{file}: feature {name!r}"
    if not isinstance(node, dict):
        raise FileError(f"{where} is {type(node).__name__}, expected an object")
    sequence = node.get("sequence", node.get("dataset"))
    if "featuresDict" in node:
        children = node["featuresDict"].get("features") if isinstance(node["featuresDict"], dict) else None
        if not isinstance(children, dict):
            raise FileError(f"{where} lacks featuresDict.features")
        for key, child in children.items():
            yield from _leaves(child, f"{name}/{key}" if name else key, file, depth + 1)
    elif sequence is not None and name == "steps":
        yield from _leaves(sequence.get("feature") if isinstance(sequence, dict) else None, name, file, depth + 1)
    elif "text" in node:
        yield name, Feature("text")
    elif "image" in node or "tensor" in node:
        kind: Literal["image", "tensor"] = "image" if "image" in node else "tensor"
        content = node[kind]
        if not isinstance(content, dict):
            raise FileError(f"{where}: {kind} is {type(content).__name__}, expected an object")
        dtype = content.get("dtype", "uint8" if kind == "image" else None)
        encoding = content.get("encodingFormat", "") if kind == "image" else content.get("encoding", "none")
        if not isinstance(dtype, str) or not isinstance(encoding, str):
            raise FileError(f"{where}: dtype is {dtype!r} and the encoding {encoding!r}, expected strings")
        shape = _shape(content.get("shape"), where)
        if kind == "tensor" and dtype in _STRINGS:
            yield name, Feature("text" if shape in ((), (1,)) else "other", shape, dtype)
        else:
            yield name, Feature(kind, shape or ((None, None, None) if kind == "image" else ()), dtype, encoding.lower())
    else:
        yield name, Feature("other")


def _shape(node: Any, where: str) -> tuple[int | None, ...]:
    dimensions = node.get("dimensions", []) if isinstance(node, dict) else [] if node is None else node
    if not isinstance(dimensions, list):
        raise FileError(f"{where}: shape is {node!r}, expected a list of dimensions")
    shape: list[int | None] = []
    for n in dimensions:
        if n not in (-1, "-1", None) and _whole_number(n) is None:
            raise FileError(f"{where}: shape is {dimensions!r}, expected whole numbers, -1 for a size that varies")
        shape.append(_whole_number(n))
    return tuple(shape)


def texts(data: memoryview, feature: Feature, where: str) -> list[str]:
    """One string a step: of a text feature, or of rows of UTF-8 bytes padded with zeros (an integer tensor).

    Raises:
        FileError: damaged, or not UTF-8.
    """
    if feature.kind == "text":
        rows = [bytes(row) for row in byte_strings(data, where)]
    else:
        codes = vectors(data, feature, where)
        if not np.isin(codes, np.arange(256)).all():
            raise FileError(f"{where}: numbers outside 0..255, expected the bytes of a text")
        rows = [bytes(row[row != 0].astype(np.uint8)) for row in codes]
    decoded: dict[bytes, str] = {}
    for number, row in enumerate(rows):
        if row not in decoded:
            try:
                decoded[row] = row.decode("utf-8")
            except UnicodeDecodeError:
                raise FileError(f"{where}: the text {row[:40]!r} of step {number} is not UTF-8") from None
    return [decoded[row] for row in rows]


def unpacked(item: memoryview, feature: Feature, where: str) -> bytes:
    """The bytes of one step of a tensor with encoding bytes or zlib, of exactly the declared size."""
    dtype = np.dtype(feature.dtype)
    expected = feature.size * dtype.itemsize
    if expected > _MAX_STEP_BYTES:
        raise FileError(f"{where}: {expected} bytes a step, expected at most {_MAX_STEP_BYTES}")
    data = bytes(item)
    if feature.encoding == "zlib":
        try:
            data = zlib.decompressobj().decompress(data, expected + 1)
        except zlib.error:
            raise FileError(f"{where}: no valid zlib data") from None
    if len(data) != expected:
        raise FileError(f"{where}: {len(data)} bytes, expected {expected}")
    return data


def vectors(data: memoryview, feature: Feature, where: str) -> NDArray[Any]:
    """(n, size) numbers of a numeric tensor, each step's axes flattened in row-major order.

    Raises:
        FileError: damaged, or no multiple of the declared size.
    """
    if feature.encoding in ("bytes", "zlib"):
        rows = [unpacked(item, feature, f"{where}, step {step}") for step, item in enumerate(byte_strings(data, where))]
        dtype = np.dtype(feature.dtype).newbyteorder("<")
        return np.frombuffer(b"".join(rows), dtype=dtype).reshape(len(rows), feature.size)
    values = numbers(data, where)
    if len(values) % feature.size:
        raise FileError(f"{where}: {len(values)} numbers, expected a multiple of {feature.size} ({feature})")
    return values.reshape(-1, feature.size)
