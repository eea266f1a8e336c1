"""The `metaworld` protocol: any-step success on goals that no demonstration has, in four rows.

policy: the model or a server, reading a training paraphrase. held_out_instruction: the same goals and noise, reading the
paraphrase that no training saw. random and expert: uniformly random actions and MetaWorld's scripted expert, on the policy's
own seeds. Every drawn goal counts, also one that the expert fails. Where one of the scripted two is what is evaluated, its row
is the only one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from svam.console import console
from svam.contract import ContractError
from svam.episodes.instructions import instructions_of
from svam.episodes.store import EpisodeStore
from svam.errors import ParamsError
from svam.evaluation.policies import Evaluated, cameras_of
from svam.evaluation.recorded import write_rollout
from svam.evaluation.rollout import (
    Controller,
    Outcome,
    PlannedEpisode,
    Policy,
    PolicyRollouts,
    Workers,
    run_scripted,
)
from svam.evaluation.scores import summary, tier_of
from svam.models.svam import SVAM
from svam.params import Params
from svam.protocols import Evaluate
from svam.resume import NO_RESUME, Resume
from svam.seeds import seed_of
from svam.simulation.looks import STOCK
from svam.simulation.metaworld import ACTION_DIMENSIONS, RATE_HZ, TaskEnvironment, check_task
from svam.simulation.rendering import choose_backend

ResultRow = Literal["policy", "held_out_instruction", "random", "expert"]
"""Of the table of results."""
ROWS: tuple[ResultRow, ...] = ("policy", "held_out_instruction", "random", "expert")


def check_tasks(tasks: Sequence[str], store: EpisodeStore | None) -> None:
    """Every task must exist in MetaWorld, and in the store where one is given: S-VAM is evaluated on what it was shown.

    Raises:
        ValueError: one does not; the sentence names it and what there is.
    """
    if not tasks:
        raise ParamsError("evaluate.metaworld.tasks is empty; name tasks, or leave 'metaworld' out of evaluate.protocols")
    for task in tasks:
        try:
            check_task(task)
        except ValueError as error:
            raise ParamsError(f"evaluate.metaworld.tasks: {error}") from None
        if store is not None and task not in store.tasks:
            raise ParamsError(
                f"evaluate.metaworld.tasks: no episode of {task!r} in {store.path}, which has {', '.join(store.tasks)}"
            )


class RenderSettings(TypedDict):
    """What of `TaskEnvironment` decides the pictures and where episodes start."""

    image_size: int
    render: Literal["fast", "full"]
    scenes: Literal["stock", "shared"]


def render_settings(store: EpisodeStore, tasks: Sequence[str], image_size: int | None = None) -> RenderSettings:
    """How the demonstrations were recorded, by the store's provenance: the policy must meet the same pictures and scenes.
    Tasks that the store lacks count as stock ones, drawn fast.

    image_size: of a policy that has other pictures than the demonstrations', which then need not be square.

    Raises:
        ContractError: the store does not come from MetaWorld, its frames are not square or of another size than they were
            rendered at, or tasks differ in style or scenes.
    """
    height, width = (image_size, image_size) if image_size else store.image_size
    table = store.provenance.get("tasks", {})
    recorded = [table.get(task, {}) if task in store.tasks else {"render": "fast"} for task in tasks]
    styles = {entry.get("render") for entry in recorded}
    if image_size is None and (height != width or not (styles == {"fast"} or styles == {"full"})):
        names = ", ".join(sorted(map(str, styles)))
        raise ContractError(
            f"{store.path}: frames of {height} x {width} pixels, rendered as {names}; the metaworld protocol needs square "
            "frames recorded in one style by the collect stage (or leave 'metaworld' out of evaluate.protocols)"
        )
    for task, entry in zip(tasks, recorded, strict=True):
        rendered = entry.get("image_size", height)  # stores of before do not say
        if rendered != height and image_size is None:
            raise ContractError(
                f"{store.path}: {task} was rendered at {rendered} pixels and converted to {height}, so the policy would meet "
                "other pictures in simulation; set convert.image_size to null and collect.image_size to the size that you want "
                "(or leave 'metaworld' out of evaluate.protocols)"
            )
    scenes = {entry.get("scenes", "stock") for entry in recorded}
    if not (scenes == {"stock"} or scenes == {"shared"}):
        raise ContractError(
            f"{store.path}: tasks recorded in scenes {', '.join(sorted(map(str, scenes)))}; the metaworld protocol needs "
            "evaluate.metaworld.tasks in one kind, stock or shared (collect.scenes)"
        )
    return RenderSettings(
        image_size=height,
        render="full" if styles == {"full"} else "fast",
        scenes="shared" if scenes == {"shared"} else "stock",
    )


def drawn_settings(store: EpisodeStore, params: Evaluate) -> RenderSettings:
    """`render_settings` for the policy that is evaluated. A scripted one has no picture, so any size will do."""
    sizes = {"svam": None, "remote": params.remote.image_size}
    return render_settings(store, params.metaworld.tasks, sizes.get(params.policy, 64))


def setting_of(store: EpisodeStore, policy: Evaluated, params: Evaluate) -> dict[str, Any]:
    """What a row of another table must share to be compared with. demonstrations: what S-VAM learned from,
    the training episodes of each task in the store, and in which ways they were recorded."""
    drawn, cameras = drawn_settings(store, params), cameras_of(policy, store.cameras)
    setting: dict[str, Any] = {
        "episodes_per_task": params.metaworld.episodes, "max_steps": params.metaworld.max_steps, "scenes": drawn["scenes"],
        "metaworld": version("metaworld"), "mujoco": version("mujoco"),
    }  # fmt: skip
    if cameras:
        setting |= {
            "cameras": list(cameras), "image_size": drawn["image_size"], "render": drawn["render"], "gl": choose_backend(),
        }  # fmt: skip
        if params.metaworld.look != STOCK:
            setting["look"] = params.metaworld.look
    if isinstance(policy, SVAM):
        tasks = [store.task_of(int(episode)) for episode in store.episodes("train")]
        recorded = [store.provenance["tasks"][task] for task in params.metaworld.tasks]
        setting["demonstrations"] = {
            "episodes": {task: tasks.count(task) for task in params.metaworld.tasks},
            "recorded": [entry for number, entry in enumerate(recorded) if entry not in recorded[:number]],
        }
    elif policy is not None:
        setting["weights_sha256"] = policy.weights
    return setting


def plan_episodes(row: ResultRow, store: EpisodeStore, params: Evaluate, seed: int) -> list[PlannedEpisode]:
    """The episodes of one row. Environment seeds depend on `seed`, task and index alone, so rows share their goals: those of
    `held_out_instruction` are the first of the others'.

    Raises:
        ContractError: a task lacks the paraphrases that the row needs.
    """
    count, kind = params.metaworld.episodes, "train"
    if row == "held_out_instruction":
        count, kind = min(params.metaworld.held_out_instruction_episodes, count), "held_out"
    plans = []
    for task in params.metaworld.tasks:
        sentences = (store.instructions[task] if task in store.tasks else instructions_of(task)).get(kind, [])
        if count and not sentences:
            raise ContractError(f"{store.path}: task {task!r} has no {kind} instruction")
        for index in range(count):
            sentence = sentences[seed_of(seed, "evaluation instruction", kind, task, index) % len(sentences)]
            record = row == "policy" and index < params.videos
            plans.append(PlannedEpisode(row, task, index, seed_of(seed, "evaluate", task, index), sentence, record))
    return plans


def assert_unseen(outcomes: Sequence[Outcome], store: EpisodeStore) -> int:
    """Check on the drawn goals that no evaluated episode is a demonstration (training or held out); returns how many
    demonstrations were compared.

    Raises:
        ContractError: two draws of one task are equal, or a demonstration of an evaluated task does not state its draw.
    """
    compared = 0
    for task in dict.fromkeys(outcome.plan.task for outcome in outcomes if outcome.plan.task in store.tasks):
        episodes = [e for e in range(len(store.episode_ends)) if store.task_of(e) == task]
        unknown = [e for e in episodes if not store.episode_provenance[e].get("draw")]
        if unknown:
            raise ContractError(f"{store.path}: episode {unknown[0]} ({task}) does not state its draw; run collect and convert")
        seen = np.asarray([store.episode_provenance[e]["draw"] for e in episodes], dtype=np.float64)
        compared += len(seen)
        for outcome in (o for o in outcomes if o.plan.task == task):
            same = np.flatnonzero((seen == np.asarray(outcome.draw)).all(axis=1))
            if len(same):
                raise ContractError(
                    f"evaluation episode {outcome.plan.index} of {task!r} draws {list(outcome.draw)}, which is demonstration "
                    f"{episodes[int(same[0])]} of {store.path}; evaluation must use goals that no demonstration has"
                )
    return compared


def run(
    store: EpisodeStore, policy: Policy | None, params: Evaluate, *, cameras: Sequence[str], proprioception: bool, seed: int,
    workers: int, resume: Resume = NO_RESUME,
) -> dict[ResultRow, list[Outcome]]:  # fmt: skip
    """Run all four rows, or without a policy the one of `params.policy`, for which nothing is drawn.

    Args:
        cameras: those that the policy sees. proprioception: whether it also reads that.
        seed: the pipeline's seed. workers: simulation processes; their number changes no result.
        resume: keeps the policy's finished episodes.

    Raises:
        ValueError: an unknown task, a goal that a demonstration has, or a policy that returns NaN.
        MachineError: nothing renders here, or a worker process died.
    """
    check_tasks(params.metaworld.tasks, store if params.policy == "svam" else None)
    make = partial(TaskEnvironment, cameras=tuple(cameras), look=params.metaworld.look, **drawn_settings(store, params))
    choose_backend()
    scripted: tuple[Controller, ...] = ("expert", "random")
    scripted = tuple(controller for controller in scripted if policy is not None or controller == params.policy)
    plans = {row: plan_episodes(row, store, params, seed) for row in (ROWS if policy is not None else scripted)}
    outcomes: dict[ResultRow, list[Outcome]] = {}
    with Workers(make, workers) as pool:
        for controller in scripted:
            outcomes[controller] = run_scripted(
                plans[controller], controller, pool, dimensions=ACTION_DIMENSIONS, max_steps=params.metaworld.max_steps,
                seed=seed,
            )  # fmt: skip
        # The scripted rows draw the goals of all rows, so a leak is found before the policy runs at all.
        assert_unseen(outcomes[scripted[0]], store)
        if policy is None:
            return outcomes
        rollouts = PolicyRollouts(
            policy, pool, seed=seed, batch=params.batch, execute=params.execute, max_steps=params.metaworld.max_steps,
            proprioception=proprioception, resume=resume,
        )  # fmt: skip
        played = rollouts.run(plans["policy"] + plans["held_out_instruction"])
    outcomes["policy"] = [o for o in played if o.plan.row == "policy"]
    outcomes["held_out_instruction"] = [o for o in played if o.plan.row == "held_out_instruction"]
    assert_unseen(played, store)
    return outcomes


def successes(outcomes: Sequence[Outcome]) -> dict[str, list[bool]]:
    """Task -> any-step success of its episodes."""
    table: dict[str, list[bool]] = {}
    for outcome in outcomes:
        table.setdefault(outcome.plan.task, []).append(outcome.success)
    return table


def metaworld_metrics(outcomes: Mapping[ResultRow, Sequence[Outcome]], params: Evaluate) -> dict[str, Any]:
    """Row -> `scores.summary`, and `same_goals`: the policy row on the goals of the held-out paraphrase, to compare it with."""
    rows: dict[str, Any] = {row: summary(successes(group)) for row, group in outcomes.items() if group}
    policy, expert = outcomes.get("policy", []), outcomes.get("expert", [])
    goals = {(o.plan.task, o.plan.index) for o in outcomes.get("held_out_instruction", [])}
    if goals:
        rows["same_goals"] = summary(successes([o for o in policy if (o.plan.task, o.plan.index) in goals]))
    steps = [o.steps for o in policy if o.success]
    return {
        "rows": rows,
        "tier_of_task": {task: tier_of(task) for task in params.metaworld.tasks},
        "success_counts": "any step of the episode",
        "intervals": "95 % Wilson",
        "mean_steps_to_success": float(np.mean(steps)) if steps else None,
        "expert_failed_goals_kept": sum(not o.success for o in expert) if expert else None,
        "max_steps": params.metaworld.max_steps,
        "execute": params.execute,
        "rate_hz": RATE_HZ,
    }


def record_of(outcome: Outcome) -> dict[str, Any]:
    """One line of `episodes.jsonl`."""
    plan = outcome.plan
    return {
        "row": plan.row, "task": plan.task, "index": plan.index, "seed": plan.seed, "instruction": plan.instruction,
        "draw": [round(value, 6) for value in outcome.draw], "success": outcome.success, "steps": outcome.steps,
        "policy_calls": len(outcome.calls),
    }  # fmt: skip


def write_metaworld(folder: Path, store: EpisodeStore, policy: Evaluated, params: Params, resume: Resume) -> dict[str, Any]:
    """`run` with `policy`, and write to `folder`; print and return metrics.

    `episodes.jsonl` has a line for each episode. Recorded ones are as `write_rollout` leaves them, and with
    `evaluate.record_actions` have what was executed, actions (steps, 4) float32, and proprioception (steps + 1, 4)
    float32.
    """
    outcomes = run(
        store, policy, params.evaluate, cameras=cameras_of(policy, store.cameras),
        proprioception=policy is not None and policy.needs_proprioception, seed=params.seed, workers=params.machine.workers,
        resume=resume,
    )  # fmt: skip
    metrics = metaworld_metrics(outcomes, params.evaluate)
    metrics["setting"] = setting_of(store, policy, params.evaluate)
    lines = [json.dumps(record_of(outcome), sort_keys=True) for group in outcomes.values() for outcome in group]
    (folder / "episodes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for played in outcomes.get("policy", []):
        executed: dict[str, NDArray[np.float32]] = {}
        if params.evaluate.record_actions and (recorded := played.recorded) is not None:
            executed["actions"] = np.clip(recorded.actions, -1.0, 1.0)  # as the simulator does
            executed["proprioception"] = recorded.proprioception
        write_rollout(folder, played, policy, params, executed)
    macro = {row: f"{value['macro']['success']:.0%}" for row, value in metrics["rows"].items()}
    console.print(f"mean success over tasks: {macro}", highlight=False)
    return metrics
