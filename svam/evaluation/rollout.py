"""Closed loop: environments in worker processes, one policy process with batches of one fixed size.

Timing cannot change a result. The policy is called in rounds: every slot that has an episode contributes one observation, the
batch is always `batch` rows (row = slot, empty slots repeat another's), and slots are refilled between rounds in slot order.
Sampling noise is keyed by seed, episode and step. So neither the number of workers nor their speed can change a bit, and an
episode does not depend on which others happen to run beside it. Frames are rendered only where the policy is called (every
`execute` steps) and on every step of recorded episodes; scripted episodes render nothing.

An episode has one goal, its task, or is a chain of goals, one sentence each, that are pursued in turn without a reset: the
next begins where the last was reached, with a new call of the policy, and the first that is not reached ends the episode.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from svam.console import progress_bar, timed
from svam.contract import Observation
from svam.device import become_worker
from svam.errors import MachineError, SvamError
from svam.resume import NO_RESUME, Resume
from svam.seeds import generator, seed_of

Controller = Literal["expert", "random"]
Moment = tuple[NDArray[np.uint8], NDArray[np.float32]]
"""Picture and proprioception."""
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


class ChainEnvironment(Environment, Protocol):
    """One whose episodes are chains: from `begin` on, `step` tells whether that goal is reached."""

    def begin(self, goal: str) -> None: ...


MakeEnvironment = Callable[[str], Environment]
"""Builds the environment of a task, in a worker process; a picklable function of the task's name."""


@dataclass(frozen=True)
class PlannedEpisode:
    """One episode to run: the task, which of its episodes, the environment's seed, and the sentence the policy reads.
    `chain`: goals in their order, each with its sentence; empty where the task is the goal."""

    row: str
    task: str
    index: int
    seed: int
    instruction: str = ""
    record: bool = False
    chain: tuple[tuple[str, str], ...] = ()

    @property
    def goals(self) -> tuple[tuple[str, str], ...]:
        """Name and sentence of each goal."""
        return self.chain or ((self.task, self.instruction),)


@dataclass(frozen=True)
class Recorded:
    """A whole episode: frames (steps + 1, V H, W, 3) uint8 of the V cameras, below one another, but for cameras whose pictures
    have another size than the first's; proprioception (steps + 1, P) and actions (steps, A) float32, as the policy gave them;
    row t of the first two is what was there when action t began."""

    frames: NDArray[np.uint8]
    proprioception: NDArray[np.float32]
    actions: NDArray[np.float32]


@dataclass(frozen=True)
class Outcome:
    """What happened. `draw`: the environment's. `success`: all goals were reached. `steps`: executed until then or until a
    goal's limit. `calls`: the steps at which the policy was called. `recorded`: of a recorded episode, else None. `reached`:
    after how many steps each goal was, as far as the episode came."""

    plan: PlannedEpisode
    draw: tuple[float, ...]
    success: bool
    steps: int
    calls: tuple[int, ...] = ()
    recorded: Recorded | None = field(default=None, repr=False)
    reached: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Reply:
    """A worker's reply: whether the goal was reached, what the policy sees next (absent once the episode is over) and what has
    been recorded since: all cameras' pictures, and proprioception."""

    draw: tuple[float, ...]
    success: bool
    steps: int
    frames: dict[str, NDArray[np.uint8]] | None
    proprioception: NDArray[np.float32] | None
    recorded: list[Moment]


def _save_outcome(outcome: Outcome, resume: Resume) -> None:
    """Keep a finished episode for the next run, should this one be killed."""
    value = {
        "draw": outcome.draw, "success": outcome.success, "steps": outcome.steps, "calls": outcome.calls,
        "reached": outcome.reached,
    }  # fmt: skip
    recorded = outcome.recorded
    write = None if recorded is None else lambda file: save_file(vars(recorded), file)
    resume.save_record(_record_name(outcome.plan), value, write)


def _load_outcome(plan: PlannedEpisode, resume: Resume) -> Outcome | None:
    """The outcome of an episode that an earlier, killed run has finished."""
    record = resume.load_record(_record_name(plan))
    if record is None:
        return None
    recorded = Recorded(**load_file(record.file)) if record.file else None
    value = record.value
    calls, reached = tuple(value["calls"]), tuple(value["reached"])
    return Outcome(plan, tuple(value["draw"]), value["success"], value["steps"], calls, recorded, reached)


def _record_name(plan: PlannedEpisode) -> str:
    return f"{plan.row}_{plan.task}_{plan.index}"


_environments: dict[int, tuple[str, Environment]] = {}
_make_environment: list[MakeEnvironment] = []


def _set_up(make: MakeEnvironment) -> None:
    _make_environment[:] = [make]
    become_worker()


def _environment(slot: int, task: str) -> Environment:
    """The slot's environment, rebuilt only when its task changes: building one costs far more than an episode's physics."""
    if slot in _environments and _environments[slot][0] != task:
        _environments.pop(slot)[1].close()
    if slot not in _environments:
        _environments[slot] = (task, _make_environment[0](task))
    return _environments[slot][1]


def _begin_goal(environment: Environment, plan: PlannedEpisode, number: int) -> None:
    if plan.chain:
        cast(ChainEnvironment, environment).begin(plan.chain[number][0])


def _begin(slot: int, plan: PlannedEpisode) -> _Reply:
    environment = _environment(slot, plan.task)
    environment.reset(plan.seed)
    _begin_goal(environment, plan, 0)
    frames = dict(environment.observe())
    recorded = [_moment(environment, frames)] if plan.record else []
    return _Reply(_draw(environment), False, 0, frames, environment.proprioception(), recorded)


def _moment(environment: Environment, frames: Mapping[str, NDArray[np.uint8]]) -> Moment:
    first, *others = frames.values()
    return np.concatenate([first, *(frame for frame in others if frame.shape == first.shape)]), environment.proprioception()


def _advance(slot: int, plan: PlannedEpisode, goal: int, actions: NDArray[np.float32], last: bool) -> _Reply:
    """Execute `actions` (k, A) until the first success; look once more unless that of the last goal, or `last`, ends the
    episode."""
    environment = _environments[slot][1]
    recorded: list[Moment] = []
    success, steps = False, 0
    for action in actions:
        success = bool(environment.step(action))
        steps += 1
        if plan.record:
            recorded.append(_moment(environment, environment.observe()))
        if success:
            break
    over = goal + 1 == len(plan.goals) if success else last
    if success and not over:
        _begin_goal(environment, plan, goal + 1)
    frames = None if over else dict(environment.observe())
    proprioception = None if over else environment.proprioception()
    return _Reply(_draw(environment), success, steps, frames, proprioception, recorded)


def _play(slot: int, plan: PlannedEpisode, controller: Controller, dimensions: int, max_steps: int, seed: int) -> Outcome:
    """A whole episode of a controller that needs no picture. `random`: uniform in [-1, 1], drawn anew at every step."""
    environment = _environment(slot, plan.task)
    environment.reset(plan.seed)
    random = generator(seed, "random policy", plan.task, plan.index)
    reached: list[int] = []
    steps = 0
    for goal in range(len(plan.goals)):
        _begin_goal(environment, plan, goal)
        success, limit = False, steps + max_steps
        while steps < limit and not success:
            if controller == "expert":
                action = environment.expert_action()
            else:
                action = random.uniform(-1.0, 1.0, dimensions).astype(np.float32)
            success = bool(environment.step(action))
            steps += 1
        if not success:
            break
        reached.append(steps)
    return Outcome(plan, _draw(environment), len(reached) == len(plan.goals), steps, reached=tuple(reached))


def _close_all() -> None:
    for _, environment in _environments.values():
        environment.close()
    _environments.clear()


def _draw(environment: Environment) -> tuple[float, ...]:
    return tuple(float(value) for value in np.asarray(environment.draw).ravel())


class Workers:
    """Worker processes (spawned) that own the environments; slot s lives in process s modulo their number. `one_each`: the
    simulator allows one environment a process, which the slots of a process use in turn."""

    def __init__(self, make: MakeEnvironment, count: int, one_each: bool = False) -> None:
        self.count, self.one_each = count, one_each
        context = multiprocessing.get_context("spawn")
        self._pools = [ProcessPoolExecutor(1, mp_context=context, initializer=_set_up, initargs=(make,)) for _ in range(count)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pool in self._pools:
            if kind is None:
                pool.submit(_close_all).result()
            pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, slot: int, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Future[Result]:
        """Run `function` in the process of `slot`; calls of one slot run in order."""
        return self._pools[slot % self.count].submit(function, *args, **kwargs)

    def place(self, slot: int) -> int:
        """The environment that the slot uses: its own, or the one of its process."""
        return slot % self.count if self.one_each else slot


def _wait(future: Future[Result]) -> Result:
    try:
        with timed("waiting for the simulation"):
            return future.result()
    except BrokenProcessPool:
        raise MachineError(
            "a simulation process ended abruptly (out of memory, or the OpenGL library crashed); lower evaluate.batch or "
            "machine.workers, or set MUJOCO_GL to another backend (egl, osmesa)"
        ) from None


def run_scripted(
    plans: Sequence[PlannedEpisode], controller: Controller, workers: Workers, *, dimensions: int, max_steps: int, seed: int,
    resume: Resume = NO_RESUME,
) -> list[Outcome]:  # fmt: skip
    """Run the scripted expert, or uniformly random actions, on `plans`; any-step success. Outcomes in the order of `plans`.

    `resume`: keeps finished episodes; without it a killed run plays these again, which takes seconds where they are short.
    """
    outcomes: list[Outcome] = []
    known = [_load_outcome(plan, resume) for plan in plans]
    with progress_bar() as bar:
        task = bar.add_task(controller, total=len(plans), note="")
        futures = [
            None if found else workers.submit(i, _play, i % workers.count, plan, controller, dimensions, max_steps, seed)
            for i, (plan, found) in enumerate(zip(plans, known, strict=True))
        ]
        for future, found in zip(futures, known, strict=True):
            if future is not None:
                found = _wait(future)
                _save_outcome(found, resume)
            assert found is not None  # one of both is there
            outcomes.append(found)
            bar.update(task, advance=1, note=f"success {sum(o.success for o in outcomes)}/{len(outcomes)}")
    return outcomes


@dataclass
class _Slot:
    """A row of the batch with the episode that it runs."""

    position: int
    plan: PlannedEpisode
    reply: _Reply
    steps: int = 0
    calls: list[int] = field(default_factory=list)
    recorded: list[Moment] = field(default_factory=list)
    actions: list[NDArray[np.float32]] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)

    def observation(self, proprioception: bool) -> Observation:
        """What the policy reads; proprioception only if the policy uses it."""
        assert self.reply.frames is not None  # else the episode is over, and the slot empty
        sentence = self.plan.goals[len(self.reached)][1]
        return Observation(self.reply.frames, sentence, self.reply.proprioception if proprioception else None)

    def outcome(self) -> Outcome:
        calls, reached, recorded = tuple(self.calls), tuple(self.reached), None
        if self.plan.record:
            frames, states = zip(*self.recorded, strict=True)
            recorded = Recorded(np.stack(frames), np.stack(states), np.concatenate(self.actions))
        return Outcome(self.plan, self.reply.draw, self.reply.success, self.steps, calls, recorded, reached)


def take_next(waiting: list[tuple[int, PlannedEpisode]], task: str | None) -> tuple[int, PlannedEpisode] | None:
    """Remove and return the plan a free slot runs next: one of its own task, whose environment it holds, else one of the
    task with most plans left (the first such), so that few environments are built and no task is left for the end."""
    if not waiting:
        return None
    counts = Counter(plan.task for _, plan in waiting)
    chosen = task if task in counts else max(counts, key=lambda name: counts[name])
    return waiting.pop(next(i for i, (_, plan) in enumerate(waiting) if plan.task == chosen))


def noise_seed(seed: int, plan: PlannedEpisode, step: int) -> int:
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


@dataclass
class PolicyRollouts:
    """Runs `policy` on planned episodes, `batch` environments side by side. An episode ends at its first success or after
    `max_steps`, a chain at its last goal's, or `max_steps` after the goal before.

    Where a process holds one environment only, plan p has row p modulo `batch`, and waits until the environment is free: then
    which rows are alive together depends on the number of workers, but no row's actions do.

    Episodes that an earlier run has finished are not run again, but occupy their slot for as many rounds as they took: so
    every other episode gets the slot that it would have had, and its row in the batch decides the last bits of its actions.

    execute: actions executed of each chunk before the policy is called again. proprioception: whether the policy reads it.
    """

    policy: Policy
    workers: Workers
    seed: int
    batch: int
    execute: int
    max_steps: int
    proprioception: bool
    resume: Resume = NO_RESUME

    def run(self, plans: Sequence[PlannedEpisode]) -> list[Outcome]:
        """Outcomes in the order of `plans`.

        Raises:
            PolicyError: the policy returned a NaN, or a wrong shape.
            MachineError: a worker process died, or rendering does not work.
        """
        self._waiting = list(enumerate(plans))
        self._outcomes: dict[int, Outcome] = {}
        self._slots: dict[int, _Slot] = {}
        self._rounds_left: dict[int, int] = {}  # of slots whose episode an earlier run has finished
        self._last_tasks: dict[int, str] = {}  # of all slots
        with progress_bar() as self._bar:
            self._shown = self._bar.add_task("policy", total=len(plans), note="")
            self._fill_slots()
            while self._slots or self._rounds_left:
                self._rounds_left = {row: rounds - 1 for row, rounds in self._rounds_left.items()}
                if self._slots:
                    self._play_round()
                self._rounds_left = {row: rounds for row, rounds in self._rounds_left.items() if rounds}
                self._fill_slots()
        return [self._outcomes[position] for position in range(len(plans))]

    def _fill_slots(self) -> None:
        """Begin an episode in every empty slot, in slot order."""
        started: list[tuple[int, int, PlannedEpisode, Future[_Reply]]] = []
        for row in range(self.batch):
            if row in self._slots or row in self._rounds_left:
                continue
            chosen = self._choose(row, [begun[0] for begun in started])
            if chosen is None:
                continue
            position, plan = chosen
            self._last_tasks[row] = plan.task
            known = _load_outcome(plan, self.resume)
            if known is None:
                started.append((row, position, plan, self.workers.submit(row, _begin, self.workers.place(row), plan)))
            else:
                self._rounds_left[row] = len(known.calls)
                self._finish(position, known)
        for row, position, plan, future in started:
            reply = _wait(future)
            self._slots[row] = _Slot(position, plan, reply, recorded=list(reply.recorded))

    def _choose(self, row: int, started: Sequence[int]) -> tuple[int, PlannedEpisode] | None:
        """Remove and return the plan that an empty row runs next; None where it has to wait, or has none. `started`: rows whose
        episodes begin now."""
        if not self.workers.one_each:
            return take_next(self._waiting, self._last_tasks.get(row))
        if self.workers.place(row) in {self.workers.place(other) for other in (*self._slots, *started)}:
            return None
        own = [i for i, (position, _) in enumerate(self._waiting) if position % self.batch == row]
        return self._waiting.pop(own[0]) if own else None

    def _play_round(self) -> None:
        """Call the policy once for all slots, and execute its actions."""
        slots = dict(sorted(self._slots.items()))
        filler = next(iter(slots))
        in_batch = [slots.get(row, slots[filler]) for row in range(self.batch)]
        observations = [slot.observation(self.proprioception) for slot in in_batch]
        with timed("policy"):
            actions = self.policy.act(observations, [noise_seed(self.seed, slot.plan, slot.steps) for slot in in_batch])
        actions = checked_actions(actions, slots, self.batch, self.execute)
        replies = {}
        for row, slot in slots.items():
            slot.calls.append(slot.steps)
            limit = self.max_steps + (slot.reached[-1] if slot.reached else 0)
            count = min(self.execute, limit - slot.steps)
            goal, last = len(slot.reached), slot.steps + count >= limit
            place = self.workers.place(row)
            replies[row] = self.workers.submit(row, _advance, place, slot.plan, goal, actions[row, :count], last)
        for row, future in replies.items():
            slot = slots[row]
            slot.reply = _wait(future)
            slot.steps += slot.reply.steps
            slot.recorded.extend(slot.reply.recorded)
            slot.actions.append(actions[row, : slot.reply.steps])
            if slot.reply.success:
                slot.reached.append(slot.steps)
            if slot.reply.frames is None:
                outcome = self._slots.pop(row).outcome()
                _save_outcome(outcome, self.resume)
                self._finish(slot.position, outcome)

    def _finish(self, position: int, outcome: Outcome) -> None:
        self._outcomes[position] = outcome
        note = f"success {sum(o.success for o in self._outcomes.values())}/{len(self._outcomes)}"
        self._bar.update(self._shown, advance=1, note=note)
