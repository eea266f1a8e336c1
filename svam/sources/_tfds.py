"""What TFDS writes beside its records: `dataset_info.json` (splits, shards) and `features.json` (names, shapes, encodings)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from svam.errors import ParamsError, describe
from svam.files import FileError, read_json
from svam.sources._tfrecord import byte_strings, numbers

_NUMERIC = {
    "bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
}  # fmt: skip
_STRINGS = {"string", "object", "object_", "str", "bytes"}
_MAX_STEP_BYTES = 2**28
_MAX_DEPTH = 100


@dataclass(frozen=True)
class Feature:
    """One leaf of `features.json`. shape: without the axis of the steps, None where a size is not fixed. encoding: of a
    tensor "none", "bytes" or "zlib", of an image "jpeg", "png" or ""."""

    kind: Literal["tensor", "image", "text", "other"]
    shape: tuple[int | None, ...] = ()
    dtype: str = ""
    encoding: str = ""

    @property
    def packed(self) -> bool:
        """Whether a step is a string of bytes instead of numbers."""
        return self.encoding in ("bytes", "zlib")

    @property
    def size(self) -> int:
        """Numbers per step of a numeric tensor of fixed shape and a known encoding; 0 for everything else."""
        known = self.packed or self.encoding in ("none", "")
        if self.kind != "tensor" or self.dtype not in _NUMERIC or not known or None in self.shape:
            return 0
        return math.prod(n for n in self.shape if n is not None)

    @property
    def colour(self) -> bool:
        """Whether a step is an 8-bit picture in colour; in a tensor the channels may come first."""
        if self.dtype != "uint8" or len(self.shape) != 3:
            return False
        first, last = self.shape[0] if self.size else 0, self.shape[2]
        return first in (3, 4) or last in (3, 4) or (self.kind == "image" and last is None)

    def __str__(self) -> str:
        sizes = ", ".join("?" if n is None else str(n) for n in self.shape)
        return f"{self.kind} {self.dtype} ({sizes})" if self.kind in ("tensor", "image") else self.kind


@dataclass(frozen=True)
class Shard:
    """One record file: its split, name and number of records."""

    split: str
    name: str
    records: int


class _Split(BaseModel):
    name: str
    shardLengths: list[Annotated[int, Field(ge=0)]]
    filepathTemplate: str = ""


class DatasetInfo(BaseModel):
    """What is read of `dataset_info.json`."""

    name: Annotated[str, Field(min_length=1)]
    version: str = ""
    fileFormat: str = "tfrecord"
    splits: Annotated[list[_Split], Field(min_length=1)]

    def shards(self, split: _Split, file: Path) -> list[Shard]:
        """Of a split."""
        count, shards = len(split.shardLengths), []
        template = split.filepathTemplate or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        for number, records in enumerate(split.shardLengths):
            values = {
                "DATASET": self.name, "SPLIT": split.name, "FILEFORMAT": self.fileFormat, "SHARD_INDEX": f"{number:05d}",
                "NUM_SHARDS": f"{count:05d}", "SHARD_X_OF_Y": f"{number:05d}-of-{count:05d}",
            }  # fmt: skip
            name = template
            for key, value in values.items():
                name = name.replace("{" + key + "}", value)
            if any(sign in name for sign in "{/\\\0") or name in ("", ".", ".."):
                raise FileError(
                    f"{file}: filepathTemplate {template!r} gives {name!r}, expected the name of a file in this folder"
                )
            shards.append(Shard(split.name, name, records))
        if len({shard.name for shard in shards}) != count:
            raise FileError(f"{file}: filepathTemplate {template!r} gives several shards one name")
        return shards


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
    files = sorted(file for depth in range(4) for file in path.glob("*/" * depth + "dataset_info.json") if file.is_file())
    names = {file.parent: file.parent.relative_to(path).as_posix() for file in files}
    if not names:
        raise FileError(
            f"{path}: no dataset_info.json in it or up to three folders below; expected a TFDS folder such as 1.0.0"
        )
    chosen = [
        folder for folder, name in names.items() if f"/{path.name}/{name}".removesuffix("/.").endswith(f"/{version}")
    ] if version else list(names)  # fmt: skip
    if len(chosen) != 1:
        which = f"convert.options.version is {version!r}, which fits {len(chosen)}"
        raise ParamsError(
            f"{path}: {len(names)} data sets ({', '.join(names.values())}); "
            f"{which if version else 'say which by convert.options.version'}, expected one"
        )
    return chosen[0]


def _json(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise FileError(f"{file}: {type(value).__name__}, expected an object")
    return value


def read_dataset_info(folder: Path) -> tuple[DatasetInfo, dict[str, list[Shard]]]:
    """(`dataset_info.json`, split -> its shards).

    Raises:
        FileError: it is missing, damaged, of another file format than tfrecord, or names files outside its folder.
    """
    file = folder / "dataset_info.json"
    try:
        info = DatasetInfo.model_validate(_json(file))
    except ValidationError as error:
        raise FileError(describe(error, file).splitlines()[0]) from None
    if info.fileFormat != "tfrecord":
        raise FileError(
            f"{file}: fileFormat is {info.fileFormat!r}, expected 'tfrecord'; TFDS writes that with `tfds convert_format`"
        )
    splits = {split.name: info.shards(split, file) for split in info.splits}
    if len(splits) != len(info.splits):
        raise FileError(f"{file}: two splits have one name")
    return info, splits


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
    features = dict(_leaves(root, "", file, 0))
    if not any(name.startswith("steps/") for name in features):
        raise FileError(
            f"{file}: no features under 'steps', so this is no RLDS data set; it has {', '.join(features)[:200] or 'none'}"
        )
    return features


def _leaves(node: Any, name: str, file: Path, depth: int) -> Iterator[tuple[str, Feature]]:
    """The leaves below a node of `features.json`. Only the sequence `steps` is entered: others have no fixed length a step."""

    def entry(value: Any, key: str, kind: type = dict) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get(key), kind):
            raise FileError(f"{file}: feature {name!r} lacks {key}, or it is of the wrong type")
        return value[key]

    if not isinstance(node, dict) or depth > _MAX_DEPTH:
        raise FileError(f"{file}: feature {name!r} is {type(node).__name__}, expected an object, not nested too deeply")
    sequence = node.get("sequence", node.get("dataset"))
    if "featuresDict" in node:
        for key, child in entry(node["featuresDict"], "features").items():
            yield from _leaves(child, f"{name}/{key}" if name else key, file, depth + 1)
    elif sequence is not None and name == "steps":
        yield from _leaves(entry(sequence, "feature"), name, file, depth + 1)
    elif "text" in node:
        yield name, Feature("text")
    elif "image" in node:
        image = entry(node, "image")
        encoding = str(image.get("encodingFormat", "")).lower()
        yield (
            name,
            Feature("image", _shape(image, file, name) or (None, None, None), str(image.get("dtype", "uint8")), encoding),
        )
    elif "tensor" in node:
        tensor = entry(node, "tensor")
        shape, dtype = _shape(tensor, file, name), entry(tensor, "dtype", str)
        if dtype in _STRINGS:
            yield name, Feature("text" if shape in ((), (1,)) else "other", shape, dtype)
        else:
            yield name, Feature("tensor", shape, dtype, str(tensor.get("encoding", "none")).lower())
    else:
        yield name, Feature("other")


def _shape(content: dict[str, Any], file: Path, name: str) -> tuple[int | None, ...]:
    """Sizes as protobuf's JSON has them: "25" or 25, "-1" where one varies."""
    shape = content.get("shape") or {}
    sizes = shape.get("dimensions", []) if isinstance(shape, dict) else shape
    try:
        numbers = [-1 if size is None else int(size) for size in sizes]
    except (TypeError, ValueError):
        raise FileError(f"{file}: feature {name!r}: shape is {shape!r}, expected whole numbers") from None
    return tuple(number if number >= 0 else None for number in numbers)


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
    """The bytes of one step of a packed tensor, of exactly the declared size."""
    expected = feature.size * np.dtype(feature.dtype).itemsize
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
    if feature.packed:
        rows = [unpacked(item, feature, f"{where}, step {step}") for step, item in enumerate(byte_strings(data, where))]
        dtype = np.dtype(feature.dtype).newbyteorder("<")
        return np.frombuffer(b"".join(rows), dtype=dtype).reshape(len(rows), feature.size)
    values = numbers(data, where)
    if len(values) % feature.size:
        raise FileError(f"{where}: {len(values)} numbers, expected a multiple of {feature.size} ({feature})")
    return values.reshape(-1, feature.size)
