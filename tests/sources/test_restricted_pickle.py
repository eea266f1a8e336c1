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

from svam.sources._restricted_pickle import load_objects
from tests.sources.common import refused


def npy_of(value: Any, protocol: int = 4) -> bytes:
    """A .npy file of object dtype whose contents are any pickle."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
    return head.getvalue() + (value if isinstance(value, bytes) else pickle.dumps(value, protocol))


@pytest.mark.parametrize(("protocol", "core"), [(3, "numpy.core"), (3, "numpy._core"), (4, "numpy._core")])
def test_plain_objects_of_numpy_1_and_2(tmp_path: Path, protocol: int, core: str) -> None:
    value = {
        "text": ["a", "é", np.str_("")], "pairs": [(1, np.int64(2)), [True, None, 2**70, -1.5]], "bytes": b"\x00\xff",
        "arrays": [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
                   np.array(["ab", "c"]), np.zeros((0, 3), dtype=np.float16), np.array([None, [1]], dtype=object),
                   np.array(True), np.array([b"x"])],
    }  # fmt: skip
    data = pickle.dumps(np.array(value, dtype=object), protocol)
    if protocol == 3:  # there a name ends with a line, so that it may change its length
        data = data.replace(b"numpy._core.", core.encode() + b".")
    (tmp_path / "a.npy").write_bytes(npy_of(data))
    read = load_objects(tmp_path / "a.npy")
    for one, other in zip(read.pop("arrays"), value.pop("arrays"), strict=True):
        assert one.dtype.newbyteorder("=") == other.dtype.newbyteorder("=") and one.shape == other.shape
        assert (one == other).all()
    assert read == value


class _Crafted:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def _array(shape: Any, contents: Any) -> _Crafted:
    reconstruct, arguments, _ = np.zeros(1).__reduce__()
    return _Crafted(reconstruct, arguments, (1, shape, np.dtype("O"), False, contents))


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
        (np.zeros(1, dtype=[("a", "i8")]), "neither of numbers nor of strings"),  # whose fields could hide objects
        (_array((3,), []), "without its contents"),  # numpy would look for three
        (_Crafted(*_array((10**12,), b"").call[:2], (1, (10**12,), np.dtype("U0"), False, b"")), "without its contents"),
        (_array((np.uint8(16), np.uint8(16)), []), "without its contents"),  # whose product overflows to 0
        (_short(b"cos\nsystem\n(S'touch ran'\ntR"), "asks for 'os.system'"),
        (_short(b"(ios\nsystem\n"), "asks for 'os.system'"),
        (_short(b"\x82\x01"), "damaged"),
        (_short(b"]" + b"0" * 3), "damaged"),
        (_short(b"Nr\xff\xff\xff\xff"), "more objects than it has bytes"),  # place 4294967295, which costs 32 GiB
        (_short(b"\x8d" + struct.pack("<Q", 2**62)), "damaged"),
        (_short(b"\x8e" + struct.pack("<Q", 2**40)), "damaged"),
        (_short(b"]" * 50_000 + b"a" * 49_999), "holds a list"),
        (b"", "damaged"),
        (pickle.dumps({"a": 1}), "holds a dict"),
        (pickle.dumps(np.zeros(3), 4), "holds an array of float64"),
    ],
)
def test_a_crafted_file_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crafted: Any, match: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "scene_info.npy"
    file.write_bytes(npy_of(crafted if isinstance(crafted, bytes) else np.array({"x": crafted}, dtype=object)))
    with refused(f"scene_info.npy: .*({match})"):
        load_objects(file)
    assert not Path("ran").exists()


def test_other_npy_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "scene_info.npy"
    with refused("scene_info.npy: cannot be read"):
        load_objects(file)
    np.save(file, np.zeros(3))
    with refused("no .npy file with one Python object"):
        load_objects(file)
