"""A machine that is shared: steps of video fine-tuning beside another process that keeps all cores busy, against alone.

OpenMP's threads wait for one another many times in a step. By default they spin while they wait, which costs nothing on a quiet
machine; on a busy one they spin on the cores that the thread they wait for needs. `GOMP_SPINCOUNT` says for how long
(300,000 is what GNU's OpenMP does by itself, 0 is what `OMP_WAIT_POLICY=PASSIVE` does, which `svam` sets).
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from svam.benchmark.inputs import Inputs
from svam.benchmark.timing import in_turn, ratio_of, rounded
from svam.console import console
from svam.device import become_worker, mixed_precision
from svam.params import Params

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.synchronize import Event

SPINNING = 300_000
"""What GNU's OpenMP does by itself."""
PASSIVE = 0
WARM_UP = 3
"""Steps before those that are timed."""


@contextmanager
def spin_count(value: int) -> Iterator[None]:
    """Processes that begin within the block spin that often. It is read when torch is imported."""
    os.environ["GOMP_SPINCOUNT"] = str(value)
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]


class Training:
    """Fine-tuning of the video model that the params describe, on noise instead of clips: the arithmetic is the same."""

    def __init__(self, params: Params) -> None:
        import torch

        from svam.models.video import VideoConfig, build_unet

        section, encoder = params.finetune_video, params.prepare_backbones.autoencoder
        torch.set_num_threads(params.threads)
        torch.backends.cuda.enable_flash_sdp(False)
        side = params.collect.image_size // 2 ** len(encoder.channels[1:])
        channels, text = encoder.latent_channels, params.prepare_backbones.text
        config = VideoConfig.model_construct(
            frames=section.frames, latent_channels=channels, latent_size=(side, side), text_width=text.width
        )
        unet = build_unet(section.unet, config)
        batch = section.training.batch
        self.unet, self.bf16 = unet.train(), section.training.bf16
        self.adam = torch.optim.AdamW(unet.parameters(), fused=True)
        random = torch.Generator().manual_seed(params.seed)
        self.clips = torch.randn(batch, section.frames, 2 * channels, side, side, generator=random)
        self.text = torch.randn(batch, text.tokens, unet.config["cross_attention_dim"], generator=random)
        self.ids = torch.tensor([[6.0, 127.0, 0.02]]).repeat(batch, 1)
        self.level = torch.zeros(batch)

    def step(self) -> None:
        """Forward, backward, optimiser."""
        import torch

        self.adam.zero_grad(set_to_none=True)
        with mixed_precision(torch.device("cpu"), self.bf16):
            output = self.unet(self.clips, self.level, self.text, added_time_ids=self.ids).sample
            loss = output.float().square().mean()
        loss.backward()
        self.adam.step()


_training: list[Training] = []


def _begin(params: Params) -> None:
    become_worker()
    _training.append(Training(params))
    for _ in range(WARM_UP):
        _training[0].step()


def _seconds(steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        _training[0].step()
    return time.perf_counter() - start


def _keep_busy(params: Params, running: Event, stop: Event) -> None:
    become_worker()
    training = Training(params)
    training.step()
    while not stop.is_set():
        if running.wait(0.2):
            training.step()


def sharing(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Seconds of `sharing_steps` steps, alone and beside a training of somebody else's, which spins; passive and spinning."""
    context, settings = multiprocessing.get_context("spawn"), params.benchmark
    with ExitStack() as stack:
        running, stop = context.Event(), context.Event()
        with spin_count(SPINNING):
            other = context.Process(target=_keep_busy, args=(params, running, stop), daemon=True)
            other.start()
        stack.callback(other.join)
        stack.callback(stop.set)
        pools = {}
        for name, count in (("passive", PASSIVE), ("spinning", SPINNING)):
            with spin_count(count):
                pools[name] = stack.enter_context(ProcessPoolExecutor(1, context, _begin, (params,)))
                pools[name].submit(int).result()

        def measured(name: str, busy: bool, _: int) -> float:
            if busy:
                running.set()
            time.sleep(2.0)  # the other one has begun, or has ended its step
            seconds = pools[name].submit(_seconds, settings.sharing_steps).result()
            running.clear()
            return float(seconds)

        pairs = [(name, busy) for name in pools for busy in (False, True)]
        works = {f"{name}{', beside another' if busy else ''}": partial(measured, name, busy) for name, busy in pairs}
        seconds = in_turn(works, settings.repeats, warm=False)
    results = {
        "passive, beside another against alone": ratio_of(seconds, "passive, beside another", "passive"),
        "spinning, beside another against alone": ratio_of(seconds, "spinning, beside another", "spinning"),
        "alone, passive against spinning": ratio_of(seconds, "passive", "spinning"),
    }
    console.print(results, highlight=False)
    return {"steps": settings.sharing_steps, "ratios": results, "seconds": rounded(seconds)}
