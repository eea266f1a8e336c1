"""The keyed codec (`svam.episodes.keyed`) as zarr itself calls it, which finds it by the package's entry point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON, parse_named_configuration

from svam.episodes import keyed


@dataclass(frozen=True)
class KeyedLz4(ArrayBytesCodec):
    """Whole chunks of pictures (k, H, W, C) uint8; see `svam.episodes.keyed` for their bytes."""

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """From its entry in `zarr.json`, which has a name alone."""
        parse_named_configuration(data, keyed.CODEC, require_configuration=False)
        return cls()

    def to_dict(self) -> dict[str, JSON]:
        """Its entry in `zarr.json`."""
        return {"name": keyed.CODEC}

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        out = np.empty(chunk_spec.shape, np.uint8)
        keyed.decode(chunk_data.as_numpy_array(), out)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(out)

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        return chunk_spec.prototype.buffer.from_bytes(keyed.encode(chunk_data.as_numpy_array()))

    def compute_encoded_size(self, _input_byte_length: int, _chunk_spec: ArraySpec) -> int:
        """Not known before encoding."""
        raise NotImplementedError
