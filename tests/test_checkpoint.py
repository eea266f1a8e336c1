"""Checkpoints: exact, strict, and one sentence when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from svam.checkpoint import load_config, load_state, restore, save_module, save_tensors
from svam.files import FileError
from tests.episodes.test_convert import file_size_limit


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    save_module(tmp_path / "a", module, {"width": 3})
    state, config = load_state(tmp_path / "a")
    other = nn.Linear(3, 2)
    restore(other, state, tmp_path / "a")
    assert torch.equal(other.weight, module.weight) and config == {"width": 3}
    save_module(tmp_path / "b", other, {"width": 3})
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in ("model.safetensors", "config.json")
    )


def test_a_wrong_shape_names_the_file_and_the_tensor(tmp_path: Path) -> None:
    save_module(tmp_path, nn.Linear(3, 2), {})
    with pytest.raises(FileError, match=r"weights do not fit Linear: size mismatch for weight"):
        restore(nn.Linear(4, 2), load_state(tmp_path)[0], tmp_path)
    with pytest.raises(FileError, match=r'Missing key\(s\).*"bias"'):
        restore(nn.Linear(3, 2), {"weight": torch.zeros(2, 3)}, tmp_path)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    save_module(tmp_path, nn.Linear(30, 20), {})
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FileError, match=r"model.safetensors: not a whole safetensors file"):
        load_state(tmp_path)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(FileError, match=r"schema_version is 99, but this version of the code reads 3"):
        load_config(tmp_path)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with file_size_limit(2000), pytest.raises(FileError, match=r"weights.safetensors: not written: .*File too large"):
        save_tensors(tmp_path / "weights.safetensors", {"weight": torch.zeros(4096)})
