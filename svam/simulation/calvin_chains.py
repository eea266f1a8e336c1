"""CALVIN's 1,000 official evaluation chains: a start of the scene, and five subtasks to be solved in a row.

The benchmark publishes no list but the procedure that draws it (mees/calvin, `get_sequences(1000)`), and numpy keeps the
streams of its `RandomState` as they are for ever. So the list is a fact, and `DIGEST` is of it; this module draws it anew.

What the list is. A scene is lights on or off, slider left or right, drawer open or closed, and each block on the table or on
one of the two shelves behind the slider; one or two blocks start on the table and no two on one shelf: 192 starts. A subtask
has a condition and an effect on such a scene. Each start gets its share of the 1,000 chains (the first 40 one more), from a
stream whose seed is the start's number: five of the 34 subtasks are drawn without replacement until they are of five different
categories and can be solved one after the other, where exactly one way to solve each must fit. A last stream, of seed 0,
shuffles all chains.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import Any

import numpy as np

OFFICIAL_CHAINS = 1000
SUBTASKS = 5
DIGEST = "604957a8a2d3102941b278df07df4950bc41f340ed959077b20467d5f692318a"
"""SHA-256 of all official chains, see `digest`."""

_BLOCKS = ("red_block", "blue_block", "pink_block")

Scene = dict[str, int | str]
"""What holds: led and lightbulb 0 or 1, slider, drawer, the place of each block, grasped 0 or 1."""
_Way = tuple[Mapping[str, Any], dict[str, Any]]
"""Condition, whose values are what must hold (a tuple: one of these), and effect."""


@dataclass(frozen=True)
class Chain:
    """Subtasks to be solved one after the other, from a scene whose keys are in the official order."""

    initial_state: Scene
    subtasks: tuple[str, ...]


@dataclass(frozen=True)
class _Subtask:
    """A subtask, which may be solved in one of several ways. Of a chain's subtasks no two are of one category."""

    name: str
    category: str
    ways: tuple[_Way, ...]
    grasped: int = 0  # before it


def _lifts(block: str) -> Iterator[_Subtask]:
    """The block from the table, from a shelf (not from that which the slider is in front of), from the drawer."""
    held = {block: "grasped", "grasped": 1}
    sides = (("left", "right"), ("right", "left"))
    shelves = tuple(({block: f"slider_{shelf}", "slider": slider}, held) for shelf, slider in sides)
    yield _Subtask(f"lift_{block}_table", "lift from table", (({block: "table"}, held),))
    yield _Subtask(f"lift_{block}_slider", "lift from shelf", shelves)
    yield _Subtask(f"lift_{block}_drawer", "lift from drawer", (({block: "drawer", "drawer": "open"}, held),))


def _subtasks() -> Iterator[_Subtask]:
    """All 34, in the official order, which decides what a drawn number means."""
    for verb, block, side in product(("rotate", "push"), _BLOCKS, ("right", "left")):
        yield _Subtask(f"{verb}_{block}_{side}", "move block", (({block: "table"}, {block: "table"}),))
    for name, part, old, new in (
        ("move_slider_left", "slider", "right", "left"), ("move_slider_right", "slider", "left", "right"),
        ("open_drawer", "drawer", "closed", "open"), ("close_drawer", "drawer", "open", "closed"),
    ):  # fmt: skip
        yield _Subtask(name, part, (({part: old}, {part: new}),))
    for block in _BLOCKS:
        yield from _lifts(block)
    # As published: a block goes to the shelf that the slider is in front of.
    shelved = tuple(
        ({block: "grasped", "slider": side}, {block: f"slider_{side}", "grasped": 0})
        for block, side in product(_BLOCKS, ("right", "left"))
    )
    yield _Subtask("place_in_slider", "place", shelved, grasped=1)
    dropped = tuple(({block: "grasped", "drawer": "open"}, {block: "drawer", "grasped": 0}) for block in _BLOCKS)
    yield _Subtask("place_in_drawer", "place", dropped, grasped=1)
    piles = [(upper, lower, {upper: "stacked_top", lower: "stacked_bottom"}) for upper, lower in permutations(_BLOCKS, 2)]
    stacked = tuple(({upper: "grasped", lower: "table"}, pile | {"grasped": 0}) for upper, lower, pile in piles)
    yield _Subtask("stack_block", "stack", stacked, grasped=1)
    yield _Subtask("unstack_block", "unstack", tuple((pile, dict.fromkeys(pile, "table")) for _, _, pile in piles))
    for light, verb, old_light in (("lightbulb", "on", 0), ("lightbulb", "off", 1), ("led", "on", 0), ("led", "off", 1)):
        yield _Subtask(f"turn_{verb}_{light}", "light", (({light: old_light}, {light: 1 - old_light}),))
    shelves = ("slider_right", "slider_left")
    pushed = tuple(
        ({"drawer": "open"} | dict.fromkeys(_BLOCKS, shelves) | {block: "table"}, {block: "drawer", "grasped": 0})
        for block in _BLOCKS
    )
    yield _Subtask("push_into_drawer", "push into drawer", pushed)


def initial_scenes() -> Iterator[Scene]:
    """The 192 starts, in the official order of scenes and of their keys (the last key changes fastest)."""
    parts: dict[str, tuple[int | str, ...]] = {
        "led": (0, 1),
        "lightbulb": (0, 1),
        "slider": ("right", "left"),
        "drawer": ("closed", "open"),
    }
    parts |= dict.fromkeys(_BLOCKS, ("table", "slider_right", "slider_left")) | {"grasped": (0,)}
    for row in product(*parts.values()):
        state: Scene = dict(zip(parts, row, strict=True))
        places = [state[block] for block in _BLOCKS]
        if places.count("table") in (1, 2) and places.count("slider_right") < 2 and places.count("slider_left") < 2:
            yield state


def _holds(state: Scene, condition: Mapping[str, Any]) -> bool:
    return all(state[key] in value if isinstance(value, tuple) else state[key] == value for key, value in condition.items())


def _after(scene: Scene, subtask: _Subtask) -> Scene | None:
    """The scene when the subtask is solved; None unless there is exactly one way to solve it."""
    effects = [new for old, new in subtask.ways if _holds(scene, old)]
    return scene | effects[0] if len(effects) == 1 and scene["grasped"] == subtask.grasped else None


def solvable(scene: Scene, names: Sequence[str]) -> dict[str, Scene]:
    """Which of these subtasks can be solved in the scene, and the scene then."""
    scenes = {subtask.name: _after(scene, subtask) for subtask in _subtasks() if subtask.name in names}
    return {name: after for name, after in scenes.items() if after is not None}


def _in_turn(scene: Scene | None, subtasks: Sequence[_Subtask]) -> bool:
    """Whether the subtasks can be solved in this order, each in exactly one way."""
    for subtask in subtasks:
        scene = scene and _after(scene, subtask)
    return scene is not None


def _shares() -> list[int]:
    """How many chains each start has."""
    share, more = divmod(OFFICIAL_CHAINS, starts := len(list(initial_scenes())))
    return [share + (number < more) for number in range(starts)]


@cache
def _drawn(number: int) -> tuple[Chain, ...]:
    """All chains of the start of this number."""
    states, subtasks, random = list(initial_scenes()), list(_subtasks()), np.random.RandomState(number)
    categories, chains, share = [subtask.category for subtask in subtasks], list[Chain](), _shares()[number]
    while len(chains) < share:
        drawn = random.permutation(len(subtasks))[:SUBTASKS].tolist()
        if len({categories[i] for i in drawn}) == SUBTASKS and _in_turn(states[number], [subtasks[i] for i in drawn]):
            chains.append(Chain(states[number], tuple(subtasks[i].name for i in drawn)))
    return tuple(chains)


def digest(chains: Sequence[Chain]) -> str:
    """SHA-256 of the chains as JSON: a list of [initial state, subtasks], keys in their order, no spaces."""
    rows = [[chain.initial_state, list(chain.subtasks)] for chain in chains]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def official_chains(count: int = OFFICIAL_CHAINS) -> tuple[Chain, ...]:
    """The first `count` of the official chains. Drawing all takes about 20 s, a part as much less, once a process."""
    places = [(number, i) for number, share in enumerate(_shares()) for i in range(share)]
    order = np.random.RandomState(0).permutation(OFFICIAL_CHAINS)[:count]
    chains = tuple(_drawn(places[k][0])[places[k][1]] for k in order)
    if count == OFFICIAL_CHAINS and digest(chains) != DIGEST:
        raise RuntimeError(f"CALVIN's chains have SHA-256 {digest(chains)}, expected {DIGEST}: numpy's RandomState has changed")
    return chains
