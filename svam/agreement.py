"""What the sections of `params.yaml` demand of one another, so that no contradiction is found hours later by a late stage.

Like `svam.params` it imports no torch and no simulator, and reads no data: what only the data can tell, stages check. A
simulator's checkout that the params name must be there. What else this machine lacks for them, `lacking` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from svam.episodes.instructions import described_tasks, likely_task
from svam.episodes.options import source_options
from svam.episodes.windows import stride_of
from svam.errors import ParamsError, SvamError, did_you_mean
from svam.files import FileError, read_yaml
from svam.launch import contradictions, unfit
from svam.models import layouts
from svam.params import Params
from svam.simulation.calvin import open_checkout
from svam.simulation.libero import libero_version
from svam.simulation.metaworld import RATE_HZ
from svam.simulation.scenes import check_scenes

SIGMA_MAX, LATENT_VALUES = 80.0, 6 * 8 * 8 * 32
"""A first noise level that serves clips of T x h' x w' x c latent values; see `notes`."""
UNET = "finetune_video.unet.pretrained"


def check_agreement(params: Params) -> None:
    """Raise `ParamsError` for an option that the data's source does not take; then with a line for each contradiction, which
    names the keys and the values; then for tasks without the chosen scenes. `MachineError` says that a simulator is not
    installed, which a late stage would find out otherwise."""
    for part in params.convert.parts:
        source_options(params.model_copy(update={"convert": part}))
    problems = [*contradictions(params), *_of_models(params), *_of_sizes(params), *_of_sets(params), *_of_looks(params)]
    if "metaworld" in [part.source for part in params.convert.parts] or "metaworld" in params.evaluate.protocols:
        problems += _of_metaworld(params)
    if "calvin" in params.evaluate.protocols:
        problems += _of_calvin(params)
    if "libero" in params.evaluate.protocols:
        libero_version()
    if problems:
        raise ParamsError("\n".join(problems))
    check_scenes(params.collect.scenes, params.collect.tasks)


def frame_size(params: Params) -> tuple[int, int] | None:
    """(H, W) of the store's frames where the params say it: as resized, or as the simulator draws them."""
    first = params.convert.parts[0]  # of several sets all have one size
    if first.image_size is not None:
        return first.image_size[0], first.image_size[1]
    return (params.collect.image_size,) * 2 if first.source == "metaworld" else None


def _of_models(params: Params) -> Iterator[str]:
    branches, unet = params.distill.branches, params.finetune_video.unet
    if missing := sorted({"geometric", "semantic"} & set(params.train_policy.context) - set(branches)):
        yield f"train_policy.context asks for {missing}, which distill.branches {branches} does not train"
    if (
        "recorded" in params.train_policy.context
        and params.evaluate.policy == "svam"
        and params.evaluate.protocols != ["offline"]
    ):
        yield (
            "train_policy.context has 'recorded', the recorded future, which nobody has who acts, but evaluate.protocols is "
            f"{params.evaluate.protocols}: set it to [offline]"
        )
    if not unet.pretrained and params.generate.up_blocks > len(unet.channels):
        yield (
            f"generate.up_blocks is {params.generate.up_blocks}, but the U-Net has {len(unet.channels)} up blocks, one for "
            f"each of finetune_video.unet.channels {unet.channels}"
        )
    draws = params.train_policy.feature_draws
    if draws > 1 and params.finetune_video.noise == "fixed":
        yield (
            f"train_policy.feature_draws is {draws}, but finetune_video.noise is fixed, so that all draws would be equal: set "
            "noise to fresh, or feature_draws to 1"
        )
    if params.evaluate.policy == "svam" and params.evaluate.execute > params.train_policy.chunk:
        yield f"evaluate.execute ({params.evaluate.execute}) must not exceed train_policy.chunk ({params.train_policy.chunk})"
    section = params.evaluate.metaworld
    if "metaworld" in params.evaluate.protocols and section.held_out_instruction_episodes > section.episodes:
        yield (
            f"evaluate.metaworld.held_out_instruction_episodes ({section.held_out_instruction_episodes}) must not exceed "
            f"evaluate.metaworld.episodes ({section.episodes}): they are the first of the same goals"
        )


def _of_sizes(params: Params) -> Iterator[str]:
    """Frames -> latents -> levels of the U-Net: each must divide."""
    size, unet = frame_size(params), params.finetune_video.unet
    if size is None:
        return
    key = "convert.image_size" if params.convert.parts[0].image_size else "collect.image_size"
    factor, levels = params.prepare_backbones.autoencoder.factor, 4 if unet.pretrained else len(unet.channels)
    multiple = factor * 2 ** (levels - 1)
    if size[0] % factor or size[1] % factor:
        yield (
            f"{key} is {size[0]}x{size[1]}, but must be a multiple of {factor}, by which the autoencoder "
            "(prepare_backbones.autoencoder.channels, one level per factor of two) shrinks a frame"
        )
    elif size[0] % multiple or size[1] % multiple:
        yield (
            f"{key} is {size[0]}x{size[1]}, but must be a multiple of {multiple}: the autoencoder shrinks a frame by {factor}, "
            f"and the U-Net's {levels} levels (finetune_video.unet.channels) halve the latents {levels - 1} times"
        )
    elif params.generate.grid > min(size) // factor:
        yield (
            f"generate.grid is {params.generate.grid}, but latents of frames of {size[0]}x{size[1]} ({key}) are only "
            f"{size[0] // factor}x{size[1] // factor}: no feature of the U-Net is finer"
        )


def _of_sets(params: Params) -> Iterator[str]:
    acting = [one.name for one in params.convert.sets if one.policy]
    for protocol in params.evaluate.protocols if params.convert.sets else ():
        if protocol not in (*acting, "offline"):
            yield (
                f"evaluate.protocols has {protocol}, but the sets with policy: true in convert.sets are {acting}: name "
                f"{protocol!r} the one that the policy acts as there"
            )


def _of_looks(params: Params) -> Iterator[str]:
    """Recordings without actions are a set of their own, which the policy does not learn from."""
    sets, collect = params.convert.sets, params.collect
    of_policy = [(one.name, one.policy) for one in sets] or [("", True)]
    for (name, policy), part in zip(of_policy, params.convert.parts, strict=True):
        where, looks = f"convert.sets, {name}" if name else "convert", list(part.options.get("looks") or collect.looks)
        if part.source != "metaworld" or not collect.tasks:
            continue
        if absent := [look for look in looks if look not in collect.looks]:
            yield f"{where}: options.looks names {absent}, which collect.looks {collect.looks} does not list"
        silent = [look for look in looks if look in collect.unlabelled]
        if silent and (policy or silent != looks):
            yield (
                f"{where}: looks {looks} are read, of which collect.unlabelled {silent} have no actions: make these a set of "
                f"their own in convert.sets, with policy: false and options: {{looks: {silent}}}, and choose the others by "
                "options of another set"
            )


def _of_calvin(params: Params) -> Iterator[str]:
    section = params.evaluate.calvin
    try:
        subtasks = open_checkout(section.path, section.commit).sentences
    except SvamError as error:
        yield str(error)
        return
    for task in sorted(set(section.tasks) - set(subtasks)):
        yield f"evaluate.calvin.tasks names {task!r}, which is no subtask of CALVIN{did_you_mean(task, subtasks)}"


def _of_metaworld(params: Params) -> Iterator[str]:
    convert = next((part for part in params.convert.parts if part.source == "metaworld"), params.convert)
    collected, closed_loop = convert.source == "metaworld", "metaworld" in params.evaluate.protocols
    tasks = list(convert.options.get("tasks", params.collect.tasks))
    if collected and convert.foreseen > len(params.collect.cameras):
        yield (
            f"convert.foreseen is {convert.foreseen}, but collect.cameras are {params.collect.cameras}: name as many, "
            "or lower foreseen"
        )
    if collected and not tasks:
        yield "convert.source is metaworld, but collect.tasks is []; name tasks, or another source"
    if closed_loop and not params.evaluate.metaworld.tasks:
        yield "evaluate.protocols has metaworld, but evaluate.metaworld.tasks is []; name tasks, or evaluate offline alone"
    named = {
        "collect.tasks": tasks if collected else [],
        "evaluate.metaworld.tasks": params.evaluate.metaworld.tasks if closed_loop else [],
    }
    unknown = {(key, task) for key, names in named.items() for task in names if task not in described_tasks()}
    for key, task in sorted(unknown):
        yield f"{key} names {task!r}, which is no task of MetaWorld; {likely_task(task)}"
    if not collected:
        return
    try:
        stride_of(params.finetune_video.stride_seconds, convert.resample_hz or RATE_HZ)
    except ParamsError as error:
        yield f"finetune_video.{error}"
    key, chosen = ("convert.tasks", convert.tasks) if convert.tasks else ("collect.tasks", tasks)
    absent = [task for task in params.evaluate.metaworld.tasks if task not in chosen]
    closed_loop = closed_loop and params.evaluate.policy == "svam"  # others need no demonstrations
    if closed_loop and absent and not unknown:
        yield f"evaluate.metaworld.tasks names {absent}, of which {key} {chosen} has no demonstrations"
    size = convert.image_size
    if closed_loop and size is not None and size != [params.collect.image_size] * 2:
        yield (
            f"convert.image_size is {size}, but evaluate.protocols has metaworld, whose frames are drawn and not resized: set "
            f"collect.image_size (now {params.collect.image_size}) to the size, and convert.image_size to null"
        )


def lacking(params: Params) -> list[str]:
    """What the params ask for and this machine has not, a sentence each: published weights, as far as their files tell without
    being loaded, libraries, what starts several processes, and a GPU. Its memory is `svam.presets.plan`'s to miss."""
    video, lacks = params.finetune_video, list(unfit(params))
    for key, library, asked in (
        ("moments", "bitsandbytes", video.moments == "int8"), ("lora_rank", "peft", video.lora_rank is not None),
    ):  # fmt: skip
        if asked and not find_spec(library):
            lacks.append(
                f"finetune_video.{key} is {getattr(video, key)!r}, but {library} is not installed: "
                "pip install -c constraints.txt -e '.[cards]' brings it"
            )
    if params.machine.device == "cuda" and (version := _torch_without_gpu()):
        lacks.append(
            f"machine.device is 'cuda', but torch {version} sees no CUDA GPU; use 'auto' or 'cpu', or install a CUDA build of "
            "torch"
        )
    for chosen in _published(params):
        try:
            layouts.local_weights(chosen.path, chosen.revision, chosen.layout, chosen.key)
        except FileError as error:
            if _recorded(chosen.stage, chosen.key) != chosen.path:
                lacks.append(str(error))
    return lacks


class _Published(NamedTuple):
    """A choice of published weights: the key of their path, the stage that reads them, and what is looked for."""

    key: str
    stage: str
    path: str
    revision: str | None
    layout: layouts.Layout


def _published(params: Params) -> list[_Published]:
    parts, unet = params.prepare_backbones, params.finetune_video.unet
    sections = {
        "autoencoder": ("autoencoder", parts.autoencoder, layouts.AUTOENCODER), "text": ("text", parts.text, layouts.TEXT),
        "geometric": ("teacher@geometric", parts.geometric, layouts.TEACHERS[parts.geometric.family]),
        "semantic": ("teacher@semantic", parts.semantic, layouts.TEACHERS[parts.semantic.family]),
    }  # fmt: skip
    chosen = [
        _Published(f"prepare_backbones.{name}.path", f"prepare_backbones_{stage}", str(part.path), part.revision, layout)
        for name, (stage, part, layout) in sections.items()
        if part.source == "pretrained"
    ]
    if unet.pretrained:
        chosen.append(_Published(UNET, "finetune_video", unet.pretrained, unet.revision, layouts.UNET))
    return chosen


def _torch_without_gpu() -> str | None:
    """torch's version where it sees no GPU. Its import takes seconds: ask only where the params make it matter."""
    import torch

    return None if torch.cuda.is_available() else str(torch.__version__)


def _recorded(stage: str, key: str) -> object:
    """What dvc.lock says of a param of the stage's last run, None where it says nothing: what a run made of published weights
    is there, or can be pulled, when the weights are not."""
    lock = read_yaml(Path("dvc.lock")) if Path("dvc.lock").is_file() else {}
    listed = lock.get("stages", {}).get(stage, {}).get("params", {}).get("params.yaml", {})
    section = next((name for name in listed if key.startswith(f"{name}.")), "")
    value = listed.get(section)
    for part in key.removeprefix(f"{section}.").split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def notes(params: Params) -> list[str]:
    """Sentences about values that are accepted, and perhaps a mistake."""
    return [*_of_published_sizes(params), *_of_first_noise(params), *_of_tail(params)]


def _of_published_sizes(params: Params) -> Iterator[str]:
    """Published models on a CPU take days, which nobody asked for by `auto`."""
    if params.machine.device == "auto" and (chosen := _published(params)) and _torch_without_gpu():
        yield (
            f"published weights are named by {', '.join(one.key for one in chosen)}, and machine.device is 'auto', but torch "
            "sees no CUDA GPU: models of their sizes would be computed on the CPU. `python -m svam.presets plan PRESET --card "
            "cpu` says for how long"
        )


def _of_first_noise(params: Params) -> Iterator[str]:
    """Sampling starts from pure noise, training from clips plus noise of `sigma_max`. What is left of the clip there grows with
    the distance of two clips, which grows with the root of their number of values."""
    size, autoencoder = frame_size(params), params.prepare_backbones.autoencoder
    if size is None:
        return
    channels = autoencoder.latent_channels if autoencoder.source == "in_domain" else 4
    height, width = (side // autoencoder.factor for side in size)
    shape = f"{params.finetune_video.frames} x {height} x {width} x {channels}"
    enough = SIGMA_MAX * math.sqrt(params.finetune_video.frames * height * width * channels / LATENT_VALUES)
    if params.finetune_video.sigma_max < 0.7 * enough:
        yield (
            f"finetune_video.sigma_max is {params.finetune_video.sigma_max:g}, which is low for clips of {shape} latent "
            "values: training would see the clip through the noise that sampling starts from. About "
            f"{enough:.0f} hides it as {SIGMA_MAX:g} does at 6 x 8 x 8 x 32"
        )


def _of_tail(params: Params) -> Iterator[str]:
    """A clip that begins near the end of a demonstration looks beyond it."""
    video, tail = params.finetune_video, params.collect.tail
    ahead = round((video.frames - 1) * video.stride_seconds * RATE_HZ)
    if "metaworld" in [part.source for part in params.convert.parts] and tail < ahead:
        yield (
            f"collect.tail is {tail}, but a clip looks {ahead} steps ahead ((finetune_video.frames - 1) x stride_seconds): the "
            f"last frames of clips near the end of a demonstration are copies of its last one. A tail of {ahead} records them"
        )
