"""Sharded Zarr v3 arrays, written through zarr with codecs that every Zarr v3 reader has; and groups of them.

Each chunk carries a CRC-32C. Each array's attribute `shard_bytes` states the sizes of its files, since zarr itself reads a
missing one as zeros. `svam.episodes.rows` reads arrays; `svam.episodes.shards` writes them from several processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numcodecs import blosc
from numpy.typing import DTypeLike, NDArray

from svam.episodes.lossy import LOSSY, picture_codec
from svam.files import FileError, read_json, sha256, write_json

if TYPE_CHECKING:
    import zarr

ATTRIBUTES_DIGEST = "attributes_sha256"
SHARD_BYTES = "shard_bytes"
ARRAYS = "arrays_sha256"
ZSTD_LEVEL = 1
"""Of 256-pixel camera frames level 3 takes twice the time for a sixth fewer bytes."""

# Several threads of Blosc write a chunk's blocks in the order in which they get ready, which differs from run to run.
blosc.use_threads = False


def attributes_digest(attributes: Mapping[str, Any]) -> str:
    """SHA-256 of a group's attributes as sorted JSON, which `write_groups` keeps among them: nothing else covers them."""
    stated = {key: value for key, value in attributes.items() if key != ATTRIBUTES_DIGEST}
    return hashlib.sha256(json.dumps(stated, sort_keys=True, allow_nan=False).encode()).hexdigest()


def codecs_for(compression: str = "zstd") -> list[Any]:
    """What compresses a chunk: `zstd`, `lz4` or `blosc` (Blosc's Zstd, bytes by bit planes); and its checksum."""
    from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

    if compression == "zstd":
        return [ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()]
    if compression == "lz4":
        return [BloscCodec(cname="lz4", clevel=5, shuffle="noshuffle", typesize=1), Crc32cCodec()]
    return [BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"), Crc32cCodec()]


def create_array(
    path: Path, shape: tuple[int, ...], dtype: DTypeLike, chunk_rows: int, shard_rows: int, compression: str = "zstd",
    quality: int = 0,
) -> zarr.Array[Any]:  # fmt: skip
    """An empty array (n, ...), chunks and shards of whole rows. quality: of `svam.episodes.lossy.LOSSY` pictures alone."""
    import zarr
    from zarr.codecs import Crc32cCodec

    codecs: dict[str, Any] = {"compressors": codecs_for(compression)}
    if compression in LOSSY:
        codecs = {"serializer": picture_codec(compression, quality), "compressors": [Crc32cCodec()]}
    return zarr.create_array(
        path, shape=shape, dtype=dtype, zarr_format=3, fill_value=0, chunks=(chunk_rows, *shape[1:]),
        shards=(shard_rows, *shape[1:]), filters=None, **codecs,
        config={"write_empty_chunks": True},  # so that a missing chunk is always a fault
    )  # fmt: skip


def shard_file(path: Path, shard: int, axes: int) -> Path:
    """Where a shard of an array of so many axes is (Zarr's default name)."""
    return path.joinpath("c", str(shard), *["0"] * (axes - 1))


def state_sizes(array: zarr.Array[Any], path: Path) -> None:
    """Write the sizes of the files of a finished array into its attributes."""
    assert array.shards is not None
    files = [shard_file(path, shard, len(array.shape)) for shard in range(-(-array.shape[0] // array.shards[0]))]
    array.update_attributes({SHARD_BYTES: [file.stat().st_size for file in files]})


def write_array(path: Path, values: NDArray[Any], chunk_rows: int = 1024, shard_rows: int = 65536) -> None:
    """A whole small array (n, ...)."""
    array = create_array(path, values.shape, values.dtype, chunk_rows, shard_rows)
    array[...] = values
    state_sizes(array, path)


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"attributes": attributes, "node_type": "group", "zarr_format": 3}


def write_groups(path: Path, arrays: Collection[str], attributes: Mapping[str, Any]) -> None:
    """The metadata of the group at `path`, among them the SHA-256 of the metadata of the finished `arrays`; and of the groups
    below it that hold these ("frames/front" is in "frames")."""
    attributes = {**attributes, ARRAYS: {name: sha256(path / name / "zarr.json") for name in arrays}}
    for folder in {Path(), *(parent for name in arrays for parent in Path(name).parents)}:
        stated = {**attributes, ATTRIBUTES_DIGEST: attributes_digest(attributes)} if folder == Path() else {}
        write_json(path / folder / "zarr.json", _group(stated))


def read_attributes(path: Path) -> dict[str, Any]:
    """The attributes of the Zarr v3 group at `path`, which `write_groups` wrote.

    Raises:
        FileError: it is missing, or no Zarr v3 group, or its attributes are not those that were written.
    """
    path = Path(path)
    if not path.exists():
        raise FileError(f"{path}: no such directory")
    if not (path / "zarr.json").is_file():
        raise FileError(f"{path}: not a Zarr v3 group (it has no zarr.json)")
    metadata = read_json(path / "zarr.json")
    if not isinstance(metadata, dict) or metadata.get("node_type") != "group" or metadata.get("zarr_format") != 3:
        raise FileError(f"{path / 'zarr.json'}: not the metadata of a Zarr v3 group")
    attributes = dict(metadata.get("attributes", {}))
    try:
        same = attributes.pop(ATTRIBUTES_DIGEST, None) == attributes_digest(attributes)
    except ValueError:  # NaN, which no writer of ours leaves
        same = False
    if attributes and not same:
        raise FileError(f"{path / 'zarr.json'}: its attributes are damaged or were edited; run the stage that writes it again")
    for name, digest in attributes.get(ARRAYS, {}).items():
        for parent in Path(name).parents[:-1]:
            if read_json(path / parent / "zarr.json") != _group({}):
                raise FileError(f"{path / parent / 'zarr.json'}: not the metadata of a Zarr v3 group")
        file = path / name / "zarr.json"
        if not file.is_file():
            raise FileError(f"{path / name}: no such array")
        if sha256(file) != digest:
            raise FileError(f"{file}: damaged or edited; run the stage that writes it again")
    return attributes
