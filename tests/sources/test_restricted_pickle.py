"""Files of pickled objects: what numpy writes is read back, and a crafted file runs nothing and costs nothing."""

from __future__ import annotations

import io
import os
import pickle  # to write what users have, and what an attacker would
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svam.files import FileError
from svam.sources._restricted_pickle import load_objects


def npy_of(value: Any, protocol: int = 4) -> bytes:
    """A .npy file of object dtype whose contents are any pickle."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
    return head.getvalue() + (value if isinstance(value, bytes) else pickle.dumps(value, protocol))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_plain_objects_of_numpy_1_and_2(tmp_path: Path, protocol: int, core: str) -> None:
    value = {
        "text": ["a", "é"], "pairs": [(1, np.int64(2)), [True, None, 2**70, -1.5]], "set": {1, "x"}, "bytes": b"\x00\xff",
        "arrays": [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
                   np.array(["ab", "c"]), np.zeros((0, 3), dtype=np.float16), np.array([None, [1]], dtype=object),
                   np.array(True), np.array([b"x"])],
    }  # fmt: skip
    data = pickle.dumps(np.array(value, dtype=object), protocol)
    if protocol < 4:  # there a name ends with a line, so that it may change its length
        data = data.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", core.encode() + b".")
    file = tmp_path / "a.npy"
    file.write_bytes(npy_of(data))
    found = load_objects(file)
    for one, other in zip(found.pop("arrays"), value.pop("arrays"), strict=True):
        assert (
            one.dtype.newbyteorder("=") == other.dtype.newbyteorder("=") and one.shape == other.shape and (one == other).all()
        )
    assert found == value


class _Crafted:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def _structured() -> bytes:
    """A dtype that hides an object in its fields: numpy itself would take the bytes for a pointer."""
    return pickle.dumps(np.array({"x": np.zeros(1, dtype=[("a", "i8")])}, dtype=object), 4)


def _short(code: bytes) -> bytes:
    return b"\x80\x04" + code + b"."


@pytest.mark.parametrize(
    ("crafted", "match"),
    [
        (_Crafted(os.system, ("touch ran",)), "asks for '(posix|nt).system'"),
        (_Crafted(eval, ("open('ran', 'w')",)), "asks for 'builtins.eval'"),
        (_Crafted(np.load, ("ran",)), "asks for 'numpy.load'"),
        (_Crafted(np.ndarray, ((10**12,),)), "calls something that makes no array"),
        (_Crafted(np.dtype, ("O,i8",)), "neither of numbers nor of strings"),
        (_Crafted(getattr, (1, "real")), "asks for 'builtins.getattr'"),
        (Path("x"), "asks for 'pathlib"),
        (_structured(), "neither of numbers nor of strings|unsupported dtype"),
        (_short(b"cos\nsystem\n(S'touch ran'\ntR"), "asks for 'os.system'"),
        (_short(b"\x82\x01"), "damaged"),
        (_short(b"(ios\nsystem\n"), "asks for 'os.system'"),
        (_short(b"]" + b"0" * 3), "damaged"),
        (_short(b"Nr\xff\xff\xff\xff"), "more objects than it has bytes"),  # place 4294967295, which costs 32 GiB
        (_short(b"\x8d" + struct.pack("<Q", 2**62)), "damaged"),
        (_short(b"\x8e" + struct.pack("<Q", 2**40)), "damaged"),
        (_short(b"(" * 100 + b"t"), "damaged|holds a"),
        (_short(b"]" * 50_000 + b"a" * 49_999), "holds a list"),
        (b"", "damaged"),
        ({"a": 1}, "holds a dict"),
        (np.zeros(3), "holds an array of float64"),
    ],
)
def test_a_crafted_file_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crafted: Any, match: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "scene_info.npy"
    value = np.array({"x": crafted}, dtype=object) if isinstance(crafted, _Crafted | Path) else crafted
    file.write_bytes(npy_of(value))
    with pytest.raises(FileError, match=f"scene_info.npy: .*({match})") as caught:
        load_objects(file)
    assert "\n" not in str(caught.value) and not Path("ran").exists()


@pytest.mark.parametrize("name", ["auto_lang_ann.npy", "scene_info.npy"])
def test_other_npy_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError, match="cannot be read"):
        load_objects(tmp_path / name)
    np.save(tmp_path / name, np.zeros(3))
    with pytest.raises(FileError, match="no .npy file with one Python object"):
        load_objects(tmp_path / name)
