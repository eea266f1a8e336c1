"""The policy made ready for control: what a GPU would do of it, as far as a CPU can show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from svam.benchmark.gpu import untrained
from svam.device import branch_of_graph
from svam.episodes.store import EpisodeStore
from svam.models import control
from svam.models.depth_anything_3 import NETS, DepthAnything3, DepthAnything3Config
from svam.models.svam import SVAM, Inputs
from svam.presets.models import PUBLISHED
from svam.presets.overlay import overlay_of, with_overlay
from tests import ROOT
from tests.tiny import make_svam, observations

SEEDS = [3, 4]


@pytest.fixture
def svam(store: EpisodeStore, folders: dict[str, Path]) -> SVAM:
    context = ["one_step", "geometric", "observation"]
    return make_svam(store, folders, proprioception=True, encode_bf16=True, context=context, sentence="pooled")


class Played:
    """In the place of `Graph`: the function itself, which counts its calls."""

    calls = 0

    def __init__(self, function: Callable[..., Sequence[Tensor]], examples: Sequence[Tensor]) -> None:
        self.function, self.shapes = function, [(example.shape, example.dtype) for example in examples]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        assert [(given.shape, given.dtype) for given in inputs] == self.shapes
        Played.calls += 1
        return list(self.function(*inputs))


class NoCopies(TorchDispatchMode):
    """Refuses tensors that are made of Python's numbers and numbers that are read from tensors: on a GPU each is a copy between
    host and card, for which the host waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in ("lift_fresh", "_local_scalar_dense", "nonzero")), func
        return func(*args, **(kwargs or {}))


def test_a_cpu_keeps_its_bits(svam: SVAM, store: EpisodeStore) -> None:
    seen = observations(store, 2, proprioception=True)
    before = svam.act(seen, SEEDS)
    assert control.for_control(svam, torch.device("cpu")) is svam
    np.testing.assert_array_equal(svam.act(seen, SEEDS), before)


def test_bfloat16_weights_stay_within_the_stated_tolerance(
    svam: SVAM, store: EpisodeStore, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a processor that only emulates it."""
    monkeypatch.setattr("svam.precision.computes_bfloat16", lambda device: True)
    seen = observations(store, 4, proprioception=True)
    exact = make_svam(store, folders, proprioception=True, context=svam.config.context, sentence="pooled")
    actions = exact.act(seen)
    control.to_bfloat16(svam)
    assert {p.dtype for p in svam.foresight.parameters()} == {torch.float32, torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in svam.network.diffusion.decoder.parameters())
    encoded, truth = svam.encode(seen).entries, exact.encode(seen).entries
    for entry, values in truth.items():
        cosine = nn.functional.cosine_similarity(encoded[entry].float(), values.float(), dim=-1)
        assert cosine.mean() > 0.999, (entry, cosine.mean())
    span = np.asarray(store.statistics.actions.max) - np.asarray(store.statistics.actions.min)
    difference = np.abs(svam.act(seen) - actions) / span
    assert 0.0 < difference.max() < 0.01, difference.max()


def test_what_one_step_does_not_run_is_dropped(store: EpisodeStore, folders: dict[str, Path]) -> None:
    for context, left in ((["one_step"], 1), (["one_step", "goal_frame"], 2)):
        svam = make_svam(store, folders, context=context)
        before = svam.act(observations(store, 2))
        control.drop_unused(svam)
        assert len(svam.foresight.video_model.unet.up_blocks) == left
        np.testing.assert_array_equal(svam.act(observations(store, 2)), before)


def test_graphs_are_played_for_their_batch_and_nothing_else(
    svam: SVAM, store: EpisodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "Graph", Played)
    seen = observations(store, 3, proprioception=True)
    two, three = svam.act(seen[:2], SEEDS), svam.act(seen, [*SEEDS, 5])
    control.record(svam, 2)
    Played.calls = 0
    np.testing.assert_array_equal(svam.act(seen[:2], SEEDS), two)
    assert Played.calls == 2  # foresight and actions
    np.testing.assert_array_equal(svam.act(seen, [*SEEDS, 5]), three)
    frames = np.stack([observation.frames[svam.cameras[0]] for observation in seen[:2]])
    assert set(svam.encode_frames(frames, ["push a"] * 2, ["one_step"], SEEDS).entries) == {"one_step"}
    assert Played.calls == 2


def test_a_policy_of_several_sets_is_recorded_at_its_own_width(
    svam: SVAM, store: EpisodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is that of the widest set."""
    monkeypatch.setattr(control, "Graph", Played)
    seen = observations(store, 2, proprioception=True)
    config = svam.config.model_copy(update={"action_dimensions": 1 + svam.statistics.convention.dimensions})
    wide = SVAM(config, svam.statistics, svam.foresight)
    before = wide.act(seen, SEEDS)
    control.record(wide, 2)
    Played.calls = 0
    np.testing.assert_array_equal(wide.act(seen, SEEDS), before)
    assert Played.calls == 2


@pytest.mark.parametrize("context", [["observation"], ["generated"], ["geometric", "semantic", "one_step"]], ids="+".join)
def test_a_pass_copies_nothing_between_host_and_card(context: list[str], store: EpisodeStore, folders: dict[str, Path]) -> None:
    """A CUDA graph cannot hold a copy from the host's memory."""
    svam = make_svam(store, folders, context=context)
    inputs = svam.encode(observations(store, 2))
    entries = svam.config.frozen_entries
    noise = svam.foresight.video_model.initial_noise(SEEDS) if svam.foresight.video else None
    frames = torch.zeros(2, *svam.config.image_size, 3, dtype=torch.uint8)
    actions = torch.zeros(2, svam.config.chunk, svam.statistics.convention.dimensions)
    with NoCopies():
        svam.foresight.foresee(frames, inputs.text, noise, entries)
        svam.network.denoise(inputs, actions)
    for copies in (lambda: frames.new_tensor([1, 2]), lambda: float(frames.sum())):
        with pytest.raises(AssertionError), NoCopies():
            copies()


def test_the_compiled_passes_are_whole_and_only_compiled_within(
    store: EpisodeStore, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced without a break, which would be a launch from Python; what the compiler makes of it is its own business. Some
    seconds for tracing the U-Net."""
    svam = make_svam(store, folders, proprioception=True)
    seen = observations(store, 1, proprioception=True)
    before = svam.act(seen)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    counted = torch._dynamo.utils.counters["stats"]
    with control.compiled_passes(svam):
        traced = counted["unique_graphs"]
        np.testing.assert_allclose(svam.act(seen), before, atol=1e-5)
        assert counted["unique_graphs"] > traced
    traced = counted["unique_graphs"]
    np.testing.assert_array_equal(svam.act(seen), before)
    assert counted["unique_graphs"] == traced and "raw" not in vars(svam.foresight.video_model)


TINY = {
    "collect.image_size": 128, "prepare_backbones.geometric.image_size": 56, "prepare_backbones.semantic.image_size": 56,
    "generate.grid": 4, "generate.steps": 2, "finetune_video.frames": 4, "distill.width": 32, "distill.blocks": 1,
    "distill.heads": 2, "train_policy.perceiver.width": 32, "train_policy.perceiver.depth": 1,
    "train_policy.perceiver.heads": 2, "train_policy.perceiver.head_width": 16, "train_policy.perceiver.embedding": 64,
    "train_policy.transformer.width": 32, "train_policy.transformer.heads": 2,
    "train_policy.transformer.encoder_layers": 1, "train_policy.transformer.decoder_layers": 1,
}  # fmt: skip
"""Sizes in the place of a preset's. Frames so large that the U-Net's lowest level has groups of more than two values, whose
norm no rounding turns round."""


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> SVAM:
    """The preset's policy of its own kinds of parts, untrained and tiny."""
    vit = Dinov2WithRegistersConfig(image_size=518, patch_size=14, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    clip = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, projection_dim=24
    )  # fmt: skip
    tiny: dict[tuple[str, str], Callable[[], Any]] = {
        ("autoencoder", "stable-video-diffusion-img2vid"): lambda: AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(32,) * 4, layers_per_block=1
        ),
        ("unet", "stable-video-diffusion-img2vid"): lambda: UNetSpatioTemporalConditionModel(
            in_channels=8, block_out_channels=(32, 64, 64, 64), num_attention_heads=(1, 2, 2, 2), cross_attention_dim=64,
            layers_per_block=1, addition_time_embed_dim=32, projection_class_embeddings_input_dim=96,
        ),
        ("text", "clip-vit-base-patch32"): lambda: CLIPTextModelWithProjection(clip),
        ("teacher", "dinov2-with-registers-base"): lambda: Dinov2WithRegistersModel(vit),
        ("teacher", "DA3-LARGE"): lambda: DepthAnything3(DepthAnything3Config(**NETS["da3-large"], width=64)),
    }  # fmt: skip
    for key, build in tiny.items():
        monkeypatch.setitem(PUBLISHED, key, build)
    torch.manual_seed(0)
    params = with_overlay(overlay_of("paper-metaworld") | TINY, ROOT / "params.yaml", "paper-metaworld")[0]
    return untrained(params, torch.device("cpu"))


def control_inputs(svam: SVAM, device: str) -> list[Any]:
    """Of `foresee`: a frame, a sentence, noise and the policy's entries; and the shape of the sampler's noise."""
    video = svam.foresight.video_model.config
    frame = torch.zeros(1, *svam.config.image_size, 3, dtype=torch.uint8, device=device)
    text = torch.zeros(1, video.text_tokens, video.text_width, device=device)
    return [frame, text, torch.zeros(1, *video.clip_shape, device=device), svam.config.frozen_entries]


def test_the_presets_parts_copy_nothing_and_are_recorded(preset: SVAM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [preset.example()]
    inputs = preset.encode(seen)
    actions = torch.zeros(1, preset.config.chunk, preset.statistics.convention.dimensions)
    with NoCopies():
        preset.foresight.foresee(*control_inputs(preset, "cpu"))
        preset.network.denoise(inputs, actions)
    monkeypatch.setattr(control, "Graph", Played)
    before = preset.act(seen, SEEDS[:1])
    control.record(preset, 1)
    Played.calls = 0
    np.testing.assert_array_equal(preset.act(seen, SEEDS[:1]), before)
    assert Played.calls == 2


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of several devices, but for single numbers, which a launch takes along."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, found)) if isinstance(t, Tensor) and t.ndim]
        assert len({t.device for t in tensors}) < 2, func
        return found


def test_the_presets_parts_make_no_tensor_in_the_hosts_memory(preset: SVAM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would be sent to the card in every pass. Here torch's meta device is the card; it has no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    preset.to(torch.device("meta"))
    foresight = preset.foresight
    foresight.sampler = foresight.sampler.model_copy(update={"bf16": False})
    shape = (1, preset.config.chunk, preset.statistics.convention.dimensions)
    with torch.no_grad(), OneDevice():
        entries = foresight.foresee(*control_inputs(preset, "meta"))
        text = torch.zeros(1, *preset.network.config.text, device="meta")
        preset.network.denoise(Inputs(entries, text), torch.zeros(shape, device="meta"))
    with pytest.raises(AssertionError), OneDevice():
        torch.zeros(2).to("meta")


def test_the_presets_parts_stay_within_the_stated_tolerance(preset: SVAM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bfloat16 weights, as on a GPU."""
    monkeypatch.setattr("svam.precision.computes_bfloat16", lambda device: True)
    seen, sampler = [preset.example()], preset.foresight.sampler
    assert sampler.bf16
    preset.foresight.sampler = sampler.model_copy(update={"bf16": False})
    truth, actions = preset.encode(seen).entries, preset.act(seen)
    preset.foresight.sampler = sampler
    control.to_bfloat16(preset)
    encoded = preset.encode(seen).entries
    assert set(truth) == {"geometric", "semantic", "one_step"}
    for entry, values in truth.items():
        cosine = nn.functional.cosine_similarity(encoded[entry].float(), values.float(), dim=-1).mean()
        assert 0.999 < cosine < 1.0, (entry, cosine)
    assert 0.0 < np.abs(preset.act(seen) - actions).max() / 2.0 < 0.01


def test_teachers_are_a_branch_of_the_graph(svam: SVAM, store: EpisodeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the video model, and joined before the decouplers use what they saw. Streams are stand-ins."""
    foresight, happened = svam.foresight, list[str]()

    class Stream:
        def __init__(self, name: str = "branch") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            happened.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        happened.append(f"on {stream.name}")
        yield
        happened.append(f"off {stream.name}")

    def noted(name: str) -> Callable[..., Any]:
        method = getattr(foresight, name)
        return lambda *given: happened.append(name) or method(*given)  # type: ignore[func-returns-value]

    text, entries = svam.encode(observations(store, 1, proprioception=True)).text, svam.config.frozen_entries
    text = torch.zeros(1, foresight.text.tokens, foresight.text.width) if text.shape[1] == 1 else text
    frames = torch.zeros(1, *svam.config.image_size, 3, dtype=torch.uint8)
    given = (frames, text, foresight.video_model.initial_noise([0]), entries)
    before = foresight.foresee(*given)
    for name in ("reference_features", "one_step", "decouple"):
        monkeypatch.setattr(foresight, name, noted(name))
    monkeypatch.setattr("svam.models.foresight.branch_of_graph", lambda _: branch_of_graph(torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("trunk"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    after = foresight.foresee(*given)
    assert happened == [
        "branch waits for trunk", "on branch", "reference_features", "off branch", "one_step", "trunk waits for branch",
        "decouple",
    ]  # fmt: skip
    assert all(torch.equal(after[entry], values) for entry, values in before.items())
