"""What a large data set consists of, by names and sizes: a small file to depend on instead of every byte."""

from __future__ import annotations

import os
from pathlib import Path

from svam.files import FileError, write_json

MANIFEST_SCHEMA = 1


def sizes(folder: Path) -> dict[str, int]:
    """Relative name (with `/`) -> bytes of every file below `folder`; links are followed, each folder once.

    Raises:
        FileError: no folder is there, it holds no file, or a name below it cannot be read.
    """
    found: dict[str, int] = {}
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
            found |= {file.relative_to(folder).as_posix(): file.stat().st_size for file in (Path(parent, n) for n in names)}
    except OSError as error:
        raise FileError(f"{error.filename}: {error.strerror or error}") from None
    if not found:
        raise FileError(f"{folder}: holds no files")
    return found


def write_manifest(folder: Path, out: Path) -> tuple[int, int]:
    """Write names and sizes of all files below `folder` to `out`, without times: equal data, equal bytes.

    Returns:
        The number of files and their bytes together.

    Raises:
        FileError: see `sizes`; or `out` lies below `folder`, where it would list itself.
    """
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise FileError(f"{out}: lies below {folder}, where it would list itself; name a file outside")
    files = sizes(folder)
    total = sum(files.values())
    write_json(out, {"schema_version": MANIFEST_SCHEMA, "count": len(files), "bytes": total, "files": files})
    return len(files), total
