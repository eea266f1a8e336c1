"""The manifest of a self-contained model folder: every file with its SHA-256, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from svam.files import FileError, read_json, sha256, write_json

MANIFEST = "manifest.json"


def write_manifest(directory: Path) -> None:
    """List every file below `directory` under its part, with size and SHA-256, in `manifest.json`. The part is the topmost
    folder, or `svam` for a file beside the parts."""
    parts: dict[str, dict[str, dict[str, int | str]]] = {}
    for file in (p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != MANIFEST):
        name = file.relative_to(directory)
        part = name.parts[0] if len(name.parts) > 1 else "svam"
        parts.setdefault(part, {})[name.as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(directory / MANIFEST, {"parts": parts})


def verify_manifest(directory: Path) -> list[str]:
    """Check every listed file and return the names of the parts.

    Raises:
        FileError: no manifest, or a file that is missing, of another size or of another content; names part and file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileError(f"{directory}: no such folder; expected one written by SVAM.save")
    listed = read_json(directory / MANIFEST)
    try:
        parts: dict[str, dict[str, dict[str, int | str]]] = listed["parts"]
        entries = [(part, name, int(r["bytes"]), str(r["sha256"])) for part, f in parts.items() for name, r in f.items()]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise FileError(f"{directory / MANIFEST}: not a manifest of parts, files, sizes and SHA-256") from None
    for part, name, size, digest in entries:
        file = directory / name
        if not file.is_file():
            raise FileError(f"{directory}: part '{part}' lacks its file {name}")
        if file.stat().st_size != size:
            raise FileError(f"{directory}: part '{part}': {name} has {file.stat().st_size} bytes, the manifest lists {size}")
        if sha256(file) != digest:
            raise FileError(f"{directory}: part '{part}': {name} was changed after it was saved (its SHA-256 differs)")
    return sorted(parts)
