"""Published weights: where they are, and how they are read. Safetensors only, strict, from a folder or a pinned hub commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from svam.files import FileError, read_json, write_json
from svam.models.layouts import DIFFUSERS, TRANSFORMERS, Layout, check_layout, check_weights, local_weights

Model = TypeVar("Model", bound=nn.Module)
FILES = ("*.safetensors", "*.json", "merges.txt")
"""What is fetched of a hub repository: weights, configurations and tokenizer files; never anything unpickled."""


def resolve_weights(path: str, revision: str | None, layout: Layout, key: str) -> Path:
    """The local folder that holds `config.json` and safetensors of one published model.

    Args:
        path: a local folder, or a hub id `owner/name`.
        revision: the full commit hash that pins a hub id; must be empty for a local folder.
        layout: of the model; a local `path` may name either a pipeline's folder or the model's own within it.
        key: the params key that `path` comes from, for messages, e.g. `prepare_backbones.text.path`.

    Raises:
        FileError: no such folder, no pinned revision, the hub cannot be reached, or what is there is not of this layout.
    """
    folder = local_weights(path, revision, layout, key)
    if folder is None:
        folder = _download(path, str(revision), layout.subfolder, key)
        check_layout(folder, layout, key)
    return folder


def _download(path: str, revision: str, subfolder: str | None, key: str) -> Path:
    """Fetch one commit of a hub repository into the hub's cache (or find it there) and return its folder."""
    from huggingface_hub import snapshot_download

    patterns = [f"{subfolder}/{name}" for name in FILES] if subfolder else list(FILES)
    try:
        root = snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=["*.fp16.safetensors"])
    except Exception as error:  # the hub's own errors, and those of whichever HTTP client its version uses
        raise FileError(
            f"{key}: {path} at {revision[:12]} cannot be fetched ({type(error).__name__}: {_first_line(error)}); "
            "name a local folder, or check the id, the commit and the network"
        ) from None
    return Path(root) / subfolder if subfolder else Path(root)


def load_strict(cls: type[Model], folder: Path, ignored: tuple[str, ...] = ()) -> Model:
    """Build `cls` (a class of diffusers or transformers) from `folder`, float32, in evaluation mode and frozen.

    Args:
        ignored: prefixes of weights that belong to other parts of the published checkpoint and are left out knowingly
            (the vision tower beside CLIP's text model). Any other missing, left-over or differently shaped weight is refused.

    Raises:
        FileError: missing or broken files, or weights that do not fit.
    """
    import diffusers

    if not (folder / "config.json").is_file():
        raise FileError(f"{folder}/config.json: no such file")
    options: dict[str, Any] = {"torch_dtype": torch.float32}
    if not (diffused := issubclass(cls, diffusers.ModelMixin)):  # whose own error would name no weight
        options = {"dtype": torch.float32, "ignore_mismatched_sizes": True}
    check_weights(folder, DIFFUSERS if diffused else TRANSFORMERS)
    loader: Any = cls
    try:
        with quiet():
            model, info = loader.from_pretrained(
                str(folder), output_loading_info=True, use_safetensors=True, local_files_only=True, **options
            )
    except Exception as error:  # the libraries raise bare RuntimeError, KeyError, SafetensorError... for broken files
        raise FileError(f"{folder}: cannot be read as {cls.__name__}: {type(error).__name__}: {_first_line(error)}") from None
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        keys = sorted(map(str, info[fault]))
        if fault == "unexpected_keys":
            keys = [key for key in keys if not key.startswith(ignored)]
        if keys:
            raise FileError(f"{folder}: the weights do not fit {cls.__name__}: {len(keys)} {fault}, first {keys[0]}")
    result: Model = model
    return freeze(result)


def save_published(model: nn.Module, folder: Path) -> None:
    """Write `model` in the published layout, without the path it was read from, so that equal weights are equal bytes."""
    import diffusers

    saver: Any = model
    if isinstance(model, diffusers.ModelMixin):
        saver.register_to_config(_name_or_path="")
    with quiet():
        saver.save_pretrained(str(folder), safe_serialization=True)


def freeze(model: Model) -> Model:
    """Evaluation mode, and no parameter asks for a gradient."""
    return model.eval().requires_grad_(False)


def read_adapter(folder: Path, kind: str) -> dict[str, Any]:
    """Read `svam.json`, the adapter's own record beside a backbone's published files.

    Raises:
        FileError: missing, not JSON, of another version, or of another kind of backbone.
    """
    record = read_json(folder / "svam.json")
    values = dict(record) if isinstance(record, dict) else {}
    stated = (values.pop("kind", None), values.pop("schema_version", None))
    if stated != (kind, ADAPTER_SCHEMA):
        raise FileError(
            f"{folder}/svam.json: expected kind {kind!r}, schema_version {ADAPTER_SCHEMA}; found {stated[0]!r}, {stated[1]!r}; "
            "run prepare_backbones again"
        )
    return values


ADAPTER_SCHEMA = 1
"""Version of `svam.json`."""


def write_adapter(folder: Path, kind: str, **values: Any) -> None:
    """Write what `read_adapter` reads back."""
    write_json(folder / "svam.json", {"kind": kind, "schema_version": ADAPTER_SCHEMA, **values})


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' own bars and reports; faults are raised by `load_strict` instead."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bars in before:
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"
