"""Chunks on a simulated clock: when actions come, which they are, what happens when a call takes too long, and limits."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
import pytest

from svam.serving.execution import Action, Asynchronous, Limits, Run, Synchronous, run
from svam.serving.protocol import ServingError

K = 10


@dataclass
class World:
    """A clock, a robot whose observation is the number of the step, and a policy whose calls take their time. An action is
    [step of the look, place in the chunk]."""

    rate_hz: float
    call_steps: Callable[[], float]
    time: float = 0.0
    executed: list[list[int]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def observe(self) -> Mapping[str, Any]:
        return {"step": len(self.executed)}

    def execute(self, action: Action) -> None:
        self.executed.append([int(value) for value in action])
        self.times.append(self.time)

    def chunk(self, observation: Mapping[str, Any]) -> Action:
        return np.array([[observation["step"], place] for place in range(K)], np.float32)

    def ask(self, observation: Mapping[str, Any]) -> Action:
        self.time += self.call_steps() / self.rate_hz
        return self.chunk(observation)

    def submit(self, observation: Mapping[str, Any]) -> Call:
        return Call(self, self.time + self.call_steps() / self.rate_hz, self.chunk(observation))

    def run(self, chunks: Synchronous | Asynchronous, steps: int = 200) -> Run:
        return run(chunks.next_action, self, rate_hz=self.rate_hz, steps=steps, now=self.now, sleep=self.sleep)

    @property
    def lags(self) -> list[int]:
        """By how many steps each action comes after the step that it was planned for."""
        return [step - (look + place) for step, (look, place) in enumerate(self.executed)]


@dataclass
class Call:
    """An answer that is there from a moment on; waiting for it moves the clock."""

    world: World
    ready: float
    answer: Action

    def done(self) -> bool:
        return self.world.time >= self.ready - 1e-9

    def result(self) -> Action:
        self.world.time = max(self.world.time, self.ready)
        return self.answer


@pytest.mark.parametrize("rate_hz", [25.0, 50.0])
@pytest.mark.parametrize("calls", [[0.0], [1.0], [3.5], [5.0], [8.0], [8.0, 0.2, 4.0, 7.9, 0.0]], ids=str)
def test_no_action_is_late_while_calls_take_up_to_80_percent_of_a_chunk(rate_hz: float, calls: list[float]) -> None:
    durations = cycle(calls)
    world = World(rate_hz, lambda: next(durations))
    chunks = Asynchronous(world.submit)
    assert world.run(chunks) == Run(steps=200, late=0, worst=0.0)
    assert chunks.missed == 0
    np.testing.assert_allclose(np.diff(world.times), 1.0 / rate_hz, rtol=1e-6)
    assert max(world.lags) <= 6  # (2 * 0.8 - 1) * 10, as the docstring says
    assert len({look for look, _ in world.executed}) > 200 / K, "chunks are gone over to before they end"


@pytest.mark.parametrize("steps", [0.0, 2.0, 4.5])
def test_half_a_chunk_executes_every_action_at_the_step_it_was_planned_for(steps: float) -> None:
    world = World(25.0, lambda: steps)
    chunks = Asynchronous(world.submit, reserve=0.5)
    assert world.run(chunks).late == 0 and chunks.missed == 0
    assert set(world.lags) == {0}


def test_above_its_share_a_call_leaves_steps_without_an_action() -> None:
    """With calls of 12 steps, each chunk's last 8 actions are executed and 4 steps wait: in 12 steps, 4 are missed."""
    stopping = World(50.0, lambda: 12.0)
    with pytest.raises(ServingError, match=r"chunk of 10 actions is over and the next is not there, 8 steps after"):
        stopping.run(Asynchronous(stopping.submit))
    assert len(stopping.executed) == 10, "the first chunk was executed whole"
    for when_late, expected in (("hold", K - 1), ("zero", 0)):
        world = World(50.0, lambda: 12.0)
        chunks = Asynchronous(world.submit, when_late=when_late)  # type: ignore[arg-type]
        assert world.run(chunks, steps=2 + 12 * 5) == Run(62, late=0, worst=0.0), "the robot is never left without a command"
        assert chunks.missed == 4 * 5
        # The first chunk is asked for at step 0 and the second at step 2; it comes at step 14, and its first two are skipped.
        assert [place for _, place in world.executed[:10]] == list(range(10))
        assert [place for _, place in world.executed[10:14]] == [expected] * 4
        assert world.executed[14] == [2, 2]


def test_synchronous_waits_and_shifts_what_follows() -> None:
    world = World(25.0, lambda: 3.0)
    assert world.run(Synchronous(world.ask, execute=5), steps=20) == Run(20, late=3, worst=pytest.approx(3 / 25))
    assert [place for _, place in world.executed] == [0, 1, 2, 3, 4] * 4
    gaps = np.diff(world.times) * 25
    np.testing.assert_allclose(gaps, ([1.0] * 4 + [4.0]) * 3 + [1.0] * 4, rtol=1e-6)
    with pytest.raises(ServingError, match="chunk has 10 actions, but 11"):
        Synchronous(world.ask, execute=11).next_action(world.observe)


def test_errors_of_a_call_reach_the_loop() -> None:
    world = World(25.0, lambda: 2.0)

    class Failed(Call):
        def result(self) -> Action:
            raise ServingError("lost")

    calls = iter([Call, Call, Failed])

    def submit(observation: Mapping[str, Any]) -> Call:
        return next(calls)(world, world.time, world.chunk(observation))

    with pytest.raises(ServingError, match="lost"):
        world.run(Asynchronous(submit))
    assert world.executed == [[0, 0], [0, 1], [0, 2], [2, 1], [2, 2]]
    for reserve in (0.0, 1.5, math.nan):
        with pytest.raises(ServingError, match="reserve"):
            Asynchronous(world.submit, reserve=reserve)


LOW, HIGH = np.array([-1.0, 0.0], np.float32), np.array([1.0, 2.0], np.float32)


def action(*values: float) -> Action:
    return np.array(values, np.float32)


def test_limits_clamp_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(LOW, HIGH, change=action(0.5, 0.25), previous=action(0.0, 1.0))
    with caplog.at_level(logging.WARNING, "svam.serving"):
        assert limits.apply(action(0.5, 1.25)).tolist() == [0.5, 1.25] and not caplog.messages
        assert limits.apply(action(3.0, 1.25)).tolist() == [1.0, 1.25]  # the range
        assert limits.apply(action(0.0, 1.25)).tolist() == [0.5, 1.25]  # the change from 1.0
        assert limits.apply(action(0.0, -9.0)).tolist() == [0.0, 1.0]
    assert limits.clamped == 3
    assert caplog.messages[0].startswith("dimension 0 of the action is 3, allowed is 1 (the action before: 0.5): clamped")
    assert len(caplog.messages) == 2, "once for each dimension"
    free = Limits(LOW, HIGH, change=action(0.5, 0.25))
    assert free.apply(action(-1.0, 2.0)).tolist() == [-1.0, 2.0], "the first action may be anywhere in the range"


def test_limits_stop_and_say_so() -> None:
    limits = Limits(LOW, HIGH, change=action(0.5, 0.25), excess="stop")
    limits.apply(action(0.0, 0.0))
    with pytest.raises(ServingError, match=r"dimension 1 of the action is 0.5, allowed is 0.25 .*: stopped"):
        limits.apply(action(0.0, 0.5))
    for bad in (action(np.nan, 0.0), action(np.inf, 0.0), action(0.0)):
        with pytest.raises(ServingError, match="expected 2 finite numbers"):
            Limits(LOW, HIGH).apply(bad)
    world = World(25.0, lambda: 0.0)
    with pytest.raises(ServingError, match="dimension 1 of the action is 3"):
        run(
            Synchronous(world.ask, execute=K).next_action, world, rate_hz=25.0, steps=20, now=world.now, sleep=world.sleep,
            limits=Limits(action(0, 0), action(100, 2), excess="stop"),
        )  # fmt: skip
    assert len(world.executed) == 3
