"""Windows of the store -> one-step features F and multi-step generations V^ from the same initial noise (S-VAM section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from svam.console import console, track
from svam.episodes.arrays import ArrayWriter, GroupWriter
from svam.episodes.store import EpisodeStore, Split
from svam.episodes.windows import clip_rows
from svam.models.generator import VideoForesight
from svam.models.video import VideoConfig
from svam.params import Generate
from svam.resume import NOTHING_KEPT, Resume
from svam.seeds import generator, seed_of


@dataclass(frozen=True)
class Windows:
    """The chosen windows: training ones first, then held-out.

    rows: (W, T) int64 store rows of the ground truth; held_out: (W,) bool; instructions: W sentences; seeds: W noise seeds.
    """

    rows: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    instructions: list[str]
    seeds: list[int]


def choose_windows(store: EpisodeStore, params: Generate, config: VideoConfig, seed: int) -> Windows:
    """Draw windows without replacement, spread evenly over each side's rows, each with a training paraphrase."""
    rows: list[NDArray[np.int64]] = []
    held_out: list[bool] = []
    instructions: list[str] = []
    for split, count in (("train", params.windows), ("held_out", params.held_out_windows)):
        side: Split = split  # type: ignore[assignment]
        available = store.rows(side)
        rng = generator(seed, "generate", split)
        if count > len(available):
            console.print(f"generate: {split} has {len(available)} windows, {count} were asked for; all are used")
        # One draw from each of `count` equal stretches of the time axis covers all episodes and stays random.
        edges = np.linspace(0, len(available), min(count, len(available)) + 1).astype(np.int64)
        chosen = available[[int(rng.integers(a, b)) for a, b in pairwise(edges)]]
        for row, episode in zip(chosen.tolist(), store.episode_of(chosen).tolist(), strict=True):
            rows.append(clip_rows(row, *store.bounds(episode), config.frames, config.stride))
            held_out.append(split == "held_out")
            instructions.append(store.instruction_of(episode, seed_of(seed, "generate", row)))
    seeds = [seed_of(seed, "generate noise", int(r[0])) for r in rows]
    return Windows(np.stack(rows), np.asarray(held_out), instructions, seeds)


def storage_per_window(model: VideoForesight, config: VideoConfig, keep_features: bool) -> dict[str, int]:
    """Uncompressed bytes of one training window by array."""
    height, width = config.image_size
    grid, channels = model.sampler.grid, model.one_step_channels
    sizes = {"frames": config.frames * height * width * 3, "reconstruction": height * width * 3, "rows": config.frames * 8}
    return sizes | ({"features": config.frames * grid * grid * channels * 2} if keep_features else {})


def print_storage(sizes: dict[str, int], windows: int, what: str) -> None:
    """Say what is about to be written, before it is."""
    parts = ", ".join(f"{name} {size / 1e6:.3f} MB" for name, size in sizes.items())
    total = sum(sizes.values())
    console.print(
        f"{what}: {windows} windows of {total / 1e6:.3f} MB ({parts}); {windows * total / 1e9:.2f} GB before compression",
        highlight=False,
    )


def _shard_rows(row_bytes: int) -> int:
    """Rows per shard, a power of two: about 64 MB, which bounds memory whatever the width."""
    return int(2 ** max(0, min(12, np.floor(np.log2(64e6 / row_bytes)))))


def _create_arrays(writer: GroupWriter, arrays: dict[str, tuple[tuple[int, ...], Any, int | None]]) -> dict[str, ArrayWriter]:
    """name -> (shape of a window's row, dtype, mantissa bits) to open arrays, one window a chunk."""
    opened = {}
    for name, (shape, dtype, bits) in arrays.items():
        shard = _shard_rows(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        opened[name] = writer.array(name, shape, dtype, chunk_rows=1, shard_rows=shard, mantissa_bits=bits)
    return opened


def generate_windows(
    path: Path, store: EpisodeStore, model: VideoForesight, windows: Windows, params: Generate, seed: int, video_sha256: str,
    resume: Resume = NOTHING_KEPT,
) -> None:  # fmt: skip
    """Write `path` (which the caller makes whole): `frames` V^ (W, T, H, W, 3) uint8, `features` F (W, T, h, w, C) float16
    (where kept), `reconstruction` (W, H, W, 3) uint8 of the observed frame, `rows`, `held_out`; and for held-out windows
    `one_step_frames`, the decoded one-step prediction, and `other_noise_frames`, V^ from another noise seed (the ceiling
    of what any distillation of V^ can reach).
    """
    config = model.video_model.config
    height, width = config.image_size
    clip, grid = (config.frames, height, width, 3), params.grid
    arrays: dict[str, tuple[tuple[int, ...], Any, int | None]] = {
        "frames": (clip, np.uint8, None), "reconstruction": ((height, width, 3), np.uint8, None),
        "one_step_frames": (clip, np.uint8, None), "other_noise_frames": (clip, np.uint8, None),
    }  # fmt: skip
    if params.keep_features:
        shape = (config.frames, grid, grid, model.one_step_channels)
        arrays["features"] = (shape, np.float16, params.mantissa_bits)
    print_storage(storage_per_window(model, config, params.keep_features), len(windows.rows), "generate")

    with GroupWriter(path) as writer:
        opened = _create_arrays(writer, arrays)
        batches = _batches(windows.held_out, params.batch)
        for number, batch in enumerate(track(batches, "generate", len(batches))):
            made = resume.arrays(f"windows_{number}", partial(_generated, store, model, windows, batch, params.keep_features))
            for name, values in made.items():
                opened[name].append(values)
        writer.write("rows", windows.rows)
        writer.write("held_out", windows.held_out.astype(np.uint8))
        writer.attributes = {
            "instructions": windows.instructions, "noise_seeds": windows.seeds, "sampler": model.sampler.model_dump(),
            "video_sha256": video_sha256, "seed": seed, "stride": config.stride,
        }  # fmt: skip


def _generated(
    store: EpisodeStore, model: VideoForesight, windows: Windows, batch: NDArray[np.int64], keep_features: bool
) -> dict[str, NDArray[Any]]:
    """The rows of the windows `batch`, of one side of the split, by array name."""
    video = model.video_model
    first = torch.from_numpy(store.frames(windows.rows[batch, 0])).to(model.device)
    condition, text = model.prepare(first, [windows.instructions[i] for i in batch])
    generation = model.generate(condition, text, video.initial_noise([windows.seeds[i] for i in batch]))
    made = {"frames": model.decode(generation.latents), "reconstruction": model.reconstruct(first)}
    if keep_features:
        made["features"] = generation.features
    if windows.held_out[batch[0]]:
        others = video.seeded_noise([seed_of(windows.seeds[i], "other") for i in batch])
        made["one_step_frames"] = model.decode(generation.one_step)
        made["other_noise_frames"] = model.decode(model.generate(condition, text, others).latents)
    return {name: values.cpu().numpy() for name, values in made.items()}


def _batches(held_out: NDArray[np.bool_], size: int) -> list[NDArray[np.int64]]:
    """Window numbers in order, in batches that do not mix the two sides of the split."""
    sides = [np.flatnonzero(~held_out), np.flatnonzero(held_out)]
    return [side[i : i + size] for side in sides for i in range(0, len(side), size)]
