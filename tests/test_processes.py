"""Several processes: the same losses and the same bytes as one, killed or not, and one sentence where they cannot start."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stages.encode import app
from svam import processes
from svam.checkpoint import load_tensors, save_tensors
from svam.console import console, one_line_errors
from svam.episodes.joined import open_store
from svam.errors import MachineError
from svam.files import sha256_tree
from svam.launch import _torchrun, launch
from svam.models.autoencoder import Autoencoder
from svam.models.foresight import ForesightModel, FrozenParts, part_folders
from svam.models.text import TextEncoder
from svam.models.video import SamplerConfig
from svam.params import CacheTeacher, FinetuneVideo, Machine, load_params
from svam.resume import Resume, resumable_run
from svam.shares import own_rows
from svam.training.cache_teacher import cache_windows
from svam.training.distill import distill
from svam.training.distill_data import GeneratedWindows
from svam.training.encode import encode_frames
from svam.training.feature_cache import FeatureCache
from svam.training.finetune_video import TextTable, new_video_model, train_video
from svam.training.generate import choose_windows, generate_windows
from svam.training.latents import LatentClips
from svam.training.train_policy import load_foresight, train
from tests.sources.common import refused
from tests.test_resume import train as train_noisy
from tests.tiny import GENERATE, policy_params
from tests.tiny_foresight import GRID, encoded, make_teacher
from tests.together import heard, together
from tests.toy import committed, optimiser, write_toy_params
from tests.training import test_distill
from tests.warm import executable

CPU = torch.device("cpu")
TWENTY = optimiser(steps=20, batch=4, learning_rate=0.01, warmup=2, ema=0.9)


# --- trainings and the feature cache -------------------------------------------------------------------------------------


SHARDED = Machine.model_validate(committed("machine", device="cpu", shard=True))
SHARDED_TWICE = SHARDED.model_copy(update={"checkpointing": True})


def learn_video(parts: Path, out: Path, machine: Machine | None = None) -> None:
    """Also writes how many clips were read at a time."""
    store, folders = open_store(parts / "episodes.zarr"), part_folders(parts / "backbones", parts / "video")
    autoencoder, text = Autoencoder.load(folders["autoencoder"]), TextEncoder.load(folders["text"])
    unet = {"channels": [32, 64], "layers": 1, "heads": [1, 2]}
    section = committed("finetune_video", frames=3, stride_seconds=0.1, unet=unet, training=TWENTY.model_dump())
    params, sizes = FinetuneVideo.model_validate(section), set()

    class Watched(LatentClips):
        def clips(self, places: NDArray[np.int64]) -> torch.Tensor:
            if not sizes:
                (out / f"sizes{processes.number()}").write_text(str(len(places)))
            sizes.add(len(places))
            assert len(sizes) == 1
            return super().clips(places)

    torch.manual_seed(0)
    model = new_video_model(params, store, autoencoder, text, 0)
    latents, stride = encoded(store, autoencoder), model.config.stride
    clips, held_out = Watched(store, "train", latents, 3, stride), LatentClips(store, "held_out", latents, 3, stride)
    table = TextTable.build(store, text)
    train_video(model, params, clips, held_out, autoencoder, table, 0, CPU, out / "live", machine=machine)
    save_tensors(out / "weights", model.state_dict())


def learn_policy(parts: Path, out: Path, machine: Machine | None = None) -> None:
    """With random crops of the observed frame. Also fills the feature cache."""
    store = open_store(parts / "episodes.zarr")
    folders = part_folders(parts / "backbones", parts / "video", parts / "decouplers")
    context = ["geometric", "semantic", "one_step", "observation"]
    section = policy_params(context=context, training=TWENTY.model_dump(), evaluate_every=20)
    foresight, cache = load_foresight(section, GENERATE, folders), FeatureCache(out / "features", 1.0)
    svam = train(store, foresight, folders, section, cache, 0, CPU, out / "live", machine=machine)
    save_tensors(out / "weights", svam.network.state_dict())


def learn_decoupler(parts: Path, out: Path, machine: Machine | None = None) -> None:
    data = test_distill.open_data(out / f"windows{processes.number()}", test_distill.arrays())
    section = test_distill.SECTION.model_copy(update={"training": TWENTY})
    decoupler, _ = distill(data, section, 0, CPU, live=out / "live", machine=machine)
    save_tensors(out / "weights", decoupler.state_dict())


def losses(live: Path) -> list[float]:
    lines = (live / "plots/metrics/train/loss.tsv").read_text().splitlines()
    return [float(line.split("\t")[-1]) for line in lines[1:]]


@pytest.mark.parametrize("learn", [learn_video, learn_decoupler, learn_policy])
def test_two_processes_have_the_losses_of_one(learn: Callable[..., None], parts: Path, tmp_path: Path) -> None:
    """Over twenty steps, in float32, whether each has all weights or shards, those of a U-Net also with its layers computed
    twice; and the features that the policy learns from have the same bytes."""
    one, two = tmp_path / "one", tmp_path / "two"
    machines: dict[Path, Machine | None] = {two: None, tmp_path / "shards": SHARDED}
    if learn is learn_video:
        machines[tmp_path / "twice"] = SHARDED_TWICE
    for folder in (one, *machines):
        folder.mkdir()
    assert together(learn, parts, one, count=1) == [0]
    assert [together(learn, parts, folder, machine) for folder, machine in machines.items()] == [[0, 0]] * len(machines)
    expected, weights = losses(one / "live"), load_tensors(one / "weights")
    assert len(expected) == 20 and expected[-1] != expected[0]
    for folder in machines:
        np.testing.assert_allclose(losses(folder / "live"), expected, rtol=1e-5)
        others = load_tensors(folder / "weights")
        assert others.keys() == weights.keys()
        # A few have no gradient but for rounding, such as biases of keys, and AdamW moves them by chance.
        close = [torch.isclose(others[name], weight, rtol=0, atol=1e-4).flatten() for name, weight in weights.items()]
        assert torch.cat(close).float().mean() > 0.98
    if learn is learn_video:
        assert [file.read_text() for file in (one / "sizes0", two / "sizes0", two / "sizes1")] == ["4", "2", "2"]
    if learn is learn_policy:
        assert sha256_tree(one / "features") == sha256_tree(two / "features")


class UntilKilled(list[int]):
    """The second process ends by SIGKILL where it is to make batch 30."""

    def append(self, number: int) -> None:
        if processes.number() == 1 and number == 30:
            os.kill(os.getpid(), signal.SIGKILL)


def train_shared(out: Path, state: Path, killed: bool, machine: Machine | None = None) -> None:
    """Dropout, noise in the loss, and batches that are added up: each process has weights and curves of its own in `out`."""
    seen = UntilKilled() if killed else list[int]()
    (out / str(processes.number())).mkdir(exist_ok=True)
    train_noisy(out / str(processes.number()), Resume(state, 0), seen, machine)
    (out / f"seen{processes.number()}").write_text(str(seen[0]))


@pytest.mark.parametrize("first, then", [(None, None), (SHARDED, SHARDED), (SHARDED, None)])
def test_a_training_goes_on_after_one_of_its_processes_was_killed(
    first: Machine | None, then: Machine | None, tmp_path: Path
) -> None:
    """Weights in shards or not; one that was killed with them may go on without, to the same but for the order of sums."""
    for name in ("straight", "killed"):
        (tmp_path / name / "state").mkdir(parents=True)
    assert together(train_shared, tmp_path / "straight", tmp_path / "straight/state", False, then) == [0, 0]
    failed = together(train_shared, tmp_path / "killed", tmp_path / "killed/state", True, first)
    assert -signal.SIGKILL in failed and 0 not in failed
    assert together(train_shared, tmp_path / "killed", tmp_path / "killed/state", False, then) == [0, 0]
    assert json.loads((tmp_path / "killed/state/training.json").read_text())["value"]["processes"] == 2
    began = [int((tmp_path / "killed" / f"seen{n}").read_text()) for n in (0, 1)]
    assert began[0] == began[1] > 15, "it began anew"
    weights = [f"{n}/{name}" for n in (0, 1) for name in ("layers.0.weight", "layers.3.weight")]
    straight, killed = [[(tmp_path / run / name).read_bytes() for name in weights] for run in ("straight", "killed")]
    assert straight[:2] == straight[2:], "the processes have come apart"
    for one, other in zip(straight, killed, strict=True):
        np.testing.assert_allclose(np.frombuffer(one, np.float32), np.frombuffer(other, np.float32), rtol=1e-4, atol=1e-5)
    if first is then:
        assert sha256_tree(tmp_path / "killed/0") == sha256_tree(tmp_path / "straight/0")


def fail_after_saving(folder: Path) -> None:
    """Writes what it found of an earlier run, and keeps how many its processes are."""
    os.environ["DVC_ROOT"] = str(folder)
    with resumable_run("generate", load_params(folder / "params.yaml"), ["generate"], []) as resume:
        found = resume.load_record("record")
        processes.wait()
        if processes.first():
            (folder / "found").write_text(str(found.value if found else None))
            resume.save_record("record", processes.count())
        processes.wait()
        sys.exit(3)


def test_a_state_belongs_to_its_number_of_processes(tmp_path: Path) -> None:
    """That of another number is kept for going back."""
    write_toy_params(tmp_path / "params.yaml")
    found = []
    for count in (1, 2, 1, 2):
        assert 0 not in together(fail_after_saving, tmp_path, count=count)
        found.append((tmp_path / "found").read_text())
    assert found == ["None", "None", "1", "2"]


# --- what is written block by block --------------------------------------------------------------------------------------


def write_latents(parts: Path, folder: Path, resume: Resume) -> None:
    store, autoencoder = open_store(parts / "episodes.zarr"), Autoencoder.load(parts / "backbones/autoencoder")
    encode_frames(folder, store, autoencoder, "abc", 16, CPU, resume)


def write_generated(parts: Path, folder: Path, resume: Resume) -> None:
    store, folders = open_store(parts / "episodes.zarr"), part_folders(parts / "backbones", parts / "video")
    sampler = SamplerConfig(up_blocks=2, grid=GRID, steps=2, guidance=1.0, bf16=False)
    model = ForesightModel.load_parts(FrozenParts(), sampler, folders)
    section = GENERATE.model_copy(update={"windows": 9, "held_out_windows": 3, "up_blocks": 2, "batch": 2})
    windows = choose_windows(store, section, model.video_model.config, 0)
    generate_windows(folder, encoded(store, model.frame_autoencoder), model, windows, section, 0, "abc", resume)


def write_teachers(parts: Path, folder: Path, resume: Resume) -> None:
    store, windows = open_store(parts / "episodes.zarr"), GeneratedWindows(folder.parents[2] / "generated")
    section = CacheTeacher(reference="frame", batch=4)
    cache_windows(folder, windows, store, make_teacher("depth"), "geometric", section, "generated", CPU, resume)


def write(function: Callable[[Path, Path, Resume], None], parts: Path, out: Path, killed_at: int | None = None) -> None:
    """What a stage does, with its state in `out/state`; the second process is killed where it is to write that row."""
    state = out / "state"
    state.mkdir(parents=True, exist_ok=True)
    blocks = sys.modules["svam.training.blocks"]
    checked, computed = blocks._check_rows, list[int]()  # type: ignore[attr-defined]

    def watched(name: str, values: NDArray[Any], first: int, *rest: Any) -> None:
        computed.append(first)
        if killed_at is not None and processes.number() == 1 and first >= killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        checked(name, values, first, *rest)

    blocks._check_rows = watched  # type: ignore[attr-defined]
    resume = Resume(state, 0)
    with resume.directory(out / "made") as folder:
        try:
            function(parts, folder, resume)
        finally:
            blocks._check_rows = checked  # type: ignore[attr-defined]
            (out / f"first{processes.number()}").write_text(str(computed[0]))


@pytest.mark.parametrize("function, killed_at", [(write_latents, 17), (write_generated, 3), (write_teachers, 2)])
def test_two_processes_write_the_bytes_of_one(
    function: Callable[[Path, Path, Resume], None], killed_at: int, parts: Path, tmp_path: Path
) -> None:
    """Also when one of them is killed and the same command is run again."""
    if function is write_teachers:
        assert together(write, write_generated, parts, tmp_path / "g", count=1) == [0]
        (tmp_path / "g/made").rename(tmp_path / "generated")
    assert together(write, function, parts, tmp_path / "one", count=1) == [0]
    assert together(write, function, parts, tmp_path / "two") == [0, 0]
    assert (tmp_path / "two/first1").read_text() != "0", "the first block was computed twice"
    assert -signal.SIGKILL in together(write, function, parts, tmp_path / "killed", killed_at)
    assert not (tmp_path / "killed/made").exists()
    assert together(write, function, parts, tmp_path / "killed") == [0, 0]
    assert (tmp_path / "killed/first0").read_text() != "0", "it began anew"
    expected = sha256_tree(tmp_path / "one/made")
    assert [sha256_tree(tmp_path / name / "made") for name in ("two", "killed")] == [expected] * 2


# --- how they start ------------------------------------------------------------------------------------------------------

SRUN = """#!/bin/sh
for n in 0 1; do SLURM_PROCID=$n SLURM_LOCALID=$n SLURM_STEP_NUM_TASKS=2 "$@" & pids="$pids $!"; done
for pid in $pids; do wait "$pid" || exit 1; done
"""


def encode(parts: Path, folder: Path, launch: str, count: int = 1, **environment: str) -> tuple[int | None, str]:
    """The stage `encode`, of which all lies in `folder`, where a command `srun` is too: exit code, and what is printed."""
    folder.mkdir()
    write_toy_params(folder / "params.yaml", {"threads": count, "machine": {"launch": launch, "processes": count}})
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    arguments = [str(folder / "latents"), "--params", str(folder / "params.yaml")]
    arguments += ["--episodes", str(parts / "episodes.zarr"), "--autoencoder", str(parts / "backbones/autoencoder")]
    around = {"DVC_ROOT": str(folder), "PATH": f"{folder}:{os.environ['PATH']}"} | environment
    return heard(folder / "heard", around, call_stage, executable(), arguments)


def call_stage(python: str, arguments: list[str]) -> None:
    """As `python -m` does."""
    sys.executable, sys.argv = python, ["stages/encode.py", *arguments]
    app()


def test_torchrun_and_a_prefix_start_processes_that_write_the_same_bytes(parts: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    runs = [
        encode(parts, tmp_path / "local", "local"),
        encode(parts, tmp_path / "torchrun", "torchrun", 2),
        encode(parts, tmp_path / "srun", "srun", **address),
    ]
    for code, said in runs:
        assert code == 0, said
        assert said.count("device: cpu") == said.count("peak memory") == 1, said
    assert ["1 threads, 2 processes" in said for _, said in runs] == [False, True, True]
    assert len({sha256_tree(tmp_path / name / "latents") for name in ("local", "torchrun", "srun")}) == 1
    assert not list(tmp_path.glob("*/.ckpt"))


def test_an_error_of_all_is_one_sentence(tmp_path: Path) -> None:
    code, said = encode(tmp_path, tmp_path / "run", "torchrun", 2)
    assert (code, said.count("\n")) == (1, 2) and "device: cpu" in said, said
    assert said.splitlines()[1].startswith("error: ") and "episodes.zarr" in said


DYING = "import os, signal, time; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL); time.sleep(600)"


def start_dying() -> None:
    one_line_errors(_torchrun)(2, [sys.executable, "-c", DYING])


def test_a_process_that_was_killed_is_named_and_ends_the_others(tmp_path: Path) -> None:
    code, said = heard(tmp_path / "heard", {}, start_dying)
    assert (code, said.count("\n")) == (1, 1), said
    assert said.startswith("error: process 1, counted from 0, was ended by SIGKILL, and the others with it"), said


@pytest.mark.parametrize("launch, sentence", [
    ("no-such-command -n 2", "error: machine.launch is 'no-such-command -n 2', but there is no command 'no-such-command'"),
    ("env", "error: machine.launch is 'env', which sets neither RANK nor SLURM_PROCID in its processes"),
])  # fmt: skip
def test_what_the_machine_lacks_is_said_before_anything_is_read(launch: str, sentence: str, tmp_path: Path) -> None:
    code, said = encode(tmp_path, tmp_path / "run", launch)
    assert (code, said.count("\n")) == (1, 1) and said.startswith(sentence), said


def test_processes_that_cannot_meet_are_told_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(processes.STARTED, "1")
    for name, value in {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what is set below goes afterwards
        monkeypatch.delenv(name)
    params = write_toy_params(tmp_path / "params.yaml", {"machine": {"launch": "srun"}})
    launch(params, "evaluate")  # computes alone
    with refused("export MASTER_ADDR="):
        launch(params, "encode")
    assert (processes.number(), processes.count(), processes.first()) == (1, 3, False)
    assert own_rows(12) == slice(4, 8)
    with refused("a batch of 8 does not divide by 3 processes"):
        own_rows(8)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(console, "quiet", False)
    with refused("distill.training.batch is 4, which the 3 processes of machine.launch do not divide"):
        launch(params, "distill")
    assert console.quiet


@pytest.mark.parametrize("machine, said", [
    ({"launch": "torchrun", "processes": 3}, ["finetune_video.training.batch is 4, which the 3", "distill.", "train_policy."]),
    ({"processes": 2}, ["machine.processes is 2, which says how many torchrun starts"]),
    ({"launch": "torchrun", "shard": True, "compile": True}, ["machine.shard is true, but machine.compile is true"]),
])  # fmt: skip
def test_what_is_wrong_for_a_late_stage_is_said_by_the_first_that_shares_its_work(
    machine: dict[str, object], said: list[str], tmp_path: Path
) -> None:
    with pytest.raises(MachineError) as caught:
        launch(write_toy_params(tmp_path / "params.yaml", {"machine": machine}), "encode")
    lines = str(caught.value).splitlines()
    assert len(lines) == len(said) and all(map(str.startswith, lines, said)), lines
