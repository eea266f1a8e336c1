"""Action chunks on a robot, at its own rate: when the next chunk is asked for, which of its actions are executed, and limits.

The loop is `run`; what it asks for each next action is `Synchronous` or `Asynchronous`:

    with PolicyClient(url) as client, ThreadPoolExecutor(1) as thread:
        chunks = Asynchronous(partial(thread.submit, client.actions))
        run(chunks.next_action, robot, rate_hz=client.metadata["rate_hz"], steps=500, limits=limits)
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from svam.serving.protocol import ServingError

Action = NDArray[np.float32]
Look = Callable[[], Mapping[str, Any]]
"""Gives the observation of this moment, as the server takes it."""
LATE = 0.1
"""An action counts as late when it is due for more than this share of the period."""
log = logging.getLogger("svam.serving")


class Robot(Protocol):
    """What is driven."""

    def observe(self) -> Mapping[str, Any]: ...
    def execute(self, action: Action) -> None: ...


class Pending(Protocol):
    """A chunk (K, A) that has been asked for; `concurrent.futures.Future` is one."""

    def done(self) -> bool: ...
    def result(self) -> Action: ...


class Synchronous:
    """Looks, waits for a chunk, executes its first `execute` actions, and looks again. The robot stands still while a call
    takes its time, so the first action of every chunk is late by just that; nothing is executed that was not planned from
    what the robot saw when it stood there."""

    def __init__(self, ask: Callable[[Mapping[str, Any]], Action], execute: int) -> None:
        self._ask, self._execute = ask, execute
        self._left: list[Action] = []

    def next_action(self, look: Look) -> Action:
        """(A,) float32. Raises `ServingError` if a chunk is shorter than `execute`, and what `ask` raises."""
        if not self._left:
            chunk = self._ask(look())
            if len(chunk) < self._execute:
                raise ServingError(f"the policy's chunk has {len(chunk)} actions, but {self._execute} are to be executed")
            self._left = list(chunk[: self._execute])
        return self._left.pop(0)


class Asynchronous:
    """Asks for the next chunk while the present one is executed, and goes over to it as soon as it is there.

    Action i of a chunk is planned for i steps after the look that it was planned from. When a chunk arrives, the steps that
    have passed meanwhile are skipped, but never so many that less than `reserve` of the chunk is left; and as soon as no more
    than that is left, the next chunk is asked for. Hence with chunks of K actions, and calls that take up to reserve * K
    steps however they vary, there is always an action when one is due. With calls of up to half a chunk, `reserve` 0.5
    executes every action at the very step it was planned for; 0.8 allows calls of 80 % of a chunk, whose actions then come up
    to (2 * 0.8 - 1) * K steps after the ones they were planned for.

    A call that takes longer leaves steps without an action. Each is counted in `missed`, and `when_late` says what happens:
    "stop" raises, "hold" repeats the chunk's last action (right where actions are positions), "zero" gives zeros (right where
    they are velocities or differences). Execution goes on with the chunk when it comes, as above.

    submit: sends an observation and returns at once, such as `partial(thread.submit, client.actions)`.
    """

    def __init__(
        self, submit: Callable[[Mapping[str, Any]], Pending], reserve: float = 0.8,
        when_late: Literal["stop", "hold", "zero"] = "stop",
    ) -> None:  # fmt: skip
        if not 0.0 < reserve <= 1.0:
            raise ServingError(f"reserve is {reserve}, expected a share of a chunk above 0 and at most 1")
        self._submit, self._reserve, self._when_late = submit, reserve, when_late
        self._pending: Pending | None = None
        self._chunk: Action | None = None
        self._next = self._asked = self._step = 0
        self.missed = 0

    def next_action(self, look: Look) -> Action:
        """(A,) float32, at once; only the first call waits for a chunk. To be called once a step.

        Raises:
            ServingError: `when_late` is "stop" and the next chunk is not there; also what a call raised.
        """
        if self._chunk is None and self._pending is None:
            self._ask(look)
        if self._pending is not None and (self._chunk is None or self._pending.done()):
            self._go_over(self._pending.result())
        chunk = self._chunk
        assert chunk is not None  # the first call has waited for it
        if self._pending is None and len(chunk) - self._next <= self._kept(chunk):
            self._ask(look)
        self._step += 1
        if self._next == len(chunk):
            return self._missed_action(chunk)
        self._next += 1
        return np.asarray(chunk[self._next - 1])

    def _kept(self, chunk: Action) -> int:
        """How many actions the next call may take."""
        return math.ceil(round(self._reserve * len(chunk), 6))

    def _ask(self, look: Look) -> None:
        self._asked, self._pending = self._step, self._submit(look())

    def _go_over(self, chunk: Action) -> None:
        self._chunk, self._pending = chunk, None
        self._next = min(self._step - self._asked, len(chunk) - self._kept(chunk))

    def _missed_action(self, chunk: Action) -> Action:
        self.missed += 1
        if self._when_late == "stop":
            raise ServingError(
                f"the chunk of {len(chunk)} actions is over and the next is not there, {self._step - 1 - self._asked} steps "
                "after it was asked for: stopped; make calls faster, or say with when_late what to do meanwhile"
            )
        return np.asarray(chunk[-1]) if self._when_late == "hold" else np.zeros_like(chunk[-1])


@dataclass
class Limits:
    """What an action may be, by dimension: (A,) arrays, in the units of the robot.

    low, high: its range. change: the largest difference to the action before, None for any. excess: "clamp" executes the
    nearest action within the limits, "stop" raises. previous: the action before the first, such as where the robot stands;
    None lets the first be anywhere in the range. clamped: how many actions were changed; the log says which dimension
    first, and that it goes on.
    """

    low: Action
    high: Action
    change: Action | None = None
    excess: Literal["clamp", "stop"] = "clamp"
    previous: Action | None = None
    clamped: int = 0
    _told: set[int] = field(default_factory=set, repr=False)

    def apply(self, action: Action) -> Action:
        """The action to execute, (A,) float32.

        Raises:
            ServingError: another shape, a NaN or infinity, or with "stop" an action outside the limits.
        """
        if action.shape != np.shape(self.low) or not np.isfinite(action).all():
            raise ServingError(f"the action is {action}, expected {np.size(self.low)} finite numbers: stopped")
        allowed = np.clip(action, self.low, self.high)
        if self.change is not None and self.previous is not None:
            allowed = np.clip(allowed, self.previous - self.change, self.previous + self.change)
        allowed = allowed.astype(np.float32)
        outside = np.flatnonzero(allowed != action)
        if len(outside):
            self._tell(int(outside[0]), action, allowed)
        self.previous = allowed
        return allowed

    def _tell(self, dimension: int, action: Action, allowed: Action) -> None:
        before = "" if self.previous is None else f" (the action before: {self.previous[dimension]:g})"
        found = f"dimension {dimension} of the action is {action[dimension]:g}, allowed is {allowed[dimension]:g}{before}"
        if self.excess == "stop":
            raise ServingError(f"{found}: stopped")
        self.clamped += 1
        if dimension not in self._told:
            self._told.add(dimension)
            log.warning("%s: clamped, as further ones will be; `clamped` counts them", found)


@dataclass(frozen=True)
class Run:
    """What a run was like. late: actions that came after they were due. worst: the longest such delay in seconds."""

    steps: int
    late: int
    worst: float


def run(
    next_action: Callable[[Look], Action], robot: Robot, *, rate_hz: float, steps: int, limits: Limits | None = None,
    now: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
) -> Run:  # fmt: skip
    """Execute `steps` actions, one each 1 / `rate_hz` seconds after the first. A late action is executed when it comes and
    moves those after it, so that none follow one another faster than the rate. `now`, `sleep`: the clock, in seconds."""
    period = 1.0 / rate_hz
    late, worst, due = 0, 0.0, None
    for _ in range(steps):
        if due is not None:
            sleep(max(0.0, due - now()))
        action = next_action(robot.observe)
        if limits is not None:
            action = limits.apply(action)
        ready = now()
        due = ready if due is None else due
        if ready - due > LATE * period:
            late, worst, due = late + 1, max(worst, ready - due), ready
        robot.execute(action)
        due += period
    return Run(steps, late, worst)
