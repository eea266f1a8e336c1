"""Overlays change what they say and nothing else, and pass every check; wrong ones are told in one sentence."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from stages.check_params import app as check_params
from svam import agreement
from svam.agreement import notes
from svam.errors import ParamsError
from svam.experiments.plan import with_arguments
from svam.params import load_params
from svam.presets import overlay
from svam.presets.__main__ import app
from svam.presets.data import estimated
from svam.presets.models import Models
from svam.presets.overlay import FOLDER, as_arguments, overlay_of, preset_names, with_overlay
from svam.report.defaults import flat_values
from svam.simulation.calvin import Checkout
from svam.simulation.calvin_experts import EXPERT_TASKS
from tests import ROOT
from tests.presets.weights import write_weights
from tests.project import begin_git, commit

COMMITTED = ROOT / "params.yaml"
PUBLISHED = {
    ("_published", "generate.guidance"), ("paper-real", "train_policy.chunk"), ("paper-real", "evaluate.execute"),
}  # fmt: skip
"""Keys of overlays whose values are those of params.yaml today, and are there since the paper or the released code has them, as
their comments say. A key that has the default's value for no such reason goes."""


def invoke(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The committed params in a repository of their own."""
    (tmp_path / "params.yaml").write_bytes(COMMITTED.read_bytes())
    begin_git(tmp_path)
    return tmp_path / "params.yaml"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small ones of the published layouts, under the names that presets have for them."""
    folder = tmp_path_factory.mktemp("published") / "weights"
    write_weights(folder, ["open the drawer"], load_params(COMMITTED).prepare_backbones.text.tokens)
    return folder


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_passes_the_first_stage(name: str, project: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights lie at its paths, and CALVIN's checkout, which is told apart from others elsewhere, knows its subtasks."""
    monkeypatch.chdir(project.parent)
    Path("weights").symlink_to(weights)
    subtasks = dict.fromkeys(EXPERT_TASKS, "do it")
    monkeypatch.setattr(agreement, "open_checkout", lambda path, commit: Checkout(Path("calvin"), commit, subtasks))
    code, printed, said = invoke("apply", name, "--params", project)
    assert code == 0 and (printed + said).count("NOTE ") == len(notes(load_params(project))), said  # nothing is lacking
    done = CliRunner().invoke(check_params, ["checked.txt"])
    assert done.exit_code == 0 and Path("checked.txt").is_file(), done.output


@pytest.mark.parametrize("name", [name for name in preset_names() if "calvin" in name])
def test_a_preset_of_calvin_waits_for_the_simulator(name: str, project: Path) -> None:
    code, _, said = invoke("apply", name, "--params", project)
    assert code == 1 and f"with preset {name}: evaluate.calvin.path is null" in said
    assert project.read_bytes() == COMMITTED.read_bytes()


@pytest.mark.parametrize("name", preset_names())
def test_the_models_of_every_preset_build(name: str) -> None:
    """A weight on the meta device has a shape and no memory."""
    params, text = with_overlay(overlay_of(name), COMMITTED, name)
    data = estimated(params, 10**6, 7, 15)
    models = Models(params, replace(data, sentences=data.sentences or ["open the drawer"], proprioception=15))
    branches = {"geometric", "semantic"}
    assert set(models.decouplers) == branches == set(models.teachers)
    of_branches = [*models.teachers.values(), *models.decouplers.values()]
    for module in (models.autoencoder, models.text, models.video, models.policy, *of_branches):
        assert all(weight.is_meta for weight in module.parameters())
    kept = [line for line in COMMITTED.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("#")]
    assert all(line in text for line in kept)


def test_an_overlay_has_only_what_differs() -> None:
    """From params.yaml, or from the overlays that it extends."""
    present, equal = YAML(typ="safe", pure=True).load(COMMITTED.read_text(encoding="utf-8")), set[tuple[str, str]]()
    for file in FOLDER.glob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        own = YAML(typ="safe", pure=True).load(text)
        below = {key: value for other in own.pop("extends", []) for key, value in overlay._read_overlay(other).items()}
        for key, value in own.items() if file.stem != "default" else ():
            if value == below.get(key, reduce(getitem, key.split("."), present)):
                equal.add((file.stem, key))
                line = next(line for line in text.splitlines() if line.startswith(f"{key}:"))
                assert line.partition("#")[2].strip().startswith(("paper", "released")), line
    assert equal == PUBLISHED


def test_the_list_has_each_preset_with_its_purpose() -> None:
    code, printed, _ = invoke("list")
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert code == 0 and list(lines) == preset_names() and all(said.endswith(".") for said in lines.values())
    assert lines["metaworld-50"].startswith("The setting of the published tables of MetaWorld") and "_published" not in lines
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    table = {
        name
        for line in page.splitlines()
        if line.startswith("| `")
        for name in re.findall("`([a-z0-9-]+)`", line.split("|")[1])
    }
    assert table == set(lines)


def test_what_a_preset_sets_is_shown_beside_what_it_replaces(project: Path) -> None:
    text = project.read_text(encoding="utf-8")
    project.write_text(text.replace("  windows: 800 ", "  windows: 32 "), encoding="utf-8")
    code, printed, _ = invoke("show", "quick", "--params", project)
    lines = printed.splitlines()
    assert code == 0 and {line.partition(":")[0] for line in lines} == set(overlay_of("quick"))
    assert "collect.episodes: 8   # in place of 40" in lines and "generate.windows: 32   # as it is" in lines
    assert "collect.episodes_of: null   # in place of {'reach': 300}" in lines
    assert project.read_text(encoding="utf-8") == text.replace("  windows: 800 ", "  windows: 32 ")


@pytest.mark.parametrize("name", ["mt50-gpu", "mt12-gpu", "mt12-cpu"])
def test_the_recipe_of_the_comparison(name: str) -> None:
    """Fifty demonstrations of each task are learnt from, clips end within them, and generations are guided by the sentence."""
    params, _ = with_overlay(overlay_of(name), COMMITTED, name)
    data = estimated(params, None, None)
    for held_out, count in ((False, 50), (True, 6)):
        chosen = [task for task, side in zip(data.tasks, data.held_out, strict=True) if side == held_out]
        assert Counter(chosen) == dict.fromkeys(params.evaluate.metaworld.tasks, count)
    assert len(params.collect.tasks) == int(name[2:4]) and not notes(params)
    assert (params.finetune_video.dropped, params.generate.guidance) == ("text", 2.0)
    perceiver, transformer = params.train_policy.perceiver, params.train_policy.transformer
    queries = (4, None) if name == "mt12-cpu" else (14, 2 * perceiver.width)
    assert perceiver.free_queries and (perceiver.queries, perceiver.embedding) == queries
    assert (transformer.attention_dropout, transformer.residual_dropout, transformer.mlp_dropout) == (0.3, 0.1, 0.1)


def test_the_default_is_what_is_committed() -> None:
    """It sets every key, and all of them to what is there: applied to anything else it goes back."""
    params = load_params(COMMITTED)
    every = flat_values(params) | {
        f"{section}.{key}": value
        for section in ("machine", "foresight", "benchmark")
        for key, value in getattr(params, section).model_dump().items()
    }
    assert overlay_of("default") == every
    assert with_overlay(overlay_of("default"), COMMITTED, "default")[1].count("\n") == COMMITTED.read_text().count("\n")


def test_apply_writes_what_it_says_and_default_goes_back(project: Path) -> None:
    before = load_params(project)
    code, printed, _ = invoke("apply", "quick", "--params", project)
    assert code == 0 and "collect.episodes: 40 -> 8" in printed.splitlines()
    old, new = flat_values(before), flat_values(load_params(project))
    changed = {key for key in old if old[key] != new[key]}
    assert changed == {key for key in overlay_of("quick") if not key.startswith("foresight.")}
    assert {line.split(":")[0] for line in printed.splitlines()} == set(overlay_of("quick"))
    commit(project.parent)
    assert invoke("apply", "default", "--params", project)[0] == 0
    assert load_params(project) == before


def test_what_is_not_there_yet_is_a_note(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And refused by the check before anything is computed, see `tests/test_params.py`."""
    monkeypatch.chdir(project.parent)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, printed, said = invoke("apply", "paper-metaworld", "--params", project)
    assert code == 0 and load_params(project).generate.steps == 30
    for key in ("geometric.path: weights/DA3-LARGE", "finetune_video.unet.pretrained: weights/stable-video-diffusion-img2vid"):
        assert key in printed + said
    assert (printed + said).count("NOTE ") == 6 and "NOTE published weights are named by" in printed + said


def test_edits_that_git_does_not_have_are_refused_where_they_would_be_mixed(project: Path) -> None:
    text = project.read_text(encoding="utf-8")
    project.write_text(text.replace("attempts: 20 ", "attempts: 21 "), encoding="utf-8")
    code, _, said = invoke("apply", "quick", "--params", project)
    assert code == 1 and "git's last commit has other values in collect; commit them, or pass --force" in said
    assert project.read_text(encoding="utf-8") == text.replace("attempts: 20 ", "attempts: 21 ")
    assert invoke("apply", "quick", "--force", "--params", project)[0] == 0
    assert load_params(project).collect.attempts == 21 and load_params(project).collect.episodes == 8
    project.write_text(text.replace("dpi: 100", "dpi: 99", 1), encoding="utf-8")
    assert invoke("apply", "metaworld-50", "--params", project)[0] == 0, "another section's edits are no matter"


def test_where_git_cannot_tell_what_is_there_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = tmp_path / "params.yaml"
    params.write_bytes(COMMITTED.read_bytes())
    code, _, said = invoke("apply", "metaworld-50", "--params", params)
    assert code == 1 and "git has no commit of it (fatal: not a git repository" in said and "pass --force" in said
    begin_git(tmp_path)
    params.rename(tmp_path / "other.yaml")
    code, _, said = invoke("apply", "metaworld-50", "--params", tmp_path / "other.yaml")
    assert code == 1 and "git has no commit of it (fatal: path 'other.yaml'" in said
    monkeypatch.setenv("PATH", "")
    code, _, said = invoke("apply", "metaworld-50", "--params", tmp_path / "other.yaml")
    assert code == 1 and "git cannot be run (No such file or directory)" in said
    assert (tmp_path / "other.yaml").read_bytes() == COMMITTED.read_bytes()
    assert invoke("apply", "metaworld-50", "--force", "--params", tmp_path / "other.yaml")[0] == 0
    assert load_params(tmp_path / "other.yaml").collect.episodes == 50


def arguments_of(name: str, params: Path) -> list[str]:
    """What `args` prints, after a shell's reading."""
    code, printed, said = invoke("args", name, "--params", params)
    words = shlex.split(printed)
    assert code == 0 and words[::2] == ["-S"] * len(words[1::2]), said
    return words[1::2]


@pytest.mark.parametrize("name", preset_names())
def test_arguments_make_of_params_what_apply_does(name: str) -> None:
    """By DVC's own reading of them."""
    _, text = with_overlay(overlay_of(name), COMMITTED, name)
    arguments = arguments_of(name, COMMITTED)
    assert with_arguments(COMMITTED, arguments) == YAML(typ="safe", pure=True).load(text)
    assert bool(arguments) == (name != "default")


def test_arguments_go_back_to_the_default(project: Path) -> None:
    """Also to a mapping, where there is none; and where DVC would keep what a mapping has, `apply` alone goes back."""
    committed = YAML(typ="safe", pure=True).load(COMMITTED.read_text(encoding="utf-8"))
    assert invoke("apply", "quick", "--params", project)[0] == 0
    arguments = arguments_of("default", project)
    assert "++collect.episodes_of={reach: 300}" in arguments and with_arguments(project, arguments) == committed
    text = project.read_text(encoding="utf-8")
    project.write_text(overlay.with_values(text, {"convert.options": {"tasks": ["reach"]}}, project), encoding="utf-8")
    code, _, said = invoke("args", "default", "--params", project)
    assert code == 1 and "convert.options is {'tasks': ['reach']} and would be {}" in said and "use `apply`" in said
    assert invoke("apply", "default", "--force", "--params", project)[0] == 0
    assert YAML(typ="safe", pure=True).load(project.read_text(encoding="utf-8")) == committed


@pytest.mark.parametrize("key, value", [
    ("report.note", 'say "go", \\"stop\\" or a\\b\\'), ("report.note", "Öffne: {die} [Lade] # 1 = 'x'"), ("report.note", "\\"),
    ("convert.options", {"a-b": {"c": [1, "x y", None, 2.5]}}), ("convert.options", {}),
    ("collect.episodes_of", {"reach": 3, "drawer-open": 4}),
])  # fmt: skip
def test_an_argument_is_read_back_as_it_was(key: str, value: Any) -> None:
    section, name = key.split(".")
    assert with_arguments(COMMITTED, as_arguments({key: value}))[section][name] == value


def test_a_mapping_that_no_argument_can_hold_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"a\.b has the name 'c d', which no argument of DVC can have: use `apply`"):
        as_arguments({"a.b": {"c d": 1}})
    with pytest.raises(ParamsError, match=r"a is \{.*\}, but DVC adds .* so that b\.d, e would stay: use `apply`"):
        as_arguments({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2, "d": 3}, "e": 4}})


@pytest.mark.parametrize("line, said", [
    ("collect.epsiodes: 3", "has no key 'collect.epsiodes', which the preset sets; did you mean 'collect.episodes'?"),
    ("collect.episodes: many", "with preset other: collect.episodes is 'many'; expected a whole number"),
    ("evaluate.execute: 9", "with preset other: evaluate.execute (9) must not exceed train_policy.chunk (8)"),
])  # fmt: skip
def test_a_wrong_preset_is_told_in_one_sentence(
    line: str, said: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.yaml").write_text(line, encoding="utf-8")
    monkeypatch.setattr(overlay, "FOLDER", tmp_path)
    code, _, stderr = invoke("apply", "other", "--params", project)
    assert code == 1 and said in stderr and project.read_bytes() == COMMITTED.read_bytes()
    code, _, stderr = invoke("show", "othre")
    assert code == 1 and "'othre' is no preset; did you mean 'other'?; those are other, params" in stderr


@pytest.mark.parametrize("value", [5e-06, 700.0, None, True, "no", "a: b # c", ["x y", "z"], {"reach": 3}, [0.9, 0.999], "7"])
def test_a_value_is_read_back_as_it_was(value: Any, tmp_path: Path) -> None:
    """Also in place of a list over several lines and of nothing, and by YAML 1.1, which takes 5e-06 for a text."""
    file = tmp_path / "params.yaml"
    file.write_text("a:\n  b:\n  - 1\n  - 2   # two\nc:   # nothing\nd: 1\n", encoding="utf-8")
    text = overlay.with_values(file.read_text(encoding="utf-8"), {"a.b": value, "c": value}, file)
    for version in (YAML(typ="safe", pure=True), YAML(typ="safe")):
        assert version.load(text) == {"a": {"b": value}, "c": value, "d": 1}
    assert "# two" in text and "# nothing" in text
