"""Depth Anything 3's backbone: its own released code where a checkout of it is there, and what that code implies elsewhere."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from svam.files import read_json, sha256_tree, write_json
from svam.models.depth_anything_3 import PREFIX, DepthAnything3, DepthAnything3Config, reference_view
from tests.sources.common import refused

CHECKOUT = os.environ.get("SVAM_DEPTH_ANYTHING_3", "")
NET: dict[str, Any] = {
    "out_layers": [2, 3, 4, 5], "alt_start": 2, "qknorm_start": 2, "rope_start": 2, "cat_token": True
}  # fmt: skip
MONO = NET | {"out_layers": [0, 1, 2, 3], "alt_start": -1, "qknorm_start": -1, "rope_start": -1, "cat_token": False}


def make(folder: Path, net: dict[str, Any], **changes: Any) -> DepthAnything3:
    """A random backbone of the published layout at a small size, among weights of other parts, in a new folder."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    sizes: dict[str, Any] = {"width": 128, "positions": 3, "out_layers": tuple(net["out_layers"]), **changes}
    model = DepthAnything3(DepthAnything3Config(**{**net, **sizes}))
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save(folder)
    write_json(folder / "config.json", {"model_name": "tiny", "config": {"net": net | {"name": "vits"}, "head": {"dim_in": 3}}})
    rest = {"model.head.norm.weight": torch.zeros(2), "model.cam_dec.fc_t.bias": torch.zeros(3)}
    save_file(load_file(folder / "model.safetensors") | rest, folder / "model.safetensors")
    return model.eval()


def views(count: int, side: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, count, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_stages_by_name_are_prefixes_of_one_network(tmp_path: Path) -> None:
    make(tmp_path / "model", NET)
    models = {stage: DepthAnything3.load(tmp_path / "model", stage) for stage in ("first", "third", "last")}  # type: ignore[arg-type]
    assert {stage: len(model.blocks) for stage, model in models.items()} == {"first": 3, "third": 5, "last": 6}
    tokens = {stage: model(views(4, 42)) for stage, model in models.items()}
    assert all(values.shape == (2, 4 * 9, 256) for values in tokens.values())
    assert not torch.allclose(tokens["first"], tokens["third"]) and not torch.allclose(tokens["third"], tokens["last"])
    seen: list[torch.Tensor] = []
    models["last"].blocks[2].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    models["last"](views(4, 42))
    torch.testing.assert_close(tokens["first"][..., :128], seen[0][:, 1:].reshape(2, -1, 128))  # what was seen within a view
    torch.testing.assert_close(
        tokens["first"][..., 128:], models["first"].norm(seen[0])[:, 1:].reshape(2, -1, 128)
    )  # block 2 is even: within a view, and so both halves are of it


@torch.no_grad()
def test_views_of_a_scene_see_each_other_and_frames_of_a_monocular_model_do_not(tmp_path: Path) -> None:
    make(tmp_path / "views", NET)
    make(tmp_path / "mono", MONO)
    model, mono = DepthAnything3.load(tmp_path / "views"), DepthAnything3.load(tmp_path / "mono")
    clip = views(2, 42)
    other = torch.cat([clip[:, :1], clip[:, 1:].flip(-1)], dim=1)
    assert not torch.allclose(model(clip)[:, :9], model(other)[:, :9], atol=1e-3)
    torch.testing.assert_close(mono(clip)[:, :9], mono(other)[:, :9])
    assert mono(clip).shape == (2, 18, 128) and mono.config.hidden_size == 128 and model.config.hidden_size == 256
    same = model(clip[:, :1].expand(-1, 2, -1, -1, -1)).unflatten(1, (2, 9))
    assert not torch.allclose(same[:, 0], same[:, 1], atol=1e-2)  # the camera token tells the reference view from others
    # The order of views means nothing but for which of them is the reference, and that is chosen by content.
    many = views(4, 42)
    turned = model(many[:, [2, 0, 3, 1]]).unflatten(1, (4, 9))
    torch.testing.assert_close(turned, model(many).unflatten(1, (4, 9))[:, [2, 0, 3, 1]], rtol=1e-3, atol=1e-3)


def test_the_reference_view_by_hand() -> None:
    # Likeness .35 .35 .71, length 3 1 1.98, variance .5 .5 0: scaled, the third is off by .5 + .01 + .5, the others by 1.5.
    tokens = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.4, 1.4]])
    assert reference_view(torch.stack([tokens, tokens[[2, 0, 1]]])).tolist() == [2, 0]


def test_saved_again_it_is_the_part_alone_and_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path / "published", NET, gated=True)
    first = DepthAnything3.load(tmp_path / "published", "second")
    assert first.config.gated and not any(parameter.requires_grad for parameter in first.parameters())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first.save(tmp_path / "a")
    second = DepthAnything3.load(tmp_path / "a")
    second.save(tmp_path / "b")
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b") and second.config == first.config
    assert read_json(tmp_path / "a" / "config.json")["config"]["net"]["out_layers"] == [2, 3]
    assert torch.equal(first(views(3, 28)), second(views(3, 28)))
    with refused("no stage 'third' of four"):
        DepthAnything3.load(tmp_path / "a", "third")


def test_a_config_of_the_name_alone_is_that_of_the_released_model(tmp_path: Path) -> None:
    make(tmp_path / "model", NET | {"out_layers": [5, 7, 9, 11], "alt_start": 4, "qknorm_start": 4, "rope_start": 4}, width=64)
    whole = DepthAnything3.load(tmp_path / "model")
    write_json(tmp_path / "model" / "config.json", {"model_name": "da3-small"})
    assert DepthAnything3.load(tmp_path / "model").config == whole.config


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    make(tmp_path / "model", NET)
    config, weights = tmp_path / "model" / "config.json", tmp_path / "model" / "model.safetensors"
    record, tensors = read_json(config), load_file(weights)

    def attempt(message: str, net: dict[str, Any] | None = None, **changes: torch.Tensor | None) -> None:
        values = {name: changes.get(name.removeprefix(PREFIX), value) for name, value in tensors.items()}
        foreign = {name: value for name, value in changes.items() if PREFIX + name not in tensors}
        save_file({name: value for name, value in (values | foreign).items() if value is not None}, weights)
        write_json(config, record if net is None else net)
        with refused(message):
            DepthAnything3.load(tmp_path / "model")

    attempt("model_name is 'other'; expected the layout of Depth Anything 3, or one of da3-small", {"model_name": "other"})
    attempt("no config.net with out_layers", {"config": {"anyview": {}, "metric": {}}})
    attempt("do not fit DepthAnything3: Missing key", {"config": {"net": NET | {"out_layers": [1, 3, 5, 7]}}})
    attempt("do not fit DepthAnything3: Unexpected key", {"config": {"net": NET | {"out_layers": [1, 2, 3, 4]}}})
    attempt("do not fit DepthAnything3", **{"norm.weight": None})
    attempt("do not fit DepthAnything3", **{"blocks.3.attn.q_norm.weight": torch.zeros(3)})
    attempt("not the layout of Depth Anything 3: 1 weights outside of it, first model.da3.x", **{"model.da3.x": torch.zeros(1)})
    attempt("not the layout of Depth Anything 3", cls_token=None)
    weights.write_bytes(weights.read_bytes()[:1000])
    with refused("not a whole safetensors file"):
        DepthAnything3.load(tmp_path / "model")
    weights.unlink()
    with refused("model.safetensors: no such file"):
        DepthAnything3.load(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{}")
    with refused("in shards"):
        DepthAnything3.load(tmp_path / "model")


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the released code, without what the rest of its package imports."""
    if not CHECKOUT:
        pytest.skip("SVAM_DEPTH_ANYTHING_3 names no checkout of github.com/ByteDance-Seed/Depth-Anything-3")
    pytest.importorskip("einops", reason="the released code needs einops")
    for name in ("depth_anything_3", "depth_anything_3.model", "depth_anything_3.model.dinov2"):
        package = ModuleType(name)
        package.__path__ = [str(Path(CHECKOUT, "src", *name.split(".")))]
        monkeypatch.setitem(sys.modules, name, package)
    return importlib.import_module("depth_anything_3.model.dinov2.vision_transformer")


@torch.no_grad()
@pytest.mark.parametrize(("net", "gated"), [(NET, False), (NET | {"alt_start": 3, "rope_start": 4}, True), (MONO, False)])
def test_the_released_code_gives_the_same_tokens(released: Any, net: dict[str, Any], gated: bool, tmp_path: Path) -> None:
    model = make(tmp_path / "model", net, gated=gated)
    theirs = released.DinoVisionTransformer(
        img_size=42, patch_size=14, embed_dim=128, depth=len(model.blocks), num_heads=2,
        ffn_layer="swiglufused" if gated else "mlp", **{name: value for name, value in net.items() if name != "out_layers"},
    )  # fmt: skip
    theirs.load_state_dict(model.state_dict(), strict=True)
    theirs.eval()
    for count, side in ((1, 42), (2, 42), (3, 28), (5, 56)):
        clip = views(count, side)
        stages, _ = theirs.get_intermediate_layers(clip, net["out_layers"])
        for stage, (expected, _) in zip(("first", "second", "third", "last"), stages, strict=True):
            ours = DepthAnything3.load(tmp_path / "model", stage)(clip)
            scale = expected.std()
            torch.testing.assert_close(ours.unflatten(1, (count, -1)) / scale, expected / scale, rtol=0, atol=1e-5)
