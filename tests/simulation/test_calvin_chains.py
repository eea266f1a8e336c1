"""CALVIN's official chains: the first ones as published, the digest of all, and that each can be solved as it says."""

from __future__ import annotations

from collections import Counter

import pytest

from svam.simulation.calvin_chains import DIGEST, digest, official_chains

FIRST = [
    ({"led": 1, "lightbulb": 1, "slider": "left", "drawer": "open", "red_block": "slider_left", "blue_block": "table",
      "pink_block": "slider_right", "grasped": 0},
     ("rotate_blue_block_right", "move_slider_right", "lift_red_block_slider", "place_in_slider", "turn_off_lightbulb")),
    ({"led": 1, "lightbulb": 1, "slider": "right", "drawer": "open", "red_block": "slider_right", "blue_block": "table",
      "pink_block": "slider_left", "grasped": 0},
     ("turn_off_led", "push_into_drawer", "lift_blue_block_drawer", "place_in_slider", "close_drawer")),
]  # fmt: skip
"""As mees/calvin's get_sequences(1000) returns them."""


def test_the_first_chains_are_the_published_ones() -> None:
    chains = official_chains(5)
    assert [(chain.initial_state, chain.subtasks) for chain in chains[:2]] == FIRST
    # The simulator's start of a scene is drawn from a hash of its values in their order.
    assert list(chains[0].initial_state) == list(FIRST[0][0])
    assert official_chains(3) == chains[:3]


@pytest.mark.slow
def test_all_chains_are_the_published_ones() -> None:
    """The digest is of the list that mees/calvin's own function returned, as JSON."""
    chains = official_chains()
    assert len(chains) == 1000 and digest(chains) == DIGEST
    starts = Counter(tuple(chain.initial_state.values()) for chain in chains)
    assert Counter(starts.values()) == {6: 40, 5: 152}
    assert digest([*chains[1:], chains[0]]) != DIGEST
