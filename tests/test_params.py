"""A wrong param is reported by its key, its value and what is accepted, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from stages.check_params import app
from svam import agreement
from svam.agreement import check_agreement, lacking, notes
from svam.console import console
from svam.contract import Choice
from svam.device import prepare_torch
from svam.episodes.instructions import described_tasks
from svam.errors import OF_PATTERN, MachineError, ParamsError
from svam.files import read_yaml
from svam.models import layouts
from svam.params import Params, load_params
from svam.sources import raw
from tests import ROOT
from tests.toy import invoke, lay_out, spoil

YAML_12 = YAML(typ="safe", pure=True)


def write(folder: Path, changes: dict[str, Any]) -> Path:
    """The committed params with some keys (dotted) set, created if need be."""
    params = read_yaml(ROOT / "params.yaml")
    for key, value in changes.items():
        *path, last = key.split(".")
        section = params
        for part in path:
            section = section[part]
        section[last] = value
    file = folder / "params.yaml"
    YAML_12.dump(params, file)
    return file


def test_the_committed_params_are_valid_and_complete() -> None:
    params = load_params(ROOT / "params.yaml")
    assert params.collect.episodes_for("reach") == 300
    assert params.collect.episodes_for("drawer-open") == 40


@pytest.mark.parametrize("key, value, said", [
    ("seed", -1, ["seed is -1", "at least 0"]),
    ("seed", "zero", ["seed is 'zero'; expected a whole number"]),
    ("machine.launch", "srun 'all", ["machine.launch: is \"srun 'all\"", "of a command line: No closing quotation"]),
    ("machine.launch", " ", ["machine.launch: is ' '", "of a command line: it is empty"]),
    ("machine.device", "CUDA", ["machine.device is 'CUDA'; expected 'auto', 'cpu' or 'cuda'; did you mean 'cuda'?"]),
    ("collect.episodes", True, ["collect.episodes is true; expected a whole number"]),
    ("generate.bf16", 1, ["generate.bf16 is 1; expected true or false"]),
    ("collect.tasks", "reach", ["collect.tasks is 'reach'; expected a list, such as [a, b]"]),
    ("collect.tasks", ["reach", "reach"], ["collect", "['reach']", "more than once"]),
    ("collect.tasks", ["../up"], ["collect.tasks.0 is '../up'; expected a name of letters, digits"]),
    ("collect.scenes", "mine", ["collect.scenes is 'mine'", "'stock' or 'shared'"]),
    ("collect.styles", ["left", "left"], ["collect.styles", "['left']", "more than once"]),
    ("collect.looks", ["A", "A"], ["collect", "['A']", "more than once"]),
    ("collect.looks", [], ["collect.looks"]),
    ("collect.unlabelled", ["D"], ["collect: unlabelled names ['D'], which looks ['stock'] does not list"]),
    ("collect.unlabelled", ["stock"], ["collect: unlabelled names all of looks ['stock'], which leaves a policy nothing"]),
    ("collect.noisy_share", 1.5, ["collect.noisy_share is 1.5; expected at most 1"]),
    ("collect.episodes_of", {"soccer": 3}, ["episodes_of", "['soccer']"]),
    ("convert.held_out", 0.0, ["convert.held_out is 0.0; expected more than 0"]),
    ("convert.instruction", " ", ["convert.instruction is ' '; expected a sentence"]),
    ("convert.columns.actions", ["velocity"], ["convert.columns.actions.0 is 'velocity'; expected a vector, one", "[0:6]"]),
    ("convert.shard_megabytes", 65, ["convert.shard_megabytes is 65; expected at most 64"]),
    ("convert.revision", "main", ["convert.revision is 'main'; expected a whole commit, 40 of the digits 0-9 and a-f"]),
    ("evaluate.remote.url", "host:80", ["evaluate.remote.url is 'host:80'; expected an address such as ws://localhost:8000"]),
    ("convert.episodes", [0, 1.5], ["convert.episodes.1 is 1.5; expected a whole number or a text"]),
    ("convert.rate_hz", "5", ["convert.rate_hz is '5'; expected a number"]),
    ("convert.cameras", None, ["convert.cameras is null; expected a list"]),
    ("convert.options", "x", ["convert.options is 'x'; expected keys and values, such as {a: 1}"]),
    ("prepare_backbones.geometric.source", "pretrained", ["prepare_backbones.geometric", "path"]),
    ("prepare_backbones.semantic.patch", 7, ["image_size (64)", "patch (7)"]),
    ("prepare_backbones.semantic.family", "clip", ["family 'clip' is not trained in-domain", "source to 'pretrained'"]),
    ("prepare_backbones.semantic.stage", "first", ["stage is 'first'", "family 'dinov2_registers'", "set stage to 'last'"]),
    ("prepare_backbones.autoencoder.layers", [0, 1], ["layers [0, 1]", "same length"]),
    ("finetune_video.unet.channels", [64, 100], ["finetune_video.unet.channels.1 is 100", "32"]),
    ("finetune_video.unet.heads", [2, 3], ["channels [64, 128]", "heads [2, 3]"]),
    ("finetune_video.lora_rank", 8, ["lora_rank is 8", "unet.pretrained is null", "set lora_rank to null"]),
    ("finetune_video.sigma_min", 90.0, ["sigma_min (90.0)", "sigma_max (80.0)"]),
    ("finetune_video.training.warmup", 10**6, ["warmup (1000000)", "steps ("]),
    ("finetune_video.training.steps", 0, ["training.steps is 0", "unet.pretrained is null"]),
    ("distill.training.steps", 0, ["distill.training.steps is 0; expected at least 1"]),
    ("generate.feature_time_ids", [4.0, 127.0], ["generate.feature_time_ids is [4.0, 127.0]; expected a list of at least 3"]),
    ("generate.guidance_last", 0.5, ["generate.guidance_last is 0.5; expected at least 1"]),
    ("train_policy.transformer.mlp_dropout", 1.0, ["train_policy.transformer.mlp_dropout is 1.0; expected less than 1"]),
    ("finetune_video.training.learning_rate", float("nan"), ["finetune_video.training.learning_rate", "nan"]),
    ("distill.heads", 7, ["width (", "heads (7)"]),
    ("train_policy.features", "disk", ["train_policy.features is 'disk'; expected 'cached' or 'computed'"]),
    ("train_policy.context", ["motion"], ["train_policy.context.0 is 'motion'", "one_step"]),
    ("report.colour", "red", ["unknown key 'report.colour'", "'red'"]),
    ("evaluation", {"episodes": 5}, ["unknown key 'evaluation'"]),
])  # fmt: skip
def test_an_error_names_key_value_and_what_is_accepted(tmp_path: Path, key: str, value: Any, said: list[str]) -> None:
    file = write(tmp_path, {key: value})
    with pytest.raises(ParamsError) as caught:
        load_params(file)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in [str(file), *said]), message


def patterns(schema: Any) -> set[str]:
    """Those that texts must match, in a JSON schema."""
    if isinstance(schema, list):
        return set().union(*map(patterns, schema))
    if not isinstance(schema, dict):
        return set()
    own = {schema["pattern"]} if isinstance(schema.get("pattern"), str) else set()
    return own.union(*map(patterns, schema.values()))


def test_a_person_is_told_words_and_no_pattern() -> None:
    found = patterns([Params.model_json_schema(), Choice.model_json_schema(), raw._Meta.model_json_schema()])
    assert found == set(OF_PATTERN)


def check_knobs(section: type[BaseModel], written: Any, prefix: str = "") -> None:
    """Each field, those of sections within included, is in the file and has no default."""
    for name, field in section.model_fields.items():
        assert name in written, f"params.yaml lacks {prefix}{name}"
        assert field.is_required(), f"{prefix}{name} has a default"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            check_knobs(field.annotation, written[name], f"{prefix}{name}.")


def test_every_knob_is_written_out() -> None:
    """A default in the code would decide numbers that DVC does not see, and `-S` refuses keys that the file lacks."""
    check_knobs(Params, read_yaml(ROOT / "params.yaml"))


OFFLINE: dict[str, Any] = {"evaluate.protocols": ["offline"]}


def looks_of(*sets: tuple[str, bool, list[str]]) -> dict[str, Any]:
    """Looks A and D, the second without actions; sets by name, whether the policy learns from them, and looks."""
    named = [{"name": n, "weight": 1.0, "policy": p, "convert": {"options": {"looks": looks}}} for n, p, looks in sets]
    return {"collect.looks": ["A", "D"], "collect.unlabelled": ["D"], "convert.sets": named}


AGREEMENT: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    (looks_of(("metaworld", True, ["A"]), ("video", False, ["D"])), []),
    (looks_of(), ["convert: looks ['A', 'D'] are read, of which collect.unlabelled ['D'] have no actions: make these a set"]),
    (looks_of(("metaworld", True, ["A"]), ("video", True, ["D"])), ["convert.sets, video: looks ['D'] are read, of which"]),
    (looks_of(("metaworld", True, ["A"]), ("video", False, [])), ["convert.sets, video: looks ['A', 'D'] are read, of"]),
    (looks_of(("metaworld", True, ["B"])), ["convert.sets, metaworld: options.looks names ['B'], which collect.looks"]),
    ({"distill.branches": ["geometric"]}, ["train_policy.context asks for ['semantic']", "distill.branches ['geometric']"]),
    ({"train_policy.context": ["recorded"]}, ["context has 'recorded'", "evaluate.protocols is ['metaworld', 'offline']"]),
    ({"train_policy.context": ["recorded"], **OFFLINE}, []),
    ({"machine.processes": 8}, ["machine.processes is 8", "machine.launch is 'local'"]),
    ({"machine.processes": 8, "machine.launch": "torchrun", "machine.shard": True}, []),
    ({"machine.shard": True, "machine.compile": True}, ["machine.shard is true", "machine.compile is true", "to false"]),
    ({"machine.shard": True, "finetune_video.moments": "int8"}, ['moments is "int8"', 'set it to "float32"']),
    ({"evaluate.execute": 9}, ["evaluate.execute (9)", "train_policy.chunk (8)"]),
    ({"generate.up_blocks": 3}, ["generate.up_blocks is 3", "finetune_video.unet.channels [64, 128]"]),
    ({"generate.up_blocks": 3, "finetune_video.unet.pretrained": "folder"}, []),
    ({"finetune_video.training.steps": 0, "finetune_video.unet.pretrained": "folder"}, []),
    ({"train_policy.feature_draws": 4}, ["train_policy.feature_draws is 4", "finetune_video.noise is fixed"]),
    ({"train_policy.feature_draws": 4, "finetune_video.noise": "fresh"}, []),
    ({"collect.image_size": 60}, ["collect.image_size is 60x60", "multiple of 8", "prepare_backbones.autoencoder.channels"]),
    ({"collect.image_size": 72}, ["collect.image_size is 72x72", "multiple of 16", "finetune_video.unet.channels"]),
    ({"convert.source": "raw", "convert.image_size": [60, 64]}, ["convert.image_size is 60x64", "multiple of 8"]),
    ({"generate.grid": 9}, ["generate.grid is 9", "8x8", "collect.image_size"]),
    ({"convert.image_size": [32, 32], "generate.grid": 4},
     ["convert.image_size is [32, 32]", "collect.image_size (now 64)", "to null"]),
    ({"convert.image_size": [32, 32], "generate.grid": 4, **OFFLINE}, []),
    ({"evaluate.metaworld.episodes": 5},
     ["evaluate.metaworld.held_out_instruction_episodes (10)", "evaluate.metaworld.episodes (5)"]),
    ({"evaluate.metaworld.episodes": 5, **OFFLINE}, []),
    ({"finetune_video.stride_seconds": 0.06}, ["finetune_video.stride_seconds is 0.06 s", "80 Hz", "0.05 or 0.0625"]),
    ({"finetune_video.stride_seconds": 0.06, "convert.source": "raw", "collect.tasks": [], **OFFLINE}, []),
    ({"evaluate.metaworld.tasks": ["raech"]}, ["evaluate.metaworld.tasks names 'raech'", "did you mean", "reach"]),
    ({"collect.tasks": ["reach-v3"], "collect.episodes_of": {}}, ["collect.tasks names 'reach-v3'", "did you mean"]),
    ({"evaluate.metaworld.tasks": ["reach", "soccer"]},
     ["evaluate.metaworld.tasks names ['soccer']", "collect.tasks ['reach', "]),
    ({"convert.options": {"tasks": ["reach"]}, "evaluate.metaworld.tasks": ["drawer-open"]},
     ["evaluate.metaworld.tasks names ['drawer-open']"]),
    ({"convert.options": {"tasks": ["reach"]}, "evaluate.metaworld.tasks": ["reach"]}, []),
    ({"convert.tasks": ["reach"]},
     ["evaluate.metaworld.tasks names ['button-press", "of which convert.tasks ['reach'] has no"]),
    ({"evaluate.protocols": ["calvin"]}, ["evaluate.calvin.path is null", "git clone"]),
    ({"evaluate.calvin.path": "/nowhere"}, []),
    ({"convert.sets": [{"name": "ours", "weight": 1.0, "policy": True, "convert": {}}]},
     ["evaluate.protocols has metaworld, but the sets", "are ['ours']: name 'metaworld' the one that"]),
    ({"convert.sets": [{"name": "metaworld", "weight": 1.0, "policy": True, "convert": {}}]}, []),
    ({"evaluate.metaworld.tasks": []}, ["evaluate.protocols has metaworld", "evaluate.metaworld.tasks is []"]),
    ({"collect.tasks": [], **OFFLINE}, ["convert.source is metaworld", "collect.tasks is []"]),
    (dict.fromkeys(("collect.tasks", "evaluate.metaworld.tasks"), described_tasks()), []),
]  # fmt: skip
"""Params, and what is said where they contradict one another."""


@pytest.mark.parametrize(("changes", "said"), AGREEMENT, ids=lambda value: str(value)[:60])
def test_sections_that_contradict_one_another_are_one_sentence(
    changes: dict[str, Any], said: list[str], tmp_path: Path
) -> None:
    params, message = load_params(write(tmp_path, changes)), ""
    try:
        check_agreement(params)
    except ParamsError as error:
        message = str(error)
    assert bool(message) == bool(said) and "\n" not in message
    assert all(part in message for part in said), message


def test_each_contradiction_gets_a_line(tmp_path: Path) -> None:
    with pytest.raises(ParamsError) as caught:
        check_agreement(load_params(write(tmp_path, {"evaluate.execute": 9, "evaluate.metaworld.episodes": 5})))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("key, changes, said", [
    ("sigma_max", {}, []),
    ("sigma_max", {"finetune_video.sigma_max": 20.0}, ["sigma_max is 20", "6 x 8 x 8 x 32", "About 80"]),
    ("sigma_max", {"finetune_video.frames": 8, "collect.image_size": 128},
     ["sigma_max is 80", "8 x 16 x 16 x 32", "About 185"]),
    ("sigma_max", {"finetune_video.frames": 8, "collect.image_size": 128, "finetune_video.sigma_max": 440.0}, []),
    ("collect.tail", {}, ["collect.tail is 5, but a clip looks 25 steps ahead", "A tail of 25 records them"]),
    ("collect.tail", {"finetune_video.frames": 8, "collect.tail": 34}, ["collect.tail is 34", "looks 35 steps ahead"]),
    ("collect.tail", {"finetune_video.frames": 8, "collect.tail": 35}, []),
    ("collect.tail", {"convert.source": "raw", "collect.tasks": [], **OFFLINE}, []),
])  # fmt: skip
def test_what_may_be_a_mistake_is_noted(key: str, changes: dict[str, Any], said: list[str], tmp_path: Path) -> None:
    """A first noise level that hides too little, and a tail shorter than a clip looks ahead."""
    lines = [line for line in notes(load_params(write(tmp_path, changes))) if key in line]
    assert len(lines) == bool(said)
    assert all(part in line for line in lines for part in said), lines


@pytest.mark.parametrize("key, value, said", [
    ("distill.width", "wide", ["distill.width is 'wide'"]),
    ("evaluate.policy", "remote", ["policy is 'remote' but remote.url is null"]),
    ("evaluate.policy", "expert", ["policy is 'expert', but the protocol 'offline' compares what S-VAM foresees"]),
    ("convert.source", "betamax", ["convert.source is 'betamax'", "calvin, lerobot"]),
    ("convert.source", "LeRobot", ["convert.source is 'LeRobot'", "; did you mean 'lerobot'?"]),
    ("convert.options", {"rate_hz": 2}, ["convert.options.rate_hz: it is convert.rate_hz, the same for every source"]),
    ("convert.options", {"speed": 2}, ["convert.options of 'metaworld' are tasks, looks, not 'speed'"]),
    ("convert.options", {"tasks": "reach"}, ["convert.options.tasks is 'reach'; expected a list"]),
    ("collect.scenes", "shared", ["collect.scenes is 'shared', but task 'reach' has no shared scene", "faucet-open"]),
])  # fmt: skip
def test_the_first_stage_stops_in_one_line(tmp_path: Path, key: str, value: Any, said: list[str]) -> None:
    console.width, out = 4000, tmp_path / "checked.txt"
    done = invoke(app, out, "--params", write(tmp_path, {key: value}))
    assert done.exit_code == 1 and len(done.output.splitlines()) == 1 and not out.exists()
    assert all(part in done.output for part in said), done.output


def test_each_of_several_errors_gets_a_line(tmp_path: Path) -> None:
    params = read_yaml(write(tmp_path, {"seed": -1}))
    params["rapport"] = params.pop("report")
    del params["generate"]["grid"]
    YAML_12.dump(params, tmp_path / "params.yaml")
    with pytest.raises(ParamsError) as caught:
        load_params(tmp_path / "params.yaml")
    lines = str(caught.value).splitlines()
    said = ("seed is -1", "'generate.grid' is missing", "'report' is missing", "unknown key 'rapport'")
    assert len(lines) == 4 and all(any(part in line for line in lines) for part in said), lines


def test_yaml_is_1_2_as_dvc_reads_it(tmp_path: Path) -> None:
    """`1e-3` is a number and `yes` a word; YAML 1.1 has it the other way round."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    file = tmp_path / "params.yaml"
    file.write_text(text.replace("learning_rate: 0.001", "learning_rate: 1e-3"))
    assert load_params(file).distill.training.learning_rate == 0.001
    file.write_text(text.replace("keep_features: true", "keep_features: yes"))
    with pytest.raises(ParamsError, match="generate.keep_features is 'yes'"):
        load_params(file)


@pytest.mark.parametrize("text", ["", "- a list\n", "seed: [1\n", "seed: 1\nseed: 2\n"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(ParamsError, match=r"params\.yaml"):
        load_params(file)
    with pytest.raises(ParamsError, match="absent.yaml: no such file; run from the root of the project"):
        load_params(tmp_path / "absent.yaml")


def test_what_this_machine_lacks_is_said_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for weights of which dvc.lock says that a run has made of them what is wanted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agreement, "find_spec", lambda name: None)
    lay_out(tmp_path / "here", layouts.TEACHERS["dinov2_registers"])
    values = {
        "prepare_backbones.text.path": "weights/clip", "prepare_backbones.geometric.path": "owner/name",
        "prepare_backbones.geometric.revision": "0" * 40, "prepare_backbones.semantic.path": "here",
        "finetune_video.unet.pretrained": "weights/svd", "finetune_video.lora_rank": 4, "finetune_video.moments": "int8",
        "machine.launch": "torchrun", "machine.processes": 16,
    } | {f"prepare_backbones.{part}.source": "pretrained" for part in ("text", "geometric", "semantic")}  # fmt: skip

    def told() -> list[str]:
        file = write(tmp_path, values)
        done = invoke(app, "out", "--params", file)
        said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if not line.startswith("NOTE ")]
        assert done.exit_code == 1 and not Path("out").exists() and said == lacking(load_params(file))
        return said

    first = [
        "finetune_video.training.batch is 8, which the 16 processes of machine.launch do not divide",
        "distill.training.batch is 8, which the 16 processes of machine.launch do not divide",
        "finetune_video.moments is 'int8', but bitsandbytes is not installed: pip install",
        "finetune_video.lora_rank is 4, but peft is not installed: pip install",
    ]
    text = "prepare_backbones.text.path: weights/clip is no local folder; as a hub id it needs prepare_backbones.text.revision"
    unet = "finetune_video.unet.pretrained: weights/svd is no local folder; as a hub id it needs finetune_video.unet.revision"
    said = told()
    assert len(said) == 6 and all(map(str.startswith, said, [*first, text, unet])), said
    for path, missing in (("weights/clip", [unet]), ("weights/other", [text, unet])):
        listed = {"params": {"params.yaml": {"seed": 1, "prepare_backbones.text": {"source": "pretrained", "path": path}}}}
        YAML_12.dump({"schema": "2.0", "stages": {"prepare_backbones_text": listed}}, Path("dvc.lock"))
        said = told()
        assert len(said) == 4 + len(missing) and all(map(str.startswith, said, [*first, *missing])), said
    values |= {"machine.launch": "no-such-launcher -n 2", "machine.processes": 1}
    assert told()[0].startswith("machine.launch is 'no-such-launcher -n 2', but there is no command 'no-such-launcher'")


WEIGHTS = {
    "prepare_backbones.autoencoder.path": ("svd", "vae", layouts.AUTOENCODER),
    "prepare_backbones.text.path": ("clip", "", layouts.TEXT),
    "prepare_backbones.geometric.path": ("depth", "", layouts.TEACHERS["depth_anything_3"]),
    "prepare_backbones.semantic.path": ("dino", "", layouts.TEACHERS["dinov2_registers"]),
    "finetune_video.unet.pretrained": ("svd", "unet", layouts.UNET),
}
"""Key of a path -> its folder, the model's within it, and its layout."""
PUBLISHED: dict[str, Any] = {key: folder for key, (folder, _, _) in WEIGHTS.items()}
PUBLISHED |= {f"prepare_backbones.{part}.source": "pretrained" for part in ("autoencoder", "text", "geometric", "semantic")}
PUBLISHED |= {"prepare_backbones.geometric.family": "depth_anything_3", "machine.device": "cpu"}
SHARDS = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model.safetensors"}}


@pytest.mark.parametrize("key, file, new, said", [
    ("autoencoder.path", "diffusion_pytorch_model.safetensors", "weights.ckpt", "weights.ckpt is of a format"),
    ("autoencoder.path", "", "elsewhere", "svd holds no folder 'vae' and no config.json"),
    ("text.path", "model.safetensors", "pytorch_model.bin", "pytorch_model.bin is of a format that runs code"),
    ("text.path", "tokenizer.json", None, "clip: no tokenizer"),
    ("geometric.path", "config.json", {"config": {"anyview": {}}}, "depth/config.json: no config.net with"),
    ("geometric.path", "model.safetensors.index.json", SHARDS, "depth: the weights are in shards"),
    ("semantic.path", "config.json", {"model_type": "dinov3_vit"}, "expected 'dinov2_with_registers'; set family to 'dinov3'"),
    ("semantic.path", "model.safetensors.index.json", SHARDS, "1 of 2 shards in model.safetensors.index.json"),
    ("unet.pretrained", "config.json", {"_class_name": "UNet2DModel"}, "_class_name is 'UNet2DModel', expected"),
    ("unet.pretrained", "diffusion_pytorch_model.safetensors", {}, "not a whole safetensors file"),
])  # fmt: skip
def test_bad_published_weights_are_told_before_anything_is_computed(
    key: str, file: str, new: dict[str, Any] | str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, inner, layout in WEIGHTS.values():
        lay_out(Path(folder, inner), layout)
    params = write(tmp_path, PUBLISHED)
    done = invoke(app, "whole", "--params", params)
    assert done.exit_code == 0 and Path("whole").exists(), done.output
    ((key, (folder, inner, _)),) = ((whole, place) for whole, place in WEIGHTS.items() if whole.endswith(key))
    spoil(Path(folder, inner, file), new)
    done = invoke(app, "out", "--params", params)
    told = [line for line in done.stderr.splitlines() if not line.startswith("NOTE ")]
    assert done.exit_code == 1 and not Path("out").exists()
    assert len(told) == 1 and told[0].startswith(f"error: {key}: {folder}") and said in told[0], told


def test_a_gpu_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the words of the stages where it is asked for, by a note where published sizes would go to the CPU unasked."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MachineError) as caught:
        prepare_torch("cuda", 1, 0)
    assert lacking(load_params(write(tmp_path, {"machine.device": "cuda"}))) == [str(caught.value)]
    for device in ("auto", "cpu"):
        assert not lacking(load_params(write(tmp_path, {"machine.device": device})))

    def noted(changes: dict[str, Any]) -> list[str]:
        return [line for line in notes(load_params(write(tmp_path, changes))) if "published" in line]

    everything, unet = PUBLISHED | {"machine.device": "auto"}, {"finetune_video.unet.pretrained": "svd"}
    (said,) = noted(everything)
    assert said.startswith(f"published weights are named by {', '.join(WEIGHTS)}, and machine.device is 'auto', but torch sees")
    assert "`python -m svam.presets plan PRESET --card cpu`" in said
    assert len(noted(unet)) == 1 and "named by finetune_video.unet.pretrained, and" in noted(unet)[0]
    assert not noted({}) and not noted(PUBLISHED)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert not noted(everything) and not lacking(load_params(write(tmp_path, {"machine.device": "cuda"})))
