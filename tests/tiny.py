"""Every frozen part of the real classes at its smallest, on disk as earlier stages leave them, and policy params to match."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from svam.contract import Episode, Observation, SourceDescription
from svam.episodes.convert import convert
from svam.episodes.joined import open_store
from svam.episodes.store import EpisodeStore
from svam.models.decoupler import Decoupler, DecouplerConfig
from svam.models.foresight import part_folders
from svam.models.svam import OLDER as UNCHOSEN
from svam.models.svam import SVAM, SVAMConfig, frozen_entries
from svam.params import Generate, TrainPolicy
from svam.simulation.metaworld import TaskEnvironment
from svam.training.train_policy import load_foresight
from tests.recorded import SETTINGS, Recorded, make_episode
from tests.tiny_foresight import FRAMES, GRID, SIZE, make_store, make_teacher, save_parts
from tests.toy import ADAM

GENERATE = Generate(
    windows=4, held_out_windows=2, up_blocks=1, grid=GRID, steps=2, guidance=1.0, guidance_last=None, resize="antialiased",
    feature_time_ids=None, batch=4, bf16=False, keep_features=True,
)  # fmt: skip
FEATURE_CHANNELS, TEACHER_CHANNELS = 64, 12


def policy_params(**changes: Any) -> TrainPolicy:
    """A `train_policy` section of a few thousand parameters; `training` and others may be replaced."""
    values: dict[str, Any] = {
        "context": ["geometric", "semantic", "one_step"], "sentence": "tokens", "aggregator": "uni_perceiver",
        "objective": "edm", "chunk": 4, "proprioception": False, "observation_encoder": "trained", "observation_stride": 3,
        "feature_draws": 1, "encode_batch": 4, "encode_bf16": False,
        "perceiver": {"width": 16, "depth": 2, "heads": 2, "queries": 2, **UNCHOSEN["perceiver"]},
        "transformer": {
            "width": 16, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "sigma_min": 0.001, "sigma_max": 80.0,
            "sigma_data": 0.5, "steps": 3, **UNCHOSEN["transformer"],
        },
        "training": {**ADAM, "steps": 4, "batch": 4, "learning_rate": 0.001}, "evaluate_every": 2,
        "evaluation_observations": 256, "noise_draws": 4, "seed": None, "episodes_per_task": None, "features": "cached",
    }  # fmt: skip
    return TrainPolicy.model_validate(values | changes)


def save_all_parts(folder: Path, store: EpisodeStore, noise: str = "fixed") -> dict[str, Path]:
    """`backbones/*`, `video` and `decouplers/*` below `folder`; part name -> directory, as `train_policy` names them."""
    save_parts(folder, store, noise)
    (folder / "backbones/semantic").mkdir()
    make_teacher("segmentation").save(folder / "backbones/semantic")
    for number, branch in enumerate(("geometric", "semantic")):
        torch.manual_seed(10 + number)
        config = DecouplerConfig(
            feature_channels=FEATURE_CHANNELS, teacher_channels=TEACHER_CHANNELS, frames=FRAMES, grid=(GRID, GRID),
            reference="reconstruction", anchor="concat", width=16, blocks=1, heads=2,
        )  # fmt: skip
        (folder / "decouplers" / branch).mkdir(parents=True)
        Decoupler(config).eval().save(folder / "decouplers" / branch)
    return part_folders(folder / "backbones", folder / "video", folder / "decouplers")


def save_all(root: Path) -> None:
    """`episodes.zarr` of `make_store`, and all its parts, below `root`."""
    root.mkdir()
    save_all_parts(root, make_store(root / "episodes.zarr"))


def observations(store: EpisodeStore, count: int, proprioception: bool = False) -> list[Observation]:
    """The first `count` rows of the store as a robot would send them."""
    rows = np.arange(count, dtype=np.int64)
    state = store.vector("proprioception", rows) if proprioception else [None] * count
    pictures = {camera: store.frames(rows, camera) for camera in store.foreseen}
    frames = [{camera: seen[i] for camera, seen in pictures.items()} for i in range(count)]
    return [Observation(frames[i], store.instruction_of(0, i), state[i]) for i in range(count)]


def make_svam(store: EpisodeStore, folders: dict[str, Path], **changes: Any) -> SVAM:
    """An untrained S-VAM of the parts in `folders`, whose gates are open, so that every input shows in the actions."""
    section = policy_params(**changes)
    both = dict.fromkeys(("generated", "goal_frame", "observation", "recorded"), 2 * TEACHER_CHANNELS)
    channels = {"one_step": FEATURE_CHANNELS, **both}
    single, rows = ("goal_frame", "observation"), len(store.foreseen) * GRID
    shapes: dict[str, tuple[int, int, int, int]] = {
        entry: (1 if entry in single else FRAMES, rows, GRID, channels.get(entry, TEACHER_CHANNELS))
        for entry in frozen_entries(section.context, section.observation_encoder)
    }
    foresight = load_foresight(section, GENERATE, folders)
    config = SVAMConfig.of(section, foresight, shapes, store.statistics, store.foreseen, store.image_size, store.rate_hz)
    torch.manual_seed(0)
    svam = SVAM(config, store.statistics, foresight)
    for layer in svam.network.diffusion.decoder:
        torch.nn.init.normal_(layer.modulation.weight, std=0.5)  # type: ignore[union-attr, arg-type]
    return svam


TASKS = ["reach", "window-close"]


class Demonstrations(Recorded):
    """Random pictures and actions under MetaWorld's names, with its goals: of each of `TASKS` the seeds 0, 1, 2."""

    def __init__(self) -> None:
        super().__init__([episode for task in TASKS for episode in self.of_task(task)])

    @staticmethod
    def of_task(task: str) -> list[Episode]:
        episodes, environment = [], TaskEnvironment(task, SIZE)
        for seed in range(3):
            environment.reset(seed)
            made, rng = make_episode(task, 12, seed, SIZE), np.random.default_rng(seed)
            actions = rng.uniform(-1, 1, (12, 4)).astype(np.float32)
            draw = [float(value) for value in environment.draw]
            episodes.append(replace(
                made, instruction=f"{task} a", frames={"corner2": made.frames["front"]}, actions=actions,
                expert_actions=actions, rate_hz=80.0, provenance={"draw": draw},
            ))  # fmt: skip
        environment.close()
        return episodes

    def describe(self) -> SourceDescription:
        provenance = {"source": "metaworld", "tasks": {task: {"render": "fast"} for task in TASKS}}
        changes = {"rate_hz": 80.0, "cameras": ["corner2"], "provenance": provenance}
        return super().describe().model_copy(update=changes)


def save_run(root: Path) -> None:
    """`episodes.zarr` of `Demonstrations`, an untrained but whole `svam` on it, and its `parts`, below `root`."""
    root.mkdir()
    convert(Demonstrations(), root / "episodes.zarr", SETTINGS, 0)
    store = open_store(root / "episodes.zarr")
    make_svam(store, save_all_parts(root / "parts", store)).save(root / "svam")
