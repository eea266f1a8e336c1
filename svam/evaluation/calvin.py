"""The `calvin` protocol: chains of subtasks in CALVIN's own simulator, as the benchmark's tables have them.

A chain starts at its official state. Each of its five subtasks has 360 steps, its first validation sentence, and is solved at
the first step at which the simulator's oracle says so; the next one goes on from there, and the first failure ends the chain.
policy: the model or a server. random: uniformly random actions. expert: scripts that see the simulator's state, where there is
one for each subtask that was chosen. All rows have the same chains. Where one of the scripted two is what is evaluated, its row
is the only one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from svam.console import console
from svam.episodes.store import EpisodeStore
from svam.errors import ParamsError
from svam.evaluation.policies import Evaluated, cameras_of, check_trained_for
from svam.evaluation.recorded import write_rollout
from svam.evaluation.rollout import Controller, Outcome, PlannedEpisode, Policy, PolicyRollouts, Workers, run_scripted
from svam.evaluation.scores import rate_of
from svam.models.svam import SVAM
from svam.params import Params
from svam.protocols import Evaluate, EvaluateCalvin
from svam.resume import NO_RESUME, Resume
from svam.simulation.calvin import ACTION_DIMENSIONS, CAMERAS, RATE_HZ, CalvinEnvironment, Checkout, open_checkout
from svam.simulation.calvin_chains import OFFICIAL_CHAINS, Chain, official_chains
from svam.simulation.calvin_experts import EXPERT_TASKS

Chains = Sequence[tuple[int, Chain]]
"""Chains with their numbers in the official list."""


def chosen_chains(params: EvaluateCalvin) -> Chains:
    """The first `chains` of the official ones; with `tasks`, of those that begin with `subtasks` of these. All are cut to
    `subtasks`.

    Raises:
        ParamsError: there are not as many.
    """
    found = [
        (number, Chain(chain.initial_state, chain.subtasks[: params.subtasks]))
        for number, chain in enumerate(official_chains())
        if not params.tasks or set(chain.subtasks[: params.subtasks]) <= set(params.tasks)
    ]
    if len(found) < params.chains:
        raise ParamsError(
            f"evaluate.calvin.chains is {params.chains}, but {len(found)} of the {OFFICIAL_CHAINS} official chains begin with "
            f"{params.subtasks} subtasks of evaluate.calvin.tasks; lower chains or subtasks, or name more tasks"
        )
    return found[: params.chains]


def check_model(model: SVAM, store: EpisodeStore, sentences: Iterable[str] = ()) -> None:
    """Raise `ContractError` unless the policy was trained on what CALVIN shows and executes, and can read all `sentences`."""
    height, width = model.config.image_size
    dimensions, meaning = store.action_dimensions, store.provenance.get("actions", "rel_actions")
    facts = (
        ("rate", f"{store.rate_hz:g} Hz", f"{RATE_HZ:g} Hz"),
        ("action dimensions", str(dimensions), str(ACTION_DIMENSIONS)),
        ("convert.options.actions", meaning, "rel_actions"),
        *(("camera", name, name if name in CAMERAS else f"one of {', '.join(CAMERAS)}") for name in model.cameras),
        ("image size", f"{height}x{width}", f"{height}x{height}"),
    )
    check_trained_for("CALVIN", store, facts)
    model.foresight.text.ids(sorted(sentences))


def plan_chains(row: str, chains: Chains, checkout: Checkout, videos: int = 0) -> list[PlannedEpisode]:
    """The episodes of one row: chain i starts at the i-th state. The first `videos` are recorded."""
    return [
        PlannedEpisode(
            row, "calvin", number, i, record=i < videos,
            chain=tuple((name, checkout.sentences[name]) for name in chain.subtasks),
        )
        for i, (number, chain) in enumerate(chains)
    ]  # fmt: skip


def run(
    chains: Chains, checkout: Checkout, policy: Policy | None, params: Evaluate, *, cameras: Sequence[str],
    image_size: tuple[int, int] | None, proprioception: bool, seed: int, workers: int, resume: Resume = NO_RESUME,
) -> dict[str, list[Outcome]]:  # fmt: skip
    """Run all rows, or without a policy the one of `params.policy`, for which nothing is drawn.

    Args:
        cameras, image_size: the pictures that the policy sees. proprioception: whether it also reads `robot_obs`.
        seed: the pipeline's seed. workers: simulation processes, of one environment each; their number changes no result.
        resume: keeps finished chains of all rows.

    Raises:
        ParamsError: the scripted expert is to be evaluated, and a subtask has none.
        PolicyError: the policy returned NaN, or a wrong shape.
        MachineError: the simulator does not run here, or a worker process died.
    """
    section = params.calvin
    make = partial(
        CalvinEnvironment, folder=checkout.folder, renderer=section.renderer, cameras=tuple(cameras), image_size=image_size,
        states=tuple(chain.initial_state for _, chain in chains),
    )  # fmt: skip
    missing = sorted({name for _, chain in chains for name in chain.subtasks} - set(EXPERT_TASKS))
    if params.policy == "expert" and missing:
        raise ParamsError(
            f"evaluate.policy is 'expert', but there is no script for {', '.join(missing)}; let evaluate.calvin.tasks "
            f"name some of {', '.join(EXPERT_TASKS)}"
        )
    controllers: tuple[Controller, ...] = ("random",) if missing else ("random", "expert")
    if policy is None:
        controllers = tuple(controller for controller in controllers if controller == params.policy)
    outcomes: dict[str, list[Outcome]] = {}
    with Workers(make, min(workers, params.batch), one_each=True) as pool:
        if policy is not None:
            rollouts = PolicyRollouts(
                policy, pool, seed=seed, batch=params.batch, execute=params.execute, max_steps=section.max_steps,
                proprioception=proprioception, resume=resume,
            )  # fmt: skip
            outcomes["policy"] = rollouts.run(plan_chains("policy", chains, checkout, params.videos))
        for controller in controllers:
            outcomes[controller] = run_scripted(
                plan_chains(controller, chains, checkout), controller, pool, dimensions=ACTION_DIMENSIONS,
                max_steps=section.max_steps, seed=seed, resume=resume,
            )  # fmt: skip
    return outcomes


def chain_scores(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """{"rates": [rate_of, ...], "average_length", "subtasks": {name: rate_of}} of chains of equal length.

    rates: entry k is of chains with more than k subtasks solved in a row; intervals are over chains. average_length: the sum of
    the rates, which is the mean number of subtasks solved in a row. subtasks: solved among attempted.
    """
    solved = [len(outcome.reached) for outcome in outcomes]
    length = len(outcomes[0].plan.goals)
    rates = [rate_of([count > k for count in solved]) for k in range(length)]
    average = math.fsum(rate["success"] for rate in rates)
    attempts: dict[str, list[bool]] = {}
    for outcome, count in zip(outcomes, solved, strict=True):
        for k, (name, _) in enumerate(outcome.plan.goals[: count + 1]):
            attempts.setdefault(name, []).append(k < count)
    subtasks = {name: rate_of(attempts[name]) for name in sorted(attempts)}
    return {"rates": rates, "average_length": average, "subtasks": subtasks}


def write_calvin(folder: Path, store: EpisodeStore, policy: Evaluated, params: Params, resume: Resume) -> dict[str, Any]:
    """`run` with `policy` on the chosen chains; print and return metrics, and write a line for each chain and row to
    `chains.jsonl`: its number in the official list, subtasks, after how many steps each was solved, and steps in all. Recorded
    chains are as `write_rollout` leaves them."""
    section = params.evaluate.calvin
    checkout, chains = open_checkout(section.path, section.commit), chosen_chains(section)
    cameras, side = cameras_of(policy, tuple(CAMERAS)), params.evaluate.remote.image_size
    image_size = None if side is None or policy is None else (side, side)
    if isinstance(policy, SVAM):
        check_model(policy, store, {checkout.sentences[name] for _, chain in chains for name in chain.subtasks})
        image_size = policy.config.image_size
    outcomes = run(
        chains, checkout, policy, params.evaluate, cameras=cameras, image_size=image_size,
        proprioception=policy is not None and policy.needs_proprioception, seed=params.seed, workers=params.machine.workers,
        resume=resume,
    )  # fmt: skip
    lines = [
        {
            "row": outcome.plan.row, "chain": outcome.plan.index, "subtasks": [name for name, _ in outcome.plan.goals],
            "solved_at": list(outcome.reached), "steps": outcome.steps, "policy_calls": len(outcome.calls),
        }
        for group in outcomes.values() for outcome in group
    ]  # fmt: skip
    (folder / "chains.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    for played in outcomes.get("policy", []):
        write_rollout(folder, played, policy, params)
    rows = {row: chain_scores(group) for row, group in outcomes.items()}
    lengths = ", ".join(f"{row} {scores['average_length']:.2f}" for row, scores in rows.items())
    console.print(f"subtasks solved in a row, of {section.subtasks}: {lengths}", highlight=False)
    metrics = {
        "rows": rows, "chains": section.chains, "subtasks": section.subtasks, "tasks": section.tasks,
        "official": section.chains == OFFICIAL_CHAINS and section.subtasks == 5 and section.max_steps == 360,
        "cameras": list(cameras), "renderer": section.renderer, "commit": checkout.commit, "max_steps": section.max_steps,
        "execute": params.evaluate.execute, "rate_hz": RATE_HZ, "intervals": "95 % Wilson, over chains",
    }  # fmt: skip
    return metrics if policy is None or isinstance(policy, SVAM) else metrics | {"weights_sha256": policy.weights}
