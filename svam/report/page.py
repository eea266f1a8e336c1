"""`index.html`: a run on one page, which opens from a disk without a network and runs no script.

What other stages or commands leave beside it (films, the figures of `foresight`, comparisons) it points to and does not copy.
Everything that users write, such as sentences of their data, is shown as text. Equal inputs on one machine give equal bytes.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from numpy.typing import NDArray
from PIL import Image

from svam.code import library_versions
from svam.device import processor
from svam.files import FileError, read_json, read_yaml, sha256_tree
from svam.params import Backbone, Distill, FinetuneVideo, Optimiser, Params, TrainPolicy
from svam.report import tables
from svam.report.defaults import ELSEWHERE, changed_params
from svam.report.films import SLOWED, Played, policy_episodes
from svam.report.published import beside_published, published_table
from svam.report.readme import sentences

FOLDER = Path(__file__).parent
TITLE = "S-VAM: results of a run"
# Tables, but neither HTML nor pictures of the text's own: both are shown as they are written.
MARKDOWN = MarkdownIt("js-default").disable("image")
TEMPLATES = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
DIGITS = 16
"""Of a SHA-256, as it is shown."""
GPUS = Path("/proc/driver/nvidia/gpus")

Picture = tuple[str, str]
"""Its address, relative to the page, and what it shows."""
CAPTIONS: Mapping[str, Any] = read_yaml(Path(__file__).with_suffix(".yaml"))


@dataclass(frozen=True)
class Section:
    """A part of a page. text: HTML. table: cells by line, the first of which is the header. films: addresses of a film and of
    the picture that stands for it until it is played, and a caption. elsewhere: pictures that may be missing."""

    title: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()
    films: Sequence[tuple[str, str, str]] = ()
    pictures: Sequence[Picture] = ()
    elsewhere: Sequence[Picture] = ()


@dataclass(frozen=True)
class Beside:
    """The folders of the page, and of what it points to: films, what `foresight` wrote, comparisons. posters: film -> a picture
    of it (H, W, 3) uint8."""

    page: Path
    films: Path
    foresight: Path
    compare: Path
    posters: Mapping[str, NDArray[np.uint8]]

    def address(self, folder: Path, name: str) -> str:
        """Of a file in another folder, relative to the page."""
        return Path(os.path.relpath(folder / name, self.page)).as_posix()


def write_page(
    folder: Path, run: tables.RunMetrics, params: Params, beside: Beside, results: Path, manifest: Path
) -> None:  # fmt: skip
    """Write `index.html` and `posters/*.png` into the folder that has the run's figures, which will stand at `beside.page`.

    Args:
        results: what `evaluate` wrote. manifest: of the S-VAM folder.

    Raises:
        FileError: a file that it reads is missing or damaged.
    """
    episodes = policy_episodes(results)
    numbers, comparisons = beside.address(beside.foresight, "foresight.md"), beside.address(beside.compare, "index.html")
    _, _, texts = divided(tables.markdown(run))
    if run.success:
        texts["Success in closed loop"] += MARKDOWN.render(beside_published(run))
    sections = [Section(title, text, pictures=figures_of(folder, title)) for title, text in texts.items()]
    if beside.posters:
        sections.insert(1, films_section(folder, beside, episodes))
    sections += [
        Section(
            "What foresight holds",
            MARKDOWN.render(f"By the stage `foresight`; the numbers are in [foresight.md]({numbers})."),
            elsewhere=[(beside.address(beside.foresight, f"{name}.png"), said) for name, said in CAPTIONS["foresight"].items()],
        ),
        training_section(folder, params, manifest),
        cost_section(run, episodes),
        run_section(params, results),
        Section("Published results on CALVIN", MARKDOWN.render(published_table("calvin"))),
        Section("Variants compared", MARKDOWN.render(
            f"At equal budgets and paired by goal, where `make compare` has run: [comparisons]({comparisons})."
        )),
    ]  # fmt: skip
    (folder / "index.html").write_text(rendered(TITLE, introduction(run, params.report.note), sections), encoding="utf-8")


def rendered(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """A page. introduction: Markdown."""
    page = TEMPLATES.get_template("page.html")
    return page.render(title=title, introduction=MARKDOWN.render(introduction), sections=sections) + "\n"


def divided(markdown: str) -> tuple[str, str, dict[str, str]]:
    """The title of a Markdown page, what follows it as Markdown, and heading of the second level -> HTML of what is below."""
    top, *parts = markdown.split("\n## ")
    title, _, head = top.removeprefix("# ").partition("\n")
    return title, head, {name: MARKDOWN.render(text) for name, _, text in (part.partition("\n") for part in parts)}


def introduction(run: tables.RunMetrics, note: str) -> str:
    """What came out, in a few sentences of Markdown, under the note where there is one."""
    parts = [note] if note else []
    if run.success:
        rows = {
            run.row_name(row): tables.percentage(run.success[row]["macro"]) for row in tables.ROW_NAMES if row in run.success
        }
        parts.append("Success, mean of tasks: " + ", ".join(f"{name} **{value}**" for name, value in rows.items()) + ".")
    parts.append(sentences(tables.flat_metrics(run)))
    return "\n\n".join(parts)


def figures_of(folder: Path, title: str) -> list[Picture]:
    """The figures in the folder that belong to the section."""
    chosen = {name: caption for name, (section, caption) in CAPTIONS["figures"].items() if section == title}
    names = sorted((file.stem for file in folder.glob("*.png")), key=lambda name: (len(name), name))
    return [(f"{n}.png", caption) for kind, caption in chosen.items() for n in names if n.rstrip("0123456789_") == kind]


def films_section(folder: Path, beside: Beside, episodes: Mapping[str, Played]) -> Section:
    """The recorded rollouts; writes their posters."""
    films = []
    (folder / "posters").mkdir()
    for name, picture in beside.posters.items():
        Image.fromarray(picture).save(folder / f"posters/{name}.png")
        films.append((beside.address(beside.films, f"{name}.mp4"), f"posters/{name}.png", episodes[name].caption))
    text = (
        "The camera, and beside it what the policy foresaw, as the first three principal components of the features over the "
        "whole film: between two looks of the policy a panel plays the foreseen frames from the first to the last. "
        f"{SLOWED:g} times slower than the robot moves."
    )
    return Section("Rollouts", MARKDOWN.render(text), films=films)


def training_section(folder: Path, params: Params, manifest: Path) -> Section:
    """Curves, and what every part of the policy took and weighs."""
    lines = [["part", "steps", "samples", "MB", f"SHA-256 of its weights, {DIGITS} digits"]]
    listed = read_json(manifest)
    try:
        for part, files in listed["parts"].items():
            training = training_of(part, params)
            spent = ["imported", ""] if training is None else [
                f"{training.steps:,}", f"{training.steps * training.batch * training.accumulate:,}"
            ]  # fmt: skip
            weights = [record for name, record in files.items() if name.endswith(".safetensors")]
            size = sum(record["bytes"] for record in weights) / 1e6
            lines.append([part, *spent, f"{size:.1f}", " ".join(record["sha256"][:DIGITS] for record in weights)])
    except (AttributeError, KeyError, TypeError):
        raise FileError(f"{manifest}: not a manifest of parts, files, sizes and SHA-256; run train_policy again") from None
    return Section("Training", table=lines, pictures=figures_of(folder, "Training"))


def training_of(part: str, params: Params) -> Optimiser | None:
    """How a part of the S-VAM folder was trained; None for imported weights."""
    kind, _, branch = part.partition("_")
    sections: dict[str, TrainPolicy | FinetuneVideo | Distill]
    sections = {"policy": params.train_policy, "video": params.finetune_video, "decoupler": params.distill}
    if kind in sections:
        return sections[kind].training
    backbone: Backbone = getattr(params.prepare_backbones, branch or kind)
    return backbone.training if backbone.source == "in_domain" else None


def cost_section(run: tables.RunMetrics, episodes: Mapping[str, Played]) -> Section:
    """What an episode costs, and how long a call takes."""
    parts = []
    lines = [played.line for played in episodes.values() if played.protocol == "metaworld"]
    if lines:
        steps, calls = (sum(line[key] for line in lines) / len(lines) for key in ("steps", "policy_calls"))
        closed_loop = run.results["metaworld"]
        parts.append(
            f"An episode took {steps:.0f} steps, of at most {closed_loop['max_steps']}, and {calls:.1f} calls of the policy on "
            f"average; {closed_loop['execute']} actions of each call are executed."
        )
    parts.append(
        "Times are in no output, so that equal runs are equal bytes: `evaluate` prints the milliseconds of a call by part, and "
        "each stage its seconds; comparisons and benchmarks keep theirs."
    )
    return Section("Costs and latency", MARKDOWN.render("\n\n".join([*parts, published_table("latency")])))


def run_section(params: Params, results: Path) -> Section:
    """Params, the digest of the results, and the machine that wrote the page."""
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items() if name != "python")
    gpus = [file.read_text().split("\n")[0].partition(":")[2].strip() for file in sorted(GPUS.glob("*/information"))]
    changed = changed_params(params)
    text = (
        f"This page was written on {' and '.join([f'{os.cpu_count()} x {processor()}', *gpus])}, with Python "
        f"{platform.python_version()}, {versions}. The results have the SHA-256 {sha256_tree(results)[:DIGITS]} (first "
        f"{DIGITS} digits, of names and contents).\n\nOf the params, but for {', '.join(ELSEWHERE)}, which decide no number "
        f"here, {'these are not the default:' if changed else 'all have their defaults.'}"
    )
    return Section("What was run", MARKDOWN.render(text), table=[("param", "here", "default"), *changed] if changed else ())
