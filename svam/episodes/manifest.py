"""What a large data set consists of, by names and sizes: a small file to depend on instead of every byte."""

from __future__ import annotations

import os
from pathlib import Path

from svam.files import FileError, write_json

MANIFEST_SCHEMA = 1


def write_manifest(folder: Path, out: Path) -> tuple[int, int]:
    """Write the relative name (with `/`) and size of every file below `folder` to `out`, without times: equal data, equal
    bytes. Links are followed, each folder once.

    Returns:
        The number of files and their bytes together.

    Raises:
        FileError: no folder is there, it holds no file, or a name below it cannot be read; or `out` lies below `folder`, where
            it would list itself.
    """
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise FileError(f"{out}: lies below {folder}, where it would list itself; name a file outside")
    sizes: dict[str, int] = {}
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise error

    try:
        for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
            folders.sort()  # which decides by what name a folder is listed that a link leads to as well
            if (real := os.path.realpath(parent)) in seen:  # a link back to where we were
                folders.clear()
                continue
            seen.add(real)
            sizes |= {file.relative_to(folder).as_posix(): file.stat().st_size for file in (Path(parent, n) for n in names)}
    except OSError as error:
        raise FileError(f"{error.filename}: {error.strerror or error}") from None
    if not sizes:
        raise FileError(f"{folder}: holds no files")
    total = sum(sizes.values())
    write_json(out, {"schema_version": MANIFEST_SCHEMA, "count": len(sizes), "bytes": total, "files": sizes})
    return len(sizes), total
