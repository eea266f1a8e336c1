"""The trail: what limits foresight, told by held-out windows first and by success second.

Each entry of `compare.trail` changes one thing of the video model, its generations, the targets or the decouplers. It is run
up to `distill` and measured against the future that was recorded, which is the same for all entries. Those named in
`compare.trail_policies` also get a policy, which is evaluated on other goals than the comparison's.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from svam.console import console
from svam.contract import Frozen
from svam.errors import MachineError
from svam.experiments import experiments
from svam.experiments.keys import Project, digest, work_of
from svam.experiments.loop import PARAMS, WORKSPACE
from svam.experiments.plan import DEFAULT, compare_of, policy_arguments, settings_of, steps_of
from svam.experiments.plan import overridden as with_arguments
from svam.experiments.records import Episode
from svam.experiments.workspace import run_noted
from svam.files import FileError, read_json, scratch_folder, whole_file
from svam.params import Params, ParamsError

FOLDER = "trail"
"""Of the records, beside those of policies."""


class BranchTrail(Frozen):
    """One branch on the held-out windows (W of them), frames after the observed one.

    own: predictor -> `distill`'s metrics against the branch's own target. Against the teacher on the recorded future, in units
    of its variance: repeat (W,) the squared error of repeating the teacher on the observed frame; error: source -> (W,);
    repeat_by_frame, error_by_frame: the same summed over windows, (T - 1,). moved (W,): patches that moved; cosine: source ->
    (W,) sums of the centred cosine over them.
    """

    own: dict[str, dict[str, float]]
    repeat: list[float]
    error: dict[str, list[float]]
    repeat_by_frame: list[float]
    error_by_frame: dict[str, list[float]]
    moved: list[int]
    cosine: dict[str, list[float]]


class Measured(Frozen):
    """What an entry was measured to be. windows: a hash of their rows; episodes (W,): each window's; pixels, pixels_repeat
    (W,): squared error of the generated clips, and of repeating the observed frame. machine: its GPU, or cores and processor.
    goals: the policy's evaluation episodes, where the entry has one."""

    windows: str
    episodes: list[int]
    pixels: list[float]
    pixels_repeat: list[float]
    branches: dict[str, BranchTrail]
    machine: str
    goals: tuple[Episode, ...] = ()


class TrailRecord(Frozen):
    """A finished entry. key, revision, vouched: as in `svam.experiments.records.Record`; where the stages were run
    without DVC, revision is the commit of their code."""

    name: str
    arguments: list[str]
    key: str
    revision: str
    vouched: tuple[str, ...] = ()
    measured: Measured


@dataclass(frozen=True)
class Entry:
    """An entry of `compare.trail`. arguments: of `-S`, those of the collection first. policy: whether it has one."""

    name: str
    arguments: tuple[str, ...]
    collection: str
    policy: bool

    @property
    def command(self) -> list[str]:
        """The experiment's `dvc` command, up to the decouplers or the policy."""
        settings = [part for argument in self.arguments for part in ("-S", argument)]
        suffix = f"-{self.collection}" if self.collection != DEFAULT else ""
        return [
            "dvc",
            "exp",
            "run",
            "--temp",
            "-n",
            f"trail-{self.name}{suffix}",
            *settings,
            "train_policy" if self.policy else "distill",
        ]

    @property
    def experiment(self) -> str:
        """The experiment's name."""
        return self.command[5]

    @property
    def line(self) -> str:
        """The command, to be copied into a shell."""
        return shlex.join(self.command)


Measure = Callable[[str, Params, int | None], Measured]
"""Measures an experiment by its commit, its params, and the seed of its policy's goals, None where it has no policy."""


class Trail:
    """The entries that are asked for and those that are finished, in one project folder (the current one)."""

    def __init__(self, folder: Path, collection: str | None = None) -> None:
        """`folder`: of the comparison's records, which has one for each collection in it. `collection`: as for `plan_of`.

        Raises:
            ParamsError, FileError: `params.yaml` is wrong, has no trail, policies of no entry or goals of the comparison, or
                `dvc.yaml` is missing.
        """
        compare = compare_of(PARAMS, collection)
        if not compare.trail:
            raise ParamsError(f"{PARAMS}: compare.trail is empty, expected at least one entry (name: list of -S arguments)")
        self.folder = folder / compare.collection / FOLDER
        self.raw: dict[str, Any] = YAML(typ="safe", pure=True).load(PARAMS.read_text(encoding="utf-8"))
        if unknown := [name for name in compare.trail_policies if name not in compare.trail]:
            raise ParamsError(f"{PARAMS}: compare.trail_policies names {unknown[0]!r}, expected entries of compare.trail")
        if compare.trail_policies and compare.trail_seed == self.raw["seed"]:
            raise ParamsError(
                f"{PARAMS}: compare.trail_seed is {compare.trail_seed}, as seed; expected another number, since nothing may be "
                "chosen on the goals that variants are compared on"
            )
        self.seed = compare.trail_seed
        common, steps = compare.collections[compare.collection], steps_of(compare, self.raw)
        policy = policy_arguments(compare.ablation_size, compare.ablation_seed, steps, compare.ablation_episodes)
        self.entries = []
        for name, own in compare.trail.items():
            acts = name in compare.trail_policies
            self.entries.append(Entry(name, (*common, *own, *(policy if acts else ())), compare.collection, acts))
        project = Project.read(Path())
        self.keys = {entry.name: self.key(entry, project) for entry in self.entries}

    def key(self, entry: Entry, project: Project) -> str:
        """A hash of everything that decides what an entry is measured to be, but for the measurement itself.

        Raises:
            ParamsError: the entry distils nothing, or a value of it is wrong.
        """
        branches = self.settings(entry).distill.branches
        if not branches:
            raise ParamsError(f"{PARAMS}: compare.trail.{entry.name}: distill.branches is [], expected at least one")
        values = with_arguments(self.raw, entry.arguments)
        work: list[Any] = [work_of(project, values, f"distill@{branch}") for branch in branches]
        return digest([*work, work_of(project, values), self.seed] if entry.policy else work)

    def settings(self, entry: Entry) -> Params:
        """The entry's params, checked."""
        return settings_of(self.raw, entry.arguments)

    def finished(self) -> list[TrailRecord]:
        """Records of the entries whose params and code are those of their keys, in the order of the params.

        Raises:
            FileError: a record is damaged.
        """
        records = [read(file) for entry in self.entries if (file := self.folder / f"{entry.name}.json").is_file()]
        return [record for record in records if self.keys[record.name] == record.key]

    def left(self, only: Sequence[str] = ()) -> list[Entry]:
        """The entries without a record, of those whose name matches one of the patterns (none: all).

        Raises:
            FileError: nothing matches.
        """
        asked = [entry for entry in self.entries if not only or any(fnmatch(entry.name, pattern) for pattern in only)]
        if not asked:
            raise FileError(f"--only {' '.join(only)}: no entry of compare.trail has such a name")
        done = {record.name for record in self.finished()}
        return [entry for entry in asked if entry.name not in done]


def read(file: Path) -> TrailRecord:
    """One record.

    Raises:
        FileError: the file is missing or no record.
    """
    try:
        return TrailRecord.model_validate(read_json(file))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the whole file"
        raise FileError(f"{file}: not the record of a trail: {where}: {problem['msg']}; delete it and run it again") from None


def write(folder: Path, record: TrailRecord) -> Path:
    """Write `<name>.json`, a list of numbers a line."""
    path = folder / f"{record.name}.json"
    with whole_file(path) as file:
        file.write_text(_lines(record.model_dump(mode="json")) + "\n", encoding="utf-8")
    return path


def _lines(value: Any, depth: int = 0) -> str:
    """JSON whose mappings are broken into lines, and whose lists are not."""
    if not isinstance(value, dict):
        return json.dumps(value, allow_nan=False)
    inner = ",\n".join(f"{' ' * (depth + 1)}{json.dumps(key)}: {_lines(item, depth + 1)}" for key, item in value.items())
    return f"{{\n{inner}\n{' ' * depth}}}"


def run_trail(trail: Trail, measure: Measure, only: Sequence[str] = (), minutes: float | None = None) -> int:
    """Run and measure what is not finished, which the caller must be `alone` to do (see `svam.experiments.loop`); returns how
    many entries were finished now.

    Args:
        only: as `Trail.left`. minutes: begin none after this time.

    Raises:
        FileError: DVC does not have what it made.
        MachineError: `dvc` failed; what was finished stays recorded.
    """
    begin, finished = time.monotonic(), 0
    left = trail.left(only)
    for number, entry in enumerate(left):
        if minutes is not None and time.monotonic() - begin > 60.0 * minutes:
            break
        console.rule(f"{number + 1} of {len(left)}: {entry.name}")
        console.print(entry.line, highlight=False, soft_wrap=True, markup=False)
        experiments.forget(entry.experiment)
        try:
            succeeded = run_noted(entry.command, scratch_folder("compare") / WORKSPACE)
        except KeyboardInterrupt as stop:
            stop.add_note(f"interrupted in {entry.name}; the same command goes on with it")
            raise
        if not succeeded:
            raise MachineError(f"`{entry.line}` failed, see above; the same command goes on with it")
        revision = experiments.revision_of(entry.experiment)
        record = TrailRecord(
            name=entry.name, arguments=list(entry.arguments), key=trail.keys[entry.name], revision=revision,
            measured=measure(revision, trail.settings(entry), trail.seed if entry.policy else None),
        )  # fmt: skip
        console.print(f"{write(trail.folder, record)}: written", highlight=False, soft_wrap=True)
        finished += 1
    return finished
