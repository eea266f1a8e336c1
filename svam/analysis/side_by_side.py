"""`python -m svam.analysis.side_by_side`: two policies, for example S-VAM and VPP, on the same held-out windows: what each
foresees, where it looks, and what it would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray

from svam.analysis.attention import attention_weights, mark, overlay
from svam.analysis.foresight import held_out_in_turn
from svam.console import console, one_line_errors
from svam.contract import ContractError
from svam.device import prepare_torch
from svam.episodes.joined import open_store
from svam.episodes.store import EpisodeStore
from svam.episodes.windows import action_rows
from svam.evaluation.offline import encode_rows, episode_bounds, recorded_clips
from svam.models.svam import SVAM
from svam.report.figures import save
from svam.report.grid import GAP, PictureGrid, pca_colours
from svam.seeds import generator, seed_of

COLOURS = ("#1f77b4", "#d6604d")
"""Of the two policies' actions."""
DIMENSIONS = 8
"""Action dimensions drawn, the first ones."""
ATTENTION = "\nattention"
"""Ends the labels of rows under which attention is drawn."""
PICTURE = 1.0
"""Inches of a picture's side."""


@dataclass(frozen=True)
class Prediction:
    """One policy on n windows.

    entries: context entry -> (n, T, h, w, C) features. attention: (n, T, N, h, w) or None. actions: (n, K, A) physical units.
    """

    name: str
    entries: dict[str, NDArray[np.float32]]
    attention: NDArray[np.float32] | None
    actions: NDArray[np.float32]


def predict(store: EpisodeStore, model: SVAM, name: str, rows: NDArray[np.int64], seed: int) -> Prediction:
    """What the policy foresees and would do at store rows (n,).

    Raises:
        ContractError: the store's camera, image size, proprioception or actions are not what the policy was trained on.
    """
    dimensions = model.statistics.convention.dimensions
    if dimensions != store.action_dimensions:
        raise ContractError(f"{name}: acts in {dimensions} dimensions, but {store.path} has {store.action_dimensions}")
    inputs = encode_rows(store, model, rows, seed)
    actions = model.sample(inputs, [seed_of(seed, "side by side", int(row)) for row in rows])
    entries = {entry: values.float().cpu().numpy() for entry, values in inputs.entries.items()}
    return Prediction(name, entries, attention_weights(model, inputs), actions)


def compare_models(store: EpisodeStore, models: Sequence[SVAM], names: Sequence[str], count: int, seed: int) -> Any:
    """A figure of `count` windows of held-out episodes, of one task after the other, see `side_by_side`.

    Raises:
        ContractError: a policy does not fit the store, or the two see or foresee other things, which have no common columns.
    """
    cameras = {tuple(model.cameras) for model in models}
    videos = [model.foresight.video.config for model in models if model.foresight.video is not None]
    horizons = {(config.frames, config.stride) for config in videos} or {(1, 1)}
    seen: dict[str, set[Any]] = {"look through different cameras": cameras, "foresee different (frames, stride)": horizons}
    for what, found in seen.items():
        if len(found) > 1:
            raise ContractError(f"the two policies {what}: {sorted(found)}; expected the same")
    ((frames, stride),) = horizons
    draws, span = generator(seed, "side by side"), (frames - 1) * stride  # the whole horizon, where an episode is that long
    bounds = [store.bounds(episode) for episode in held_out_in_turn(store)[:count]]
    rows = np.asarray([draws.integers(start, max(start + 1, end - span)) for start, end in bounds], dtype=np.int64)
    clips = recorded_clips(store, rows, frames, stride, cameras.pop())
    predictions = [predict(store, model, name, rows, seed) for model, name in zip(models, names, strict=True)]
    chunk, real = action_rows(rows, *episode_bounds(store, rows), max(model.chunk for model in models))
    expert = store.targets(chunk.reshape(-1)).reshape(*chunk.shape, -1)
    titles = [store.instruction_of(int(episode)) for episode in store.episode_of(rows)]
    return draw(clips, predictions, np.where(real[..., None], expert, np.nan), titles)


def draw(
    clips: NDArray[np.uint8], predictions: Sequence[Prediction], expert: NDArray[np.floating], titles: Sequence[str]
) -> Any:
    """The figure: for each window the recorded frames (n, T, H, W, 3), below them every policy's foresight as principal
    components (of that entry's whole sequence) and its attention, and beside them the expert's actions (n, K, A), NaN past the
    episode's end, and the predicted ones."""
    count, steps = clips.shape[:2]
    rows = [picture_rows(clips[i], predictions, i) for i in range(count)]
    height = sum(PICTURE * len(part) * (1.0 + GAP) + 0.7 for part in rows)
    wide = PICTURE * steps * (1.0 + GAP) + 0.9
    figure = Figure(figsize=(wide + 4.2, height), layout="constrained")
    for i, part in enumerate(figure.subfigures(count, 1, squeeze=False)[:, 0]):
        part.suptitle(titles[i], fontsize=9)
        left, right = part.subfigures(1, 2, width_ratios=[wide, 4.2])
        grid = PictureGrid(left.subplots(), rows[i], ["observed", *(f"+{t}" for t in range(1, steps))])
        attended = [policy.attention[i] for policy in predictions if policy.attention is not None]
        places = [row for row, (label, _) in enumerate(rows[i]) if label.endswith(ATTENTION)]
        for row, weights in zip(places, attended, strict=True):
            mark(grid, row, weights)
        _draw_actions(right, predictions, expert[i], i, legend=i == 0)
    return figure


def picture_rows(clip: NDArray[np.uint8], predictions: Sequence[Prediction], window: int) -> list[Any]:
    steps = len(clip)
    rows: list[Any] = [("recorded", list(clip))]
    for policy in predictions:
        for entry, values in policy.entries.items():
            pictures = list(pca_colours(values[window]))
            # A single picture (the goal frame) stands where its time is: at the end.
            places = [None] * (steps - len(pictures)) + pictures if entry != "observation" else pictures
            rows.append((f"{policy.name}\n{entry.replace('_', '-')}", (places + [None] * steps)[:steps]))
        if policy.attention is not None:
            rows.append((policy.name + ATTENTION, list(overlay(clip, policy.attention[window].mean(axis=1)))))
    return rows


def _draw_actions(
    part: Any, predictions: Sequence[Prediction], expert: NDArray[np.floating], window: int, legend: bool
) -> None:
    """A small plot for each action dimension: the demonstrated one, and what each policy predicts."""
    shown = min(expert.shape[-1], DIMENSIONS)
    axes = part.subplots(shown, 1, squeeze=False, sharex=True)[:, 0]
    everything = np.concatenate([expert[:, :shown], *(policy.actions[window, :, :shown] for policy in predictions)])
    low, high = np.nanmin(everything, axis=0), np.nanmax(everything, axis=0)
    # A dimension that hardly changes must not look as wild as the others: a fifth of the widest span is the least.
    half = np.maximum(high - low, max(0.2 * float((high - low).max()), 1e-6)) * 0.55
    for d, axis in enumerate(axes):
        axis.plot(expert[:, d], color="black", marker="o", markersize=2.5, linewidth=1.0, label="demonstration")
        for policy, colour in zip(predictions, COLOURS, strict=True):
            axis.plot(policy.actions[window, :, d], color=colour, linewidth=1.2, label=policy.name)
        axis.set_ylim((low[d] + high[d]) / 2 - half[d], (low[d] + high[d]) / 2 + half[d])
        axis.tick_params(labelsize=6)
        axis.set_ylabel(f"action {d}", fontsize=6)
    axes[-1].set_xlabel("step of the chunk", fontsize=7)
    if legend:
        axes[0].legend(fontsize=6, ncol=1 + len(predictions), loc="lower center", bbox_to_anchor=(0.5, 1.0))


@one_line_errors
def side_by_side(
    first: Annotated[Path, typer.Argument(help="An S-VAM folder, as train_policy writes it.")],
    second: Annotated[Path, typer.Argument(help="Another one, for example of VPP.")],
    episodes: Annotated[Path, typer.Option(help="Episode store; held-out episodes are shown.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    names: Annotated[str, typer.Option(help="What the two are called, with a comma between.")] = "S-VAM,VPP",
    windows: Annotated[int, typer.Option(min=1, help="Windows shown, of one task after the other.")] = 3,
    seed: Annotated[int, typer.Option(help="Which windows, and all noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Draw two policies side by side on held-out windows: foresight, attention, and predicted against demonstrated actions."""
    labels = [name.strip() for name in names.split(",")]
    if len(labels) != 2 or not all(labels):
        raise ContractError(f"--names is {names!r}, expected two names with a comma between")

    chosen = prepare_torch(device, threads, seed)
    models = [SVAM.load(folder, chosen) for folder in (first, second)]
    figure = compare_models(open_store(episodes), models, labels, windows, seed)
    save(figure, out, dpi=100)
    console.print(f"{' and '.join(labels)} side by side: {out}")


if __name__ == "__main__":
    typer.run(side_by_side)
