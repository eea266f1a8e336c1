"""The training loop: schedule, EMA, selection, accumulation, and loud failure."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from svam.checkpoint import load_tensors
from svam.device import compile_layers
from svam.episodes.store import EpisodeStore
from svam.errors import MachineError
from svam.models.attention import Attention, Block
from svam.models.foresight import part_folders
from svam.models.svam import Batch, Inputs
from svam.params import Machine, Moments, Optimiser, Text
from svam.resume import Resume
from svam.training import loop
from svam.training.finetune_video import denoising_loss
from svam.training.loop import (
    AveragedWeights,
    DivergedError,
    SharedLoss,
    _train_step,
    fit,
    learning_rate_factor,
    made_ahead,
)
from svam.training.prepare_backbones.text import Contrast, build, train_tokenizer
from tests.models.test_decoupler import fresh
from tests.models.test_video import inputs, tiny
from tests.sources.common import refused
from tests.tiny import make_svam, observations, policy_params
from tests.toy import committed, optimiser

CPU = torch.device("cpu")


def batch_of(number: int) -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(number))


def linear_loss(module: nn.Linear, batch: Tensor) -> Tensor:
    """Regress the sum of the inputs."""
    return (module(batch)[:, 0] - batch.sum(1)).square().mean()


def settings(**changes: object) -> Optimiser:
    values = {"steps": 60, "batch": 8, "learning_rate": 0.05, "warmup": 5, "ema": 0.9, "weight_decay": 0.0} | changes
    return optimiser(**values)


def test_schedule_warms_up_and_ends_at_zero_or_stays() -> None:
    cosine, constant = settings(steps=10, warmup=4), settings(steps=10, warmup=4, schedule="constant")
    for s in (cosine, constant):
        assert [round(learning_rate_factor(i, s), 3) for i in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert [learning_rate_factor(i, cosine) for i in (7, 10)] == pytest.approx([0.5, 0.0])
    assert [learning_rate_factor(i, constant) for i in (7, 10)] == [1.0, 1.0]


def test_batches_are_made_ahead_by_one_other_thread_and_its_errors_are_those_of_the_batch() -> None:
    made: list[int] = []

    def batch_of(number: int) -> int:
        assert current_thread() is not main_thread()
        made.append(number)
        if number == 7:
            raise KeyError("row 7")
        return number

    batches = made_ahead(batch_of, range(2, 9))
    assert [next(batches) for _ in range(5)] == [2, 3, 4, 5, 6]
    with pytest.raises(KeyError, match="row 7"):
        next(batches)
    assert made[:6] == [2, 3, 4, 5, 6, 7]
    assert list(made_ahead(str, range(1))) == ["0"]


def test_average_is_the_hand_computed_one() -> None:
    weight = nn.Parameter(torch.zeros(1))
    average = AveragedWeights([weight], decay=0.9)
    with torch.no_grad():
        weight.fill_(1.0)
    average.update()  # the first decay is (1 + 1) / (10 + 1)
    assert average.average[0].item() == pytest.approx(1 - 2 / 11)
    with average.applied():
        assert weight.item() == pytest.approx(1 - 2 / 11)
    assert weight.item() == 1.0


def test_without_decay_the_average_is_the_weights_and_takes_no_memory() -> None:
    weight = nn.Parameter(torch.zeros(1))
    average = AveragedWeights([weight], decay=0.0)
    with torch.no_grad():
        weight.fill_(1.0)
    average.update()
    assert average.average[0].item() == 1.0 and average.average[0].data_ptr() == weight.data_ptr()


def test_on_the_host_the_average_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updated by a thread from copies, so the weights may change at once."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    weights = [nn.Parameter(torch.zeros(50, 50)) for _ in range(2)]
    averages = [AveragedWeights([weight], 0.9, host) for weight, host in zip(weights, (False, True), strict=True)]
    for number in range(20):
        for weight, average in zip(weights, averages, strict=True):
            with torch.no_grad():
                weight.normal_(generator=torch.Generator().manual_seed(number))
            average.update()
    assert torch.equal(averages[0].average[0], averages[1].average[0])
    with averages[1].applied():
        assert torch.equal(weights[1], averages[0].average[0])
    assert torch.equal(weights[0], weights[1])


def test_fit_learns_and_streams_its_curve(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    kept = fit(
        module, lambda b: linear_loss(module, b), batch_of, settings(steps=200), CPU, "line", tmp_path / "live",
        evaluate=lambda _: {"error": (module.weight - 1).abs().max().item()}, evaluate_every=50,
    )  # fmt: skip
    assert kept["error"] < 0.05 and not module.training
    assert json.loads((tmp_path / "live" / "metrics.json").read_text())["step"] == 200
    assert (tmp_path / "live" / "plots" / "metrics" / "train" / "loss.tsv").read_text().count("\n") > 50


def test_curves_that_find_no_room_are_one_sentence(tmp_path: Path) -> None:
    def then_full(number: int) -> Tensor:
        if number == 0:
            (tmp_path / "live").mkdir(exist_ok=True)
            (tmp_path / "live/metrics.json").symlink_to("/dev/full")
        return batch_of(number)

    module = nn.Linear(3, 1)
    with refused("live: not written: No space left on device"):
        fit(module, lambda b: linear_loss(module, b), then_full, settings(), CPU, "line", tmp_path / "live")


def test_selection_keeps_the_lowest_evaluation() -> None:
    module = nn.Linear(3, 1)
    scores, seen = iter([3.0, 1.0, 2.0]), []

    def evaluate(_: int) -> dict[str, float]:
        seen.append(module.weight.detach().clone())
        return {"error": next(scores)}

    kept = fit(
        module, lambda b: linear_loss(module, b), batch_of, settings(), CPU, "line", None, evaluate, 20, select="error"
    )  # fmt: skip
    assert kept == {"error": 1.0, "step": 40.0}
    assert torch.equal(module.weight, seen[1]) and not torch.equal(seen[1], seen[2])


def test_accumulated_small_batches_equal_one_large_batch() -> None:
    results = []
    for accumulate, size in ((1, 8), (4, 2)):
        torch.manual_seed(0)
        module = nn.Linear(3, 1)
        data = torch.randn(8 * 20, 3, generator=torch.Generator().manual_seed(1))
        pieces = data.split(size)
        short = settings(steps=20, accumulate=accumulate)
        fit(module, lambda b: linear_loss(module, b), pieces.__getitem__, short, CPU, "line")  # noqa: B023
        results.append(module.weight.detach().clone())
    torch.testing.assert_close(results[0], results[1])


def test_the_same_seed_gives_the_same_bits_and_other_betas_others() -> None:
    results = []
    for betas in ([0.9, 0.999], [0.9, 0.999], [0.9, 0.9]):
        torch.manual_seed(0)
        module = nn.Linear(3, 1)
        fit(module, lambda b: linear_loss(module, b), batch_of, settings(bf16=True, betas=betas), CPU, "line")  # noqa: B023
        results.append(module.weight.detach().clone())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


def test_a_loss_that_is_not_finite_stops_with_the_part_and_step() -> None:
    module = nn.Linear(3, 1)
    with pytest.raises(DivergedError, match=r"line step 1: the loss is nan"):
        fit(module, lambda b: linear_loss(module, b) * float("nan"), batch_of, settings(), CPU, "line")


class HostReads(TorchDispatchMode):
    """Counts the numbers that Python reads out of tensors: on a GPU each waits for all that is queued."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_on_a_gpu_a_step_waits_for_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 steps have 100 points of the curve; weights and curve are those of a device whose every loss is looked at."""
    weights, curves, reads = [], [], []
    for beside in (False, True):
        monkeypatch.setattr(loop, "computes_beside", lambda _, beside=beside: beside)
        torch.manual_seed(0)
        module = nn.Linear(3, 1)
        with HostReads() as read:
            short = settings(steps=300, accumulate=2)
            fit(module, lambda b: linear_loss(module, b), batch_of, short, CPU, "line", tmp_path / str(beside))  # noqa: B023
        weights.append(module.weight.detach().clone())
        curves.append((tmp_path / str(beside) / "plots/metrics/train/loss.tsv").read_text())
        reads.append(read.count)
    assert torch.equal(*weights) and curves[0] == curves[1]
    assert reads == [300, 100]


NOWHERE = torch.device("meta")
"""Its tensors have no numbers: reading one raises, as do a copy to the host and an operation with a CPU's tensor."""
Trained = tuple[nn.Module, Callable[[Any], Tensor], Any]


def nowhere(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=NOWHERE)


def video_step(_: Path, __: EpisodeStore) -> Trained:
    model = tiny()
    given = tuple(tensor.to(NOWHERE) for tensor in inputs())
    return model, lambda b: denoising_loss(model, b[2], nowhere(2, dtype=torch.float32), b[2], b[0], b[1]).mean(), given


def decoupler_step(_: Path, __: EpisodeStore) -> Trained:
    model = fresh(dropout=0.1)
    return model, lambda b: model.loss(*b), (nowhere(2, 3, 2, 4, 5), nowhere(2, 2, 4, 6), nowhere(2, 3, 2, 4, 6))


def policy_step(parts: Path, store: EpisodeStore, **changes: Any) -> Trained:
    folders = part_folders(parts / "backbones", parts / "video", parts / "decouplers")
    dropouts = {"attention_dropout": 0.3, "residual_dropout": 0.1, "mlp_dropout": 0.05}
    changes |= {"transformer": policy_params().transformer.model_dump() | dropouts, "proprioception": True}
    svam = make_svam(store, folders, context=["geometric", "one_step", "observation"], **changes)
    seen = svam.encode(observations(store, 2, proprioception=True))
    assert seen.frames is not None and seen.proprioception is not None
    given = Inputs(
        {entry: values.to(NOWHERE) for entry, values in seen.entries.items()}, seen.text.to(NOWHERE), seen.frames.to(NOWHERE),
        seen.proprioception.to(NOWHERE),
    )  # fmt: skip
    batch = Batch(given, nowhere(2, 4, 3, dtype=torch.float32), nowhere(2, 4, dtype=torch.bool))
    return svam.network, lambda b: svam.loss(b, torch.Generator(), 4), batch


@pytest.mark.parametrize("made", [video_step, decoupler_step, policy_step, partial(policy_step, objective="epsilon")])
def test_on_a_gpu_a_step_of_no_loss_reads_a_number(
    made: Callable[[Path, EpisodeStore], Trained], parts: Path, store: EpisodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward and clipping, two batches a step. Fused AdamW and autocast do not know this device."""
    module, loss, batch = made(parts, store)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    module.train().to(NOWHERE)
    parameters = list(module.parameters())
    adam, average = torch.optim.AdamW(parameters), AveragedWeights(parameters, 0.9)
    for _ in range(2):
        shared, two = SharedLoss(module, loss), settings(accumulate=2)
        value = _train_step(shared, iter([batch, batch]), two, NOWHERE, adam, parameters, None)
        average.update()
        assert value.device == NOWHERE and all(p.grad is not None for p in parameters)
    with pytest.raises(RuntimeError, match="meta tensors"):
        _train_step(SharedLoss(module, lambda b: loss(b) * loss(b).item()), iter([batch]), settings(), NOWHERE, adam, [], None)


def test_the_loss_of_the_text_encoder_reads_its_padding_mask_as_the_page_says() -> None:
    section = Text.model_validate(committed("prepare_backbones.text", width=16, layers=1, heads=2))
    tokenizer = train_tokenizer(["push a"], 1024)
    contrast, ids = Contrast(build(section, tokenizer, (16, 16))).to(NOWHERE), nowhere(2, 5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="meta tensors"):
        contrast.loss(nowhere(2, 16, 16, 3, dtype=torch.uint8), ids, nowhere(2, dtype=torch.int64))


def test_networks_that_a_batch_runs_are_called_where_layers_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else ahead of the step, by another thread: see `made_ahead`."""
    monkeypatch.setattr(loop, "computes_beside", lambda _: True)
    found = {}
    for compiled, frozen in ((False, True), (True, False), (True, True)):
        module, numbers, here = nn.Linear(3, 1), list[int](), set[bool]()

        def watched(number: int) -> Tensor:
            numbers.append(number)  # noqa: B023
            here.add(current_thread() is main_thread())  # noqa: B023
            return batch_of(number)

        machine = Machine.model_validate(committed("machine", compile=compiled))
        fit(
            module, lambda b: linear_loss(module, b), watched, settings(steps=6), CPU, "line", machine=machine,  # noqa: B023
            frozen=frozen,
        )  # fmt: skip
        assert numbers == [*range(6)]
        found[compiled, frozen] = here
    assert found == {(False, True): {False}, (True, False): {False}, (True, True): {True}}


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_a_run_whose_average_lies_on_the_host_ends_as_one_on_the_device(
    ema: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with the best of its evaluations, and when it was interrupted."""
    monkeypatch.setattr(loop, "computes_beside", lambda _: True)
    waited: list[None] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(None))

    def train(average: str, resume: Resume, steps: int = 20) -> tuple[list[Tensor], dict[str, float]]:
        torch.manual_seed(0)
        module = nn.Linear(3, 1)
        kept = fit(
            module, lambda b: linear_loss(module, b), batch_of, settings(steps=steps, ema=ema, schedule="constant"), CPU,
            "line", None, lambda step: {"error": abs(step - 16) + module.bias.item()}, 4, "error", resume,
            Machine.model_validate(committed("machine", average=average)),
        )  # fmt: skip
        return [p.detach() for p in module.parameters()], kept

    expected, kept = train("device", Resume(None))
    assert kept["step"] == 16 and not waited
    train("host", Resume(tmp_path, 0.0), 12)
    assert len(waited) >= 12 * bool(ema)
    for resume in (Resume(tmp_path, 0.0), Resume(None)):
        weights, values = train("host", resume)
        assert values == kept and all(torch.equal(*pair) for pair in zip(weights, expected, strict=True))


def test_on_a_gpu_divergence_is_found_at_the_next_point_of_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "computes_beside", lambda _: True)
    module = nn.Linear(3, 1)
    losses = []

    def loss(batch: Tensor) -> Tensor:
        losses.append(linear_loss(module, batch))
        return losses[-1] * (float("nan") if len(losses) == 37 else 1.0)

    with pytest.raises(DivergedError, match=r"line steps 37 to 39: the loss is nan"):
        fit(module, loss, batch_of, settings(steps=300), CPU, "line")
    assert len(losses) == 39


def test_only_what_is_trained_is_saved(tmp_path: Path) -> None:
    """And a run that goes on from it ends with the same bits."""

    def train(resume: Resume, steps: int) -> nn.Sequential:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        module[0].requires_grad_(False)
        fit(
            module, lambda b: linear_loss(module, b), batch_of,  # type: ignore[arg-type]
            settings(steps=steps, schedule="constant"), CPU, "half", resume=resume,
        )  # fmt: skip
        return module

    whole = train(Resume(None), 20)
    resume = Resume(tmp_path, 0.0)
    train(resume, 12)
    record = resume.load_record("training")
    assert record is not None and record.file is not None
    saved = {name for name in load_tensors(record.file) if name.startswith("module/")}
    assert saved == {"module/1.weight", "module/1.bias"}
    assert torch.equal(train(resume, 20)[1].weight, whole[1].weight)


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_moments_of_eight_bits_learn_alike_and_resume_to_the_same_bits(tmp_path: Path, ema: float) -> None:
    pytest.importorskip("bitsandbytes")

    def train(moments: Moments, steps: int, resume: Resume) -> tuple[nn.Linear, float]:
        torch.manual_seed(0)
        module = nn.Linear(64, 64)  # of less than 4096 weights the moments stay float32
        losses = []

        def loss(batch: Tensor) -> Tensor:
            value = (module(batch) - batch.flip(1)).square().mean()
            losses.append(value.item())
            return value

        def batch(number: int) -> Tensor:
            return torch.randn(32, 64, generator=torch.Generator().manual_seed(number))

        short = settings(steps=steps, learning_rate=0.01, schedule="constant", ema=ema)
        fit(module, loss, batch, short, CPU, "flip", resume=resume, moments=moments)
        return module, losses[-1] / losses[0]

    (exact, share), (whole, share_of_eight) = (train(moments, 60, Resume(None)) for moments in ("float32", "int8"))
    assert share < 0.3 and share_of_eight == pytest.approx(share, rel=0.05)
    assert not torch.equal(exact.weight, whole.weight)
    resume = Resume(tmp_path, 0.0)
    train("int8", 35, resume)
    record = resume.load_record("training")
    assert record is not None and record.file is not None
    assert load_tensors(record.file)["adam/0/state1"].dtype == torch.uint8
    assert torch.equal(train("int8", 60, resume)[0].weight, whole.weight)


def test_moments_of_eight_bits_without_their_library_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    module = nn.Linear(3, 1)
    with pytest.raises(MachineError, match=r"moments is 'int8', but bitsandbytes is not installed: pip install .*\[cards\]"):
        fit(module, lambda b: linear_loss(module, b), batch_of, settings(), CPU, "line", moments="int8")


def test_compiled_layers_give_the_same_loss_and_gradients() -> None:
    """Captured as graphs, which here run as they are: what the compiler makes of them is its own. Each is of one shape."""

    torch.manual_seed(0)
    layers = [nn.Linear(3, 8), *(Block(8, 2) for _ in range(3)), nn.Linear(8, 1)]
    module, graphs = nn.Sequential(*layers), list[Any]()

    def backend(graph: Any, inputs: Any) -> Any:
        assert not any(isinstance(given, torch.SymInt) for given in inputs)
        graphs.append(graph)
        return graph.forward

    values = []
    for compiled in (False, True):
        if compiled:
            compile_layers(module, backend=backend)
        for size in (8, 5):
            module.zero_grad()
            value = module(batch_of(0)[None, :size]).sum()
            value.backward()
            values.append([value.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    for eager, graph in zip(values[:2], values[2:], strict=True):
        for pair in zip(eager, graph, strict=True):
            torch.testing.assert_close(*pair)
    assert len(graphs) == 2  # equal layers share one


def test_layers_of_some_kinds_are_compiled_wherever_they_are() -> None:
    module, graphs = nn.Sequential(nn.Sequential(Block(8, 2), Block(8, 2)), nn.Linear(8, 1)), list[Any]()

    def backend(graph: Any, _: Any) -> Any:
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compile_layers(module, (Attention,), backend=backend)
    module(torch.randn(1, 8, 8))
    assert len(graphs) == 1 and nn.functional.gelu not in graphs[0]
