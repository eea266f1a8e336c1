"""The computer as stages see it: torch's device and threads, and worker processes."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svam import processes
from svam.console import console
from svam.errors import MachineError

if TYPE_CHECKING:
    import torch
    from torch import nn


def become_worker() -> None:
    """In a worker process: leave Ctrl-C to the parent, and end with it. A parent that is killed closes nothing: its workers
    would wait for work, and hold their memory, for ever."""
    import multiprocessing
    import signal
    import threading

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def prepare_torch(device: str, threads: int, seed: int) -> torch.device:
    """Set threads and seeds, choose the device, print it, and return it.

    Where several processes compute a stage, they meet here, and each has a device of its own. On a CPU those that torchrun
    starts share the `threads`; other commands give each process CPUs of its own.

    Raises:
        MachineError: `device` is "cuda" and torch sees no CUDA GPU, or this node has more processes than GPUs.
    """
    import torch

    from svam.precision import computes_bfloat16

    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            f"machine.device is 'cuda', but torch {torch.__version__} sees no CUDA GPU; use 'auto' or 'cpu', "
            "or install a CUDA build of torch"
        )
    chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if processes.count() > 1:
        chosen = processes.join(chosen.type == "cuda")
        if chosen.type == "cpu":
            threads = max(1, threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if chosen.type == "cpu":
        keep_freed_memory()
    if chosen.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    # On CPUs torch's fused attention is slower than the plain one at these lengths; its bf16 backward takes half of a
    # training step of the video model (182 against 84 ms a clip on one core).
    torch.backends.cuda.enable_flash_sdp(chosen.type == "cuda")
    torch.backends.cuda.enable_mem_efficient_sdp(chosen.type == "cuda")
    name = torch.cuda.get_device_name() if chosen.type == "cuda" else f"{threads} threads"
    precision = "" if computes_bfloat16(chosen) else ", no bfloat16: float32 instead"
    together = f", {processes.count()} processes" if processes.count() > 1 else ""
    console.print(f"device: {chosen.type} ({name}{precision}{together})")
    return chosen


def keep_freed_memory() -> None:
    """Keep what is freed, up to 256 MB a block, for what is allocated next.

    glibc gives large blocks back to the kernel, which hands out zeroed pages at each step anew: 24,000 page faults in a step of
    the video model, a tenth of its time (0.37 s with them, 0.34 without, in pairs). Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 28)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def computes_beside(device: torch.device) -> bool:
    """Whether the device computes beside the host, which then waits wherever it looks at a number."""
    return device.type != "cpu"


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. To a GPU by way of pinned memory, so that the host waits for no copy."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def branch_of_graph(device: torch.device) -> Iterator[Callable[[], None]]:
    """While a CUDA graph is captured, what is done inside becomes a branch of it, beside what follows; at any other time it is
    done in turn. The function that is given must be called before its results are used."""
    import torch

    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield lambda: None
        return
    trunk = torch.cuda.current_stream()
    branch = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    branch.wait_stream(trunk)
    with torch.cuda.stream(branch):
        yield lambda: trunk.wait_stream(branch)


def compile_layers(module: nn.Module, kinds: tuple[type[nn.Module], ...] = (), **options: Any) -> None:
    """Compile, at their first call, the layers of `kinds`, or without kinds the outermost layers of the module's lists and
    sequences: a kernel of several operations in place of one for each. By layers, since a whole network takes many minutes;
    equal layers share one result. Of torch's own layers only those within others are compiled, with these.

    options: of `torch.compile`.
    """
    import torch
    from torch import nn

    torch._dynamo.config.recompile_limit = 64  # of one class of layers: those of a U-Net's levels differ in shapes
    for child in module.children():
        listed = isinstance(module, nn.ModuleList | nn.Sequential) and not type(child).__module__.startswith("torch.nn")
        if isinstance(child, kinds) if kinds else listed:
            # Else the second shape that a class meets makes code for any shape, slower to compile and to run.
            child.compile(dynamic=False, **options)
        else:
            compile_layers(child, kinds, **options)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
