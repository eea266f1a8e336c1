"""The one training loop: loss, finite check, backward, clip, step, schedule, EMA. Every trained part goes through it.

The averaged (EMA) weights are what is evaluated, selected and left in the module at the end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svam import processes, shares
from svam.console import progress_bar, timed
from svam.device import compile_layers, computes_beside
from svam.errors import MachineError, SvamError
from svam.params import Machine, Moments, Optimiser
from svam.precision import mixed_precision
from svam.resume import NO_RESUME, Resume
from svam.seeds import seed_of
from svam.training.state import AveragedWeights, Curves, TrainingState

if TYPE_CHECKING:
    from svam.training.sharding import Shards

AHEAD = 2
"""Batches that are made while one is being used."""


class SharedLoss(nn.Module):
    """The loss as the forward pass of a module that holds what is trained, which is what several processes share."""

    def __init__(self, module: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(batch)


class DivergedError(SvamError, ValueError):
    """The loss became NaN or infinite; the message names the part and the step."""


def learning_rate_factor(step: int, optimiser: Optimiser) -> float:
    """Linear warm-up to 1, then half a cosine to 0, or a constant 1; `step` counts from 0."""
    if step < optimiser.warmup:
        return (step + 1) / (optimiser.warmup + 1)
    if optimiser.schedule == "constant":
        return 1.0
    share = (step - optimiser.warmup) / max(1, optimiser.steps - optimiser.warmup)
    return 0.5 * (1.0 + math.cos(math.pi * share))


def decayed_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: weight decay on matrices and kernels, none on biases, gains and single vectors."""
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(parameters: list[nn.Parameter], optimiser: Optimiser, moments: Moments) -> torch.optim.Optimizer:
    """AdamW, fused; with moments of 8 bits bitsandbytes' (Dettmers et al. 2022), where blocks of 256 values share a scale and
    tensors of less than 4096 values keep float32 moments.

    Raises:
        MachineError: 8-bit moments without bitsandbytes.
    """
    groups, betas = decayed_groups(parameters, optimiser.weight_decay), (optimiser.betas[0], optimiser.betas[1])
    if moments == "float32":
        return torch.optim.AdamW(groups, lr=optimiser.learning_rate, betas=betas, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise MachineError(
            "finetune_video.moments is 'int8', but bitsandbytes is not installed: pip install -c constraints.txt -e '.[cards]' "
            "brings it, or set moments to float32"
        ) from None
    eight_bit: torch.optim.Optimizer = AdamW8bit(groups, lr=optimiser.learning_rate, betas=betas)
    return eight_bit


def made_ahead(batch_of: Callable[[int], Any], numbers: range) -> Generator[Any, None, None]:
    """`batch_of` of each number, made by one thread beside what is done with the batches before; it raises what that raises.

    torch computes in one thread of it: with a second set of OpenMP threads there would be more of them than cores, and then all
    of them sleep at every wait (GNU's OpenMP). A step of the video model took 0.51 s so and takes 0.39 s, one of the policy
    0.16 and 0.12 (two cores, in pairs).
    """
    pool = ThreadPoolExecutor(1, "batches", torch.set_num_threads, (1,))
    try:
        waiting = deque(pool.submit(batch_of, number) for number in numbers[:AHEAD])
        for number in numbers:
            batch = waiting.popleft().result()
            if number + AHEAD in numbers:
                waiting.append(pool.submit(batch_of, number + AHEAD))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def fit(
    module: nn.Module,
    loss: Callable[[Any], Tensor],
    batch_of: Callable[[int], Any],
    optimiser: Optimiser,
    device: torch.device,
    name: str,
    live_dir: Path | None = None,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    select: str | None = None,
    resume: Resume = NO_RESUME,
    machine: Machine | None = None,
    moments: Moments = "float32",
    layers: tuple[type[nn.Module], ...] = (),
    frozen: bool = False,
) -> dict[str, float]:
    """Train `module` in place and leave the averaged weights in it.

    On a GPU the loss is looked at a hundred times in a run, where a point of its curve is due, and to evaluate and to save.
    Other steps wait for no number: the next one is queued while the card computes. On a CPU it is looked at in every step.

    Several processes (`svam.shares`) take equal parts of every batch; the means of their losses and gradients are those of
    the batch. Each holds all weights, or rows of them where `machine.shard`. What a loss draws, it has to draw for the whole
    batch (`svam.shares.share`). Dropout alone draws from another seed in each process: its masks for the whole batch would take
    each of them the time and memory of all rows, in every layer.

    Args:
        loss: a batch -> scalar tensor; runs under bf16 autocast where `optimiser.bf16`.
        batch_of: the n-th batch, from 0 on, or this process's part of it (`own_rows`), a function of n alone, so that
            a resumed run sees the data that it would have seen; `optimiser.accumulate` batches make one step. Another thread
            calls it, ahead of the step, so it must not draw from torch's global random state.
        live_dir: where DVCLive streams `metrics.json` and curves (a DVC out of the stage).
        evaluate: called with the step every `evaluate_every` steps and at the end, with the averaged weights in place.
        select: name of the evaluated value whose lowest point decides which averaged weights are kept; None keeps the last.
        resume: where a killed run's state is found, and this run's is kept. Both runs end with the same bits as one.
        machine: says, on a GPU, where the averaged weights lie and whether layers are compiled, and whether several processes
            keep shards; None: there, and they are not, nor do they.
        moments: how AdamW's two moments are kept.
        layers: kinds of modules whose weights, where they are in shards, are gathered one module at a time; and which are
            compiled so, unless they are computed twice.
        frozen: `batch_of` runs frozen networks. Where layers are compiled it is then this thread that calls it, just before the
            step: torch refuses to run what is compiled while another thread compiles, and a GPU is behind its host anyway.

    Returns:
        The values of the chosen evaluation (empty without `evaluate`).

    Raises:
        DivergedError: the loss is not finite.
        FileError: the state cannot be saved, or another number of processes saved it.
        MachineError: 8-bit moments without the library that computes them.
    """
    shared: nn.Module = SharedLoss(module, loss)
    shards = None
    if machine is not None and machine.shard and processes.count() > 1:
        from svam.training.sharding import Shards

        shards = Shards(shared, layers, device)
    parameters = shards.rows if shards else [p for p in module.parameters() if p.requires_grad]
    adam = adamw(parameters, optimiser, moments)
    host = machine is not None and machine.average == "host" and computes_beside(device)
    compiled = machine is not None and machine.compile and computes_beside(device)
    curves = Curves(live_dir if processes.first() else None)
    state = TrainingState(module, adam, AveragedWeights(parameters, optimiser.ema, host), curves, device, shards=shards)
    seed = torch.initial_seed()
    state.restore(resume)
    if machine is not None and compiled:
        # torch compiles nothing within a checkpoint that it has not met on its way: layers computed twice go with their blocks.
        compile_layers(module, () if machine.checkpointing else layers)
    if shards is None:
        shared = shares.synchronised(shared, device)
    log_every = max(1, optimiser.steps // 100)
    look_every = log_every if computes_beside(device) else 1
    looked, recent = state.step, torch.tensor(state.recent, dtype=torch.float64, device=device)

    numbers = range(state.step * optimiser.accumulate, optimiser.steps * optimiser.accumulate)
    made = (batch_of(n) for n in numbers) if frozen and compiled else made_ahead(batch_of, numbers)
    with progress_bar() as bar, closing(made) as batches:
        task = bar.add_task(name, total=optimiser.steps, completed=state.step, note="")
        for step in range(state.step + 1, optimiser.steps + 1):
            module.train()
            for group in adam.param_groups:
                group["lr"] = optimiser.learning_rate * learning_rate_factor(step - 1, optimiser)
            if processes.count() > 1:
                torch.manual_seed(seed_of(seed, "step", step, processes.number()))
            value = _train_step(shared, batches, optimiser, device, adam, parameters, shards)
            state.average.update()
            recent = value if step == 1 else 0.95 * recent + 0.05 * value
            state.step = step
            last = step == optimiser.steps
            judged = evaluate is not None and (last or (evaluate_every is not None and step % evaluate_every == 0))
            saved = processes.first() and (resume.due() or (last and resume.folder is not None))
            saved = processes.agreed(saved) if shards else saved  # all bring what they keep
            if step % look_every == 0 or last or judged or saved:
                with timed("waiting for the device"):
                    state.recent = recent.item()
                if not math.isfinite(state.recent):
                    at = f"step {step}" if step == looked + 1 else f"steps {looked + 1} to {step}"
                    raise DivergedError(f"{name} {at}: the loss is {state.recent}; lower the learning rate or look at the data")
                looked = step
                bar.update(task, note=f"loss {state.recent:.4f}")
            bar.advance(task)
            if step % log_every == 0 or last:
                rate = optimiser.learning_rate * learning_rate_factor(step, optimiser)
                state.curves.log(step, {"train/loss": state.recent, "train/learning_rate": rate})
            if evaluate is not None and judged:
                module.eval()
                with timed("held-out evaluation"), state.average.applied(), shards.made_whole() if shards else nullcontext():
                    values = processes.from_first(partial(evaluate, step))
                if select is None or not state.chosen or values[select] < state.chosen[select]:
                    state.chosen = {**values, "step": float(step)}
                    state.best = [a.clone() for a in state.average.average] if select else None
                state.curves.log(step, {f"held_out/{key}": number for key, number in values.items()})
            if saved:  # at the end too: what follows, such as measuring, may take long
                with timed("saving"):
                    state.save(resume)
    state.average.copy_to_module(state.best if state.best is not None else state.average.average)
    if shards:
        shards.make_whole()
    module.eval()
    state.curves.end()
    return state.chosen


def _train_step(
    shared: nn.Module,
    batches: Iterator[Any],
    optimiser: Optimiser,
    device: torch.device,
    adam: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    shards: Shards | None,
) -> Tensor:
    """One optimiser step over `accumulate` batches; returns the mean loss, a float64 scalar on the device."""
    adam.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for number in range(optimiser.accumulate):
        with timed("data"):
            batch = next(batches)
        last = number == optimiser.accumulate - 1
        with nullcontext() if last or shards else shares.unsynchronised(shared):  # no process has room for all gradients
            with timed("forward"), mixed_precision(device, optimiser.bf16):
                value = shared(batch)
            with timed("backward"):
                (value / optimiser.accumulate).backward()
        total += value.detach().double() / optimiser.accumulate
    with timed("optimiser"):
        if shards:
            shards.clip(optimiser.clip)
        else:
            nn.utils.clip_grad_norm_(parameters, optimiser.clip)
        adam.step()
    return shares.mean(total)
