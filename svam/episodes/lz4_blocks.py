"""LZ4 blocks with a dictionary, decompressed to where their bytes are wanted.

The lz4 package makes a new bytes object of every block, which has to be copied to its place then. The C function of LZ4 itself,
which its extension exports, writes there at once; a clip of 256 px is read in a fifth less time with it. Where an extension
hides its C functions, as on Windows, blocks go through the package's own function: the same bytes, more slowly.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from lz4 import block as lz4_block
from lz4.block import _block

REACH = 65535
"""How far back, in bytes, a block may refer to its dictionary or itself."""

DecompressTo = Callable[[int, int, int, int, int, int], int]
"""Decompresses a block of which address, target's address, its bytes, the target's bytes, dictionary's address, its bytes
are given. Returns the bytes it made, or a negative number where the block is damaged or larger than its target; it never reads
or writes outside what it was given."""


def compress(data: bytes, dictionary: bytes, level: int) -> bytes:
    """One block, by LZ4's high compression at `level` (3 to 12); an empty dictionary is none."""
    options = {"dict": dictionary} if dictionary else {}
    block: bytes = lz4_block.compress(data, mode="high_compression", compression=level, store_size=False, **options)
    return block


def decompress_through_bytes(source: int, target: int, size: int, room: int, dictionary: int, dictionary_size: int) -> int:
    """`DecompressTo` by the lz4 package's Python function."""
    options = {"dict": ctypes.string_at(dictionary, dictionary_size)} if dictionary_size else {}
    try:
        found: bytes = lz4_block.decompress(ctypes.string_at(source, size), uncompressed_size=room, **options)
    except lz4_block.LZ4BlockError:
        return -1
    ctypes.memmove(target, found, len(found))
    return len(found)


def _exported() -> DecompressTo | None:
    try:
        function = ctypes.CDLL(_block.__file__).LZ4_decompress_safe_usingDict
    except (AttributeError, OSError):
        return None
    function.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_int] * 2, ctypes.c_void_p, ctypes.c_int]
    function.restype = ctypes.c_int
    found: DecompressTo = function
    return found


decompress_to: DecompressTo = _exported() or decompress_through_bytes
