"""How a stage starts in several processes, where `machine.launch` says so: by torchrun, or by another command such as srun."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator

from svam import processes
from svam.console import console
from svam.errors import MachineError, ParamsError
from svam.params import Params

SHARED = ("encode", "finetune_video", "generate", "cache_teacher", "distill", "train_policy")
"""The stages that share their work; others compute in one process."""
VARIABLES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
"""What torchrun tells each process of its number, of how many there are, and of its number on its node; and Slurm's words."""


def launch(params: Params, stage: str) -> None:
    """Return in each process that is to compute the stage: in this one, where it computes alone; else run this command line in
    the processes of `machine.launch`, and exit as they do.

    Raises:
        MachineError: `machine` contradicts itself or other sections, the command is not there or does not tell its processes
            what they need, or one of them was killed.
        ParamsError: the processes would have different shares of a batch.
    """
    machine = params.machine
    if stage not in SHARED:
        return
    if machine.launch != "local" and processes.STARTED in os.environ:
        _read_environment(machine.launch)
        console.quiet = not processes.first()
        optimiser = getattr(getattr(params, stage), "training", None)
        if optimiser is not None and optimiser.steps and optimiser.batch % processes.count():
            raise ParamsError(_undivided(stage, optimiser.batch, processes.count()))
        return
    if problems := [*contradictions(params), *unfit(params)]:  # changing `machine` re-runs no check_params
        raise MachineError("\n".join(problems))
    if machine.launch == "local":
        return
    # By a command, since not every launcher hands on the environment: one that does not would start launchers for ever.
    command = ["env", f"{processes.STARTED}=1", sys.executable, "-m", f"stages.{stage}", *sys.argv[1:]]
    os.environ.setdefault("OMP_NUM_THREADS", str(params.threads))
    if machine.launch == "torchrun":
        _torchrun(machine.processes, command)
    words = shlex.split(machine.launch)
    os.execvp(words[0], [*words, *command])


def contradictions(params: Params) -> Iterator[str]:
    """A sentence for each of what the params say of processes and shards that cannot be meant."""
    machine, video = params.machine, params.finetune_video
    if machine.processes > 1 and machine.launch != "torchrun":
        yield (
            f"machine.processes is {machine.processes}, which says how many torchrun starts, but machine.launch is "
            f"{machine.launch!r}: set it to torchrun, or processes to 1"
        )
    chosen = {
        "machine.compile": machine.compile, "finetune_video.lora_rank": video.lora_rank,
        "finetune_video.moments": video.moments,
    }  # fmt: skip
    for (key, value), plain in zip(chosen.items(), (False, None, "float32"), strict=True):
        if machine.shard and value != plain:
            yield (
                f"machine.shard is true, but {key} is {json.dumps(value)}, which weights in shards do not go with: set it to "
                f"{json.dumps(plain)}, or machine.shard to false"
            )


def unfit(params: Params) -> Iterator[str]:
    """A sentence for each reason for which the processes of `machine` could not begin: their command is not there, or they
    would have different shares of a batch."""
    machine = params.machine
    if machine.launch == "torchrun":
        for stage in ("finetune_video", "distill", "train_policy"):
            training = getattr(params, stage).training
            if training.steps and training.batch % machine.processes:
                yield _undivided(stage, training.batch, machine.processes)
    elif machine.launch != "local" and shutil.which(command := shlex.split(machine.launch)[0]) is None:
        yield f"machine.launch is {machine.launch!r}, but there is no command {command!r}; use local or torchrun"


def _undivided(stage: str, batch: int, count: int) -> str:
    return (
        f"{stage}.training.batch is {batch}, which the {count} processes of machine.launch do not divide; choose a multiple, "
        "or another number of processes"
    )


def _torchrun(count: int, command: list[str]) -> None:
    """What the command `torchrun` does, without its log: what failed has said so itself, in one sentence."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.ERROR)
    try:
        options = ["--standalone", "--local-addr=localhost", f"--nproc-per-node={count}", "--no-python"]
        run(parse_args([*options, *command]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        which, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise MachineError(
                f"process {which}, counted from 0, was ended by {failure.signal_name()}, and the others with it; run the same "
                "command again to go on from the last checkpoint"
            ) from None
        sys.exit(failure.exitcode)
    except SignalException:
        sys.exit(130)
    sys.exit(0)


def _read_environment(launch: str) -> None:
    for name, slurm in VARIABLES.items():
        value = os.environ.get(name, os.environ.get(slurm))
        if value is None:
            raise MachineError(
                f"machine.launch is {launch!r}, which sets neither {name} nor {slurm} in its processes; use torchrun or srun"
            )
        os.environ[name] = value
    if processes.count() > 1 and not os.environ.keys() >= {"MASTER_ADDR", "MASTER_PORT"}:
        raise MachineError(
            f"machine.launch is {launch!r}, whose processes find one another by MASTER_ADDR and MASTER_PORT: on the node of "
            "the first, export MASTER_ADDR=$(hostname) MASTER_PORT=29500 before the run"
        )
