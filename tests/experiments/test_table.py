"""The paired statistics against what can be computed by hand, and the table that they become."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom
from typer.testing import CliRunner

from svam.experiments.__main__ import app
from svam.experiments.foreseen import foreseen_of, section
from svam.experiments.plan import FOLDER
from svam.experiments.records import EpisodeOutcome, Record, StageCost, read_records, write_records
from svam.experiments.statistics import Pairs, difference, hierarchical, holm, interval, mcnemar, only_one, paired, two_sided
from svam.experiments.systems import BEGIN, END
from svam.experiments.table import compared, labels_of, markdown, of_tasks, write, write_overview
from svam.files import FileError, read_yaml
from svam.report.published import PUBLISHED
from tests import ROOT

BUDGET: dict[str, str | int | float] = {"policy_steps": 4, "batch": 2, "demonstrations": 20, "data": "d.dir", "max_steps": 500}
STAGES = {"finetune_video": 1.0, "generate": 2.0, "distill@geometric": 3.0, "train_policy": 30.0, "evaluate": 40.0}


def make_record(variant: str = "svam", size: int = 5, seed: int = 1, wins: str = "1010", **changes: Any) -> Record:
    """A finished run whose episodes of one task succeeded as `wins` says."""
    episodes = [EpisodeOutcome(task="reach", index=i, seed=100 + i, success=c == "1", steps=9) for i, c in enumerate(wins)]
    values: dict[str, Any] = {
        "name": f"{variant}-{size}-seed{seed}", "variant": variant, "size": size, "seed": seed, "arguments": [],
        "revision": "r", "machine": "2 x processor", "parameters": 7, "policy": "p.dir", "latency": 20.0,
        "budget": BUDGET | {"episodes_per_task": size}, "episodes": episodes,
        "stages": {name: StageCost(work=name, seconds=seconds) for name, seconds in STAGES.items()},
    }  # fmt: skip
    return Record(**(values | changes))


def pairs(*outcomes: str, task: str = "reach") -> Pairs:
    """`pairs("10", "11")`: the variant alone reached the first goal, both the second."""
    return {task: np.array([[int(one) for one in outcome] for outcome in outcomes])}


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


def test_the_bootstrap() -> None:
    """Of one task it is binomial; tasks are kept apart; a goal is drawn with the outcomes of all seeds."""
    thirty = pairs(*["10"] * 30, *["11"] * 70)
    assert difference(thirty)[0] == pytest.approx(0.3)
    assert difference(thirty)[1:] == pytest.approx(binom.ppf([0.025, 0.975], 100, 0.3) / 100, abs=0.0101)
    assert difference(thirty) == difference(thirty)
    assert difference({**pairs(*["10"] * 20), **pairs(*["01"] * 20, task="push")}) == (0.0, 0.0, 0.0)


def test_the_hierarchical_bootstrap_draws_each_level() -> None:
    """Each of seeds, tasks and goals alone gives the deviation that it must; a goal is drawn with the outcomes of all seeds."""
    always, never = pairs(*["10"] * 20), pairs(*["00"] * 20)

    def both(one: Pairs, other: Pairs) -> Pairs:
        return {"reach": one["reach"], "push": other["reach"]}

    value, of_seeds = hierarchical([both(always, always), both(never, never)])
    assert value == 0.5 and of_seeds.std() == pytest.approx(0.5 / math.sqrt(2), abs=0.01) and set(of_seeds) == {0.0, 0.5, 1.0}
    value, of_tasks = hierarchical([both(always, never)] * 3)
    assert value == 0.5 and of_tasks.std() == pytest.approx(0.5 / math.sqrt(2), abs=0.01) and set(of_tasks) == {0.0, 0.5, 1.0}
    mixed = pairs(*["10", "00"] * 10)
    value, of_goals = hierarchical([mixed, mixed])
    assert value == 0.5 and of_goals.std() == pytest.approx(0.5 / math.sqrt(20), abs=0.005)
    assert interval(of_goals) == pytest.approx(binom.ppf([0.025, 0.975], 20, 0.5) / 20, abs=0.051)
    one, other = pairs(*["10"] * 10, *["00"] * 10), pairs(*["00"] * 10, *["10"] * 10)
    _, crossed = hierarchical([one, other])  # the second seed wins just where the first did not: only which is drawn counts
    drawn = crossed[np.abs(crossed - 0.5) < 1e-9]
    assert 0.4 * len(crossed) < len(drawn) < 0.65 * len(crossed)
    uneven, _ = hierarchical([{"reach": always["reach"], "push": pairs("00", "00")["reach"]}])
    assert uneven == 0.5, "a task counts once, however many its goals"
    np.testing.assert_allclose(hierarchical([mixed] * 2)[1], hierarchical([mixed] * 3)[1])  # for any number of seeds


def test_pipelines_are_drawn_before_their_seeds_and_goals() -> None:
    """A pipeline has goals of its own, which the draws of another do not share; of one pipeline nothing changes."""
    always, never, mixed = pairs(*["10"] * 20), pairs(*["00"] * 20), pairs(*["10", "00"] * 10)
    value, drawn = hierarchical([always, always, never, never], [7, 7, 8, 8])
    assert value == 0.5 and set(drawn) == {0.0, 0.5, 1.0} and drawn.std() == pytest.approx(0.5 / math.sqrt(2), abs=0.01)
    value, drawn = hierarchical([always, never, never], [7, 8, 8])
    assert value == 0.5 and set(drawn) == {0.0, 0.5, 1.0}, "a pipeline counts once, however many its seeds"
    value, drawn = hierarchical([always, never] * 2, [7, 7, 8, 8])  # only seeds differ, and each pipeline draws its own
    assert value == 0.5 and drawn.std() == pytest.approx(0.5 / math.sqrt(4), abs=0.01)
    value, drawn = hierarchical([mixed, mixed], [7, 8])
    assert value == 0.5 and drawn.std() == pytest.approx(0.5 / math.sqrt(40), abs=0.005), "twice as many goals"
    value, drawn = hierarchical([always | {"push": never["reach"]}, always | {"push": never["reach"]}], [7, 8])
    assert value == 0.5 and drawn.std() == pytest.approx(0.5 / math.sqrt(2), abs=0.01), "tasks are the same in all"
    np.testing.assert_array_equal(hierarchical([mixed, never], [3, 3])[1], hierarchical([mixed, never])[1])


def test_pipelines_may_have_tasks_of_their_own() -> None:
    """Of which each draws among its own, unlike tasks that all have; each must have as many, since all count alike."""
    always, never = np.ones((20, 2), np.int64) * (1, 0), np.zeros((20, 2), np.int64)
    value, drawn = hierarchical([{"reach": always, "push": never}, {"hammer": always, "sweep": never}], [7, 8])
    assert value == 0.5 and set(drawn) == {0.0, 0.25, 0.5, 0.75, 1.0} and drawn.std() == pytest.approx(0.25, abs=0.01)
    value, drawn = hierarchical([{"reach": always}, {"hammer": never[:5]}], [7, 8])
    assert value == 0.5 and set(drawn) == {0.0, 0.5, 1.0}
    with pytest.raises(FileError, match="pipelines of 1 and 2 tasks: expected as many in each"):
        hierarchical([{"reach": always}, {"hammer": always, "sweep": never}], [7, 8])


def test_the_bootstrap_p_is_two_sided_and_never_0() -> None:
    assert two_sided(np.full(9_999, 0.1)) == pytest.approx(2 / 10_000)
    assert two_sided(np.r_[np.full(75, -1.0), np.full(24, 1.0)]) == pytest.approx(2 * 25 / 100)
    assert two_sided(np.zeros(10)) == 1.0


def test_runs_are_paired_on_the_goals_that_they_share() -> None:
    shared = paired(make_record("no_semantic", wins="01"), make_record(wins="1100"))
    assert shared["reach"].tolist() == [[0, 1], [1, 1]]
    assert (difference(shared)[0], only_one(shared)) == (-0.5, (0, 1))


def test_unlike_runs_are_not_paired() -> None:
    record, variant = make_record(), make_record("vpp")
    for changed in ([e.model_copy(update={"seed": 1}) for e in variant.episodes],
                    [variant.episodes[0].model_copy(update={"index": 9}), *variant.episodes[:3]]):  # fmt: skip
        with pytest.raises(FileError, match="vpp-5-seed1 and svam-5-seed1 cannot be compared: expected the goals of one"):
            paired(variant.model_copy(update={"episodes": changed}), record)
    for key, value, both in (("policy_steps", 5, "5 and 4"), ("batch", 3, "3 and 2"), ("data", "e.dir", "e.dir and d.dir")):
        unlike = variant.model_copy(update={"budget": variant.budget | {key: value}})
        with pytest.raises(FileError, match=f"{key} is {both}, expected equal budgets"):
            paired(unlike, record)


def some_records() -> list[Record]:
    """S-VAM reaches 20 goals of 20; VPP 19 or 18; the observation-only policy 8."""
    reached = {"svam": 20, "vpp": 19, "diffusion_policy": 8}
    records = [make_record(name, wins="1" * n + "0" * (20 - n)) for name, n in reached.items()]
    records += [make_record("svam", seed=2, wins="1" * 20), make_record("vpp", seed=2, wins="1" * 18 + "00")]
    no_time = make_record("no_semantic", wins="1" * 10, latency=None, stages={"evaluate": StageCost(work="w", seconds=None)})
    return [*records, no_time, make_record("goal_frame", size=30, wins="10")]


def test_the_table_says_what_can_be_said() -> None:
    rows, (mean,), regimes = compared(some_records())
    by_run = {(row["variant"], row["seed"]): row for row in rows}
    assert [row["variant"] for row in rows][:4] == ["svam", "vpp", "diffusion_policy", "no_semantic"]
    # Four comparisons; 12 goals that S-VAM alone reached.
    assert by_run["diffusion_policy", 1]["p_corrected"] == pytest.approx(4 * 2 / 2**12)
    assert by_run["diffusion_policy", 1]["verdict"] == "S-VAM ahead"
    assert by_run["vpp", 1]["verdict"] == "not distinguishable" and by_run["vpp", 1]["p_corrected"] == 1.0
    assert by_run["svam", 1]["verdict"] == by_run["goal_frame", 1]["verdict"] == ""
    assert (mean["label"], mean["size"], mean["seeds"]) == ("VPP", 5, [1, 2])
    assert mean["difference"] == pytest.approx(-0.075) and mean["difference_low"] <= -0.075 <= mean["difference_high"]
    assert not regimes and not mean["primary"] and 0.0 < mean["p"] < 1.0
    page = markdown(rows, [mean], regimes, "A note.", ["2 x processor"])
    assert "\n\nA note.\n\n7 runs." in page
    assert "| VPP | 5 | 1 | 95 % [76, 99] of 20 | -5.0 [-15.0, +0.0] | 0 : 1 | 1 | not distinguishable |" in page
    assert "| Diffusion Policy | 5 | 1 | 40 % [22, 61] of 20 | -60.0 [-80.0, -40.0] | 0 : 12 | 0.00195 | S-VAM ahead |" in page
    assert "| SuSIE-like (goal picture) | 30 | 1 | 50 % [9, 91] of 2 |  |  |  |  |" in page  # no S-VAM beside it yet
    assert "| VPP | 7 | 4 | 2 | 1 | 5 | 30 | 40 | 20.0 |" in page
    assert "| w/o semantic | 7 | 4 | 2 | 0 | 0 | 0 | not measured | not measured |" in page
    assert "| VPP | 5 | 1, 2 | 37 and 40 of 40 | -7.5 [" in page and "10 or 20 pairs" in page
    (_, other), *_ = compared([make_record(wins="0" * 12), make_record("vpp", wins="1" * 12)])
    assert other["verdict"] == "VPP ahead" and (other["difference_low"], other["difference_high"]) == (1.0, 1.0)
    with pytest.raises(FileError, match="older-5-seed1: no variant is called 'older' any more"):
        compared([make_record("older")])


def test_regimes_have_a_reference_each_and_their_gaps_are_compared() -> None:
    """VPP is 10 goals of 20 behind in one regime and 2 in the other; what was named primary is not corrected."""
    wins = {("svam", "a"): 20, ("vpp", "a"): 10, ("vpp_frame", "a"): 18, ("svam", "b"): 12, ("vpp", "b"): 10}
    records = [
        make_record(variant, seed=seed, wins="1" * n + "0" * (20 - n), regime=regime, primary=(variant, regime) == ("vpp", "a"),
                    name=f"{variant}-{seed}-{regime}")
        for (variant, regime), n in wins.items()
        for seed in (1, 2)
    ]  # fmt: skip
    rows, means, regimes = compared(records)
    assert [row["label"] for row in rows[:5]] == [
        "S-VAM, a", "VPP, a", "VPP + current frame's teacher tokens, a", "S-VAM, b", "VPP, b",
    ]  # fmt: skip
    by_label = {mean["label"]: mean for mean in means}
    assert {label: round(mean["difference"], 6) for label, mean in by_label.items()} == {
        "VPP, a": -0.5, "VPP + current frame's teacher tokens, a": -0.1, "VPP, b": -0.1,
    }  # fmt: skip
    # Two goals of 20: none of them is drawn in .9 ** 20 of all resamples, which is half of p.
    assert [by_label[label]["p"] for label in by_label if label != "VPP, a"] == pytest.approx([4 * 0.9**20] * 2, abs=0.05)
    assert by_label["VPP, a"]["primary"] and by_label["VPP, a"]["p"] == pytest.approx(2 / 10_001)
    (change,) = regimes
    assert (change["label"], change["other"], round(change["difference"], 6)) == ("VPP, a", "b", -0.4)
    assert change["difference_high"] < 0.0 and change["p"] < 0.01
    page = markdown(rows, means, regimes, None, ["2 x processor"])
    assert "| VPP, a | 5 | 1, 2 | 20 and 40 of 40 | -50.0 [" in page and "| VPP, a | 5 | b | -40.0 [" in page
    assert "| 0.0002 (primary) | 0 |  |  |" in page and "number (2)" in page


def test_pipelines_have_a_reference_each_and_are_pooled() -> None:
    """Goals of two pipelines have nothing in common but their numbers; the data of one are not those of the other."""

    def of(pipeline: int, variant: str, wins: str) -> Record:
        changes = {"regime": "a", "pipeline": pipeline, "primary": variant == "vpp", "name": f"{variant}{pipeline}"}
        base = make_record(variant, wins=wins, **changes)
        goals = [episode.model_copy(update={"seed": episode.seed + 1000 * pipeline}) for episode in base.episodes]
        return base.model_copy(update={"episodes": goals, "budget": base.budget | {"data": f"{pipeline}.dir"}})

    records = [of(p, "svam", "1" * 20) for p in (0, 7)] + [of(p, "vpp", "1" * (10 + p) + "0" * (10 - p)) for p in (0, 7)]
    rows, (mean,), _ = compared(records)
    found = [(row["pipeline"], row["difference"]) for row in rows]
    assert found == [(0, None), (0, -0.5), (7, None), (7, pytest.approx(-0.15))]
    assert (mean["seeds"], mean["pipelines"], round(mean["difference"], 6)) == ([1], [0, 7], -0.325)
    assert -0.75 < mean["difference_low"] < -0.5 and mean["difference_high"] < 0.0
    page = markdown(rows, [mean], [], None, ["2 x processor"])
    assert "| VPP, a | 5 | 1 of pipeline 0 | 50 % " in page and "these are resampled first" in page
    assert "| VPP, a | 5 | 1 of pipeline 0, 7 | 27 and 40 of 40 | -32.5 [" in page
    alone = markdown(*compared(some_records()), None, ["2 x processor"])
    assert "pipeline" not in alone
    first = markdown(*compared(some_records()[:1]), None, ["2 x processor"])
    assert "\n\nThe comparisons rest on no pairs each. " in first, "of a study that has begun"


def test_pipelines_of_other_tasks_are_pooled_and_regimes_compared_where_both_ran() -> None:
    """Three pipelines, two of them of the same tasks; the other regime has run in two."""
    tasks = {1: ("push", "hammer"), 2: ("sweep", "assembly"), 3: ("push", "hammer"), 4: ("sweep", "assembly")}

    def of(pipeline: int, variant: str, wins: int, regime: str) -> Record:
        """The first `wins` of ten goals of each task are reached."""
        episodes = [
            EpisodeOutcome(task=task, index=i, seed=100 * pipeline + i, success=i < wins, steps=9)
            for task in tasks[pipeline]
            for i in range(10)
        ]
        primary = (variant, regime) == ("vpp", "a")
        changes = {"regime": regime, "pipeline": pipeline, "primary": primary, "name": f"{variant}{pipeline}{regime}"}
        return make_record(variant, episodes=episodes, **changes)

    records = [of(p, "svam", 10, regime) for p, regime in ((1, "a"), (2, "a"), (3, "a"), (1, "b"), (2, "b"))]
    records += [of(1, "vpp", 5, "a"), of(2, "vpp", 7, "a"), of(3, "vpp", 0, "a"), of(1, "vpp", 9, "b"), of(2, "vpp", 9, "b")]
    _, means, (change,) = compared(records)
    found = {mean["label"]: (mean["pipelines"], round(mean["difference"], 6), mean["harder"]["tasks"]) for mean in means}
    assert found == {"VPP, a": ([1, 2, 3], -0.6, 4), "VPP, b": ([1, 2], -0.1, 4)}
    assert (change["label"], change["other"]) == ("VPP, a", "b")
    assert change["difference"] == pytest.approx(-0.4 - -0.1), "of the pipelines 1 and 2"
    others = [of(p, variant, 10, "b") for p in (3, 4) for variant in ("svam", "vpp")]
    _, means, changes = compared([record for record in records if record.regime == "a"] + others)
    assert [mean["pipelines"] for mean in means] == [[1, 2, 3], [3, 4]] and not changes, "one in common says nothing of others"


def test_medium_and_hard_tasks_have_a_difference_of_their_own() -> None:
    """VPP is behind on a medium and on a hard task alone; the printed half-widths are those of the intervals."""
    wins = {"svam": "1" * 30, "vpp": "1" * 10 + "0" * 5 + "1" * 5 + "0" * 5 + "1" * 5}

    def record(variant: str, seed: int, tasks: tuple[str, str, str]) -> Record:
        """Ten goals of each task."""
        episodes = [
            EpisodeOutcome(task=tasks[i // 10], index=i, seed=i, success=won == "1", steps=9)
            for i, won in enumerate(wins[variant])
        ]
        return make_record(variant, seed=seed, episodes=episodes)

    runs = [record(variant, seed, ("reach", "sweep", "stick-push")) for variant in wins for seed in (1, 2)]
    rows, (mean,), _ = compared(runs)
    harder = mean["harder"]
    assert (round(mean["difference"], 6), harder["tasks"], round(harder["difference"], 6)) == (round(-1 / 3, 6), 2, -0.5)
    alone, values = hierarchical([{t: g for t, g in paired(runs[2 + s], runs[s]).items() if t != "reach"} for s in (0, 1)])
    assert (harder["difference"], harder["difference_low"], harder["difference_high"]) == (alone, *interval(values))
    widths = [f"{50 * (one['difference_high'] - one['difference_low']):.1f}" for one in (mean, harder)]
    line = next(line for line in markdown(rows, [mean], [], None, []).splitlines() if line.startswith("| VPP | 5 | 1, 2 |"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert [cells[5], cells[7], cells[9]] == [widths[0], "2", widths[1]] and cells[8].startswith("-50.0 [")
    easy = [record(variant, seed, ("reach", "door-open", "door-close")) for variant in wins for seed in (1, 2)]
    assert compared(easy)[1][0]["harder"] is None


def test_success_by_task_with_tiers_and_both_averages() -> None:
    """S-VAM reaches all but the very hard task, VPP half of the goals of each that it was tried on."""
    tasks = ("reach", "door-open", "sweep", "assembly", "disassemble")

    def of(variant: str, tried: tuple[str, ...], goals: int, **changes: Any) -> Record:
        reached = {
            (task, i): task != "disassemble" if variant == "svam" else i % 2 == 0 for task in tried for i in range(goals)
        }
        episodes = [EpisodeOutcome(task=t, index=i, seed=i, success=won, steps=9) for (t, i), won in reached.items()]
        return make_record(variant, episodes=episodes, **changes)

    head, *lines = of_tasks([of("svam", tasks, 10), of("svam", tasks, 10, seed=2), of("vpp", tasks[:3], 10)])
    assert head == ["task", "demonstrations a task", "S-VAM", "VPP"]
    assert lines == [
        ["door-open (easy)", "5", "100 % [84, 100] of 20", "50 % [24, 76] of 10"],
        ["reach (easy)", "5", "100 % [84, 100] of 20", "50 % [24, 76] of 10"],
        ["sweep (medium)", "5", "100 % [84, 100] of 20", "50 % [24, 76] of 10"],
        ["assembly (hard)", "5", "100 % [84, 100] of 20", ""],
        ["disassemble (hard)", "5", "0 % [0, 16] of 20", ""],
        ["mean of 2 easy", "5", "100 % [91, 100] of 40", "50 % [30, 70] of 20"],
        ["mean of 1 medium", "5", "100 % [84, 100] of 20", "50 % [24, 76] of 10"],
        ["mean of 2 hard", "5", "50 % [35, 65] of 40", ""],
        ["mean of 5 tasks", "5", "80 % [71, 87] of 100", ""],
        ["mean of 4 groups", "5", "75 %", ""],
    ]
    head, *lines = of_tasks([of("svam", ("own",), 10, regime="a"), of("svam", ("push", "own"), 30, regime="a", pipeline=1)])
    assert head == ["task", "regime", "demonstrations a task", "S-VAM"]
    assert [line[0] for line in lines] == ["push (hard)", "own", "mean of 1 hard", "mean of 2 tasks"]
    assert lines[1][1:] == ["a", "5", "100 % [91, 100] of 40"] and lines[-1][1:] == ["a", "5", "100 %"]
    page = markdown(*compared(some_records()), None, [], tasks=of_tasks(some_records()))
    assert "| mean of 1 easy | 5 | 100 % [91, 100] of 40 | 92 % [80, 97] of 40 | 40 % [22, 61] of 20 |" in page


def test_what_the_teachers_learn_from_stands_under_the_tables() -> None:
    said = "S-VAM's teachers learn from the simulator's depth and segmentation, which the inputs of VPP and Diffusion Policy"
    supervised, none = make_record(regime="a"), make_record("vpp", regime="b", labels=())
    assert labels_of([supervised]) == f"{said} do not see." and labels_of([none]) == ""
    assert labels_of([supervised, none]) == f"{said} do not see. Not so in b."
    rows, means, regimes = compared(some_records())
    page = markdown(rows, means, regimes, None, [], labels_of(some_records()))
    assert page.count(said) == 2 and "teachers learn" not in markdown(rows, means, regimes, None, [])
    assert page.index(said) > page.index("| Diffusion Policy |") and page.index("| VPP | 5 | 1, 2 |") < page.rindex(said)
    older = make_record().model_dump(exclude={"labels", "teachers"})
    assert Record.model_validate(older).labels == ("depth", "segmentation") and Record.model_validate(older).teachers == {}


def test_whether_teachers_are_accepted_stands_there_too() -> None:
    good, mixed = {"geometric": True, "semantic": True}, {"geometric": True, "semantic": False}
    alone = make_record(labels=(), teachers=good)
    assert labels_of([alone]) == "As teachers of a comparison, accepted: geometric and semantic."
    records = [
        make_record(regime="a", teachers=good),
        make_record(regime="b", teachers=mixed),
        make_record(regime="c", labels=()),
    ]
    assert labels_of(records).endswith(
        "Not so in c. As teachers of a comparison in a, accepted: geometric and semantic. As teachers of a comparison in b, "
        "accepted: geometric; not accepted: semantic."
    )


def test_records_come_back_and_become_four_files(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no records of finished experiments; `make compare` makes them"):
        write(tmp_path)
    write_records(tmp_path, some_records())
    assert read_records(tmp_path) == (None, sorted(some_records(), key=lambda record: record.name))
    assert write(tmp_path) == (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "<td>Diffusion Policy</td>" in (tmp_path / "index.html").read_text(encoding="utf-8")
    picture = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
    assert picture.shape[0] > 300 and picture.std() > 10
    file = tmp_path / "records.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace('"revision"', '"version"'), encoding="utf-8")
    with pytest.raises(FileError, match="records.jsonl: not records of experiments: Field required"):
        read_records(tmp_path)


def test_records_of_several_machines_are_put_together(tmp_path: Path) -> None:
    """Files one after the other; a run that was made twice is refused by name. Records older than a key are read."""
    for name, records in (("a", some_records()[:2]), ("b", some_records()[3:])):
        (tmp_path / name).mkdir()
        write_records(tmp_path / name, records)
    lines = [(tmp_path / name / "records.jsonl").read_text(encoding="utf-8") for name in "ab"]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    assert len(read_records(tmp_path)[1]) == 6 and write(tmp_path).startswith("# Variants compared")
    file.write_text("".join([*lines, lines[0]]), encoding="utf-8")
    with pytest.raises(FileError, match="records.jsonl: 2 lines are of the run svam-5-seed1, expected one; keep the one"):
        read_records(tmp_path)
    file.write_text(lines[0].replace('"pipeline":null,', "").replace(',"code":"","params":""', ""), encoding="utf-8")
    assert '"pipeline"' not in file.read_text(encoding="utf-8") and '"code"' not in file.read_text(encoding="utf-8")
    assert [record.stages["evaluate"].code for record in read_records(tmp_path)[1]] == ["", ""]


def test_what_was_foreseen() -> None:
    """Of one branch without labels, as the teacher of pixels has none, and of one with them."""
    scores = {
        name: {"explained": share} for name, share in (("decoupler", 0.75), ("decoded_one_step", 0.5), ("other_noise", 0.9))
    }
    labelled = {"real": {"gripper": 0.8, "mean": 0.7}, "generated": {"gripper": 0.25, "mean": 0.5}, "blurred": {"gripper": 0.1}}
    video = {"latent_error_share_of_repeat": 0.61, "error_share_of_repeat": 0.42, "generated_mse": 0.1}
    without = scores | {"teacher": {"reference": {}}}
    found = foreseen_of(video, {"geometric": without, "semantic": scores | {"teacher": {"dense": labelled}}})
    assert found == {
        "video": {"latents": 0.61, "pixels": 0.42},
        "gripper": {"real": 0.8, "generated": 0.25},
        "geometric": {"decoupler": 0.75, "decoded_one_step": 0.5, "other_noise": 0.9},
        "semantic": {"decoupler": 0.75, "decoded_one_step": 0.5, "other_noise": 0.9},
    }
    assert foreseen_of(video, {}) == {}
    records = [make_record(regime="a", pipeline=2, foreseen=found), make_record("vpp", regime="a", pipeline=2), make_record()]
    page = "\n".join(section(records))
    run = "| a, 5 demonstrations a task, seed 1 of pipeline 2 | "
    assert f"{run}0.61 | 0.42 |" in page and f"{run}IoU of the gripper | 0.80 | 0.25 |  |" in page
    assert f"{run}geometric | 75% | 50% | 90% |" in page and page.count(run) == 4
    assert section(records[1:]) == []
    unlabelled = foreseen_of(video, {"geometric": without})
    assert "against its labels" not in "".join(section([make_record(foreseen=unlabelled)]))


def test_the_studies_here_are_the_tables_of_their_records(tmp_path: Path) -> None:
    """Pages and CSV are what the command makes of the one file, and the finished study's begins with what it is not."""
    kept = ROOT / "data/compare"
    studies = [file.parent.name for file in sorted(kept.glob("*/table.md"))]
    pages = {}
    for study in studies:
        (tmp_path / study).mkdir()
        shutil.copy(kept / study / "records.jsonl", tmp_path / study)
        pages[study] = write(tmp_path / study)
    write_overview(tmp_path)
    names = [f"{study}/{name}" for study in studies for name in ("table.md", "table.csv", "index.html")]
    for name in (*names, "index.html"):
        assert (tmp_path / name).read_bytes() == (kept / name).read_bytes()
    page = pages["ambiguous"]
    assert page.startswith("# Variants compared\n\n**A finished study") and "no evidence about the method" in page
    assert len(read_records(tmp_path / "ambiguous")[1]) == 25


def test_every_published_system_has_a_way_here(tmp_path: Path) -> None:
    """The page's figures are those of the report and of a comparison, whose own table says the same; without one it says so."""
    page, study = tmp_path / "README.md", ROOT / "data/compare/ambiguous"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["systems", "--page", str(page), "--compared", str(study)])
    assert done.exit_code == 0, done.output
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [lines[0], lines[1], lines[-2], lines[-1]] == ["before", BEGIN, END, "after"]
    assert lines[-3].startswith("S-VAM's teachers learn from the simulator's depth and segmentation")
    ways = {line.split(" | ")[0].removeprefix("| "): line for line in lines[4:-4]}
    assert (
        set(ways) == {*PUBLISHED["metaworld"]["rows"], *PUBLISHED["calvin"]["rows"]} == set(read_yaml(FOLDER / "systems.yaml"))
    )
    assert "| 68.2 | 3.58 | variant `vpp`: `train_policy.context=[one_step] distill.branches=[]`" in ways["VPP"]
    assert "| SuSIE-like (goal picture) | 5 | 1 | 32 % [24, 42] of 102 | -13.7 " in (study / "table.md").read_text(
        encoding="utf-8"
    )
    assert "| 32% of 102 goals, -13.7 points to S-VAM |" in ways["SuSIE"]
    assert ways["S-VAM"].endswith("goals of the default run; compared: 46% |") and ways["pi0"].endswith("serve_policy.py` |  |")
    done = CliRunner().invoke(app, ["systems", "--page", str(page)])
    own = (ROOT / "svam/evaluation/README.md").read_text(encoding="utf-8")
    assert done.exit_code == 0 and page.read_text(encoding="utf-8")[len("before\n") :].removesuffix("after\n") in own
    assert len([line for line in own.splitlines() if line.endswith("| not run yet |")]) == 3
    done = CliRunner().invoke(app, ["systems", "--page", str(page), "--report", str(tmp_path)])
    assert done.exit_code == 1 and "not a report with success rates and a comparison" in done.output
