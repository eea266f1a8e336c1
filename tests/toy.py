"""The pipeline at its smallest: real classes, real simulator, sizes and numbers of steps at which everything takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from ruamel.yaml import YAML
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from svam.files import read_yaml, write_json
from svam.models.layouts import DIFFUSERS, TRANSFORMERS, Layout
from svam.params import Optimiser, Params, load_params
from tests import ROOT

ADAM: dict[str, Any] = {
    "ema": 0.99, "bf16": False, "schedule": "cosine", "warmup": 1, "betas": [0.9, 0.999], "weight_decay": 0.01, "clip": 1.0,
    "accumulate": 1,
}  # fmt: skip
"""What tests leave as it is of a `training` section."""

TRAINING = {"steps": 6, "batch": 4, "learning_rate": 0.001, "warmup": 2, "ema": 0.5, "bf16": False}  # CPUs emulate bfloat16
TEACHER = {"image_size": 32, "patch": 8, "width": 32, "layers": 2, "heads": 2, "training": TRAINING}
OVERRIDES: dict[str, Any] = {
    "threads": 1, "machine": {"device": "cpu", "workers": 1, "cache_gb": 1.0},
    "collect": {
        "tasks": ["button-press-topdown", "reach"], "episodes": 3, "episodes_of": {"reach": 2}, "image_size": 32,
        "annotate_every": 8,
    },
    "convert": {"held_out": 0.34, "chunk_frames": 8, "shard_megabytes": 0.2},
    "prepare_backbones": {
        "autoencoder": {"latent_channels": 4, "channels": [32, 64, 64], "layers": [0, 1, 1], "training": TRAINING},
        "text": {"width": 32, "layers": 1, "heads": 2, "training": TRAINING}, "geometric": TEACHER, "semantic": TEACHER,
    },
    "encode": {"batch": 16},
    "finetune_video": {
        "frames": 4, "unet": {"channels": [32, 64], "layers": 1, "heads": [1, 2]}, "training": TRAINING, "evaluation_clips": 4,
    },
    "generate": {"windows": 8, "held_out_windows": 4, "grid": 4, "steps": 2, "batch": 4, "bf16": False},
    "cache_teacher": {"batch": 8},
    "distill": {"width": 32, "blocks": 1, "heads": 2, "training": TRAINING},
    "train_policy": {
        "observation_stride": 8, "encode_batch": 8, "encode_bf16": False, "training": TRAINING, "evaluate_every": 3,
        "perceiver": {"queries": 2, "width": 32, "depth": 1, "heads": 2},
        "transformer": {"width": 32, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "steps": 2},
    },
    "evaluate": {
        "batch": 2, "videos": 1, "offline": {"windows": 6, "samples": 2},
        "metaworld": {
            "tasks": ["button-press-topdown"], "episodes": 2, "held_out_instruction_episodes": 1, "max_steps": 16,
        },
    },
    "foresight": {"clips": 2, "dpi": 50, "resamples": 1000}, "report": {"clips": 2},
}  # fmt: skip
NAMED = ("episodes_of", "options")
"""Mappings that the params call by names of their own: changes replace them whole."""


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, section by section, but for what is `NAMED`."""
    result = dict(base)
    for key, value in changes.items():
        inner = isinstance(value, dict) and isinstance(base.get(key), dict) and key not in NAMED
        result[key] = merged(base[key], value) if inner else value
    return result


def optimiser(**values: Any) -> Optimiser:
    """A `training` section of these values, and of `ADAM` for the rest."""
    return Optimiser.model_validate(ADAM | values)


def committed(key: str, **changes: Any) -> dict[str, Any]:
    """A section of the project's params by its dotted key, with changes."""
    values = read_yaml(ROOT / "params.yaml")
    for part in key.split("."):
        values = values[part]
    return merged(values, changes)


def write_toy_params(out: Path, changes: dict[str, Any] | None = None, source: Path = ROOT / "params.yaml") -> Params:
    """Write the params of `source`, made small (and with further `changes`), to `out`; return them, checked."""
    values = merged(read_yaml(source), OVERRIDES)
    YAML(typ="safe", pure=True).dump(merged(values, changes or {}), out)
    return load_params(out)


def lay_out(folder: Path, layout: Layout) -> Path:
    """The files of published weights, with no tensor in them, in a new folder."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {layout.field: layout.kinds[0]} if layout.kinds else {"model_name": "da3-large"})
    name = DIFFUSERS if layout.field == "_class_name" else TRANSFORMERS
    save_file({}, folder / f"{name}.safetensors")
    if layout.tokenizer:
        write_json(folder / "tokenizer.json", {})
    return folder


def spoil(file: Path, new: dict[str, Any] | str | None) -> None:
    """Write JSON into a file, give it another name, or remove it."""
    if isinstance(new, dict):
        write_json(file, new)
    elif new is not None:
        file.rename(file.with_name(new))
    else:
        file.unlink()


def invoke(app: typer.Typer, *arguments: object) -> Result:
    """A command, called in this process; an error that is no user's is raised."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
