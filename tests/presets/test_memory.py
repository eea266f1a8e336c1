"""What a plan says of memory is what a real step holds, at a reduced width, on a CPU that keeps what a GPU would."""

from __future__ import annotations

import re
import weakref
from collections import defaultdict
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from svam import agreement
from svam.models.autoencoder import Autoencoder
from svam.models.video import VideoModel
from svam.presets import memory, plan
from svam.presets.data import estimated
from svam.presets.memory import Account, Held, Means, as_on_a_gpu, held_by, moment_bytes, state_bytes, widest
from svam.presets.models import Models
from svam.presets.overlay import overlay_of, with_overlay
from svam.presets.plan import MARGIN, SIZES, held_of, parameters, short_of, stages_of, ways_to_fit
from svam.resume import Resume
from svam.training import state
from svam.training.finetune_video import denoising_loss
from svam.training.loop import fit
from svam.training.small_cards import MATRICES, adapted, checkpointed
from tests import ROOT
from tests.toy import optimiser, write_toy_params

GPU = torch.device("cuda")


class Alive(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.most, self.seen = 0, 0, set[int]()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((arguments, named)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.seen | given:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return result

    def forget(self, number: int, size: int) -> None:
        self.seen.discard(number)
        self.now -= size


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Account:
    params = write_toy_params(tmp_path_factory.mktemp("toy") / "params.yaml")
    return Account(params, estimated(params, None, None))


@pytest.fixture(scope="module")
def models(toy: Account) -> Models:
    """On the meta device. Their FLOPs, of which nothing here hangs, are not counted."""
    models = Models(toy.params, toy.models.data)
    models.flops = defaultdict(int, train_geometric=0, train_semantic=0)
    return models


def changed(toy: Account, section: str, **values: Any) -> Account:
    """The account of the same models where params have other values."""
    account, (name, *inner) = copy(toy), section.split(".")
    whole = getattr(toy.params, name)
    part = whole.model_copy(update={inner[0]: getattr(whole, inner[0]).model_copy(update=values)} if inner else values)
    account.params = toy.params.model_copy(update={name: part})
    account._passes = {} if "bf16" in values else toy._passes
    return account


def real_step(video: VideoModel, batch: int, bf16: bool, checkpointing: bool) -> tuple[int, int]:
    """Bytes that autograd keeps of the forward pass beside the weights; and the most that lay beside weights and inputs in a
    step, or, where layers are computed twice in bfloat16, in its forward pass: in the backward pass modes are off."""
    clip, config = torch.randn(batch, *video.config.clip_shape), video.config
    text, kept = torch.randn(batch, config.text_tokens, config.text_width), dict[int, int]()
    weights = {t.untyped_storage().data_ptr() for t in (*video.parameters(), *video.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    twice = checkpointed(video.unet, GPU, bf16) if checkpointing else nullcontext()
    with as_on_a_gpu(bf16), twice, Alive() as alive:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = denoising_loss(video, clip, torch.ones(batch), clip, clip[:, 0], text).mean()
        if not (bf16 and checkpointing):
            torch.autograd.backward(loss)
    return sum(kept.values()), alive.most


@pytest.mark.parametrize("bf16", [False, True])
def test_the_account_of_fine_tuning_is_that_of_a_real_step(bf16: bool, toy: Account) -> None:
    account = changed(toy, "finetune_video.training", bf16=True) if bf16 else toy
    video = Models(toy.params, toy.models.data, "cpu").video
    plain, twice = (account.fine_tuning(Means(checkpointing=on), 2) for on in (False, True))
    kept, most = real_step(video, 2, bf16, False)
    assert plain.weights == sum(t.nbytes for t in (*video.parameters(), *video.buffers()))
    assert plain.gradients == sum(p.grad.nbytes for p in video.parameters() if p.grad is not None)
    assert plain.activations == pytest.approx(kept, rel=0.01)
    assert plain.activations <= most < 2 * (plain.activations + plain.gradients)
    for parameter in video.parameters():
        parameter.grad = None
    kept, most = real_step(video, 2, bf16, True)
    counted, *_ = account.kept(Means(checkpointing=True), 2)
    assert counted == pytest.approx(kept, rel=0.01)
    assert counted < twice.activations < plain.activations
    assert bf16 or twice.activations <= most < 2 * (twice.activations + twice.gradients)


def test_gradients_and_activations_lie_there_together_where_batches_accumulate(toy: Account) -> None:
    held = Held(weights=4, gradients=4, moments=8, average=4, activations=10)
    assert (held.least, held._replace(accumulated=True).least, held._replace(activations=1).least) == (26, 30, 20)
    assert changed(toy, "finetune_video.training", accumulate=2).fine_tuning(Means(), 2).accumulated


def test_several_cards_share_a_batch_and_perhaps_the_weights(toy: Account) -> None:
    two = changed(toy, "machine", launch="torchrun", processes=2)
    one, shared = (changed(two, "machine", shard=shard).training("finetune_video") for shard in (False, True))
    whole = toy.fine_tuning(Means(), 2)  # half of the batch
    assert one == whole
    weights, gradients, moments, average = (size // 2 for size in whole[:4])
    assert shared == Held(weights, gradients, moments, average, whole.activations)


def test_moments_and_averages_are_counted_as_they_are_kept() -> None:
    layer, trained = nn.Linear(100, 50), optimiser(steps=4, batch=2, learning_rate=0.1, ema=0.9)
    layer.bias.requires_grad_(False)
    held = held_by(layer, trained, 7)
    assert held[:5] == (5050 * 4, 5000 * 4, 5000 * 8, 5000 * 4, 7)
    assert held_by(layer, trained, 7, Means(average="host", moments="int8"))[2:4] == (2 * (5000 + 4 * 20), 0)
    assert held_by(layer, trained.model_copy(update={"ema": 0.0}), 7).average == 0
    assert moment_bytes(4095, "int8") == 8 * 4095  # small ones keep float32 moments


@pytest.mark.parametrize("ema, select", [(0.9, "error"), (0.0, "error"), (0.9, None)])
def test_a_saved_state_is_counted_as_it_is_saved(
    ema: float, select: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the random state, and the 4 bytes in which AdamW counts the steps of each of its tensors."""
    states = list[dict[str, Tensor]]()

    def keep(file: Path, tensors: dict[str, Tensor]) -> None:
        states.append(tensors)
        file.touch()

    monkeypatch.setattr(state, "save_tensors", keep)
    net = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 5))
    trained = optimiser(steps=1, batch=2, warmup=0, learning_rate=0.1, ema=ema)
    net[0].bias.requires_grad_(False)
    fit(
        net, lambda batch: net(batch).square().mean(), lambda _: torch.randn(2, 20), trained, torch.device("cpu"), "tiny",
        evaluate=lambda _: {"error": 1.0}, select=select, resume=Resume(tmp_path, 1e9),
    )  # fmt: skip
    counted = sum(t.nbytes for name, t in states[-1].items() if not name.startswith("random/") and not name.endswith("/step"))
    assert counted == state_bytes(net, trained, best=select is not None)


def test_the_widest_layer_of_a_pass() -> None:
    net = nn.Sequential(nn.Linear(3, 50), nn.ReLU(inplace=True), nn.Linear(50, 60))
    assert widest(net, lambda: net(torch.ones(2, 3))) == 2 * (50 + 60) * 4


def test_adapters_are_counted_as_peft_makes_them(toy: Account) -> None:
    """But for copies of a layer's input that peft's layers make."""
    pytest.importorskip("peft")
    account, video = changed(toy, "finetune_video.training", bf16=True), Models(toy.params, toy.models.data, "cpu").video
    held, whole = account.fine_tuning(Means(lora_rank=3), 2), account.fine_tuning(Means(), 2)
    with adapted(video.unet, 3, 0, MATRICES):
        kept, _ = real_step(video, 2, True, False)
        assert held.weights == sum(t.nbytes for t in (*video.parameters(), *video.buffers()))
        assert held.gradients == sum(p.nbytes for p in video.parameters() if p.requires_grad) > 0
    assert held.moments == 2 * held.gradients and held.average == held.gradients
    assert 0.7 * kept < held.activations <= kept
    assert held.weights < 0.6 * whole.weights and held.activations < whole.activations


def test_as_many_clips_fit_as_it_says(toy: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = [Means(checkpointing=True), Means(checkpointing=True, moments="int8")]
    monkeypatch.setattr(plan, "LADDER", (*ladder, Means(lora_rank=16)))  # whose weights are random here
    twice, frozen = changed(toy, "machine", checkpointing=True), 10**9
    one, two = (changed(twice, "finetune_video.training", batch=1, accumulate=count) for count in (1, 2))
    ways = ways_to_fit(two.params, two, frozen)
    assert [way.means for way in ways] == ladder
    means, least, clips = ways[0]
    alone, a_few, most = (two.fine_tuning(means, count).least + frozen for count in (1, 2, clips[0]))
    assert least == alone and clips == sorted(clips)
    assert most <= SIZES[0] * 1e9 / MARGIN < most + 2 * (most - a_few) / (clips[0] - 2)  # two more would not fit
    gradients = two.fine_tuning(means, 1).gradients  # which have gone when activations come, or the other way round
    assert ways_to_fit(one.params, one, frozen + gradients)[0].clips == clips
    assert ways_to_fit(two.params, two, 80 * 10**9)[0].clips == [0, 0, 0]


def test_every_stage_that_computes_on_a_gpu_is_counted(toy: Account, models: Models) -> None:
    held = {stage.name: (stage, held_of(stage, toy)) for stage in stages_of(toy.params, models.data, models)}
    assert all(of.activations > 0 for _, of in held.values())
    for stage, of in held.values():
        trained = sum(map(parameters, stage.trained))
        assert (of.gradients, of.moments, of.average) == (4 * trained, 8 * trained, 4 * trained)
        assert of.weights >= 4 * (trained + sum(map(parameters, stage.frozen)))
    assert changed(toy, "encode", batch=64).passes("encode") == 4 * held["encode"][1].activations


def test_what_acting_decodes_is_counted_as_it_is_bounded(toy: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips, or their last frames, of a context of generations, and references that are reconstructions."""
    decoded, frames = list[tuple[int, int]](), toy.params.finetune_video.frames
    whole, counted = Autoencoder.decode_pixels, memory.widest

    def decode(self: Autoencoder, latents: Tensor, length: int = 1) -> Tensor:
        decoded.append((len(latents), length))
        return whole(self, latents, length)

    monkeypatch.setattr(Autoencoder, "decode_pixels", decode)
    monkeypatch.setattr(memory, "widest", lambda module, call: 0 if module is toy.models.video else counted(module, call))
    monkeypatch.setattr(memory, "frames_within", lambda size: 2 * frames + 1)
    acting = changed(toy, "evaluate", batch=16)
    alone = acting.passes("evaluate")
    assert alone == changed(toy, "evaluate", batch=2 * frames + 1).passes("evaluate") and not decoded
    changed(acting, "cache_teacher", reference="reconstruction").passes("evaluate")
    acting.models = copy(toy.models)
    for entry in ("generated", "goal_frame"):
        acting.models.entries = [entry]
        assert acting.passes("evaluate") >= alone
    assert decoded == [(2 * frames + 1, 1), (2 * frames, frames), (2 * frames + 1, 1)]


def test_it_says_what_this_machine_lacks(toy: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_card = changed(toy, "machine", device="auto")
    params = on_a_card.params
    monkeypatch.setattr(agreement, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not list(short_of(toy.params, 10**9))  # that asks for the CPU
    said = list(short_of(changed(on_a_card, "finetune_video", moments="int8", lora_rank=4).params, 10**9))
    assert len(said) == 3 and "moments is 'int8', but bitsandbytes is not installed: pip install" in said[0]
    assert "lora_rank is 4, but peft is not installed" in said[1] and "torch sees no GPU" in said[2]
    (once,) = short_of(changed(toy, "machine", device="cuda").params, 10**9)
    assert once.startswith("machine.device is 'cuda', but torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = type("Card", (), {"total_memory": 24 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    assert not list(short_of(params, 23 * 10**9))
    assert "the GPU has 24.0 GB, a stage holds at least 25.0" in next(short_of(params, 25 * 10**9))


@pytest.mark.parametrize("card, fine_tuning", [
    ("rtx3090", "take another row of the table above"), ("cpu", "lower the batch of its training and raise accumulate"),
])  # fmt: skip
def test_what_does_not_fit_names_what_helps(
    card: str, fine_tuning: str, toy: Account, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a table only where there is one: cards are compared, and a processor is none."""
    monkeypatch.setattr(plan, "CARDS", {card: (71e12, 1e-6)})
    monkeypatch.setattr(plan, "Models", lambda *_: models)
    monkeypatch.setattr(plan, "Account", lambda *_: toy)
    monkeypatch.setattr(plan, "held_of", lambda *_: Held(10**8))
    monkeypatch.setattr(plan, "ways_to_fit", lambda *_: [])
    said = plan.report(toy.params, models.data, card, 0.15, tmp_path)
    assert ("fine-tuning with" in said) == (card != "cpu")
    for stage, helps in (
        ("prepare_backbones_text", "lower the batch of its training and raise accumulate"),
        ("encode", "lower encode.batch"), ("finetune_video", fine_tuning),
        ("cache_teacher@semantic", "lower cache_teacher.batch"), ("evaluate (at most)", "lower evaluate.batch"),
        ("foresight (at most)", "lower foresight.batch"), ("foresight, attention", "lower foresight.batch"),
    ):  # fmt: skip
        least = rf"does not fit: {re.escape(stage)} holds at least 0\.1 GB, a {card} has 1e-06"
        assert re.search(f"{least}: {helps}, or take another --card", said), stage


def test_the_bound_of_published_sizes_is_below_what_was_measured_and_near_it() -> None:
    """SVD's U-Net, four clips of 16 frames of 32 x 32 latents, no average: an H200 took 70 GB."""
    params, _ = with_overlay(overlay_of("paper-metaworld"), ROOT / "params.yaml", "paper-metaworld")
    training = params.finetune_video.training.model_copy(update={"accumulate": 1})
    params = params.model_copy(update={"finetune_video": params.finetune_video.model_copy(update={"training": training})})
    assert 0.95 * 70 < Account(params, estimated(params, None, None)).fine_tuning(Means(), 4).least / 1e9 < 70
