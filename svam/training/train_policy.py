"""Training of the policy: demonstrations -> foresight, cached or computed -> Uni-Perceiver and action diffusion (S-VAM
section 3.4).

An observation is every n-th step of a demonstration. Its target is the chunk of K actions from that step on: the expert's,
where the data records what the expert wanted beside what was executed. Past the end of the demonstration the chunk is
padded, and the padding is masked out of the loss.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svam import processes
from svam.code import code_of, library_versions
from svam.console import console
from svam.contract import ContractError, Statistics
from svam.device import sent
from svam.episodes.joined import JoinedStore
from svam.episodes.store import EpisodeStore, Split
from svam.episodes.windows import action_rows, clip_rows, window_starts
from svam.files import sha256_tree
from svam.models.foresight import ForesightModel, FrozenParts
from svam.models.svam import SVAM, ActingSet, Batch, Inputs, SVAMConfig, frozen_entries
from svam.models.video import SamplerConfig
from svam.normalisation import normalise_actions, normalise_proprioception
from svam.params import Generate, Machine, TrainPolicy
from svam.resume import NO_RESUME, Resume
from svam.seeds import seed_of
from svam.shares import own_rows
from svam.training.batch_order import EndlessOrder
from svam.training.feature_cache import (
    Encode,
    FeatureCache,
    FeatureRows,
    Features,
    ObservationSet,
    drawn,
    observation_address,
)
from svam.training.foresight_metrics import ChannelMoments
from svam.training.loop import fit
from svam.training.prepare_backbones.frames import evenly

STATISTICS_ROWS = 512
"""Training observations, evenly spread, from which the inputs' means and deviations are computed."""
FRAMES = "frames"
"""Name under which the cache keeps the frames that a trained observation encoder reads."""


@dataclass(frozen=True)
class Observations:
    """Observed steps of one side of the split.

    rows (n,) int64 store rows; instructions: n sentences; actions (n, K, A) float32 physical; mask (n, K) bool, true where
    the action is real; proprioception (n, P) float32 normalised, or None; statistics: places and how their actions are
    normalised, see `EpisodeStore.by_statistics`.
    """

    rows: NDArray[np.int64]
    instructions: list[str]
    actions: NDArray[np.float32]
    mask: NDArray[np.bool_]
    proprioception: NDArray[np.float32] | None
    statistics: list[tuple[NDArray[np.int64], Statistics]]

    def __len__(self) -> int:
        return len(self.rows)


def choose_rows(store: EpisodeStore, split: Split, stride: int, episodes_per_task: int | None) -> NDArray[np.int64]:
    """Every `stride`-th row of the episodes of one side, from each episode's first; at most the first
    `episodes_per_task` episodes of every task; several sets by their weights."""
    used: dict[str, int] = {}
    rows = []
    for episode in store.acting_episodes(split).tolist():
        task = store.task_of(episode)
        used[task] = used.get(task, 0) + 1
        if episodes_per_task is None or used[task] <= episodes_per_task:
            rows.append(window_starts(*store.bounds(episode), every=stride))
    return store.drawn(np.concatenate(rows))


def observe(store: EpisodeStore, rows: NDArray[np.int64], chunk: int, proprioception: bool, seed: int) -> Observations:
    """Instructions (a training paraphrase drawn for each row), targets and proprioception of the given store rows."""
    episodes = store.episode_of(rows)
    bounds = np.asarray([store.bounds(int(e)) for e in episodes], dtype=np.int64)
    targets, mask = action_rows(rows, bounds[:, 0], bounds[:, 1], chunk)
    values = store.targets(targets.reshape(-1))
    statistics = store.by_statistics(rows)
    state = None
    if proprioception:
        if not store.has("proprioception"):
            raise ContractError("train_policy.proprioception is true, but the episodes hold no proprioception")
        state = store.vector("proprioception", rows)
        for places, own in statistics:
            if own.proprioception is None:
                raise ContractError(f"{store.path}: train_policy.proprioception is true, but one of the sets has none")
            width = len(own.proprioception.mean)
            state[places, :width] = normalise_proprioception(own, state[places, :width])
    instructions = [
        store.instruction_of(int(e), seed_of(seed, "train_policy", int(r))) for e, r in zip(episodes, rows, strict=True)
    ]
    return Observations(rows, instructions, values.reshape(len(rows), chunk, -1), mask, state, statistics)


def sources_of(
    entries: list[str], foresight: ForesightModel, folders: Mapping[str, Path], cameras: Sequence[str], draws: int = 1
) -> dict[str, dict[str, Any]]:
    """Entry -> everything that decides its cached numbers: the parts' bytes, the code, the sampler, device and threads. With
    several `draws`, entries that depend on the video model's noise have further ones, see `drawn`."""
    code, camera = code_of(["svam/models/foresight.py"]), " + ".join(cameras)
    parts: dict[str, str] = {}
    sources: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry == FRAMES:
            sources[entry] = {"entry": entry, "camera": camera}
            continue
        needs = FrozenParts.of_entries([entry]).names
        for name in needs:
            parts.setdefault(name, sha256_tree(folders[name]))
        sources[entry] = {
            "entry": entry, "camera": camera, "parts": {n: parts[n] for n in needs if n != "text" or "video" in needs},
            "code": code, "sampler": foresight.sampler.model_dump(),
            "device": foresight.device.type, "threads": torch.get_num_threads(), "libraries": library_versions(),
        }  # fmt: skip
        if "video" in needs and entry != "recorded":
            sources |= {drawn(entry, draw): {**sources[entry], "draw": draw} for draw in range(1, draws)}
    return sources


def encoded(
    foresight: ForesightModel, frames: NDArray[np.uint8], instructions: list[str], entries: list[str], draw: int | None = None
) -> dict[str, Tensor]:
    """Entries of observations: features (B, T, h, w, C) float16 on the device, and frames as they are.

    A video model with fresh noise gets a seed from the observation itself, since cached rows are addressed by content; with
    `draw`, another one for each of its values.
    """
    values = {FRAMES: torch.from_numpy(frames)} if FRAMES in entries else {}
    frozen = [e for e in entries if e != FRAMES]
    if frozen:
        seeds = [int(observation_address(f, i)[:15], 16) for f, i in zip(frames, instructions, strict=True)]
        seeds = seeds if draw is None else [seed_of(seed, "draw", draw) for seed in seeds]
        made = foresight.encode(torch.from_numpy(frames), instructions, frozen, seeds).entries
        values |= {entry: features.half() for entry, features in made.items()}
    return values


def encoder_of(foresight: ForesightModel) -> Encode:
    """What fills the cache. A video model with fresh noise gets a seed from the observation itself, since rows are
    addressed by content, and from the number of the draw. Clips (B, T, H, W, 3) in place of frames are those of the entry
    `recorded`."""

    def encode(frames: NDArray[np.uint8], instructions: list[str], entries: list[str]) -> dict[str, NDArray[Any]]:
        if frames.ndim == 5:
            return {"recorded": foresight.tokens_of_views(torch.from_numpy(frames)).half().cpu().numpy()}
        draws: dict[int, list[str]] = {}
        for name in entries:
            entry, _, number = name.partition("@")
            draws.setdefault(int(number or 0), []).append(entry)
        values: dict[str, NDArray[Any]] = {}
        for draw, names in draws.items():
            made = encoded(foresight, frames, instructions, names, draw or None)
            values |= {drawn(entry, draw): v.cpu().numpy() for entry, v in made.items()}
        return values

    return encode


def read_entries(section: TrainPolicy) -> list[str]:
    """What is read of each observation: the frozen entries of the context, and `FRAMES` for an encoder that is trained."""
    frozen: list[str] = [*frozen_entries(section.context, section.observation_encoder)]
    return [*frozen, *([FRAMES] if "observation" in section.context and "observation" not in frozen else [])]


def cached_features(
    store: EpisodeStore, foresight: ForesightModel, folders: Mapping[str, Path], cache: FeatureCache, section: TrainPolicy,
    rows: NDArray[np.int64], instructions: list[str],
) -> Features:  # fmt: skip
    """What the policy's context needs of store rows (n,) and their sentences, out of the cache; what is missing is computed.

    The entry `recorded` depends on more than the observed frame, so that observations are addressed by the whole clip for it.

    Raises:
        MachineError: the features do not fit `machine.cache_gb`.
    """
    entries = read_entries(section)

    def frames(positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        return store.seen(rows[positions])

    def clips(positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        config, chosen = foresight.video_model.config, rows[positions]
        starts, ends = np.asarray([store.bounds(int(e)) for e in store.episode_of(chosen)], dtype=np.int64).T
        return store.seen(clip_rows(chosen, starts, ends, config.frames, config.stride))

    spaces, numbers = dict[str, FeatureRows](), dict[str, NDArray[np.int64]]()
    others = [entry for entry in entries if entry != "recorded"]
    for names, seen, block in ((others, frames, 1024), ([e for e in entries if e not in others], clips, 64)):
        if names:
            observations = ObservationSet.of(instructions, seen, block)
            sources = sources_of(names, foresight, folders, store.foreseen, section.feature_draws)
            part = cache.fill(observations, sources, encoder_of(foresight), section.encode_batch)
            spaces |= part.spaces
            numbers |= part.numbers
    return Features(spaces, numbers)


class ComputedFeatures:
    """Features that the frozen parts compute whenever they are read, `batch` observations at a time as for the cache, so that
    without fresh noise they are the cached numbers. A training and its evaluation may read at once."""

    def __init__(self, foresight: ForesightModel, observations: ObservationSet, entries: list[str], batch: int) -> None:
        """`entries`: of the context, and perhaps `FRAMES`."""
        self.foresight, self.observations, self.entries, self.batch = foresight, observations, entries, batch
        self._lock = Lock()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Entry -> (T, h, w, C)."""
        return {entry: tuple(values.shape[1:]) for entry, values in self.read(np.zeros(1, dtype=np.int64)).items()}

    def part(self, start: int, end: int) -> ComputedFeatures:
        """The observations `start`..`end - 1`."""
        every = self.observations
        chosen = ObservationSet(every.instructions[start:end], lambda p: every.frames(p + start), every.addresses[start:end])
        part = ComputedFeatures(self.foresight, chosen, self.entries, self.batch)
        part._lock = self._lock
        return part

    def read(self, positions: NDArray[np.int64], draw: int | None = None) -> dict[str, Tensor]:
        """Entry -> (k, T, h, w, C) float16; `draw` as for `encoded`."""
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(positions), self.batch):
            some = positions[start : start + self.batch]
            padded = np.resize(some, self.batch)
            sentences = [self.observations.instructions[p] for p in padded]
            frames = self.observations.frames(padded)
            with self._lock:
                made = encoded(self.foresight, frames, sentences, self.entries, draw)
            parts.append({entry: values[: len(some)] for entry, values in made.items()})
        return {entry: torch.cat([part[entry] for part in parts]) for entry in self.entries}

    def close(self) -> None:
        """Nothing is open."""

    def announce(self, reads: int, rows: int) -> None:
        """Print what it takes each process to read `rows` observations so many times, by what one batch takes."""
        start = time.perf_counter()
        values = self.read(np.arange(min(self.batch, len(self.observations.instructions)), dtype=np.int64))
        for features in values.values():
            features[0].cpu()  # a GPU has computed it by then
        hours = (time.perf_counter() - start) * reads * -(-rows // self.batch) / 3600
        every = reads * rows * processes.count()
        console.print(f"train_policy: computes the features of {every} observations, in about {hours:.2f} hours")


class TrainingData:
    """Observations with their features and text, as batches on a device."""

    def __init__(
        self, observations: Observations, features: Features | ComputedFeatures, foresight: ForesightModel, svam: SVAM,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.observations, self.features, self.device = observations, features, device
        sentences = sorted(set(observations.instructions))
        self.text = svam.embed_text(sentences).to(device)
        place = {sentence: i for i, sentence in enumerate(sentences)}
        self.sentence = np.asarray([place[i] for i in observations.instructions])
        self.actions, self.mask = np.zeros_like(observations.actions), observations.mask
        widths, most = [own.convention.dimensions for _, own in observations.statistics], observations.actions.shape[2]
        if min(widths) < most:  # (n, K, A): dimensions that a set does not have are not real either
            self.mask = np.repeat(observations.mask[..., None], most, axis=2)
        for (places, own), width in zip(observations.statistics, widths, strict=True):
            self.actions[places, :, :width] = normalise_actions(own, observations.actions[places, :, :width])
            if self.mask.ndim == 3:
                self.mask[places, :, width:] = False

    def inputs(self, positions: NDArray[np.int64], draw: int | None = None) -> Inputs:
        """What the policy sees of the observations at `positions`; `draw` as for `encoded`."""
        found = self.features.read(positions, draw)
        values = {entry: sent(torch.as_tensor(v), self.device) for entry, v in found.items()}
        state = self.observations.proprioception
        return Inputs(
            entries={entry: v for entry, v in values.items() if entry != FRAMES},
            text=self.text[sent(torch.from_numpy(self.sentence[positions]), self.device)],
            frames=values.get(FRAMES),
            proprioception=None if state is None else sent(torch.from_numpy(state[positions]), self.device),
        )

    def batch(self, positions: NDArray[np.int64], draw: int | None = None) -> Batch:
        return Batch(
            inputs=self.inputs(positions, draw),
            actions=sent(torch.from_numpy(self.actions[positions]), self.device),
            mask=sent(torch.from_numpy(self.mask[positions]), self.device),
        )


def set_input_statistics(svam: SVAM, data: TrainingData) -> None:
    """Means and deviations per channel of every frozen entry over training observations, into the policy's buffers."""
    positions = evenly(np.arange(len(data.observations)), STATISTICS_ROWS)
    every = {entry: ChannelMoments(svam.config.shapes[entry][3]) for entry in svam.config.frozen_entries}
    for part in np.array_split(positions, max(1, len(positions) // 32)):
        values = data.features.read(part)
        for entry, moments in every.items():
            moments.add(torch.as_tensor(values[entry]).cpu().numpy())
    for entry, moments in every.items():
        mean, std = moments.result()
        svam.network.set_input_statistics(entry, torch.from_numpy(mean), torch.from_numpy(std))


def absolute_errors(
    svam: SVAM, data: TrainingData, batch: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Positions (k,) of observations, batch by batch, and the absolute errors (k, K, A) of the chunks sampled for them, in
    physical units; of several sets, whose units differ, in the policy's."""
    count = len(data.observations)
    sample, truth = (svam.normalised, data.actions) if svam.sets else (svam.sample, data.observations.actions)
    for start in range(0, count, batch):
        positions = np.arange(start, min(start + batch, count), dtype=np.int64)
        padded = np.resize(positions, batch)
        seeds = [seed_of(seed, "action error", int(p)) for p in padded]
        yield positions, np.abs(sample(data.inputs(padded), seeds)[: len(positions)] - truth[positions])


def action_error(svam: SVAM, data: TrainingData, batch: int, seed: int) -> dict[str, float]:
    """Mean absolute error of sampled chunks against the target, over real actions, in the units of `absolute_errors`: of the
    whole chunk (`action_error`) and of its first action."""
    total, first = 0.0, 0.0
    mask = data.mask.reshape(*data.mask.shape[:2], -1)  # one column stands for all dimensions
    for positions, error in absolute_errors(svam, data, batch, seed):
        total += float((error * mask[positions]).sum())
        first += float((error * mask[positions])[:, 0].sum())
    stands_for = data.actions.shape[2] // mask.shape[2]
    real, real_first = int(mask.sum()) * stands_for, int(mask[:, 0].sum()) * stands_for
    return {"action_error": total / real, "first_action_error": first / real_first}


def load_foresight(section: TrainPolicy, sampling: Generate, folders: Mapping[str, Path]) -> ForesightModel:
    """Just the frozen parts that the context needs, read and sampled as `generate` says, but for the policy's own precision.

    `folders`: part name -> directory. Raises as `ForesightModel.load_parts`.
    """
    parts = FrozenParts.of_entries(frozen_entries(section.context, section.observation_encoder))
    sampler = SamplerConfig(**sampling.model_dump(include=set(SamplerConfig.model_fields) - {"bf16"}), bf16=section.encode_bf16)
    return ForesightModel.load_parts(parts, sampler, folders)


def check_camera(foresight: ForesightModel, store: EpisodeStore, video: bool) -> None:
    """Raise `ContractError` unless the video model was trained on the store's foresight cameras at their size."""
    if not video:
        return
    config = foresight.video_model.config
    present, expected = (*store.foreseen, tuple(store.image_size)), (*config.cameras, tuple(config.image_size))
    if present != expected:
        raise ContractError(f"{store.path}: foresight cameras are {present}, but the video model was trained on {expected}")


def acting_sets(store: EpisodeStore) -> list[ActingSet]:
    """The sets that the policy learns from, as its checkpoint carries them; none of a single store."""
    if not isinstance(store, JoinedStore):
        return []
    return [
        ActingSet(name=name, camera=own.foreseen[0], more_cameras=own.foreseen[1:], statistics=own.statistics)
        for name, own in store.acting.items()
    ]


def train(
    store: EpisodeStore,
    foresight: ForesightModel,
    folders: Mapping[str, Path],
    section: TrainPolicy,
    cache: FeatureCache,
    seed: int,
    device: torch.device,
    live: Path | None = None,
    resume: Resume = NO_RESUME,
    machine: Machine | None = None,
) -> SVAM:
    """Train everything that `train_policy` describes and return the assembled S-VAM with the best averaged weights.

    Args:
        foresight: the frozen parts that the context needs, loaded from `folders` (part name -> directory), on `device`.
        seed: the global one, which draws each observation's sentence, so that all policies share the cached features;
            weights, order and noise follow `section.seed` where that is set.
        machine: as for `fit`.

    Raises:
        ContractError: the data, the frozen parts and the section do not fit one another.
        MachineError: the features are to be cached, and do not fit `machine.cache_gb`.
    """
    frozen = frozen_entries(section.context, section.observation_encoder)
    check_camera(foresight, store, FrozenParts.of_entries(frozen).video)
    foresight.views = len(store.foreseen)
    train_rows = choose_rows(store, "train", section.observation_stride, section.episodes_per_task)
    # Checkpoints are chosen by no more demonstrations of a task than training sees: few mean few.
    held_rows = choose_rows(store, "held_out", section.observation_stride, section.episodes_per_task)
    held_rows = evenly(held_rows, section.evaluation_observations)
    sides = [observe(store, rows, section.chunk, section.proprioception, seed) for rows in (train_rows, held_rows)]
    console.print(f"train_policy: {len(sides[0])} observations to learn from, {len(sides[1])} held out")

    rows = np.concatenate([train_rows, held_rows])
    sentences = sides[0].instructions + sides[1].instructions
    features: Features | ComputedFeatures
    if section.features == "cached":
        features = cached_features(store, foresight, folders, cache, section, rows, sentences)
    else:
        observations = ObservationSet(sentences, lambda positions: store.seen(rows[positions]), [])
        features = ComputedFeatures(foresight, observations, read_entries(section), section.encode_batch)
    seed = seed if section.seed is None else section.seed
    try:
        shapes: Any = {e: s for e, s in features.shapes.items() if e != FRAMES}  # (T, h, w, C) each
        sets = acting_sets(store)
        statistics = sets[0].statistics if sets else store.statistics
        config = SVAMConfig.of(section, foresight, shapes, statistics, store.foreseen, store.image_size, store.rate_hz)
        if sets:
            wide: dict[str, int | None] = {"action_dimensions": store.action_dimensions}
            wide |= {"proprioception": store.proprioception_dimensions} if section.proprioception else {}
            config = config.model_copy(update=wide)
        torch.manual_seed(seed_of(seed, "train_policy weights"))
        svam = SVAM(config, statistics, foresight, sets=sets).to(device)
        learning = TrainingData(sides[0], features.part(0, len(train_rows)), foresight, svam, device)
        judging = TrainingData(sides[1], features.part(len(train_rows), len(rows)), foresight, svam, device)
        set_input_statistics(svam, learning)
        optimiser = section.training
        order = EndlessOrder(len(learning.observations), min(optimiser.batch, len(learning.observations)), seed, "train_policy")
        own = own_rows(order.size)
        if isinstance(features, ComputedFeatures):
            features.announce(optimiser.steps * optimiser.accumulate, own.stop - own.start)

        def batch_of(number: int) -> tuple[Batch, torch.Generator, float]:
            """This process's part of a batch, the seeded source of its noise, and the weight of its loss: that is a mean over
            real actions, of which the parts of a batch have different numbers."""
            noise = torch.Generator().manual_seed(seed_of(seed, "train_policy noise", number))
            places, real = order.batch(number), learning.mask
            weight = processes.count() * int(real[places[own]].sum()) / int(real[places].sum())
            return learning.batch(places[own], number), noise, weight

        svam.selected = fit(
            svam.network, lambda batch: svam.loss(batch[0], batch[1], section.noise_draws) * batch[2], batch_of, optimiser,
            device, "train_policy", live, lambda _: action_error(svam, judging, optimiser.batch, seed), section.evaluate_every,
            "action_error", resume, machine, frozen=isinstance(features, ComputedFeatures),
        )  # fmt: skip
    finally:
        features.close()
    processes.only_first_goes_on()
    return svam
