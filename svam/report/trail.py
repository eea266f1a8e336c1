"""The trail's measurement and its tables: how near each kind of foresight comes to the future that was recorded.

`distill` measures a decoupler against its own target. Here everything, the target included, is measured against what the
teacher sees in the recorded frames, so that entries with other targets, features or decouplers can be compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from svam.analysis import gap
from svam.analysis.foresight import Subject, load_model
from svam.console import track
from svam.device import prepare_torch
from svam.episodes.store import EpisodeStore
from svam.evaluation import closed_loop
from svam.evaluation.scores import rate_of
from svam.experiments import experiments
from svam.experiments.keys import digest
from svam.experiments.records import Episode, machine
from svam.experiments.statistics import LEVEL, Pairs, bootstrap, holm, mcnemar, pairs_of
from svam.experiments.trail import BranchTrail, Measured, TrailRecord
from svam.files import FileError, read_json, scratch_folder, whole_file
from svam.models.svam import SVAM
from svam.params import Params
from svam.report.tables import markdown_table
from svam.training.distill_data import GeneratedWindows
from svam.training.foresight_metrics import moved_patches
from svam.training.one_step import OneStepFeatures

SOURCES = {
    "foresight": "foresight (distilled, one step)",
    "generation": "teacher on the generation",
    "other_seed": "teacher on another seed's generation",
    "one_step": "teacher on the decoded one-step prediction",
    "reconstruction": "teacher on the recorded future through the autoencoder",
}
"""What is compared with the teacher on the recorded future, in the order of the tables. Repeating the teacher on the observed
frame is the unit of all errors."""
OUTS = ("data/episodes.zarr", "data/generated.zarr", "data/backbones", "data/models/video")
POLICY = "data/svam"
Array = NDArray[np.float32]


def measure_experiment(revision: str, params: Params, seed: int | None) -> Measured:
    """Measure what an experiment made; its outputs are copied from DVC's cache for that time.

    `seed`: of the goals that its policy is evaluated on; None: it has no policy.

    Raises:
        FileError: DVC does not have them, or a file is damaged.
        MachineError: the policy is to be evaluated, and nothing renders here.
    """
    branches, scratch = params.distill.branches, scratch_folder("compare")
    scratch.mkdir(parents=True, exist_ok=True)
    policy = () if seed is None else (POLICY,)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        root = Path(name)
        for out in (*OUTS, *(f"data/models/decouplers/{branch}" for branch in branches), *policy):
            (root / out).parent.mkdir(parents=True, exist_ok=True)
            experiments.fetch(out, revision, root / out)
        return measure_outputs(root, params, seed)


def measure_outputs(root: Path, params: Params, seed: int | None) -> Measured:
    """Measure the outputs below `root`, which has them where `dvc.yaml` puts them; otherwise as `measure_experiment`."""
    device, branches = prepare_torch(params.machine.device, params.threads, params.seed), params.distill.branches
    windows = GeneratedWindows(root / "data/generated.zarr")
    model = load_model(windows, root / "data/backbones", root / "data/models", branches).to(device)
    store = EpisodeStore.open(root / "data/episodes.zarr")
    decouplers = root / "data/models/decouplers"
    own: dict[str, Any] = {branch: read_json(decouplers / branch / "metrics.json") for branch in branches}
    measured = measure(Subject(windows, store, model, branches, params.foresight, params.seed), own)
    if seed is None:
        return measured
    return measured.model_copy(update={"goals": play(SVAM.load(root / POLICY, device), store, params, seed)})


def play(policy: SVAM, store: EpisodeStore, params: Params, seed: int) -> tuple[Episode, ...]:
    """A policy's episodes in simulation, as `evaluate` plays them, with goals and noise drawn from `seed`."""
    outcomes = closed_loop.run(
        store, policy, params.evaluate, camera=policy.camera, proprioception=policy.needs_proprioception, seed=seed,
        workers=params.machine.workers,
    )["policy"]  # fmt: skip
    return tuple(
        Episode(task=o.plan.task, index=o.plan.index, seed=o.plan.seed, success=o.success, steps=o.steps) for o in outcomes
    )


def measure(subject: Subject, own: Mapping[str, Mapping[str, Any]]) -> Measured:
    """All sources and branches on the held-out windows. `own`: branch -> metrics.json of its decoupler."""
    windows = subject.windows
    pixels = gap.joined([
        {"error": gap.pixel_sums(windows.frames.read(numbers), truth := subject.truth(numbers), truth, windows.grid)["error"]}
        for numbers, _ in blocks(subject)
    ])["error"]  # fmt: skip
    return Measured(
        windows=digest(windows.rows[windows.test].tolist()), episodes=subject.held_out_episodes.tolist(),
        pixels=pixels.numerator.tolist(), pixels_repeat=pixels.denominator.tolist(),
        branches={branch: measure_branch(subject, branch, own[branch]) for branch in subject.branches},
        machine=torch.cuda.get_device_name() if subject.model.device.type == "cuda" else machine(),
    )  # fmt: skip


def blocks(subject: Subject) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(window numbers, their places among the held-out ones), some windows at a time."""
    test, size = subject.windows.test, max(1, subject.params.batch // subject.windows.frames_per_clip)
    places = np.arange(len(test), dtype=np.int64)
    return [(test[start : start + size], places[start : start + size]) for start in range(0, len(test), size)]


def teacher_on(subject: Subject, branch: str, clips: NDArray[np.uint8]) -> Array:
    """Teacher features (k, n, h, w, C) of clips (k, n, H, W, 3)."""
    flat = torch.from_numpy(np.ascontiguousarray(clips).reshape(-1, *clips.shape[2:]))
    parts = [subject.model.teacher_features(branch, part).cpu() for part in torch.split(flat, subject.params.batch)]
    found = torch.cat(parts).numpy()
    return found.reshape(*clips.shape[:2], *found.shape[1:])


class Unit(NamedTuple):
    """Of the teacher on the recorded future of all held-out windows: the mean at each position (h, w, C), and the deviation of
    each channel (C,)."""

    centre: NDArray[np.float64]
    scale: NDArray[np.float64]


def unit_of(subject: Subject, branch: str) -> Unit:
    """What errors and cosines are measured in; it does not depend on anything that was trained but the teacher."""
    total: NDArray[np.float64] | float = 0.0
    square: NDArray[np.float64] | float = 0.0
    count = 0
    for numbers, _ in blocks(subject):
        seen = teacher_on(subject, branch, subject.truth(numbers)[:, 1:]).astype(np.float64)
        total, square = total + seen.sum(axis=(0, 1)), square + np.square(seen).sum(axis=(0, 1, 2, 3))
        count += seen.shape[0] * seen.shape[1]
    centre = np.asarray(total) / count
    patches = centre.shape[0] * centre.shape[1]
    variance = np.asarray(square) / (count * patches) - np.square(centre.mean(axis=(0, 1)))
    return Unit(centre, np.sqrt(np.maximum(variance, 1e-12)))


def measure_branch(subject: Subject, branch: str, own: Mapping[str, Any]) -> BranchTrail:
    """One branch, see `BranchTrail`."""
    windows, model, store = subject.windows, subject.model, subject.store
    one_step = windows.features if windows.features is not None else OneStepFeatures(windows, store, model)
    unit = unit_of(subject, branch)
    moved: list[NDArray[np.int64]] = []
    errors: dict[str, list[NDArray[np.float64]]] = {}
    cosines: dict[str, list[NDArray[np.float64]]] = {}

    def foresee(numbers: NDArray[np.int64]) -> Array:
        reference = model.reference_features(branch, torch.from_numpy(store.frames(windows.rows[numbers, 0])))
        features = torch.from_numpy(one_step.read(numbers)).to(model.device).float()
        return np.asarray(model.decouple(branch, features, reference)[:, 1:].cpu().numpy())

    parts = blocks(subject)
    for numbers, places in track(parts, f"trail {branch}", len(parts)):
        truth = subject.truth(numbers)
        flat = torch.from_numpy(truth.reshape(-1, *truth.shape[2:]))
        reconstructed = model.reconstruct(flat).cpu().numpy().reshape(truth.shape)
        clips = {
            "generation": windows.frames.read(numbers), "other_seed": windows.other_noise_frames.read(places),
            "one_step": windows.one_step_frames.read(places), "reconstruction": reconstructed,
        }  # fmt: skip
        expected = teacher_on(subject, branch, truth[:, 1:])
        guesses = {name: teacher_on(subject, branch, clip[:, 1:]) for name, clip in clips.items()}
        guesses["foresight"] = foresee(numbers)
        guesses["repeat"] = np.broadcast_to(teacher_on(subject, branch, truth[:, :1]), expected.shape)
        where = moved_patches(truth, windows.grid)[:, 1:]
        moved.append(where.sum(axis=(1, 2, 3)))
        for name, guess in guesses.items():
            errors.setdefault(name, []).append(squared_error(guess, expected, unit))
            cosines.setdefault(name, []).append(cosine(guess, expected, where, unit))
    error = {name: np.concatenate(values) for name, values in errors.items()}
    return BranchTrail(
        own={name: metrics for name, metrics in own.items() if isinstance(metrics, dict) and "explained" in metrics},
        repeat=_short(error["repeat"].sum(axis=1)), repeat_by_frame=_short(error["repeat"].sum(axis=0)),
        error={name: _short(error[name].sum(axis=1)) for name in SOURCES},
        error_by_frame={name: _short(error[name].sum(axis=0)) for name in SOURCES},
        moved=np.concatenate(moved).tolist(),
        cosine={name: _short(np.concatenate(cosines[name])) for name in SOURCES},
    )  # fmt: skip


def squared_error(guess: Array, truth: Array, unit: Unit) -> NDArray[np.float64]:
    """(k, n) of features (k, n, h, w, C): the mean over channels in units of their variance, summed over patches."""
    return np.asarray(np.square((guess - truth) / unit.scale).mean(axis=-1, dtype=np.float64).sum(axis=(2, 3)))


def cosine(guess: Array, truth: Array, moved: NDArray[np.bool_], unit: Unit) -> NDArray[np.float64]:
    """(k,) of features (k, n, h, w, C): the cosine after subtracting the centre, summed over patches `moved` (k, n, h, w)."""
    a, b = guess - unit.centre, truth - unit.centre
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray(((a * b).sum(axis=-1) / np.maximum(norms, 1e-12) * moved).sum(axis=(1, 2, 3), dtype=np.float64))


def _short(values: NDArray[np.float64]) -> list[float]:
    """Six digits of each, which is more than is shown."""
    return [float(f"{value:.6g}") for value in values]


def explained(trail: BranchTrail, source: str) -> gap.Sums:
    """The share of "repeat" that a source's error is (1 minus it is explained), to be divided or resampled."""
    return gap.Sums(np.asarray(trail.error[source], np.float64), np.asarray(trail.repeat, np.float64))


class Difference(NamedTuple):
    """Of the share that foresight explains, to the first entry's: value, interval (all of them hold together), finding."""

    value: float
    low: float
    high: float
    finding: str


def difference(record: TrailRecord, base: TrailRecord, branch: str, comparisons: int, resamples: int) -> Difference | None:
    """`record` minus `base`, resampled by episode; None where their windows or branches are not the same."""
    ours, theirs = record.measured, base.measured
    if ours.windows != theirs.windows or branch not in ours.branches or branch not in theirs.branches:
        return None
    boot = gap.Resampled(np.asarray(ours.episodes, np.int64), resamples, 0)
    pair = [explained(measured.branches[branch], "foresight") for measured in (ours, theirs)]
    value = (gap.value_of(pair[1]) or 0.0) - (gap.value_of(pair[0]) or 0.0)
    low, high = boot.interval(boot.ratios(pair[1]) - boot.ratios(pair[0]), comparisons)
    finding = "not distinguishable"
    if boot.count >= gap.FEWEST_EPISODES and (low > 0 or high < 0):
        finding = "better" if low > 0 else "worse"
    return Difference(value, low, high, finding)


def _machines(records: Sequence[TrailRecord]) -> str:
    """What ran the entries."""
    names = dict.fromkeys(record.measured.machine for record in records)
    if len(names) == 1:
        return f"Run on {next(iter(names))}."
    on = {name: ", ".join(f"`{r.name}`" for r in records if r.measured.machine == name) for name in names}
    return "Run on " + "; ".join(f"{name}: {entries}" for name, entries in on.items()) + "."


def _share(sums: gap.Sums) -> str:
    value = gap.value_of(sums)
    return "" if value is None else f"{1.0 - value:.3f}"


def markdown(records: Sequence[TrailRecord], planned: int, resamples: int) -> str:
    """The trail as one Markdown page. The first record is what the others are compared with.

    Raises:
        FileError: there is no record.
    """
    if not records:
        raise FileError("no entry of compare.trail is finished; `python -m svam.report trail` runs them")
    base, branches = records[0], list(dict.fromkeys(branch for r in records for branch in r.measured.branches))
    comparisons = max(1, (len(records) - 1) * len(branches))
    windows, episodes = len(base.measured.episodes), len(set(base.measured.episodes))
    parts = [
        "# The trail: what limits foresight",
        f"{len(records)} of {planned} entries of `compare.trail`, each of which changes one thing, on {windows} held-out "
        f"windows of {episodes} episodes, frames after the observed one. What is explained is 1 minus the squared error as a "
        "share of that of repeating the observed frame; against the recorded future unless it says otherwise, so that entries "
        f"with other targets can be compared. Differences to `{base.name}` are bootstrapped over episodes ({resamples} times) "
        f"and hold for all {comparisons} of them together at {gap.LEVEL:.0%}. {_machines(records)}",
    ]
    for branch in branches:
        parts += [f"## {branch.capitalize()} foresight", branch_table(records, branch, comparisons, resamples)]
    parts += success(records)
    parts += ["## By the frame's distance", f"`{base.name}`, share explained of each frame.", frames_table(base)]
    return "\n\n".join(parts) + "\n"


def branch_table(records: Sequence[TrailRecord], branch: str, comparisons: int, resamples: int) -> str:
    """One branch: a line for each entry."""
    header = [
        "entry", "decoupler, of its own target", "foresight", "difference", "foresight is", "generation", "another seed's",
        "decoded one step", "recorded, through the autoencoder", "cosine on moved patches: foresight", "generation",
        "decoded one step", "pixels of the generation",
    ]  # fmt: skip
    lines = []
    for record in records:
        trail = record.measured.branches.get(branch)
        if trail is None:
            continue
        cells = [f"`{record.name}`", f"{trail.own['decoupler']['explained']:.3f}", _share(explained(trail, "foresight"))]
        found = None if record is records[0] else difference(record, records[0], branch, comparisons, resamples)
        if found is None:
            cells += ["", "" if record is records[0] else "of other windows"]
        else:
            cells += [f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]", found.finding]
        cells += [_share(explained(trail, source)) for source in ("generation", "other_seed", "one_step", "reconstruction")]
        moved = max(1, sum(trail.moved))
        cells += [f"{sum(trail.cosine[source]) / moved:.3f}" for source in ("foresight", "generation", "one_step")]
        measured = record.measured
        cells.append(_share(gap.Sums(np.asarray(measured.pixels), np.asarray(measured.pixels_repeat))))
        lines.append(cells)
    return markdown_table(header, lines)


def success(records: Sequence[TrailRecord]) -> list[str]:
    """Of the entries that have a policy, a line each, compared with the first of them; nothing where none has."""
    acting = [record for record in records if record.measured.goals]
    if not acting:
        return []
    first, *others = acting
    pairs = {r.name: p for r in others if (p := pairs_of(r.measured.goals, first.measured.goals)) is not None}
    corrected = holm([mcnemar(p.only_variant, p.only_reference) for p in pairs.values()])
    chances = dict(zip(pairs, corrected, strict=True))
    lines = []
    for record in acting:
        rate = rate_of([goal.success for goal in record.measured.goals])
        share = f"{rate['success']:.0%} [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}] of {rate['episodes']}"
        cells = [f"`{record.name}`", share, "", "", "", "" if record is first else "of other goals"]
        if record.name in pairs:
            cells[2:] = _compared(pairs[record.name], chances[record.name], record.name, first.name)
        lines.append(cells)
    header = [
        "entry",
        "success",
        f"difference to `{first.name}`, points",
        f"only it : only `{first.name}`",
        "p, corrected",
        "verdict",
    ]
    return [
        "## Success",
        "At any step, on goals of another seed than the comparison's, one policy of each entry; intervals and p as in the "
        "comparison's table.",
        markdown_table(header, lines),
    ]  # fmt: skip


def _compared(pairs: Pairs, p: float, name: str, first: str) -> list[str]:
    low, high = bootstrap([pairs])
    ahead = f"`{name if pairs.difference > 0 else first}` ahead" if p < LEVEL else "not distinguishable"
    points = f"{100 * pairs.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return [points, f"{pairs.only_variant} : {pairs.only_reference}", f"{p:.3g}", ahead]


def frames_table(record: TrailRecord) -> str:
    """What each source explains of each frame."""
    lines = []
    for branch, trail in record.measured.branches.items():
        for source, title in SOURCES.items():
            pairs = zip(trail.error_by_frame[source], trail.repeat_by_frame, strict=True)
            lines.append([f"{branch}: {title}", *(f"{1.0 - e / r:.3f}" if r > 0 else "" for e, r in pairs)])
    count = len(next(iter(record.measured.branches.values())).repeat_by_frame)
    return markdown_table(["", *(f"frame {number + 1}" for number in range(count))], lines)


def write(folder: Path, records: Sequence[TrailRecord], planned: int, resamples: int) -> str:
    """Write trail.md to `folder`; returns the Markdown."""
    text = markdown(records, planned, resamples)
    with whole_file(folder / "trail.md") as file:
        file.write_text(text, encoding="utf-8")
    return text
