"""Everything of a training that changes from step to step: what a checkpoint holds, and what a killed run goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svam import processes
from svam.checkpoint import load_tensors, restore, save_tensors
from svam.files import FileError, named_refusals
from svam.resume import Resume

if TYPE_CHECKING:
    from dvclive import Live

    from svam.training.sharding import Shards

RECORD = "training"
"""Name of the checkpoint among the records of a run."""


class AveragedWeights:
    """Exponential moving average of a module's trained parameters, with the usual slow start min(decay, (1+n)/(10+n)).

    With decay 0 it is the parameters themselves and takes no memory. In the host's memory a thread updates it beside the next
    step: a step waits for the copy of the weights alone.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float, host: bool = False) -> None:
        """`host`: the average of a GPU's parameters lies in the host's memory."""
        self.parameters: list[Tensor] = list(parameters)
        self.decay = decay
        self.updates = 0
        self.host = host
        self._average = self.copies() if decay else []
        self._thread = ThreadPoolExecutor(1, "average") if host else None
        self._pending: Future[None] | None = None

    def copies(self) -> list[Tensor]:
        """The current parameters, copied to where the average lies."""
        if not self.host:
            return [p.detach().clone() for p in self.parameters]
        copies = [p.detach().to("cpu", non_blocking=True, copy=True) for p in self.parameters]  # pinned, all under way at once
        torch.cuda.synchronize()
        return copies

    @property
    def average(self) -> list[Tensor]:
        """The averaged parameters."""
        if self._pending is not None:
            self._pending.result()
        return self._average if self.decay else [p.detach() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current parameters."""
        self.updates += 1
        if not self.decay:
            return
        share = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self._thread is None:
            torch._foreach_lerp_(self._average, [p.detach() for p in self.parameters], share)
        else:
            average, copies = self.average, self.copies()
            self._pending = self._thread.submit(torch._foreach_lerp_, average, copies, share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module holds the average; afterwards the training weights again."""
        training = self.copies()
        self.copy_to_module(self.average)
        try:
            yield
        finally:
            self.copy_to_module(training)

    @torch.no_grad()
    def copy_to_module(self, values: list[Tensor]) -> None:
        """Overwrite the module's parameters with `values`."""
        torch._foreach_copy_(self.parameters, values)

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        """Overwrite the average with `values`."""
        torch._foreach_copy_(self.average, values)


class Curves:
    """DVCLive's curves in a folder, or none. All that was logged is remembered: a resumed run writes it again, so the files
    are those of a run that was never interrupted (they hold no times)."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.live: Live | None = None
        if folder:
            from dvclive import Live  # which a training without curves does without

            with named_refusals(folder):
                self.live = Live(str(folder), save_dvc_exp=False, dvcyaml=None, report=None)
        self.history: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one point to the curve of each name. Raises `FileError` if the file system refuses."""
        self.history.append((step, values))
        if self.live and self.folder:
            with named_refusals(self.folder):
                self.live.step = step
                for name, value in values.items():
                    self.live.log_metric(name, value)
                self.live.make_summary()

    def end(self) -> None:
        """Finish the files. Raises `FileError` if the file system refuses."""
        if self.live and self.folder:
            with named_refusals(self.folder):
                self.live.end()


@dataclass
class TrainingState:
    """The module and its optimiser after `step` steps, with what the loop remembers. Of the module it saves what training
    changes, parameters and buffers; frozen parameters are what they were.

    recent: smoothed loss. chosen: values of the chosen evaluation, and best: its averaged weights, where one is selected.
    shards: where weights are in shards; optimiser and average are then of their rows. What is saved is whole all the same, so
    that a run may go on with or without them.
    """

    module: nn.Module
    adam: torch.optim.Optimizer
    average: AveragedWeights
    curves: Curves
    device: torch.device
    step: int = 0
    recent: float = 0.0
    chosen: dict[str, float] = field(default_factory=dict)
    best: list[Tensor] | None = None
    shards: Shards | None = None

    def save(self, resume: Resume) -> None:
        """Keep everything, the random state included; of several processes the first writes. Raises `FileError` if the file
        system refuses."""
        value = {
            "step": self.step, "recent": self.recent, "chosen": self.chosen, "updates": self.average.updates,
            "history": self.curves.history, "processes": processes.count(),
        }  # fmt: skip
        tensors = self._tensors()
        if processes.first():
            resume.save_record(RECORD, value, partial(save_tensors, tensors=tensors))

    def restore(self, resume: Resume) -> None:
        """Go on from what `save` kept; where there is nothing, from the start.

        Raises:
            FileError: another number of processes saved it: what they drew and summed is not what these would have.
        """
        record = resume.load_record(RECORD)
        if record is None or record.file is None:
            return
        if (saved := record.value["processes"]) != processes.count():
            raise FileError(
                f"{record.file}: the number of processes is {processes.count()}, but {saved} saved this state; start as many, "
                f"or delete {record.file.parent} to start over"
            )
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_tensors(record.file).items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = tensor
        self.step, self.recent, self.chosen = record.value["step"], record.value["recent"], record.value["chosen"]
        shards, module = self.shards, groups["module"]
        before = shards.sharded_state_dict(self.module, module) if shards else self.module.state_dict() | module
        restore(self.module, before, record.file)
        parameters = self._of_adam()
        moments: dict[int, dict[str, Any]] = {}
        for name, tensor in groups.get("adam", {}).items():
            number, _, kind = name.partition("/")
            own = shards.own(tensor, parameters[int(number)]) if shards else tensor
            # 8-bit AdamW counts its steps in Python.
            moments.setdefault(int(number), {})[kind] = int(own) if own.dtype == torch.int64 else own
        self.adam.load_state_dict({"state": moments, "param_groups": self.adam.state_dict()["param_groups"]})
        self.average.updates = record.value["updates"]
        if "average" in groups:
            self.average.restore(self._listed(groups["average"]))
        self.best = self._listed(groups["best"]) if "best" in groups else None
        torch.set_rng_state(groups["random"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(groups["random"]["cuda"], self.device)
        for step, values in record.value["history"]:
            self.curves.log(step, values)

    def _listed(self, group: dict[str, Tensor]) -> list[Tensor]:
        place = torch.device("cpu") if self.average.host else self.device
        whole = [group[str(number)] for number in range(len(group))]
        if self.shards:
            whole = [self.shards.own(*pair) for pair in zip(whole, self.shards.rows, strict=True)]
        return [tensor.to(place) for tensor in whole]

    def _of_adam(self) -> list[Tensor]:
        """The parameters in the order of their moments."""
        return [p for group in self.adam.param_groups for p in group["params"]]

    def _tensors(self) -> dict[str, Tensor]:
        frozen = {name for name, p in self.module.named_parameters(remove_duplicate=False) if not p.requires_grad}
        shards = self.shards
        module = shards.state_dict(self.module) if shards else self.module.state_dict()
        tensors = {f"module/{name}": t for name, t in module.items() if name not in frozen}
        for number, parameter in enumerate(self._of_adam()):
            for kind, value in self.adam.state.get(parameter, {}).items():
                moment = torch.as_tensor(value)
                tensors[f"adam/{number}/{kind}"] = shards.whole(moment, parameter) if shards else moment
        average = self.average.average if self.average.decay else []
        for name, weights in (("average", average), ("best", self.best or [])):
            whole = [shards.whole(*pair) for pair in zip(weights, shards.rows, strict=False)] if shards else weights
            tensors |= {f"{name}/{number}": tensor for number, tensor in enumerate(whole)}
        tensors["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors
