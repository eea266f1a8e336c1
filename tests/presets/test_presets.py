"""Overlays change what they say and nothing else, and pass every check; wrong ones are told in one sentence."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from svam.agreement import notes
from svam.errors import ParamsError
from svam.experiments.plan import with_arguments
from svam.params import load_params
from svam.presets import overlay
from svam.presets.__main__ import app
from svam.presets.data import estimated
from svam.presets.models import Models
from svam.presets.overlay import check, overlay_of, preset_names, with_overlay
from svam.report.defaults import flat_values
from tests import ROOT
from tests.project import begin_git, commit

COMMITTED = ROOT / "params.yaml"


def invoke(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The committed params in a repository of their own."""
    (tmp_path / "params.yaml").write_bytes(COMMITTED.read_bytes())
    begin_git(tmp_path)
    return tmp_path / "params.yaml"


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_passes_the_checks_and_its_models_build(name: str) -> None:
    """A weight on the meta device has a shape and no memory."""
    params, text = with_overlay(overlay_of(name), COMMITTED, name)
    data = estimated(with_overlay(overlay_of(name) | {"train_policy.proprioception": False}, COMMITTED, name)[0], 10**6, 7)
    models = Models(params, replace(data, sentences=data.sentences or ["open the drawer"], proprioception=15))
    evaluate = params.evaluate
    if "calvin" in evaluate.protocols:  # which asks for a checkout
        with pytest.raises(ParamsError, match=rf"with preset {name}: .*evaluate\.calvin\.path is null"):
            check(params, COMMITTED, name)
        evaluate = evaluate.model_copy(update={"protocols": ["offline"]})
    check(params.model_copy(update={"evaluate": evaluate}), COMMITTED, name)
    for module in (models.autoencoder, models.text, models.video, *models.teachers.values(), models.policy):
        assert all(weight.is_meta for weight in module.parameters())
    assert set(models.decouplers) == {"geometric", "semantic"}
    kept = [line for line in COMMITTED.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("#")]
    assert all(line in text for line in kept)


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
    assert perceiver.free_queries and perceiver.queries == 14 and perceiver.embedding == 2 * perceiver.width
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


@pytest.mark.parametrize("name", ["quick", "mt50-gpu", "paper-calvin"])
def test_arguments_make_of_params_what_apply_does(name: str) -> None:
    """DVC's own reading of them, after a shell's."""
    code, printed, _ = invoke("args", name, "--params", COMMITTED)
    words = shlex.split(printed)
    assert code == 0 and set(words[::2]) == {"-S"}
    _, text = with_overlay(overlay_of(name), COMMITTED, name)
    assert with_arguments(COMMITTED, words[1::2]) == YAML(typ="safe", pure=True).load(text)


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
