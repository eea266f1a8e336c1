"""Changing one param, or one module, re-runs exactly the stages it affects: DVC itself decides, on the real `dvc.yaml`.

Only the commands are replaced: each writes something new into its outs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import chdir
from copy import deepcopy
from pathlib import Path
from typing import Any

import dvc.utils.serialize._yaml
import networkx as nx
import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from svam.params import load_params
from tests import ROOT

YAML_12 = YAML(typ="safe", pure=True)
CHECK = {"check_params"}
REPORT = {"report"}
EVALUATE = {"evaluate", *REPORT}
FORESIGHT = {"foresight"}
POLICY = {"train_policy", *EVALUATE, *FORESIGHT}
DISTILL = {"distill@geometric", "distill@semantic", *POLICY}
CACHE = {"cache_teacher@geometric", "cache_teacher@semantic", *DISTILL}
GENERATE = {"generate", *CACHE}
VIDEO = {"finetune_video", *GENERATE}
TEACHERS = {"prepare_backbones_teacher@geometric", "prepare_backbones_teacher@semantic"}
AUTOENCODER = {"prepare_backbones_autoencoder", *TEACHERS, *VIDEO}
BACKBONES = {"prepare_backbones_text", *AUTOENCODER}
CONVERT = {"convert", *BACKBONES}
COLLECT = {"collect", *CONVERT}


def of_branch(branch: str, stages: set[str]) -> set[str]:
    """Without what belongs to the other branch."""
    return {stage for stage in stages if "@" not in stage or stage.endswith(f"@{branch}")}


# A key of params.yaml, its new value, and every stage that must run then, no more, no fewer. (`machine` alone re-runs not even
# the check.)
PARAMS: list[tuple[str, Any, set[str]]] = [
    ("machine.device", "cpu", set()),
    ("machine.workers", 1, set()),
    ("machine.cache_gb", 4.0, set()),
    ("machine.checkpoint_seconds", 10.0, set()),
    ("report.dpi", 90, CHECK | REPORT),
    ("foresight.dpi", 90, CHECK | FORESIGHT),
    ("evaluate.episodes", 7, CHECK | EVALUATE),
    ("train_policy.chunk", 9, CHECK | POLICY),
    ("train_policy.training.steps", 2999, CHECK | POLICY),
    ("distill.width", 64, CHECK | DISTILL),
    ("distill.target", "ground_truth", CHECK | CACHE),
    ("cache_teacher.mantissa_bits", 8, CHECK | CACHE),
    ("generate.windows", 100, CHECK | GENERATE),
    ("generate.grid", 4, CHECK | GENERATE),
    ("finetune_video.stride_seconds", 0.1, CHECK | VIDEO),
    ("finetune_video.training.ema", 0.9, CHECK | VIDEO),
    ("prepare_backbones.autoencoder.latent_channels", 8, CHECK | AUTOENCODER),
    ("prepare_backbones.text.width", 32, CHECK | {"prepare_backbones_text"} | VIDEO),
    (
        "prepare_backbones.geometric.layers",
        3,
        CHECK | {"prepare_backbones_teacher@geometric"} | of_branch("geometric", CACHE),
    ),
    (
        "prepare_backbones.semantic.layers",
        3,
        CHECK | {"prepare_backbones_teacher@semantic"} | of_branch("semantic", CACHE),
    ),
    ("convert.held_out", 0.2, CHECK | CONVERT),
    ("collect.episodes", 41, CHECK | COLLECT),
    ("collect.image_size", 96, CHECK | COLLECT),
    ("collect.styles", ["left", "right"], CHECK | COLLECT),
    ("benchmark.repeats", 7, CHECK),
    ("threads", 1, CHECK | BACKBONES),
    ("seed", 7, CHECK | COLLECT),
]

MODULES: list[tuple[str, set[str]]] = [
    ("stages/report.py", REPORT),
    ("svam/analysis/gap.py", FORESIGHT),
    ("svam/evaluation/scores.py", EVALUATE),
    ("svam/models/decoupler.py", DISTILL | POLICY),
    ("svam/models/perceiver.py", POLICY),
    ("svam/models/policy.py", POLICY),
    ("stages/train_policy.py", POLICY),
    ("stages/distill.py", DISTILL),
    ("stages/cache_teacher.py", CACHE),
    ("stages/generate.py", GENERATE),
    ("svam/training/finetune_video.py", VIDEO),
    ("svam/training/prepare_backbones/text.py", {"prepare_backbones_text"} | VIDEO),
    ("svam/training/prepare_backbones/teacher.py", TEACHERS | CACHE),
    ("svam/training/prepare_backbones/autoencoder.py", AUTOENCODER),
    ("svam/episodes/convert.py", CONVERT),
    ("svam/sources/metaworld.py", CHECK | CONVERT),
    ("svam/params.py", set()),
    ("svam/contract.py", set()),
]


@pytest.fixture(scope="module", autouse=True)
def each_text_is_parsed_once() -> Iterator[None]:
    """DVC parses params.yaml again for every stage, in pure Python: most of the time this file would take."""
    parsed: dict[tuple[str, str], Any] = {}
    parse = dvc.utils.serialize._yaml.parse_yaml

    def remembered(text: str, path: str, typ: str = "safe") -> Any:
        if typ != "safe":
            return parse(text, path, typ)
        if (text, path) not in parsed:
            parsed[text, path] = parse(text, path)
        return deepcopy(parsed[text, path])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dvc.utils.serialize._yaml.parse_yaml", remembered)
        patch.setattr("dvc.utils.strictyaml.parse_yaml", remembered)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which everything has run."""
    root = tmp_path_factory.mktemp("project")
    for folder in ("svam", "stages"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("params.yaml", ".dvcignore"):
        shutil.copy(ROOT / file, root / file)
    pipeline = YAML_12.load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    for name, stage in pipeline["stages"].items():
        outs = " ".join(out if isinstance(out, str) else next(iter(out)) for out in stage["outs"])
        content = "echo always the same" if name == "check_params" else "date +%s%N"
        stage["cmd"] = f"for out in {outs}; do mkdir -p $out; {content} > $out/content; done"
    YAML_12.dump(pipeline, root / "dvc.yaml")
    with chdir(root):
        Repo.init(no_scm=True).close()
    assert reproduced(root) == COLLECT | CHECK
    return root


@pytest.fixture
def project(finished: Path) -> Iterator[Path]:
    """The finished project; what a test edits is put back."""
    sources = {file: file.read_bytes() for file in [*finished.rglob("*.py"), finished / "params.yaml"]}
    yield finished
    for file, content in sources.items():
        file.write_bytes(content)


def reproduced(root: Path) -> set[str]:
    """Run `dvc repro`; the names of the stages that ran."""
    with chdir(root), Repo() as repo:
        return {stage.addressing for stage in repo.reproduce()}


def would_run(root: Path) -> set[str]:
    """What `dvc status` calls changed, and what follows from it in DVC's graph (nothing follows from `check_params`, whose
    output is always the same). Missing stages are not counted: their inputs changed because they are gone."""
    with chdir(root), Repo() as repo:
        changed = set(repo.status())
        follows = nx.reverse(repo.index.graph)
        affected = {after for s in follows if s.addressing in changed - CHECK for after in nx.descendants(follows, s)}
        return changed | {stage.addressing for stage in affected}


def change(root: Path, key: str, value: Any) -> None:
    """Set one key of params.yaml; it must have had another, and the new value must be valid."""
    file = root / "params.yaml"
    params = YAML_12.load(file.read_text(encoding="utf-8"))
    *path, last = key.split(".")
    section = params
    for part in path:
        section = section[part]
    assert section[last] != value
    section[last] = value
    YAML_12.dump(params, file)
    load_params(file)


def stage_names(root: Path) -> set[str]:
    with chdir(root), Repo() as repo:
        return {stage.addressing for stage in repo.index.stages}


def test_nothing_changed_runs_nothing(project: Path) -> None:
    assert stage_names(project) == COLLECT | CHECK
    assert would_run(project) == set()


@pytest.mark.parametrize(("key", "value", "expected"), PARAMS, ids=[case[0] for case in PARAMS])
def test_a_param_reruns_exactly_what_it_affects(project: Path, key: str, value: Any, expected: set[str]) -> None:
    change(project, key, value)
    assert would_run(project) == expected


def test_every_section_is_tried() -> None:
    sections = set(YAML_12.load((ROOT / "params.yaml").read_text(encoding="utf-8")))
    assert {key.split(".")[0] for key, _, _ in PARAMS} == sections


@pytest.mark.parametrize(("module", "expected"), MODULES, ids=[case[0] for case in MODULES])
def test_a_module_reruns_exactly_who_uses_it(project: Path, module: str, expected: set[str]) -> None:
    with (project / module).open("a", encoding="utf-8") as file:
        file.write("\n# edited\n")
    assert would_run(project) == expected


def test_pycache_reruns_nothing(project: Path) -> None:
    for folder in ("data/models/video", "data/raw/metaworld"):
        (project / folder / "__pycache__").mkdir()
        (project / folder / "__pycache__/x.cpython-311.pyc").write_bytes(b"\0")
    assert would_run(project) == set()


def test_what_is_not_used_is_not_run(project: Path) -> None:
    """No branch: neither cached nor distilled. No task and another path: `collect` makes an empty folder."""
    change(project, "train_policy.context", ["one_step"])
    change(project, "distill.branches", [])
    assert would_run(project) == CHECK | POLICY
    unused = {name for name in COLLECT if name.startswith(("cache_teacher", "distill"))}
    assert stage_names(project) == (COLLECT | CHECK) - unused

    (project / "elsewhere").mkdir()
    (project / "elsewhere/episode").write_text("recorded")
    change(project, "convert.path", "elsewhere")
    change(project, "collect.episodes_of", {})
    change(project, "collect.tasks", [])
    assert would_run(project) == (COLLECT | CHECK) - unused


def test_repro_runs_what_is_said_here(project: Path) -> None:
    """The two readings above, against a real `dvc repro`."""
    change(project, "report.dpi", 80)
    assert reproduced(project) == CHECK | REPORT
    assert reproduced(project) == set()
