"""What TFDS writes beside its records: `dataset_info.json` (splits, shards) and `features.json` (names, shapes, encodings).

Whatever is missing, damaged or of another form is a `FileError`.
"""

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


@dataclass(frozen=True)
class Feature:
    """One leaf of `features.json`. shape: without the axis of the steps, None where a size is not fixed. encoding: of a
    tensor "none", "bytes" or "zlib", of an image "jpeg", "png" or ""."""

    kind: str
    """tensor, image, text or other."""
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
        numeric = self.kind == "tensor" and self.dtype in _NUMERIC and known and None not in self.shape
        return math.prod(n or 0 for n in self.shape) if numeric else 0

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
    filepathTemplate: str = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


class DatasetInfo(BaseModel):
    """What is read of `dataset_info.json`."""

    name: Annotated[str, Field(min_length=1)]
    version: str = ""
    fileFormat: str = "tfrecord"
    splits: Annotated[list[_Split], Field(min_length=1)]

    def shards(self, split: _Split, file: Path) -> list[Shard]:
        """Of a split."""
        count, template = len(split.shardLengths), split.filepathTemplate
        shards: list[Shard] = []
        for number, records in enumerate(split.shardLengths):
            values = {
                "DATASET": self.name, "SPLIT": split.name, "FILEFORMAT": self.fileFormat, "SHARD_INDEX": f"{number:05d}",
                "NUM_SHARDS": f"{count:05d}", "SHARD_X_OF_Y": f"{number:05d}-of-{count:05d}",
            }  # fmt: skip
            name = template
            for key, value in values.items():
                name = name.replace(f"{{{key}}}", value)
            if set("{/\\\0") & set(name) or name in ("", ".", "..", *(shard.name for shard in shards)):
                raise FileError(
                    f"{file}: filepathTemplate {template!r} gives {name!r}, expected another file in this folder for each shard"
                )
            shards.append(Shard(split.name, name, records))
        return shards


class _Array(BaseModel):
    """A tensor, or (with `encodingFormat`) an image; -1 in its shape is a size that varies."""

    shape: dict[Literal["dimensions"], list[int]] = {}
    dtype: str = ""
    encoding: str = "none"
    encodingFormat: str = ""

    @property
    def sizes(self) -> tuple[int | None, ...]:
        return tuple(size if size >= 0 else None for size in self.shape.get("dimensions", []))


class _Sequence(BaseModel):
    feature: _Node


class _FeaturesDict(BaseModel):
    features: dict[str, _Node]


class _Node(BaseModel):
    """A feature: one of these, or of a kind that is not read."""

    featuresDict: _FeaturesDict | None = None
    sequence: _Sequence | None = None
    dataset: _Sequence | None = None
    text: dict[str, Any] | None = None
    image: _Array | None = None
    tensor: _Array | None = None

    def leaves(self, name: str = "") -> Iterator[tuple[str, Feature]]:
        """Flattened. Only the sequence `steps` is entered: others have no fixed length a step."""
        if self.featuresDict:
            for key, child in self.featuresDict.features.items():
                yield from child.leaves(f"{name}/{key}" if name else key)
        elif name == "steps" and (sequence := self.sequence or self.dataset):
            yield from sequence.feature.leaves(name)
        elif self.text is not None:
            yield name, Feature("text")
        elif image := self.image:
            sizes = image.sizes or (None, None, None)
            yield name, Feature("image", sizes, image.dtype or "uint8", image.encodingFormat.lower())
        elif tensor := self.tensor:
            text = "text" if tensor.sizes in ((), (1,)) else "other"
            kind = text if tensor.dtype in _STRINGS else "tensor"
            yield name, Feature(kind, tensor.sizes, tensor.dtype, tensor.encoding.lower())
        else:
            yield name, Feature("other")


def find_version(path: Path, version: str) -> Path:
    """The folder that holds `dataset_info.json`: `path`, or the only one at most three levels below, or what `version` names; a
    `ParamsError` where that is not one."""
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
    end = f"/{version}" if version else ""
    chosen = [folder for folder, name in names.items() if f"/{path.name}/{name}".removesuffix("/.").endswith(end)]
    if len(chosen) != 1:
        fits = f"convert.options.version is {version!r}, which fits {len(chosen)}, expected one"
        which = fits if version else "say which by convert.options.version"
        raise ParamsError(f"{path}: {len(names)} data sets ({', '.join(names.values())}); {which}")
    return chosen[0]


def _read(file: Path, model: type[BaseModel]) -> Any:
    try:
        return model.model_validate(read_json(file))
    except ValidationError as error:
        raise FileError(describe(error, file).splitlines()[0]) from None


def read_dataset_info(folder: Path) -> tuple[DatasetInfo, dict[str, list[Shard]]]:
    """(`dataset_info.json`, split -> its shards)."""
    file = folder / "dataset_info.json"
    info: DatasetInfo = _read(file, DatasetInfo)
    if info.fileFormat != "tfrecord":
        raise FileError(
            f"{file}: fileFormat is {info.fileFormat!r}, expected 'tfrecord'; TFDS writes that with `tfds convert_format`"
        )
    splits = {split.name: info.shards(split, file) for split in info.splits}
    if len(splits) != len(info.splits):
        raise FileError(f"{file}: two splits have one name")
    return info, splits


def read_features(folder: Path) -> dict[str, Feature]:
    """Flattened name (`steps/observation/image_0`) -> feature, of `features.json`, in its order."""
    file = folder / "features.json"
    root: _Node = _read(file, _Node)
    if root.featuresDict is None:
        raise FileError(f"{file}: no featuresDict, so in the form of early TFDS versions or none; write it with a newer TFDS")
    features = dict(root.leaves())
    if not any(name.startswith("steps/") for name in features):
        raise FileError(
            f"{file}: no features under 'steps', so this is no RLDS data set; it has {', '.join(features)[:200] or 'none'}"
        )
    return features


def texts(data: memoryview, feature: Feature, where: str) -> list[str]:
    """One string a step: of a text feature, or of rows of UTF-8 bytes padded with zeros (an integer tensor)."""
    if feature.kind == "text":
        rows = [bytes(row) for row in byte_strings(data, where)]
    else:
        codes = vectors(data, feature, where)
        if not np.isin(codes, np.arange(256)).all():
            raise FileError(f"{where}: numbers outside 0..255, expected the bytes of a text")
        rows = [bytes(row[row != 0].astype(np.uint8)) for row in codes]
    try:
        return [row.decode("utf-8") for row in rows]
    except UnicodeDecodeError as error:
        raise FileError(f"{where}: the text {error.object[:40]!r} of step {rows.index(error.object)} is not UTF-8") from None


def _unpacked(item: memoryview, feature: Feature, where: str) -> bytes:
    """The bytes of one step of a packed tensor, of exactly the declared size."""
    expected = feature.size * np.dtype(feature.dtype).itemsize
    data = bytes(item)
    if feature.encoding == "zlib":
        try:
            data = zlib.decompressobj().decompress(data, expected + 1)
        except (zlib.error, OverflowError):
            raise FileError(f"{where}: no valid zlib data of {expected} bytes") from None
    if len(data) != expected:
        raise FileError(f"{where}: {len(data)} bytes, expected {expected}")
    return data


def vectors(data: memoryview, feature: Feature, where: str) -> NDArray[Any]:
    """(n, size) numbers of a numeric tensor, each step's axes flattened in row-major order."""
    if feature.packed:
        rows = [_unpacked(item, feature, f"{where}, step {step}") for step, item in enumerate(byte_strings(data, where))]
        dtype = np.dtype(feature.dtype).newbyteorder("<")
        return np.frombuffer(b"".join(rows), dtype=dtype).reshape(len(rows), feature.size)
    values = numbers(data, where)
    if len(values) % feature.size:
        raise FileError(f"{where}: {len(values)} numbers, expected a multiple of {feature.size} ({feature})")
    return values.reshape(-1, feature.size)
