"""What a teacher sees: targets on the generated clips and the reference of the current frame (S-VAM section 3.3, eq. 4).

Another teacher, or another reference, reads the same `generated.zarr` again: nothing is generated here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from svam.console import progress_bar
from svam.contract import SEGMENTATION_CLASSES, ContractError
from svam.episodes.arrays import GroupWriter, round_mantissa
from svam.episodes.rows import RowReader
from svam.episodes.store import AnnotatedRows, EpisodeStore
from svam.models.teachers import Teacher, to_grid
from svam.params import CacheTeacher
from svam.resume import NO_RESUME, Resume
from svam.training.distill_data import TEACHER_SCHEMA, GeneratedWindows
from svam.training.foresight_metrics import centred_cosine, moved_patches
from svam.training.teacher_metrics import confusion, depth_error, intersection_over_union
from svam.training.window_arrays import WindowArray, announce, batches, open_arrays, to_stored

Target = Literal["generated", "ground_truth"]
Features = Callable[[NDArray[np.uint8]], NDArray[np.float16]]
"""Frames (..., H, W, 3) uint8 -> teacher features (..., h, w, C) float16, rounded as they are stored."""


def teacher_features(teacher: Teacher, grid: int, params: CacheTeacher, device: torch.device) -> Features:
    """The teacher on frames of any leading shape, `params.batch` frames at a time, on the grid of F (as `ForesightModel` does
    it)."""

    def features(frames: NDArray[np.uint8]) -> NDArray[np.float16]:
        flat = torch.from_numpy(frames.reshape(-1, *frames.shape[-3:]))
        parts = [
            to_grid(teacher.features(part.to(device).permute(0, 3, 1, 2).float() / 255.0).float(), grid).cpu()
            for part in torch.split(flat, params.batch)
        ]
        tokens = round_mantissa(to_stored(torch.cat(parts)), params.mantissa_bits)
        return tokens.reshape(*frames.shape[:-3], *tokens.shape[1:])

    return features


def arrays_of(windows: GeneratedWindows, channels: int, params: CacheTeacher) -> dict[str, WindowArray]:
    """What is written: float16 but for `moved`."""
    token = (windows.grid, windows.grid, channels)
    clip = (windows.frames_per_clip, *token)
    shapes = {"targets": clip, "reference": token, "one_step": clip, "other_noise": clip}
    rows = {name: len(windows) if name in ("targets", "reference") else len(windows.test) for name in shapes}
    arrays = {name: WindowArray(rows[name], shape, np.float16, params.mantissa_bits) for name, shape in shapes.items()}
    return arrays | {"moved": WindowArray(len(windows), clip[:-1], np.uint8)}


def cache_windows(
    path: Path,
    windows: GeneratedWindows,
    store: EpisodeStore,
    teacher: Teacher,
    branch: str,
    params: CacheTeacher,
    target: Target,
    device: torch.device,
    resume: Resume = NO_RESUME,
) -> dict[str, Any]:
    """Write the arrays that `TeacherWindows` reads to `path` (which the caller makes whole); returns and stores the metrics.

    Args:
        target: `generated`: targets on V^; `ground_truth`: on the recorded future ("w/o self-distillation"), and so is `moved`.

    Raises:
        ContractError: the windows are of another store.
    """
    if windows.rows.min() < 0 or windows.rows.max() >= len(store):
        raise ContractError(
            f"{windows.path}: rows up to {windows.rows.max()}, but {store.path} has {len(store)}; run generate on this store"
        )
    arrays = arrays_of(windows, teacher.channels, params)
    announce(f"cache_teacher {branch}", arrays)
    features = teacher_features(teacher, windows.grid, params, device)
    block = max(1, params.batch // windows.frames_per_clip)
    centre = np.zeros(arrays["reference"].shape, dtype=np.float64)
    references: dict[str, list[NDArray[np.float16]]] = {"frame": [], "reconstruction": []}

    def of_windows(numbers: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        clips = windows.frames.read(numbers) if target == "generated" else _truth(store, windows.rows[numbers])
        kinds = references if windows.held_out[numbers[0]] else [params.reference]
        seen = {kind: features(_current(windows, store, numbers, kind)) for kind in kinds}
        return {"targets": features(clips), "moved": moved_patches(clips, windows.grid).astype(np.uint8), **seen}

    def of_clips(reader: RowReader, start: int) -> dict[str, NDArray[Any]]:
        return {"features": features(reader.read_range(start, min(start + block, len(reader))))}

    with GroupWriter(path) as writer, progress_bar() as bar:
        task = bar.add_task(f"cache {branch}", total=len(windows) + 2 * len(windows.test), note="")
        opened = open_arrays(writer, arrays)
        for numbers in batches(windows.held_out, block):
            made = resume.computed_once(f"windows_{numbers[0]}", partial(of_windows, numbers))
            for name, values in (("targets", "targets"), ("moved", "moved"), ("reference", params.reference)):
                opened[name].append(made[values])
            if windows.held_out[numbers[0]]:
                for kind, parts in references.items():
                    parts.append(made[kind])
            else:
                centre += made["targets"][:, 1:].sum(axis=(0, 1), dtype=np.float64)
            bar.advance(task, len(numbers))
        for name, reader in (("one_step", windows.one_step_frames), ("other_noise", windows.other_noise_frames)):
            for start in range(0, len(reader), block):
                opened[name].append(resume.computed_once(f"{name}_{start}", partial(of_clips, reader, start))["features"])
                bar.advance(task, min(block, len(reader) - start))
        writer.write("rows", windows.rows)
        writer.write("held_out", windows.held_out.astype(np.uint8))
        for name in ("targets", "moved"):
            opened[name].close()
        centre /= len(windows.train) * (windows.frames_per_clip - 1)
        whole = {kind: np.concatenate(parts) for kind, parts in references.items()}
        metrics: dict[str, Any] = {"reference": compare_references(path, windows, whole, centre.astype(np.float32), block)}
        metrics["dense"] = dense_metrics(windows, store, teacher, params.batch, device)
        writer.attributes = {
            "schema_version": TEACHER_SCHEMA, "branch": branch, "target": target, "reference": params.reference,
            "video_sha256": windows.attributes.get("video_sha256"), "metrics": metrics,
        }  # fmt: skip
    return metrics


def _truth(store: EpisodeStore, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Recorded frames (k, T, H, W, 3) of store rows (k, T)."""
    flat = store.frames(rows.reshape(-1))
    return flat.reshape(*rows.shape, *flat.shape[1:])


def _current(windows: GeneratedWindows, store: EpisodeStore, numbers: NDArray[np.int64], kind: str) -> NDArray[np.uint8]:
    """The observed frame (k, H, W, 3), as recorded (`frame`) or as the autoencoder gives it back (`reconstruction`)."""
    return store.frames(windows.rows[numbers, 0]) if kind == "frame" else windows.reconstruction.read(numbers)


def compare_references(
    path: Path,
    windows: GeneratedWindows,
    references: dict[str, NDArray[np.float16]],
    centre: NDArray[np.float32],
    block: int,
) -> dict[str, dict[str, float]]:
    """How near "repeat the reference" comes to the targets of held-out windows, by what the reference is computed on.

    `cosine_still`, on patches that did not move, is the telling one: there a good reference is already the answer, and what
    is missing is how foreign generated frames look to the teacher. `cosine_moved` is the baseline of distillation.
    Both after subtracting the training mean per position; frames after the first; 0 without any such patch.
    """
    targets, moved = RowReader(path / "targets"), RowReader(path / "moved")
    cosines: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    for start in range(0, len(windows.test), block):
        numbers = windows.test[start : start + block]
        truth = targets.read(numbers)[:, 1:].astype(np.float32)
        mask = moved.read(numbers)[:, 1:].astype(bool)
        for kind, features in references.items():
            guess = np.broadcast_to(features[start : start + block, None].astype(np.float32), truth.shape)
            for key, patches in (("cosine_moved", mask), ("cosine_still", ~mask)):
                cosines.setdefault((kind, key), []).append(centred_cosine(guess, truth, centre, patches))
    means = {place: float(np.sum(np.concatenate(v)) / max(1, sum(map(len, v)))) for place, v in cosines.items()}
    return {kind: {key: means[kind, key] for key in ("cosine_moved", "cosine_still")} for kind in references}


def dense_metrics(
    windows: GeneratedWindows, store: EpisodeStore, teacher: Teacher, batch: int, device: torch.device, most: int = 512
) -> dict[str, dict[str, float]]:
    """The teacher's dense prediction against the simulator's labels, on up to `most` annotated frames of held-out windows.

    Views: `real` frames, `generated` ones (V^) and `one_step`, the decoded one-step prediction, at the same rows, none of them
    the observed frame. Empty for a teacher without such a head, and for data without labels.
    """
    kind = {"depth": "depth", "segmentation": "segmentation"}.get(teacher.config.objective or "")
    labels: AnnotatedRows | None = store.annotation(kind) if kind else None
    if kind is None or labels is None or not len(labels.rows):
        return {}
    rows = windows.rows[windows.test]
    places = np.searchsorted(labels.rows, rows).clip(max=len(labels.rows) - 1)
    labelled = np.argwhere((labels.rows[places] == rows) & (np.arange(rows.shape[1]) > 0))
    # A window that runs past its episode repeats the last frame: it counts once.
    _, first = np.unique([f"{w} {rows[w, t]}" for w, t in labelled], return_index=True)
    labelled = labelled[np.sort(first)]
    labelled = (
        labelled[np.unique(np.linspace(0, len(labelled) - 1, min(most, len(labelled))).astype(np.int64))]
        if len(labelled)
        else labelled
    )
    if not len(labelled):
        return {}
    w, t = labelled.T
    truth = labels.values(places[w, t])
    views: dict[str, Callable[[slice], NDArray[np.uint8]]] = {
        "real": lambda part: store.frames(rows[w[part], t[part]]),
        "generated": lambda part: _one_frame(windows.frames.read(windows.test[w[part]]), t[part]),
        "one_step": lambda part: _one_frame(windows.one_step_frames.read(w[part]), t[part]),
    }
    return {view: _dense(teacher, read, truth, kind, batch, device) for view, read in views.items()}


def _one_frame(clips: NDArray[np.uint8], frames: NDArray[np.int64]) -> NDArray[np.uint8]:
    """(k, T, H, W, 3), (k,) -> (k, H, W, 3)."""
    return clips[np.arange(len(clips)), frames]


def _dense(
    teacher: Teacher,
    read: Callable[[slice], NDArray[np.uint8]],
    truth: NDArray[Any],
    kind: str,
    batch: int,
    device: torch.device,
) -> dict[str, float]:
    """Depth error or intersection over union of one view."""
    depths: list[NDArray[np.float32]] = []
    counts: NDArray[np.int64] = np.zeros((0, 0), dtype=np.int64)
    for start in range(0, len(truth), batch):
        part = slice(start, start + batch)
        images = torch.from_numpy(read(part)).to(device).permute(0, 3, 1, 2).float() / 255.0
        dense = teacher.predict(images).cpu()
        if kind == "depth":
            depths.append(dense.numpy())
        else:
            part_counts = confusion(dense.argmax(dim=1).numpy(), truth[part], dense.shape[1])
            counts = part_counts if not len(counts) else counts + part_counts
    if kind == "depth":
        return depth_error(np.concatenate(depths), truth, teacher.config.depth_std)
    return intersection_over_union(counts, SEGMENTATION_CLASSES)
