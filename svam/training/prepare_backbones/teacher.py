"""Teachers: small DINOv2-family models trained on the data set's own frames, or published ones imported.

A teacher of S-VAM looks at *generated* frames. One that has seen clean frames only takes those for something foreign, so
a share of the training frames is seen through the autoencoder and a share blurred; the labels stay those of the clean frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from svam import params
from svam.console import track
from svam.contract import SEGMENTATION_CLASSES, ContractError
from svam.episodes.store import EpisodeStore, Split
from svam.models.autoencoder import Autoencoder
from svam.models.layouts import TEACHERS
from svam.models.published import freeze, resolve_weights
from svam.models.teachers import FARTHEST, Backbone, Teacher, TeacherConfig, as_unit, unpatchify
from svam.resume import Resume
from svam.seeds import generator
from svam.training.batch_order import EndlessOrder
from svam.training.loop import fit
from svam.training.prepare_backbones.frames import evenly, frames_that_fit, load_frames
from svam.training.teacher_metrics import annotation_error, valid_depth


def published(section: params.TeacherModel, key: str) -> Teacher:
    """The published weights that the params name. `key` is the section's, for messages."""
    folder = resolve_weights(str(section.path), section.revision, TEACHERS[section.family], f"{key}.path")
    return Teacher.load_published(folder, section.family, section.image_size, section.stage)


def check(key: str, section: params.TeacherModel, store: EpisodeStore) -> None:
    """Raise `ContractError`, in one sentence with the alternatives, unless `store` and `section` allow in-domain training."""
    where = f"prepare_backbones.{key}"
    if section.objective != "self_supervised" and store.annotation(section.objective) is None:
        raise ContractError(
            f"{where}.source is 'in_domain' with objective {section.objective!r}, but the data set has no {section.objective} "
            f"annotations: set {where}.source to 'pretrained' with a path, or its objective to 'self_supervised' (with family "
            f"dinov2 or dinov2_registers), or take {key!r} out of distill.branches and train_policy.context"
        )


def build(section: params.TeacherModel) -> Backbone:
    """An untrained model of the family's own library class, at the sizes of the params."""
    vit: dict[str, Any] = {
        "image_size": section.image_size,
        "patch_size": section.patch,
        "hidden_size": section.width,
        "num_hidden_layers": section.layers,
        "num_attention_heads": section.heads,
    }
    if section.family == "dinov2":
        return Dinov2Model(Dinov2Config(**vit))
    if section.family == "dinov2_registers":
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**vit, num_register_tokens=4))
    # Four layers feed the dense head, as in the published model; a shallower one feeds it fewer. Published factors start at
    # 4 for patches of 14 pixels; smaller patches reach the same share of the image's resolution from 2.
    taken = sorted({round(section.layers * part / 4) or 1 for part in (1, 2, 3, 4)})
    fusion = max(16, section.width // 3)
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=Dinov2Config(**vit, out_indices=taken, apply_layernorm=True, reshape_hidden_states=False),
            patch_size=section.patch,
            reassemble_hidden_size=section.width,
            reassemble_factors=[2, 1, 0.5, 0.25][: len(taken)],
            neck_hidden_sizes=[fusion // 2, fusion, section.width, section.width][-len(taken) :],
            fusion_hidden_size=fusion,
            head_hidden_size=16,
        )
    )


class Batch(NamedTuple):
    """What one step of a teacher's training sees.

    pictures: (B, H, W, 3) uint8, each as it is or seen through the autoencoder. blurred: (k,) int64, those of them that are
    blurred too, by `sigma` pixels of a 64-pixel frame. labels: of the frames as they are, (B, S, S), or for self-supervised
    training these frames themselves, like `pictures`. patches: (B, g * g) bool, those that are hidden (self-supervised).
    """

    pictures: Tensor
    blurred: Tensor
    sigma: float
    labels: Tensor
    patches: Tensor | None = None

    def look(self) -> tuple[Tensor, ...]:
        """(seen (B, 3, H, W) in [0, 1], labels (self-supervised: as `seen`), patches where there are any).

        It belongs to the step, not to the making of batches: all threads share the blur's work there, or the card does it.
        """
        seen = as_unit(self.pictures)
        if len(self.blurred):
            soft = blur(seen.index_select(0, self.blurred), self.sigma)
            seen.index_copy_(0, self.blurred, soft)
        return (seen, self.labels) if self.patches is None else (seen, as_unit(self.labels), self.patches)


class Views:
    """The frames a teacher trains on, each as it is or seen through the autoencoder, and their labels.

    frames, reconstructed: (m, H, W, 3) uint8. labels: (m, S, S), inverse depth in 1/metres float32 (NaN: no measurement),
    class uint8, or None for self-supervised training.
    """

    def __init__(self, frames: Tensor, reconstructed: Tensor, labels: Tensor | None) -> None:
        self.frames, self.reconstructed, self.labels = frames, reconstructed, labels

    def batch(self, chosen: Tensor, section: params.TeacherModel, rng: np.random.Generator, device: torch.device) -> Batch:
        """Of the frames `chosen` (B,), mixed by `reconstructed_share` and `blurred_share`; without hidden patches."""
        draw = rng.random(len(chosen))
        rebuilt = draw < section.reconstructed_share
        blurred = np.nonzero(~rebuilt & (draw < section.reconstructed_share + section.blurred_share))[0]
        sigma = float(rng.uniform(section.blur[0], section.blur[1])) if len(blurred) else 0.0
        pictures = self.frames.index_select(0, chosen)  # whole frames at once: a twentieth of the time of [chosen]
        labels = pictures.clone() if self.labels is None else self.labels.index_select(0, chosen)
        pictures.numpy()[rebuilt] = self.reconstructed.numpy()[chosen.numpy()[rebuilt]]  # a sixth of the time of torch's
        return Batch(pictures.to(device), torch.from_numpy(blurred).to(device), sigma, labels.to(device))


def blur(frames: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, 3, H, W); `sigma` in pixels of a 64-pixel frame. Edges are repeated.

    Sums of shifted pictures: two thirds of the time of two convolutions in groups, and the same bits.
    """
    sigma = sigma * frames.shape[-1] / 64.0
    reach = max(1, int(np.ceil(3 * sigma)))
    offsets = torch.arange(-reach, reach + 1, dtype=frames.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = (kernel / kernel.sum()).tolist()
    padded = F.pad(frames.contiguous(), (reach, reach, reach, reach), mode="replicate")
    for axis in (3, 2):
        size = frames.shape[axis]
        total = padded.narrow(axis, 0, size) * weights[0]
        for shift, weight in enumerate(weights[1:], 1):
            total.add_(padded.narrow(axis, shift, size), alpha=weight)
        padded = total
    return padded


def reconstruct(autoencoder: Autoencoder, frames: Tensor, device: torch.device, what: str) -> Tensor:
    """(m, H, W, 3) uint8 -> the same through the autoencoder, on the CPU."""
    parts = torch.split(frames, 64)
    rebuilt = (autoencoder.decode_u8(autoencoder.encode(part.to(device))).cpu() for part in parts)
    return torch.cat(list(track(rebuilt, what, len(parts))))


def inverse_depth(depth: NDArray[Any], side: int) -> Tensor:
    """(m, H, W) metres -> (m, side, side) float32 in 1/metres, as Depth Anything predicts it: the sky is 0, a hole is NaN.

    A renderer's sky lies at its far plane, a hundred times the scene's size: in metres it would be all that the loss sees.
    """
    hole = ~(np.isfinite(depth) & (depth > 0))
    values = np.where(hole, np.nan, 1.0 / np.where(hole, 1.0, depth.astype(np.float32))).astype(np.float32)
    return F.interpolate(torch.from_numpy(values)[:, None], (side, side), mode="nearest")[:, 0]


def annotated(store: EpisodeStore, objective: str, split: Split) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Rows of one split that have annotations (as many as fit in memory), and their values (m, H, W)."""
    labels = store.annotation(objective, split)
    if labels is None or len(labels.rows) == 0:
        raise ContractError(f"the data set has no {objective} annotations of {split.replace('_', '-')} episodes")
    places = frames_that_fit(store, np.arange(len(labels.rows)))
    return labels.rows[places], labels.values(places)


def objective_of(
    teacher: Teacher, section: params.TeacherModel, counts: NDArray[np.int64]
) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """What is optimised, and its loss on what `Batch.look` gives. `counts`: pixels per class (segmentation)."""
    if section.objective == "segmentation":
        frequency = np.maximum(counts / counts.sum(), 1e-4)
        weight = torch.from_numpy((frequency**-section.rare_class_power).astype(np.float32)).to(teacher.mean.device)
        present = torch.from_numpy(np.nonzero(counts)[0]).to(teacher.mean.device)  # numbers: a mask would be waited for

        def segmentation(batch: tuple[Tensor, ...]) -> Tensor:
            logits, _ = teacher.dense(teacher.prepare(batch[0]))
            value = F.cross_entropy(logits.float(), batch[1].long(), weight=weight)
            if section.dice_weight:
                value = value + section.dice_weight * soft_dice(logits.float().softmax(dim=1), batch[1])[present].mean()
            return value

        return teacher, segmentation
    if section.objective == "self_supervised":

        def masked(batch: tuple[Tensor, ...]) -> Tensor:
            dense, _ = teacher.dense(teacher.prepare(batch[0]), batch[2])
            return (dense.float() - teacher.prepare(batch[1])).abs().mean()

        return teacher, masked

    # Depth Anything's head reads four layers, but distillation sees only the last one's tokens: a second, linear head makes
    # those hold the depth by themselves. It is dropped afterwards.
    linear = nn.Linear(teacher.channels, teacher.patch**2).to(teacher.mean.device)
    nn.init.constant_(linear.bias, teacher.config.inverse_mean)
    spread, deviation = teacher.config.inverse_std, teacher.config.depth_std

    def error(inverse: Tensor, truth: Tensor, known: Tensor) -> Tensor:
        distance = (inverse - truth).abs()
        if section.metric_weight:
            # Squared, in deviations: where an edge may lie on either side of a pixel, the mean errs less than the median.
            nearest = 1.0 / FARTHEST
            metres = (1.0 / inverse.clamp(min=nearest) - 1.0 / truth.clamp(min=nearest)) / deviation
            distance = distance + section.metric_weight * spread * metres.square()
        return (distance * known).sum() / known.sum().clamp(min=1)

    def depth(batch: tuple[Tensor, ...]) -> Tensor:
        inverse, tokens = teacher.dense(teacher.prepare(batch[0]))
        known = torch.isfinite(batch[1])
        truth = batch[1].nan_to_num(0.0)
        value = error(inverse[:, 0].float(), truth, known)
        if teacher.head is not None:
            return value
        second = unpatchify(linear(tokens), teacher.patch)[:, 0].float()
        return value + error(second, truth, known)

    return (teacher if teacher.head is not None else nn.ModuleList([teacher, linear])), depth


def soft_dice(likely: Tensor, classes: Tensor) -> Tensor:
    """Soft Dice loss of each class, (K,) in [0, 1], over all pixels of a batch (Milletari et al. 2016, with plain sums).

    likely: (B, K, H, W) probabilities. classes: (B, H, W) integers.
    """
    truth = F.one_hot(classes.long(), likely.shape[1]).movedim(-1, 1).to(likely.dtype)
    both = (likely * truth).sum((0, 2, 3))
    return 1.0 - 2.0 * both / (likely + truth).sum((0, 2, 3)).clamp(min=1.0)


def train(
    section: params.TeacherModel, store: EpisodeStore, seed: int, device: torch.device, live: Path | None, resume: Resume,
    key: str, autoencoder_folder: Path | None, encode_batch: int | None = None,
) -> tuple[Teacher, dict[str, Any]]:  # fmt: skip
    """Train the teacher `key` (geometric or semantic) on annotated frames of training episodes; measure on held-out ones.
    encode_batch: frames that the autoencoder takes at a time, of at most 64; None: as many.

    Raises:
        ContractError: the data set lacks the objective's annotations (one sentence with the alternatives), or there is no
            autoencoder.
    """
    if autoencoder_folder is None:
        raise ContractError(f"prepare_backbones.{key}: an in-domain teacher trains on reconstructions too; pass --autoencoder")
    autoencoder = Autoencoder.load(autoencoder_folder, encode_batch).to(device)
    check(key, section, store)
    config = TeacherConfig(section.family, section.image_size, section.objective)
    counts = np.zeros(len(SEGMENTATION_CLASSES), np.int64)
    labels: Tensor | None = None
    if section.objective == "self_supervised":
        rows = frames_that_fit(store, store.drawn(store.pictures("train")))
        config = replace(config, outputs=3)
    else:
        rows, values = annotated(store, section.objective, "train")
        if section.objective == "depth":
            labels = inverse_depth(values, section.image_size)
            near = values[valid_depth(values)].astype(np.float64)
            known = labels[torch.isfinite(labels)].double()
            config = replace(
                config, outputs=0 if section.family == "depth_anything_v2" else 1, depth_std=round(float(near.std()), 6),
                inverse_mean=round(float(known.mean()), 6), inverse_std=round(float(known.std()), 6),
            )  # fmt: skip
        else:
            counts = np.bincount(values.ravel(), minlength=len(counts))
            labels = F.interpolate(torch.from_numpy(values)[:, None], (section.image_size,) * 2, mode="nearest")[:, 0]
            config = replace(config, outputs=len(counts))
    teacher = Teacher(build(section), config).to(device)
    if isinstance(teacher.model, DepthAnythingForDepthEstimation):
        # The head ends in a ReLU: started below zero everywhere it would never learn.
        nn.init.constant_(teacher.model.head.conv3.bias, config.inverse_mean)
    frames = load_frames(store, rows)
    views = Views(frames, reconstruct(autoencoder, frames, device, f"{key}: reconstructions"), labels)
    module, loss = objective_of(teacher, section, counts)
    order = EndlessOrder(len(frames), section.training.batch, seed, key, "batches")

    def batch_of(number: int) -> Batch:
        chosen = torch.from_numpy(order.batch(number))
        batch = views.batch(chosen, section, generator(seed, key, "views", number), device)
        if section.objective != "self_supervised":
            return batch
        patches = generator(seed, key, "mask", number).random((len(chosen), teacher.grid**2))
        return batch._replace(patches=torch.from_numpy(patches < section.masked_share).to(device))

    def seen_loss(batch: Batch) -> Tensor:
        return loss(batch.look())

    fit(module, seen_loss, batch_of, section.training, device, key, live, resume=resume)
    teacher = freeze(teacher)
    return teacher, measure(teacher, store, autoencoder, section.objective, device)


def measure(
    teacher: Teacher, store: EpisodeStore, autoencoder: Autoencoder, objective: str, device: torch.device, most: int = 1024
) -> dict[str, dict[str, float]]:
    """Errors on frames of held-out episodes, by view: `real`, `reconstructed` (by the autoencoder), `blurred` (1 pixel of 64).

    Depth: `rmse_m`, `rmse_std`, `abs_rel`. Segmentation: IoU per class, `mean`, `accuracy`. Self-supervised: `rmse` of unmasked
    reconstruction, in normalised pixel values.
    """

    def blurred(pixels: Tensor) -> Tensor:
        return teacher.annotate(blur(pixels, 1.0))

    if objective == "self_supervised":
        frames = load_frames(store, evenly(store.pictures("held_out"), most))
        truth = teacher.prepare(as_unit(frames).to(device)).cpu().numpy()
    else:
        rows, values = annotated(store, objective, "held_out")
        chosen = evenly(np.arange(len(rows)), most)
        frames, truth = load_frames(store, rows[chosen]), values[chosen]
    rebuilt = reconstruct(autoencoder, frames, device, f"{objective}: held-out frames")
    results: dict[str, dict[str, float]] = {}
    for view, seen in {"real": frames, "reconstructed": rebuilt, "blurred": frames}.items():
        dense = teacher.on_frames(seen, 64, blurred if view == "blurred" else teacher.annotate)
        if objective == "self_supervised":
            dense = F.interpolate(dense, truth.shape[-2:], mode="bilinear", align_corners=False)
            results[view] = {"rmse": float((dense - torch.from_numpy(truth)).square().mean().sqrt())}
        else:
            results[view] = annotation_error(objective, dense.numpy(), truth, teacher.config.depth_std)
    return results
