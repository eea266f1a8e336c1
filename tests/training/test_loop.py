"""The training loop: schedule, EMA, selection, accumulation, and loud failure."""

from __future__ import annotations

import json
from pathlib import Path
from threading import current_thread, main_thread

import pytest
import torch
from torch import Tensor, nn

from svam.params import Optimiser
from svam.training.loop import AveragedWeights, DivergedError, fit, learning_rate_factor, made_ahead
from tests.sources.common import refused
from tests.toy import optimiser

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


def test_fit_learns_and_streams_its_curve(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    kept = fit(
        module, lambda b: linear_loss(module, b), batch_of, settings(steps=200), CPU, "line", tmp_path / "live",
        evaluate=lambda: {"error": (module.weight - 1).abs().max().item()}, evaluate_every=50,
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

    def evaluate() -> dict[str, float]:
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
