"""Which runs `params.yaml`'s section `compare` asks for, and the `dvc exp run` line of each.

Every published variant is a set of `-S` arguments, the same as in the README. Variants without decouplers also empty
`distill.branches`: stages that are run all the same (video, generation) come from DVC's run cache, nothing is distilled a
second time, and a later change of the distillation leaves those variants' policies, and so their finished runs, as they are.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from svam.params import Compare, Params, ParamsError, describe, load_params


@dataclass(frozen=True)
class Variant:
    """A published variant: what tables call it, and the `-S` arguments that make it of the defaults."""

    label: str
    arguments: tuple[str, ...] = ()


VARIANTS: Mapping[str, Variant] = {
    "svam": Variant("S-VAM"),
    "vpp": Variant("VPP", ("train_policy.context=[one_step]", "distill.branches=[]")),
    "diffusion_policy": Variant("Diffusion Policy", ("train_policy.context=[observation]", "distill.branches=[]")),
    "no_geometric": Variant("w/o geometric", ("train_policy.context=[semantic,one_step]", "distill.branches=[semantic]")),
    "no_semantic": Variant("w/o semantic", ("train_policy.context=[geometric,one_step]", "distill.branches=[geometric]")),
    "no_self_distillation": Variant("w/o self-distillation", ("distill.target=ground_truth",)),
    "no_perceiver": Variant("w/o Uni-Perceiver", ("train_policy.aggregator=mean_pool",)),
    "no_one_step": Variant("w/o original feature", ("train_policy.context=[geometric,semantic]",)),
    "multi_step": Variant("multi-step (upper bound)", ("train_policy.context=[generated]", "distill.branches=[]")),
    "goal_frame": Variant("SuSIE-like (goal picture)", ("train_policy.context=[goal_frame]", "distill.branches=[]")),
}
"""Name -> variant, in the order of tables. The first is what all others are compared with."""
REFERENCE = "svam"
DEFAULT = "default"
"""The collection whose runs are named without it."""
CORE = (REFERENCE, "vpp", "diffusion_policy")
"""The variants that run at every seed and size."""
REFERENCE_PARAMS = {
    "train_policy.context": ["geometric", "semantic", "one_step"], "train_policy.aggregator": "uni_perceiver",
    "distill.branches": ["geometric", "semantic"], "distill.target": "generated",
}  # fmt: skip
"""What makes the defaults S-VAM."""


@dataclass(frozen=True)
class Run:
    """One experiment. size: demonstrations of each task. seed: of the policy's weights, order and noise. arguments: of `-S`.
    collection: of `compare.collections`."""

    variant: str
    size: int
    seed: int
    arguments: tuple[str, ...]
    collection: str = DEFAULT

    @property
    def name(self) -> str:
        """Of the experiment and of its record."""
        return f"{self.variant}-{self.size}-seed{self.seed}" + (f"-{self.collection}" if self.collection != DEFAULT else "")

    @property
    def command(self) -> list[str]:
        """The experiment's `dvc` command, up to the report; `--temp` leaves the workspace as it is."""
        settings = [part for argument in self.arguments for part in ("-S", argument)]
        return ["dvc", "exp", "run", "--temp", "-n", self.name, *settings, "report"]

    @property
    def line(self) -> str:
        """The same, to be copied into a shell."""
        return shlex.join(self.command)


def policy_arguments(size: int, seed: int, steps: int, episodes: int) -> tuple[str, ...]:
    """`-S` arguments of a policy that is compared with others, and of its evaluation. `episodes`: per task."""
    return (
        f"train_policy.seed={seed}", f"train_policy.episodes_per_task={size}", f"train_policy.training.steps={steps}",
        # Only what is compared: no offline errors, other sentences or films.
        "evaluate.protocols=[metaworld]", f"evaluate.episodes={episodes}",
        "evaluate.held_out_instruction_episodes=0", "evaluate.videos=0",
    )  # fmt: skip


def steps_of(params: Compare, values: Mapping[str, Any]) -> int:
    """Training steps of every policy. `values`: those of the params file."""
    return params.steps or int(values["train_policy"]["training"]["steps"])


def planned(params: Compare, steps: int) -> list[Run]:
    """All runs: the core by seed and size, then the ablations. `steps`: of every policy."""

    def run(variant: str, size: int, seed: int, episodes: int) -> Run:
        policy = policy_arguments(size, seed, steps, episodes)
        arguments = (*params.collections[params.collection], *VARIANTS[variant].arguments, *policy)
        return Run(variant, size, seed, arguments, params.collection)

    core = [run(v, n, s, params.episodes) for s in params.seeds for n in params.episodes_per_task for v in CORE]
    size, seed, episodes = params.ablation_size, params.ablation_seed, params.ablation_episodes
    return core + [run(v, size, seed, episodes) for v in params.ablations]


def pipeline_line(params: Compare) -> str:
    """The line that runs everything, foresight and report included, on the collection that is used."""
    if not params.collections[params.collection]:
        return "dvc repro"
    settings = [part for argument in params.collections[params.collection] for part in ("-S", argument)]
    return shlex.join(["dvc", "exp", "run", "--temp", "-n", params.collection, *settings])


def compare_of(file: Path, collection: str | None = None) -> Compare:
    """The checked section `compare` of a params file, with `collection` (None: as the file says) as the one that is used.

    Raises:
        ParamsError: the file is wrong, or a value of the section.
    """
    params = load_params(file).compare
    compare = params if collection is None else params.model_copy(update={"collection": collection})
    check(compare, file)
    return compare


def plan_of(file: Path, collection: str | None = None) -> tuple[list[Run], dict[str, Any]]:
    """The runs that a params file asks for, each checked as DVC would meet it, and the file's values.

    `collection`: as for `compare_of`.

    Raises:
        ParamsError: the file or an argument is wrong, or the file's defaults are not S-VAM.
    """
    compare = compare_of(file, collection)
    raw: dict[str, Any] = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    base = settings_of(raw, compare.collections[compare.collection]).model_dump(mode="json")
    for key, expected in REFERENCE_PARAMS.items():
        section, _, name = key.partition(".")
        found = base[section][name]
        if found != expected:
            raise ParamsError(f"{file}: {key} is {found!r}; the comparison needs S-VAM as the default, which has {expected!r}")
    if not base["evaluate"]["tasks"]:
        raise ParamsError(f"{file}: evaluate.tasks is [] in collection {compare.collection!r}, expected at least one")
    runs = planned(compare, steps_of(compare, base))
    for run in runs:
        settings_of(raw, run.arguments)
    return runs, raw


def check(params: Compare, file: Path) -> None:
    """What the types of the section cannot say.

    Raises:
        ParamsError: the collection is unknown, a list is empty or names one thing twice, or ablations have no S-VAM run to be
            compared with.
    """
    if params.collection not in params.collections:
        names = ", ".join(sorted(params.collections))
        raise ParamsError(f"{file}: compare.collection is {params.collection!r}, expected one of compare.collections: {names}")
    for name in ("seeds", "episodes_per_task", "ablations"):
        values = getattr(params, name)
        if len(set(values)) < len(values) or not (values or name == "ablations"):
            raise ParamsError(f"{file}: compare.{name} is {values}, expected at least one, and each once")
    if not params.ablations:
        return
    if params.ablation_size not in params.episodes_per_task or params.ablation_seed not in params.seeds:
        raise ParamsError(
            f"{file}: compare.ablation_size is {params.ablation_size} and ablation_seed {params.ablation_seed}; expected one "
            f"of episodes_per_task {params.episodes_per_task} and of seeds {params.seeds}, where S-VAM runs too"
        )
    if params.ablation_episodes > params.episodes:
        raise ParamsError(
            f"{file}: compare.ablation_episodes is {params.ablation_episodes}, expected at most episodes ({params.episodes})"
        )


def overridden(raw: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """The values of a params file with `-S` arguments applied.

    Raises:
        ParamsError: an argument is not `key=value`, or names a key that the file does not have.
    """
    values: dict[str, Any] = deepcopy(dict(raw))
    for argument in arguments:
        key, equals, text = argument.partition("=")
        *path, last = key.split(".")
        section: Any = values
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if not equals or not isinstance(section, dict) or last not in section:
            raise ParamsError(f"params.yaml: compare: argument {argument!r}, expected key=value with a key of this file")
        try:
            section[last] = YAML(typ="safe", pure=True).load(text)
        except YAMLError:
            raise ParamsError(f"params.yaml: compare: argument {argument!r} has no readable value") from None
        if isinstance(section[last], dict):
            raise ParamsError(
                f"params.yaml: compare: argument {argument!r} sets a mapping, which DVC would merge with the one "
                "that is there; expected one of its keys, or null"
            )
    return values


def settings_of(raw: Mapping[str, Any], arguments: Sequence[str] = ()) -> Params:
    """The checked params of an experiment with these `-S` arguments.

    Raises:
        ParamsError: as `overridden`, or a value that is not accepted.
    """
    try:
        return Params.model_validate(overridden(raw, arguments))
    except ValidationError as error:
        raise ParamsError(f"{describe(error, Path('params.yaml'))} (with compare's arguments {' '.join(arguments)})") from None
