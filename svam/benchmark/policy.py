"""What the shortcut saves: one step against the generation that it replaces, frozen features that are kept against computing
them again, the policy made ready for control against float32, and an evaluation side by side against one environment after
another; all with a trained policy.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from svam.benchmark.timing import Inputs, in_turn, ratio_of
from svam.console import console
from svam.contract import ContractError, Observation
from svam.device import prepare_torch
from svam.episodes.joined import open_store
from svam.evaluation.metaworld import check_tasks, plan_episodes, render_settings
from svam.evaluation.offline import choose_windows, observations_of
from svam.evaluation.rollout import Outcome, PlannedEpisode, PolicyRollouts, Workers
from svam.files import sha256
from svam.models.control import for_control, to_bfloat16
from svam.models.svam import SVAM
from svam.models.timing import timed, timed_components
from svam.params import Params
from svam.precision import computes_bfloat16
from svam.seeds import seed_of
from svam.simulation.metaworld import TaskEnvironment, check_task
from svam.training.batch_order import EndlessOrder
from svam.training.feature_cache import FeatureCache, Features, ObservationSet
from svam.training.loop import fit
from svam.training.train_policy import (
    FRAMES,
    ComputedFeatures,
    TrainingData,
    check_camera,
    choose_rows,
    encoder_of,
    observe,
    sources_of,
)


def _load(inputs: Inputs, params: Params) -> tuple[SVAM, dict[str, Any]]:
    """The policy, and what identifies it and the computation, as JSON."""
    device = prepare_torch(params.machine.device, params.threads, params.seed)
    svam = SVAM.load(inputs.model, device)
    described = {
        "policy_sha256": sha256(inputs.model / "manifest.json"),  # which holds the SHA-256 of every other file
        "context": list(svam.config.context), "device": str(device), "threads": params.threads,
    }  # fmt: skip
    return svam, described


def _print(part: str, seconds: dict[str, Any], unit: str, ratio: dict[str, Any]) -> None:
    values = ", ".join(f"{name} {value:g}" for name, value in seconds.items())
    low, high = ratio["range"]
    console.print(f"{part}: {values} {unit}; ratio {ratio['ratio']:g} ({low:g} to {high:g})", soft_wrap=True)


def _encoded(svam: SVAM, observation: Observation, seed: int) -> dict[str, float]:
    """Seconds of `SVAM.encode` of one observation: component -> seconds, `other` and `total`."""
    parts: dict[str, float] = {}
    with timed_components(svam.foresight, parts), timed(parts, "total"):
        svam.encode([observation], [seed])
    return parts | {"other": 2 * parts["total"] - sum(parts.values())}


def _generated(svam: SVAM, observation: Observation, seed: int) -> dict[str, float]:
    """Seconds of generating the same observation's clip from the same noise, and of decoding it and showing it to the teachers:
    what a policy on generated video pays."""
    foresight, parts = svam.foresight, dict[str, float]()
    frames = torch.from_numpy(np.stack([observation.frames[camera] for camera in svam.cameras]))
    with timed_components(foresight, parts):
        condition, text = foresight.condition(frames), foresight.embed_text([observation.instruction] * len(frames))
        latents = foresight.generate(condition, text, foresight.video_model.initial_noise([seed] * len(frames))).latents
    with timed(parts, "decoding"):
        clip = foresight.decode(latents)
    with timed(parts, "teachers"):
        for branch in foresight.teachers:
            foresight.clip_features(branch, clip)
    return parts | {"total": sum(parts.values())}


def encode(inputs: Inputs, params: Params) -> dict[str, Any]:
    """`SVAM.encode` of single observations (one U-Net evaluation, teachers on the frame and decouplers included) against the
    multi-step generation of the same clips, with the steps that the policy's sampler states, without and with decoding and
    teachers. `clips` observations a repeat, encoded and generated in turn one by one; the sums of a repeat are compared.

    Raises:
        ContractError: the policy's context uses no video model, or the store's frames are not what it was trained on.
    """
    svam, described = _load(inputs, params)
    if svam.foresight.video is None:
        raise ContractError(f"{inputs.model}: its context {described['context']} uses no video model, so nothing is generated")
    count, repeats = params.benchmark.clips, params.benchmark.repeats
    store = open_store(inputs.episodes)
    observations = observations_of(store, svam, np.linspace(0, len(store) - 1, count).astype(np.int64))
    runs: dict[str, list[dict[str, float]]] = {"encode": [], "generate": []}

    def one(name: str, number: int) -> float:
        measured = {"encode": _encoded, "generate": _generated}[name](svam, observations[number % count], number % count)
        runs[name].append(measured)
        return measured["total"]

    in_turn({name: partial(one, name) for name in runs}, repeats * count)
    sums = {  # the first call of each warmed up
        name: {key: np.reshape([run[key] for run in found[1:]], (repeats, count)).sum(axis=1) for key in found[0]}
        for name, found in runs.items()
    }
    latents = sums["generate"]["autoencoder_and_text"] + sums["generate"]["video_model"]
    seconds: dict[str, list[float]] = {
        "encode": sums["encode"]["total"].tolist(), "generate": latents.tolist(),
        "generate_and_see": sums["generate"]["total"].tolist(),
    }  # fmt: skip

    def milliseconds(values: Sequence[float]) -> float:
        return round(1e3 * float(np.median(values)) / count, 3)

    typical = {name: milliseconds(values) for name, values in seconds.items()}
    ratios = {name: ratio_of(seconds, name, "encode") for name in ("generate", "generate_and_see")}
    for name, ratio in ratios.items():
        _print(f"{name} against encode", {key: typical[key] for key in ("encode", name)}, "ms", ratio)
    return described | {
        "sampler": svam.config.sampler.model_dump(), "frames": svam.foresight.video_model.config.frames,
        "teachers": list(svam.foresight.teachers), "observations": count, "milliseconds": typical, "ratios": ratios,
        "milliseconds_by_part": {
            name: {key: milliseconds(values) for key, values in found.items() if key != "total"} for name, found in sums.items()
        },
        "seconds": seconds,
    }  # fmt: skip


def features(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Policy training on cached features against the same steps on the same batches with the frozen parts computed for every
    batch: `policy_steps` steps of the trained network a repeat. Filling the cache is timed once; `ratio_with_filling` is what
    remains of the ratio over a whole training that fills it first. `difference`: context entry -> mean absolute difference
    between the two ways, as a share of the mean absolute value; the last bits depend on how many are encoded together.

    Raises:
        ContractError: the policy's context has no frozen entry, or the store is not what the video model was trained on.
        MachineError: the features do not fit `machine.cache_gb`.
    """
    svam, described = _load(inputs, params)
    section, steps, seed = params.train_policy, params.benchmark.policy_steps, params.seed
    frozen = svam.config.frozen_entries
    if not frozen:
        raise ContractError(f"{inputs.model}: its context {described['context']} has no frozen entry, so nothing is cached")
    store = open_store(inputs.episodes)
    check_camera(svam.foresight, store, svam.config.frozen_parts.video)
    available = choose_rows(store, "train", section.observation_stride, section.episodes_per_task)
    order = EndlessOrder(len(available), min(section.training.batch, len(available)), seed, "benchmark features")
    drawn = [order.batch(number) for number in range(steps)]
    places = np.unique(np.concatenate(drawn))
    batches, rows = [np.searchsorted(places, batch) for batch in drawn], available[places]
    observed = observe(store, rows, svam.chunk, svam.config.proprioception is not None, seed)
    wanted = ObservationSet.of(observed.instructions, lambda positions: store.seen(rows[positions]))
    kept = [*frozen, *([FRAMES] if svam.network.observation is not None else [])]
    folders = {name: inputs.model / name for name in svam.config.frozen_parts.names}
    sources, compute = sources_of(kept, svam.foresight, folders, svam.cameras), encoder_of(svam.foresight)
    cache = FeatureCache(inputs.scratch / "features", params.machine.cache_gb)
    start = time.perf_counter()
    filled = cache.fill(wanted, sources, compute, section.encode_batch)
    filling = (time.perf_counter() - start) / len(rows)
    with closing(filled):
        ways: dict[str, Features | ComputedFeatures] = {
            "cached": filled,
            "recomputed": ComputedFeatures(svam.foresight, wanted, kept, len(batches[0])),
        }
        sides = {name: TrainingData(observed, found, svam.foresight, svam, svam.device) for name, found in ways.items()}
        first = {name: side.inputs(batches[0]).entries for name, side in sides.items()}
        difference = {
            entry: float((values.float() - first["recomputed"][entry].float()).abs().mean() / values.float().abs().mean())
            for entry, values in first["cached"].items()
        }
        seconds = _trained(svam, sides, batches, params)
    samples = steps * len(batches[0])
    each = {name: float(np.median(values)) / samples for name, values in seconds.items()}
    uses = section.training.steps * section.training.accumulate * section.training.batch / len(available)
    rates = {name: round(1.0 / value, 1) for name, value in each.items()}
    ratio = ratio_of(seconds, "recomputed", "cached")
    _print("features", rates, "samples/s", ratio)
    return described | {
        "steps": steps, "batch": len(batches[0]), "difference": difference, "samples_per_second": rates, **ratio,
        "filling_samples_per_second": round(1.0 / filling, 1), "uses_of_an_observation": round(uses, 2),
        "ratio_with_filling": round(uses * each["recomputed"] / (filling + uses * each["cached"]), 3),
        "seconds": seconds,
    }  # fmt: skip


def _trained(
    svam: SVAM, sides: dict[str, TrainingData], batches: list[NDArray[np.int64]], params: Params
) -> dict[str, list[float]]:
    """Seconds of one pass of the training loop over `batches`, from the same weights every time."""
    weights = {name: value.clone() for name, value in svam.network.state_dict().items()}
    section = params.train_policy
    optimiser = section.training.model_copy(update={"steps": len(batches), "warmup": 0, "accumulate": 1})

    def run(name: str, number: int) -> float:
        svam.network.load_state_dict(weights)
        noise = torch.Generator().manual_seed(seed_of(params.seed, "benchmark features", number))
        spent: dict[str, float] = {}
        with timed(spent, name):
            fit(
                svam.network, lambda batch: svam.loss(batch, noise, section.noise_draws),
                lambda step: sides[name].batch(batches[step]), optimiser, svam.device, f"features, {name}",
            )  # fmt: skip
        return spent[name]

    return in_turn({name: partial(run, name) for name in sides}, params.benchmark.repeats)


def control(inputs: Inputs, params: Params) -> dict[str, Any]:
    """What `for_control` gives and costs: `act` of single held-out observations, `clips` of them a repeat, as the policy is
    loaded (`before`) and as it controls (`after`), in turn with it in `float32`; and how far the others are from float32:
    `cosines`, of each context entry, and `of_range`, the largest difference of an action over its range in training.

    `bfloat16`: with the weights that control has on a GPU, launched from Python; also on a CPU, where `for_control` rounds
    those alone that autocast would. Absent where control rounds none.

    Raises:
        ContractError: the store holds nothing out, or its frames are not what the policy was trained on.
        MachineError: the policy cannot be made ready here.
    """
    loaded, described = _load(inputs, params)
    device = loaded.device
    forms = {"float32": SVAM.load(inputs.model, device), "before": loaded}
    forms["after"] = for_control(SVAM.load(inputs.model), device, 1, params.machine.compile)
    if loaded.config.sampler.bf16 and computes_bfloat16(device):
        forms["bfloat16"] = SVAM.load(inputs.model, device)
        to_bfloat16(forms["bfloat16"])
    exact = forms["float32"].foresight
    exact.sampler = exact.sampler.model_copy(update={"bf16": False})

    count, repeats = params.benchmark.clips, params.benchmark.repeats
    store = open_store(inputs.episodes)
    observations = observations_of(store, loaded, choose_windows(store, count, params.seed))
    encoded = {name: [svam.encode([o], [k]) for k, o in enumerate(observations)] for name, svam in forms.items()}
    actions = {name: [svam.sample(found, [k]) for k, found in enumerate(encoded[name])] for name, svam in forms.items()}
    truths = encoded["float32"]

    def one(name: str, number: int) -> float:
        place, spent = number % len(observations), dict[str, float]()
        with timed(spent, "act"):
            forms[name].act([observations[place]], [place])
        return spent["act"]

    found = in_turn({name: partial(one, name) for name in forms}, repeats * len(observations))
    seconds = {name: np.reshape(values, (repeats, -1)).sum(axis=1).tolist() for name, values in found.items()}
    typical = {name: round(1e3 * float(np.median(values)) / len(observations), 3) for name, values in seconds.items()}
    ratio, limits = ratio_of(seconds, "before", "after"), loaded.statistics.actions
    _print("control", typical, "ms", ratio)
    others = [name for name in forms if name != "float32"]
    span = np.maximum(np.asarray(limits.max) - np.asarray(limits.min), 1e-9)  # an action that is constant differs by nothing
    return described | {
        "observations": len(observations), "milliseconds": typical, **ratio,
        "cosines": {
            name: {entry: _cosine([i.entries[entry] for i in truths], [i.entries[entry] for i in encoded[name]])
                   for entry in truths[0].entries}
            for name in others
        },
        "of_range": {
            name: float((np.abs(np.concatenate(actions[name]) - np.concatenate(actions["float32"])) / span).max())
            for name in others
        },
        "seconds": seconds,
    }  # fmt: skip


def _cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The mean over the tokens (..., C) of all observations."""
    return float(nn.functional.cosine_similarity(torch.cat(list(a)).double(), torch.cat(list(b)).double(), dim=-1).mean())


def evaluation(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Episodes per minute in closed loop: as `evaluate` does it (`evaluate.batch` environments side by side, `machine.workers`
    processes) against one environment and one observation at a time, on the same plans, whose goals are drawn for them alone.
    The processes are running before the first repeat; building an environment where a slot's task changes counts for both.

    Raises:
        ValueError: the tasks or the store do not fit the metaworld protocol.
        MachineError: nothing renders here, or a worker process died.
    """
    settings = params.benchmark
    protocol = params.evaluate.metaworld.model_copy(update={"episodes": settings.evaluation_episodes})
    section = params.evaluate.model_copy(update={"metaworld": protocol, "videos": 0})
    store = open_store(inputs.episodes)
    check_tasks(protocol.tasks, store)
    rendering = render_settings(store, protocol.tasks)
    svam, described = _load(inputs, params)
    seed = seed_of(params.seed, "benchmark evaluation")
    plans = plan_episodes("policy", store, section, seed)
    make = partial(TaskEnvironment, cameras=tuple(svam.cameras), **rendering)
    ways = {"batched": (section.batch, params.machine.workers), "one_at_a_time": (1, 1)}
    played: dict[str, list[Outcome]] = {}

    with ExitStack() as stack:
        pools = {name: stack.enter_context(Workers(make, workers)) for name, (_, workers) in ways.items()}

        def play(name: str, some: list[PlannedEpisode], max_steps: int) -> float:
            rollouts = PolicyRollouts(
                svam, pools[name], seed=seed, batch=ways[name][0], execute=section.execute, max_steps=max_steps,
                proprioception=svam.needs_proprioception,
            )  # fmt: skip
            start = time.perf_counter()
            played[name] = rollouts.run(some)
            return time.perf_counter() - start

        def whole(name: str, _: int) -> float:
            return play(name, plans, protocol.max_steps)

        # All processes import the simulator, at the same time.
        ready = [pool.submit(slot, check_task, protocol.tasks[0]) for pool in pools.values() for slot in range(pool.count)]
        for future in ready:
            future.result()
        for name, (batch, _) in ways.items():
            play(name, plans[:batch], section.execute)
        seconds = in_turn({name: partial(whole, name) for name in ways}, settings.repeats, warm=False)
    rates = {name: round(60.0 * len(plans) / float(np.median(values)), 3) for name, values in seconds.items()}
    ratio = ratio_of(seconds, "one_at_a_time", "batched")
    _print("evaluation", rates, "episodes per minute", ratio)
    return described | {
        "tasks": list(protocol.tasks), "episodes": len(plans), "max_steps": protocol.max_steps, "execute": section.execute,
        **rendering,
        "batch": {name: batch for name, (batch, _) in ways.items()}, "workers": {name: n for name, (_, n) in ways.items()},
        "episodes_per_minute": rates, **ratio, "seconds": seconds,
        "success": {name: [outcome.success for outcome in found] for name, found in played.items()},
        "steps": {name: sum(outcome.steps for outcome in found) for name, found in played.items()},
    }  # fmt: skip
