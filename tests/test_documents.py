"""The pages name what exists: every link, path, module, command of ours, make target, stage and parameter in them."""

from __future__ import annotations

import importlib.util
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from ruamel.yaml import YAML

from svam.episodes.options import available_sources
from svam.files import read_yaml
from svam.params import BenchmarkPart, Params
from tests import ROOT
from tests.toy import merged

PAGES = {p.relative_to(ROOT).as_posix(): p for p in [ROOT / "README.md", *sorted(ROOT.glob("s*/**/README.md"))]}
EXAMPLES = (
    ".dvc/", ".cache/", ".ckpt/", "data/benchmark/", "data/compare/", "svam/sources/<name>.py", "svam/simulation/<name>.py",
)  # fmt: skip
"""Paths that are there once something was run or written."""
FILES = (".py", ".png", ".md", ".json")
SVAM = ROOT / "svam"
_yaml = YAML(typ="safe", pure=True)
PIPELINE: dict[str, Any] = read_yaml(ROOT / "dvc.yaml")
OUTS = [
    re.sub(r"\$\{.*?\}.*", "", next(iter(out)) if isinstance(out, dict) else out)
    for stage in PIPELINE["stages"].values()
    for out in stage.get("outs", [])
]


def code_of(page: Path) -> list[str]:
    """What a page shows as code: inline spans, and the lines of shell blocks (indented by four) without their comments."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    blocks = [line.split("  #")[0].strip() for line in re.findall(r"^    (\S.*)$", text, re.M)]
    return [*blocks, *(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))]


def slug(heading: str) -> str:
    """The anchor that a heading gets on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_short(name: str) -> None:
    assert len(PAGES[name].read_text(encoding="utf-8").splitlines()) <= (200 if name == "README.md" else 150)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name].read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        page = (PAGES[name].parent / file).resolve() if file else PAGES[name]
        if "://" in target:
            continue
        headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M) if anchor else []
        if not page.exists() or (anchor and anchor not in map(slug, headings)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("name", PAGES)
def test_paths_exist(name: str) -> None:
    top = {p.name for p in ROOT.iterdir()} | {"data"}
    missing = []
    for code in code_of(PAGES[name]):
        for word in re.findall(r"(?<![\w./$-])[\w.-]+/[\w./<>*-]*|(?<![\w./])[\w<>]+\.(?:py|yaml|toml)\b", code):
            if word.startswith(EXAMPLES) or ("/" in word and word.split("/")[0] not in top):
                continue
            pattern = re.sub(r"<.*?>", "*", word.rstrip("/."))
            near = (PAGES[name].parent, ROOT, ROOT / "svam")
            there = any(any(folder.glob(pattern)) for folder in near) or ("/" not in word and any(SVAM.rglob(pattern)))
            if not there and not any(
                fnmatch(out, pattern) or word.startswith(out) or out.startswith(pattern.rstrip("*/")) for out in OUTS
            ):
                missing.append(word)
    assert not missing


@pytest.mark.parametrize("name", PAGES)
def test_commands_exist(name: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    missing = []
    for code in code_of(PAGES[name]):
        missing += [code for target in re.findall(r"\bmake ([a-z-]+)", code) if target not in targets]
        for stage in re.findall(r"\bdvc repro ([a-z_]+)", code):
            missing += [code] * (not any(known.startswith(stage) for known in PIPELINE["stages"]))
        for module, command in re.findall(r"\bpython -m ((?:svam|stages)[\w.]*)(?: ([a-z-]+))?", code):
            spec = importlib.util.find_spec(module)
            if spec is None:
                missing.append(code)
            elif spec.submodule_search_locations:
                app: typer.Typer = importlib.import_module(f"{module}.__main__").app
                known = {c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands}
                single = len(known) == 1 and app.registered_callback is None  # then the word is its first argument
                missing += [code] * (not single and command not in {"", *known})
    assert not missing


@pytest.mark.parametrize("name", PAGES)
def test_params_exist(name: str) -> None:
    missing = []
    for code in code_of(PAGES[name]):
        for key in re.findall(rf"(?<![\w./])(?:{'|'.join(Params.model_fields)})(?:\.(?:[a-z_]+|<[a-z]+>))+(?![\w/(])", code):
            level: list[Any] = [Params]
            for part in key.split(".") if not key.endswith(FILES) else []:
                sections = [section.model_fields for section in level if hasattr(section, "model_fields")]
                level = [f.annotation for fields in sections for k, f in fields.items() if k == part or part.startswith("<")]
            missing += [key] * (not level)
    assert not missing


def test_the_recipe_is_valid() -> None:
    block = PAGES["README.md"].read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    params = merged(read_yaml(ROOT / "params.yaml"), _yaml.load(block))
    assert Params.model_validate(params).convert.source == "lerobot"


def test_examples_of_options_are_valid() -> None:
    rows = re.findall(r"^\| \[`(\w+)`\].*?\|([^|]*)\|$", PAGES["svam/sources/README.md"].read_text(encoding="utf-8"), re.M)
    assert len(rows) == len(available_sources())
    for source, cell in rows:
        options = importlib.import_module(f"svam.sources.{source}").Options
        for example in re.findall(r"`(\{.*?\})`", cell):
            options.model_validate(_yaml.load(example))


def test_every_source_and_benchmark_has_its_line() -> None:
    for name in ("README.md", "svam/sources/README.md"):
        assert set(available_sources()) <= set(re.findall(r"^\| \[?`(.*?)`", PAGES[name].read_text(encoding="utf-8"), re.M))
    assert set(get_args(BenchmarkPart)) <= set(
        re.findall(r"^\| `(\w+)` \|", PAGES["svam/benchmark/README.md"].read_text(encoding="utf-8"), re.M)
    )
