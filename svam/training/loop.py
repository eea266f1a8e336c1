"""The one training loop: loss, finite check, backward, clip, step, schedule, EMA. Every trained part goes through it.

The averaged (EMA) weights are what is evaluated, selected and left in the module at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from dvclive import Live
from torch import Tensor, nn

from svam.machine import progress_bar
from svam.params import Optimiser


class DivergedError(ValueError):
    """The loss became NaN or infinite; the message names the part and the step."""


def learning_rate_factor(step: int, optimiser: Optimiser) -> float:
    """Linear warm-up to 1, then half a cosine to 0; `step` counts from 0."""
    if step < optimiser.warmup:
        return (step + 1) / (optimiser.warmup + 1)
    share = (step - optimiser.warmup) / max(1, optimiser.steps - optimiser.warmup)
    return 0.5 * (1.0 + math.cos(math.pi * share))


class AveragedWeights:
    """Exponential moving average of a module's trained parameters, with the usual slow start min(decay, (1+n)/(10+n))."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.decay = decay
        self.updates = 0
        self.average = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module holds the average; afterwards the training weights again."""
        kept = [p.detach().clone() for p in self.parameters]
        self.copy_to_module(self.average)
        try:
            yield
        finally:
            self.copy_to_module(kept)

    @torch.no_grad()
    def copy_to_module(self, values: list[Tensor]) -> None:
        """Overwrite the module's parameters with `values`."""
        torch._foreach_copy_(self.parameters, values)


def decayed_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: weight decay on matrices and kernels, none on biases, gains and single vectors."""
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def fit(
    module: nn.Module,
    loss: Callable[[Any], Tensor],
    batches: Iterator[Any],
    optimiser: Optimiser,
    device: torch.device,
    name: str,
    live_dir: Path | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    select: str | None = None,
) -> dict[str, float]:
    """Train `module` in place and leave the averaged weights in it.

    Args:
        loss: a batch -> scalar tensor; runs under bf16 autocast where `optimiser.bf16`.
        batches: endless iterator; `optimiser.accumulate` batches make one step.
        live_dir: where DVCLive streams `metrics.json` and curves (a DVC out of the stage).
        evaluate: called every `evaluate_every` steps and at the end, with the averaged weights in place.
        select: name of the evaluated value whose lowest point decides which averaged weights are kept; None keeps the last.

    Returns:
        The values of the kept evaluation (empty without `evaluate`).

    Raises:
        DivergedError: the loss is not finite.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = decayed_groups(parameters, optimiser.weight_decay)
    adam = torch.optim.AdamW(groups, lr=optimiser.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: learning_rate_factor(step, optimiser))
    average = AveragedWeights(parameters, optimiser.ema)
    live = Live(str(live_dir), save_dvc_exp=False, dvcyaml=None, report=None) if live_dir else None
    kept: dict[str, float] = {}
    best: list[Tensor] | None = None
    log_every = max(1, optimiser.steps // 100)
    recent = 0.0

    with progress_bar() as bar:
        task = bar.add_task(name, total=optimiser.steps, note="")
        for step in range(1, optimiser.steps + 1):
            module.train()
            value = _train_step(module, loss, batches, optimiser, device, adam, parameters, f"{name} step {step}")
            schedule.step()
            average.update()
            recent = value if step == 1 else 0.95 * recent + 0.05 * value
            bar.update(task, note=f"loss {recent:.4f}")
            bar.advance(task)
            last = step == optimiser.steps
            if live and (step % log_every == 0 or last):
                live.log_metric("train/loss", recent)
                live.log_metric("train/learning_rate", float(schedule.get_last_lr()[0]))
            if evaluate and (last or (evaluate_every and step % evaluate_every == 0)):
                module.eval()
                with average.applied():
                    values = evaluate()
                if select is None or not kept or values[select] < kept[select]:
                    kept = {**values, "step": float(step)}
                    best = [a.clone() for a in average.average] if select else None
                if live:
                    for key, number in values.items():
                        live.log_metric(f"held_out/{key}", number)
            if live and (step % log_every == 0 or last):
                live.step = step
                live.make_summary()
    average.copy_to_module(best if best is not None else average.average)
    module.eval()
    if live:
        live.end()
    return kept


def _train_step(
    module: nn.Module,
    loss: Callable[[Any], Tensor],
    batches: Iterator[Any],
    optimiser: Optimiser,
    device: torch.device,
    adam: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    where: str,
) -> float:
    """One optimiser step over `accumulate` batches; returns the mean loss."""
    adam.zero_grad(set_to_none=True)
    total = 0.0
    for _ in range(optimiser.accumulate):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=optimiser.bf16):
            value = loss(next(batches))
        if not torch.isfinite(value):
            raise DivergedError(f"{where}: the loss is {value.item()}; lower the learning rate or look at the data")
        (value / optimiser.accumulate).backward()  # type: ignore[no-untyped-call]
        total += value.item() / optimiser.accumulate
    nn.utils.clip_grad_norm_(parameters, optimiser.clip)
    adam.step()
    return total
