"""The trail: its entries and keys, its measurement on tiny parts and by hand, and what its tables conclude."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svam.analysis.foresight import Subject, load_model
from svam.episodes.store import EpisodeStore
from svam.experiments.records import Episode
from svam.experiments.trail import BranchTrail, Measured, Trail, TrailRecord, read, write
from svam.files import FileError
from svam.params import Foresight, ParamsError
from svam.report import trail as report
from svam.training.distill_data import GeneratedWindows
from svam.training.foresight_metrics import moved_patches
from tests.analysis.test_foresight_report_stage import write_run, write_store
from tests.experiments.test_comparison import RAW, write_params
from tests.stage_deps import ROOT
from tests.tiny_foresight import FRAMES, GRID

ENTRIES = {"as_it_is": [], "shorter": ["generate.steps=2"], "smaller": ["distill.width=48"]}


def make_trail(folder: Path, **compare: Any) -> Trail:
    """The project's own pipeline with `ENTRIES`, or other changes to `compare`."""
    write_params(folder, **({"trail": ENTRIES, "collection": "default"} | compare))
    for name in ("dvc.yaml", "svam", "stages"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    with chdir(folder):
        return Trail(folder / "records")


def goals(reached: int, count: int = 20, seed: int = 0) -> tuple[Episode, ...]:
    """Episodes of one task, the first of which reach their goals."""
    return tuple(Episode(task="a", index=k, seed=seed + k, success=k < reached, steps=9) for k in range(count))


def make_record(
    name: str = "as_it_is", share: float = 0.5, episodes: int = 12, goals: tuple[Episode, ...] = (), **changes: Any
) -> TrailRecord:
    """A record whose foresight leaves `share` of the error, about, in two windows of each episode."""
    count = 2 * episodes
    noise = np.random.default_rng(1).normal(0.0, 0.02, count)
    names = list(report.SOURCES)
    branch = BranchTrail(
        own={"decoupler": {"explained": 0.9}}, repeat=[1.0] * count,
        error={n: [share + e if n == "foresight" else 0.25 for e in noise] for n in names}, repeat_by_frame=[4.0, 0.0],
        error_by_frame={n: [1.0, 2.0] for n in names}, moved=[4] * count, cosine={n: [3.0] * count for n in names},
    )  # fmt: skip
    measured = Measured(
        windows="w", episodes=[k // 2 for k in range(count)], pixels=[0.5] * count, pixels_repeat=[2.0] * count,
        branches={"geometric": branch}, machine="2 x a", goals=goals,
    )  # fmt: skip
    values: dict[str, Any] = {"name": name, "arguments": [], "key": "k", "revision": "r", "measured": measured}
    return TrailRecord(**(values | changes))


def test_entries_are_the_collection_and_one_change(tmp_path: Path) -> None:
    trail = make_trail(tmp_path, collection="some", collections={"some": ["collect.episodes=7"]})
    first, _, second = trail.entries
    assert first.line == "dvc exp run --temp -n trail-as_it_is-some -S collect.episodes=7 distill"
    assert second.arguments == ("collect.episodes=7", "distill.width=48") and second.experiment == "trail-smaller-some"
    assert trail.folder == tmp_path / "records/some/trail"
    assert make_trail(tmp_path).entries[0].experiment == "trail-as_it_is"


def test_policies_are_of_other_goals(tmp_path: Path) -> None:
    before = make_trail(tmp_path).keys
    trail = make_trail(tmp_path, trail_policies=["smaller"], trail_seed=5, ablation_episodes=3)
    entry = trail.entries[2]
    assert [e.policy for e in trail.entries] == [False, False, True]
    assert (
        entry.command[-1] == "train_policy"
        and "evaluate.episodes=3" in entry.arguments
        and "train_policy.seed=1" in entry.arguments
    )
    # What is only measured on windows stays as it is; a policy counts with its goals.
    keys = trail.keys
    assert {name for name in keys if keys[name] != before[name]} == {"smaller"}
    assert (
        make_trail(tmp_path, trail_policies=["smaller"], trail_seed=6, ablation_episodes=3).keys["smaller"] != keys["smaller"]
    )
    longer = ["train_policy.evaluate_every=3", "distill.width=48"]
    changed = make_trail(
        tmp_path, trail=ENTRIES | {"smaller": longer}, trail_policies=["smaller"], trail_seed=5, ablation_episodes=3
    )
    assert changed.keys["smaller"] != keys["smaller"]


def test_the_projects_own_trail_changes_one_thing_each(tmp_path: Path) -> None:
    with chdir(ROOT):
        trail = Trail(tmp_path)
    assert len(set(trail.keys.values())) == len(trail.entries) > 5
    base = trail.settings(trail.entries[0]).model_dump()
    for entry in trail.entries[1:]:
        changed = {k for k, v in trail.settings(entry).model_dump().items() if v != base[k]}
        changed -= {"train_policy", "evaluate"}  # of those that have a policy
        assert len(changed) == 1 and changed <= {"distill", "cache_teacher", "generate", "finetune_video"}


def test_keys_are_of_what_decoupling_rests_on(tmp_path: Path) -> None:
    before = make_trail(tmp_path).keys
    # A policy's params, and its code, are no part of it; what is distilled is.
    assert make_trail(tmp_path, trail={"as_it_is": ["train_policy.evaluate_every=3"]}).keys["as_it_is"] == before["as_it_is"]
    assert len(set(before.values())) == 3
    with chdir(tmp_path):
        trail = make_trail(tmp_path)
        write(trail.folder, make_record(key=before["as_it_is"]))
        write(trail.folder, make_record("smaller", key="another"))
        assert [record.name for record in trail.finished()] == ["as_it_is"]
        assert [entry.name for entry in trail.left()] == ["shorter", "smaller"]
        assert [entry.name for entry in trail.left(["sm*"])] == ["smaller"]
        with pytest.raises(FileError, match=r"--only none: no entry of compare\.trail has such a name"):
            trail.left(["none"])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, r"compare\.trail is empty, expected at least one entry"),
        (
            {"none": ["train_policy.context=[one_step]", "distill.branches=[]"]},
            r"compare\.trail\.none: distill\.branches is \[\], expected at least one",
        ),
        ({"odd": ["distill.breadth=3"]}, r"argument 'distill\.breadth=3', expected key=value with a key of this file"),
        ({"odd": ["distill.width=0"]}, r"distill\.width"),
    ],
)
def test_wrong_entries_are_named(tmp_path: Path, entries: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        make_trail(tmp_path, trail=entries)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trail_policies": ["none"]}, r"compare\.trail_policies names 'none', expected entries of compare\.trail"),
        (
            {"trail_policies": ["smaller"], "trail_seed": RAW["seed"]},
            r"compare\.trail_seed is 1, as seed; expected another number, since nothing may be chosen on the goals",
        ),
    ],
)
def test_wrong_policies_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        make_trail(tmp_path, **changes)


def test_records_are_read_back_and_checked(tmp_path: Path) -> None:
    file = write(tmp_path, make_record(goals=goals(5)))
    assert read(file) == make_record(goals=goals(5)) != make_record()
    assert file.read_text().count("\n") < 50
    file.write_text(file.read_text().replace('"pixels"', '"pictures"'))
    with pytest.raises(FileError, match=r"as_it_is\.json: not the record of a trail: measured\.pixels: Field required"):
        read(file)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    root = tmp_path_factory.mktemp("trail")
    store = write_store(root / "episodes.zarr")
    write_run(root, store)
    windows = GeneratedWindows(root / "generated.zarr")
    model = load_model(windows, root / "backbones", root, ["geometric"])
    return Subject(windows, EpisodeStore.open(root / "episodes.zarr"), model, ["geometric"], Foresight(batch=5), 0)


def test_measured_against_the_recorded_future(subject: Subject) -> None:
    own = {"geometric": {"decoupler": {"explained": 0.5}, "moved_share": 0.1, "target": "generated"}}
    found = report.measure(subject, own)
    branch, windows = found.branches["geometric"], subject.windows
    assert branch.own == {"decoupler": {"explained": 0.5}}
    assert found.episodes == subject.held_out_episodes.tolist() and len(branch.repeat) == len(windows.test) == 6
    assert set(branch.error) == set(branch.cosine) == set(branch.error_by_frame) == set(report.SOURCES)
    # The same by hand, all windows at once: the decoupler on the stored features.
    truth = subject.truth(windows.test)
    expected = report.teacher_on(subject, "geometric", truth[:, 1:])
    scale = expected.std(axis=(0, 1, 2, 3), dtype=np.float64)
    moved = moved_patches(truth, GRID)[:, 1:]
    assert branch.moved == moved.sum(axis=(1, 2, 3)).tolist() and sum(branch.moved) > 0
    made = report.teacher_on(subject, "geometric", windows.frames.read(windows.test)[:, 1:])
    repeat = report.teacher_on(subject, "geometric", truth[:, :1])
    for guess, error in ((made, branch.error["generation"]), (np.broadcast_to(repeat, made.shape), branch.repeat)):
        by_hand = np.square((guess - expected) / scale).mean(axis=-1).sum(axis=(1, 2, 3))
        np.testing.assert_allclose(error, by_hand, rtol=1e-3)
    for name, errors in branch.error.items():
        assert np.sum(errors) == pytest.approx(np.sum(branch.error_by_frame[name]), rel=1e-4)
        assert len(branch.error_by_frame[name]) == FRAMES - 1 and np.isfinite(errors).all()


def test_what_foresees_exactly_explains_everything(subject: Subject) -> None:
    truth = report.teacher_on(subject, "geometric", subject.truth(subject.windows.test)[:, 1:])
    unit = report.unit_of(subject, "geometric")
    moved = np.ones(truth.shape[:-1], bool)
    assert report.squared_error(truth, truth, unit).max() == 0.0
    np.testing.assert_allclose(report.cosine(truth, truth, moved, unit), moved[0].sum(), rtol=1e-6)
    # As far on the other side of the centre.
    mirrored = np.asarray(2 * unit.centre - truth, np.float32)
    np.testing.assert_allclose(report.cosine(mirrored, truth, moved, unit), -moved[0].sum(), rtol=1e-3)
    assert report.cosine(truth, truth, ~moved, unit).max() == 0.0


@pytest.mark.parametrize(("share", "finding"), [(0.3, "better"), (0.7, "worse"), (0.5, "not distinguishable")])
def test_differences_are_of_what_is_explained(share: float, finding: str) -> None:
    found = report.difference(make_record("other", share), make_record(), "geometric", 1, 1000)
    assert found is not None and found.finding == finding and found.value == pytest.approx(0.5 - share, abs=0.01)
    assert found.low <= found.value <= found.high


def test_few_episodes_and_other_windows_conclude_nothing() -> None:
    few = report.difference(make_record("other", 0.1, episodes=3), make_record(episodes=3), "geometric", 1, 1000)
    assert few is not None and few.finding == "not distinguishable"
    other = make_record("other", 0.1)
    other = other.model_copy(update={"measured": other.measured.model_copy(update={"windows": "v"})})
    assert report.difference(other, make_record(), "geometric", 1, 1000) is None
    assert "of other windows" in report.markdown([make_record(), other], 3, 1000)


def test_machines_are_named() -> None:
    other = make_record("other")
    other = other.model_copy(update={"measured": other.measured.model_copy(update={"machine": "a GPU"})})
    assert "Run on 2 x a.\n" in report.markdown([make_record()], 1, 1000)
    assert "Run on 2 x a: `as_it_is`; a GPU: `other`.\n" in report.markdown([make_record(), other], 2, 1000)


def test_the_page(tmp_path: Path) -> None:
    page = report.write(tmp_path, [make_record(), make_record("smaller", 0.7)], 3, 1000)
    assert (tmp_path / "trail.md").read_text() == page
    assert "2 of 3 entries" in page and "24 held-out windows of 12 episodes" in page
    base, smaller = (next(line for line in page.splitlines() if line.startswith(f"| `{n}`")) for n in ("as_it_is", "smaller"))
    cells = [cell.strip() for cell in base.strip("|").split("|")]
    # Of its own target; foresight; nothing to compare with; generation, another seed's, one step, recorded; cosines; pixels.
    assert cells[1] == "0.900" and abs(float(cells[2]) - 0.5) < 0.02 and cells[3:5] == ["", ""]
    assert cells[5:] == ["0.750"] * 8
    assert "worse" in smaller
    # A frame that does not change has nothing to explain.
    assert "| geometric: foresight (distilled, one step) | 0.750 |  |" in page
    with pytest.raises(FileError, match="no entry of compare.trail is finished"):
        report.markdown([], 3, 1000)


def test_success_is_compared_with_the_first_that_acts() -> None:
    records = [
        make_record(),
        make_record("a", goals=goals(4)),
        make_record("b", goals=goals(18)),
        make_record("c", goals=goals(5)),
    ]
    page = report.markdown([*records, make_record("d", goals=goals(5, seed=1))], 5, 1000)
    section = page[page.index("## Success") : page.index("## By the frame's distance")]
    lines = {
        line.split("`")[1]: [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| `")
    }
    assert list(lines) == ["a", "b", "c", "d"]
    assert lines["a"][1].startswith("20% [") and lines["a"][2:] == ["", "", "", ""]
    assert lines["b"][2].startswith("+70.0 [") and lines["b"][3] == "14 : 0" and lines["b"][5] == "`b` ahead"
    assert float(lines["b"][4]) == pytest.approx(2 * 2 * 0.5**14, rel=1e-2)  # of two comparisons
    assert lines["c"][3] == "1 : 0" and lines["c"][5] == "not distinguishable" and lines["d"][5] == "of other goals"
    assert "## Success" not in report.markdown(records[:1], 5, 1000)
