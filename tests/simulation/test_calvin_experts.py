"""CALVIN's scripted experts in the simulator: every subtask alone, and one after the other in official chains."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from svam.errors import ParamsError
from svam.simulation.calvin import CalvinEnvironment
from svam.simulation.calvin_chains import Scene
from svam.simulation.calvin_experts import EXPERT_TASKS, Expert
from tests.calvin import checkout, needs_calvin

pytestmark = needs_calvin

STATES: tuple[Scene, ...] = (
    {"led": 0, "lightbulb": 0, "slider": "right", "drawer": "closed", "red_block": "table", "blue_block": "table",
     "pink_block": "slider_left", "grasped": 0},
    {"led": 1, "lightbulb": 1, "slider": "left", "drawer": "open", "red_block": "slider_right", "blue_block": "slider_left",
     "pink_block": "table", "grasped": 0},
)  # fmt: skip


@pytest.fixture(scope="module")
def env() -> Iterator[CalvinEnvironment]:
    env = CalvinEnvironment(folder=checkout().folder, cameras=(), states=STATES)
    yield env
    env.close()


def solve(env: CalvinEnvironment, subtask: str) -> int | None:
    """After how many steps the expert solves the subtask, or None."""
    env.begin(subtask)
    expert = Expert(env, subtask)
    for step in range(100):
        action = expert.action()
        assert action.shape == (7,) and np.abs(action).max() <= 1 and action[6] in (-1, 1)
        if env.step(action):
            return step + 1
    return None


@pytest.mark.parametrize("subtask", EXPERT_TASKS)
def test_every_expert_solves_its_subtask(env: CalvinEnvironment, subtask: str) -> None:
    other = subtask in ("turn_off_led", "turn_off_lightbulb", "close_drawer", "move_slider_right") or "pink" in subtask
    env.reset(int(other))
    assert (solve(env, subtask) or 0) > 5


def test_experts_go_on_where_others_ended(env: CalvinEnvironment) -> None:
    env.reset(1)
    for subtask in (
        "close_drawer", "turn_off_led", "move_slider_right", "turn_off_lightbulb", "push_pink_block_left", "open_drawer",
        "turn_on_led", "turn_on_lightbulb", "move_slider_left", "lift_pink_block_table",
    ):  # fmt: skip
        assert solve(env, subtask), subtask


def test_a_subtask_without_an_expert_is_named(env: CalvinEnvironment) -> None:
    with pytest.raises(ParamsError, match=r"'rotate_red_block_left' has no scripted expert"):
        Expert(env, "rotate_red_block_left")
