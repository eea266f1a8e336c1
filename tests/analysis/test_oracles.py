"""The oracle table: its rows for real on tiny parts, resumed by row; its intervals and verdict on chosen errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from svam.analysis.oracles import (
    FRAME_AND_F,
    FUTURE,
    FUTURE_AND_F,
    ROWS,
    S_VAM,
    EpisodeErrors,
    F,
    Row,
    compared,
    markdown,
    oracles,
)
from svam.files import read_json, write_json
from svam.training import train_policy
from tests.toy import TRAINING, invoke, write_toy_params

TASKS = ("push", "pull")


def call(parts: Path, out: Path, *more: str, **changes: Any) -> Any:
    command = typer.Typer()
    command.command()(oracles)
    policy = {"observation_stride": 3, "training": TRAINING | {"steps": 2, "warmup": 1}}
    write_toy_params(out.parent / "params.yaml", {"generate": {"up_blocks": 1, "grid": 2}, "train_policy": policy, **changes})
    places = {"episodes": "episodes.zarr", "backbones": "backbones", "video": "video", "decouplers": "decouplers"}
    options = [f"--{name}={parts / place}" for name, place in places.items()]
    own = [f"--params={out.parent / 'params.yaml'}", f"--cache={out.parent / 'cache'}"]
    return invoke(command, out, *options, *own, *more)


def test_all_rows_and_then_only_what_is_missing(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where states of unfinished runs lie
    out = tmp_path / "oracles"
    done = call(parts, out, f"--row={F}", f"--row={FUTURE}")
    assert done.exit_code == 0 and "2 of 8 rows" in done.output, done.output
    assert "No verdict yet" not in done.output and "No verdict: fewer than 8 held-out episodes." in done.output
    first = (out / f"{FUTURE}.json").read_bytes()
    contexts: list[list[str]] = []
    trained = train_policy.fit

    def watched(module: Any, *arguments: Any, **options: Any) -> Any:
        contexts.append(list(module.config.context))
        return trained(module, *arguments, **options)

    monkeypatch.setattr(train_policy, "fit", watched)
    done = call(parts, out)
    assert done.exit_code == 0 and "8 of 8 rows" in done.output, done.output
    assert sorted(map(sorted, contexts)) == sorted([
        ["observation"], ["observation"], ["observation", "one_step"], ["geometric", "one_step", "semantic"], ["generated"],
        ["one_step", "recorded"],
    ])  # fmt: skip
    result = read_json(out / "oracles.json")
    assert sorted(result["rows"]) == sorted(ROWS) and result["tasks"] == sorted(TASKS) and result["episodes"] == 2
    record = read_json(out / f"{F}.json")
    assert (record["steps"], record["observations"], len(record["episodes"])) == (2, 16, 2)
    total, count = (sum(e[key] for e in record["episodes"]) for key in ("total", "count"))
    # Two episodes of 12 steps, four observations each, of chunks of 8 that end with the episode: 8 + 8 + 6 + 3 actions of 3.
    assert count == 2 * 25 * 3 and result["rows"][F]["value"] == pytest.approx(total / count, abs=1e-6)
    page = (out / "oracles.md").read_text(encoding="utf-8")
    assert all(f"| {label} |" in page for label in ROWS.values()) and "Not there yet" not in page
    assert page.count("S-VAM's teachers learn from the simulator's depth and segmentation") == 2

    (out / f"{FUTURE}.json").unlink()
    contexts.clear()
    done = call(parts, out)
    assert contexts == [["recorded"]] and (out / f"{FUTURE}.json").read_bytes() == first
    assert not (tmp_path / ".ckpt").exists() and not list(tmp_path.glob("*.lock"))


def test_rows_of_other_work_are_refused(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out, row = tmp_path / "oracles", make_row(F, np.ones(2))
    write_json(out / f"{F}.json", row.model_dump(mode="json"))
    for more, changes, sentence in (
        ((), {}, f"{F}.json: made with other params, data, models or code than those here"),
        (("--row=future",), {}, "--row future: no such row; those are observation, frame_tokens, one_step"),
        (("--steps=1",), {}, "with --steps 1: train_policy.training: warmup (1) must be smaller than steps (1)"),
        ((), {"distill": {"branches": []}, "train_policy": {"context": [F]}}, "distill.branches is [], so that no foresight"),
    ):
        done = call(parts, out, *more, **changes)
        assert done.exit_code == 1 and sentence in done.output.replace("\n", " "), done.output
    (out / f"{F}.json").write_text('{"row": 3}')
    done = call(parts, out)
    assert done.exit_code == 1 and "one_step.json: row is 3; expected a text" in done.output.replace("\n", " ")


def make_row(name: str, errors: np.ndarray[Any, Any]) -> Row:
    """A row of these mean errors by episode, of ten action values each."""
    episodes = [
        EpisodeErrors(episode=100 + i, task=TASKS[i % 2], total=10 * float(error), count=10) for i, error in enumerate(errors)
    ]
    return Row(row=name, work="w", steps=5, observations=9, parameters=7, episodes=episodes)


@pytest.mark.parametrize(("shift", "beside", "said", "finding"), [
    (-0.1, -0.1, "beat F by themselves, and beside F they beat those of the current frame: with these teachers, foresight has",
     "better"),
    (0.1, -0.1, "do not clearly beat F by themselves, but beside F they beat those of the current frame: with these teachers, "
     "foresight has something to win.", "worse"),
    (0.0, 0.0, "do not clearly beat F by themselves, and beside F they do not clearly beat those of the current frame: with "
     "these teachers, no distillation can win.", "not distinguishable"),
])  # fmt: skip
def test_the_verdict_follows_from_paired_intervals(shift: float, beside: float, said: str, finding: str) -> None:
    """Episodes differ by far more than the rows do: only paired differences can tell."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.5, 3.0, 40)
    shifts = {F: 0.0, FRAME_AND_F: 0.05, FUTURE: shift, FUTURE_AND_F: 0.05 + beside, S_VAM: 0.05 + shift}
    rows = {name: make_row(name, hard + own + rng.normal(0, 0.02, 40)) for name, own in shifts.items()}
    result = compared(rows)
    assert result["verdict"].startswith(f"The teachers' tokens of the recorded future {said}")
    assert f"is {finding} in comparison with the current frame's tokens." in result["verdict"]
    value = result["rows"][F]
    assert (
        value["value"] == pytest.approx(np.mean([e.total / e.count for e in rows[F].episodes]))
        and value["high"] - value["low"] > 0.3
    )
    line = next(line for line in result["differences"] if (line["row"], line["against"]) == (FUTURE, F))
    assert line["value"] == pytest.approx(shift, abs=0.02) and line["high"] - line["low"] < 0.05
    assert value["tasks"] == pytest.approx(
        [np.mean([e.total / 10 for e in rows[F].episodes if e.task == t]) for t in sorted(TASKS)]
    )
    page = markdown(rows, result)
    assert f"**{result['verdict']}**" in page and "Not there yet: trained convolutional encoder" in page
    assert "teachers learn" not in page
    few = compared({name: row.model_copy(update={"episodes": row.episodes[:7]}) for name, row in rows.items()})
    assert few["verdict"] == "No verdict: fewer than 8 held-out episodes."
    assert compared({F: rows[F]})["verdict"] == "No verdict yet: rows are missing."
