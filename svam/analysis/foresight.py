"""What foresight holds: the gap that distillation could close, depth and features of the future, and where the policy looks.

All of it is measured on held-out windows of `data/generated`. What a variant or a data set lacks is left out, and a sentence
in `left_out` says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from svam.analysis import attention, depth_probe, gap
from svam.console import track
from svam.contract import ContractError
from svam.episodes.store import AnnotatedRows, EpisodeStore
from svam.evaluation.offline import encode_rows, recorded_clips
from svam.files import write_json
from svam.models.foresight import BRANCHES, ForesightModel
from svam.models.svam import SVAM
from svam.models.teachers import Teacher
from svam.params import Foresight
from svam.report import figures
from svam.report.grid import PictureRow, pca_colours, picture_grid
from svam.report.tables import rounded
from svam.seeds import seed_of
from svam.training.distill_data import GeneratedWindows, annotated_frames, recorded
from svam.training.foresight_metrics import moved_patches
from svam.training.one_step import OneStepFeatures
from svam.training.teacher_metrics import valid_depth

MOMENTS = 8
"""Of an episode, in the sequence figure."""
EXAMPLES = 6
"""In the depth figure."""


@dataclass
class AnalysisInputs:
    """What is analysed: the windows and the store they are of, the frozen parts that made them, the distilled branches, the
    seed, and the sentences about what could not be measured."""

    windows: GeneratedWindows
    store: EpisodeStore
    model: ForesightModel
    branches: Sequence[str]
    params: Foresight
    seed: int
    left_out: list[str] = field(default_factory=list)

    @property
    def held_out_episodes(self) -> NDArray[np.int64]:
        """(Wh,) the episode of each held-out window."""
        return self.store.episode_of(self.windows.rows[self.windows.test, 0] % len(self.store))

    def truth(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Recorded frames (k, T, H, W, 3) of windows."""
        return recorded(self.store, self.windows.rows[numbers])


def measure_gap(inputs: AnalysisInputs) -> dict[str, dict[str, gap.Sums]]:
    """Predictor -> measure -> sums over the held-out windows, see `svam.analysis.gap`."""
    windows, model, batch = inputs.windows, inputs.model, inputs.params.batch
    teachers = (teacher for teacher in model.teachers.values() if isinstance(teacher, Teacher))
    teacher = next((teacher for teacher in teachers if teacher.config.objective == "segmentation"), None)
    labels = inputs.store.annotation("segmentation")
    if teacher is None:
        inputs.left_out.append("IoU of robot and object: no teacher was trained on segmentation.")
    elif labels is None or not len(labels.rows):
        inputs.left_out.append("IoU against the simulator: the episodes have no segmentation; the teacher's own view remains.")
    starts = range(0, len(windows.test), max(1, batch // windows.frames_per_clip))
    parts: dict[str, list[dict[str, gap.Sums]]] = {}
    for start in track(starts, "gap", len(starts)):
        numbers = windows.test[start : start + starts.step]
        places = np.arange(start, start + len(numbers), dtype=np.int64)
        truth = inputs.truth(numbers)
        flat = torch.from_numpy(truth.reshape(-1, *truth.shape[2:]))
        reconstruction = model.reconstruct(flat).cpu().numpy().reshape(truth.shape)
        many, other = windows.frames[numbers], windows.other_noise_frames[places]
        clips = {
            "multi_step": many, "one_step": windows.one_step_frames[places],
            "repeat": np.broadcast_to(truth[:, :1], truth.shape), "reconstruction": reconstruction,
        }  # fmt: skip
        sums = {row: gap.pixel_sums(clip, truth, reconstruction, windows.grid) for row, clip in clips.items()}
        sums["seed_to_seed"] = gap.pixel_sums(many, other, other, windows.grid)
        if teacher is not None:
            shown = {row: clip[:, 1:] for row, clip in {**clips, "truth": truth, "other": other}.items()}
            shown["repeat"] = truth[:, :1]  # one picture: the teacher looks at it once
            seen = {row: predicted_labels(teacher, frames, batch) for row, frames in shown.items()}
            seen["repeat"] = np.broadcast_to(seen["repeat"], seen["truth"].shape)
            everywhere = np.ones(seen["truth"].shape[:2], dtype=bool)
            known, simulated = simulator_labels(labels, windows.rows[numbers], seen["truth"])
            for row in clips:
                sums[row] |= gap.label_sums(seen[row], simulated, known, "iou")
                sums[row] |= gap.label_sums(seen[row], seen["truth"], ~known, "agree")
            sums["seed_to_seed"] |= gap.label_sums(seen["multi_step"], seen["other"], everywhere, "agree")
        for row, measures in sums.items():
            parts.setdefault(row, []).append(measures)
    return {row: gap.joined(blocks) for row, blocks in parts.items()}


def predicted_labels(teacher: Teacher, frames: NDArray[np.uint8], batch: int) -> NDArray[np.uint8]:
    """Classes (..., H, W) that the teacher's head sees in frames (..., H, W, 3)."""
    flat = torch.from_numpy(np.ascontiguousarray(frames).reshape(-1, *frames.shape[-3:]))
    return teacher.on_frames(flat, batch, teacher.annotate).numpy().astype(np.uint8).reshape(frames.shape[:-1])


def simulator_labels(
    labels: AnnotatedRows | None, rows: NDArray[np.int64], like: NDArray[np.uint8]
) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
    """Which future frames (k, T - 1) of `rows` (k, T) the simulator annotated, and its labels there (0 elsewhere), of the
    shape of `like`.

    Raises:
        ContractError: the annotations are of another size than the frames.
    """
    known, values = np.zeros(like.shape[:2], dtype=bool), np.zeros_like(like)
    if labels is not None and len(labels.rows):
        w, t = annotated_frames(rows, labels.rows).T
        annotated = labels.values(np.searchsorted(labels.rows, rows[w, t]))
        if annotated.shape[1:] != like.shape[2:]:
            raise ContractError(
                f"segmentation is {annotated.shape[1:]} pixels, the frames are {like.shape[2:]}; expected the same"
            )
        known[w, t - 1], values[w, t - 1] = True, annotated
    return known, values


def probe_depth(inputs: AnalysisInputs) -> tuple[dict[str, Any], Any] | None:
    """Depth of the future read from frozen features: `depth_probe.score_depth`'s numbers and a figure; None where the
    episodes have too little depth for either side of the split."""
    windows, store, params = inputs.windows, inputs.store, inputs.params
    labels = store.annotation("depth")
    known = labels.rows if labels is not None else np.empty(0, dtype=np.int64)
    both = (windows.train, windows.test)
    sides = [depth_probe.choose_frames(windows.rows, numbers, known, params.probe_frames) for numbers in both]
    if labels is None or not all(len(numbers) for numbers, _ in sides):
        inputs.left_out.append("Depth of the future: the windows hold no frame with depth on both sides of the split.")
        return None
    if "geometric" not in inputs.branches:
        inputs.left_out.append("Depth from geometric foresight: that branch is not distilled (distill.branches).")
    train, test = ((n, t, labels.values(np.searchsorted(labels.rows, windows.rows[n, t])).astype(np.float32)) for n, t in sides)
    features = probe_features(inputs)
    heads = depth_probe.fit_heads(features, train, windows.grid, params.batch)
    predicted = depth_probe.read_depth(heads, features, test, windows.grid, params.batch)
    numbers, frames, truth = test
    future = store.frames(windows.rows[numbers, frames])
    observed = store.frames(windows.rows[numbers, 0])
    moved = moved_patches(np.stack([observed, future], axis=1), windows.grid)[:, 1]
    valid = train[2][valid_depth(train[2])]
    episodes = store.episode_of(windows.rows[numbers, 0])
    boot = gap.EpisodeBootstrap(episodes, params.resamples, inputs.seed)
    scores = depth_probe.score_depth(predicted, test, moved, max(float(valid.std(dtype=np.float64)), 1e-9), boot)
    shown = most_moving(moved.sum(axis=(1, 2)), episodes, store.episode_task[episodes], EXAMPLES)
    figure = depth_probe.depth_figure(
        observed[shown], future[shown], truth[shown], {k: v[shown] for k, v in predicted.items()}, frames[shown].tolist()
    )
    return scores | {"training_frames": len(train[0])}, figure


def probe_features(inputs: AnalysisInputs) -> depth_probe.Features:
    """What depth is read from, by source: each (n, h, w, C) at frames t of windows n."""
    windows, model, store = inputs.windows, inputs.model, inputs.store
    one_step = windows.features if windows.features is not None else OneStepFeatures(windows, model)

    def features(numbers: NDArray[np.int64], frames: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        each = np.arange(len(numbers))
        step = torch.from_numpy(one_step[numbers]).to(model.device).float()
        reference = model.reference_features("geometric", torch.from_numpy(store.frames(windows.rows[numbers, 0])))
        tokens = {"repeat": reference, "one_step": step[each, frames]}
        if "geometric" in inputs.branches:
            tokens["geometric"] = model.decouple("geometric", step, reference)[each, frames]
        if model.sees_clips("geometric"):
            clips = torch.from_numpy(windows.frames[numbers]), torch.from_numpy(recorded(store, windows.rows[numbers]))
            tokens["generated"] = model.clip_features("geometric", clips[0])[each, frames]
            tokens["truth"] = model.recorded_features("geometric", clips[1])[each, frames]
        else:  # each of the frames that are asked for, once
            tokens["generated"] = model.teacher_features("geometric", torch.from_numpy(windows.frames[numbers, frames]))
            future = torch.from_numpy(store.frames(windows.rows[numbers, frames]))
            tokens["truth"] = model.reference_features("geometric", future)
        return {name: values.cpu().numpy() for name, values in tokens.items()}

    return features


def most_moving(
    moved: NDArray[np.integer], episodes: NDArray[np.int64], tasks: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """Places of up to `count` examples: of each episode the one that moves most, and of these one of each task in turn, those
    that move most first; in order. `moved`, `episodes`, `tasks`: (n,), of each example."""
    order = np.argsort(-moved, kind="stable")
    best = order[np.sort(np.unique(episodes[order], return_index=True)[1])]
    turn = np.asarray([int((tasks[best[:i]] == tasks[place]).sum()) for i, place in enumerate(best)], dtype=np.int64)
    return np.sort(best[np.argsort(turn, kind="stable")[:count]])


def measure_attention(inputs: AnalysisInputs, policy: SVAM) -> tuple[list[dict[str, float]], Any] | None:
    """`attention.score_attention` on held-out windows, and a figure; None where the policy has no Uni-Perceiver over time."""
    windows, batch = inputs.windows, inputs.params.batch
    if inputs.store.sets and policy.needs_proprioception:
        inputs.left_out.append("Attention over foreseen frames: proprioception differs between the sets of the windows.")
        return None
    starts = range(0, len(windows.test), batch)
    parts = []
    for start in track(starts, "attention", len(starts)):
        rows = windows.rows[windows.test[start : start + batch], 0] % len(inputs.store)
        weights = attention.attention_weights(policy, encode_rows(inputs.store, policy, rows, inputs.seed))
        if weights is None:
            inputs.left_out.append(
                f"Attention over foreseen frames: context {policy.config.context} with {policy.config.aggregator} has none."
            )
            return None
        parts.append(weights)
    weights, frames = np.concatenate(parts), inputs.store.seen(windows.rows[windows.test] % len(inputs.store), policy.cameras)
    moved = moved_patches(frames, weights.shape[-1], len(policy.cameras))
    episodes = inputs.held_out_episodes
    shown = most_moving(moved.sum(axis=(1, 2, 3)), episodes, inputs.store.episode_task[episodes], inputs.params.clips)
    instructions = [inputs.store.instruction_of(int(e)) for e in episodes[shown]]
    lines = attention.score_attention(weights, frames)
    return lines, attention.attention_figure(frames[shown], weights[shown], instructions)


def sequence_figures(inputs: AnalysisInputs) -> list[Any]:
    """For a held-out episode of each task in turn: the last foreseen frame of every branch at moments along the episode, above
    what the teacher sees in the frame that was really recorded then. Components are computed over the whole sequence, foreseen
    and real."""
    if not inputs.branches:
        inputs.left_out.append("Foresight beside the teacher along an episode: no branch is distilled (distill.branches).")
        return []
    return [_sequence(inputs, episode) for episode in held_out_in_turn(inputs.store)[: inputs.params.clips]]


def held_out_in_turn(store: EpisodeStore) -> list[int]:
    """The held-out episodes, one of each task in turn."""
    by_task: dict[str, list[int]] = {}
    for episode in store.episodes("held_out").tolist():
        by_task.setdefault(store.task_of(episode), []).append(episode)
    rounds = itertools.zip_longest(*by_task.values())
    return [episode for one_of_each in rounds for episode in one_of_each if episode is not None]


def _sequence(inputs: AnalysisInputs, episode: int) -> Any:
    store, model = inputs.store, inputs.model
    config = model.video_model.config
    start, end = store.bounds(episode)
    last = max(start, end - 1 - (config.frames - 1) * config.stride)
    rows = np.unique(np.linspace(start, last, MOMENTS).astype(np.int64))
    instruction = store.instruction_of(episode)
    observed = torch.from_numpy(store.frames(rows))
    seeds = [seed_of(inputs.seed, "foresight sequence", int(row)) for row in rows]
    entries = [branch for branch in BRANCHES if branch in inputs.branches]
    foreseen = model.encode(observed, [instruction] * len(rows), entries, seeds).entries
    recorded = recorded_clips(store, rows, config.frames, config.stride)
    pictures: list[PictureRow] = [("observed", list(observed.numpy())), ("recorded\nfuture", list(recorded[:, -1]))]
    for branch in entries:
        predicted = foreseen[branch].float().cpu().numpy()
        real = model.recorded_features(branch, torch.from_numpy(recorded)).cpu().numpy()
        colours = pca_colours(np.stack([predicted, real]))
        pictures += [(f"{branch}\nforesight", list(colours[0, :, -1])), (f"{branch}\nteacher", list(colours[1, :, -1]))]
    ahead = (config.frames - 1) * config.stride / store.rate_hz
    heading = f"{store.task_of(episode)}: '{instruction}'; foresight {ahead:.2g} s ahead, beside the teacher on what came"
    return picture_grid(pictures, [f"{(row - start) / store.rate_hz:.2f} s" for row in rows], heading)[0]


def measures_figure(metrics: Mapping[str, Any]) -> Any:
    """The stage's numbers as one figure: the gap with its intervals, and where they were measured depth by source and attention
    by frame."""
    panels: dict[str, tuple[float, Callable[[Any, Any], None]]]
    panels = {"gap": (5.0, gap.draw), "depth": (4.0, depth_probe.draw), "attention": (3.2, attention.draw)}
    shown = [(metrics[name], *panel) for name, panel in panels.items() if name in metrics]
    widths = [width for _, width, _ in shown]
    figure = Figure(figsize=(sum(widths), 3.8), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False, width_ratios=widths)[0]
    for axis, (measured, _, draw) in zip(axes, shown, strict=True):
        draw(axis, measured)
        axis.tick_params(labelsize=7)
    return figure


def write_analysis(folder: Path, inputs: AnalysisInputs, policy: Callable[[], SVAM]) -> dict[str, Any]:
    """Write `metrics.json`, `foresight.md`, `plots/*.json` and the figures into `folder`; returns the metrics. `policy` is
    called when the model of `inputs` is no longer needed."""
    sums = measure_gap(inputs)
    metrics: dict[str, Any] = {"gap": gap.summary(sums, inputs.held_out_episodes, inputs.params.resamples, inputs.seed)}
    drawn: dict[str, Any] = {f"sequence_{i}": figure for i, figure in enumerate(sequence_figures(inputs))}
    pages, plots = [gap.markdown(metrics["gap"])], {"gap": gap.table(metrics["gap"])}
    if (depth := probe_depth(inputs)) is not None:
        metrics["depth"], drawn["depth"] = depth
        plots["depth"] = depth_probe.table(metrics["depth"])
        pages.append(depth_probe.markdown(metrics["depth"]))
    if (attended := measure_attention(inputs, policy())) is not None:
        metrics["attention"], drawn["attention"] = attended
        plots["attention"] = metrics["attention"]
        pages.append(attention.markdown(metrics["attention"]))
    drawn["measures"] = measures_figure(metrics)
    metrics["left_out"] = inputs.left_out
    if inputs.left_out:
        pages.append("\n".join(["## Left out", "", *(f"- {sentence}" for sentence in inputs.left_out)]))
    write_json(folder / "metrics.json", rounded(metrics))
    (folder / "foresight.md").write_text("\n\n".join(["# What foresight holds", *pages]) + "\n", encoding="utf-8")
    for name in ("gap", "depth", "attention"):  # empty where left out: the plots of dvc.yaml name every file
        write_json(folder / "plots" / f"{name}.json", rounded(plots.get(name, [])))
    for name, figure in drawn.items():
        figures.save(figure, folder / f"{name}.png", inputs.params.dpi)
    return metrics
