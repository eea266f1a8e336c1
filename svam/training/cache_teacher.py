"""What a teacher sees: targets on the generated clips and the reference of the current frame (S-VAM section 3.3, eq. 4).

Another teacher, or another reference, reads the same `data/generated` again: nothing is generated here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from svam import processes
from svam.contract import ContractError
from svam.episodes.store import EpisodeStore
from svam.models.teachers import Teacher, to_grid
from svam.npy import write_arrays
from svam.params import CacheTeacher
from svam.resume import NO_RESUME, Resume
from svam.training.blocks import in_batches, write_attributes, write_blocks
from svam.training.distill_data import GeneratedWindows, annotated_frames, recorded
from svam.training.foresight_metrics import centred_cosine, moved_patches
from svam.training.prepare_backbones.frames import evenly
from svam.training.teacher_metrics import annotation_error

Target = Literal["generated", "ground_truth"]
Features = Callable[[NDArray[np.uint8]], NDArray[np.float16]]
"""Frames (B, H, W, 3) or clips (B, T, H, W, 3) uint8 -> teacher features (B, [T,] h, w, C) float16."""


def teacher_features(teacher: Teacher, grid: int, batch: int, length: int) -> Features:
    """The teacher on clips of `length` frames and on single ones, `batch` frames at a time, on the grid of F (as
    `ForesightModel` does it). A teacher that sees clips sees whole ones, so at least one at a time."""

    def features(frames: NDArray[np.uint8]) -> NDArray[np.float16]:
        whole = teacher.sees_clips and frames.ndim == 5
        seen = np.array(frames).reshape(-1, *frames.shape[-4 if whole else -3 :])
        at_once = max(1, batch // length) if teacher.sees_clips else batch
        look = teacher.clip_features if whole else partial(teacher.features, length=length)
        tokens = teacher.on_frames(torch.from_numpy(seen), at_once, lambda pixels: to_grid(look(pixels), grid)).half().numpy()
        return np.asarray(tokens.reshape(*frames.shape[:-3], *tokens.shape[-3:]))

    return features


def cache_windows(
    folder: Path,
    windows: GeneratedWindows,
    store: EpisodeStore,
    teacher: Teacher,
    branch: str,
    params: CacheTeacher,
    target: Target,
    device: torch.device,
    resume: Resume = NO_RESUME,
) -> dict[str, Any]:
    """Write what `TeacherWindows` reads to `folder`, which `Resume.directory` gives; returns and stores the metrics.

    Args:
        target: `generated`: targets on V^; `ground_truth`: on the recorded future ("w/o self-distillation"), and so is `moved`.

    Raises:
        ContractError: the windows are of another store.
    """
    pictures = len(store) * len(store.foreseen)
    if windows.rows.min() < 0 or windows.rows.max() >= pictures:
        raise ContractError(
            f"{windows.path}: rows up to {windows.rows.max()}, but {store.path} has {pictures}; run generate on this store"
        )
    token = (windows.grid, windows.grid, teacher.channels)
    clip = (windows.frames_per_clip, *token)
    every, train, held_out = len(windows), len(windows.train), len(windows.test)
    arrays: dict[str, Any] = {
        "targets": ((every, *clip), np.float16), "moved": ((every, *clip[:-1]), np.bool_),
        "reference": ((every, *token), np.float16), "other_reference": ((held_out, *token), np.float16),
        "one_step": ((held_out, *clip), np.float16), "other_noise": ((held_out, *clip), np.float16),
    }  # fmt: skip
    features = teacher_features(teacher, windows.grid, params.batch, windows.frames_per_clip)
    other = "frame" if params.reference == "reconstruction" else "reconstruction"

    def compute(block: slice) -> dict[str, NDArray[Any]]:
        clips = windows.frames[block] if target == "generated" else recorded(store, windows.rows[block])
        made: dict[str, NDArray[Any]] = {"targets": features(clips), "moved": moved_patches(clips, windows.grid)}
        made["reference"] = features(_current(windows, store, block, params.reference))
        if windows.held_out[block.start]:
            part = slice(block.start - train, block.stop - train)
            made["one_step"], made["other_noise"] = (
                features(frames[part]) for frames in (windows.one_step_frames, windows.other_noise_frames)
            )
            made["other_reference"] = features(_current(windows, store, block, other))
        return made

    block = max(1, params.batch // windows.frames_per_clip)
    made = write_blocks(folder, arrays, in_batches(block, train, every), compute, resume, f"cache_teacher {branch}")
    processes.only_first_goes_on()
    write_arrays(folder, {"rows": windows.rows, "held_out": windows.held_out})
    centre = np.zeros(token)
    for part in in_batches(block, train):
        centre += made["targets"][part, 1:].sum(axis=(0, 1), dtype=np.float64)
    centre /= train * (windows.frames_per_clip - 1)
    references = {params.reference: made["reference"][train:], other: made["other_reference"]}
    metrics: dict[str, Any] = {
        "reference": compare_references(made["targets"][train:], made["moved"][train:], references, centre, block),
        "dense": dense_metrics(windows, store, teacher, params.batch),
    }
    write_attributes(
        folder, branch=branch, target=target, reference=params.reference,
        video_sha256=windows.attributes.get("video_sha256"), metrics=metrics,
    )  # fmt: skip
    return metrics


def _current(windows: GeneratedWindows, store: EpisodeStore, block: slice, kind: str) -> NDArray[np.uint8]:
    """The observed frame (k, H, W, 3), as recorded (`frame`) or as the autoencoder gives it back (`reconstruction`)."""
    return store.frames(windows.rows[block, 0]) if kind == "frame" else windows.reconstruction[block]


def compare_references(
    targets: NDArray[np.float16],
    moved: NDArray[np.bool_],
    references: dict[str, NDArray[np.float16]],
    centre: NDArray[np.float64],
    block: int,
) -> dict[str, dict[str, float]]:
    """How near "repeat the reference" comes to the targets of held-out windows, by what the reference is computed on.

    `cosine_still`, on patches that did not move, is the telling one: there a good reference is already the answer, and what
    is missing is how foreign generated frames look to the teacher. `cosine_moved` is the baseline of distillation.
    Both after subtracting the training mean per position; frames after the first; 0 without any such patch.
    """
    sums = {kind: {"cosine_moved": [0.0, 0], "cosine_still": [0.0, 0]} for kind in references}
    for part in in_batches(block, len(targets)):
        truth, mask = targets[part, 1:].astype(np.float32), np.asarray(moved[part, 1:])
        for kind, features in references.items():
            guess = np.broadcast_to(features[part, None].astype(np.float32), truth.shape)
            for key, patches in (("cosine_moved", mask), ("cosine_still", ~mask)):
                cosines = centred_cosine(guess, truth, centre.astype(np.float32), patches)
                sums[kind][key][0] += float(cosines.sum())
                sums[kind][key][1] += len(cosines)
    return {kind: {key: total / max(1, count) for key, (total, count) in keys.items()} for kind, keys in sums.items()}


def dense_metrics(
    windows: GeneratedWindows, store: EpisodeStore, teacher: Teacher, batch: int, most: int = 512
) -> dict[str, dict[str, float]]:
    """The teacher's dense prediction against the simulator's labels, on up to `most` annotated frames of held-out windows.

    Views: `real` frames, `generated` ones (V^) and `one_step`, the decoded one-step prediction, at the same rows, none of them
    the observed frame. Empty for a teacher without such a head, and for data without labels.
    """
    kind = teacher.config.objective
    if kind is None or kind == "self_supervised" or (labels := store.annotation(kind)) is None:
        return {}
    rows = windows.rows[windows.test]
    places = annotated_frames(rows, labels.rows)
    if not len(places):
        return {}
    w, t = places[evenly(np.arange(len(places)), most)].T
    truth = labels.values(np.searchsorted(labels.rows, rows[w, t]))
    views = {
        "real": store.frames(rows[w, t]),
        "generated": windows.frames[windows.test[w], t],
        "one_step": windows.one_step_frames[w, t],
    }
    std, seen = teacher.config.depth_std, {}
    for view, frames in views.items():
        seen[view] = teacher.on_frames(torch.from_numpy(frames), batch, teacher.annotate).numpy()
    return {view: annotation_error(kind, predicted, truth, std) for view, predicted in seen.items()}
