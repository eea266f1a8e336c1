"""Several processes that compute one stage together, as `svam.launch` starts them: which of them this one is, and how they wait
for one another. A process that was started alone is the first of one.

Hugging Face Accelerate opens their group: NCCL between GPUs, gloo between CPUs. All see the same files. The first alone writes
what a run remembers, its curves and its outputs, and it alone prints.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from svam.errors import MachineError

if TYPE_CHECKING:
    import torch

STARTED = "SVAM_STARTED"
"""Environment variable by which a process knows that `svam.launch` started it."""
PATIENCE = timedelta(days=1)
"""Of a process that waits for another. One that dies ends the others by whatever started them, so this has to outlast what the
first does alone, and no more."""
GIVE_WAY_SECONDS = 2.0
T = TypeVar("T")


def count() -> int:
    """How many processes compute this stage."""
    return int(os.environ.get("WORLD_SIZE", "1")) if STARTED in os.environ else 1


def number() -> int:
    """Which of them this one is, from 0 on."""
    return int(os.environ.get("RANK", "0")) if STARTED in os.environ else 0


def first() -> bool:
    """Whether this is the one that prints, and writes what there is once."""
    return number() == 0


def join(cuda: bool) -> torch.device:
    """Open the group of all processes; returns the device of this one.

    Raises:
        MachineError: this node has more processes than GPUs.
    """
    import torch
    from accelerate import PartialState

    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if cuda and local >= gpus:
        raise MachineError(
            f"process {local} of this node, counted from 0, sees {gpus} GPUs; machine.launch must start no more than one "
            "process for each GPU of a node, and each must see all of them"
        )
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
    device: torch.device = PartialState(cpu=not cuda, backend=backend, timeout=PATIENCE).device
    return device


def _end_with(parent: int) -> None:
    """End this process when the one that started it has ended, however that was."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def wait() -> None:
    """Until every process has come here."""
    if count() > 1:
        import torch.distributed

        torch.distributed.barrier()


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, which alone calls it."""
    if count() == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    value = [make() if first() else None]
    broadcast_object_list(value)
    return value[0]  # type: ignore[return-value]


def agreed(value: bool) -> bool:
    """What the first process says. Through the host's memory, so that no GPU is waited for."""
    import torch

    flag = torch.tensor(value)
    torch.distributed.broadcast(flag, 0)
    return bool(flag)


@contextmanager
def first_before_others() -> Iterator[None]:
    """The first process goes through the block, then the others."""
    if not first():
        wait()
    yield
    if first():
        wait()


def only_first_goes_on() -> None:
    """Wait for all; then the others end, since their part of the stage is done."""
    if count() > 1:
        import torch.distributed

        wait()
        torch.distributed.destroy_process_group()
        if not first():
            sys.exit(0)


def give_way() -> None:
    """Of one cause often several processes fail, and the first says which: what started them ends the others meanwhile."""
    if count() > 1:
        time.sleep(GIVE_WAY_SECONDS)
