"""Windows of the store -> one-step features F and multi-step generations V^ from the same initial noise (S-VAM section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from svam import processes
from svam.console import console
from svam.episodes.store import EpisodeStore, Split
from svam.models.generator import VideoGenerator
from svam.models.video import VideoConfig
from svam.npy import write_arrays
from svam.params import Generate
from svam.resume import NO_RESUME, Resume
from svam.seeds import generator, seed_of
from svam.training.blocks import in_batches, write_attributes, write_blocks
from svam.training.latents import Clips, Latents


@dataclass(frozen=True)
class Windows:
    """The chosen windows: training ones first, then held-out.

    rows: (W, T) int64 numbers of the ground truth's pictures, see `EpisodeStore`; held_out: (W,) bool; instructions: W
    sentences; seeds: W noise seeds.
    """

    rows: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    instructions: list[str]
    seeds: list[int]


def choose_windows(store: EpisodeStore, params: Generate, config: VideoConfig, seed: int) -> Windows:
    """Draw windows without replacement, spread evenly over each side's pictures, each with a training paraphrase."""
    rows: list[NDArray[np.int64]] = []
    held_out: list[bool] = []
    instructions: list[str] = []
    for split, count in (("train", params.windows), ("held_out", params.held_out_windows)):
        side: Split = split  # type: ignore[assignment]
        clips = Clips(store, side, config.frames, config.stride)
        rng = generator(seed, "generate", split)
        if count > clips.draws:
            console.print(f"generate: {split} has {clips.draws} windows, {count} were asked for; all are used")
        # One draw from each of `count` equal stretches of the time axis covers all episodes and stays random.
        edges = np.linspace(0, clips.draws, min(count, clips.draws) + 1).astype(np.int64)
        places = clips.drawn(np.array([int(rng.integers(a, b)) for a, b in pairwise(edges)], dtype=np.int64))
        chosen = clips.clip_rows(places)
        rows.append(chosen)
        held_out += [split == "held_out"] * len(chosen)
        instructions += [
            store.instruction_of(episode, seed_of(seed, "generate", row))
            for row, episode in zip(chosen[:, 0].tolist(), clips.episode_of(places).tolist(), strict=True)
        ]
    together = np.concatenate(rows)
    seeds = [seed_of(seed, "generate noise", row) for row in together[:, 0].tolist()]
    return Windows(together, np.asarray(held_out), instructions, seeds)


def generate_windows(
    folder: Path, latents: Latents, model: VideoGenerator, windows: Windows, params: Generate, seed: int,
    video_sha256: str, resume: Resume = NO_RESUME,
) -> None:  # fmt: skip
    """Write to `folder`, which `Resume.directory` gives, what `svam.training.distill_data.GeneratedWindows` reads: `frames` V^
    (W, T, H, W, 3) uint8, `features` F (W, T, h, w, C) float16 (where kept), `latents` (W, c, h', w') float16 of the observed
    frame and `reconstruction` (W, H, W, 3) uint8, its decoding, `rows`, `held_out`; and for held-out windows
    `one_step_frames`, the decoded one-step prediction, and `other_noise_frames`, V^ from another noise seed (the ceiling
    of what any distillation of V^ can reach).

    `latents`: of all pictures of the store.
    """
    config, every, train = model.video_model.config, len(windows.rows), int((~windows.held_out).sum())
    picture = (*config.image_size, 3)
    clip = (config.frames, *picture)
    arrays: dict[str, Any] = {
        "frames": ((every, *clip), np.uint8),
        "reconstruction": ((every, *picture), np.uint8),
        "latents": ((every, *latents.shape[1:]), np.float16),
        "one_step_frames": ((every - train, *clip), np.uint8),
        "other_noise_frames": ((every - train, *clip), np.uint8),
    }
    if params.keep_features:
        channels = model.video_model.feature_channels(params.up_blocks)
        arrays["features"] = ((every, config.frames, params.grid, params.grid, channels), np.float16)

    def compute(block: slice) -> dict[str, NDArray[Any]]:
        return _generated(latents, model, windows, block, params.keep_features)

    write_blocks(folder, arrays, in_batches(params.batch, train, every), compute, resume, "generate")
    processes.only_first_goes_on()
    write_arrays(folder, {"rows": windows.rows, "held_out": windows.held_out})
    write_attributes(
        folder, instructions=windows.instructions, noise_seeds=windows.seeds, sampler=model.sampler.model_dump(),
        video_sha256=video_sha256, seed=seed, stride=config.stride,
    )  # fmt: skip


def _generated(
    latents: Latents, model: VideoGenerator, windows: Windows, block: slice, keep_features: bool
) -> dict[str, NDArray[Any]]:
    """The rows of the windows `block`, of one side of the split, by array name."""
    video, autoencoder, seeds = model.video_model, model.frame_autoencoder, windows.seeds[block]
    observed = latents[windows.rows[block, 0]]
    first, text = torch.from_numpy(observed).to(model.device).float(), model.embed_text(windows.instructions[block])
    condition = autoencoder.condition_of(first)
    generation = model.generate(condition, text, video.initial_noise(seeds))
    frames = {"frames": model.decode(generation.latents), "reconstruction": autoencoder.decode_u8(first)}
    if windows.held_out[block.start]:
        others = video.seeded_noise([seed_of(seed, "other") for seed in seeds])
        frames["one_step_frames"] = model.decode(generation.one_step)
        frames["other_noise_frames"] = model.decode(model.generate(condition, text, others).latents)
    made: dict[str, NDArray[Any]] = {name: values.cpu().numpy() for name, values in frames.items()} | {"latents": observed}
    return made | ({"features": generation.features.half().cpu().numpy()} if keep_features else {})
