"""Checkpoints: `model.safetensors` + `config.json` in a directory. Strict both ways; nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svam.contract import CHECKPOINT_SCHEMA
from svam.files import FileError, read_json, write_json


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors, contiguous, on the CPU and without metadata, so that equal values are equal bytes.

    Raises:
        FileError: the file system refuses.
    """
    try:
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in sorted(tensors.items())}, str(file))
    except SafetensorError as error:
        raise FileError(f"{file}: not written: {error}") from None


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU.

    Raises:
        FileError: the file is missing, truncated or not safetensors.
    """
    try:
        return load_file(str(file))
    except FileNotFoundError:
        raise FileError(f"{file}: no such file") from None
    except SafetensorError as error:
        raise FileError(f"{file}: not a whole safetensors file ({error})") from None


def save_module(directory: Path, module: nn.Module, config: Mapping[str, Any]) -> None:
    """Write `module`'s parameters and buffers, and `config`, into an existing or new directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(directory / "model.safetensors", module.state_dict())
    write_json(directory / "config.json", {"schema_version": CHECKPOINT_SCHEMA, **config})


def load_config(directory: Path) -> dict[str, Any]:
    """Read a checkpoint's configuration, without its schema version.

    Raises:
        FileError: missing or not JSON, or of another schema version.
    """
    path = Path(directory) / "config.json"
    config: dict[str, Any] = read_json(path)
    found = config.pop("schema_version", None) if isinstance(config, dict) else None
    if found != CHECKPOINT_SCHEMA:
        raise FileError(
            f"{path}: schema_version is {found!r}, but this version of the code reads {CHECKPOINT_SCHEMA}; train it again "
            "(dvc repro), or load it with the version that wrote it"
        )
    return config


def load_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, configuration) of a checkpoint directory. Raises `FileError` as above."""
    return load_tensors(Path(directory) / "model.safetensors"), load_config(directory)


def restore(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Load `state` into `module`, strictly.

    Raises:
        FileError: a tensor is missing, left over or of another shape; the message names the first of them.
    """
    try:
        module.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        first = [line.strip() for line in str(error).splitlines() if line.strip()][1:2] or [str(error)]
        raise FileError(f"{source}: the weights do not fit {type(module).__name__}: {first[0]}") from None
