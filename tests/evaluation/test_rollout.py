"""Closed loop: scheduling, padding, noise keys and failures, on a one-dimensional world."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from svam.contract import Observation
from svam.evaluation.rollout import (
    Outcome,
    PlannedEpisode,
    PolicyError,
    PolicyRollouts,
    Workers,
    checked_actions,
    noise_seed,
    run_scripted,
    take_next,
)
from svam.resume import NO_RESUME, Resume
from svam.seeds import generator
from tests import ROOT


class Line:
    """A point on a line: an action moves it by action[0] / 10; the goal, drawn from the seed, is reached within 0.05.

    The picture's first pixel is the point's place and its second the goal's, both times 100.
    """

    def __init__(self, task: str) -> None:
        self.task, self.place, self.looks = task, 0.0, 0

    def reset(self, seed: int) -> None:
        self.goal = float(np.float32(generator(seed, self.task).uniform(0.3, 1.0)))
        self.place = 0.0

    @property
    def draw(self) -> NDArray[np.float32]:
        return np.array([self.goal], np.float32)

    def observe(self) -> dict[str, NDArray[np.uint8]]:
        frame = np.zeros((2, 2, 3), np.uint8)
        frame[0, 0, 0], frame[0, 1, 0] = round(100 * np.clip(self.place, 0, 2)), round(100 * self.goal)
        return {"side": frame}

    def proprioception(self) -> NDArray[np.float32]:
        return np.array([self.place], np.float32)

    def step(self, action: NDArray[np.float32]) -> bool:
        self.place += float(np.clip(action[0], -1, 1)) / 10
        return abs(self.place - self.goal) < 0.05

    def expert_action(self) -> NDArray[np.float32]:
        return np.clip(np.array([10 * (self.goal - self.place)], np.float32), -1, 1)

    def close(self) -> None:
        pass


class Tour(Line):
    """A line whose goals are places, named by their tenths."""

    def begin(self, goal: str) -> None:
        self.goal = int(goal) / 10


class Seeker:
    """Goes towards the goal that it sees, with noise from its key; remembers how it was called."""

    def __init__(self, noise: float = 0.5) -> None:
        self.noise, self.batches, self.seeds, self.sentences = noise, [], [], []  # type: ignore[var-annotated]

    def act(self, observations: list[Observation], noise_seeds: list[int]) -> NDArray[np.float32]:
        self.batches.append(len(observations))
        self.seeds.append(list(noise_seeds))
        self.sentences.append([o.instruction for o in observations])
        chunks = []
        for observation, seed in zip(observations, noise_seeds, strict=True):
            frame = observation.frames["side"].astype(np.float32)
            direction = np.sign(frame[0, 1, 0] - frame[0, 0, 0])
            chunks.append(0.6 * direction + self.noise * np.random.default_rng(seed).standard_normal((4, 1)))
        return np.stack(chunks).astype(np.float32)


def plans(count: int, task: str = "a", row: str = "policy") -> list[PlannedEpisode]:
    return [PlannedEpisode(row, task, i, 1000 + i, f"go {task}", record=i == 0) for i in range(count)]


def roll(
    episodes: list[PlannedEpisode], workers: int, batch: int = 3, policy: Seeker | None = None, execute: int = 3
) -> list[Outcome]:
    with Workers(Line, workers) as pool:
        rollouts = PolicyRollouts(
            policy or Seeker(), pool, seed=0, batch=batch, execute=execute, max_steps=20, proprioception=False
        )
        return rollouts.run(episodes)


def same(one: list[Outcome], other: list[Outcome]) -> bool:
    return [(o.plan, o.draw, o.success, o.steps, o.calls) for o in one] == [
        (o.plan, o.draw, o.success, o.steps, o.calls) for o in other
    ]


def test_workers_and_batch_mates_change_nothing() -> None:
    episodes = plans(7, "a") + plans(4, "b")
    once = roll(episodes, workers=1)
    assert same(once, roll(episodes, workers=3))
    assert {o.plan.task for o in once} == {"a", "b"} and [o.plan for o in once] == episodes
    alone = roll(episodes[5:6], workers=1)
    assert same(alone, [once[5]])
    assert sum(o.success for o in once) > 0
    assert len({o.steps for o in once}) > 2, "all episodes alike: the test could not see a mix-up"


def test_batches_are_padded_and_noise_is_keyed_by_seed_episode_and_step() -> None:
    policy = Seeker()
    episodes = plans(4)
    outcomes = roll(episodes, workers=1, batch=3, policy=policy)
    assert set(policy.batches) == {3}
    assert policy.seeds[0] == [noise_seed(0, episodes[i], 0) for i in range(3)]
    used = [seed for seeds in policy.seeds for seed in seeds]
    expected = {noise_seed(0, o.plan, step) for o in outcomes for step in o.calls}
    assert set(used) == expected
    assert len(expected) == sum(len(o.calls) for o in outcomes)
    assert all(o.calls == tuple(range(0, 3 * len(o.calls), 3)) for o in outcomes)
    assert noise_seed(0, episodes[0], 0) != noise_seed(1, episodes[0], 0) != noise_seed(1, episodes[1], 0)


def test_recorded_episodes_have_a_frame_for_every_step() -> None:
    first, second = roll(plans(2), workers=1)
    recorded = first.recorded
    assert recorded is not None and second.recorded is None
    assert len(recorded.frames) == len(recorded.proprioception) == len(recorded.actions) + 1 == first.steps + 1
    assert recorded.frames[0, 0, 0, 0] == 0
    assert recorded.frames[-1, 0, 0, 0] == pytest.approx(100 * first.draw[0], abs=5.5) or not first.success
    moved = np.diff(recorded.proprioception, axis=0)
    assert moved == pytest.approx(np.clip(recorded.actions, -1, 1) / 10, abs=1e-6)


def test_limit_ends_an_episode_within_a_chunk() -> None:
    still = Seeker(noise=0.0)
    still.act = lambda o, n: np.zeros((len(o), 3, 1), np.float32)  # type: ignore[method-assign, misc, assignment]
    (outcome,) = roll(plans(1), workers=1, policy=still)
    assert not outcome.success and outcome.steps == 20 and outcome.calls == (0, 3, 6, 9, 12, 15, 18)


def test_scripted_rows_share_goals_and_are_repeatable() -> None:
    episodes = plans(5)
    with Workers(Line, 2) as pool:
        expert = run_scripted(episodes, "expert", pool, dimensions=1, max_steps=20, seed=0)
        random = run_scripted(episodes, "random", pool, dimensions=1, max_steps=20, seed=0)
    with Workers(Line, 1) as pool:
        again = run_scripted(episodes, "random", pool, dimensions=1, max_steps=20, seed=0)
    assert all(o.success for o in expert) and same(random, again)
    # The expert moves 0.1 a step until it is nearer than 0.05.
    assert [o.steps for o in expert] == [int(np.ceil(np.round((o.draw[0] - 0.05) / 0.1, 6))) for o in expert]
    assert [o.draw for o in random] == [o.draw for o in expert] == [o.draw for o in roll(episodes, 1)]


def test_queue_keeps_a_slot_on_its_task_then_takes_the_longest_queue() -> None:
    waiting = list(enumerate(plans(1, "a") + plans(2, "b") + plans(3, "c")))
    taken = [take_next(waiting, task) for task in ("b", None, "a", "a", "b", None, None)]
    assert [t and (t[1].task, t[0]) for t in taken] == [("b", 1), ("c", 3), ("a", 0), ("c", 4), ("b", 2), ("c", 5), None]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_policy_that_returns_no_number_fails_loudly(bad: float) -> None:
    policy = Seeker()
    good = policy.act

    def act(observations: list[Observation], noise_seeds: list[int]) -> NDArray[np.float32]:
        actions = good(observations, noise_seeds)
        if len(policy.batches) == 2:
            actions[1, 2, 0] = bad
        return actions

    policy.act = act  # type: ignore[method-assign]
    with pytest.raises(PolicyError, match=r"episode 1 of 'a' at step 3"):
        roll(plans(3), workers=1, policy=policy)
    with pytest.raises(PolicyError, match=r"\(2, 2, 1\), expected \(2, 3 or more"):
        checked_actions(np.zeros((2, 2, 1)), {}, 2, 3)


def tours(count: int) -> list[PlannedEpisode]:
    """Chains of three goals, of which the last is too far for a seeker's twenty steps in every second one."""
    last = ("5", "24")
    return [
        PlannedEpisode("policy", "tour", i, i, chain=tuple((goal, f"go to {goal}") for goal in ("3", "8", last[i % 2])))
        for i in range(count)
    ]


def walk(
    episodes: list[PlannedEpisode], workers: int, policy: Seeker | None = None, resume: Resume = NO_RESUME
) -> list[Outcome]:
    with Workers(Tour, workers, one_each=True) as pool:
        rollouts = PolicyRollouts(
            policy or Seeker(), pool, seed=0, batch=3, execute=3, max_steps=20, proprioception=False, resume=resume
        )
        return rollouts.run(episodes)


def test_a_chain_goes_on_where_its_last_goal_was_reached() -> None:
    policy = Seeker(noise=0.0)  # six hundredths a step, towards what it sees
    whole, broken = walk(tours(2), workers=1, policy=policy)
    # 0.3 is reached at 0.3, 0.8 at 0.78, and 0.5 from there at 0.54; each goal has a call of its own, at once.
    assert whole.success and whole.reached == (5, 13, 17) and whole.steps == 17
    assert whole.calls == (0, 3, 5, 8, 11, 13, 16)
    # Twenty steps after the second goal it is over, in the middle of a chunk.
    assert not broken.success and broken.reached == (5, 13) and broken.steps == 33
    assert broken.calls == (0, 3, 5, 8, 11, 13, 16, 19, 22, 25, 28, 31)
    own = [sentences[0] for sentences in policy.sentences[:7]]
    assert own == ["go to 3"] * 2 + ["go to 8"] * 3 + ["go to 5"] * 2


def test_one_environment_a_process_and_any_number_of_processes() -> None:
    episodes = tours(7)
    once = walk(episodes, workers=1)
    assert same(once, walk(episodes, workers=2)) and same(once, walk(episodes, workers=3))
    assert [o.plan for o in once] == episodes and len({o.steps for o in once}) > 2
    with Workers(Tour, 2, one_each=True) as pool:
        expert = run_scripted(episodes, "expert", pool, dimensions=1, max_steps=20, seed=0)
    assert [len(o.reached) for o in once[:2]] == [3, 2] and all(o.reached[:2] == (3, 8) for o in expert)


def test_finished_chains_are_not_run_again(tmp_path: Path) -> None:
    episodes, resume, policy = tours(7), Resume(tmp_path), Seeker()
    once = walk(episodes[:4], workers=2, resume=resume)
    assert same(walk(episodes, workers=2, resume=resume, policy=policy), walk(episodes, workers=1))
    used = {seed for seeds in policy.seeds for seed in seeds}
    assert not used & {noise_seed(0, o.plan, step) for o in once for step in o.calls}
    scripted = [dataclasses.replace(plan, row="random") for plan in episodes]

    def play(plans: list[PlannedEpisode], seed: int, resume: Resume) -> list[Outcome]:
        with Workers(Tour, 2, one_each=True) as pool:
            return run_scripted(plans, "random", pool, dimensions=1, max_steps=20, seed=seed, resume=resume)

    first, fresh = play(scripted[:4], 0, resume), play(scripted, 1, NO_RESUME)
    assert same(play(scripted, 1, resume), first + fresh[4:]) and not same(first, fresh[:4])


def test_workers_end_with_a_killed_policy_process(tmp_path: Path) -> None:
    code = """
import os, time
from svam.evaluation.rollout import Workers
from tests.evaluation.test_rollout import Line
if __name__ == "__main__":
    pool = Workers(Line, 1)
    print(pool.submit(0, os.getpid).result(), flush=True)
    time.sleep(300)
"""
    (tmp_path / "policy.py").write_text(code, encoding="utf-8")
    command, environment = [sys.executable, str(tmp_path / "policy.py")], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 120.0
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker outlived its policy process"
        time.sleep(0.1)
