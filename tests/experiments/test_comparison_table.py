"""The paired statistics against what can be computed by hand, and the table that they become."""

from __future__ import annotations

import csv
import math
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom
from typer.testing import CliRunner

from svam.experiments.loop import count_demonstrations, trained_parameters
from svam.experiments.plan import REFERENCE
from svam.experiments.records import Episode, Record, write_record
from svam.experiments.statistics import Pairs, bootstrap, holm, mcnemar, paired
from svam.files import FileError, read_json, write_json
from svam.report.__main__ import app
from svam.report.comparison import COLUMNS, cautions, csv_rows, lines_of, markdown, over_seeds
from svam.report.latencies import Latency, in_turn, kept_in, representatives
from tests.experiments.test_comparison import make_record
from tests.models.test_svam import build
from tests.stage_deps import ROOT
from tests.tiny import save_all_parts
from tests.tiny_foresight import make_store


def pairs(*outcomes: str, task: str = "reach") -> Pairs:
    """`pairs("10", "11")`: the variant alone reached the first goal, both the second."""
    return Pairs({task: [(a == "1", b == "1") for a, b in outcomes]})


def test_mcnemar_by_hand() -> None:
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1.0
    for n in range(1, 16):
        for k in range(n + 1):
            tail = sum(math.comb(n, i) for i in range(min(k, n - k) + 1))
            assert mcnemar(k, n - k) == pytest.approx(min(1.0, 2 * tail / 2**n))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_difference_and_its_parts() -> None:
    found = pairs("10", "10", "01", "11", "00")
    assert (found.only_variant, found.only_reference) == (2, 1)
    assert found.difference == pytest.approx(1 / 5)


def test_the_bootstrap_of_one_task_is_binomial() -> None:
    found = pairs(*["10"] * 30, *["11"] * 70)
    assert bootstrap([found]) == pytest.approx(binom.ppf([0.025, 0.975], 100, 0.3) / 100, abs=0.0101)
    assert bootstrap([found]) == bootstrap([found])


def test_the_bootstrap_keeps_tasks_apart() -> None:
    """All goals of one task won and all of the other lost: nothing varies within a task."""
    both = Pairs({**pairs(*["10"] * 20).tasks, **pairs(*["01"] * 20, task="push").tasks})
    assert bootstrap([both]) == (0.0, 0.0)


def test_the_bootstrap_draws_a_goal_with_all_its_seeds() -> None:
    """The second seed wins just where the first did not: their mean is one half at every goal."""
    one, other = pairs(*["10"] * 20, *["00"] * 20), pairs(*["00"] * 20, *["10"] * 20)
    assert bootstrap([one, other]) == (0.5, 0.5)
    low, high = bootstrap([one, one])
    assert low < 0.4 and high > 0.6


def test_ablations_are_paired_on_the_goals_that_they_share() -> None:
    found = paired(make_record("no_semantic", wins="01"), make_record(wins="1100"))
    assert found.tasks == {"reach": [(False, True), (True, True)]}


def other_goals(record: Record) -> Record:
    return record.model_copy(update={"episodes": [e.model_copy(update={"seed": e.seed + 1}) for e in record.episodes]})


def test_unlike_runs_are_not_paired() -> None:
    record, variant = make_record(), make_record("vpp")
    with pytest.raises(
        FileError, match="vpp-5-seed1 and svam-5-seed1 are not to be compared: they were evaluated on different"
    ):
        paired(other_goals(variant), record)
    further = [Episode(task="reach", index=9, seed=109, success=True, steps=1), *variant.episodes[:3]]
    with pytest.raises(FileError, match="different goals"):
        paired(variant.model_copy(update={"episodes": further}), record)
    for key, value, found in (("policy_steps", 5, "5 and 4"), ("batch", 3, "3 and 2"), ("data", "e.dir", "e.dir and d.dir")):
        unlike = variant.model_copy(update={"budget": variant.budget.model_copy(update={key: value})})
        with pytest.raises(FileError, match=f"{key} is {found}, expected equal budgets"):
            paired(unlike, record)


def some_records() -> list[Record]:
    """S-VAM reaches 20 goals of 20; VPP 19 or 18; the observation-only policy 8."""
    reached = {"svam": 20, "vpp": 19, "diffusion_policy": 8}
    records = [make_record(name, wins="1" * n + "0" * (20 - n)) for name, n in reached.items()]
    records += [make_record("svam", seed=2, wins="1" * 20), make_record("vpp", seed=2, wins="1" * 18 + "00")]
    return [*records, make_record("no_semantic", wins="1" * 10), make_record("goal_frame", size=30, wins="10")]


def test_the_table_says_what_can_be_said() -> None:
    lines = lines_of(some_records())
    found = {line.record.name: line for line in lines}
    assert [line.record.name for line in lines][:4] == [
        "svam-5-seed1",
        "vpp-5-seed1",
        "diffusion_policy-5-seed1",
        "no_semantic-5-seed1",
    ]
    # Four comparisons; 12 goals that S-VAM alone reached.
    assert found["diffusion_policy-5-seed1"].p == pytest.approx(4 * 2 / 2**12)
    assert found["diffusion_policy-5-seed1"].verdict == "S-VAM ahead"
    assert found["vpp-5-seed1"].verdict == "not distinguishable" and found["vpp-5-seed1"].p == 1.0
    assert found["svam-5-seed1"].verdict == found["goal_frame-30-seed1"].verdict == ""
    ((label, size, seeds, mean, (low, high)),) = over_seeds(lines)
    assert (label, size, seeds) == ("VPP", 5, [1, 2]) and mean == pytest.approx(-0.075) and low <= mean <= high
    page = markdown(lines, {"svam": Latency(20.0, 1.0), "vpp": Latency(15.0, 0.752)}, 25)
    assert "7 of 25 planned runs are finished" in page
    assert "| VPP | 5 | 1 | 95 % [76, 99] of 20 | -5.0 [-15.0, +0.0] | 0 : 1 | 1 | not distinguishable |" in page
    assert "| Diffusion Policy | 5 | 1 | 40 % [22, 61] of 20 | -60.0 [-80.0, -40.0] | 0 : 12 | 0.00195 | S-VAM ahead |" in page
    assert "no S-VAM of this size and seed yet" in page
    assert "| VPP | 7 | 4 x 2 | 1 | 2 | 30 | 40 | 15.0 (0.75) |" in page
    assert "| w/o semantic | 7 | 4 x 2 | 1 | 2 | 30 | 40 | not measured |" in page
    assert "so few seeds carry no claim about training in general" in page and "100 pairs cannot see" in page
    assert "10 to 20 pairs" in " ".join(cautions(lines))


def test_the_other_way_round() -> None:
    line = lines_of([make_record(wins="0" * 12), make_record("vpp", wins="1" * 12)])[1]
    assert line.verdict == "VPP ahead" and line.interval == (1.0, 1.0)


def test_rows_for_other_programs() -> None:
    rows = csv_rows(lines_of(some_records()), {"vpp": Latency(15.0, None)})
    row = next(row for row in rows if row["variant"] == "vpp" and row["seed"] == 2)
    assert tuple(row) == COLUMNS
    assert (row["successes"], row["pairs"], row["only_variant"], row["only_svam"]) == (18, 20, 0, 2)
    assert row["latency_milliseconds"] == 15.0 and row["difference"] == -0.1
    assert rows[0]["pairs"] is None and rows[0]["latency_milliseconds"] is None


def test_the_command_writes_all_three(tmp_path: Path) -> None:
    with chdir(ROOT):
        nothing = CliRunner().invoke(app, ["compare", "--folder", str(tmp_path), "--no-latency"])
        assert nothing.exit_code == 1
        for record in some_records():
            write_record(tmp_path / "default", record)
        arguments = ["compare", "--folder", str(tmp_path), "--collection", "default", "--no-latency"]
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    tmp_path = tmp_path / "default"
    assert (tmp_path / "table.md").read_text(encoding="utf-8") in done.output
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        assert [row["verdict"] for row in csv.DictReader(file)].count("not distinguishable") == 3
    picture = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
    assert picture.shape[0] > 300 and picture.std() > 10


def test_an_unknown_variant_is_one_sentence() -> None:
    with pytest.raises(FileError, match="older-5-seed1: no variant is called 'older' any more"):
        lines_of([make_record("older")])


def test_latencies_take_turns(tmp_path: Path) -> None:
    store = make_store(tmp_path / "episodes.zarr")
    folders = save_all_parts(tmp_path, store)
    models = {REFERENCE: build(store, folders), "diffusion_policy": build(store, folders, context=["observation"])}
    found = in_turn(models, rounds=2)
    assert found[REFERENCE]["share"] == 1.0 and found["diffusion_policy"]["share"] > 0
    assert "decouplers" in found[REFERENCE]["milliseconds"] and "decouplers" not in found["diffusion_policy"]["milliseconds"]
    assert in_turn({"diffusion_policy": models["diffusion_policy"]}, rounds=1)["diffusion_policy"]["share"] is None


def test_latencies_are_kept_for_the_policies_that_they_name(tmp_path: Path) -> None:
    file = tmp_path / "latency.json"
    wanted = representatives([make_record("vpp", size=10), make_record("vpp", size=5, policy="q.dir"), make_record("svam")])
    assert wanted["vpp"].policy == "q.dir"
    assert kept_in(file, wanted) == {}
    times = {"milliseconds": {"total": 3.0}, "share": None}
    write_json(file, {"variants": {"svam": {"policy": "p.dir", **times}, "vpp": {"policy": "p.dir", **times}}})
    assert kept_in(file, wanted) == {"svam": Latency(3.0, None)}
    write_json(file, {"variants": {"svam": {"policy": "p.dir"}}})
    with pytest.raises(FileError, match="not the latencies of a comparison"):
        kept_in(file, wanted)
    assert read_json(file)["variants"]


def test_parameters_and_demonstrations(tmp_path: Path) -> None:
    store = make_store(tmp_path / "episodes.zarr")
    folders = save_all_parts(tmp_path, store)
    for context in (["geometric", "semantic", "one_step"], ["observation"]):
        model = build(store, folders, context=context)
        model.save(tmp_path / "svam")
        expected = sum(parameter.numel() for parameter in model.network.parameters())
        assert trained_parameters(tmp_path / "svam/policy/model.safetensors") == expected > 0
    tasks = [store.task_of(int(episode)) for episode in store.episodes("train")]
    assert count_demonstrations(tmp_path / "episodes.zarr", 1) == len(set(tasks))
    assert count_demonstrations(tmp_path / "episodes.zarr", 1000) == len(tasks) > len(set(tasks))
