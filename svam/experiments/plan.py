"""Which experiments `plan.yaml` asks for: each a variant of `variants.yaml` at an equal budget, run by one `dvc exp run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from dvc.exceptions import InvalidArgumentError
from dvc.utils.hydra import apply_overrides
from pydantic import Field, ValidationError

from svam.errors import ParamsError, describe
from svam.files import read_yaml
from svam.params import load_params
from svam.sections import Count, Name, Section, Seed

FOLDER = Path(__file__).parent
REFERENCE = "svam"
"""The variant that all others are compared with."""


VARIANTS: Mapping[str, Mapping[str, Any]] = read_yaml(FOLDER / "variants.yaml")
"""Name -> {label: what tables call it, arguments: of `-S`}, in the order of tables."""
Variant = Annotated[str, Field(pattern=f"^({'|'.join(VARIANTS)})$")]


class Plan(Section):
    """`plan.yaml`; its comments say what each key means."""

    collection: Name
    collections: dict[Name, list[str]]
    seeds: list[Seed]
    episodes_per_task: list[Count]
    episodes: Count
    steps: Count | None
    core: list[Variant]
    others: list[Variant]
    others_seed: Seed
    others_episodes_per_task: Count
    others_episodes: Count


@dataclass(frozen=True)
class Run:
    """One experiment. size: demonstrations of each task. seed: of the policy's weights, order and noise. arguments: of `-S`.
    params: all of its params."""

    variant: str
    size: int
    seed: int
    name: str
    arguments: tuple[str, ...]
    params: Mapping[str, Any]

    @property
    def command(self) -> list[str]:
        """The experiment's `dvc` command, up to the report."""
        return ["dvc", "exp", "run", "-n", self.name, *(a for value in self.arguments for a in ("-S", value)), "report"]


def load_plan(file: Path = FOLDER / "plan.yaml") -> Plan:
    """Read and check a plan.

    Raises:
        ParamsError: a key is unknown, missing, or contradicts another.
    """
    try:
        return Plan.model_validate(read_yaml(file))
    except ValidationError as error:
        raise ParamsError(describe(error, file)) from None


def planned_runs(plan: Plan, only: Sequence[str] = (), params: Path = Path("params.yaml")) -> list[Run]:
    """The core by seed and number of demonstrations, then the others; each with params that were checked.

    Args:
        only: names, patterns of names, or variants; empty: all.

    Raises:
        ParamsError: the params or an argument are wrong, the params are not S-VAM's, or nothing is called as `only` says.
    """
    collection = plan.collections.get(plan.collection)
    if collection is None:
        raise ParamsError(f"collection is {plan.collection!r}, expected one of collections: {', '.join(plan.collections)}")
    base = with_arguments(params, collection)
    reference = VARIANTS[REFERENCE]["arguments"]
    if base != with_arguments(params, [*collection, *reference]):
        raise ParamsError(f"{params}: variants change S-VAM's params, and these are not: expected {' '.join(reference)}")
    steps = plan.steps or base["train_policy"]["training"]["steps"]

    def run(variant: str, size: int, seed: int, episodes: int) -> Run:
        arguments = (
            *collection, *VARIANTS[variant]["arguments"], f"train_policy.seed={seed}", f"train_policy.episodes_per_task={size}",
            f"train_policy.training.steps={steps}", f"evaluate.metaworld.episodes={episodes}",
            # Only what is compared: no offline errors, other sentences or films.
            "evaluate.protocols=[metaworld]", "evaluate.metaworld.held_out_instruction_episodes=0", "evaluate.videos=0",
        )  # fmt: skip
        name = f"{variant}-{size}-seed{seed}-{plan.collection}"
        return Run(variant, size, seed, name, arguments, with_arguments(params, arguments))

    runs = [run(v, n, s, plan.episodes) for s in plan.seeds for n in plan.episodes_per_task for v in plan.core]
    runs += [run(v, plan.others_episodes_per_task, plan.others_seed, plan.others_episodes) for v in plan.others]
    selected = [run for run in runs if not only or any(run.variant == p or fnmatch(run.name, p) for p in only)]
    if not selected:
        raise ParamsError(f"--only {' '.join(only)}: no planned run is called so; without --only `plan` prints them all")
    return selected


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
