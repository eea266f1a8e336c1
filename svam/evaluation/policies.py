"""Whose row is measured: this project's model, a policy that another program serves, or none where it is scripted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from svam.contract import ContractError
from svam.device import prepare_torch
from svam.episodes.store import EpisodeStore
from svam.errors import ParamsError
from svam.models.control import for_control
from svam.models.svam import SVAM
from svam.params import Params

if TYPE_CHECKING:
    from svam.evaluation.remote import Remote

Evaluated: TypeAlias = "SVAM | Remote | None"
"""None: `evaluate.policy` is scripted, so that nothing is loaded and nothing drawn."""


@contextmanager
def evaluated_policy(params: Params, model: Path | None) -> Iterator[tuple[Evaluated, str]]:
    """What `evaluate.policy` names, and what computes it, as text: with another a killed run does not go on.

    Raises:
        ParamsError: there is no `model` for S-VAM; or see `Remote`.
        ServingError: no policy server answers.
    """
    section, device = params.evaluate, prepare_torch(params.machine.device, params.threads, params.seed)
    if section.policy == "svam":
        if model is None:
            raise ParamsError("evaluate.policy is 'svam': name its folder with --model")
        yield for_control(SVAM.load(model), device, section.batch, params.machine.compile), str(device)
    elif section.policy == "remote":
        # By name, as `Params.modules` has it, so that an edit of the client re-runs no row of S-VAM.
        remote: Remote
        with import_module(f"svam.evaluation.{section.policy}").Remote(section.remote, section.execute) as remote:
            yield remote, f"weights {remote.weights}"
    else:
        yield None, "scripted"


def acting_in(protocol: str, store: EpisodeStore, policy: Evaluated) -> tuple[EpisodeStore, Evaluated]:
    """Of several sets the one of a simulator's protocol, which has its name (`svam.agreement` asks for that)."""
    if not store.sets or protocol == "offline":
        return store, policy
    return store.sets[protocol], policy.acting_as(protocol) if isinstance(policy, SVAM) else policy


def cameras_of(policy: Evaluated, cameras: Sequence[str]) -> tuple[str, ...]:
    """Those of `cameras` that the policy sees: a server as many as there are keys for their pictures."""
    if policy is None:
        return ()
    return tuple(policy.cameras) if isinstance(policy, SVAM) else tuple(cameras[: len(policy.keys)])


def check_trained_for(benchmark: str, store: EpisodeStore, facts: Iterable[tuple[str, str, str]]) -> None:
    """Raise `ContractError` for the first of `facts` (what it is, as the demonstrations have it, as the benchmark does) that
    differ."""
    for what, found, wanted in facts:
        if found != wanted:
            raise ContractError(
                f"{store.path}: {what} is {found}, but the {benchmark.lower()} protocol needs {wanted}; convert {benchmark}'s "
                f"demonstrations so, or leave '{benchmark.lower()}' out of evaluate.protocols"
            )
