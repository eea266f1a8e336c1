"""How long the components of a model take, as the published latency table names them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

COMPONENTS = {
    "embed_text": "autoencoder_and_text", "condition": "autoencoder_and_text", "one_step": "video_model",
    "generate": "video_model", "reference_features": "teachers", "decouple": "decouplers",
}  # fmt: skip
"""Methods of the foresight model, and the component each is counted under."""


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds spent inside to `times[name]`; on a GPU those of the work, not of its start."""
    synchronise: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None  # type: ignore[no-untyped-call]
    synchronise()
    start = time.perf_counter()
    yield
    synchronise()
    times[name] = times.get(name, 0.0) + time.perf_counter() - start


@contextmanager
def timed_components(foresight: nn.Module, times: dict[str, float]) -> Iterator[None]:
    """Within the block, add the seconds of each component of a foresight model to `times`."""

    def watched(method: Callable[..., Any], component: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with timed(times, component):
                return method(*args, **kwargs)

        return call

    for name, component in COMPONENTS.items():
        setattr(foresight, name, watched(getattr(foresight, name), component))
    try:
        yield
    finally:
        for name in COMPONENTS:
            delattr(foresight, name)
