"""The choice of the policies' training: its rows for real on tiny parts, resumed by row; its verdict on chosen errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from svam.analysis import oracles
from svam.analysis.oracles import FRAME, ROWS, EpisodeErrors, F, Row
from svam.analysis.regime import INPUTS, compared, markdown, name_of, regime
from svam.files import read_json
from svam.training import train_policy
from tests.toy import TRAINING, invoke, write_toy_params

SIZES, SEEDS = (5, 10, 30), (1, 2, 3)


def call(parts: Path, out: Path, *more: str) -> Any:
    command = typer.Typer()
    command.command()(regime)
    policy = {"observation_stride": 3, "context": [F], "training": TRAINING | {"steps": 2, "warmup": 1}}
    generate = {"up_blocks": 1, "grid": 2}
    changes = {"generate": generate, "train_policy": policy, "distill": {"branches": []}}
    write_toy_params(out.parent / "params.yaml", changes)
    places = {"episodes": "episodes.zarr", "backbones": "backbones", "video": "video"}
    options = [f"--{name}={parts / place}" for name, place in places.items()]
    own = [f"--params={out.parent / 'params.yaml'}", f"--cache={out.parent / 'cache'}"]
    return invoke(command, out, *options, *own, *more)


def test_policies_differ_in_input_demonstrations_and_seed_alone(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with one demonstration of a task, all held-out episodes are measured; finished rows stay."""
    monkeypatch.chdir(tmp_path)  # where states of unfinished runs lie
    out, fits, measured = tmp_path / "regime", list[list[str]](), list[tuple[str, int | None]]()
    trained, chosen = train_policy.fit, oracles.choose_rows

    def watched(module: Any, *arguments: Any, **options: Any) -> Any:
        fits.append(list(module.config.context))
        return trained(module, *arguments, **options)

    def choose(store: Any, split: Any, stride: int, episodes: int | None) -> Any:
        measured.append((split, episodes))
        return chosen(store, split, stride, episodes)

    monkeypatch.setattr(train_policy, "fit", watched)
    monkeypatch.setattr(oracles, "choose_rows", choose)
    done = call(parts, out, "--size=1", "--size=2", "--seed=7")
    assert done.exit_code == 0 and "No verdict: fewer than 8 held-out episodes." in done.output, done.output
    assert fits == [[F], ["observation"]] * 2
    assert measured == [("train", 1), ("held_out", None)] * 2 + [("train", 2), ("held_out", None)] * 2
    names = [name_of(row, size, 7) for size in (1, 2) for row in INPUTS]
    rows = {name: read_json(out / f"{name}.json") for name in names}
    assert [rows[name]["observations"] for name in names] == [8, 8, 16, 16]  # four of each episode of two tasks
    assert {len(row["episodes"]) for row in rows.values()} == {2} and len({row["work"] for row in rows.values()}) == 1
    page = (out / "regime.md").read_text(encoding="utf-8")
    assert all(f"| {ROWS[row]} | 7 | " in page for row in INPUTS) and "after 2 steps" in page

    fits.clear()
    (out / f"{names[1]}.json").unlink()
    done = call(parts, out, "--size=1", "--size=2", "--seed=7")
    assert fits == [["observation"]] and read_json(out / f"{names[1]}.json") == rows[names[1]]
    assert call(parts, out, "--size=1", "--size=2", "--seed=8").exit_code == 0
    assert read_json(out / f"{name_of(F, 1, 8)}.json")["episodes"] != rows[name_of(F, 1, 7)]["episodes"]
    for more, sentence in (
        (("--size=3", "--size=1"), "--size 3: "),
        (("--size=3", "--size=1"), "to learn from; record more (collect.episodes), or name smaller numbers"),
        (("--size=2",), "--size 2: one number of demonstrations shows no fall; name at least two"),
    ):
        done = call(parts, out, *more)
        assert done.exit_code == 1 and sentence in done.output.replace("\n", " "), done.output


def some_rows(episodes: int = 8, **errors: float) -> dict[str, Row]:
    """Rows whose errors are 3, 2 and 1 for 5, 10 and 30 demonstrations, but where `errors` says otherwise by name."""
    names = {name_of(row, size, seed): 3.0 - SIZES.index(size) for row in INPUTS for size in SIZES for seed in SEEDS}
    return {
        name: Row(
            row=name, work="w", steps=5, observations=9, parameters=7,
            episodes=[EpisodeErrors(episode=i, task="push", total=10 * error, count=10) for i in range(episodes)],
        )
        for name, error in (names | errors).items()
    }  # fmt: skip


def test_a_training_is_accepted_where_errors_fall_in_each_seed() -> None:
    result = compared(some_rows(), SIZES, SEEDS)
    assert result["verdict"].startswith("Accepted: the held-out action error falls from 5 to 10 to 30 demonstrations of a task")
    assert result["rows"][0] == {"row": F, "seed": 1, "errors": [3.0, 2.0, 1.0], "falls": True} and len(result["rows"]) == 6
    for size, error in ((30, 2.0), (30, 4.0), (5, 1.5)):  # equal, risen, lower with few
        result = compared(some_rows(**{name_of(FRAME, size, 2): error}), SIZES, SEEDS)
        assert result["verdict"].startswith("Not accepted: ") and result["verdict"].endswith(f"with {ROWS[FRAME]}, seed 2.")
        assert sum(line["falls"] for line in result["rows"]) == 5
        assert f"**{result['verdict']}**" in markdown(result, 5) and f"| {ROWS[FRAME]} | 2 | " in markdown(result, 5)
    assert compared(some_rows(), SIZES, SEEDS[:2])["verdict"] == "No verdict: fewer than 3 seeds."
    assert compared(some_rows(episodes=7), SIZES, SEEDS)["verdict"] == "No verdict: fewer than 8 held-out episodes."
