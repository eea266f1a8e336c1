"""The presets' recipes run with their choices at a reduced width, trainings for two steps each: prepare_backbones, encode,
finetune_video, generate, cache_teacher, distill, train_policy, evaluate (offline alone) and foresight. Not collect and convert,
of which only the keys are checked, since all have the same small store; nor report and benchmark."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from svam.episodes.joined import open_store
from svam.files import read_json
from svam.models.svam import SVAM
from svam.params import load_params
from svam.presets.overlay import overlay_of, preset_names, with_overlay
from tests.presets.weights import TEACHER, write_weights
from tests.tiny import observations
from tests.toy import committed, invoke, write_toy_params

PROCESSES = ("machine.launch", "machine.processes")
"""Keys that start processes, which a stage called in a test does not."""
BACKBONES = ("autoencoder", "text", "geometric", "semantic")
TWO = {"steps": 2, "warmup": 1, "batch": 2}
AT_MOST = {"warmup": 1, "accumulate": 2}
"""Of a `training` section, where a preset has the key; a smaller value stays."""
REDUCED: dict[str, Any] = {
    "finetune_video.frames": 3, "finetune_video.stride_seconds": 0.1, "finetune_video.show_every": 1,
    "finetune_video.evaluation_clips": 2, "finetune_video.evaluation_steps": 2,
    "generate.windows": 4, "generate.held_out_windows": 2, "generate.grid": 2, "generate.steps": 2, "generate.batch": 2,
    "cache_teacher.batch": 4, "distill.width": 16, "distill.blocks": 1, "distill.heads": 2,
    "train_policy.encode_batch": 2, "train_policy.observation_stride": 6, "train_policy.evaluate_every": 2,
    "train_policy.evaluation_observations": 4, "train_policy.perceiver.queries": 2, "train_policy.perceiver.width": 16,
    "train_policy.perceiver.depth": 1, "train_policy.perceiver.heads": 2, "train_policy.transformer.width": 16,
    "train_policy.transformer.encoder_layers": 1, "train_policy.transformer.decoder_layers": 1,
    "train_policy.transformer.heads": 2, "train_policy.transformer.steps": 2,
    "evaluate.protocols": ["offline"], "evaluate.batch": 2, "evaluate.offline.windows": 2, "evaluate.offline.samples": 1,
    "foresight.clips": 1, "foresight.dpi": 50, "foresight.probe_frames": 20, "foresight.resamples": 1000,
    **{f"prepare_backbones.{branch}.{k}": 2 for branch in ("geometric", "semantic") for k in ("layers", "heads")},
    **{f"prepare_backbones.{branch}.width": 16 for branch in ("geometric", "semantic")},
    **{
        f"{section}.training.{k}": value
        for section in ("finetune_video", "distill", "train_policy", *(f"prepare_backbones.{part}" for part in BACKBONES))
        for k, value in TWO.items()
    },
}  # fmt: skip
NARROW = {
    "finetune_video.unet.channels": [32, 64], "finetune_video.unet.heads": [1, 2], "train_policy.perceiver.head_width": 12,
    "train_policy.perceiver.embedding": 20,
}  # fmt: skip
"""In place of what a preset chooses, where it does."""
APART = ("paper-calvin", "mt50-gpu", "calvin-small")
"""Presets that differ here; the recipe of another is one of these, or the default, but for numbers that are reduced, and the
chunk."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in APART else pytest.mark.slow) for n in preset_names()])
def test_the_recipe_runs(name: str, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From backbones, trained here or imported from where the preset says published ones lie, to a policy that acts and is
    measured, and to what its foresight holds."""
    monkeypatch.chdir(tmp_path)
    write_toy_params(Path("params.yaml"))
    recipe = {key: value for key, value in overlay_of(name).items() if key not in PROCESSES}
    published = recipe.get("prepare_backbones.text.source") == "pretrained"
    reduced = recipe | REDUCED | {key: value for key, value in NARROW.items() if key in recipe}
    last = {key: key.rpartition(".")[2] for key in recipe}
    reduced |= {key: min(recipe[key], AT_MOST[part]) for key, part in last.items() if part in AT_MOST}
    if published:
        reduced |= {f"prepare_backbones.{branch}.image_size": TEACHER for branch in ("geometric", "semantic")}
        episodes_of = open_store(parts / "episodes.zarr")
        sentences = [sentence for task in episodes_of.tasks for sentence in episodes_of.instructions[task]["train"]]
        write_weights(Path("weights"), sentences, committed("prepare_backbones.text")["tokens"])
    _, text = with_overlay(reduced, Path("params.yaml"), name)
    Path("params.yaml").write_text(text, encoding="utf-8")

    folder = Path("backbones")
    episodes, backbones, video = ("--episodes", parts / "episodes.zarr"), ("--backbones", folder), "video"
    latents, generated = ("--latents", "latents"), ("--generated", "generated")

    def run(stage: str, *arguments: object) -> None:
        done = invoke(import_module(f"stages.{stage}").app, *arguments)
        assert done.exit_code == 0, f"{stage}: {done.output}"

    autoencoder = ("--autoencoder", folder / "autoencoder")
    for part in BACKBONES:
        run("prepare_backbones", part, folder / part, *episodes, *(() if part == "autoencoder" else autoencoder))
        assert set(Path(folder / part).glob("*.safetensors"))
        assert bool(read_json(folder / part / "metrics.json")) != published, "of imported weights nothing is measured"
    run("encode", "latents", *episodes, *autoencoder)
    run("finetune_video", video, *episodes, *latents, *backbones, "--live", "live/video")
    assert sorted(file.name for file in Path("live/video/clips").iterdir()) == ["0000001.png", "0000002.png"]
    run("generate", "generated", *episodes, *latents, *backbones, "--video", video)
    for branch in ("geometric", "semantic"):
        run("cache_teacher", branch, f"teachers/{branch}", *generated, *episodes, *backbones)
        teacher = ("--teacher", f"teachers/{branch}")
        run("distill", branch, f"decouplers/{branch}", *generated, *teacher, *backbones, "--video", video)
    models = (*backbones, "--video", video, "--decouplers", "decouplers")
    run("train_policy", "svam", *episodes, *models, "--cache", "cache")

    run("evaluate", "evaluation", *episodes, "--model", "svam")
    assert read_json(Path("evaluation/metrics.json"))["offline"]
    run("foresight", "foresight", *episodes, *generated, *models, "--policy", "svam")
    assert read_json(Path("foresight/metrics.json"))["gap"]

    svam, params = SVAM.load(Path("svam")), load_params(Path("params.yaml"))
    chosen, policy, config = params.finetune_video, params.train_policy, svam.foresight.video_model.config
    assert (config.dropped, config.noise, config.sigma_max) == (chosen.dropped, chosen.noise, chosen.sigma_max)
    assert svam.config.sampler.guidance_last == params.generate.guidance_last
    assert svam.config.text[0] == (1 if policy.sentence == "pooled" else svam.foresight.text.tokens)
    if name.startswith("paper"):
        assert (config.dropped, config.noise, config.sigma_max, svam.config.sampler.guidance_last, policy.sentence) == (
            "text", "fresh", 700.0, 3.0, "pooled",
        )  # fmt: skip
        for loop in (chosen.training, policy.training):
            assert (loop.accumulate, loop.schedule, loop.warmup, loop.ema) == (2, "constant", 0, 0.0)
    seen = observations(open_store(parts / "episodes.zarr"), 2, policy.proprioception)
    assert svam.act(seen).shape == (2, policy.chunk, 3)
