"""Outputs are whole or absent, and what was there before survives a failure."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from svam.files import FileError, read_json, refuse_lfs_pointer, sha256_tree, whole_directory, whole_file, write_json


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in ("first", "second"):
        with whole_directory(out) as partial:
            (partial / "a").write_text(content)
            assert not out.exists() or (out / "a").read_text() == "first"
        assert (out / "a").read_text() == content
    assert names(tmp_path) == ["out"]


def test_a_failure_keeps_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with whole_directory(out) as partial:
        (partial / "a").write_text("old")
    with pytest.raises(RuntimeError), whole_directory(out) as partial:
        (partial / "a").write_text("new")
        raise RuntimeError
    assert (out / "a").read_text() == "old"

    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(FileError, match="No space left"), whole_directory(out) as partial:
        (partial / "new").write_text("new")
    assert (out / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.json"
    write_json(file, {"b": 1, "a": 2})
    assert file.read_text() == '{\n "a": 2,\n "b": 1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"a": float("nan")})
    with pytest.raises(RuntimeError), whole_file(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(file) == {"a": 2, "b": 1}
    assert names(file.parent) == ["a.json"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"nowhere.json: no such file"):
        read_json(tmp_path / "nowhere.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(FileError, match=r"bad.json: not valid JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(FileError, match="no such file or directory"):
        sha256_tree(tmp_path / "nothing")


def test_a_trees_hash_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    before = sha256_tree(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    renamed = sha256_tree(tmp_path / "a")
    (tmp_path / "a" / "y").write_text("2")
    assert len({before, renamed, sha256_tree(tmp_path / "a")}) == 3


@pytest.mark.parametrize("whole", [whole_directory, whole_file])
def test_a_full_disk_is_named(tmp_path: Path, whole: Callable[[Path], AbstractContextManager[Path]]) -> None:
    """What the system says of a full disk has no name in it."""
    (tmp_path / "out").write_text("before")
    with (
        pytest.raises(FileError, match=r"out: not written: No space left on device"),
        whole(tmp_path / "out"),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"much")
    assert [file.name for file in tmp_path.iterdir()] == ["out"] and (tmp_path / "out").read_text() == "before"


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "pointer.mp4").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 1234567\n")
    (tmp_path / "video.mp4").write_bytes(b"\0\0\0 ftypisom")
    for refuses in (refuse_lfs_pointer, read_json):
        with pytest.raises(FileError, match="pointer.mp4: a Git LFS pointer.*git lfs pull"):
            refuses(tmp_path / "pointer.mp4")
    refuse_lfs_pointer(tmp_path / "video.mp4")
    refuse_lfs_pointer(tmp_path / "absent.mp4")
