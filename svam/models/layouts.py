"""Published weights as files: which folder is read, and whether a loader will find in it what it reads.

By the names of files, their headers and `config.json` alone, without torch: what is not there is told before anything is
computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from svam.files import FileError, read_json, refuse_lfs_pointer


class Layout(NamedTuple):
    """What a loader expects of a folder.

    kinds: what `config.json` may say that the model is, under the name `field`; () for Depth Anything 3, which says it in a
    way of its own. subfolder: the model's folder within a pipeline's repository. tokenizer: whether one lies beside the model.
    """

    kinds: tuple[str, ...]
    field: str = "model_type"
    subfolder: str | None = None
    tokenizer: bool = False


TRANSFORMERS, DIFFUSERS = "model", "diffusion_pytorch_model"
"""How the libraries name files of weights."""
AUTOENCODER = Layout(("AutoencoderKLTemporalDecoder",), "_class_name", "vae")
UNET = Layout(("UNetSpatioTemporalConditionModel",), "_class_name", "unet")
TEXT = Layout(("clip", "clip_text_model"), tokenizer=True)
TEACHERS = {
    "dinov2": Layout(("dinov2",)), "dinov2_registers": Layout(("dinov2_with_registers",)), "dinov3": Layout(("dinov3_vit",)),
    "clip": Layout(("clip", "clip_vision_model")), "siglip2": Layout(("siglip", "siglip_vision_model")),
    "depth_anything_v2": Layout(("depth_anything",)), "depth_anything_3": Layout(()), "videomae": Layout(("videomae",)),
    "vjepa2": Layout(("vjepa2",)),
}  # fmt: skip
"""By the names of `svam.models.families.FAMILIES`."""
NETS: dict[str, dict[str, Any]] = {
    name: {"out_layers": layers, "alt_start": start, "qknorm_start": start, "rope_start": start, "cat_token": start > 0}
    for name, layers, start in (
        ("da3-small", [5, 7, 9, 11], 4), ("da3-base", [5, 7, 9, 11], 4), ("da3-large", [11, 15, 19, 23], 8),
        ("da3-giant", [19, 27, 33, 39], 13), ("da3mono-large", [4, 11, 17, 23], -1), ("da3metric-large", [4, 11, 17, 23], -1),
    )
}  # fmt: skip
"""`config.net` of the released Depth Anything 3, for a config.json that gives the model's name alone."""


def local_weights(path: str, revision: str | None, layout: Layout, key: str) -> Path | None:
    """The folder of published weights that is read; None where `path` is a hub id `owner/name`, which `revision` pins.

    Args:
        path: may name the repository's folder or the model's own within it.
        key: of `path` in the params, for messages; the revision's is beside it.

    Raises:
        FileError: no such folder, and no hub id that is pinned; a folder with a revision; or as `check_layout`.
    """
    local, beside = Path(path).expanduser(), f"{key.rpartition('.')[0]}.revision"
    if local.is_dir():
        if revision:
            raise FileError(f"{key}: {path} is a local folder, but {beside} is {revision!r}; leave it empty")
        inner = local / (layout.subfolder or "")
        folder = inner if inner.is_dir() else local
        check_layout(folder, layout, key)
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise FileError(f"{key}: {path}: no such folder, and not a hub id (owner/name)")
    if not revision or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise FileError(
            f"{key}: {path} is no local folder; as a hub id it needs {beside} to be a commit hash of 40 hexadecimal digits, "
            f"found {revision!r}"
        )
    return None


def check_layout(folder: Path, layout: Layout, key: str) -> None:
    """Nothing, where `folder` holds what a loader of `layout` opens.

    Raises:
        FileError: it does not; the message begins with `key`.
    """
    try:
        if not (folder / "config.json").is_file():
            within = f"no folder {layout.subfolder!r} and " if layout.subfolder not in (None, folder.name) else ""
            raise FileError(f"{folder} holds {within}no config.json; expected the layout that save_pretrained writes")
        if layout.kinds:
            _check_kind(folder, layout)
        else:
            depth_anything_3_net(folder)
        check_weights(folder, DIFFUSERS if layout.field == "_class_name" else TRANSFORMERS)
        if layout.tokenizer:
            check_tokenizer(folder)
    except FileError as error:
        raise FileError(f"{key}: {error}") from None


def _check_kind(folder: Path, layout: Layout) -> None:
    record = read_json(folder / "config.json")
    found = record.get(layout.field) if isinstance(record, dict) else None
    if found not in layout.kinds:
        families = TEACHERS.items() if layout in TEACHERS.values() else ()
        other = next((name for name, family in families if found in family.kinds), None)
        raise FileError(
            f"{folder}/config.json: {layout.field} is {found!r}, expected {' or '.join(map(repr, layout.kinds))}; "
            + (f"set family to {other!r}" if other else "name weights of that kind in the layout that save_pretrained writes")
        )


def check_weights(folder: Path, name: str) -> None:
    """Nothing, where `<name>.safetensors` is there and whole, or every shard in `<name>.safetensors.index.json` is.

    Raises:
        FileError: it is not.
    """
    index, files = folder / f"{name}.safetensors.index.json", [folder / f"{name}.safetensors"]
    if index.is_file():
        record = read_json(index)
        listed = record.get("weight_map") if isinstance(record, dict) else None
        files = [folder / shard for shard in sorted(set(map(str, listed.values())))] if isinstance(listed, dict) else []
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileError(f"{folder}: {len(missing)} of {len(files)} shards in {index.name} are missing, first {missing[0]}")
        if not files:
            raise FileError(f"{index}: no weight_map that names shards; expected what save_pretrained writes")
    elif not files[0].is_file():
        kinds = ("safetensors", "bin", "pt", "pth", "ckpt")
        other = next((file for kind in kinds for file in sorted(folder.glob(f"*.{kind}"))), None)
        named = other is not None and other.suffix == ".safetensors"
        said = "not read under this name" if named else "of a format that runs code when it is read: convert it"
        found = f"; {other.name} is {said}" if other else ""
        raise FileError(f"{folder} holds no {files[0].name} and no {index.name}, and no other format is read{found}")
    for file in files:
        refuse_lfs_pointer(file)
        try:
            with safe_open(file, "np"):
                pass
        except SafetensorError as error:
            raise FileError(f"{file}: not a whole safetensors file ({error}); fetch it again") from None


def check_tokenizer(folder: Path) -> None:
    """Raise `FileError` where there are no files of CLIP's tokenizer."""
    pair = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not pair and not (folder / "tokenizer.json").is_file():
        raise FileError(f"{folder}: no tokenizer; expected vocab.json and merges.txt, or tokenizer.json")


def depth_anything_3_net(folder: Path) -> dict[str, Any]:
    """`config.net` of config.json, as arguments of `DepthAnything3Config`.

    Raises:
        FileError: another layout, or weights in shards.
    """
    file = folder / "config.json"
    record = read_json(file)
    record = record if isinstance(record, dict) else {}
    inner = record.get("config", {"net": NETS.get(str(record.get("model_name")))})
    net = inner.get("net") if isinstance(inner, Mapping) else None
    keys = NETS["da3-large"].keys()
    if not isinstance(net, Mapping) or not keys <= net.keys() or not net["out_layers"]:
        raise FileError(
            f"{file}: no config.net with {', '.join(keys)}, and model_name is {record.get('model_name')!r}; expected the "
            f"layout of Depth Anything 3, or one of {', '.join(NETS)}"
        )
    if (folder / "model.safetensors.index.json").exists():
        raise FileError(f"{folder}: the weights are in shards, but those of Depth Anything 3 are read from one file")
    return {key: net[key] for key in keys} | {"out_layers": tuple(net["out_layers"])}
