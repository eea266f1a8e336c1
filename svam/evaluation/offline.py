"""The `offline` protocol, for data without a simulator: errors on held-out episodes, beside baselines. It is not success: a
policy may err on every action and still solve the task, or err little and drift away from all that it has seen.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from svam.console import console, track
from svam.contract import ContractError, Observation
from svam.episodes.store import EpisodeStore
from svam.episodes.windows import action_rows, clip_rows
from svam.models.foresight import BRANCHES
from svam.models.svam import SVAM, Inputs
from svam.models.views import apart, together
from svam.npy import write_arrays
from svam.params import Params
from svam.protocols import Evaluate
from svam.resume import NO_RESUME, Resume
from svam.seeds import generator, seed_of

if TYPE_CHECKING:  # it chooses modules by name, of which `foresight` uses none
    from svam.evaluation.policies import Evaluated

NOTICE = "errors on recorded episodes; this is not success: only a closed loop measures that"
PICTURED_CLIPS = 8
"""Windows whose foresight is written, for the report's figures."""
UNTAUGHT = ("one_step", "observation", "recorded")
"""Context entries that no teacher's view of the future can be compared with."""


def choose_windows(store: EpisodeStore, count: int, seed: int) -> NDArray[np.int64]:
    """Up to `count` rows of held-out episodes, increasing, each with a row before it in its episode (which hold-last needs).

    Raises:
        ContractError: no held-out episode has two time steps.
    """
    bounds = [store.bounds(int(e)) for e in store.episodes("held_out")]
    rows = np.concatenate([np.arange(start + 1, end, dtype=np.int64) for start, end in bounds])
    if not len(rows):
        raise ContractError(f"{store.path}: no held-out episode has two time steps; the offline protocol needs one")
    if len(rows) > count:
        rows = np.sort(generator(seed, "offline windows").choice(rows, count, replace=False))
    return rows


def action_errors(errors: NDArray[np.float64], valid: NDArray[np.bool_]) -> dict[str, Any]:
    """{mae, mae_per_dimension (A), mae_per_step (K)} of absolute errors (windows, K, A) in physical units; `valid`
    (windows, K) says which steps the episodes really have, and the others count nothing."""
    weight = valid.astype(np.float64)
    per_step = np.einsum("wka,wk->ka", errors, weight) / np.maximum(weight.sum(axis=0), 1.0)[:, None]
    per_dimension = np.einsum("wka,wk->a", errors, weight) / weight.sum()
    return {
        "mae": float(per_dimension.mean()),
        "mae_per_dimension": per_dimension.tolist(),
        "mae_per_step": per_step.mean(axis=1).tolist(),
    }


class FeatureErrors:
    """Squared errors of predicted (…, C) teacher features, channel by channel, in units of the truth's variance."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, NDArray[np.float64]] = {}

    def add(self, predicted: NDArray[np.float32], repeated: NDArray[np.float32], truth: NDArray[np.float32]) -> None:
        """Add a batch; all three have the same shape, the observed frame left out."""
        channels = truth.shape[-1]
        t = truth.reshape(-1, channels).astype(np.float64)
        values = {
            "error": np.square(predicted.reshape(-1, channels) - t).sum(axis=0),
            "repeat": np.square(repeated.reshape(-1, channels) - t).sum(axis=0),
            "sum": t.sum(axis=0),
            "square": np.square(t).sum(axis=0),
        }
        self.sums = {name: value + self.sums.get(name, 0.0) for name, value in values.items()}
        self.count += len(t)

    def summary(self) -> dict[str, float]:
        """{mse, repeat_reference_mse, explained}: `explained` = 1 - mse / repeat_reference_mse."""
        mean = self.sums["sum"] / self.count
        variance = np.maximum(self.sums["square"] / self.count - mean**2, 1e-12)
        error = float((self.sums["error"] / self.count / variance).mean())
        repeat = float((self.sums["repeat"] / self.count / variance).mean())
        return {"mse": error, "repeat_reference_mse": repeat, "explained": 1.0 - error / max(repeat, 1e-12)}


def observations_of(store: EpisodeStore, model: SVAM, rows: NDArray[np.int64]) -> list[Observation]:
    """What the policy would have seen at some rows, with each episode's own instruction."""
    frames = {camera: store.frames(rows, camera) for camera in model.cameras}
    extra = store.vector("proprioception", rows) if model.needs_proprioception else None
    episodes = store.episode_of(rows)
    return [
        Observation({c: f[i] for c, f in frames.items()}, store.instruction_of(int(e)), None if extra is None else extra[i])
        for i, e in enumerate(episodes)
    ]


def encode_rows(store: EpisodeStore, model: SVAM, rows: NDArray[np.int64], seed: int) -> Inputs:
    """The policy's inputs at some rows; fresh video noise, where there is such, is keyed by seed and row."""
    recorded = foreseen_clips(store, model, rows) if "recorded" in model.config.context else None
    return model.encode(observations_of(store, model, rows), [seed_of(seed, "offline", int(row)) for row in rows], recorded)


def episode_bounds(store: EpisodeStore, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First row (n,) of the episode of each row, and the row (n,) after its last one."""
    starts, ends = np.asarray([store.bounds(int(episode)) for episode in store.episode_of(rows)], dtype=np.int64).T
    return starts, ends


def recorded_clips(
    store: EpisodeStore, rows: NDArray[np.int64], frames: int, stride: int, cameras: Sequence[str] = ()
) -> NDArray[np.uint8]:
    """The clips (n, T, V H, W, 3) uint8 that were recorded from rows (n,) on, by V cameras; by the first if none is named."""
    future = clip_rows(rows, *episode_bounds(store, rows), frames, stride)
    return store.seen(future, cameras or store.cameras[:1])


def foreseen_clips(store: EpisodeStore, model: SVAM, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The recorded clips (n, T, V H, W, 3) uint8 of what the policy's video model foresees at rows (n,)."""
    config = model.foresight.video_model.config
    return recorded_clips(store, rows, config.frames, config.stride, model.cameras)


def true_features(model: SVAM, clips: NDArray[np.uint8], entry: str) -> NDArray[np.float32]:
    """What the teachers see in recorded clips (n, T, V H, W, 3): (n, T, V h, w, C), prepared as the reference of the current
    frame is. `generated` and `goal_frame` hold all teachers' channels."""
    foresight, frames = model.foresight, apart(torch.from_numpy(np.ascontiguousarray(clips)), model.foresight.views)
    seen = [foresight.recorded_features(branch, frames).cpu() for branch in _branches(model, entry)]
    return np.asarray(together(torch.cat(seen, dim=-1), foresight.views).numpy(), dtype=np.float32)


def _branches(model: SVAM, entry: str) -> list[str]:
    return [entry] if entry in BRANCHES else list(model.foresight.teachers)


def _references(model: SVAM, clips: NDArray[np.uint8], truth: NDArray[np.float32], entry: str) -> NDArray[np.float32]:
    """What the teachers see in the current frame (n, 1, V h, w, C): `truth` of the clips' first, where they see frames."""
    foresight, branches = model.foresight, _branches(model, entry)
    if not any(map(foresight.sees_clips, branches)):
        return truth[:, :1]
    observed = apart(torch.from_numpy(np.ascontiguousarray(clips[:, 0])), foresight.views)
    seen = [foresight.reference_features(branch, observed).cpu() for branch in branches]
    return np.asarray(together(torch.cat(seen, dim=-1)[:, None], foresight.views).numpy(), dtype=np.float32)


def evaluate_offline(
    store: EpisodeStore, model: SVAM, params: Evaluate, seed: int
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Action error over `params.offline.samples` samples per window, baselines, and foresight error.

    Samples share their window's foresight and differ in the action sampler's noise. Baselines: the mean training action,
    and hold-last, which repeats the action executed just before the observation.

    Returns:
        Metrics, and arrays for pictures of the first windows, evenly spread: `frames` (n, T, V H, W, 3) uint8, and for each
        entry `foresight_<entry>` and, where there is a truth, `truth_<entry>` (n, T, V h, w, C) float16.

    Raises:
        ContractError: the store has no held-out window, or the model returned NaN.
    """
    rows = choose_windows(store, params.offline.windows, seed)
    chunk, valid = action_rows(rows, *episode_bounds(store, rows), model.chunk)
    truth = store.targets(chunk.reshape(-1)).reshape(*chunk.shape, -1).astype(np.float64)
    last = store.vector("actions", rows - 1).astype(np.float64)[:, None]
    mean = np.asarray(store.statistics.actions.mean, dtype=np.float64)
    each: dict[str, list[NDArray[np.float64]]] = {"policy": [], "mean_of_samples": [], "best_sample": []}
    spread = []
    features: dict[str, FeatureErrors] = {}
    blocks = np.array_split(np.arange(len(rows)), -(-len(rows) // params.batch))
    for block in track(blocks, "offline", len(blocks)):
        padded = np.concatenate([block, np.repeat(block[-1:], params.batch - len(block))])
        inputs = encode_rows(store, model, rows[padded], seed)
        samples = np.stack(
            [
                model.sample(inputs, [seed_of(seed, "offline", int(row), sample) for row in rows[padded]])[: len(block)]
                for sample in range(params.offline.samples)
            ]
        ).astype(np.float64)
        errors = np.abs(samples - truth[block])
        each["policy"].append(errors.mean(axis=0))
        each["mean_of_samples"].append(np.abs(samples.mean(axis=0) - truth[block]))
        nearest = (errors * valid[block][..., None]).sum(axis=(2, 3)).argmin(axis=0)
        each["best_sample"].append(errors[nearest, np.arange(len(block))])
        spread.append(samples.std(axis=0).mean(axis=(0, 1)) * len(block))
        add_feature_errors(features, store, model, rows[block], inputs)
    metrics = {
        "notice": NOTICE,
        "windows": len(rows),
        "samples": params.offline.samples,
        "target": "expert_actions" if store.has("expert_actions") else "actions",
        **{name: action_errors(np.concatenate(blocks), valid) for name, blocks in each.items()},
        "sample_spread_per_dimension": [float(value) for value in np.sum(spread, axis=0) / len(rows)],
        "mean_action": action_errors(np.abs(mean - truth), valid),
        "hold_last": action_errors(np.abs(last - truth), valid),
        "foresight": {entry: errors.summary() for entry, errors in features.items()},
    }
    return metrics, clips_for_pictures(store, model, rows, params.batch, seed)


def write_offline(folder: Path, store: EpisodeStore, model: Evaluated, params: Params, resume: Resume) -> dict[str, Any]:
    """Run `evaluate_offline`, write its arrays to `foresight/*.npy` in `folder`, print the errors, and return the metrics. Of
    several sets: each in its own units, `sets` by name; the rest, and the arrays, are the first one's."""
    assert isinstance(model, SVAM)  # `params` say so
    if not store.sets:
        return _write_one(folder, store, model, params, resume)
    each = {}
    for name in model.sets:
        console.print(f"offline, {name}:", highlight=False, markup=False)
        each[name] = _write_one(folder / "sets" / name, store.sets[name], model.acting_as(name), params, NO_RESUME)
    first = next(iter(each))
    shutil.copytree(folder / "sets" / first / "foresight", folder / "foresight")
    return {**each[first], "sets": each}


def _write_one(folder: Path, store: EpisodeStore, model: SVAM, params: Params, resume: Resume) -> dict[str, Any]:
    """`write_offline` of one set."""
    record = resume.load_record("offline")
    if record is not None and record.file is not None:
        metrics: dict[str, Any] = record.value
        pictures: dict[str, NDArray[Any]] = load_file(record.file)
    else:
        metrics, pictures = evaluate_offline(store, model, params.evaluate, params.seed)
        pictures = {name: np.ascontiguousarray(values) for name, values in pictures.items()}
        resume.save_record("offline", metrics, lambda file: save_file(pictures, file))
    write_arrays(folder / "foresight", pictures)
    errors = {name: round(metrics[name]["mae"], 4) for name in ("policy", "mean_action", "hold_last")}
    console.print(f"offline, mean absolute action error: {errors}", highlight=False)
    return metrics


def add_feature_errors(
    features: dict[str, FeatureErrors], store: EpisodeStore, model: SVAM, rows: NDArray[np.int64], inputs: Inputs
) -> None:
    """Add the foresight errors of some windows, for each entry whose truth a teacher sees in the recorded future."""
    entries = [entry for entry in inputs.entries if entry not in UNTAUGHT]
    if not entries:
        return
    clips = foreseen_clips(store, model, rows)
    for entry in entries:
        truth, predicted = true_features(model, clips, entry), inputs.entries[entry][: len(rows)].float().cpu().numpy()
        future = truth[:, -1:] if entry == "goal_frame" else truth[:, 1:]
        repeated = np.broadcast_to(_references(model, clips, truth, entry), future.shape)
        features.setdefault(entry, FeatureErrors()).add(predicted[:, -future.shape[1] :], repeated, future)


def clips_for_pictures(
    store: EpisodeStore, model: SVAM, rows: NDArray[np.int64], batch: int, seed: int
) -> dict[str, NDArray[Any]]:
    """`evaluate_offline`'s second result."""
    if model.foresight.video is None:
        return {}
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(PICTURED_CLIPS, len(rows), batch)).astype(np.int64))]
    inputs = encode_rows(store, model, np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows))]), seed)
    arrays: dict[str, NDArray[Any]] = {"frames": foreseen_clips(store, model, rows)}
    for entry, values in inputs.entries.items():
        arrays[f"foresight_{entry}"] = values[: len(rows)].half().cpu().numpy()
        if entry not in UNTAUGHT:
            arrays[f"truth_{entry}"] = true_features(model, arrays["frames"], entry).astype(np.float16)
    return arrays
