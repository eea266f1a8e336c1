"""Closed loop: environments in worker processes, one policy process with batches of one fixed size.

All timing is taken out of the result. The policy is called in rounds: every live slot contributes one observation, the
batch is always `batch` rows (row = slot, empty slots repeat a live one), and slots are refilled between rounds in slot
order. Sampling noise is keyed by seed, episode and step. So neither the number of workers nor their speed can change a
bit, and an episode does not depend on which others happen to run beside it. Frames are rendered only where the policy
looks (every `execute` steps) and on every step of recorded episodes; scripted episodes render nothing.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass, field
from types import TracebackType
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from svam.console import progress_bar, timed
from svam.contract import Observation
from svam.device import become_worker
from svam.errors import MachineError, SvamError
from svam.resume import NOTHING_KEPT, Resume
from svam.seeds import generator, seed_of

Controller = Literal["expert", "random"]
P = ParamSpec("P")
Result = TypeVar("Result")


class PolicyError(SvamError, ValueError):
    """The policy returned something that is no action; the message names the episode and the step."""


class Policy(Protocol):
    """What is evaluated."""

    def act(self, observations: list[Observation], noise_seeds: list[int]) -> NDArray[np.float32]:
        """(B, K, A) float32 action chunks in physical units; row i depends on observation i and noise seed i alone."""
        ...


class Environment(Protocol):
    """One simulated task. Success is what `step` returns; frames are rendered by `observe` only. `draw` is what the seed
    decided (goal and object positions): two episodes with the same draw are the same episode."""

    @property
    def draw(self) -> NDArray[np.float32]: ...
    def reset(self, seed: int) -> None: ...
    def observe(self) -> Mapping[str, NDArray[np.uint8]]: ...
    def proprioception(self) -> NDArray[np.float32]: ...
    def step(self, action: NDArray[np.float32]) -> bool: ...
    def expert_action(self) -> NDArray[np.float32]: ...
    def close(self) -> None: ...


MakeEnvironment = Callable[[str], Environment]
"""Builds the environment of a task, in a worker process; a picklable function of the task's name."""


@dataclass(frozen=True)
class Plan:
    """One episode to run: the task, which of its episodes, the environment's seed, and the sentence the policy reads."""

    row: str
    task: str
    index: int
    seed: int
    instruction: str = ""
    record: bool = False


@dataclass(frozen=True)
class Outcome:
    """What happened. `draw`: the environment's. `steps`: executed until the first success or the limit. `calls`: the steps
    at which the policy was asked. `frames`: a recorded episode's (steps + 1, H, W, 3) uint8 of the first camera, else None."""

    plan: Plan
    draw: tuple[float, ...]
    success: bool
    steps: int
    calls: tuple[int, ...] = ()
    frames: NDArray[np.uint8] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class _View:
    """A worker's reply: what the policy sees next (absent once the episode is over) and what has been recorded since."""

    draw: tuple[float, ...]
    success: bool
    steps: int
    frames: dict[str, NDArray[np.uint8]] | None
    proprioception: NDArray[np.float32] | None
    recorded: list[NDArray[np.uint8]]


def _keep(outcome: Outcome, kind: str, resume: Resume) -> None:
    """Keep a finished episode; `kind` tells rows of one plan apart."""
    value = {
        "draw": outcome.draw, "success": outcome.success, "steps": outcome.steps, "calls": outcome.calls,
        "plan": astuple(outcome.plan),
    }  # fmt: skip
    frames = outcome.frames
    write = None if frames is None else lambda file: save_file({"frames": frames}, file)
    resume.keep(_name(outcome.plan, kind), value, write)


def _kept(plan: Plan, kind: str, resume: Resume) -> Outcome | None:
    """A finished episode of an earlier run."""
    found = resume.kept(_name(plan, kind))
    if found is None or found.value["plan"] != list(astuple(plan)):
        return None
    frames = load_file(found.file)["frames"] if found.file else None
    value = found.value
    return Outcome(plan, tuple(value["draw"]), value["success"], value["steps"], tuple(value["calls"]), frames)


def _name(plan: Plan, kind: str) -> str:
    return f"{kind}_{plan.row}_{plan.task}_{plan.index}"


_held: dict[int, tuple[str, Environment]] = {}
_make: list[MakeEnvironment] = []


def _set_up(make: MakeEnvironment) -> None:
    _make[:] = [make]
    become_worker()


def _environment(slot: int, task: str) -> Environment:
    """The slot's environment, rebuilt only when its task changes: building one costs far more than an episode's physics."""
    if slot in _held and _held[slot][0] != task:
        _held.pop(slot)[1].close()
    if slot not in _held:
        _held[slot] = (task, _make[0](task))
    return _held[slot][1]


def _begin(slot: int, plan: Plan) -> _View:
    environment = _environment(slot, plan.task)
    environment.reset(plan.seed)
    frames = dict(environment.observe())
    recorded = [next(iter(frames.values()))] if plan.record else []
    return _View(_draw(environment), False, 0, frames, environment.proprioception(), recorded)


def _advance(slot: int, plan: Plan, actions: NDArray[np.float32], last: bool) -> _View:
    """Execute `actions` (k, A) until the first success; look once more unless that or `last` ends the episode."""
    environment = _held[slot][1]
    recorded: list[NDArray[np.uint8]] = []
    success, steps = False, 0
    for action in actions:
        success = bool(environment.step(action))
        steps += 1
        if plan.record:
            recorded.append(next(iter(environment.observe().values())))
        if success:
            break
    over = success or last
    frames = None if over else dict(environment.observe())
    proprioception = None if over else environment.proprioception()
    return _View(_draw(environment), success, steps, frames, proprioception, recorded)


def _play(slot: int, plan: Plan, controller: Controller, dimensions: int, max_steps: int, seed: int) -> Outcome:
    """A whole episode of a controller that needs no picture. Random: uniform in [-1, 1], drawn anew at every step."""
    environment = _environment(slot, plan.task)
    environment.reset(plan.seed)
    random = generator(seed, "random policy", plan.task, plan.index)
    success, steps = False, 0
    while steps < max_steps and not success:
        if controller == "expert":
            action = environment.expert_action()
        else:
            action = random.uniform(-1.0, 1.0, dimensions).astype(np.float32)
        success = bool(environment.step(action))
        steps += 1
    return Outcome(plan, _draw(environment), success, steps)


def _close_all() -> None:
    for _, environment in _held.values():
        environment.close()
    _held.clear()


def _draw(environment: Environment) -> tuple[float, ...]:
    return tuple(float(value) for value in np.asarray(environment.draw).ravel())


class Workers:
    """Worker processes (spawned) that own the environments; slot s lives in process s modulo their number."""

    def __init__(self, make: MakeEnvironment, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pools = [
            ProcessPoolExecutor(1, mp_context=context, initializer=_set_up, initargs=(make,)) for _ in range(max(1, count))
        ]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pool in self._pools:
            if kind is None:
                pool.submit(_close_all).result()
            pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, slot: int, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Future[Result]:
        """Run `function` in the process of `slot`; calls of one slot run in order."""
        return self._pools[slot % len(self._pools)].submit(function, *args, **kwargs)

    @property
    def count(self) -> int:
        return len(self._pools)


def _wait(future: Future[Result]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool:
        raise MachineError(
            "a simulation process ended abruptly (out of memory, or the OpenGL library crashed); lower evaluate.batch or "
            "machine.workers, or set MUJOCO_GL to another backend (egl, osmesa)"
        ) from None


def play_scripted(
    plans: Sequence[Plan], controller: Controller, workers: Workers, *, dimensions: int, max_steps: int, seed: int,
    resume: Resume = NOTHING_KEPT,
) -> list[Outcome]:  # fmt: skip
    """Run the scripted expert, or uniformly random actions, on `plans`; any-step success. Outcomes in the order of `plans`."""
    outcomes = []
    with progress_bar() as bar:
        task = bar.add_task(controller, total=len(plans), note="")
        known = [_kept(plan, controller, resume) for plan in plans]
        futures = {
            i: workers.submit(i, _play, i % workers.count, plan, controller, dimensions, max_steps, seed)
            for i, plan in enumerate(plans)
            if known[i] is None
        }
        for i, finished in enumerate(known):
            with timed("waiting for the simulation"):
                outcome = finished or _wait(futures[i])
            if finished is None:
                _keep(outcome, controller, resume)
            outcomes.append(outcome)
            bar.update(task, advance=1, note=f"success {sum(o.success for o in outcomes)}/{len(outcomes)}")
    return outcomes


@dataclass
class _Slot:
    position: int
    plan: Plan
    view: _View
    steps: int = 0
    calls: list[int] = field(default_factory=list)
    recorded: list[NDArray[np.uint8]] = field(default_factory=list)

    def outcome(self) -> Outcome:
        frames = np.stack(self.recorded) if self.plan.record else None
        return Outcome(self.plan, self.view.draw, self.view.success, self.steps, tuple(self.calls), frames)


def take_next(waiting: list[tuple[int, Plan]], task: str | None) -> tuple[int, Plan] | None:
    """Remove and return the plan a free slot runs next: one of its own task, whose environment it holds, else one of the
    task with most plans left (the first such), so that few environments are built and no task is left for the end."""
    if not waiting:
        return None
    left = Counter(plan.task for _, plan in waiting)
    chosen = task if task in left else max(left, key=lambda name: left[name])
    return waiting.pop(next(i for i, (_, plan) in enumerate(waiting) if plan.task == chosen))


def noise_seed(seed: int, plan: Plan, step: int) -> int:
    """The key of the sampling noise: seed, episode (task and index) and step. Two rows of the results that differ only in
    the sentence therefore share goal and noise."""
    return seed_of(seed, "action noise", plan.task, plan.index, step)


def checked_actions(actions: NDArray[Any], slots: Mapping[int, Any], batch: int, execute: int) -> NDArray[np.float32]:
    """(batch, K, A) float32 if the live rows are finite.

    Raises:
        PolicyError: another shape, K smaller than `execute`, or a NaN or infinity in a live row.
    """
    values = np.asarray(actions, dtype=np.float32)
    if values.ndim != 3 or len(values) != batch or values.shape[1] < execute:
        raise PolicyError(f"the policy returned shape {values.shape}, expected ({batch}, {execute} or more, action dimensions)")
    for row, slot in slots.items():
        if not np.isfinite(values[row]).all():
            step, dimension = np.argwhere(~np.isfinite(values[row]))[0]
            raise PolicyError(
                f"the policy returned {values[row, step, dimension]} (chunk step {step}, dimension {dimension}) in episode "
                f"{slot.plan.index} of {slot.plan.task!r} at step {slot.steps}; the model or its input is broken"
            )
    return values


def run_policy(
    plans: Sequence[Plan], policy: Policy, workers: Workers, *, seed: int, batch: int, execute: int, max_steps: int,
    proprioception: bool, resume: Resume = NOTHING_KEPT,
) -> list[Outcome]:  # fmt: skip
    """Run `policy` on `plans`, `batch` environments side by side. An episode ends at its first success or after `max_steps`.

    Episodes that an earlier run has finished are not run again, but occupy their slot for as many rounds as they took: so
    every other episode gets the slot that it would have had, and its row in the batch decides the last bits of its actions.

    Args:
        execute: actions executed of each chunk before the policy looks again.
        proprioception: hand the environment's proprioception to the policy.

    Returns:
        Outcomes in the order of `plans`.

    Raises:
        PolicyError: a NaN, or a wrong shape.
        MachineError: a worker process died, or rendering does not work.
    """
    waiting = list(enumerate(plans))
    outcomes: dict[int, Outcome] = {}
    slots: dict[int, _Slot] = {}
    rounds_left: dict[int, int] = {}  # of the slots whose episode an earlier run has finished
    tasks: dict[int, str] = {}

    def refill() -> None:
        started: list[tuple[int, int, Plan, Future[_View]]] = []
        for row in range(batch):
            if row in slots or row in rounds_left or not (chosen := take_next(waiting, tasks.get(row))):
                continue
            tasks[row] = chosen[1].task
            known = _kept(chosen[1], "policy", resume)
            if known is not None:
                outcomes[chosen[0]], rounds_left[row] = known, len(known.calls)
                show()
            else:
                started.append((row, *chosen, workers.submit(row, _begin, row, chosen[1])))
        for row, position, plan, future in started:
            with timed("waiting for the simulation"):
                view = _wait(future)
            slots[row] = _Slot(position, plan, view, recorded=list(view.recorded))

    def play_round() -> None:
        live = dict(sorted(slots.items()))
        filler = next(iter(live))
        rows = [row if row in live else filler for row in range(batch)]
        seeds = [noise_seed(seed, live[row].plan, live[row].steps) for row in rows]
        observations = [_observation(live[row], proprioception) for row in rows]
        with timed("policy"):
            actions = checked_actions(policy.act(observations, seeds), live, batch, execute)
        replies = {}
        for row, slot in live.items():
            slot.calls.append(slot.steps)
            count = min(execute, max_steps - slot.steps)
            last = slot.steps + count >= max_steps
            replies[row] = workers.submit(row, _advance, row, slot.plan, actions[row, :count], last)
        for row, reply in replies.items():
            slot = live[row]
            with timed("waiting for the simulation"):
                slot.view = _wait(reply)
            slot.steps += slot.view.steps
            slot.recorded.extend(slot.view.recorded)
            if slot.view.frames is None:
                outcomes[slot.position] = slots.pop(row).outcome()
                _keep(outcomes[slot.position], "policy", resume)
                show()

    with progress_bar() as bar:
        shown = bar.add_task("policy", total=len(plans), note="")

        def show() -> None:
            bar.update(shown, advance=1, note=f"success {sum(o.success for o in outcomes.values())}/{len(outcomes)}")

        refill()
        while slots or rounds_left:
            ending = [row for row, left in rounds_left.items() if left == 1]
            for row in rounds_left:
                rounds_left[row] -= 1
            if slots:
                play_round()
            for row in ending:
                del rounds_left[row]
            refill()
    return [outcomes[position] for position in range(len(plans))]


def _observation(slot: _Slot, proprioception: bool) -> Observation:
    assert slot.view.frames is not None  # a slot without a view has been emptied
    return Observation(slot.view.frames, slot.plan.instruction, slot.view.proprioception if proprioception else None)
