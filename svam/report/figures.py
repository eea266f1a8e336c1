"""The figures of a run as PNG. Equal numbers give equal bytes: no date, no library version, a fixed backend."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from svam.files import whole_file
from svam.npy import read_arrays
from svam.params import Report
from svam.report.grid import PictureRow, pca_colours, picture_grid
from svam.report.tables import (
    ERRORS,
    PREDICTORS,
    ROW_NAMES,
    RunMetrics,
    distillation_table,
    success_table,
    teacher_table,
)

matplotlib.use("Agg")  # before pyplot looks for a display
from matplotlib import pyplot as plt

COLOURS = {
    "policy": "#1f77b4", "held_out_instruction": "#9ecae1", "random": "#bbbbbb", "expert": "#333333",
    "decoupler": "#1f77b4", "repeat_reference": "#bbbbbb", "linear_probe": "#f4a582", "decoded_one_step": "#d6604d",
    "other_noise": "#333333", "mean_action": "#bbbbbb", "hold_last": "#d6604d",
}  # fmt: skip


def save(figure: Any, path: Path, dpi: int) -> None:
    """Write a matplotlib figure as PNG without the metadata that would change from version to version, and close it."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata={"Software": None})
    plt.close(figure)


def success_figure(run: RunMetrics) -> Any:
    """Success per task and on average, with 95 % intervals, beside random actions and the scripted expert."""
    lines = [line for line in success_table(run) if line["row"] in COLOURS and line["group"] != "tier"]
    lines = [line for line in lines if "micro" not in line["name"]]
    rows = [row for row in ROW_NAMES if any(line["row"] == row for line in lines)]
    names = list(dict.fromkeys(line["name"] for line in lines))
    figure, axes = plt.subplots(figsize=(max(6.0, 1.4 * len(names)), 4.0), layout="constrained")
    for k, row in enumerate(rows):
        mine = [next(line for line in lines if line["row"] == row and line["name"] == name) for name in names]
        rates = np.array([line["success"] for line in mine])
        ends = np.abs(np.array([[line["low"], line["high"]] for line in mine]).T - rates)
        place = np.arange(len(names)) + (k - (len(rows) - 1) / 2) * 0.8 / len(rows)
        style: dict[str, Any] = {"color": COLOURS[row], "label": run.row_name(row), "ecolor": "#777777", "capsize": 2}
        axes.bar(place, rates, 0.8 / len(rows), yerr=ends, **style)
    axes.set_xticks(np.arange(len(names)), [textwrap.fill(name, 14) for name in names], rotation=20 if len(names) > 6 else 0)
    axes.set_ylim(0.0, 1.05)
    axes.set_ylabel("success at any step")
    axes.set_title("Closed loop, on goals that no demonstration has (95 % Wilson intervals)", fontsize=10)
    figure.legend(ncol=len(rows), fontsize=8, loc="outside lower center")
    return figure


def distillation_figure(run: RunMetrics) -> Any:
    """Both decouplers beside their baselines, on held-out episodes."""
    lines = distillation_table(run)
    branches = list(run.decouplers)
    measures = {"cosine_moved": "centred cosine, patches that moved", "explained": "explained share of repeat's error"}
    figure, axes = plt.subplots(1, len(measures), figsize=(11.0, 4.0), squeeze=False, layout="constrained")
    for axis, (key, title) in zip(axes[0], measures.items(), strict=True):
        for k, name in enumerate(PREDICTORS):
            values = [line[key] for line in lines if line["predictor"] == name]
            place = np.arange(len(values)) + (k - 2) * 0.16
            axis.bar(place, values, 0.16, color=COLOURS[name], label=PREDICTORS[name])
        axis.axhline(0.0, color="black", linewidth=0.5)
        axis.set_xticks(np.arange(len(branches)), branches)
        # A baseline may be far worse than repeating: its bar is cut, the table has the number.
        axis.set_ylim(max(-0.5, axis.get_ylim()[0]), 1.0)
        axis.set_title(title)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncol=3, loc="outside lower center")
    return figure


def teacher_figure(run: RunMetrics) -> Any:
    """How well the teachers still see on frames that went through the autoencoder or came out of the video model."""
    lines = teacher_table(run)
    branches = list(dict.fromkeys(line["branch"] for line in lines))
    figure, axes = plt.subplots(1, len(branches), figsize=(5.0 * len(branches), 3.2), squeeze=False, layout="constrained")
    for axis, branch in zip(axes[0], branches, strict=True):
        mine = [line for line in lines if line["branch"] == branch]
        colours = ["#d6604d" if line["view"] in ("generated", "one_step") else "#1f77b4" for line in mine]
        axis.bar([line["view"].replace("_", "\n") for line in mine], [line["value"] for line in mine], color=colours)
        axis.set_title(f"{branch} teacher: {mine[0]['measure']}")
    return figure


def curve_figure(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Any:
    """The training loss of every part, each on its own axes; a running mean over a fortieth of the steps."""
    figure, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 2.8), squeeze=False, layout="constrained")
    for axis, (part, (steps, values)) in zip(axes[0], curves.items(), strict=True):
        width = max(1, len(values) // 40)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axis.plot(steps, values, color="#c6dbef", linewidth=0.6)
        axis.plot(steps[width - 1 :], smooth, color="#1f77b4")
        axis.set_ylim(0.0, float(np.quantile(values, 0.98)) * 1.1)
        axis.set_title(part.replace("_", " "), fontsize=9)
        axis.set_xlabel("step")
    axes[0][0].set_ylabel("training loss")
    return figure


def action_figure(offline: Mapping[str, Any]) -> Any:
    """Action error by step of the chunk and by dimension. It is not success."""
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.2), layout="constrained")
    for k, (key, name) in enumerate(ERRORS.items()):
        axes[0].plot(offline[key]["mae_per_step"], color=COLOURS[key], marker="o", markersize=3, label=name)
        values = offline[key]["mae_per_dimension"]
        axes[1].bar(np.arange(len(values)) + (k - 1) * 0.27, values, 0.27, color=COLOURS[key])
    axes[0].set_xlabel("step of the chunk")
    axes[0].set_ylabel("mean absolute error, physical units")
    axes[0].set_ylim(bottom=0.0)
    axes[0].legend(fontsize=8)
    axes[1].set_xlabel("action dimension")
    axes[1].set_xticks(range(len(offline["policy"]["mae_per_dimension"])))
    figure.suptitle("Held-out episodes, offline: this is not success", fontsize=10)
    return figure


def clips_figure(clips: NDArray[np.uint8]) -> Any:
    """Held-out clips (n, 2, T, H, W, 3) uint8: the truth above the generation."""
    rows: list[PictureRow] = [row for truth, made in clips for row in (("truth", list(truth)), ("generation", list(made)))]
    heading = "Held-out clips: the truth through the autoencoder, and below it the generation"
    return picture_grid(rows, ["observed", *(f"+{t}" for t in range(1, clips.shape[2]))], heading)[0]


def foresight_figure(arrays: Mapping[str, NDArray[Any]], clip: int) -> Any:
    """One window: the recorded future, and for every context entry its foresight as principal components, above what the
    teacher sees in the recorded future. Components and colours are computed over the entry's whole sequence, and those of
    truth and foresight are the same."""
    frames = arrays["frames"][clip]
    rows: list[PictureRow] = [("recorded", list(frames))]
    for name in (name.removeprefix("foresight_") for name in arrays if name.startswith("foresight_")):
        foreseen, truth = arrays[f"foresight_{name}"][clip], arrays.get(f"truth_{name}")
        both = foreseen if truth is None else np.concatenate([foreseen, truth[clip]])
        pictures = list(pca_colours(both))
        # A single picture (the goal frame) stands where its time is: at the end.
        places = [*[None] * (len(frames) - len(foreseen)), *pictures[: len(foreseen)]]
        rows.append((f"{name}\nforesight".replace("_", "-"), places))
        if truth is not None:
            rows.append((f"{name}\nof the truth".replace("_", "-"), pictures[len(foreseen) :]))
    return picture_grid(rows, ["observed", *(f"+{t}" for t in range(1, len(frames)))], "")[0]


def draw_all(
    folder: Path, run: RunMetrics, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], results: Path, video: Path,
    params: Report,
) -> None:  # fmt: skip
    """Write every figure that the run has numbers for as PNG into `folder`.

    Raises:
        FileError: an array of an earlier stage is missing or damaged.
    """
    figures: dict[str, Any] = {}
    if run.success:
        figures["success"] = success_figure(run)
    if run.decouplers:
        figures["distillation"] = distillation_figure(run)
    if teacher_table(run):
        figures["teachers"] = teacher_figure(run)
    if curves:
        figures["curves"] = curve_figure(curves)
    figures["clips"] = clips_figure(read_arrays(video / "samples")["clips"][: params.clips])
    if "offline" in run.results:
        figures["actions"] = action_figure(run.results["offline"])
        arrays = read_arrays(results / "foresight") if (results / "foresight").exists() else {}
        for clip in range(min(params.clips, len(arrays.get("frames", ())))):
            figures[f"foresight_{clip}"] = foresight_figure(arrays, clip)
    for name, figure in figures.items():
        save(figure, folder / f"{name}.png", params.dpi)
