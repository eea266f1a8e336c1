"""Changing one param, or one module, re-runs exactly the stages it affects: DVC itself decides, on the real `dvc.yaml`, by its
status, with which a real `dvc repro` agrees in `test_dag.py`.

Only the commands are replaced: each writes something new into its outs. That of `code` is called in this process.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any, TextIO

import networkx as nx
import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from stages.check_params import app
from svam.code import code_text, stage_code, stage_names
from svam.files import read_yaml
from svam.params import load_params
from tests import ROOT
from tests.toy import invoke
from tests.warm import PARSED

YAML_12 = YAML(typ="safe", pure=True)
CODE = {"code"}
CHECK = {"check_params"}
REPORT = {"report"}
EVALUATE = {"evaluate", *REPORT}
FORESIGHT = {"foresight"}
POLICY = {"train_policy", *EVALUATE, *FORESIGHT}
DISTILL = {"distill@geometric", "distill@semantic", *POLICY}
CACHE = {"cache_teacher@geometric", "cache_teacher@semantic", *DISTILL}
GENERATE = {"generate", *CACHE}
VIDEO = {"finetune_video", *GENERATE}
ENCODE = {"encode", *VIDEO}
TEACHERS = {"prepare_backbones_teacher@geometric", "prepare_backbones_teacher@semantic"}
AUTOENCODER = {"prepare_backbones_autoencoder", *TEACHERS, *ENCODE}
BACKBONES = {"prepare_backbones_text", *AUTOENCODER}
CONVERT = {"convert", *BACKBONES}
COLLECT = {"collect", *CONVERT}


def of_branch(branch: str, stages: set[str]) -> set[str]:
    """Without what belongs to the other branch."""
    return {stage for stage in stages if "@" not in stage or stage.endswith(f"@{branch}")}


# A key of params.yaml, its new value, and every stage that must run then, no more, no fewer.
PARAMS: list[tuple[str, Any, set[str]]] = [
    ("report.dpi", 90, CHECK | REPORT),
    ("foresight.dpi", 90, CHECK | FORESIGHT),
    ("evaluate.metaworld.episodes", 7, CHECK | EVALUATE),
    ("evaluate.protocols", ["offline"], CODE | CHECK | EVALUATE),
    ("train_policy.training.steps", 2999, CHECK | POLICY),
    ("distill.width", 64, CHECK | DISTILL),
    ("distill.target", "ground_truth", CHECK | CACHE),
    ("cache_teacher.batch", 8, CHECK | CACHE),
    ("generate.windows", 100, CHECK | GENERATE),
    ("encode.batch", 128, CHECK | TEACHERS | ENCODE),
    ("finetune_video.stride_seconds", 0.1, CHECK | VIDEO),
    ("prepare_backbones.autoencoder.latent_channels", 8, CHECK | AUTOENCODER),
    ("prepare_backbones.text.width", 32, CHECK | {"prepare_backbones_text"} | VIDEO),
    ("prepare_backbones.geometric.layers", 3, CHECK | of_branch("geometric", TEACHERS | CACHE)),
    ("prepare_backbones.semantic.layers", 3, CHECK | of_branch("semantic", TEACHERS | CACHE)),
    ("convert.held_out", 0.2, CHECK | CONVERT),
    ("convert.source", "raw", CODE | CHECK | CONVERT),
    ("convert.sets", [{"name": "one", "weight": 1.0, "policy": True, "convert": {"source": "raw"}}], CODE | CHECK | CONVERT),
    ("collect.episodes", 41, CHECK | COLLECT),
    ("benchmark.repeats", 7, CHECK),
    ("threads", 1, CHECK | BACKBONES),
    ("seed", 7, CHECK | COLLECT),
]
# Whatever they are, not even the check runs.
MACHINE = {
    "device": "cpu", "workers": 1, "cache_gb": 4.0, "checkpoint_seconds": 10.0, "launch": "torchrun", "processes": 2,
    "checkpointing": True, "average": "host", "compile": True,
    "shard": True,
}  # fmt: skip

# What is added to a module that a stage runs, at its end, and every stage that must run then besides `code`.
LIMIT = "\nLIMIT = 3\n"
ADDED: dict[str, set[str]] = {
    "svam/models/perceiver.py": POLICY, "svam/models/decoupler.py": DISTILL, "stages/cache_teacher.py": CACHE,
    "svam/training/generate.py": GENERATE, "svam/training/encode.py": ENCODE, "svam/training/finetune_video.py": VIDEO,
    "svam/training/prepare_backbones/text.py": {"prepare_backbones_text"} | VIDEO,
    "svam/training/prepare_backbones/teacher.py": TEACHERS | CACHE,
    "svam/training/prepare_backbones/autoencoder.py": AUTOENCODER, "svam/training/loop.py": BACKBONES,
    "svam/episodes/convert.py": CONVERT, "svam/sources/metaworld.py": CHECK | CONVERT, "svam/contract.py": CHECK | COLLECT,
    "svam/evaluation/rollout.py": EVALUATE, "svam/analysis/gap.py": FORESIGHT, "svam/report/films.py": REPORT,
    "svam/report/figures.py": REPORT | FORESIGHT,
}  # fmt: skip
# A file, a text in it, what stands there instead.
CHANGED: list[tuple[str, str, str, set[str]]] = [
    ("svam/normalisation.py", "/ 2.0 < 1e-6", "/ 2.0 < 1e-5", POLICY),
    ("svam/episodes/instructions.yaml", "dunk the basketball", "dunk the ball", CHECK | COLLECT),
    ("svam/report/page.css", "1rem", "2rem", REPORT),
    ("svam/report/published.yaml", "72.8", "72.9", REPORT),
]
# No stage but `code` runs for words, for what decides no number, and for modules that no stage runs.
SILENT: list[tuple[str, str, str]] = [
    ("svam/training/loop.py", "\nimport math", "\nimport math  # a comment"),
    ("svam/contract.py", ": no camera", ": there is no camera"),
    ("svam/console.py", "SECONDS_PER_LINE = 20.0", "SECONDS_PER_LINE = 30.0"),
    ("svam/files.py", "def sha256(", "def other() -> int:\n    return 1\n\n\ndef sha256("),
    ("svam/resume.py", "COST_SHARE = 0.01", "COST_SHARE = 0.02"),
    ("svam/params.py", "\nclass Params(", "\nLIMIT = 3\n\n\nclass Params("),
    ("stages/generate.py", 'help="Folder to write."', 'help="Where to write."'),
    ("svam/episodes/instructions.yaml", "# MetaWorld task", "# A task"),
    ("svam/sources/calvin.py", "\nclass ", "\nLIMIT = 3\n\n\nclass "),
    ("svam/evaluation/calvin.py", "\nChains = ", "\nLIMIT = 3\nChains = "),
    ("svam/serving/client.py", "TOO_LARGE = 1009", "TOO_LARGE = 1010"),
]


@pytest.fixture(scope="module", autouse=True)
def what_dvc_writes_is_quickly_read() -> Iterator[None]:
    """Most of the time this file would take. What DVC writes is JSON here, which is YAML too."""

    def written(data: Any, stream: TextIO) -> None:
        text = json.dumps(data)
        PARSED[text] = json.loads(text)
        stream.write(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dvc.utils.serialize._yaml._dump", written)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which everything has run."""
    root = tmp_path_factory.mktemp("project")
    for folder in ("svam", "stages"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("params.yaml", ".dvcignore"):
        shutil.copy(ROOT / file, root / file)
    pipeline = read_yaml(ROOT / "dvc.yaml")
    for name, stage in pipeline["stages"].items():
        if name == "code":
            stage["cmd"] = "true"
            continue
        outs = " ".join(out if isinstance(out, str) else next(iter(out)) for out in stage["outs"])
        content = "echo always the same" if name == "check_params" else "date +%s%N"
        stage["cmd"] = f"for out in {outs}; do mkdir -p $out; {content} > $out/content; done"
    pipeline["stages"]["train_policy"]["cmd"] += " && cp data/svam/content data/svam/manifest.json"
    YAML_12.dump(pipeline, root / "dvc.yaml")
    with chdir(root):
        Repo.init(no_scm=True).close()
    write_code(root)
    with chdir(root), Repo() as repo:
        repo.commit("code", force=True)
    assert reproduced(root) == COLLECT | CHECK
    return root


@pytest.fixture
def project(finished: Path) -> Iterator[Path]:
    """The finished project; what a test edits is put back."""
    others = [*finished.glob("svam/**/*.yaml"), *finished.glob("svam/**/*.css")]
    code = [*(finished / "data/code").iterdir(), *finished.rglob("*.py"), *others]
    sources = {file: file.read_bytes() for file in [*code, finished / "params.yaml"]}
    yield finished
    for file, content in sources.items():
        if file.read_bytes() != content:
            file.write_bytes(content)


def write_code(root: Path) -> None:
    """What the stage `code` does."""
    modules = load_params(root / "params.yaml").modules
    (root / "data/code").mkdir(parents=True, exist_ok=True)
    for stage in stage_names(root):
        file, text = root / f"data/code/{stage}.txt", code_text(stage_code(stage, modules, root))
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def reproduced(root: Path) -> set[str]:
    """Run `dvc repro`; the names of the stages that ran."""
    with chdir(root), Repo() as repo:
        return {stage.addressing for stage in repo.reproduce()}


def would_run(root: Path) -> set[str]:
    """What `dvc status` calls changed after `code` has run, and what follows from it in DVC's graph. Nothing follows from
    `code` and `check_params` by themselves: whether their outputs changed is seen by those who depend on them."""
    write_code(root)
    with chdir(root), Repo() as repo:
        changed = set(repo.status())
        follows = nx.reverse(repo.index.graph)
        affected = {after for s in follows if s.addressing in changed - CHECK - CODE for after in nx.descendants(follows, s)}
        return changed | {stage.addressing for stage in affected}


def change(root: Path, key: str, value: Any) -> None:
    """Set one key of params.yaml; it must have had another, and the new value must be valid."""
    file = root / "params.yaml"
    params = read_yaml(file)
    *path, last = key.split(".")
    section = params
    for part in path:
        section = section[part]
    assert section[last] != value
    section[last] = value
    YAML_12.dump(params, file)
    load_params(file)


def pipeline(root: Path) -> set[str]:
    """All stages but `code`."""
    with chdir(root), Repo() as repo:
        return {stage.addressing for stage in repo.index.stages} - CODE


def test_nothing_changed_runs_nothing(project: Path) -> None:
    """Nor does a page, compiled code in an output, or another machine."""
    assert pipeline(project) == COLLECT | CHECK
    (project / "svam/models/README.md").write_text("A page.\n")
    for folder in ("data/models/video", "data/raw/metaworld"):
        (project / folder / "__pycache__").mkdir()
        (project / folder / "__pycache__/x.cpython-311.pyc").write_bytes(b"\0")
    for key, value in MACHINE.items():
        change(project, f"machine.{key}", value)
    assert would_run(project) == set()


@pytest.mark.parametrize(("key", "value", "expected"), PARAMS, ids=[case[0] for case in PARAMS])
def test_a_param_reruns_exactly_what_it_affects(project: Path, key: str, value: Any, expected: set[str]) -> None:
    change(project, key, value)
    assert would_run(project) == expected


def test_every_section_is_tried() -> None:
    params = read_yaml(ROOT / "params.yaml")
    assert {key.split(".")[0] for key, _, _ in PARAMS} == set(params) - {"machine"} and set(MACHINE) == set(params["machine"])


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text, file
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_words_rerun_nothing(project: Path) -> None:
    for module, old, new in SILENT:
        edit(project / module, old, new)
    assert would_run(project) == CODE


@pytest.mark.parametrize("module", ADDED)
def test_an_edit_reruns_exactly_whose_numbers_it_can_change(project: Path, module: str) -> None:
    with (project / module).open("a", encoding="utf-8") as file:
        file.write(LIMIT)
    assert would_run(project) == CODE | ADDED[module]


@pytest.mark.parametrize(("file", "old", "new", "expected"), CHANGED, ids=[case[0] for case in CHANGED])
def test_a_changed_number_or_sentence_counts(project: Path, file: str, old: str, new: str, expected: set[str]) -> None:
    edit(project / file, old, new)
    assert would_run(project) == CODE | expected


def test_what_is_not_used_is_not_run(project: Path) -> None:
    """No branch: neither cached nor distilled. No task and another path: `collect` makes an empty folder."""
    change(project, "train_policy.context", ["one_step"])
    change(project, "distill.branches", [])
    assert would_run(project) == CHECK | POLICY
    unused = {name for name in COLLECT if name.startswith(("cache_teacher", "distill"))}
    assert pipeline(project) == (COLLECT | CHECK) - unused

    (project / "elsewhere").mkdir()
    (project / "elsewhere/episode").write_text("recorded")
    change(project, "convert.path", "elsewhere")
    change(project, "collect.episodes_of", {})
    change(project, "collect.tasks", [])
    assert would_run(project) == (COLLECT | CHECK) - unused


def test_a_stage_refuses_digests_of_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dvc repro -s` does not run `code` first; a stage whose module changed since says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "check_params")  # as DVC does
    code, edited = stage_code("check_params", load_params(ROOT / "params.yaml").modules), "svam/simulation/scenes.py"
    recorded = tmp_path / "data/code/check_params.txt"
    recorded.parent.mkdir(parents=True)
    for digest, said in ((code[edited], ""), ("0", f"not of the code that is here: {edited} differs; run `dvc repro code`")):
        recorded.write_text(code_text(code | {edited: digest}))
        done = invoke(app, tmp_path / "checked.txt", "--params", ROOT / "params.yaml")
        assert done.exit_code == bool(said) and said in " ".join(done.output.split())
