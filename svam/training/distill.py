"""Training a decoupler and measuring it beside its baselines (S-VAM section 3.3).

The video model and the teacher are frozen and their outputs were computed before, so a step is a read and a small
transformer. Statistics come from training windows; held-out windows are of other episodes and select nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svam import processes
from svam.console import console, track
from svam.contract import ContractError
from svam.device import sent
from svam.models.decoupler import Decoupler, DecouplerConfig
from svam.params import Distill, Machine
from svam.precision import mixed_precision
from svam.resume import NO_RESUME, Resume
from svam.shares import own_rows
from svam.training.batch_order import EndlessOrder
from svam.training.distill_data import GeneratedWindows, Rows, TeacherWindows
from svam.training.foresight_metrics import ChannelMoments, ForesightScore
from svam.training.loop import fit
from svam.training.one_step import OneStepFeatures

RIDGE = 1e-4
"""Of the linear probe, per token and in units of the standardised features' variance: enough to be well posed, no more."""
EVALUATIONS = 5
"""Points of the held-out curves."""


class DistillationData:
    """Everything that is read per window: `features`, `reference`, `targets`, `moved`."""

    def __init__(self, windows: GeneratedWindows, teacher: TeacherWindows, features: Rows) -> None:
        self.windows, self.teacher = windows, teacher
        self.features, self.targets, self.reference = features, teacher.targets, teacher.reference
        self.feature_shape: tuple[int, ...] = features[np.zeros(1, dtype=np.int64)].shape[1:]
        expected = (windows.frames_per_clip, windows.grid, windows.grid)
        if self.feature_shape[:3] != expected or teacher.targets.shape[1:4] != expected:
            raise ContractError(
                f"features of {windows.path} are {self.feature_shape} per window and targets of {teacher.path} "
                f"{teacher.targets.shape[1:]}; both must begin with {expected}"
            )

    def batch(self, numbers: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(F, reference, targets) float16 of the windows `numbers`."""
        rows, every = self.features, (self.reference, self.targets)
        features = rows.on_device(numbers) if isinstance(rows, OneStepFeatures) else torch.from_numpy(rows[numbers])
        reference, targets = (sent(torch.from_numpy(values[numbers]), device) for values in every)
        return sent(features, device), reference, targets


class TrainingStatistics:
    """Per-channel mean and deviation of F and targets, the targets' mean per position, and the closed-form linear probe.

    One pass over the training windows; nothing larger than (C_F + 1)^2 is kept. Statistics are over all frames; the centre
    and the probe over frames after the first, which is what metrics look at.

    Attributes: feature_mean, feature_std (C_F,), teacher_mean, teacher_std (C_i,), centre (h, w, C_i), and the probe's
    weight (C_F, C_i) and bias (C_i,) in physical units; float32.
    """

    def __init__(self, data: DistillationData, block: int = 16) -> None:
        train = data.windows.train
        c_f, c_i = data.feature_shape[-1], data.teacher.channels
        gram, cross = np.zeros((c_f + 1, c_f + 1)), np.zeros((c_f + 1, c_i))
        features, targets = ChannelMoments(c_f), ChannelMoments(c_i)
        centre = np.zeros((*data.feature_shape[1:3], c_i))
        # Sums of squares around a value near the mean keep their digits in float32 products.
        shift = data.features[train[:1]].astype(np.float32).reshape(-1, c_f).mean(axis=0)
        count = 0
        starts = range(0, len(train), block)
        for start in track(starts, "statistics", len(starts)):
            numbers = train[start : start + block]
            f, y = data.features[numbers].astype(np.float32), data.targets[numbers].astype(np.float32)
            features.add(f)
            targets.add(y)
            centre += y[:, 1:].sum(axis=(0, 1), dtype=np.float64)
            x = np.concatenate([(f[:, 1:] - shift).reshape(-1, c_f), np.ones((f[:, 1:].size // c_f, 1), np.float32)], axis=1)
            gram += x.T @ x
            cross += x.T @ y[:, 1:].reshape(-1, c_i)
            count += len(numbers)
        self.feature_mean, self.feature_std = features.result()
        self.teacher_mean, self.teacher_std = targets.result()
        self.centre = (centre / (count * (data.feature_shape[0] - 1))).astype(np.float32)
        penalty = RIDGE * gram[-1, -1] * np.append(np.square(self.feature_std, dtype=np.float64), 0.0)
        solution = np.linalg.solve(gram + np.diag(penalty), cross)
        self.weight = solution[:-1].astype(np.float32)
        self.bias = (solution[-1] - shift.astype(np.float64) @ solution[:-1]).astype(np.float32)

    def probe(self, features: NDArray[np.float16]) -> NDArray[np.float32]:
        """The linear probe's prediction (..., C_i) from F (..., C_F)."""
        return np.asarray(features.astype(np.float32) @ self.weight + self.bias, dtype=np.float32)

    def tensors(self, name: str) -> tuple[Tensor, Tensor]:
        """(mean, deviation) of `feature` or `teacher`."""
        return torch.from_numpy(getattr(self, f"{name}_mean")), torch.from_numpy(getattr(self, f"{name}_std"))


def build(data: DistillationData, statistics: TrainingStatistics, params: Distill) -> Decoupler:
    """A fresh decoupler of the sizes that data and params give, with its statistics."""
    frames, height, width, channels = data.feature_shape
    config = DecouplerConfig(
        feature_channels=channels, teacher_channels=data.teacher.channels, frames=frames, grid=(height, width),
        reference=data.teacher.attributes["reference"], anchor=params.anchor, input_norm=params.input_norm,
        positions=params.positions, width=params.width, blocks=params.blocks, heads=params.heads, dropout=params.dropout,
    )  # fmt: skip
    decoupler = Decoupler(config)
    decoupler.set_statistics(statistics.tensors("feature"), statistics.tensors("teacher"))
    return decoupler


def distill(
    data: DistillationData,
    params: Distill,
    seed: int,
    device: torch.device,
    name: str = "decoupler",
    live: Path | None = None,
    resume: Resume = NO_RESUME,
    machine: Machine | None = None,
) -> tuple[Decoupler, dict[str, Any]]:
    """Train one branch's decoupler; returns it and the metrics of `evaluate`. `live`: folder of DVCLive's curves. `machine`: as
    for `fit`."""
    torch.manual_seed(seed)
    statistics = TrainingStatistics(data)
    decoupler = build(data, statistics, params).to(device)
    bf16 = params.training.bf16
    few = data.windows.test[np.unique(np.linspace(0, len(data.windows.test) - 1, 48).astype(np.int64))]

    def curves(_: int) -> dict[str, float]:
        scores = score(data, statistics, predictors(data, statistics, decoupler, device, bf16, only=("decoupler",)), few)
        return {key: scores["decoupler"][key] for key in ("mse", "explained", "cosine_moved")}

    train = data.windows.train
    order = EndlessOrder(len(train), params.training.batch, seed, "batches")
    own = own_rows(params.training.batch)
    every = max(1, params.training.steps // EVALUATIONS)
    fit(
        decoupler, lambda b: decoupler.loss(*b), lambda number: data.batch(train[order.batch(number)[own]], device),
        params.training, device, name, live, curves, every, resume=resume, machine=machine,
        frozen=isinstance(data.features, OneStepFeatures),
    )  # fmt: skip
    processes.only_first_goes_on()
    return decoupler, evaluate(data, statistics, decoupler, device, bf16)


Predictor = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Places among the held-out windows (k,) -> predicted teacher features (k, T, h, w, C_i)."""


def predictors(
    data: DistillationData,
    statistics: TrainingStatistics,
    decoupler: Decoupler,
    device: torch.device,
    bf16: bool,
    only: tuple[str, ...] = ("decoupler", "linear_probe", "decoded_one_step", "other_noise"),
) -> dict[str, Predictor]:
    """The decoupler and its baselines, by name. `repeat_reference` is always among them: others are measured against it."""
    test, teacher, frames = data.windows.test, data.teacher, data.feature_shape[0]

    @torch.no_grad()
    def decoupled(places: NDArray[np.int64]) -> NDArray[np.float32]:
        features, reference, _ = data.batch(test[places], device)
        with mixed_precision(device, bf16):
            return decoupler(features, reference).float().cpu().numpy()  # type: ignore[no-any-return]

    def repeated(places: NDArray[np.int64]) -> NDArray[np.float32]:
        reference = data.reference[test[places]].astype(np.float32)
        return np.broadcast_to(reference[:, None], (len(places), frames, *reference.shape[1:]))

    every: dict[str, Predictor] = {
        "decoupler": decoupled,
        "linear_probe": lambda places: statistics.probe(data.features[test[places]]),
        "decoded_one_step": lambda places: teacher.one_step[places].astype(np.float32),
        "other_noise": lambda places: teacher.other_noise[places].astype(np.float32),
    }
    return {"repeat_reference": repeated} | {name: every[name] for name in only}


def score(
    data: DistillationData,
    statistics: TrainingStatistics,
    guesses: dict[str, Predictor],
    numbers: NDArray[np.int64],
    block: int = 16,
) -> dict[str, Any]:
    """`ForesightScore.result` of each predictor on the held-out windows `numbers`, frames after the first."""
    scores = {name: ForesightScore(statistics.centre, statistics.teacher_std) for name in guesses}
    places = np.searchsorted(data.windows.test, numbers)
    for start in range(0, len(places), block):
        part = places[start : start + block]
        chosen = data.windows.test[part]
        truth = data.targets[chosen][:, 1:].astype(np.float32)
        moved = data.teacher.moved[chosen][:, 1:]
        for name, guess in guesses.items():
            scores[name].add(guess(part)[:, 1:], truth, moved)
    return {name: s.result(scores["repeat_reference"]) for name, s in scores.items()}


def evaluate(
    data: DistillationData, statistics: TrainingStatistics, decoupler: Decoupler, device: torch.device, bf16: bool
) -> dict[str, Any]:
    """Every predictor on all held-out windows, the share of patches that moved there, and what the teacher cache measured."""
    test, teacher = data.windows.test, data.teacher
    return score(data, statistics, predictors(data, statistics, decoupler, device, bf16), test) | {
        "moved_share": float(teacher.moved[test][:, 1:].mean()), "held_out_windows": len(test),
        "target": teacher.attributes["target"], "teacher": teacher.attributes["metrics"],
    }  # fmt: skip


def print_results(metrics: dict[str, Any], branch: str) -> None:
    """The table that answers whether distillation was worth it."""
    console.print(f"{branch}: {metrics['held_out_windows']} held-out windows, {metrics['moved_share']:.1%} of patches moved")
    for name in ("decoupler", "repeat_reference", "linear_probe", "decoded_one_step", "other_noise"):
        row = metrics[name]
        console.print(
            f"  {name:17s} centred cosine on moved patches {row['cosine_moved']:6.3f}   explained {row['explained']:6.3f} "
            f"(moved {row['explained_moved']:6.3f})   mse {row['mse']:.4f}"
        )
