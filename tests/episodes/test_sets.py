"""Several data sets: a store each, joined by an index; adding or removing one converts no other again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svam.contract import ContractError
from svam.episodes.convert import convert
from svam.episodes.joined import JoinedStore, open_store
from svam.episodes.options import open_named_source
from svam.episodes.sets import convert_sets
from svam.episodes.store import SPLITS, EpisodeStore
from svam.files import sha256_tree
from svam.params import Params
from svam.training.latents import Clips
from tests.episodes.test_options import raw_params
from tests.sources.common import refused
from tests.sources.test_source_raw import ONE_TASK, arrays_of, write


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """`arm` of three dimensions, `hand` of two and without an expert, `films` of three; three episodes each."""
    for name, width, task in (("arm", 3, "pick"), ("hand", 2, "grasp"), ("films", 3, "pick")):
        episodes: dict[str, Any] = {f"{name}{number}": arrays_of(len(name) + number, 5 + number) for number in range(3)}
        for arrays in episodes.values():
            arrays["actions"] = arrays["actions"][:, :width]
            arrays["expert_actions"] = arrays["expert_actions"] if name == "arm" else None
            if name == "hand":  # the labels are of the wrist's pictures
                arrays |= {label: arrays[label][:, :4, :4] for label in ("depth", "segmentation")}
        cameras = ["wrist", "front"] if name == "hand" else ["front", "wrist"]
        write(tmp_path / name, {**ONE_TASK, "cameras": cameras, "tasks": {task: {"train": [f"{task} it"]}}}, **episodes)
    return tmp_path


def params_of(recordings: Path, *names: str, **more: Any) -> Params:
    sets = [
        {"name": name, "weight": weight, "policy": name != "films", "convert": {
            "path": str(recordings / name), "cameras": ["wrist"] if name == "hand" else ["front"], **more.get(name, {})}}
        for name, weight in (("arm", 1.0), ("hand", 3.0), ("films", 1.0)) if name in names
    ]  # fmt: skip
    return raw_params(sets=sets, image_size=[4, 4])


def made(recordings: Path, *names: str, **more: Any) -> JoinedStore:
    out = recordings / "episodes.zarr"
    convert_sets(params_of(recordings, *names, **more), out, recordings / "scratch", recordings / "kept")
    store = open_store(out)
    assert isinstance(store, JoinedStore)
    return store


def test_each_is_what_it_is_alone(recordings: Path) -> None:
    """To the byte; one after the other they are one."""
    store = made(recordings, "arm", "hand", "films")
    params = params_of(recordings, "hand")
    alone = params.model_copy(update={"convert": params.convert.parts[0]})
    convert(open_named_source(recordings / "hand", alone), recordings / "alone", alone.convert, alone.seed)
    assert sha256_tree(recordings / "alone") == sha256_tree(recordings / "episodes.zarr/hand")
    arm, hand = store.sets["arm"], store.sets["hand"]
    assert len(store) == 54 and store.cameras == ["front"] and store.image_size == (4, 4)
    rows = np.array([20, 3, 17, 18, 53], dtype=np.int64)
    np.testing.assert_array_equal(store.frames(rows)[[1, 2]], arm.frames(np.array([3, 17])))
    np.testing.assert_array_equal(store.frames(rows)[[3, 0]], hand.frames(np.array([0, 2])))
    actions = store.vector("actions", rows)
    np.testing.assert_array_equal(actions[0], [*hand.vector("actions", np.array([2]))[0], 0])
    np.testing.assert_array_equal(store.targets(rows[:4])[1], arm.vector("expert_actions", np.array([3]))[0])
    np.testing.assert_array_equal(store.targets(rows[:4])[0], actions[0])
    assert store.tasks == ["pick", "grasp"] and store.instructions["grasp"]["train"] == ["grasp it"]
    assert store.task_of(3) == "grasp" and store.instruction_of(6) == "pick it" and store.bounds(3) == (18, 23)
    assert [len(places) for places, _ in store.by_statistics(rows)] == [2, 2, 1]
    depth, own = store.annotation("depth"), hand.annotation("depth")
    assert depth is not None and own is not None and (depth.rows[7:14] == own.rows + 18).all()
    np.testing.assert_array_equal(depth.values(np.array([8, 0]))[0], own.values(np.array([1]))[0])
    with refused("each of its sets .arm, hand, films. has statistics of its own"):
        store.statistics  # noqa: B018
    assert store.action_dimensions == 3


def test_a_sentence_that_one_set_trains_on_is_not_held_out(recordings: Path) -> None:
    said = {"train": ["pick it"], "held_out": ["take it", "lift it"]}, {"train": ["lift it"], "held_out": ["pick it"]}
    for name, sentences in zip(("arm", "films"), said, strict=True):
        write(recordings / name, {**ONE_TASK, "tasks": {"pick": sentences}})
    assert made(recordings, "arm", "films").instructions == {"pick": {"train": ["pick it", "lift it"], "held_out": ["take it"]}}


def test_each_may_have_several_foresight_cameras(recordings: Path) -> None:
    arm, hand = {"cameras": ["front", "wrist"], "foreseen": 2}, {"cameras": ["wrist", "front"], "foreseen": 2}
    store = made(recordings, "arm", "hand", arm=arm, hand=hand)
    assert store.foreseen == ["front", "wrist"] and store.sets["hand"].foreseen == ["wrist", "front"]
    pictures = store.frames(np.array([len(store) + 20, 3, 20]))
    np.testing.assert_array_equal(pictures[0], store.sets["hand"].frames(np.array([2]), "front")[0])
    np.testing.assert_array_equal(pictures[1], store.sets["arm"].frames(np.array([3]), "front")[0])
    np.testing.assert_array_equal(store.seen(np.array([20]))[0], [*pictures[2], *pictures[0]])
    drawn = store.drawn(store.pictures("train"))
    assert set(drawn) == set(store.pictures("train")) and (drawn >= len(store)).mean() == pytest.approx(0.5, abs=0.02)
    with refused("the number of foresight cameras of hand is 1, that of arm 2; set foreseen of both to the same"):
        made(recordings, "arm", "hand", arm=arm)


def test_training_draws_by_weight(recordings: Path) -> None:
    store = made(recordings, "arm", "hand", "films")
    rows = store.rows("train")
    drawn = store.drawn(rows)
    shares = [((drawn >= first) & (drawn < first + 18)).mean() for first in (0, 18, 36)]
    np.testing.assert_allclose(shares, [0.2, 0.6, 0.2], atol=0.02)
    assert set(drawn) == set(rows) and (np.diff(drawn) >= 0).all()
    acting = np.concatenate([np.arange(*store.bounds(episode)) for episode in store.acting_episodes("train").tolist()])
    assert acting.max() < 36 and (store.drawn(acting) >= 18).mean() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("foreseen", [1, 2])
def test_clips_are_drawn_as_pictures_are_without_a_list_of_them(recordings: Path, foreseen: int) -> None:
    cameras = {"cameras": ["front", "wrist"], "foreseen": foreseen}
    films = cameras | {"episodes": [0]}  # one alone: nothing is held out
    for names in (["arm"], ["arm", "hand", "films"]):
        store = made(recordings, *names, arm=cameras, hand=cameras, films=films)
        for stores in (store, *store.sets.values()):
            for side in SPLITS if 1 in stores.episode_split else SPLITS[:1]:
                clips, pictures = Clips(stores, side, 3, 2), stores.pictures(side)
                places = clips.drawn(np.arange(clips.draws))
                assert np.array_equal(pictures[places], stores.drawn(pictures))
                assert np.array_equal(clips.clip_rows(places)[:, 0], stores.drawn(pictures))


def test_adding_and_removing_converts_no_other(recordings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(recordings, "arm", "hand")
    kept = {path: sha256_tree(path) for path in (recordings / "kept").iterdir()}
    capsys.readouterr()
    made(recordings, "arm", "hand", "films")
    said = capsys.readouterr().err
    assert "arm is as it was" in said and "hand is as it was" in said and "films is as it was" not in said
    assert len(made(recordings, "films").sets) == 1 and "films is as it was" in capsys.readouterr().err
    assert {path: sha256_tree(path) for path in kept} == kept
    for path in kept:
        next(file for file in (path / "frames").rglob("c/*/*/*/*") if file.is_file()).unlink()
    assert len(made(recordings, "arm", "hand")) and "as it was" not in capsys.readouterr().err
    assert {path: sha256_tree(path) for path in kept} == kept
    made(recordings, "arm", arm={"held_out": 0.5})
    assert "as it was" not in capsys.readouterr().err


def test_sets_that_do_not_fit(recordings: Path) -> None:
    with refused("the size of frames of hand is .4, 6., that of arm .4, 4.; set image_size of both to the same"):
        made(recordings, "arm", "hand", hand={"image_size": [4, 6]})
    with refused("the rate of hand is 5.0, that of arm 12.5; set resample_hz"):
        made(recordings, "arm", "hand", hand={"resample_hz": 5.0})
    with refused("the normalisation of hand is meanstd, that of arm minmax; set normalisation of both"):
        made(recordings, "arm", "hand", hand={"normalisation": "meanstd"})
    with refused("^convert.sets, hand: convert.tasks names 'no'; tasks are 'grasp'"):
        made(recordings, "arm", "hand", hand={"tasks": ["no"]})
    with refused("holds several sets, each a store: name one, such as"):
        made(recordings, "arm")
        EpisodeStore(recordings / "episodes.zarr")
    store = made(recordings, "films")
    with pytest.raises(ContractError, match="films have policy: false"):
        store.acting_episodes("train")


@pytest.mark.parametrize("sets, message", [
    ([{"name": "a", "weight": 1.0, "policy": True, "convert": {"colour": 1}}], "unknown key 'convert.colour'"),
    ([{"name": "a", "weight": 1.0, "policy": True, "convert": {}}] * 2, r"sets name \['a'\] more than once"),
    ([{"name": "a", "weight": 1.0, "policy": True, "convert": {"depends_on": "b"}}], "can only stand beside sets, for all"),
    ([{"name": "a", "weight": 0.0, "policy": True, "convert": {}}], "greater than 0"),
])  # fmt: skip
def test_what_the_params_cannot_say(sets: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        raw_params(sets=sets)
