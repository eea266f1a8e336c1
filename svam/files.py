"""Outputs that are either whole or absent: written under a temporary name beside their place, then renamed."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from svam.errors import SvamError, describe

if TYPE_CHECKING:
    from pydantic import BaseModel

Model = TypeVar("Model", bound="BaseModel")


class FileError(SvamError, ValueError):
    """A file is missing, truncated or not what it should be; the message names it."""


def scratch_folder(name: str) -> Path:
    """`.cache/<name>` in the project (in the original one where DVC runs an experiment in a copy): what may be lost."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".cache" / name


def clear_leftovers(path: Path) -> None:
    """Delete what killed processes left half-written beside `path`; put back what one of them had moved aside."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*partial-*") if path.parent.is_dir() else ():
        pid = leftover.name.rpartition("-")[2]
        if pid.isdecimal() and int(pid) != os.getpid() and _runs(int(pid)):
            continue
        if ".replaced." in leftover.name and not path.exists():
            leftover.rename(path)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:  # a killed process keeps its number until its parent asks for it, which in a container may be never
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in ("Z", "X")


@contextmanager
def named_refusals(path: Path) -> Iterator[None]:
    """A full disk says so without a name (numpy only counts bytes), and libraries written in Rust, such as safetensors and
    tokenizers, without an OSError: say what was being written.

    Raises:
        FileError: the file system refused.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise FileError(f"{path}: not written: {error.strerror or error}") from error
    except Exception as error:
        if isinstance(error, FileError) or "(os error " not in str(error):
            raise
        raise FileError(f"{path}: not written: {error}") from error


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yield a fresh temporary directory; when the block ends without an error it takes the place of `path`.

    Raises:
        FileError: the file system refuses.
    """
    temporary = path.parent / f".{path.name}.partial-{os.getpid()}"
    clear_leftovers(path)
    temporary.mkdir(parents=True)
    try:
        with named_refusals(path):
            yield temporary
        replace_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(folder: Path, path: Path) -> None:
    """Move `folder`, also from another file system, to the place of `path`, of which a whole one is always on disk.

    Raises:
        FileError: the file system refuses.
    """
    beside = path.parent / f".{path.name}.partial-{os.getpid()}"
    replaced = path.parent / f".{path.name}.replaced.partial-{os.getpid()}"
    with named_refusals(path):
        if folder != beside:
            clear_leftovers(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(folder, beside)
        if path.exists():  # a directory cannot be replaced in one step: it steps aside
            path.rename(replaced)
        try:
            beside.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file name with the same suffix; when the block ends without an error it becomes `path`.

    Raises:
        FileError: the file system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        with named_refusals(path):
            yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, which is removed afterwards; it does not outlive its process, however that ends.

    Raises:
        FileError: another process holds it, and `wait` is false.
    """
    import fcntl

    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+")
        except FileNotFoundError:  # whoever held it has just removed the folder too
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except FileNotFoundError:  # its holder removed it between our opening and locking
            pass
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise FileError(f"{path}: process {holder} is doing the same work; wait for it or end it") from None
        file.close()
    with file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, whole; raises as `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON with sorted keys, so that equal values are equal bytes. NaN is refused."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        FileError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # also bad UTF-8, numbers of thousands of digits, deep nesting
        refuse_lfs_pointer(path)
        raise FileError(f"{path}: not valid JSON ({error})") from None


def read_yaml(path: Path) -> Any:
    """Read YAML of our own or of DVC's."""
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


def stated(model: type[Model], values: Any, file: Path) -> Model:
    """What a file states, as `model`.

    Raises:
        FileError: about its first fault.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise FileError(describe(error, file).partition("\n")[0]) from None


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path) -> None:
    """Nothing, unless `path` is the note of some 130 bytes that Git LFS leaves in place of a file it has not fetched.

    Raises:
        FileError: it is; the message says how to get the file.
    """
    try:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return
    if pointer:
        raise FileError(f"{path}: a Git LFS pointer, not the file itself; run git lfs pull in its repository")


def stamp(path: Path) -> str:
    """Size and modification time: enough to notice a changed input between two runs. Never part of an output."""
    try:
        found = path.stat()
    except OSError:
        return "absent"
    return f"{found.st_size}-{found.st_mtime_ns}"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_tree(path: Path) -> str:
    """SHA-256 of a file, or of a directory's relative names and contents in sorted order."""
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        raise FileError(f"{path}: no such file or directory")
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
    return digest.hexdigest()
