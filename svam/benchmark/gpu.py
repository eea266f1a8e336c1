"""What a GPU does with published sizes, untrained: control in real time, trainings, and a data set recorded on its host.

Absolute figures, unlike those of the other parts, so each stands beside the card's own rates of matrix products and of copies,
measured in the same run, and where arithmetic bounds it beside the share of that bound. What is measured is written at once,
and a second call measures what the first did not come to.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from svam.benchmark.timing import Inputs
from svam.benchmark.training import FEW, finetuning, forget, peak_gb, policy
from svam.code import code_of, library_versions
from svam.console import console
from svam.device import prepare_torch
from svam.errors import MachineError, ParamsError, SvamError
from svam.files import read_json, sha256_of_json
from svam.models.control import Graph, compiled_passes, drop_unused, for_control, to_bfloat16
from svam.models.foresight import ForesightModel
from svam.models.svam import SVAM
from svam.models.text import TextEncoder
from svam.models.timing import timed
from svam.params import Params
from svam.precision import computes_bfloat16
from svam.presets.data import estimated
from svam.presets.models import Models
from svam.presets.overlay import overlay_of, with_overlay, with_values
from svam.report.tables import markdown_table
from svam.training.prepare_backbones.text import train_tokenizer

PUBLISHED, SMALL = "paper-metaworld", "mt50-gpu"
"""Presets: whose models control and are trained, and whose U-Net is trained and demonstrations are recorded."""
CALLS, GENERATIONS = 30, 2
RANK = 16
"""Of the adapters that fine-tune the large U-Net."""
DECAY = 0.999
"""Of the averaged weights where they lie on the host; the preset has none."""
EPISODES = 50
"""Demonstrations of each task; the preset records some more, which are held out."""
BUDGET, LIMIT, AGAIN = 400.0, 480.0, 10.0
"""Seconds of a command after which no part is begun, and after which the one that runs is ended; and from one attempt to end
it to the next."""
CODE = ("svam/benchmark/gpu.py", "stages/collect.py", "stages/convert.py")
"""Whose code decides the figures, with all that it imports."""


class Row(NamedTuple):
    """A line of the table: a figure of a part. before: on an H200, launch by launch; must, better: what is aimed at; flops: the
    name under which its arithmetic is counted; beside: another figure of the same run, and its unit."""

    part: str
    figure: str
    what: str
    unit: str
    before: float | None
    must: float
    better: float | None
    flops: str | None = None
    beside: tuple[str, str] | None = None


ROWS = {
    "act": Row("control", "act_ms", "`act` at published sizes, one observation", "ms", 131.6, 40, 25, "act"),
    "one_step": Row("control", "one_step_ms", "the one-step U-Net pass in it", "ms", 53.3, 15, 9, "one_step"),
    "generations": Row(
        "control", "generations", "generating the same clip in 30 steps without guidance, launch by launch, against `act`",
        "times", 22, 70, 110, "generation",
    ),
    "memory": Row("control", "peak_gb", "peak memory of `act`", "GB", 9.8, 7, 5),
    "rate": Row("control", "actions_per_second", "control, chunks of 8", "Hz", 61, 200, 320),
    "finetuning": Row(
        "finetuning", "per_second", "fine-tuning SVD's U-Net, 16 frames of 256 px, batch 4", "clips/s", 11.3, 18, 25,
        "finetuning", ("peak_gb", "GB"),
    ),
    "finetuning_memory": Row(
        "lean_finetuning", "peak_gb", "its peak memory, layers computed twice and the average on the host", "GB", 70, 44, 36,
        None, ("per_second", "clips/s"),
    ),
    "adapters_memory": Row(
        "adapters", "peak_gb", "its peak memory, adapters of rank 16 and layers computed twice", "GB", None, 22, None,
        None, ("per_second", "clips/s"),
    ),
    "small_finetuning": Row(
        "small_finetuning", "per_second", "training a U-Net of 20 M parameters, 8 frames of 128 px, batch 32", "clips/s",
        347, 900, 1500, "small_finetuning",
    ),
    "policy": Row(
        "policy", "ratio", "training the policy on features that are there, compiled against not", "times", 1, 2, 4, "policy"
    ),
    "demonstrations": Row(
        "demonstrations", "seconds", "50 x 50 demonstrations at 128 px, recorded and converted on 16 cores", "s", None, 150, 75
    ),
}  # fmt: skip
TIMES = {"act": ("control", "act_ms"), "one_step": ("control", "one_step_ms"), "generation": ("before", "generation_ms")}
"""What `flops` counts -> the part that times it, in milliseconds; trainings have samples a second."""


def gpu(inputs: Inputs, params: Params) -> dict[str, Any]:
    """All rows on the GPU that is here, by the presets of the params in the current folder; of `inputs.only` those parts alone,
    anew. A row that fails says why under `failed`, and the others are measured all the same. `inputs.out` is written after each
    part; where it is already there, of the same card and code, what it has is kept.

    Raises:
        MachineError: there is no GPU.
        ParamsError: the presets do not fit params.yaml, or `only` names no part.
        FileError: `out` is there and no JSON, or cannot be written.
    """
    if not torch.cuda.is_available():
        raise MachineError(f"the part gpu needs a CUDA GPU, and torch {torch.__version__} sees none")
    device = prepare_torch("cuda", params.threads, params.seed)
    small = overlay_of(SMALL) | {"collect.episodes": EPISODES}
    kept = read_json(inputs.out) if inputs.out is not None and inputs.out.is_file() else None
    return measure(Path("params.yaml"), overlay_of(PUBLISHED), small, device, inputs.scratch, inputs.write, kept, inputs.only)


def measure(
    file: Path, published: Mapping[str, Any], small: Mapping[str, Any], device: torch.device, scratch: Path,
    write: Callable[[dict[str, Any]], None], kept: Any = None, only: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """All rows by two overlays of a params file, or the parts `only`. `rows`: by the names of `ROWS`; `shares`: of the time
    that the FLOPs would take at the rate of matrix products; `seconds`: what each part took, warming up and compiling included.

    write: called with what is known before and after each part. kept: what it was called with by an earlier command.
    """
    begun = time.perf_counter()
    sizes, few = with_overlay(published, file, PUBLISHED)[0], with_overlay(small, file, SMALL)[0]
    averaging = with_overlay({**published, "finetune_video.training.ema": DECAY}, file, PUBLISHED)[0]
    # The preset computes layers twice, which clips a second before were measured without.
    fast = sizes.machine.model_copy(update={"compile": True, "checkpointing": False})
    # Memory is read of these, which is not worth the minutes that compiling them takes.
    lean = fast.model_copy(update={"compile": False, "checkpointing": True, "average": "host"})
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "rates": lambda: rates(device),
        "before": lambda: before(sizes, device),
        "captured": lambda: acting(untrained(sizes, device), device, compiled=False),
        "control": lambda: control(sizes, device),
        "lean_finetuning": lambda: finetuning(averaging, device, lean, None, FEW),
        "adapters": lambda: finetuning(sizes, device, lean, RANK, FEW),
        "policy": lambda: policy(sizes, device, fast),
        "finetuning": lambda: finetuning(sizes, device, fast),
        "small_finetuning": lambda: finetuning(few, device, fast),
        "flops": lambda: counted(sizes, few),
        "demonstrations": lambda: demonstrations(file, small, scratch),
        "channels_last": lambda: channels_last(sizes, device),  # no row: the last to be measured
    }
    if unknown := [name for name in only if name not in parts]:
        raise ParamsError(f"--only {unknown[0]}: the part gpu measures {', '.join(parts)}")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    modules = {**sizes.modules, "svam.sources.": sizes.modules["svam.sources."] + few.modules["svam.sources."]}
    decided = [name, code_of(CODE, modules), library_versions(), *(each.model_dump(mode="json") for each in (sizes, few))]
    found: dict[str, Any] = {"card": name, "of": sha256_of_json(decided), "parts": {}, "failed": {}, "seconds": {}}
    if isinstance(kept, dict) and kept.get("of") == found["of"]:
        found |= {key: dict(kept[key]) for key in ("parts", "failed", "seconds")}
    elif kept is not None:
        console.print("what is there is of another card, code or params: all is measured anew", soft_wrap=True)
    wanted = [part for part in parts if part in only or not (only or part in found["parts"])]
    for part in wanted:
        found["parts"].pop(part, None)
        found["failed"][part] = "not reached: the command ended before"
    for part in wanted:
        start = time.perf_counter()
        found["failed"][part] = "not finished: the command ended within it"
        write(found | summary(found["parts"]))
        try:
            if start - begun > BUDGET:
                raise MachineError(f"not begun: the parts before took more than {BUDGET:g} s; the same command measures it")
            with _ended_after(begun + LIMIT - start):
                measured = parts[part]()
            json.dumps(measured, allow_nan=False)  # what cannot be written must not take the rest with it
            found["parts"][part] = measured
            del found["failed"][part]
        except Exception as error:  # compilers raise of all kinds, and what else was measured is worth more
            mendable = isinstance(error, SvamError)
            if not mendable:
                console.print_exception(max_frames=8)
            found["failed"][part] = " ".join(f"{'' if mendable else type(error).__name__ + ': '}{error}".split())[:500]
        found["seconds"][part] = round(time.perf_counter() - start, 1)
        write(found | summary(found["parts"]))
        said = found["failed"].get(part) or found["parts"][part]
        console.print(f"{part}, {found['seconds'][part]:.0f} s: {said}", markup=False, soft_wrap=True)
        with suppress(RuntimeError):  # of a card that is lost, which the next part says; the last needs none
            torch._dynamo.reset()  # compiled code keeps tensors
            forget(device)
    return found | summary(found["parts"])


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End what is done inside after that time, compilers and other processes included, by an error in the main thread: more
    than once, since what is interrupted may take the error for one of its own."""

    def end(*_: object) -> None:
        raise MachineError(f"not finished: all parts together have {LIMIT:g} s; the same command measures it")

    handler = signal.signal(signal.SIGALRM, end)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1), AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def summary(parts: Mapping[str, Any]) -> dict[str, Any]:
    """`rows` and `shares` (see `measure`) of the parts that are there."""
    rows = {key: parts[row.part][row.figure] for key, row in ROWS.items() if row.figure in parts.get(row.part, {})}
    if {"before", "control"} <= parts.keys():
        rows["generations"] = parts["before"]["generation_ms"] / parts["control"]["act_ms"]
    seconds = {name: parts[part][figure] / 1e3 for name, (part, figure) in TIMES.items() if part in parts}
    trained = ("finetuning", "small_finetuning", "policy")
    seconds |= {name: 1.0 / parts[name]["per_second"] for name in trained if name in parts}
    bounded = {"rates", "flops"} <= parts.keys()
    floors = {name: parts["flops"][name] / parts["rates"]["matrix_flops"] for name in seconds if bounded}
    return {"rows": rows, "shares": {name: floor / seconds[name] for name, floor in floors.items()}}


def rates(device: torch.device) -> dict[str, float]:
    """FLOP/s of a large bfloat16 matrix product, and bytes a second, read and written, of a large copy."""
    side, times = (8192, 20) if device.type == "cuda" else (256, 1)
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    source = torch.zeros(4 * side**2, device=device)
    target = torch.empty_like(source)
    product = _seconds(lambda: [matrix @ matrix for _ in range(times)], 3) / times
    copied = _seconds(lambda: [target.copy_(source) for _ in range(times)], 3) / times
    return {"matrix_flops": 2 * side**3 / product, "copy_bytes": 2 * source.nbytes / copied}


def counted(sizes: Params, few: Params) -> dict[str, int]:
    """FLOPs, as torch counts them, of `act`, its one-step pass, and generating the clip without guidance; and of a sample of
    each training, layers computed once."""
    flops, small = (Models(params, estimated(params, None, None)).flops for params in (sizes, few))
    parts = [name for name in flops if name.startswith(("teacher_", "decoupler_"))]
    act = sum(flops[name] for name in ("encode", "one_step", "context", *parts))
    return {
        "act": act + sizes.train_policy.transformer.steps * flops["denoise"], "one_step": flops["one_step"],
        "generation": sizes.generate.steps * flops["unet"], "finetuning": flops["train_unet"],
        "small_finetuning": small["train_unet"], "policy": flops["train_policy"],
    }  # fmt: skip


def untrained(params: Params, device: torch.device) -> SVAM:
    """The S-VAM of the params, its gates open as training opens them, so that every part shows in the actions."""
    models = Models(params, estimated(params, None, None), device.type)
    tokens, projection = params.prepare_backbones.text.tokens, getattr(models.text, "text_projection", None)
    clip, weight = (models.text, None) if projection is None else (models.text.text_model, projection.weight.detach())
    text = TextEncoder(clip, train_tokenizer(["go"], 1024), tokens, weight)
    foresight = ForesightModel(text, models.sampler, models.autoencoder, models.video, models.teachers, models.decouplers)
    for module in models.policy.diffusion.decoder:
        nn.init.normal_(module.modulation.weight, std=0.02)  # type: ignore[union-attr, arg-type]
    return SVAM(models.policy.config, models.statistics, foresight, models.policy)


def _given(svam: SVAM) -> list[Tensor]:
    """What the video model sees of one observation: condition, text and noise."""
    foresight = svam.foresight
    frame = torch.from_numpy(svam.example().frames[svam.cameras[0]])[None]
    return [foresight.condition(frame), foresight.embed_text(["go"]), foresight.video_model.initial_noise([0]).clone()]


def before(params: Params, device: torch.device) -> dict[str, float]:
    """Milliseconds launch by launch: of `act` of one observation, of the U-Net's pass alone, and of generating the clip."""
    svam = untrained(params, device)
    foresight, observation, given = svam.foresight, svam.example(), _given(svam)
    act, one_step = _seconds(lambda: svam.act([observation]), CALLS), _seconds(lambda: foresight.one_step(*given), CALLS)
    # One pass a step, as before: no unconditional estimate, and features from the first step's own pass.
    plain: dict[str, Any] = {"guidance": 1.0, "guidance_last": None, "feature_time_ids": None}
    foresight.sampler = foresight.sampler.model_copy(update=plain)
    generation = _seconds(lambda: foresight.generate(*given), GENERATIONS)
    return {"act_ms": 1e3 * act, "one_step_ms": 1e3 * one_step, "generation_ms": 1e3 * generation}


def acting(svam: SVAM, device: torch.device, compiled: bool) -> dict[str, float]:
    """The policy made ready by `for_control`, and its `act` of one observation. peak_gb: the most that torch holds of the card
    while it acts, with the memory of the graphs, in which torch counts no tensors (`tensors_gb`); `ready_peak_gb`: tensors
    while it is made ready."""
    svam.to(torch.device("cpu"))  # from where a policy that is loaded comes
    forget(device)
    start = time.perf_counter()
    for_control(svam, device, compiled=compiled)
    ready, ready_peak, observation = time.perf_counter() - start, peak_gb(device), svam.example()
    forget(device)
    act = _seconds(lambda: svam.act([observation]), CALLS)
    held = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else 0.0
    return {
        "act_ms": 1e3 * act, "actions_per_second": svam.chunk / act, "peak_gb": held, "tensors_gb": peak_gb(device),
        "ready_s": ready, "ready_peak_gb": ready_peak,
    }  # fmt: skip


def control(params: Params, device: torch.device) -> dict[str, Any]:
    """`acting`, compiled; the U-Net's pass alone; and how far features and actions are from those in float32, "nan" where they
    are no numbers."""
    svam = untrained(params, device)
    foresight, observation, given = svam.foresight, svam.example(), _given(svam)
    sampler = foresight.sampler
    foresight.sampler = sampler.model_copy(update={"bf16": False})
    features, actions = svam.encode([observation]).entries, svam.act([observation])
    foresight.sampler = sampler
    found = acting(svam, device, compiled=True)
    fast = svam.encode([observation]).entries
    cosines = {entry: _said(_cosine(values, fast[entry])) for entry, values in features.items()}
    difference = _said(float(np.abs(svam.act([observation]) - actions).max()) / 2.0)
    return found | {"one_step_ms": _one_step_ms(svam, given), "cosines": cosines, "difference_of_range": difference}


def channels_last(params: Params, device: torch.device) -> dict[str, float]:
    """The U-Net's pass as in `control`, but the weights of its convolutions lie as kernels want them, channels last: whether
    laying them out anew at each pass costs anything."""
    svam = untrained(params, device)
    given = _given(svam)
    drop_unused(svam)
    if svam.config.sampler.bf16 and computes_bfloat16(device):
        to_bfloat16(svam)
    for layer in svam.foresight.video_model.unet.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return {"one_step_ms": _one_step_ms(svam, given)}


def _one_step_ms(svam: SVAM, given: list[Tensor]) -> float:
    """Of the U-Net's pass, compiled and recorded."""

    def one_step(*given: Tensor) -> list[Tensor]:
        return [svam.foresight.one_step(*given)]

    with torch.no_grad(), compiled_passes(svam):
        play = Graph(one_step, given) if given[0].device.type == "cuda" else one_step
    return 1e3 * _seconds(lambda: play(*given), CALLS)


def demonstrations(file: Path, overlay: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Seconds of the stages `collect` and `convert` with an overlay of the params, by a process for each core, from nothing.

    Raises:
        MachineError: a stage failed; its own last line.
    """
    cores, settings = len(os.sched_getaffinity(0)), scratch / "params.yaml"
    settings.write_text(
        with_values(file.read_text(encoding="utf-8"), {**overlay, "machine.workers": cores}, file), encoding="utf-8"
    )
    raw, store = scratch / "raw", scratch / "episodes.zarr"
    seconds = {}
    for stage, arguments in {"collect": [raw], "convert": [raw, store]}.items():
        command = [sys.executable, "-m", f"stages.{stage}", *map(str, arguments), "--params", str(settings)]
        start = time.perf_counter()
        # Finished episodes that an earlier run kept are not found.
        environment = os.environ | {"DVC_ROOT": str(scratch)}
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise MachineError(f"the stage {stage} failed: {(done.stderr.strip().splitlines() or ['it did not say why'])[-1]}")
        seconds[stage] = time.perf_counter() - start
    return {"seconds": sum(seconds.values()), "by_stage": seconds, "workers": cores}


def table(found: Mapping[str, Any]) -> str:
    """What `gpu` found, or nothing, as Markdown: the table of the benchmark's README, and the card's own rates."""
    rows, parts, card = (found.get(key, {}) for key in ("rows", "parts", "card"))
    header = ["", "before, H200", "must", "better", f"measured, {card}" if card else "measured"]
    header += ["TFLOP", "share of the matrix rate"] if card else []
    lines = []
    for key, row in ROWS.items():
        measured = _cell(rows[key], row.unit) if key in rows else "not run yet"
        if key in rows and row.beside:
            measured += f", at {_cell(parts[row.part][row.beside[0]], row.beside[1])}"
        lines.append([row.what, *(_cell(value, row.unit) for value in (row.before, row.must, row.better)), measured])
        if card:
            flops, share = parts.get("flops", {}).get(row.flops), found.get("shares", {}).get(row.flops)
            lines[-1] += ["" if flops is None else f"{flops / 1e12:.3g}", "" if share is None else f"{share:.0%}"]
    grid = markdown_table(header, lines)
    if not card:
        return grid
    own = parts.get("rates")
    said = f"{own['matrix_flops'] / 1e12:.0f} TFLOP/s and {own['copy_bytes'] / 1e12:.2f} TB/s" if own else "not run yet"
    return f"{grid}\n\nThe card's own rates, of bfloat16 matrix products and of copies (read and written): {said}."


def _cell(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _said(value: float) -> float | str:
    """JSON has no number for what is none."""
    return value if math.isfinite(value) else str(value)


def _cosine(a: Tensor, b: Tensor) -> float:
    """The mean over tokens."""
    return float(nn.functional.cosine_similarity(a.float().cpu(), b.float().cpu(), dim=-1).mean())


def _seconds(work: Callable[[], object], repeats: int) -> float:
    """The median of `repeats` calls after two that warm up; on a GPU until its work is done."""
    found = []
    for _ in range(2 + repeats):
        spent: dict[str, float] = {}
        with timed(spent, "work"):
            work()
        found.append(spent["work"])
    return float(np.median(found[2:]))
