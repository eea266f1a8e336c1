"""`python -m svam.analysis.regime OUT`: are policies trained well enough that their differences mean anything?

Two inputs without foresight, F and the teachers' tokens of the current frame, at several numbers of demonstrations and several
policy seeds, with the same steps. Whoever learns from more demonstrations must err less on held-out episodes: where that is not
so, policies are trained for too few steps, at too high a rate or with too little regularisation, and a comparison at such a
training says nothing of what they see. A training is chosen by this before anything is compared, on data of another seed than
those that are reported, and by neither S-VAM nor a closed loop.

Each policy is a row, `OUT/<input>-<demonstrations>-seed<seed>.json`, as `svam.analysis.oracles` has them: the same command goes
on with what is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from svam.analysis.gap import FEWEST_EPISODES, value_of
from svam.analysis.oracles import (
    FRAME,
    ROWS,
    Backbones,
    Bench,
    Cache,
    Episodes,
    F,
    Out,
    ParamsFile,
    Row,
    Steps,
    Stride,
    Video,
    params_of,
    read_rows,
    sums_of,
)
from svam.console import console, one_line_errors
from svam.errors import ParamsError
from svam.files import locked, write_json, write_text
from svam.models.foresight import part_folders
from svam.params import Params, load_params
from svam.report.tables import markdown_table, rounded

INPUTS = (F, FRAME)
SIZES, SEEDS = [5, 10, 30], [201, 202, 203]
FEWEST_SEEDS = 3


def name_of(row: str, size: int, seed: int) -> str:
    """What the row of an input, a number of demonstrations and a seed is called."""
    return f"{row}-{size}-seed{seed}"


def trained_on(params: Params, size: int | None, seed: int | None) -> Params:
    """The params with so many demonstrations of a task and this policy seed."""
    policy = params.train_policy.model_copy(update={"episodes_per_task": size, "seed": seed})
    return params.model_copy(update={"train_policy": policy})


def compared(rows: Mapping[str, Row], sizes: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """{episodes, demonstrations, rows: [{row, seed, errors, falls}], verdict}; errors: mean absolute, at each of `sizes`, which
    ascend."""
    lines: list[dict[str, Any]] = []
    for row in INPUTS:
        for seed in seeds:
            errors = [value_of(sums_of(rows[name_of(row, size, seed)].episodes)) or 0.0 for size in sizes]
            falls = all(more < fewer for fewer, more in pairwise(errors))
            lines.append({"row": row, "seed": seed, "errors": errors, "falls": falls})
    episodes = len(next(iter(rows.values())).episodes)
    said = f"from {' to '.join(map(str, sizes))} demonstrations of a task"
    against = "; ".join(f"{ROWS[line['row']]}, seed {line['seed']}" for line in lines if not line["falls"])
    verdict = f"Accepted: the held-out action error falls {said}, with both inputs and in each of {len(seeds)} seeds."
    if against:
        verdict = f"Not accepted: the held-out action error does not fall {said} with {against}."
    if len(seeds) < FEWEST_SEEDS:
        verdict = f"No verdict: fewer than {FEWEST_SEEDS} seeds."
    if episodes < FEWEST_EPISODES:
        verdict = f"No verdict: fewer than {FEWEST_EPISODES} held-out episodes."
    return {"episodes": episodes, "demonstrations": list(sizes), "rows": lines, "verdict": verdict}


def markdown(result: Mapping[str, Any], steps: int) -> str:
    """The page `regime.md`."""
    header = ["the policy sees", "seed", *(f"{size} demonstrations" for size in result["demonstrations"]), "falls"]
    lines = [
        [ROWS[line["row"]], str(line["seed"]), *(f"{error:.4f}" for error in line["errors"]), "yes" if line["falls"] else "no"]
        for line in result["rows"]
    ]
    text = (
        f"Mean absolute error of sampled action chunks in physical units, on every n-th step of {result['episodes']} held-out "
        f"episodes, after {steps:,} steps for every policy. A training under which more demonstrations do not help is none to "
        "compare inputs by."
    )
    return "\n\n".join(["# The policies' training", f"**{result['verdict']}**", text, markdown_table(header, lines)]) + "\n"


@one_line_errors
def regime(
    out: Out,
    size: Annotated[list[int] | None, typer.Option(min=1, help="Demonstrations of a task, repeated: 5, 10, 30.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Policy seed, repeated: 201, 202, 203.")] = None,
    steps: Steps = None,
    stride: Stride = None,
    file: ParamsFile = Path("params.yaml"),
    episodes: Episodes = Path("data/episodes.zarr"),
    backbones: Backbones = Path("data/backbones"),
    video: Video = Path("data/models/video"),
    cache: Cache = Path(".cache/features"),
) -> None:
    """Train policies without foresight on more and more demonstrations, and see whether their errors fall."""
    sizes, seeds = sorted(set(size or SIZES)), list(dict.fromkeys(seed or SEEDS))
    if len(sizes) == 1:
        raise ParamsError(f"--size {sizes[0]}: one number of demonstrations shows no fall; name at least two")
    base = load_params(file)
    wanted = {
        name_of(row, n, s): params_of(row, trained_on(base, n, s), steps, stride, file)
        for s in seeds for n in sizes for row in INPUTS
    }  # fmt: skip
    bench = Bench(base, episodes, part_folders(backbones, video), cache)
    counts = Counter(bench.store.task_of(episode) for episode in bench.store.acting_episodes("train").tolist())
    task, fewest = min(counts.items(), key=lambda item: item[1])
    if fewest < sizes[-1]:
        raise ParamsError(
            f"--size {sizes[-1]}: {episodes} has {fewest} demonstrations of {task} to learn from; record more "
            "(collect.episodes), or name smaller numbers"
        )
    common = params_of(F, trained_on(base, None, None), steps, stride, file)
    work = bench.work(common, [])
    with locked(out.with_name(f"{out.name}.lock")):
        bench.measure_missing(out, work, wanted)
        result = compared(read_rows(out, work, wanted), sizes, seeds)
        write_json(out / "regime.json", rounded(result))
        write_text(out / "regime.md", markdown(result, common.train_policy.training.steps))
    console.print(f"{result['verdict']} {out}/regime.md", soft_wrap=True)


if __name__ == "__main__":
    typer.run(regime)
