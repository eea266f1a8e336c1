"""Expert styles: several ways to one goal from one picture, what is wished on them, and how they are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from svam.files import read_json
from svam.params import Style
from svam.simulation.collect import collect
from svam.simulation.experts import DETOUR_METRES, disturbances, first_success, record, style_of
from tests.simulation.test_scenes import QUIET, Make, small

STYLES: tuple[Style, ...] = ("direct", "left", "right", "high")


def way_of(arrays: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far the hand went to the right of the line from its start to the object, and above its start; metres, by step."""
    hand, thing = arrays["state"][:, :3].astype(np.float64), arrays["state"][0, 4:6]
    forward = (thing - hand[0, :2]) / np.linalg.norm(thing - hand[0, :2])
    offset = hand - hand[0]
    return offset[:, :2] @ np.array([forward[1], -forward[0]]), offset[:, 2]


def test_styles_go_different_ways_from_one_picture_and_succeed(make: Make) -> None:
    env = make("faucet-close", 32, scenes="shared")
    made = {}
    for style in STYLES:
        steps = first_success(env, 5, QUIET, 300, style)
        assert steps is not None
        made[style] = record(env, 5, QUIET, steps + 1, 1000, style)
        assert made[style]["success"][-1]
        np.testing.assert_array_equal(made[style]["actions"], made[style]["expert_actions"])
    first = [arrays["frames_corner2"][0] for arrays in made.values()]
    assert all(np.array_equal(first[0], frame) for frame in first)
    half = {style: [values[:30] for values in way_of(arrays)] for style, arrays in made.items()}
    reached = 0.7 * DETOUR_METRES
    assert half["right"][0].max() > reached and half["left"][0].min() < -reached
    assert abs(half["high"][0]).max() < 0.1 and half["high"][1].max() > reached
    assert max(half["left"][1].max(), half["right"][1].max()) < 0.1


def test_what_is_wished_is_the_styled_experts_also_under_noise(make: Make) -> None:
    env = make("window-open", 32, scenes="shared")
    noise = disturbances(np.random.default_rng(3), 500, 0.6)
    arrays = record(env, 4, noise, 40, 1000, "left")
    wished = arrays["expert_actions"]
    np.testing.assert_allclose(arrays["actions"], np.clip(wished + noise[:40], -1, 1), atol=1e-6)
    assert (arrays["actions"] != wished).any(axis=1).sum() > 5
    clean = record(env, 4, QUIET, 40, 1000, "direct")
    # At the first step, from one state: to the left of the way, against the scripted expert's own wish.
    assert wished[0, 0] < clean["expert_actions"][0, 0] - 0.3
    assert wished[0, 3] == clean["expert_actions"][0, 3]


def test_styles_are_drawn_by_seed_task_and_index_each_as_often() -> None:
    def drawn(seed: int, task: str) -> list[Style]:
        return [style_of(STYLES[:3], seed, task, index) for index in range(30)]

    styles = drawn(1, "faucet-open")
    assert all(set(styles[k : k + 3]) == set(STYLES[:3]) for k in range(0, 30, 3))
    assert styles == drawn(1, "faucet-open") and styles != drawn(2, "faucet-open") and styles != drawn(1, "faucet-close")
    assert styles != STYLES[:3] * 10
    assert [style_of(["high"], 1, "faucet-open", index) for index in range(3)] == ["high"] * 3


@pytest.mark.usefixtures("started")
def test_a_collection_states_its_styles(tmp_path: Path) -> None:
    collect(tmp_path / "styled", small("reach", styles=["left", "right"]), 5, 1, tmp_path / "scratch", "")
    provenance = read_json(tmp_path / "styled/reach/meta.json")["provenance"]
    assert provenance["styles"] == ["left", "right"] and "scenes" not in provenance
    assert {entry["style"] for entry in provenance["episodes"]} == {"left", "right"}
