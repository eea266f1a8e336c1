"""Episodes that become others on their way into a store, against hand-made arrays; the store states what was done."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svam.contract import Episode, EpisodeShape, EpisodeSource, FrameBlocks, Segment
from svam.conversion import Convert
from svam.episodes.changes import UNCHANGED, ChangedEpisodes, changed
from svam.episodes.convert import convert
from svam.episodes.joined import open_store
from svam.episodes.options import ChosenEpisodes
from svam.files import sha256_tree
from tests.episodes.stores import SOURCE
from tests.recorded import SETTINGS, Recorded, make_episode
from tests.sources.common import frames_of, refused

Array = np.ndarray[Any, Any]


def float32(*rows: Any) -> Array:
    return np.asarray(rows, dtype=np.float32)


def settings(**choice: Any) -> Convert:
    """The tests' section with some keys; `columns` of some vectors."""
    columns = UNCHANGED["columns"] | choice.pop("columns", {})
    return Convert.model_validate({**SETTINGS.model_dump(), **choice, "columns": columns})


def ramp(steps: int, **vectors: Any) -> Episode:
    """Row t: a picture of the grey level t, actions [t, -t], proprioception [10 t, 1], at 20 Hz."""
    t = np.arange(steps, dtype=np.float32)
    pictures = np.broadcast_to(np.arange(steps, dtype=np.uint8)[:, None, None, None], (steps, 8, 8, 3)).copy()
    made = dataclasses.replace(
        make_episode("push", steps, 0), frames={"front": pictures, "wrist": pictures}, expert_actions=None, annotations={},
        actions=np.stack([t, -t], axis=1), proprioception=np.stack([10 * t, t * 0 + 1], axis=1),
    )  # fmt: skip
    return dataclasses.replace(made, **vectors)


def one(episode: Episode, **choice: Any) -> tuple[Episode, EpisodeSource]:
    """An episode as it is changed, whose shape is as it was announced, and the source."""
    params = settings(**choice)
    source = changed(ChosenEpisodes(Recorded([episode]), params), params)
    read = copy.deepcopy(source).read(0)  # as a worker has it
    read.check()
    assert source.shape(0).steps == read.steps and source.describe().rate_hz == read.rate_hz
    return read, source


def grey(episode: Episode) -> list[int]:
    return frames_of(episode, "wrist")[:, 0, 0, 0].tolist()


def test_nothing_changes_by_default(kept: Path, tmp_path: Path) -> None:
    chosen = ChosenEpisodes(SOURCE, SETTINGS)
    assert changed(chosen, SETTINGS) is chosen
    convert(changed(chosen, SETTINGS), tmp_path / "s.zarr", SETTINGS, seed=0)
    assert sha256_tree(tmp_path / "s.zarr") == sha256_tree(kept)
    assert "changes" not in open_store(kept).provenance


def test_actions_of_later_rows() -> None:
    """For sets whose rows hold the pose of their own time."""
    read, source = one(ramp(5), shift=2)
    assert read.actions is not None and read.proprioception is not None
    assert read.actions[:, 0].tolist() == [2, 3, 4] and read.proprioception[:, 0].tolist() == [0, 10, 20]
    assert grey(read) == [0, 1, 2]
    assert "actions are those of 2 rows later; the last 2 of an episode are left out" in source.notes
    with refused(r"convert.shift 5 leaves nothing of 1 episodes, .*: convert.drop: \[0\]"):
        one(ramp(5), shift=5)


def test_columns_are_chosen_and_joined() -> None:
    read, _ = one(
        ramp(3, state=float32([1, 2, 3], [4, 5, 6], [7, 8, 9]), expert_actions=np.zeros((3, 2), np.float32)),
        columns={
            "actions": ["proprioception[0]", "actions[0:2]", "state[2]"],
            "proprioception": ["state[1:3]", "proprioception"],
        },
    )
    assert (read.actions == float32([0, 0, 0, 3], [10, 1, -1, 6], [20, 2, -2, 9])).all()
    assert (read.proprioception == float32([2, 3, 0, 1], [5, 6, 10, 1], [8, 9, 20, 1])).all()
    assert read.expert_actions is None and read.state is not None and read.state.shape == (3, 3)


def test_names_follow_their_columns() -> None:
    class Named(Recorded):
        def describe(self) -> Any:
            names = {"dimension_names": {"actions": ["x", "y"], "proprioception": ["p", "q"]}}
            return super().describe().model_copy(update={"provenance": names})

    params = settings(columns={"actions": ["proprioception[1]", "actions"], "proprioception": ["state[0]"]})
    provenance = ChangedEpisodes(Named([ramp(3)]), params, {"shift": 0}).describe().provenance
    assert provenance == {"dimension_names": {"actions": ["q", "x", "y"]}, "changes": {"shift": 0}}


def test_another_rate() -> None:
    """20 Hz to 8 Hz: rows 0, 2.5, 5, 7.5; then to 40 Hz. Vectors between rows, the nearest frames, a binary action too."""
    binary = float32(*([t, 1 if t > 7 else -1] for t in range(9)))
    read, source = one(ramp(9, actions=binary, timestamps=3 + np.arange(9) / 20), resample_hz=8, binary_dimensions=[1])
    assert read.actions is not None and read.proprioception is not None and read.timestamps is not None
    assert read.actions.tolist() == [[0, -1], [2.5, -1], [5, -1], [7.5, 1]] and grey(read) == [0, 3, 5, 8]
    assert read.proprioception[:, 0].tolist() == [0, 25, 50, 75]
    np.testing.assert_allclose(read.timestamps, 3 + np.arange(4) / 8, rtol=1e-12)
    assert any("resampled from 20 to 8 Hz: vectors are interpolated, frames are the nearest" in note for note in source.notes)
    faster, _ = one(ramp(3), resample_hz=40)
    assert faster.actions is not None
    assert faster.actions[:, 0].tolist() == [0, 0.5, 1, 1.5, 2] and grey(faster) == [0, 1, 1, 2, 2]
    same, _ = one(ramp(3), resample_hz=20)
    assert same.actions is not None and (same.actions == ramp(3).actions).all() and grey(same) == [0, 1, 2]


def test_turns_are_not_interpolated_the_long_way() -> None:
    """20 Hz to 8 Hz: row 2.5 lies where an angle jumps from pi to -pi, and where a quaternion flips its sign."""
    turn = np.float32(0.1)
    angles = np.array([3.0, 3.05, 3.1, -3.1, -3.05], np.float32)[:, None]
    read, _ = one(ramp(5, proprioception=angles), resample_hz=8)
    assert read.proprioception is not None and read.proprioception[:, 0].tolist() == [angles[0], angles[3]]
    signs = np.array([1, 1, 1, -1, -1], np.float32)[:, None]
    base = signs * float32([1, 0, 0, 0])
    goal = np.ones((5, 1), np.float32) * float32([np.cos(turn / 2), np.sin(turn / 2), 0, 0])
    way = {"columns": [0, 4], "proprioception": [0, 4], "kind": "quaternion_wxyz", "frame": "fixed"}
    read, _ = one(ramp(5, actions=goal, proprioception=base), resample_hz=8, differences=[way])
    assert read.actions is not None and read.proprioception is not None
    np.testing.assert_allclose(read.actions, goal[:2], atol=1e-6)
    assert (read.proprioception == base[[0, 3]]).all()


def test_frames_that_are_read_block_by_block() -> None:
    pictures, decoded = ramp(9).frames["front"], []
    assert isinstance(pictures, np.ndarray)

    def blocks() -> Any:
        for first in range(0, 9, 2):
            decoded.append(first)
            yield pictures[first : first + 2]

    frames = FrameBlocks(pictures.shape, blocks)  # type: ignore[arg-type]
    read, _ = one(ramp(9, frames={"front": frames, "wrist": frames}), resample_hz=8, shift=2)
    decoded.clear()
    assert grey(read) == [0, 3] and decoded == [0, 2]


def test_in_one_order(tmp_path: Path) -> None:
    """Angles go on before rows are interpolated; differences are from the row itself to the shifted action; then two values and
    limits. The store states it all, and its numbers are what a policy learns."""
    angle = [170, -170, -150, -150, -150]
    episode = ramp(5, actions=float32(*([10 * t, a, t > 2] for t, a in enumerate(angle))))
    choice: dict[str, Any] = {
        "unwrap": [{"columns": [1, 2], "low": -180, "high": 180}], "resample_hz": 40, "shift": 1,
        "differences": [{"columns": [0, 1], "proprioception": [0, 1], "kind": "linear", "frame": "fixed"}],
        "binary_dimensions": [2], "binary_values": [0, 1], "limits": [{"columns": [1, 2], "low": 0, "high": 205}],
    }  # fmt: skip
    read, source = one(episode, **choice)
    assert read.actions is not None
    assert read.actions[:, 0].tolist() == [5.0] * 8  # half a row ahead, at 10 a row
    assert read.actions[:, 1].tolist() == [180, 190, 200, 205, 205, 205, 205, 205]
    assert read.actions[:, 2].tolist() == [-1, -1, -1, -1, 1, 1, 1, 1]
    params = settings(**choice)
    convert(changed(ChosenEpisodes(Recorded([episode] * 3), params), params), tmp_path / "s.zarr", params, seed=0)
    store = open_store(tmp_path / "s.zarr")
    assert store.rate_hz == 40 and len(store) == 24 and store.attributes.notes == list(source.notes)
    assert (store.vector("actions", np.arange(8)) == read.actions).all()
    convention = store.statistics.convention
    assert convention.binary_values == [0, 1] and convention.changed
    stated = convention.model_dump(mode="json")
    assert all(stated[key] == choice[key] for key in ("unwrap", "differences", "limits"))
    assert store.provenance["changes"].keys() == choice.keys() - {"binary_dimensions"}


class Told(Recorded):
    """Of each episode the first three rows say `reach`, two nothing, the others `lift`."""

    def shape(self, index: int) -> EpisodeShape:
        shape = super().shape(index)
        parts = (Segment(0, 3, ("reach", "go there")), Segment(5, shape.steps, ("lift",)))
        return dataclasses.replace(shape, segments=parts, task="reach")


def test_an_episode_is_cut_where_its_sentence_changes(tmp_path: Path) -> None:
    """Each part is an episode; those of one recording are on one side of the split."""
    params = settings(shift=1, segments=True)
    chosen = ChosenEpisodes(Told([ramp(9), ramp(12), ramp(8)]), params)
    convert(changed(chosen, params), tmp_path / "s.zarr", params, seed=0)
    store = open_store(tmp_path / "s.zarr")
    assert store.episode_instructions == ["reach", "lift"] * 3 and store.tasks == ["reach", "lift"]
    assert store.instructions == {
        "reach": {"train": ["reach", "go there"], "held_out": []}, "lift": {"train": ["lift"], "held_out": []},
    }  # fmt: skip
    assert store.episode_numbers == [0, 0, 1, 1, 2, 2] and np.diff(store.episode_ends, prepend=0).tolist() == [2, 3, 2, 6, 2, 2]
    assert store.vector("actions", np.arange(5))[:, 0].tolist() == [1, 2, 6, 7, 8]
    assert store.frames(np.arange(5))[:, 0, 0, 0].tolist() == [0, 1, 5, 6, 7]
    assert store.episode_provenance[3]["rows"] == [5, 12]
    sides = store.episode_split.reshape(3, 2)
    assert (sides[:, 0] == sides[:, 1]).all() and sides[:, 0].sum() == 1
    assert "3 episodes are cut into 6 by their sentences; 6 rows of no sentence are left out" in store.attributes.notes


def test_a_task_of_a_part_is_chosen() -> None:
    params = settings(segments=True, tasks=["lift"])
    source = changed(ChosenEpisodes(Told([ramp(9), ramp(12)]), params), params)
    assert [source.shape(n).task for n in range(len(source))] == ["lift"] * 2 and list(source.describe().instructions) == [
        "lift"
    ]


def test_labels_stay_where_rows_do() -> None:
    read, source = one(make_episode("push", 9, 0), limits=[{"columns": [0, 1], "low": 0, "high": 1}])
    assert set(read.annotations) == {"depth", "segmentation"} and source.shape(0).annotated
    read, source = one(make_episode("push", 9, 0), shift=1)
    assert not read.annotations and "labels of frames are left out, since rows were cut, resampled or shifted" in source.notes


DIFFERENCE = {"columns": [0, 2], "proprioception": [0, 2], "kind": "linear", "frame": "fixed"}


@pytest.mark.parametrize("choice, vectors, message", [
    ({"columns": {"actions": ["state[0:2]"]}}, {}, r"convert.columns.actions names 'state\[0:2\]', but state has 0 columns"),
    ({"columns": {"state": ["actions[1:3]"]}}, {}, r"convert.columns.state names 'actions\[1:3\]', but actions has 2 columns"),
    ({"shift": 1}, {"actions": None}, "convert.shift is set, but the episodes have no actions"),
    ({"limits": [{"columns": [1, 3], "low": 0, "high": 1}]}, {}, r"convert.limits names columns \[1, 3\], but actions have 2"),
    ({"differences": [DIFFERENCE]}, {"proprioception": None}, r"names columns \[0, 2\] of the proprioception, which has 0"),
    ({"binary_dimensions": [1], "binary_values": [0, 1]}, {}, r"push/0: actions\[1, 1\] is -1, expected 0 or 1"),
    ({"unwrap": [{"columns": [0, 1], "low": 0, "high": 2}]}, {}, r"push/0: actions\[3, 0\] is 3, but convert.unwrap says"),
], ids=str)  # fmt: skip
def test_what_does_not_fit_the_data(choice: dict[str, Any], vectors: dict[str, Any], message: str) -> None:
    with refused(message):
        one(ramp(5, **vectors), **choice)


@pytest.mark.parametrize("choice, message", [
    ({"differences": [DIFFERENCE], "binary_dimensions": [1]}, "differences and binary_dimensions both change column 1"),
    ({"differences": [DIFFERENCE, DIFFERENCE]}, "both change column 0 of the actions, or one of them twice"),
    ({"binary_values": [1, 1]}, "expected two different values"),
    ({"captions": "a.csv", "instruction": "go"}, "captions and instruction are both set"),
    ({"limits": [{"columns": [2, 2], "low": 0, "high": 1}]}, r"columns \[2, 2\] must be \[first, end\]"),
    ({"limits": [{"columns": [0, 2], "low": 1, "high": 0}]}, r"low \(1\) must be smaller than high \(0\)"),
], ids=str)  # fmt: skip
def test_what_the_params_cannot_say(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**choice)
