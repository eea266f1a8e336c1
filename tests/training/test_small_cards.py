"""Fine-tuning on small cards: the same gradients, and a U-Net that is an ordinary one afterwards."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svam import precision
from svam.device import compile_layers
from svam.episodes.store import EpisodeStore
from svam.errors import MachineError
from svam.models.foresight import ForesightModel, FrozenParts
from svam.models.video import VideoModel
from svam.params import FinetuneVideo, Machine
from svam.resume import NO_RESUME, Resume
from svam.training.finetune_video import TextTable, denoising_loss, train_video
from svam.training.latents import LatentClips
from svam.training.small_cards import ADAPTED, LAYERS, MATRICES, adapted, checkpointed
from tests.models.test_video import SAMPLER, inputs, tiny
from tests.tiny_foresight import OPTIMISER, encoded
from tests.toy import committed

CPU = torch.device("cpu")


def kept_and_gradients(model: VideoModel, bf16: bool) -> tuple[int, list[Tensor]]:
    """Bytes that the forward pass keeps for the backward pass, parameters aside, and the gradients."""
    condition, text, noise = inputs()
    weights, kept = {p.data_ptr() for p in model.parameters()}, dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision.mixed_precision(CPU, bf16):
        loss = denoising_loss(model, noise, torch.tensor([80.0, 0.7]), noise, condition, text).mean()
    loss.backward()
    return sum(kept.values()), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("bf16", [False, True])
def test_layers_computed_twice_give_the_same_gradients_and_keep_less(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: True)
    model = tiny().train()
    kept, gradients = kept_and_gradients(model, bf16)
    with checkpointed(model.unet, CPU, bf16):
        kept_twice, twice = kept_and_gradients(model, bf16)
    again, _ = kept_and_gradients(model, bf16)
    assert len(gradients) == len(twice) == len(list(model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(gradients, twice, strict=True))
    assert kept_twice < 0.3 * kept and again == kept


def test_layers_that_are_computed_twice_are_compiled_with_their_blocks() -> None:
    """As `fit` asks for it: torch meets every checkpoint while it captures a block, and the gradients stay."""
    model, twice = tiny().train(), list[Any]()
    _, gradients = kept_and_gradients(model, False)

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        twice.extend(node for node in graph.graph.nodes if node.target is torch.ops.higher_order.tag_activation_checkpoint)
        return graph.forward

    with checkpointed(model.unet, torch.device("cuda"), False):
        compile_layers(model, backend=backend)
        _, compiled = kept_and_gradients(model, False)
    # Equal layers share a graph: the middle block's two residual ones, which lie in no block that is compiled whole.
    assert len(twice) == sum(isinstance(module, LAYERS) for module in model.modules()) - 1
    assert len(gradients) == len(compiled) == len(list(model.parameters()))
    for pair in zip(gradients, compiled, strict=True):
        torch.testing.assert_close(*pair)


def output(model: VideoModel) -> Tensor:
    condition, text, noise = inputs()
    output = model.raw(noise, torch.tensor([80.0, 0.7]), condition, text)[1]
    assert output is not None
    return output


@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_begin_as_nothing_and_end_in_the_weights(bf16: bool) -> None:
    """With bf16 frozen matrices are rounded meanwhile, which autocast would do at every use: the same numbers."""
    pytest.importorskip("peft")
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.requires_grad_(False)  # as in the block: torch.matmul folds a batch if the matrix needs gradients, to other bits
    with torch.autocast("cpu", enabled=bf16), torch.no_grad():
        expected = output(model)
    with adapted(model.unet, 2, 0, MATRICES if bf16 else ()):
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained and all("lora_" in name and (".attn1." in name or ".attn2." in name) for name in trained)
        dtypes = {p.dtype for p in model.parameters() if not p.requires_grad and p.ndim > 1}
        assert dtypes == {torch.bfloat16 if bf16 else torch.float32}
        with torch.autocast("cpu", enabled=bf16), torch.no_grad():
            assert torch.equal(output(model), expected)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
        with torch.autocast("cpu", enabled=bf16), torch.no_grad():
            adapters = output(model)
    with torch.autocast("cpu", enabled=bf16), torch.no_grad():
        merged = output(model)
    moved = (merged - expected).abs().mean()
    assert (merged - adapters).abs().mean() < (0.2 if bf16 else 1e-4) * moved
    after = model.state_dict()
    assert list(after) == list(before) and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith(tuple(f"{layer}.weight" for layer in ADAPTED))}


def test_adapters_have_the_gradients_of_the_matrix_that_they_add() -> None:
    """Of a weight W + BA with gradient G: G A^T for B, B^T G for A."""
    pytest.importorskip("peft")
    model, found = tiny(), dict[str, list[Tensor]]()
    with adapted(model.unet, 2, 0):
        for name, parameter in model.unet.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        kept_and_gradients(model, False)
        for name, module in model.unet.named_modules():
            if name.endswith(ADAPTED):
                down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
                assert down.grad is not None and up.grad is not None
                found[name] = [down.detach(), up.detach(), down.grad, up.grad]
    kept_and_gradients(model, False)
    assert found
    for name, (down, up, down_gradient, up_gradient) in found.items():
        gradient = model.unet.get_parameter(f"{name}.weight").grad
        assert gradient is not None
        torch.testing.assert_close(up_gradient, gradient @ down.mT, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(down_gradient, up.mT @ gradient, rtol=1e-3, atol=1e-5)


def test_without_peft_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with (
        pytest.raises(MachineError, match=r"lora_rank is 4, but peft is not installed: pip install .*\[cards\]"),
        adapted(tiny().unet, 4, 0),
    ):
        pass


MACHINE = Machine.model_validate(committed("machine"))
Fine = Callable[..., VideoModel]


@pytest.fixture
def fine(store: EpisodeStore, folders: dict[str, Path]) -> Fine:
    """Fine-tunes the tiny video model for some steps; `resume` keeps its state, `machine` are changes of that section."""
    parts = ForesightModel.load_parts(FrozenParts(), SAMPLER, folders)
    table, autoencoder = TextTable.build(store, parts.text), parts.frame_autoencoder
    latents = encoded(store, autoencoder)

    def train(lora_rank: int | None = None, steps: int = 3, resume: Resume = NO_RESUME, **machine: object) -> VideoModel:
        model = VideoModel.load(folders["video"])
        model.unet.requires_grad_(True)
        optimiser = OPTIMISER.model_copy(update={"steps": steps, "warmup": 0, "schedule": "constant"})
        changes = {"frames": 3, "training": optimiser.model_dump()}
        section = FinetuneVideo.model_validate(committed("finetune_video") | changes)
        section = section.model_copy(update={"lora_rank": lora_rank})  # of random weights, which params would refuse
        clips = LatentClips(store, "train", latents, 3, model.config.stride)
        train_video(
            model, section, clips, clips, autoencoder, table, 0, CPU, None, resume, MACHINE.model_copy(update=machine),
        )  # fmt: skip
        return model

    return train


def test_the_machine_decides_no_number(fine: Fine) -> None:
    plain, twice = fine().state_dict(), fine(checkpointing=True).state_dict()
    assert all(torch.equal(value, twice[name]) for name, value in plain.items())


def test_an_adapted_model_is_loaded_as_any_other_and_goes_on_after_a_kill(fine: Fine, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    whole = fine(lora_rank=2, steps=4, checkpointing=True)
    fine(lora_rank=2, steps=2, resume=Resume(tmp_path, 0.0))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 0.5 * sum(p.nbytes for p in whole.parameters())
    resumed = fine(lora_rank=2, steps=4, resume=Resume(tmp_path, 0.0))
    (tmp_path / "video").mkdir()
    resumed.save(tmp_path / "video")
    loaded = VideoModel.load(tmp_path / "video").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in whole.state_dict().items())
