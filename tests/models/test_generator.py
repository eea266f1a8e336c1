"""Sentences are embedded once, to the same bits whatever came before or beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svam.models import generator
from svam.models.generator import VideoGenerator
from svam.models.video import SamplerConfig


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
