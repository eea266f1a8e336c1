"""Where published weights come from, and that nothing but whole, fitting safetensors is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from svam.files import write_json
from svam.models.layouts import AUTOENCODER, TEACHERS, TEXT, UNET, Layout
from svam.models.published import load_strict, read_adapter, resolve_weights, save_published, write_adapter
from tests.sources.common import refused
from tests.toy import lay_out, spoil

DINOV2 = TEACHERS["dinov2"]
KEY = "prepare_backbones.semantic.path"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make(folder: Path, width: int = 8) -> Path:
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = Dinov2Config(image_size=16, patch_size=8, hidden_size=width, num_hidden_layers=1, num_attention_heads=2)
    save_published(Dinov2Model(config), folder)
    return folder


def test_what_is_loaded_is_frozen_and_the_same_bytes_when_saved_elsewhere(tmp_path: Path) -> None:
    first = make(tmp_path / "first")
    (tmp_path / "second").mkdir()
    model = load_strict(Dinov2Model, first)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    save_published(model, tmp_path / "second")
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name


def test_a_local_folder_with_or_without_its_subfolder(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "model" / "vae", AUTOENCODER)
    assert resolve_weights(str(tmp_path / "model"), None, AUTOENCODER, KEY) == folder
    assert resolve_weights(str(folder), None, AUTOENCODER, KEY) == folder
    with refused("leave it empty"):
        resolve_weights(str(folder), COMMIT, AUTOENCODER, KEY)


@pytest.mark.parametrize(
    ("path", "revision", "message"),
    [
        ("/no/such/folder", None, "no such folder, and not a hub id"),
        ("owner/name", None, "revision to be a commit hash"),
        ("owner/name", "main", "revision to be a commit hash"),
        ("owner/name", COMMIT, "cannot be fetched"),
    ],
)
def test_what_cannot_be_resolved_is_one_line(path: str, revision: str | None, message: str) -> None:
    # The suite runs with HF_HUB_OFFLINE=1, so the last case stands for an unreachable hub.
    with refused(message, KEY):
        resolve_weights(path, revision, DINOV2, KEY)


def test_only_safetensors_count(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = r"no model.safetensors and .*; pytorch_model.bin is of a format that runs code when it is read: convert it"
    with refused(said, KEY):
        resolve_weights(str(folder), None, DINOV2, KEY)
    with refused(said):
        load_strict(Dinov2Model, folder)
    (folder / "pytorch_model.bin").rename(folder / "model.fp16.safetensors")
    with refused("no model.safetensors .*; model.fp16.safetensors is not read under this name", KEY):
        resolve_weights(str(folder), None, DINOV2, KEY)


UNET_FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{UNET_FILE}.index.json"


@pytest.mark.parametrize("layout, name, new, said", [
    (UNET, "", "other", "holds no folder 'unet' and no config.json; expected the layout that save_pretrained writes"),
    (UNET, "config.json", None, "unet holds no config.json"),
    (UNET, "config.json", {"_class_name": "UNet2DConditionModel"},
     "unet/config.json: _class_name is 'UNet2DConditionModel', expected 'UNetSpatioTemporalConditionModel'; name weights"),
    (UNET, UNET_FILE, "other.bin", f"holds no {UNET_FILE} .*; other.bin is of a format that runs code when it is read"),
    (UNET, INDEX, {"weight_map": {"a": UNET_FILE, "b": "2.safetensors", "c": "3.safetensors"}},
     f"2 of 3 shards in {INDEX} are missing, first 2.safetensors"),
    (UNET, INDEX, {"weight_map": ["a"]}, f"{INDEX}: no weight_map that names shards"),
    (UNET, INDEX, {"weight_map": {"a": "config.json"}}, "config.json: not a whole safetensors file .*; fetch it again"),
    (AUTOENCODER, "", "unet", "holds no folder 'vae' and no config.json"),
    (AUTOENCODER, "config.json", {"_class_name": "AutoencoderKL"}, "'AutoencoderKL', expected 'AutoencoderKLTemporalDecoder'"),
    (AUTOENCODER, UNET_FILE, "model.safetensors", f"holds no {UNET_FILE} .*; model.safetensors is not read under this name"),
    (TEXT, "config.json", {"model_type": "t5"}, "config.json: model_type is 't5', expected 'clip' or 'clip_text_model'; name"),
    (TEXT, "config.json", {}, "config.json: model_type is None, expected 'clip'"),
    (TEXT, "tokenizer.json", None, "no tokenizer; expected vocab.json and merges.txt, or tokenizer.json"),
])  # fmt: skip
def test_another_layout_is_one_sentence(
    layout: Layout, name: str, new: dict[str, Any] | str | None, said: str, tmp_path: Path
) -> None:
    """Of the U-Net, the autoencoder, and the text model; whole ones are taken."""
    folder = lay_out(tmp_path / "model" / (layout.subfolder or ""), layout)
    assert resolve_weights(str(tmp_path / "model"), None, layout, KEY) == folder
    spoil(folder / name, new)
    with refused(said, f"{KEY}: {tmp_path}"):
        resolve_weights(str(tmp_path / "model"), None, layout, KEY)


@pytest.mark.parametrize("fault, said", [
    ("missing", "the weights do not fit Dinov2Model: 1 missing_keys, first embeddings.cls_token"),
    ("left over", "the weights do not fit Dinov2Model: 1 unexpected_keys, first something.else"),
    ("shape", r"the weights do not fit Dinov2Model: 1 mismatched_keys, first \('embeddings.cls_token', torch.Size\(\[5\]\)"),
    ("truncated", "model.safetensors: not a whole safetensors file"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, fault: str, said: str) -> None:
    file = make(tmp_path / "model") / "model.safetensors"
    tensors = load_file(str(file))
    name = sorted(tensors)[0]
    if fault == "missing":
        tensors.pop(name)
    elif fault == "left over":
        tensors["something.else"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(5)
    save_file(tensors, str(file), {"format": "pt"})
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    with refused(said):
        load_strict(Dinov2Model, file.parent)
    if fault == "left over":
        load_strict(Dinov2Model, file.parent, ignored=("something.",))


def test_missing_shards_and_what_only_looks_like_safetensors(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})
    with refused("1 of 2 shards in model.safetensors.index.json are missing, first model-00002-of-00002.safetensors"):
        load_strict(Dinov2Model, folder)
    (folder / "model.safetensors.index.json").unlink()
    weights.write_bytes(b"\x80\x02}q\x00." * 100)  # as a pickle begins
    with refused("model.safetensors: not a whole safetensors file"):
        load_strict(Dinov2Model, folder)
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    with refused("model.safetensors: a Git LFS pointer, not the file itself"):
        load_strict(Dinov2Model, folder)
    write_json(folder / "config.json", {"model_type": "dinov2", "hidden_size": "wide"})
    save_file({}, weights)
    with refused("cannot be read as Dinov2Model"):
        load_strict(Dinov2Model, folder)


def test_a_commit_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise ValueError(f"404 Client Error.\n\nRevision {COMMIT} not found")

    monkeypatch.setattr("huggingface_hub.snapshot_download", missing)
    with refused(f"owner/name at {COMMIT[:12]} cannot be fetched .*404 Client Error.*check the id, the commit", KEY):
        resolve_weights("owner/name", COMMIT, DINOV2, KEY)


def test_the_adapter_record_is_checked(tmp_path: Path) -> None:
    write_adapter(tmp_path, "text", tokens=20)
    assert read_adapter(tmp_path, "text") == {"tokens": 20}
    with refused("expected kind 'teacher'"):
        read_adapter(tmp_path, "teacher")
