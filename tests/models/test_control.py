"""The policy made ready for control: what a GPU would do of it, as far as a CPU can show it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from svam.episodes.store import EpisodeStore
from svam.models import control
from svam.models.svam import SVAM
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
