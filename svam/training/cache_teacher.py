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

from svam.console import console, progress_bar
from svam.contract import SEGMENTATION_CLASSES, ContractError
from svam.episodes.arrays import ArrayWriter, GroupWriter
from svam.episodes.rows import RowReader
from svam.episodes.store import AnnotatedRows, EpisodeStore
from svam.models.teachers import Teacher
from svam.models.tokens import to_grid
from svam.params import CacheTeacher
from svam.resume import NOTHING_KEPT, Resume
from svam.training.distill_data import TEACHER_SCHEMA, GeneratedWindows
from svam.training.foresight_metrics import ForesightScore, moved_patches
from svam.training.teacher_metrics import confusion, depth_error, intersection_over_union

Target = Literal["generated", "ground_truth"]
Features = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Frames (..., H, W, 3) uint8 -> teacher features (..., h, w, C) float32."""
SHARD_BYTES = 32 << 20
"""About what one shard takes: it bounds the writer's memory whatever the teacher's width."""


def teacher_features(teacher: Teacher, grid: int, batch: int, device: torch.device) -> Features:
    """The teacher on frames of any leading shape, `batch` frames at a time, on the grid of F (as `ForesightModel` does it)."""

    def features(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        flat = torch.from_numpy(frames.reshape(-1, *frames.shape[-3:]))
        parts = [
            to_grid(teacher.features(part.to(device).permute(0, 3, 1, 2).float() / 255.0).float(), grid).cpu()
            for part in torch.split(flat, batch)
        ]
        tokens = torch.cat(parts).numpy()
        return tokens.reshape(*frames.shape[:-3], *tokens.shape[1:])

    return features


def storage(windows: GeneratedWindows, channels: int) -> dict[str, int]:
    """Uncompressed bytes by array over all windows; float16 but for `moved`."""
    frames, patches = windows.frames_per_clip, windows.grid**2
    clip = frames * patches * channels * 2
    held_out = len(windows.test) * clip
    return {
        "targets": len(windows) * clip, "reference": len(windows) * clip // frames, "moved": len(windows) * frames * patches,
        "one_step": held_out, "other_noise": held_out,
    }  # fmt: skip


def print_storage(sizes: dict[str, int], windows: GeneratedWindows, what: str) -> None:
    """Say what is about to be written, before it is."""
    kept = sum(sizes[name] for name in ("targets", "reference", "moved")) / len(windows)
    extra = (sizes["one_step"] + sizes["other_noise"]) / len(windows.test)
    parts = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
    console.print(
        f"{what}: {len(windows)} windows of {kept / 1e6:.3f} MB, the {len(windows.test)} held-out ones {extra / 1e6:.3f} MB "
        f"more; {sum(sizes.values()) / 1e9:.3f} GB before compression ({parts})", highlight=False,
    )  # fmt: skip


def cache_windows(
    path: Path,
    windows: GeneratedWindows,
    store: EpisodeStore,
    teacher: Teacher,
    branch: str,
    params: CacheTeacher,
    target: Target,
    device: torch.device,
    resume: Resume = NOTHING_KEPT,
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
    frames, grid, channels = windows.frames_per_clip, windows.grid, teacher.channels
    print_storage(storage(windows, channels), windows, f"cache_teacher {branch}")
    features = teacher_features(teacher, grid, params.batch, device)
    clip = (frames, grid, grid, channels)
    block = max(1, params.batch // frames)
    centre = np.zeros(clip[1:], dtype=np.float64)
    square = np.zeros(channels, dtype=np.float64)
    references: dict[str, list[NDArray[np.float32]]] = {"frame": [], "reconstruction": []}
    with GroupWriter(path) as writer, progress_bar() as bar:
        task = bar.add_task(f"cache {branch}", total=len(windows) + 2 * len(windows.test), note="")
        targets, reference = _float_array(writer, "targets", clip, params), _float_array(writer, "reference", clip[1:], params)
        moved = writer.array("moved", clip[:-1], np.uint8, chunk_rows=1, shard_rows=1024)

        def of_windows(numbers: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
            clips = windows.frames.read(numbers) if target == "generated" else _truth(store, windows.rows[numbers])
            kinds = references if windows.held_out[numbers[0]] else [params.reference]
            found = {kind: features(_current(windows, store, numbers, kind)) for kind in kinds}
            return {"targets": features(clips), "moved": moved_patches(clips, grid).astype(np.uint8), **found}

        def of_clips(reader: RowReader, start: int) -> dict[str, NDArray[Any]]:
            return {"features": features(reader.read_range(start, min(start + block, len(reader))))}

        for numbers in _blocks(windows, block):
            made = resume.arrays(f"windows_{numbers[0]}", partial(of_windows, numbers))
            seen = made["targets"]
            targets.append(seen)
            moved.append(made["moved"])
            reference.append(made[params.reference])
            if windows.held_out[numbers[0]]:
                for kind, kept in references.items():
                    kept.append(made[kind])
            else:
                centre += seen[:, 1:].sum(axis=(0, 1), dtype=np.float64)
                square += np.square(seen[:, 1:], dtype=np.float64).sum(axis=(0, 1, 2, 3))
            bar.advance(task, len(numbers))
        for name, reader in (("one_step", windows.one_step_frames), ("other_noise", windows.other_noise_frames)):
            array = _float_array(writer, name, clip, params)
            for start in range(0, len(reader), block):
                array.append(resume.arrays(f"{name}_{start}", partial(of_clips, reader, start))["features"])
                bar.advance(task, min(block, len(reader) - start))
        writer.write("rows", windows.rows)
        writer.write("held_out", windows.held_out.astype(np.uint8))
        targets.close()
        moved.close()
        count = len(windows.train) * (frames - 1)
        centre /= count
        scale = np.sqrt(np.maximum(square / (count * grid * grid) - np.square(centre.mean(axis=(0, 1))), 1e-12))
        whole = {kind: np.concatenate(parts) for kind, parts in references.items()}
        metrics: dict[str, Any] = {"reference": compare_references(path, windows, whole, centre, scale, block)}
        metrics["dense"] = dense_metrics(windows, store, teacher, params.batch, device)
        writer.attributes = {
            "schema_version": TEACHER_SCHEMA, "branch": branch, "target": target, "reference": params.reference,
            "video_sha256": windows.attributes.get("video_sha256"), "metrics": metrics,
        }  # fmt: skip
    return metrics


def _float_array(writer: GroupWriter, name: str, shape: tuple[int, ...], params: CacheTeacher) -> ArrayWriter:
    """A float16 array with one window a chunk, since training draws windows at random."""
    shard = max(1, SHARD_BYTES // (2 * int(np.prod(shape))))
    return writer.array(name, shape, np.float16, chunk_rows=1, shard_rows=shard, mantissa_bits=params.mantissa_bits)


def _blocks(windows: GeneratedWindows, size: int) -> list[NDArray[np.int64]]:
    """Window numbers in order, in blocks that do not mix the two sides of the split (training ones come first)."""
    return [side[i : i + size] for side in (windows.train, windows.test) for i in range(0, len(side), size)]


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
    references: dict[str, NDArray[np.float32]],
    centre: NDArray[np.float64],
    scale: NDArray[np.float64],
    block: int,
) -> dict[str, dict[str, float]]:
    """How near "repeat the reference" comes to the targets of held-out windows, by what the reference is computed on.

    `cosine_still`, on patches that did not move, is the telling one: there a good reference is already the answer, and what
    is missing is how foreign generated frames look to the teacher. `cosine_moved` is the baseline of distillation.
    Both after subtracting the training mean per position; frames after the first.
    """
    targets, moved = RowReader(path / "targets"), RowReader(path / "moved")
    result = {}
    for kind, features in references.items():
        scores = {k: ForesightScore(centre.astype(np.float32), scale.astype(np.float32)) for k in ("moved", "still")}
        for start in range(0, len(features), block):
            numbers = windows.test[start : start + block]
            truth = targets.read(numbers)[:, 1:].astype(np.float32)
            mask = moved.read(numbers)[:, 1:].astype(bool)
            guess = np.broadcast_to(features[start : start + block, None], truth.shape)
            scores["moved"].add(guess, truth, mask)
            scores["still"].add(guess, truth, ~mask)
        result[kind] = {f"cosine_{k}": s.result(s)["cosine_moved"] for k, s in scores.items()}
    return result


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
    found = np.argwhere((labels.rows[places] == rows) & (np.arange(rows.shape[1]) > 0))
    # A window that runs past its episode repeats the last frame: it counts once.
    _, first = np.unique([f"{w} {rows[w, t]}" for w, t in found], return_index=True)
    found = found[np.sort(first)]
    found = found[np.unique(np.linspace(0, len(found) - 1, min(most, len(found))).astype(np.int64))] if len(found) else found
    if not len(found):
        return {}
    w, t = found.T
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
            found = confusion(dense.argmax(dim=1).numpy(), truth[part], dense.shape[1])
            counts = found if not len(counts) else counts + found
    if kind == "depth":
        return depth_error(np.concatenate(depths), truth, teacher.config.depth_std)
    return intersection_over_union(counts, SEGMENTATION_CLASSES)
