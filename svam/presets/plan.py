"""What a run would take, without running anything: parameters, disk, memory of the GPU, FLOPs and hours, as a text."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from svam.agreement import lacking
from svam.analysis.foresight import MOMENTS
from svam.evaluation.offline import PICTURED_CLIPS
from svam.models.foresight import BRANCHES, FrozenParts
from svam.params import Optimiser, Params
from svam.precision import MATRICES
from svam.presets.data import Data
from svam.presets.memory import LADDER, Account, Held, Means, bytes_of, state_bytes
from svam.presets.models import Models
from svam.training.finetune_video import SHOWN_CLIPS

CARDS = {
    "rtx3090": (71e12, 24), "rtx4090": (165e12, 24), "a100": (312e12, 80), "h100": (989e12, 80), "h200": (989e12, 141),
    "cpu": (0.9e12, 16),
}  # fmt: skip
"""Name -> (peak of dense bf16 matrix products in FLOP/s, memory in GB), as NVIDIA states them. cpu: two cores; 0.15 of its
number, the default of `plan --share`, is the rate at which the default's stages ran on an AMD EPYC with AVX-512: 1,920 s for
255 TFLOP. On an H200 a training step of SVD's U-Net (16 frames of 32 x 32 latents, batch 4) took 354 ms, a share of 0.16."""
RAW, STORED = 0.36, 0.20
"""Bytes of recordings and of the store by bytes of the frames, annotations included: those of the default's demonstrations."""
SIZES = (24, 48, 80)
"""GB of the cards for which a plan says how fine-tuning fits."""
MARGIN = 1.1
"""What a card should have of the bound of `Held.least`. Fine-tuning SVD's U-Net with 4 clips took 70 GB where it is 68.9; where
layers are computed twice less is known."""
HEADER = 128
"""Bytes of a .npy file before its values."""
SAMPLES = 8
"""Held-out clips that `stages.finetune_video` writes beside the video model."""
NOT_COUNTED = {
    "figures, tables and films": ("data/foresight", "data/report", "data/films"),
    "texts": ("data/code", "data/params_checked.txt"), "nothing unless asked for": ("data/benchmark",),
}  # fmt: skip
"""Why -> outs that a plan leaves out, small ones."""
ROOMIER = {
    "data/raw": "lower collect.episodes or collect.image_size",
    ".cache/collect": "lower collect.episodes or collect.image_size; once convert has run the folder may be deleted",
    "data/episodes.zarr": "lower collect.episodes, or choose fewer by convert.episodes",
    "data/latents": "lower the pictures' size, collect.image_size or convert.image_size",
    "data/generated": "set generate.keep_features to false, or lower generate.windows",
    "data/teachers": "lower generate.windows or generate.grid",
    "data/live": "raise finetune_video.show_every",
    "data/results": "lower evaluate.videos",
    ".cache/features": "raise train_policy.observation_stride, or set train_policy.features to computed",
    ".ckpt": "set finetune_video.moments to int8",
}
"""The beginning of an out's path -> the params that make it smaller."""


class Out(NamedTuple):
    """What a run leaves on the disk: path, bytes of weights and arrays (of what is small beside them, such as a file's header,
    nothing), and whether they follow from the params and the number of rows alone."""

    path: str
    size: int
    exact: bool = True


class Stage(NamedTuple):
    """What a stage trains and what else it holds, and the FLOPs of all of it. rounded: frozen parts whose matrices lie in
    bfloat16, see `VideoGenerator.frozen_on`."""

    name: str
    trained: list[nn.Module]
    frozen: list[nn.Module]
    flops: float
    rounded: Sequence[nn.Module] = ()


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def saved(module: nn.Module) -> int:
    """Bytes of a module's weights and buffers in a file."""
    return bytes_of(module.state_dict().values())


def arrays_of(params: Params, data: Data, models: Models) -> dict[str, dict[str, tuple[tuple[int, ...], int]]]:
    """Folder -> name of an array -> (shape, bytes of a value), as encode, generate and cache_teacher write them."""
    sampling, config, (height, width) = params.generate, models.video.config, data.size
    train = min(sampling.windows, data.rows(held_out=False))
    test = min(sampling.held_out_windows, data.rows(held_out=True))
    every, picture, latent = train + test, (height, width, 3), config.clip_shape[1:]
    clip, grid = (config.frames, *picture), (sampling.grid, sampling.grid)
    common: dict[str, Any] = {"rows": ((every, config.frames), 8), "held_out": ((every,), 1)}
    generated = common | {
        "frames": ((every, *clip), 1), "reconstruction": ((every, *picture), 1), "latents": ((every, *latent), 2),
        "one_step_frames": ((test, *clip), 1), "other_noise_frames": ((test, *clip), 1),
    }  # fmt: skip
    if sampling.keep_features:
        generated["features"] = ((every, config.frames, *grid, models.video.feature_channels(sampling.up_blocks)), 2)
    encoded = {str(k): ((data.rows(False) + data.rows(True), *latent), 2) for k in range(params.convert.parts[0].foreseen)}
    folders = {"data/latents": encoded, "data/generated": generated}
    for branch in params.distill.branches:
        token = (*grid, models.teachers[branch].channels)
        tokens = (config.frames, *token)
        folders[f"data/teachers/{branch}"] = common | {
            "targets": ((every, *tokens), 2), "moved": ((every, *tokens[:-1]), 1), "reference": ((every, *token), 2),
            "other_reference": ((test, *token), 2), "one_step": ((test, *tokens), 2), "other_noise": ((test, *tokens), 2),
        }  # fmt: skip
    return folders


def parts_of(models: Models) -> dict[str, nn.Module]:
    """The parts of a saved S-VAM, by name."""
    parts = {"text": models.text, "autoencoder": models.autoencoder, "video": models.video}
    parts |= {f"teacher_{branch}": teacher for branch, teacher in models.teachers.items()}
    return parts | {f"decoupler_{branch}": decoupler for branch, decoupler in models.decouplers.items()}


def observations_of(params: Params, data: Data) -> tuple[int, int]:
    """Observations that the policy learns from, and that choose its checkpoint."""
    policy = params.train_policy
    train, held = (data.observations(s, policy.observation_stride, policy.episodes_per_task) for s in (False, True))
    return train, min(held, policy.evaluation_observations)


def disk(params: Params, data: Data, models: Models, tuned: nn.Module | None = None) -> list[Out]:
    """The outs of the stages but for `NOT_COUNTED`, and what collect, convert, train_policy and trainings keep in scratch
    folders. tuned: the video model as it is trained, where that is with adapters."""
    frames, video = math.prod(data.size) * 3 * (data.rows(False) + data.rows(True)), params.finetune_video
    outs = [Out(f, int(RAW * frames), False) for f in ("data/raw/metaworld", ".cache/collect")] if params.collect.tasks else []
    outs.append(Out("data/episodes.zarr", data.stored or int(STORED * frames), data.stored is not None))
    if params.convert.sets:
        outs.append(outs[-1]._replace(path=".cache/sets", exact=False))
    parts, known = parts_of(models), not models.guesses_vocabulary
    outs.append(Out("data/backbones/autoencoder", saved(models.autoencoder)))
    outs.append(Out("data/backbones/text", saved(models.text), known))
    outs += [Out(f"data/backbones/{branch}", saved(models.teachers[branch])) for branch in BRANCHES]
    for folder, arrays in arrays_of(params, data, models).items():
        outs.append(Out(folder, sum(math.prod(shape) * size + HEADER for shape, size in arrays.values())))
    clip = 2 * video.frames * math.prod(data.size) * 3  # and its generation
    samples = min(SAMPLES, video.evaluation_clips, data.rows(True))
    outs.append(Out("data/models/video", saved(models.video) + samples * clip + HEADER))
    outs += [Out(f"data/models/decouplers/{branch}", saved(d)) for branch, d in models.decouplers.items()]
    used = [parts[name] for name in FrozenParts.of_entries(models.entries).names]
    outs.append(Out("data/svam", sum(map(saved, [*used, models.policy])), known))
    shown = video.training.steps // video.show_every if video.show_every else 0
    outs.append(Out("data/live", shown * min(SHOWN_CLIPS, data.rows(True)) * clip, False))
    outs.append(Out("data/results", _results(params, data, models), False))
    draws = {"observation": 1, "recorded": 1}  # which hang on no noise
    entries = sum(
        2 * math.prod(shape) * draws.get(entry, params.train_policy.feature_draws) for entry, shape in models.shapes.items()
    )
    if params.train_policy.features == "cached":
        outs.append(Out(".cache/features", entries * sum(observations_of(params, data)), data.stored is not None))
    states = [state_bytes(decoupler, params.distill.training) for decoupler in models.decouplers.values()]
    states.append(state_bytes(models.policy, params.train_policy.training, best=True))
    if video.training.steps:
        states.append(state_bytes(tuned or models.video, video.training, video.moments))
    return [*outs, Out(".ckpt", 2 * max(states), False)]  # the last saved state lies there until the next one is whole


def _rollouts(params: Params) -> Iterator[tuple[int, int, int]]:
    """Of each closed loop: its episodes, the most steps of one, and how many are recorded."""
    judged, videos = params.evaluate, params.evaluate.videos
    if "metaworld" in judged.protocols:
        section, tasks = judged.metaworld, len(judged.metaworld.tasks)
        episodes = section.episodes + section.held_out_instruction_episodes
        yield tasks * episodes, section.max_steps, tasks * min(videos, section.episodes)
    if "calvin" in judged.protocols:
        of_one = judged.calvin.subtasks
        yield judged.calvin.chains * of_one, judged.calvin.max_steps, min(videos, judged.calvin.chains) * of_one
    if "libero" in judged.protocols:
        tasks = len(judged.libero.tasks) or sum(90 if suite == "libero_90" else 10 for suite in judged.libero.suites)
        yield tasks * judged.libero.episodes, judged.libero.max_steps or 520, tasks * min(videos, judged.libero.episodes)


def _results(params: Params, data: Data, models: Models) -> int:
    """Bytes of recorded rollouts, at most, with what was foreseen at each call, and of the pictures of the offline protocol."""
    frame = params.convert.parts[0].foreseen * math.prod(data.size) * 3
    foreseen, offline = sum(2 * math.prod(shape) for shape in models.shapes.values()), params.evaluate.offline.windows
    total = 0
    for _, steps, recorded in _rollouts(params):
        total += recorded * ((steps + 1) * frame + -(-steps // params.evaluate.execute) * foreseen)
    if "offline" in params.evaluate.protocols:  # and what teachers see in the clips that were recorded
        clips = min(PICTURED_CLIPS, offline, data.rows(True), params.evaluate.batch)
        total += clips * (params.finetune_video.frames * frame + 2 * foreseen)
    return total


def _samples(training: Optimiser) -> int:
    return training.steps * training.batch * training.accumulate


def _analysed(params: Params, models: Models, windows: tuple[int, int]) -> float:
    """FLOPs of the stage `foresight` before it looks at the policy, at most; `windows`: of training and held-out episodes."""
    one, frames, section = models.flops, params.finetune_video.frames, params.foresight
    total = float(windows[1] * (frames * one["encode"] + one["decode"]))
    labelling = [b for b, teacher in models.teachers.items() if teacher.config.objective == "segmentation"]
    for branch in labelling[:1]:  # five predictors' futures and the observed frame
        total += windows[1] * (5 * (frames - 1) + 1) * one[f"teacher_{branch}"]
    probed = sum(min(section.probe_frames, count * (frames - 1)) for count in windows)
    features = 0 if params.generate.keep_features else one["one_step"]
    total += probed * (features + 3 * one["teacher_geometric"] + one.get("decoupler_geometric", 0))
    seen = one["encode"] + one["one_step"]
    seen += sum((frames + 1) * one[f"teacher_{b}"] + one[f"decoupler_{b}"] for b in models.decouplers)
    return total + section.clips * MOMENTS * seen


def stages_of(params: Params, data: Data, models: Models) -> Iterator[Stage]:
    """The stages that compute on a GPU, in order. What measuring takes is left out but for the generations that fine-tuning is
    measured on, the evaluation, and foresight."""
    one, parts, backbones, sampling = models.flops, parts_of(models), params.prepare_backbones, params.generate
    video, frames = params.finetune_video, params.finetune_video.frames
    if backbones.autoencoder.source == "in_domain":
        total = _samples(backbones.autoencoder.training) * one["train_autoencoder"]
        yield Stage("prepare_backbones_autoencoder", [models.autoencoder], [], total)
    if models.contrast:
        yield Stage("prepare_backbones_text", [models.contrast], [], _samples(backbones.text.training) * one["train_text"])
    for branch in BRANCHES:
        if f"train_{branch}" in one:
            total = _samples(getattr(backbones, branch).training) * one[f"train_{branch}"]
            yield Stage(f"prepare_backbones_teacher@{branch}", [models.teachers[branch]], [models.autoencoder], total)
    pictures, seen = params.convert.parts[0].foreseen * (data.rows(False) + data.rows(True)), [models.autoencoder, models.text]
    yield Stage("encode", [], [models.autoencoder], pictures * one["encode"])
    sample = one["train_unet"] if video.lora_rank is None else 2 * one["unet"]  # frozen weights have no gradients
    sample += one["unet"] if params.machine.checkpointing else 0
    total = _samples(video.training) * sample + video.evaluation_clips * video.evaluation_steps * one["unet"]
    trained: list[nn.Module] = [models.video] if video.training.steps else []
    yield Stage("finetune_video", trained, seen if trained else [*seen, models.video], total)
    train, held = min(sampling.windows, data.rows(False)), min(sampling.held_out_windows, data.rows(True))
    sampled = sampling.steps * (2 if models.sampler.guided else 1) * one["unet"]
    sampled += one["one_step"] if sampling.feature_time_ids else 0
    total = (train + 2 * held) * sampled + (train + 3 * held) * one["decode"]
    rounded: list[nn.Module] = [models.video] if sampling.bf16 else []
    yield Stage("generate", [], [*seen, models.video], total, rounded)
    for branch in params.distill.branches:
        looked = (train + held) * (frames + 1) + held * (2 * frames + 1)
        yield Stage(f"cache_teacher@{branch}", [], [models.teachers[branch]], looked * one[f"teacher_{branch}"])
    for branch in params.distill.branches:
        again = 0 if sampling.keep_features else one["one_step"]
        total = _samples(params.distill.training) * (one[f"train_decoupler_{branch}"] + again)
        frozen, halved = ([*seen, models.video], rounded) if again else ([], [])
        yield Stage(f"distill@{branch}", [models.decouplers[branch]], frozen, total, halved)
    needs = FrozenParts.of_entries(models.entries)
    encoded = sum(one[f"decoupler_{b}"] for b in needs.decouplers)
    if "generated" in models.entries or "goal_frame" in models.entries:
        encoded += sampled + one["decode"] + frames * sum(one[f"teacher_{b}"] for b in needs.teachers) + one["encode"]
    elif needs.video:
        encoded += one["one_step"] + one["encode"]
    encoded += sum(one[f"teacher_{b}"] for b in needs.teachers)
    encoded *= params.convert.parts[0].foreseen
    used, policy = [parts[name] for name in needs.names], params.train_policy
    read = sum(observations_of(params, data)) * policy.feature_draws
    if policy.features == "computed":
        evaluations = -(-policy.training.steps // policy.evaluate_every)
        read = _samples(policy.training) + evaluations * observations_of(params, data)[1]
    total = read * encoded + _samples(policy.training) * one["train_policy"]
    halves = {name: parts[name] for name in needs.names if policy.encode_bf16 and name not in ("autoencoder", "text")}
    rounded = [part for name, part in halves.items() if not name.startswith("teacher_")]
    yield Stage("train_policy", [models.policy], used, total, rounded)
    act, judged = encoded + one["context"] + policy.transformer.steps * one["denoise"], params.evaluate
    chunks = sum(episodes * -(-steps // judged.execute) for episodes, steps, _ in _rollouts(params))
    if "offline" in judged.protocols:
        chunks += judged.offline.windows * judged.offline.samples
    acting = [*halves.values(), *([models.policy] if halves else [])]
    yield Stage("evaluate (at most)", [], [*used, models.policy], chunks * act, acting)
    halved = [models.video, *models.decouplers.values()] if sampling.bf16 else []
    yield Stage("foresight (at most)", [], list(parts.values()), _analysed(params, models, (train, held)), halved)
    yield Stage("foresight, attention", [], [*used, models.policy], held * encoded, rounded)


def half_of_matrices(module: nn.Module) -> int:
    """Bytes that `round_weights` saves."""
    matrices = [layer for layer in module.modules() if isinstance(layer, MATRICES)]
    return 2 * sum(p.numel() for layer in matrices for p in layer.parameters(recurse=False))


def held_of(stage: Stage, account: Account) -> Held:
    """What a stage holds on the card, at the least; what lies there frozen counts among the weights."""
    held = (account.training(stage.name) if stage.trained else None) or Held(sum(map(saved, stage.trained)))
    weights = held.weights + sum(map(saved, stage.frozen)) - sum(map(half_of_matrices, stage.rounded))
    return held._replace(weights=weights, activations=max(held.activations, account.passes(stage.name)))


def _smaller(stage: str, table: bool) -> str:
    """The knob that makes a stage hold less. table: whether the plan has one of the ways to fine-tune."""
    name = re.split("[@, ]", stage)[0]
    knobs = {
        "encode": "lower encode.batch",
        "generate": "lower generate.batch or encode.batch",
        "cache_teacher": "lower cache_teacher.batch",
        "distill": "lower distill.training.batch and raise its accumulate",
        "train_policy": "lower train_policy.training.batch and raise its accumulate, or lower encode_batch",
        "evaluate": "lower evaluate.batch",
        "foresight": "lower foresight.batch",
    }
    if table:
        knobs["finetune_video"] = "take another row of the table above"
    return knobs.get(name, "lower the batch of its training and raise accumulate")


class Fit(NamedTuple):
    """A way of fine-tuning: bytes that a card holds at the least, and the most clips at a time on each of `SIZES`."""

    means: Means
    least: int
    clips: list[int]


def ways_to_fit(params: Params, account: Account, frozen: int) -> list[Fit]:
    """The params' own way, then the others of `LADDER`, without places of an average where there is none, and without adapters
    of random weights, which params refuse. `frozen`: bytes that lie beside what is trained."""
    own, training, published = Means.of(params), params.finetune_video.training, params.finetune_video.unet.pretrained
    batch = account.own(training.batch)
    several = max(2, batch)  # one clip keeps less than the line through several says
    others = (
        means for means in LADDER
        if means != own and (training.ema or means.average == "device") and (published or means.lora_rank is None)
    )  # fmt: skip
    ways: list[Fit] = []
    for means in (own, *others):
        held = account.fine_tuning(means, batch)
        resting = held._replace(activations=0).least + frozen
        beside = resting if held.accumulated else resting - held.gradients
        points = zip(account.kept(means, several), account.kept(means, 2 * several), strict=True)
        growing = [(one, two) for one, two in points if two > one]  # before the first adapter nothing is kept
        rooms = [size * 1e9 / MARGIN for size in SIZES]
        most = [min(int((room - beside - 2 * one + two) // ((two - one) / several)) for one, two in growing) for room in rooms]
        clips = [max(0, n) if resting <= room else 0 for n, room in zip(most, rooms, strict=True)]
        ways.append(Fit(means, held.least + frozen, clips))
    return ways


def _fit_lines(params: Params, account: Account, frozen: int) -> list[str]:
    batch, own = account.own(params.finetune_video.training.batch), Means.of(params)
    lines = [
        f"fine-tuning with {batch} clips at a time: the smallest card for it, and the most clips that cards of {SIZES[0]}, "
        f"{SIZES[1]} and {SIZES[2]} GB hold,",
        f"where a card has {MARGIN:g} times the bound (* the params as they are)",
        f"  {'params':84s}{'at least GB':>12s}{'card':>6s}" + "".join(f"{size:>6d}" for size in SIZES),
    ]
    for means, least, clips in ways_to_fit(params, account, frozen):
        card = next((str(size) for size, most in zip(SIZES, clips, strict=True) if most >= batch), "-")
        counts = "".join(f"{most or '-':>6}" for most in clips)
        lines.append(f"{'*' if means == own else ' '} {means!s:84s}{least / 1e9:12.1f}{card:>6s}{counts}")
    return lines


def short_of(params: Params, most: int) -> Iterator[str]:
    """What the params need and this machine has not; `most`: bytes that a stage holds on the card."""
    yield from lacking(params)
    if params.machine.device == "cpu":
        return
    if not torch.cuda.is_available():
        if params.machine.device == "auto":  # of "cuda" it is said above
            yield "torch sees no GPU"
    elif (memory := torch.cuda.get_device_properties(0).total_memory) < most:
        yield f"the GPU has {memory / 1e9:.1f} GB, a stage holds at least {most / 1e9:.1f}: see what does not fit"


def _there(path: Path) -> int:
    """Bytes of a folder's files, which may be none."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def without_room(outs: list[Out], folder: Path) -> Iterator[str]:
    """What does not fit on the disk of the project's `folder`, beside what of the outs is there."""
    missing = {out.path: max(0, out.size - _there(folder / out.path)) for out in outs}
    once, free = sum(missing.values()), shutil.disk_usage(folder).free
    twice = once + sum(size for path, size in missing.items() if path.startswith("data/"))
    if twice > free:
        largest = max(missing, key=lambda path: missing[path])
        helps = next((text for start, text in ROOMIER.items() if largest.startswith(start)), "choose smaller models")
        yield (
            f"the disk of {folder} has {free / 1e9:.1f} GB free; what is not there yet takes {once / 1e9:.1f}, and "
            f"{twice / 1e9:.1f} with DVC's copies, most of it {largest} ({missing[largest] / 1e9:.1f}): {helps}"
        )


def report(params: Params, data: Data, card: str, share: float, folder: Path) -> str:
    """The whole plan as a text. `card`: of `CARDS`; share: of its peak that is reached. folder: the project's."""
    models, (peak, memory) = Models(params, data), CARDS[card]
    rows = data.rows(False) + data.rows(True)
    origin = "measured in the store" if data.stored is not None else "an estimate, there is no store of these params"
    lines = [f"data: {len(data.lengths):,} episodes, {rows:,} time steps ({origin}), frames of {data.size[0]}x{data.size[1]}"]
    guess = "; of text with as many tokens as prepare_backbones.text.vocabulary allows" if models.guesses_vocabulary else ""
    lines += ["", f"parameters (exact{guess})"]
    named = parts_of(models) | {"policy": models.policy}
    lines += [f"  {name:36s}{parameters(part) / 1e6:12,.3f} M" for name, part in named.items()]
    lines += ["", "disk (GB; exact: arrays and weights, without headers; ~ estimated, of data/live and data/results at most)"]
    account = Account(params, data)
    outs = disk(params, data, models, account.video(params.finetune_video.lora_rank))
    lines += [f"  {out.path:36s}{out.size / 1e9:12,.3f} {'' if out.exact else '~'}".rstrip() for out in outs]
    lines += [f"  {'together':36s}{sum(out.size for out in outs) / 1e9:12,.3f}"]
    lines += ["  DVC's cache holds each out in data/ once more, where the file system does not share blocks"]
    lines += ["  not counted: " + "; ".join(f"{', '.join(paths)} ({why})" for why, paths in NOT_COUNTED.items())]
    lines += [
        "",
        "Memory: GB at the least. Activations are what the backward pass needs, or, where nothing is trained, in- and outputs",
        "of the largest layer; without accumulation gradients and activations need not lie there together. Hours are FLOPs of",
        f"matrix products and convolutions / ({share:g} x {peak / 1e12:g} TFLOP/s of {card}); of measuring on held-out data",
        "only fine-tuning's generations, evaluate and foresight count",
        f"  {'stage':36s}{'weights':>9s}{'gradients':>10s}{'moments':>9s}{'average':>9s}{'activations':>12s}{'at least':>9s}"
        f"{'PFLOP':>12s}{'hours':>9s}",
    ]
    hours, most, warnings = 0.0, 0, list(without_room(outs, folder))
    table = bool(params.finetune_video.training.steps) and card != "cpu"
    for stage in stages_of(params, data, models):
        held, spent = held_of(stage, account), stage.flops / (peak * share) / 3600
        one, two, three, four, five, six = (size / 1e9 for size in (*held[:5], held.least))
        lines.append(
            f"  {stage.name:36s}{one:9.2f}{two:10.2f}{three:9.2f}{four:9.2f}{five:12.2f}{six:9.2f}"
            f"{stage.flops / 1e15:12,.2f}{spent:9.2f}"
        )
        hours, most = hours + spent, max(most, held.least)
        if held.least > memory * 1e9:
            warnings.append(
                f"{stage.name} holds at least {held.least / 1e9:.1f} GB, a {card} has {memory}: "
                f"{_smaller(stage.name, table)}, or take another --card"
            )
    lines.append(f"  {'together':36s}{hours:79.2f}")
    if table:
        lines += ["", *_fit_lines(params, account, saved(models.autoencoder) + saved(models.text))]
    features, room = sum(out.size for out in outs if out.path == ".cache/features"), params.machine.cache_gb
    if features > room * 1e9:
        warnings.append(
            f"the policy's features take {features / 1e9:.1f} GB, machine.cache_gb is {room:g}: raise it, or "
            "train_policy.observation_stride, or set train_policy.features to computed"
        )
    said = [
        *(f"does not fit: {warning}" for warning in warnings),
        *(f"this machine: {lack}" for lack in short_of(params, most)),
    ]
    return "\n".join([*lines, *(["", *said] if said else [])])
