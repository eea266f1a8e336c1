"""Killed and resumed: the bytes of an uninterrupted run, whatever was going on; one writer; stale and damaged state is left."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from svam.code import stage_code
from svam.console import console, one_line_errors
from svam.files import FileError, clear_leftovers, sha256_tree
from svam.params import Machine, Params
from svam.resume import OLD_STATES, Resume, identity, resumable_run
from svam.training.batch_order import EndlessOrder
from svam.training.blocks import in_batches, write_blocks
from svam.training.loop import fit
from tests import ROOT
from tests.killing import kill
from tests.sources.common import refused
from tests.toy import optimiser, write_toy_params

CPU = torch.device("cpu")


# --- the training loop ---------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Two layers with dropout, a buffer that changes, and two names of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.first = self.layers[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[:, 0]  # type: ignore[no-any-return]


def train(
    out: Path, resume: Resume, steps_seen: list[int] | None = None, machine: Machine | None = None, **changes: Any
) -> None:
    """Train a `Noisy` on examples in random order; write curves, weights and the selected evaluation to `out`."""
    torch.manual_seed(0)
    module = Noisy()
    data = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    order = EndlessOrder(len(data), 8, "order")

    def batch_of(number: int) -> Tensor:
        if steps_seen is not None:
            steps_seen.append(number)
        return data[torch.from_numpy(order.batch(number))]

    def evaluate(_: int) -> dict[str, float]:
        return {"error": (module(data) - data.sum(1)).abs().mean().item() + torch.rand(1).item(), "other": 1 / 3}

    values = {"steps": 30, "batch": 8, "learning_rate": 0.05, "warmup": 3, "ema": 0.9, "accumulate": 2} | changes
    kept = fit(
        module, lambda b: (module(b) + torch.randn(len(b)) - b.sum(1)).square().mean(), batch_of,
        optimiser(**values), CPU, "noisy", out / "live", evaluate, 7, "error", resume, machine,
    )  # fmt: skip
    (out / "kept").write_text(repr(kept))
    for name, tensor in module.state_dict().items():
        (out / name).write_bytes(tensor.numpy().tobytes())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("straight")
    train(out, Resume(None))
    return sha256_tree(out)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


@pytest.mark.parametrize(("after", "while_writing"), [(1, True), (14, True), (30, False)])
def test_a_training_goes_on_to_the_same_bytes(
    straight: str, after: int, while_writing: bool, state: Path, tmp_path: Path
) -> None:
    kill(after, train, tmp_path / "killed", Resume(state, 0), while_writing=while_writing)
    seen: list[int] = []
    train(tmp_path / "resumed", Resume(state, 0), seen)
    whole_saves = after - while_writing
    assert seen == list(range(2 * whole_saves, 60)), "it went on from another step than the last that was saved"
    assert sha256_tree(tmp_path / "resumed") == straight


def test_a_training_that_is_killed_again_and_again(straight: str, state: Path, tmp_path: Path) -> None:
    for after in (3, 9, 1, 12):
        kill(after, train, tmp_path / "out", Resume(state, 0))
    train(tmp_path / "out", Resume(state, 0))
    assert sha256_tree(tmp_path / "out") == straight


def test_a_checkpoint_of_another_number_of_processes_is_refused(
    straight: str, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it has come by hand, since a stage finds none; it is still there for as many as saved it."""
    kill(5, train, tmp_path / "killed", Resume(state, 0))
    with monkeypatch.context() as patch, refused(f"processes is 2, but 1 saved this .* or delete {state} to"):
        patch.setattr("svam.processes.count", lambda: 2)
        train(tmp_path / "two", Resume(state, 0))
    train(tmp_path / "one", Resume(state, 0))
    assert sha256_tree(tmp_path / "one") == straight


@pytest.mark.parametrize("suffix", ["data-*", "json"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]])
def test_a_damaged_checkpoint_starts_over_with_a_sentence(
    straight: str, state: Path, tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]
) -> None:
    kill(5, train, tmp_path / "killed", Resume(state, 0))
    (file,) = state.glob(f"training.{suffix}")
    file.write_bytes(damage(file.read_bytes()))
    seen: list[int] = []
    with console.capture() as capture:
        train(tmp_path / "out", Resume(state, 0), seen)
    assert seen[0] == 0 and "truncated or damaged; it is ignored" in " ".join(capture.get().split())
    assert sha256_tree(tmp_path / "out") == straight


def test_an_order_is_each_number_once_and_a_function_of_the_batch() -> None:
    order = EndlessOrder(10, 4, "key")
    seen = np.concatenate([order.batch(n) for n in range(5)])
    assert sorted(seen.tolist()) == sorted([*range(10)] * 2)
    assert np.array_equal(EndlessOrder(10, 4, "key").batch(3), order.batch(3))
    assert sorted(EndlessOrder(3, 8, "key").batch(1).tolist()).count(0) in (2, 3)
    long = EndlessOrder(10_000, 48, "key")  # drawn in several parts
    seen = np.concatenate([long.batch(n) for n in range(10_000 // 48 + 1)])
    assert set(seen.tolist()) == {*range(10_000)} and len(seen) == 209 * 48


# --- the state of a stage ------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Params]:
    """Toy params that save at every opportunity; state below `tmp_path/.ckpt/generate@x`."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    yield toy(tmp_path)


def toy(folder: Path, **changes: Any) -> Params:
    return write_toy_params(folder / "params.yaml", {"machine": {"checkpoint_seconds": 0.0}} | changes)


def states(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob(".ckpt/generate@x/*") if p.is_dir())


def leave_one(settings: Params, inputs: list[Path], value: Any = 1, sections: tuple[str, ...] = ("generate",)) -> None:
    """A run that keeps a record and fails."""
    with pytest.raises(ZeroDivisionError), resumable_run("generate@x", settings, sections, inputs) as resume:
        resume.save_record("record", value)
        raise ZeroDivisionError


def found(settings: Params, inputs: list[Path], sections: tuple[str, ...] = ("generate",)) -> Any:
    with resumable_run("generate@x", settings, sections, inputs) as resume:
        kept = resume.load_record("record")
        return None if kept is None else kept.value


def test_state_is_found_and_goes_at_success(settings: Params, tmp_path: Path) -> None:
    leave_one(settings, [], {"a": [1, 0.1, "ü"]})
    (state,) = states(tmp_path)
    assert found(settings, []) == {"a": [1, 0.1, "ü"]} and not state.exists()
    assert not (tmp_path / ".ckpt").exists(), "nothing is left of a run that has succeeded"
    assert found(settings, []) is None


def test_stale_state_is_not_found(settings: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other params, inputs or code: another key. What no number depends on does not matter."""
    (tmp_path / "input").mkdir()
    (tmp_path / "input/a").write_text("a")
    inputs = [tmp_path / "input"]
    leave_one(settings, inputs)
    assert found(settings.model_copy(update={"seed": 9}), inputs) is None
    changed = settings.generate.model_copy(update={"steps": 9})
    assert found(settings.model_copy(update={"generate": changed}), inputs) is None
    with monkeypatch.context() as patch:
        patch.setattr("svam.code.version", lambda name: "0.0")
        assert found(settings, inputs) is None
    (tmp_path / "input/a").write_text("b")
    assert found(settings, inputs) is None
    (tmp_path / "input/a").write_text("a")
    machine = settings.machine.model_copy(update={"workers": 7, "checkpoint_seconds": 1.0})
    assert found(settings.model_copy(update={"machine": machine}), inputs) == 1


def test_state_belongs_to_the_code_that_can_change_it(
    settings: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the modules that the stage runs, those imported only within its function included, whatever this process has loaded. A
    comment, or another stage's module, is no other code."""
    for folder in ("svam", "stages"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("svam.resume.stage_code", lambda stage, modules: stage_code(stage, modules, tmp_path))
    leave_one(settings, [])
    for module, line, same in (
        ("svam/models/generator.py", "# A comment", True),
        ("svam/training/train_policy.py", "LIMIT = 1", True),
        ("svam/models/generator.py", "LIMIT = 1", False),
    ):
        file = tmp_path / module
        file.write_text(f"{file.read_text(encoding='utf-8')}{line}\n", encoding="utf-8")
        assert (found(settings, []) == 1) == same, module
        if same:
            leave_one(settings, [])


def test_few_stale_states_stay(settings: Params, tmp_path: Path) -> None:
    for seed in range(OLD_STATES + 3):
        leave_one(settings.model_copy(update={"seed": seed}), [])
        newest = max(states(tmp_path), key=lambda p: p.stat().st_mtime_ns)
        os.utime(newest, (seed, seed))
    assert len(states(tmp_path)) == OLD_STATES + 1
    assert found(settings.model_copy(update={"seed": OLD_STATES + 2}), []) == 1
    assert found(settings.model_copy(update={"seed": 0}), []) is None


def test_a_large_input_is_known_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svam.resume.CONTENT_BYTES", 3)
    (tmp_path / "a").write_text("content")
    before = identity(tmp_path)
    os.utime(tmp_path / "a", (1, 1))
    assert identity(tmp_path) != before and identity(tmp_path / "b") == "absent"


def test_a_second_writer_is_refused(settings: Params, tmp_path: Path) -> None:
    sentence = rf"generate@x/\w+.lock: process {os.getpid()} is doing the same work; wait for it or end it"
    with resumable_run("generate@x", settings, ["generate"], []):
        with pytest.raises(FileError, match=sentence), resumable_run("generate@x", settings, ["generate"], []):
            pass
        other = settings.model_copy(update={"seed": 9})
        assert found(other, []) is None, "other work may run beside it"
    assert found(settings, []) is None


def test_a_killed_run_leaves_no_lock(settings: Params, tmp_path: Path) -> None:
    kill(1, leave_one, settings, [])
    assert found(settings, []) == 1


def test_control_c_says_how_to_go_on(settings: Params, tmp_path: Path) -> None:
    @one_line_errors
    def stage(keep: bool) -> None:
        with resumable_run("generate@x", settings, ["generate"], []) as resume:
            if keep:
                resume.save_record("block", 1)
            raise KeyboardInterrupt

    for keep, sentence in ((True, "to go on from the last checkpoint, in"), (False, "to start over")):
        with console.capture() as capture, pytest.raises(SystemExit) as stop:
            stage(keep)
        assert stop.value.code == 130 and sentence in " ".join(capture.get().split())
        for state in states(tmp_path):
            assert keep and len(list(state.glob("block.json"))) == 1
            found(settings, [])


def test_a_full_disk_is_one_sentence_and_keeps_what_was_saved(settings: Params, tmp_path: Path) -> None:
    def full(file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FileError) as failure, resumable_run("generate@x", settings, ["generate"], []) as resume:
        resume.save_record("record", 5, lambda file: file.write_bytes(b"before") and None)
        resume.save_record("record", 6, full)
    assert re.search("saving the state of the run failed: No space left on device; .* make room", str(failure.value))
    assert "\n" not in str(failure.value) and len(list(states(tmp_path)[0].iterdir())) == 2
    assert found(settings, []) == 5


def test_saving_is_spread_over_time(tmp_path: Path) -> None:
    resume = Resume(tmp_path, 3600.0)
    assert not resume.due() and Resume(tmp_path, 0.0).due() and not Resume(None, 0.0).due()


@pytest.mark.parametrize("computed", [1, 9, 10, 25, 39])
def test_a_kill_loses_the_time_between_two_saves_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: int
) -> None:
    """And the block under way, of what is computed block by block: by encode, generate and cache_teacher. A block takes 7 s."""
    clock, starts = [0.0], list[int]()
    monkeypatch.setattr("svam.resume.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def run(until: int) -> None:
        def compute(block: slice) -> dict[str, Any]:
            if len(starts) == until:
                raise KeyboardInterrupt
            clock[0] += 7
            starts.append(block.start)
            return {"x": np.ones((1, 2), np.float32)}

        starts.clear()
        resume = Resume(tmp_path, 60.0)
        with resume.directory(tmp_path / "x") as folder:
            write_blocks(folder, {"x": ((40, 2), np.float32)}, in_batches(1, 40), compute, resume, "generate")

    with pytest.raises(KeyboardInterrupt):
        run(computed)
    run(40)
    assert 7 * (computed - starts[0]) < 60 + 7 and starts == list(range(starts[0], 40))
    assert np.load(tmp_path / "x/x.npy").all()


def test_leftovers_of_killed_runs_are_cleared(tmp_path: Path) -> None:
    dead, alive = f"{2**22 + 1}", f"{os.getppid()}"
    unburied = subprocess.Popen(["true"])  # its parent has not asked how it ended
    os.waitid(os.P_PID, unburied.pid, os.WEXITED | os.WNOWAIT)
    left = [dead, alive, unburied.pid]
    for name in (*(f".out.partial-{pid}" for pid in left), f".out.replaced.partial-{dead}", f".other.partial-{dead}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    clear_leftovers(tmp_path / "out")
    unburied.wait()
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"out", f".out.partial-{alive}", f".other.partial-{dead}"}, "what had stepped aside is back"
    assert (tmp_path / "out/file").read_text() == f".out.replaced.partial-{dead}"
