"""`python -m svam.analysis.oracles OUT`: what could foresight win at all, before any closed loop?

The same policy, of the same observations, steps, seed and size, learns from one input after another: what the teachers see in
the current frame, in the future as it was recorded, in a multi-step generation; one-step features F; distilled foresight beside
F; a trained encoder. Measured is the error of its actions on held-out episodes. Perfect foresight is the recorded future: where
even that beats neither F nor, beside F, what the teachers see in the current frame, nothing that is distilled can.

Each input is a row, `OUT/<row>.json`, written when it is whole; the same command goes on with the rows that are missing, and
with the training that was killed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from pydantic import ValidationError

from svam.analysis.gap import CONFIDENCE, FEWEST_EPISODES, EpisodeBootstrap, Sums, value_of
from svam.code import stage_code
from svam.console import console, one_line_errors
from svam.contract import Frozen
from svam.device import prepare_torch
from svam.episodes.joined import open_store
from svam.episodes.store import EpisodeStore
from svam.errors import ParamsError, describe
from svam.files import FileError, locked, read_json, sha256_of_json, stated, write_json, write_text
from svam.models.foresight import part_folders
from svam.params import Params, load_params
from svam.report.tables import labels_sentence, learnt_labels, markdown_table, rounded
from svam.resume import Resume, identity, resumable_run
from svam.training.feature_cache import FeatureCache
from svam.training.train_policy import (
    TrainingData,
    absolute_errors,
    cached_features,
    choose_rows,
    load_foresight,
    observe,
    train,
)

F = "one_step"
FRAME, FRAME_AND_F, S_VAM, FUTURE, FUTURE_AND_F = "frame_tokens", "vpp_frame", "svam", "recorded", "recorded_one_step"
ROWS = {
    "observation": "trained convolutional encoder of the current frame",
    FRAME: "teachers' tokens of the current frame",
    F: "one-step features F (VPP)",
    FRAME_AND_F: "F + teachers' tokens of the current frame",
    S_VAM: "F + distilled foresight (S-VAM)",
    "generated": "teachers' tokens of a multi-step generation",
    FUTURE: "oracle: teachers' tokens of the recorded future",
    FUTURE_AND_F: "oracle: F + teachers' tokens of the recorded future",
}
"""Row -> what the policy sees, in the order of the table."""
AGAINST = [*((row, F) for row in ROWS if row != F), (FUTURE_AND_F, FRAME_AND_F), (S_VAM, FRAME_AND_F)]
"""The differences that are tested: every row's to F, and what foresight wins that is not the current frame's."""
RESAMPLES = 10_000


class EpisodeErrors(Frozen):
    """A held-out episode. total: absolute errors in physical units, summed over `count` action values of the sampled chunks."""

    episode: int
    task: str
    total: float
    count: int


class Row(Frozen):
    """A finished row. work: of what all rows of a table must have in common; steps, observations: of the policy's training;
    parameters: trained with it."""

    row: str
    work: str
    steps: int
    observations: int
    parameters: int
    episodes: list[EpisodeErrors]


def params_of(row: str, params: Params, steps: int | None, stride: int | None, file: Path) -> Params:
    """The params with the row's context, and the same training for every row: it ends after `steps`, and what is measured is
    the end, since a choice among checkpoints would be made on the episodes that are measured.

    Raises:
        ParamsError: the steps are no more than those of the warm-up.
    """
    contexts = {FRAME: ["observation"], FRAME_AND_F: [F, "observation"], FUTURE_AND_F: [FUTURE, F]}
    contexts[S_VAM] = [*params.distill.branches, F]
    values = params.model_dump()
    policy = values["train_policy"]
    policy["context"] = contexts.get(row, [row])
    policy["features"] = "cached"  # which rows share; a recorded future has no noise to draw anew
    policy["observation_encoder"] = "trained" if row == "observation" else "frozen"
    policy["training"]["steps"] = policy["evaluate_every"] = steps or policy["training"]["steps"]
    policy["observation_stride"] = stride or policy["observation_stride"]
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ParamsError(describe(error, f"{file}, with --steps {steps}")) from None


def measure_row(
    row: str, work: str, params: Params, store: EpisodeStore, folders: Mapping[str, Path], cache: FeatureCache,
    device: torch.device, resume: Resume,
) -> Row:  # fmt: skip
    """Train the row's policy, `params_of` it, and measure it on every n-th step of all held-out episodes, however few
    demonstrations it learns from."""
    section = params.train_policy
    foresight = load_foresight(section, params.generate, folders).frozen_on(device, params.machine.compile)
    svam = train(store, foresight, folders, section, cache, params.seed, device, None, resume)
    learnt = choose_rows(store, "train", section.observation_stride, section.episodes_per_task)
    rows = choose_rows(store, "held_out", section.observation_stride, None)
    observations = observe(store, rows, section.chunk, section.proprioception, params.seed)
    features = cached_features(store, foresight, folders, cache, section, rows, observations.instructions)
    data = TrainingData(observations, features, foresight, svam, device)
    errors, mask = np.zeros(len(rows)), data.mask.reshape(*data.mask.shape[:2], -1)  # one column stands for all dimensions
    for positions, error in absolute_errors(svam, data, section.training.batch, params.seed):
        errors[positions] = (error * mask[positions]).sum(axis=(1, 2), dtype=np.float64)
    features.close()
    counts, episodes = mask.sum(axis=(1, 2)) * (data.actions.shape[2] // mask.shape[2]), store.episode_of(rows)
    measured = [
        EpisodeErrors(
            episode=episode, task=store.task_of(episode), total=float(errors[episodes == episode].sum()),
            count=int(counts[episodes == episode].sum()),
        )
        for episode in np.unique(episodes).tolist()
    ]  # fmt: skip
    return Row(
        row=row, work=work, steps=section.training.steps, observations=len(learnt),
        parameters=sum(p.numel() for p in svam.network.parameters()), episodes=measured,
    )  # fmt: skip


class Bench:
    """What the rows of a table are measured with."""

    def __init__(self, params: Params, episodes: Path, folders: Mapping[str, Path], cache: Path) -> None:
        """folders: of the frozen parts, by their names."""
        self.device = prepare_torch(params.machine.device, params.threads, params.seed)
        self.store, self.folders, self.inputs = open_store(episodes), folders, [episodes, *folders.values()]
        self.cache = FeatureCache(cache, params.machine.cache_gb)

    def work(self, common: Params, branches: Sequence[str]) -> str:
        """A digest of what all rows must have in common. common: `params_of` F; branches: that were distilled."""
        deciding = {
            "params": [common.seed, common.threads, common.train_policy.model_dump(), common.generate.model_dump()],
            "branches": branches, "code": stage_code("train_policy", common.modules),
            "inputs": [identity(path) for path in self.inputs], "device": str(self.device),
        }  # fmt: skip
        return sha256_of_json(deciding)[:32]

    def measure_missing(self, out: Path, work: str, wanted: Mapping[str, Params]) -> None:
        """Measure those rows of `wanted`, each `params_of` it, that are not finished in `out`.

        Raises:
            FileError: as `read_rows`.
        """
        done = read_rows(out, work, wanted)
        for name, params in wanted.items():
            if name not in done:
                console.rule(ROWS.get(name, name))
                with resumable_run("train_policy", params, ["train_policy", "generate"], self.inputs, self.device) as resume:
                    record = measure_row(name, work, params, self.store, self.folders, self.cache, self.device, resume)
                    write_json(out / f"{name}.json", record.model_dump(mode="json"))


def read_rows(out: Path, work: str, names: Iterable[str] = tuple(ROWS)) -> dict[str, Row]:
    """The finished rows of a table, in its order.

    Raises:
        FileError: a file is no row, or is one of other params, data, models or code.
    """
    files = {row: out / f"{row}.json" for row in names}
    rows = {row: stated(Row, read_json(file), file) for row, file in files.items() if file.is_file()}
    for row in rows.values():
        if row.work != work:
            raise FileError(
                f"{files[row.row]}: made with other params, data, models or code than those here, so it cannot stand in their "
                "table; name another folder, or delete this one"
            )
    return rows


def compared(rows: Mapping[str, Row]) -> dict[str, Any]:
    """{episodes, level, tasks, rows: {row: {value, low, high, tasks: [...]}}, differences: [{row, against, value, low, high,
    finding}], verdict}: mean absolute errors with their 95 % intervals, and paired differences whose intervals hold for all of
    them together; both resample held-out episodes."""
    first = next(iter(rows.values())).episodes
    boot = EpisodeBootstrap(np.asarray([e.episode for e in first], dtype=np.int64), RESAMPLES, 0)
    tasks = sorted({e.task for e in first})
    sums = {row: sums_of(record.episodes) for row, record in rows.items()}
    samples = {row: boot.ratios(values) for row, values in sums.items()}
    values: dict[str, float] = {row: float(value_of(s) or 0.0) for row, s in sums.items()}
    lines = {}
    for row, record in rows.items():
        low, high = boot.interval(samples[row], 1)
        by_task = [value_of(sums_of([e for e in record.episodes if e.task == task])) for task in tasks]
        lines[row] = {"value": values[row], "low": low, "high": high, "tasks": by_task}
    pairs = [(row, other) for row, other in AGAINST if row in rows and other in rows]
    differences = []
    for row, other in pairs:
        low, high = boot.interval(samples[row] - samples[other], len(pairs))
        finding = "better" if high < 0 else "worse" if low > 0 else "not distinguishable"
        finding = "too few episodes" if boot.count < FEWEST_EPISODES else finding
        differences.append(
            {"row": row, "against": other, "value": values[row] - values[other], "low": low, "high": high, "finding": finding}
        )
    result = {"episodes": boot.count, "level": CONFIDENCE, "tasks": tasks, "rows": lines, "differences": differences}
    return result | {"verdict": verdict(differences)}


def sums_of(episodes: Sequence[EpisodeErrors]) -> Sums:
    """Errors over action values, by episode."""
    return Sums(*(np.asarray([getattr(e, name) for e in episodes], dtype=np.float64) for name in ("total", "count")))


def verdict(differences: Sequence[Mapping[str, Any]]) -> str:
    """What the intervals say of foresight: of perfect foresight, by itself and as a policy has it, beside F; and of what is
    distilled here."""
    findings = {(line["row"], line["against"]): line["finding"] for line in differences}
    if "too few episodes" in findings.values():
        return f"No verdict: fewer than {FEWEST_EPISODES} held-out episodes."
    pairs = ((FUTURE, F), (FUTURE_AND_F, FRAME_AND_F), (S_VAM, FRAME_AND_F))
    if not set(pairs) <= set(findings):
        return "No verdict yet: rows are missing."
    alone, beside, distilled = (findings[pair] for pair in pairs)
    said = ("beat" if finding == "better" else "do not clearly beat" for finding in (alone, beside))
    joined = ", and" if (alone == "better") == (beside == "better") else ", but"
    won = "foresight has something to win" if "better" in (alone, beside) else "no distillation can win"
    return (
        f"The teachers' tokens of the recorded future {next(said)} F by themselves{joined} beside F they {next(said)} those of "
        f"the current frame: with these teachers, {won}. Distilled foresight, in their place beside F, is {distilled} in "
        "comparison with the current frame's tokens."
    )


def markdown(rows: Mapping[str, Row], result: Mapping[str, Any], labels: str = "") -> str:
    """The page `oracles.md`. labels: printed below the tables of errors."""
    said = [labels] if labels else []
    shown = next(iter(rows.values()))
    inputs = [
        [ROWS[row], f"{line['value']:.4f} [{line['low']:.4f}, {line['high']:.4f}]", f"{rows[row].parameters:,}"]
        for row, line in result["rows"].items()
    ]
    tested = [
        [
            ROWS[line["row"]], ROWS[line["against"]], f"{line['value']:+.4f} ({line['low']:+.4f} to {line['high']:+.4f})",
            line["finding"],
        ]
        for line in result["differences"]
    ]  # fmt: skip
    by_task = [[ROWS[row], *(f"{value:.4f}" for value in line["tasks"])] for row, line in result["rows"].items()]
    missing = [ROWS[row] for row in ROWS if row not in rows]
    parts = [
        "# What foresight could win",
        f"**{result['verdict']}**",
        f"The same policy on one input after another: {shown.steps:,} steps on {shown.observations:,} observations, one "
        "training seed, nothing chosen by the held-out episodes. Mean absolute error of sampled action chunks in physical "
        f"units, on every n-th step of {result['episodes']} held-out episodes; 95 % intervals resample episodes, not training "
        "seeds. It is no success: only a closed loop measures that.",
        markdown_table(["the policy sees", "action error [95 %]", "trained parameters"], inputs),
        *said,
        *(["Not there yet: " + "; ".join(missing) + "."] if missing else []),
        "## Differences",
        f"Paired by episode; the intervals hold for all of them together at {result['level']:.0%}. F and what comes of it are "
        "read from a video model that was trained on the policy's own training episodes and not on the held-out ones; the "
        "recorded future knows no such difference.",
        markdown_table(["the policy sees", "instead of", "difference", "it is"], tested),
        *said,
        "## By task",
        markdown_table(["the policy sees", *result["tasks"]], by_task),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


Out = Annotated[Path, typer.Argument(help="Folder of the table, such as data/compare/oracles.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Of every policy; without it those of params.yaml.")]
Stride = Annotated[int | None, typer.Option(min=1, help="In place of train_policy.observation_stride.")]
ParamsFile = Annotated[Path, typer.Option("--params", help="Parameter file of the stages that have run.")]
Episodes = Annotated[Path, typer.Option(help="Episode store.")]
Backbones = Annotated[Path, typer.Option(help="The four backbones.")]
Video = Annotated[Path, typer.Option(help="Video model.")]
Cache = Annotated[Path, typer.Option(help="Feature cache.")]


@one_line_errors
def oracles(
    out: Out,
    row: Annotated[list[str] | None, typer.Option(help=f"Only this row, may be repeated: {', '.join(ROWS)}.")] = None,
    steps: Steps = None,
    stride: Stride = None,
    file: ParamsFile = Path("params.yaml"),
    episodes: Episodes = Path("data/episodes.zarr"),
    backbones: Backbones = Path("data/backbones"),
    video: Video = Path("data/models/video"),
    decouplers: Annotated[Path, typer.Option(help="A folder per branch.")] = Path("data/models/decouplers"),
    cache: Cache = Path(".cache/features"),
) -> None:
    """Train the same policy on one input after another, and compare the errors of its actions on held-out episodes."""
    unknown = sorted(set(row or []) - set(ROWS))
    if unknown:
        raise ParamsError(f"--row {unknown[0]}: no such row; those are {', '.join(ROWS)}")
    base = load_params(file)
    if not base.distill.branches:
        raise ParamsError(
            f"{file}: distill.branches is [], so that no foresight is there to compare; run distill with a branch"
        )
    wanted = {name: params_of(name, base, steps, stride, file) for name in row or ROWS}
    bench = Bench(base, episodes, part_folders(backbones, video, decouplers), cache)
    work = bench.work(params_of(F, base, steps, stride, file), base.distill.branches)
    with locked(out.with_name(f"{out.name}.lock")):
        bench.measure_missing(out, work, wanted)
        rows = read_rows(out, work)
        result = compared(rows)
        write_json(out / "oracles.json", rounded(result))
        labels = labels_sentence(learnt_labels(base.prepare_backbones.model_dump()))
        write_text(out / "oracles.md", markdown(rows, result, labels))
    console.print(f"{result['verdict']} {len(rows)} of {len(ROWS)} rows: {out}/oracles.md", soft_wrap=True)


if __name__ == "__main__":
    typer.run(oracles)
