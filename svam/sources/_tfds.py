"""What TFDS writes beside its records, `dataset_info.json` (splits, shards) and `features.json` (names, shapes, encodings), and
the values of a record that these describe.

Whatever is missing, damaged or of another form is a `FileError`.
"""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, AliasPath, BaseModel, Field

from svam.errors import ParamsError
from svam.files import FileError, read_json, stated
from svam.sources._choice import contents, existing_folder
from svam.sources._tfrecord import byte_strings, features_of, numbers

_NUMERIC = {
    "bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
}  # fmt: skip
_STRINGS = {"string", "object", "object_", "str", "bytes"}
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
"""Names of shards where nothing else is said."""
_PLACEHOLDERS = ("DATASET", "SPLIT", "FILEFORMAT", "SHARD_INDEX", "NUM_SHARDS", "SHARD_X_OF_Y")


@dataclass(frozen=True)
class Feature:
    """One leaf of `features.json`. shape: without the axis of the steps, None where a size is not fixed. encoding: of a
    tensor "none", "bytes" or "zlib", of an image "jpeg", "png" or ""."""

    kind: str
    """tensor, image, "several images" (a video, or images of one step), text or other."""
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
        known = self.dtype in _NUMERIC and self.encoding in ("", "none", "bytes", "zlib")
        return math.prod(n or 0 for n in self.shape) if self.kind == "tensor" and known else 0

    @property
    def colour(self) -> bool:
        """Whether a step is an 8-bit picture in colour; in a tensor, of fixed shape, the channels may come first."""
        if self.dtype != "uint8" or len(self.shape) != 3 or (self.kind == "tensor" and not self.size):
            return False
        first, last = self.shape[0] if self.size else 0, self.shape[2]
        return first in (3, 4) or last in (3, 4) or (self.kind == "image" and last is None)

    @property
    def grey(self) -> bool:
        """The same of one channel, which may be depth as well."""
        return self.dtype == "uint8" and self.shape[2:] == (1,) and (self.kind == "image" or self.size > 0)

    def __str__(self) -> str:
        sizes = ", ".join("?" if n is None else str(n) for n in self.shape)
        return f"{self.kind} {self.dtype} ({sizes})" if self.kind in ("tensor", "image") else self.kind


@dataclass(frozen=True)
class Shard:
    """One record file: its split and number of records."""

    split: str
    file: Path
    records: int


class _Split(BaseModel):
    name: str
    shardLengths: list[Annotated[int, Field(ge=0)]]
    filepathTemplate: str = _TEMPLATE


class DatasetInfo(BaseModel):
    """What is read of `dataset_info.json`."""

    name: Annotated[str, Field(min_length=1)]
    version: str = ""
    fileFormat: str = "tfrecord"
    splits: Annotated[list[_Split], Field(min_length=1)]

    @staticmethod
    def unknown(split: _Split) -> list[str]:
        """Placeholders of a split's template that TFDS does not have; the usual template is tried instead."""
        return [name for name in re.findall("{([^{}]*)}", split.filepathTemplate) if name not in _PLACEHOLDERS]

    def shards(self, split: _Split, file: Path) -> list[Shard]:
        """Of a split; `file` is the one that was read."""
        count, template = len(split.shardLengths), _TEMPLATE if self.unknown(split) else split.filepathTemplate
        shards: list[Shard] = []
        for number, records in enumerate(split.shardLengths):
            index = f"{number:05d}", f"{count:05d}"
            name, values = template, (self.name, split.name, self.fileFormat, *index, "-of-".join(index))
            for key, value in zip(_PLACEHOLDERS, values, strict=True):
                name = name.replace(f"{{{key}}}", value)
            if set("{/\\\0") & set(name) or name in ("", ".", "..", *(shard.file.name for shard in shards)):
                raise FileError(
                    f"{file}: filepathTemplate {template!r} gives {name!r}, expected another file in this folder for each shard"
                )
            shards.append(Shard(split.name, file.with_name(name), records))
        return shards


class _Array(BaseModel):
    """A tensor, or (with `encodingFormat`) an image; -1 in its shape is a size that varies."""

    shape: list[int] = Field([], validation_alias=AliasPath("shape", "dimensions"))
    dtype: str = ""
    encoding: str = "none"
    encodingFormat: str = ""

    @property
    def sizes(self) -> tuple[int | None, ...]:
        return tuple(size if size >= 0 else None for size in self.shape)


class _Node(BaseModel):
    """A feature: one of these, or of a kind that is not read."""

    features: dict[str, _Node] | None = Field(None, validation_alias=AliasPath("featuresDict", "features"))
    sequence: _Node | None = Field(
        None, validation_alias=AliasChoices(AliasPath("sequence", "feature"), AliasPath("dataset", "feature"))
    )
    text: dict[str, Any] | None = None
    image: _Array | None = None
    video: dict[str, Any] | None = None
    tensor: _Array | None = None

    def leaves(self, name: str = "") -> Iterator[tuple[str, Feature]]:
        """Flattened. Only the sequence `steps` is entered: others have no fixed length a step."""
        if self.features is not None:
            for key, child in self.features.items():
                yield from child.leaves(f"{name}/{key}" if name else key)
        elif name == "steps" and self.sequence:
            yield from self.sequence.leaves(name)
        elif self.text is not None:
            yield name, Feature("text")
        elif image := self.image:
            sizes = image.sizes or (None, None, None)
            yield name, Feature("image", sizes, image.dtype or "uint8", image.encodingFormat.lower())
        elif tensor := self.tensor:
            text = "text" if tensor.sizes in ((), (1,)) else "other"
            kind = text if tensor.dtype in _STRINGS else "tensor"
            yield name, Feature(kind, tensor.sizes, tensor.dtype, tensor.encoding.lower())
        elif self.video is not None or (self.sequence and self.sequence.image):
            yield name, Feature("several images")
        else:
            yield name, Feature("other")


def find_version(path: Path, version: str) -> Path:
    """The folder that holds `dataset_info.json`: `path`, or the only one at most three levels below, or what `version` names; a
    `ParamsError` where that is not one."""
    if (existing_folder(path) / "dataset_info.json").is_file() and not version:
        return path
    files = sorted(file for depth in range(4) for file in path.glob("*/" * depth + "dataset_info.json") if file.is_file())
    if not files:
        raise FileError(
            f"{path}: no dataset_info.json in it or up to three folders below, expected a TFDS folder such as 1.0.0; it has "
            f"{contents(path)}"
        )
    chosen = [file.parent for file in files if not version or f"/{file.parent.as_posix()}".endswith(f"/{version}")]
    if len(chosen) != 1:
        names = ", ".join(file.parent.relative_to(path).as_posix() for file in files)
        fits = f"convert.options.version is {version!r}, which fits {len(chosen)}, expected one"
        which = fits if version else "say which by convert.options.version"
        raise ParamsError(f"{path}: {len(files)} data sets ({names}); {which}")
    return chosen[0]


def read_dataset_info(folder: Path) -> tuple[DatasetInfo, dict[str, list[Shard]], list[str]]:
    """(`dataset_info.json`, split -> its shards, notes on templates that are not followed)."""
    file = folder / "dataset_info.json"
    info = stated(DatasetInfo, read_json(file), file)
    if info.fileFormat != "tfrecord":
        raise FileError(
            f"{file}: fileFormat is {info.fileFormat!r}, expected 'tfrecord', which is TFDS's own default; build the data set "
            "again without file_format, or read it with TFDS and bring it as `raw` (svam/sources/README.md)"
        )
    splits = {split.name: info.shards(split, file) for split in info.splits}
    if len(splits) != len(info.splits):
        raise FileError(f"{file}: two splits have one name")
    notes = [
        f"{file}: filepathTemplate of split {split.name!r} has {{{unknown[0]}}}, which TFDS does not know; its usual names are "
        "tried"
        for split in info.splits if (unknown := info.unknown(split))
    ]  # fmt: skip
    return info, splits, notes


def read_features(folder: Path) -> dict[str, Feature]:
    """Flattened name (`steps/observation/image_0`) -> feature, of `features.json`, in its order."""
    file = folder / "features.json"
    root = stated(_Node, read_json(file), file)
    if root.features is None:
        raise FileError(
            f"{file}: no featuresDict.features, so in the form of early TFDS versions or none; write it with a newer TFDS"
        )
    features = dict(root.leaves())
    if not any(name.startswith("steps/") for name in features):
        raise FileError(
            f"{file}: no features under 'steps', so this is no RLDS data set; it has {', '.join(features)[:200] or 'none'}"
        )
    return features


class Record:
    """The values of one record by the names of `features`; `counter`: that under `steps/` whose length is the number of steps.
    `size`: bytes of all under `steps/`."""

    def __init__(self, payload: memoryview, features: Mapping[str, Feature], counter: str, where: str) -> None:
        """`where` begins every message."""
        self.where, self._features, self._counter = where, features, counter
        self._data = features_of(payload, where)
        self.steps = len(self._stored(counter))
        self.size = sum(len(values) for name, values in self._data.items() if name.startswith("steps/"))

    def need(self, *names: str) -> None:
        """`FileError` where the record lacks one of some features."""
        if absent := [name for name in names if name not in self._data]:
            raise FileError(f"{self.where}: feature {absent[0]!r} is missing, though features.json lists it")

    def __contains__(self, name: str) -> bool:
        """Whether the record has a feature; TFDS leaves out an optional one without a value."""
        return name in self._data

    def _stored(self, name: str) -> Any:
        """(n, size) numbers, or n strings of bytes: each a text, an encoded picture or a packed tensor."""
        self.need(name)
        feature, where = self._features[name], f"{self.where}: {name}"
        if feature.packed or not feature.size:
            return byte_strings(self._data[name], where)
        values = numbers(self._data[name], where)
        if len(values) % feature.size:
            raise FileError(f"{where}: {len(values)} numbers, expected a multiple of {feature.size} ({feature})")
        return values.reshape(-1, feature.size)

    def rows(self, name: str) -> Any:
        """The same, one for each step; of a feature that is not under `steps/`, one."""
        rows, of_steps = self._stored(name), name.startswith("steps/")
        if len(rows) != (self.steps if of_steps else 1):
            expected = f"{self.steps} as {self._counter} has" if of_steps else "1"
            raise FileError(f"{self.where}: {name} has {len(rows)} rows, expected {expected}")
        return rows

    def vectors(self, name: str) -> NDArray[Any]:
        """(n, size) numbers of a numeric tensor, each step's axes flattened in row-major order."""
        rows, feature = self.rows(name), self._features[name]
        if not feature.packed:
            return np.asarray(rows, np.uint64 if feature.dtype == "uint64" else None)  # which are stored as int64
        data = b"".join(_unpacked(row, feature, f"{self.where}: {name}, step {step}") for step, row in enumerate(rows))
        return np.frombuffer(data, np.dtype(feature.dtype).newbyteorder("<")).reshape(len(rows), feature.size)

    def texts(self, name: str) -> list[str]:
        """The strings of a text feature, or of rows of UTF-8 bytes padded with zeros (an integer tensor)."""
        if self._features[name].kind == "text":
            rows = [bytes(row).rstrip(b"\0") for row in self.rows(name)]
        else:
            codes = self.vectors(name)
            if not np.isin(codes, np.arange(256)).all():
                raise FileError(f"{self.where}: {name}: numbers outside 0..255, expected the bytes of a text")
            rows = [bytes(row[row != 0].astype(np.uint8)) for row in codes]
        try:
            return [row.decode("utf-8") for row in rows]
        except UnicodeDecodeError as error:
            text, step = error.object[:40], rows.index(error.object)
            raise FileError(f"{self.where}: {name}: the text {text!r} of step {step} is not UTF-8") from None

    def digest(self) -> bytes:
        """SHA-256 of all under `steps/`, by name: a record's own order is arbitrary."""
        digest = hashlib.sha256()
        for name, values in sorted(self._data.items()):
            if name.startswith("steps/"):
                digest.update(f"{name}\0{len(values)}\0".encode())
                digest.update(values)
        return digest.digest()


def _unpacked(row: memoryview, feature: Feature, where: str) -> bytes:
    """The bytes of one step of a packed tensor, of exactly the declared size."""
    expected = feature.size * np.dtype(feature.dtype).itemsize
    data = bytes(row)
    if feature.encoding == "zlib":
        try:
            data = zlib.decompressobj().decompress(data, expected + 1)
        except (zlib.error, OverflowError):
            raise FileError(f"{where}: no valid zlib data of {expected} bytes") from None
    if len(data) != expected:
        raise FileError(f"{where}: {len(data)} bytes, expected {expected}")
    return data
