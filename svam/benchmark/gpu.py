"""What a GPU does with published sizes, untrained: control in real time, trainings, and a data set recorded on its host.

Absolute figures, unlike those of the other parts, so each stands beside the card's own rates of matrix products and of copies,
measured in the same run, and where arithmetic bounds it beside the share of that bound.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from svam.benchmark.timing import Inputs
from svam.benchmark.training import FEW, finetuning, forget, peak_gb, policy
from svam.console import console
from svam.device import prepare_torch
from svam.errors import MachineError, SvamError
from svam.models.control import Graph, compiled_passes, for_control
from svam.models.foresight import ForesightModel
from svam.models.svam import SVAM
from svam.models.text import TextEncoder
from svam.models.timing import timed
from svam.params import Params
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
BUDGET, PATIENCE = 400.0, 240.0
"""Seconds after which no part is begun, so that what was measured is written within eight minutes or so; and for which a stage
is waited for, whose renderer may hang."""


class Row(NamedTuple):
    """A line of the table: a figure of a part. before: on an H200, launch by launch; must, better: what is aimed at."""

    part: str
    figure: str
    what: str
    unit: str
    before: float | None
    must: float
    better: float | None


ROWS = {
    "act": Row("control", "act_ms", "`act` at published sizes, one observation", "ms", 131.6, 40, 25),
    "one_step": Row("control", "one_step_ms", "the one-step U-Net pass in it", "ms", 53.3, 15, 9),
    "generations": Row(
        "control", "generations", "generating the same clip in 30 steps without guidance, launch by launch, against `act`",
        "times", 22, 70, 110,
    ),
    "memory": Row("control", "peak_gb", "peak memory of `act`", "GB", 9.8, 7, 5),
    "rate": Row("control", "actions_per_second", "control, chunks of 8", "Hz", 61, 200, 320),
    "finetuning": Row(
        "finetuning", "per_second", "fine-tuning SVD's U-Net, 16 frames of 256 px, batch 4", "clips/s", 11.3, 18, 25
    ),
    "finetuning_memory": Row(
        "lean_finetuning", "peak_gb", "its peak memory, layers computed twice and the average on the host", "GB", 70, 44, 36
    ),
    "adapters_memory": Row(
        "adapters", "peak_gb", "its peak memory, adapters of rank 16 and layers computed twice", "GB", None, 22, None
    ),
    "small_finetuning": Row(
        "small_finetuning", "per_second", "training a U-Net of 20 M parameters, 8 frames of 128 px, batch 32", "clips/s",
        347, 900, 1500,
    ),
    "policy": Row("policy", "ratio", "training the policy on features that are there, compiled against not", "times", 1, 2, 4),
    "demonstrations": Row(
        "demonstrations", "seconds", "50 x 50 demonstrations at 128 px, recorded and converted on 16 cores", "s", None, 150, 75
    ),
}  # fmt: skip


def gpu(inputs: Inputs, params: Params) -> dict[str, Any]:
    """All rows on the GPU that is here, by the presets of the params in the current folder. A row that fails says why under
    `failed`, and the others are measured all the same.

    Raises:
        MachineError: there is no GPU.
        ParamsError: the presets do not fit params.yaml.
    """
    if not torch.cuda.is_available():
        raise MachineError(f"the part gpu needs a CUDA GPU, and torch {torch.__version__} sees none")
    device = prepare_torch("cuda", params.threads, params.seed)
    small = overlay_of(SMALL) | {"collect.episodes": EPISODES}
    return measure(Path("params.yaml"), overlay_of(PUBLISHED), small, device, inputs.scratch)


def measure(
    file: Path, published: Mapping[str, Any], small: Mapping[str, Any], device: torch.device, scratch: Path
) -> dict[str, Any]:
    """All rows by two overlays of a params file. `rows`: by the names of `ROWS`; `seconds`: what each part took, warming up and
    compiling included."""
    begun, name = time.perf_counter(), torch.cuda.get_device_name() if device.type == "cuda" else "none"
    found: dict[str, Any] = {"card": name, **rates(device), "rows": {}, "failed": {}, "parts": {}, "seconds": {}}
    sizes, few = with_overlay(published, file, PUBLISHED)[0], with_overlay(small, file, SMALL)[0]
    counted, few_counted = (Models(params, estimated(params, None, None)) for params in (sizes, few))
    averaging = with_overlay({**published, "finetune_video.training.ema": DECAY}, file, PUBLISHED)[0]
    # The preset computes layers twice, which clips a second before were measured without.
    fast = sizes.machine.model_copy(update={"compile": True, "checkpointing": False})
    # Memory alone is read of these, which is not worth the minutes that compiling them takes.
    lean = fast.model_copy(update={"compile": False, "checkpointing": True, "average": "host"})

    def shared(rate: dict[str, float], models: Models, name: str) -> dict[str, float]:
        """With the FLOPs of a sample, and the share of the time that it would take at `matrix_flops`."""
        flops = models.flops[name]
        return rate | {"flops": flops, "share_of_matrix_rate": rate["per_second"] * flops / found["matrix_flops"]}

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "control": lambda: control(sizes, device, counted.flops, found["matrix_flops"]),
        "lean_finetuning": lambda: finetuning(averaging, device, lean, None, FEW),
        "adapters": lambda: finetuning(sizes, device, lean, RANK, FEW),
        "policy": lambda: shared(policy(sizes, device, fast), counted, "train_policy"),
        "finetuning": lambda: shared(finetuning(sizes, device, fast), counted, "train_unet"),
        "small_finetuning": lambda: shared(finetuning(few, device, fast), few_counted, "train_unet"),
        "demonstrations": lambda: demonstrations(file, small, scratch),
    }
    for part, work in parts.items():
        start = time.perf_counter()
        try:
            if start - begun > BUDGET:
                raise MachineError(f"not begun: the parts before took more than {BUDGET:g} s")
            found["parts"][part] = work()
            found["rows"] |= {key: found["parts"][part][row.figure] for key, row in ROWS.items() if row.part == part}
        except Exception as error:  # compilers raise of all kinds, and what else was measured is worth more
            mendable = isinstance(error, SvamError)
            if not mendable:
                console.print_exception(max_frames=8)
            found["failed"][part] = " ".join(f"{'' if mendable else type(error).__name__ + ': '}{error}".split())[:500]
        finally:
            torch._dynamo.reset()  # compiled code keeps tensors
            forget(device)
        found["seconds"][part] = round(time.perf_counter() - start, 1)
        said = found["failed"].get(part) or found["parts"][part]
        console.print(f"{part}, {found['seconds'][part]:.0f} s: {said}", markup=False, soft_wrap=True)
    return found


def rates(device: torch.device) -> dict[str, float]:
    """FLOP/s of a large bfloat16 matrix product, and bytes a second, read and written, of a large copy."""
    side, times = (8192, 20) if device.type == "cuda" else (256, 1)
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    source = torch.zeros(4 * side**2, device=device)
    target = torch.empty_like(source)
    product = _seconds(lambda: [matrix @ matrix for _ in range(times)], 3) / times
    copied = _seconds(lambda: [target.copy_(source) for _ in range(times)], 3) / times
    return {"matrix_flops": 2 * side**3 / product, "copy_bytes": 2 * source.nbytes / copied}


def untrained(models: Models) -> SVAM:
    """The S-VAM that the models make, its gates open as training opens them, so that every part shows in the actions."""
    tokens, projection = models.params.prepare_backbones.text.tokens, getattr(models.text, "text_projection", None)
    clip, weight = (models.text, None) if projection is None else (models.text.text_model, projection.weight.detach())
    text = TextEncoder(clip, train_tokenizer(["go"], 1024), tokens, weight)
    foresight = ForesightModel(text, models.sampler, models.autoencoder, models.video, models.teachers, models.decouplers)
    for module in models.policy.diffusion.decoder:
        nn.init.normal_(module.modulation.weight, std=0.02)  # type: ignore[union-attr, arg-type]
    return SVAM(models.policy.config, models.statistics, foresight, models.policy)


def control(params: Params, device: torch.device, counted: Mapping[str, int], matrix_flops: float) -> dict[str, Any]:
    """`act` of one observation launch by launch and as `for_control` makes it, the U-Net's pass alone, generating the clip
    instead; and how far features and actions are from those in float32. FLOPs are those that `Models` counted; a share is that
    of the time which they would take at `matrix_flops`."""
    models = Models(params, estimated(params, None, None), device.type)
    svam = untrained(models)
    foresight, observation = svam.foresight, svam.example()
    frame = torch.from_numpy(observation.frames[svam.cameras[0]])[None]
    given = [foresight.condition(frame), foresight.embed_text(["go"]), foresight.video_model.initial_noise([0]).clone()]
    eager = _seconds(lambda: svam.act([observation]), CALLS)
    eager_pass = _seconds(lambda: foresight.one_step(*given), CALLS)
    # One pass a step, as before: no unconditional estimate, and features from the first step's own pass.
    plain: dict[str, Any] = {"guidance": 1.0, "guidance_last": None, "feature_time_ids": None}
    foresight.sampler = models.sampler.model_copy(update=plain)
    generation = _seconds(lambda: foresight.generate(*given), GENERATIONS)
    foresight.sampler = models.sampler.model_copy(update={"bf16": False})
    features, actions = svam.encode([observation]).entries, svam.act([observation])
    foresight.sampler = models.sampler

    svam.to(torch.device("cpu"))  # from where a policy that is loaded comes
    forget(device)
    start = time.perf_counter()
    for_control(svam, device)
    ready = time.perf_counter() - start
    act = _seconds(lambda: svam.act([observation]), CALLS)
    peak, held = peak_gb(device), torch.cuda.memory_reserved() / 1e9 if device.type == "cuda" else 0.0
    fast = svam.encode([observation]).entries
    cosines = {entry: _cosine(values, fast[entry]) for entry, values in features.items()}
    difference = float(np.abs(svam.act([observation]) - actions).max()) / 2.0

    def one_step(*given: Tensor) -> list[Tensor]:
        return [foresight.one_step(*given)]

    with torch.no_grad(), compiled_passes(svam):
        play = Graph(one_step, given) if device.type == "cuda" else one_step
    one = _seconds(lambda: play(*given), CALLS)
    steps = params.train_policy.transformer.steps
    total = sum(
        count * (steps if name == "denoise" else 1)
        for name, count in counted.items()
        if name in ("encode", "one_step", "context", "denoise") or name.startswith(("teacher_", "decoupler_"))
    )
    return {
        "act_ms": 1e3 * act, "one_step_ms": 1e3 * one, "generations": generation / act, "peak_gb": peak,
        "held_gb": held, "actions_per_second": svam.chunk / act, "ready_s": ready,
        "before_ms": {"act": 1e3 * eager, "one_step": 1e3 * eager_pass, "generation": 1e3 * generation},
        "cosines": cosines, "difference_of_range": difference,
        "flops": {"act": total, "one_step": counted["one_step"]},
        "share_of_matrix_rate": {"act": total / matrix_flops / act, "one_step": counted["one_step"] / matrix_flops / one},
    }  # fmt: skip


def demonstrations(file: Path, overlay: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Seconds of the stages `collect` and `convert` with an overlay of the params, by a process for each core, from nothing.

    Raises:
        MachineError: a stage failed; its own last line.
    """
    cores, settings = os.cpu_count() or 1, scratch / "params.yaml"
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
        try:
            done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise MachineError(f"the stage {stage} took more than {PATIENCE:g} s") from None
        if done.returncode:
            raise MachineError(f"the stage {stage} failed: {(done.stderr.strip().splitlines() or ['it did not say why'])[-1]}")
        seconds[stage] = time.perf_counter() - start
    return {"seconds": sum(seconds.values()), "by_stage": seconds, "workers": cores}


def table(found: Mapping[str, Any]) -> str:
    """What `gpu` found, or nothing, as Markdown: the table of the benchmark's README."""
    header = ["", "before, H200", "must", "better", f"measured, {found['card']}" if "card" in found else "measured"]
    lines = []
    for key, row in ROWS.items():
        measured = _cell(found.get("rows", {}).get(key), row.unit) if key in found.get("rows", {}) else "not run yet"
        lines.append([row.what, *(_cell(value, row.unit) for value in (row.before, row.must, row.better)), measured])
    return markdown_table(header, lines)


def _cell(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


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
