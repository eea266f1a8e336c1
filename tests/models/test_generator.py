"""Sentences are embedded once, to the same bits whatever came before or beside them; weights may lie in half of the memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from svam import precision
from svam.episodes.store import EpisodeStore
from svam.models import autoencoder, generator
from svam.models.foresight import ForesightModel, FrozenParts
from svam.models.generator import VideoGenerator
from svam.models.video import SamplerConfig
from tests.tiny import make_svam, observations
from tests.tiny_foresight import FRAMES, GRID, SIZE


def test_a_sentence_is_embedded_once_and_to_the_same_bits(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless so many others came since that it was dropped."""
    model = VideoGenerator.load(SamplerConfig(up_blocks=2, grid=2, steps=2, guidance=1.0, bf16=False), folders)
    calls: list[int] = []
    model.text.model.register_forward_hook(lambda *_: calls.append(1))
    together = model.embed_text(["push", "pull", "push"])
    assert len(calls) == 2
    assert torch.equal(together[0], together[2]) and not torch.equal(together[0], together[1])
    assert torch.equal(model.embed_text(["pull"]), together[1:2]) and len(calls) == 2
    model.embed_text(["push"]).zero_()  # what was given away is the caller's own
    assert torch.equal(model.embed_text(["push"]), model.text.embed(["push"]))

    monkeypatch.setattr(generator, "SENTENCES", 2)
    calls.clear()
    model.embed_text(["push a"])
    assert torch.equal(model.embed_text(["push"]), together[:1]) and len(calls) == 1
    assert torch.equal(model.embed_text(["pull"]), together[1:2]) and len(calls) == 2


def test_frozen_on_a_device_half_of_the_memory_holds_the_same_numbers(
    folders: dict[str, Path], store: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a policy is saved with the weights that were read."""
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: True)
    monkeypatch.setattr(generator, "computes_bfloat16", lambda _: True)
    exact, rounded = make_svam(store, folders), make_svam(store, folders)
    for svam in (exact, rounded):
        svam.foresight.sampler = svam.foresight.sampler.model_copy(update={"bf16": True})
    rounded.foresight.frozen_on(torch.device("cpu"))
    linear = [m for m in rounded.foresight.video_model.modules() if isinstance(m, precision.MATRICES)]
    assert linear and {layer.weight.dtype for layer in linear} == {torch.bfloat16}
    seen = observations(store, 2)
    entries, others = (svam.encode(seen, [0, 1]).entries for svam in (exact, rounded))
    assert entries and all(torch.equal(entries[name], others[name]) for name in entries)
    exact.save(tmp_path / "exact")
    rounded.save(tmp_path / "rounded", folders)
    files = {file.relative_to(tmp_path / "exact") for file in (tmp_path / "exact").rglob("*") if file.is_file()}
    assert files and all((tmp_path / "exact" / f).read_bytes() == (tmp_path / "rounded" / f).read_bytes() for f in files)


def test_on_a_gpu_frozen_networks_are_compiled_where_they_are_put(
    folders: dict[str, Path], store: EpisodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured as graphs, which here run as they are, and give the same numbers."""
    svam, graphs = make_svam(store, folders), list[Any]()

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    seen = observations(store, 2)
    eager = svam.encode(seen, [0, 1]).entries
    for compiled, beside in ((True, False), (False, True), (True, True)):
        monkeypatch.setattr(generator, "computes_beside", lambda _, beside=beside: beside)
        model = svam.foresight.frozen_on(torch.device("cpu"), compiled)
        entries = svam.encode(seen, [0, 1]).entries
        assert bool(graphs) == (compiled and beside)
    assert {"video", "decouplers"} == {
        name.partition(".")[0] for name, module in model.named_modules() if module._compiled_call_impl is not None
    }
    assert len(eager) == 3
    for name, values in eager.items():
        torch.testing.assert_close(entries[name], values)


def test_frames_go_through_the_autoencoder_a_bounded_number_at_a_time(
    folders: dict[str, Path], store: EpisodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whole clips, where acting decodes; what comes out is what all at once give."""
    sampler, entries = SamplerConfig(up_blocks=1, grid=GRID, steps=2, guidance=1.0, bf16=False), ["generated", "geometric"]
    seen = torch.from_numpy(store.frames(np.arange(4)))

    def encode() -> dict[str, torch.Tensor]:
        model = ForesightModel.load_parts(FrozenParts.of_entries(entries), sampler, folders)
        assert model.reference == "reconstruction"
        for half in ("encoder", "decoder"):
            getattr(model.frame_autoencoder.model, half).register_forward_pre_hook(
                lambda _, inputs, half=half: taken[half].append(len(inputs[0]))
            )
        return dict(model.encode(seen, ["push a"] * 4, entries, [0] * 4).entries)

    taken: dict[str, list[int]] = {"encoder": [], "decoder": []}
    whole = encode()
    assert taken == {"encoder": [4, 4], "decoder": [4, 4 * FRAMES]}
    taken = {"encoder": [], "decoder": []}
    monkeypatch.setattr(autoencoder, "PIXELS", (FRAMES + 1) * SIZE * SIZE - 1)
    parts = encode()
    assert taken == {"encoder": [3, 2, 3, 2], "decoder": [3, 1, *[FRAMES] * 4]}  # a frame alone is encoded as two
    for entry in entries:
        torch.testing.assert_close(parts[entry], whole[entry], rtol=1e-3, atol=1e-3)
