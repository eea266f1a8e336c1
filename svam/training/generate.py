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
from svam.episodes.arrays import GroupWriter
from svam.episodes.store import EpisodeStore, Split
from svam.episodes.windows import clip_rows
from svam.models.generator import VideoGenerator
from svam.models.video import VideoConfig
from svam.params import Generate
from svam.resume import NO_RESUME, Resume
from svam.seeds import generator, seed_of
from svam.training.window_arrays import WindowArray, announce, batches, open_arrays, to_stored


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


def generate_windows(
    path: Path, store: EpisodeStore, model: VideoGenerator, windows: Windows, params: Generate, seed: int, video_sha256: str,
    resume: Resume = NO_RESUME,
) -> None:  # fmt: skip
    """Write `path` (which the caller makes whole): `frames` V^ (W, T, H, W, 3) uint8, `features` F (W, T, h, w, C) float16
    (where kept), `reconstruction` (W, H, W, 3) uint8 of the observed frame, `rows`, `held_out`; and for held-out windows
    `one_step_frames`, the decoded one-step prediction, and `other_noise_frames`, V^ from another noise seed (the ceiling
    of what any distillation of V^ can reach).
    """
    config, every, held_out = model.video_model.config, len(windows.rows), int(windows.held_out.sum())
    picture = (*config.image_size, 3)
    clip = (config.frames, *picture)
    arrays = {
        "frames": WindowArray(every, clip, np.uint8),
        "reconstruction": WindowArray(every, picture, np.uint8),
        "one_step_frames": WindowArray(held_out, clip, np.uint8),
        "other_noise_frames": WindowArray(held_out, clip, np.uint8),
    }
    if params.keep_features:
        shape = (config.frames, params.grid, params.grid, model.one_step_channels)
        arrays["features"] = WindowArray(every, shape, np.float16, params.mantissa_bits)
    announce("generate", arrays)
    with GroupWriter(path) as writer:
        opened, parts = open_arrays(writer, arrays), batches(windows.held_out, params.batch)
        for number, batch in enumerate(track(parts, "generate", len(parts))):
            compute = partial(_generated, store, model, windows, batch, params.keep_features)
            made = resume.computed_once(f"windows_{number}", compute)
            for name, values in made.items():
                opened[name].append(values)
        writer.write("rows", windows.rows)
        writer.write("held_out", windows.held_out.astype(np.uint8))
        writer.attributes = {
            "instructions": windows.instructions, "noise_seeds": windows.seeds, "sampler": model.sampler.model_dump(),
            "video_sha256": video_sha256, "seed": seed, "stride": config.stride,
        }  # fmt: skip


def _generated(
    store: EpisodeStore, model: VideoGenerator, windows: Windows, batch: NDArray[np.int64], keep_features: bool
) -> dict[str, NDArray[Any]]:
    """The rows of the windows `batch`, of one side of the split, by array name."""
    video = model.video_model
    first = torch.from_numpy(store.frames(windows.rows[batch, 0])).to(model.device)
    condition, text = model.prepare(first, [windows.instructions[i] for i in batch])
    generation = model.generate(condition, text, video.initial_noise([windows.seeds[i] for i in batch]))
    frames = {"frames": model.decode(generation.latents), "reconstruction": model.reconstruct(first)}
    if windows.held_out[batch[0]]:
        others = video.seeded_noise([seed_of(windows.seeds[i], "other") for i in batch])
        frames["one_step_frames"] = model.decode(generation.one_step)
        frames["other_noise_frames"] = model.decode(model.generate(condition, text, others).latents)
    made: dict[str, NDArray[Any]] = {name: values.cpu().numpy() for name, values in frames.items()}
    return made | ({"features": to_stored(generation.features)} if keep_features else {})
