"""Which experiments a plan asks for: each a variant of `variants.yaml` at an equal budget, run by one `dvc exp run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Self

from dvc.exceptions import InvalidArgumentError
from dvc.utils.hydra import apply_overrides
from pydantic import Field, ValidationError, model_validator

from svam.errors import ParamsError, describe
from svam.files import read_yaml
from svam.params import load_params
from svam.presets.overlay import as_arguments, overlay_of
from svam.sections import Count, Name, Section, Seed

FOLDER = Path(__file__).parent
REFERENCE = "svam"
"""The variant that all others are compared with."""


VARIANTS: Mapping[str, Mapping[str, Any]] = read_yaml(FOLDER / "variants.yaml")
"""Name -> {label: what tables call it, arguments: of `-S`}, in the order of tables."""
Variant = Annotated[str, Field(pattern=f"^({'|'.join(VARIANTS)})$")]


class Runs(Section):
    """Every variant at every number of demonstrations and every policy seed, in one regime, of every pipeline: these are seeds
    of all else, such as demonstrations, other weights and goals; empty or null: the one that the params have."""

    variants: list[Variant]
    seeds: list[Seed]
    episodes_per_task: list[Count]
    episodes: Count
    regime: Name | None = None
    pipelines: list[Seed | None] = Field(default_factory=list)
    primary: bool = False


class Plan(Section):
    """`plan.yaml`, whose comments say what each key means, or another study's."""

    collection: Name
    arguments: list[str]
    arguments_of: dict[Seed, list[str]] = Field(default_factory=dict)
    regimes: dict[Name, list[str]]
    steps: Count | None
    runs: list[Runs]

    @model_validator(mode="after")
    def _regimes_are_described(self) -> Self:
        named = {runs.regime for runs in self.runs if runs.regime is not None}
        if named != set(self.regimes):
            raise ValueError(f"runs are of the regimes {sorted(named)}, and regimes describes {sorted(self.regimes)}")
        pipelines = {pipeline for runs in self.runs for pipeline in runs.pipelines}
        if unknown := sorted(self.arguments_of.keys() - pipelines):
            raise ValueError(f"arguments_of names the pipelines {unknown}, which no runs have")
        return self


@dataclass(frozen=True)
class Run:
    """One experiment. size: demonstrations of each task. seed: of the policy's weights, order and noise. regime, pipeline,
    primary: as `Record` has them. arguments: of `-S`. params: all of its params."""

    variant: str
    size: int
    seed: int
    regime: str
    pipeline: int | None
    primary: bool
    name: str
    arguments: tuple[str, ...]
    params: Mapping[str, Any]

    @property
    def command(self) -> list[str]:
        """The experiment's `dvc` command, up to the report."""
        return ["dvc", "exp", "run", "-n", self.name, *(a for value in self.arguments for a in ("-S", value)), "report"]


def load_plan(file: Path) -> Plan:
    """Read and check a plan. One that `extends` another, a file beside it, has its keys but for those that it states.

    Raises:
        ParamsError: a key is unknown, missing, or contradicts another, here or in the extended plan.
    """
    values = read_yaml(file)
    if isinstance(values, dict) and (extended := values.pop("extends", None)):
        base = file.with_name(str(extended))
        values = _checked(read_yaml(base), base).model_dump() | values
    return _checked(values, file)


def _checked(values: Any, file: Path) -> Plan:
    try:
        return Plan.model_validate(values)
    except ValidationError as error:
        raise ParamsError(describe(error, file)) from None


def planned_runs(plan: Plan, only: Sequence[str] = (), params: Path = Path("params.yaml")) -> list[Run]:
    """All of a plan, in its order, by pipeline, seed, number of demonstrations and variant; each with params that were checked.

    Args:
        only: names, patterns of names, or variants; empty: all.

    Raises:
        ParamsError: the params or an argument are wrong, the params are not S-VAM's, or nothing is called as `only` says.
    """
    collection = expanded(plan.arguments)
    base = with_arguments(params, collection)
    reference = VARIANTS[REFERENCE]["arguments"]
    if base != with_arguments(params, [*collection, *reference]):
        raise ParamsError(f"{params}: variants change S-VAM's params, and these are not: expected {' '.join(reference)}")
    steps = plan.steps or base["train_policy"]["training"]["steps"]

    def name_of(runs: Runs, variant: str, size: int, seed: int, pipeline: int | None) -> str:
        of_pipeline = [] if pipeline is None else [f"pipeline{pipeline}"]
        regime = [runs.regime] if runs.regime else []
        return "-".join([variant, str(size), f"seed{seed}", plan.collection, *regime, *of_pipeline])

    def run(runs: Runs, variant: str, size: int, seed: int, pipeline: int | None) -> Run:
        regime = expanded(plan.regimes[runs.regime]) if runs.regime else []
        arguments = (
            *collection, *regime, *VARIANTS[variant]["arguments"],
            *([] if pipeline is None else [f"seed={pipeline}", *plan.arguments_of.get(pipeline, [])]),
            f"train_policy.seed={seed}", f"train_policy.episodes_per_task={size}",
            f"train_policy.training.steps={steps}", f"evaluate.metaworld.episodes={runs.episodes}",
            # Only what is compared: no offline errors, other sentences or films.
            "evaluate.protocols=[metaworld]", "evaluate.metaworld.held_out_instruction_episodes=0", "evaluate.videos=0",
        )  # fmt: skip
        name, checked = name_of(runs, variant, size, seed, pipeline), with_arguments(params, arguments)
        return Run(variant, size, seed, runs.regime or "", pipeline, runs.primary, name, arguments, checked)

    planned = [
        (r, v, n, s, p)
        for r in plan.runs
        for p in r.pipelines or [None]
        for s in r.seeds
        for n in r.episodes_per_task
        for v in r.variants
    ]
    chosen = [one for one in planned if not only or any(one[1] == p or fnmatch(name_of(*one), p) for p in only)]
    if not chosen:
        raise ParamsError(f"--only {' '.join(only)}: no planned run is called so; without --only `plan` prints them all")
    return [run(*one) for one in chosen]


def expanded(changes: Sequence[str]) -> list[str]:
    """`-S` arguments of changes, each such an argument or the name of a preset."""
    named = ([change] if "=" in change else as_arguments(overlay_of(change)) for change in changes)
    return [argument for several in named for argument in several]


def with_arguments(params: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """What DVC itself makes of the params with these `-S` arguments, checked.

    Raises:
        ParamsError: an argument is not `key=value`, names a key that the file does not have, or a value that is not accepted.
    """
    with TemporaryDirectory() as folder:
        copy = Path(folder, "params.yaml")
        copy.write_bytes(params.read_bytes())
        try:
            apply_overrides(copy, list(arguments))
            load_params(copy)
        except (InvalidArgumentError, ParamsError) as error:
            text = str(error.__cause__ or error).replace(str(copy), str(params))
            raise ParamsError(f"{text} (with -S {' '.join(arguments)})") from None
        return dict(read_yaml(copy))
