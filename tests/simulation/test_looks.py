"""Looks: what they change and what they leave, episodes without actions, and evaluation in a look whose actions nobody saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import load_file

from svam.contract import SEGMENTATION_CLASSES, VECTORS
from svam.episodes.joined import JoinedStore, open_store
from svam.episodes.sets import convert_sets
from svam.evaluation import metaworld
from svam.files import FileError, read_json
from svam.params import Params
from svam.simulation import collect as collection
from svam.simulation import metaworld as simulator
from svam.simulation.looks import STOCK
from svam.simulation.metaworld import TaskEnvironment
from svam.sources.metaworld import Options, open_source
from svam.training.train_policy import choose_rows
from tests.toy import write_toy_params

Make = Callable[..., TaskEnvironment]
LABELLED, SILENT = ({"options": {"looks": [look]}} for look in "AD")


def test_stock_is_what_it_was(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    envs = [make("pick-place", look=STOCK)]
    monkeypatch.setattr(simulator, "put_on", lambda *_: None)
    envs.append(make("pick-place"))
    for env in envs:
        env.reset(3)
    frames = [env.observe()["corner2"] for env in envs]
    np.testing.assert_array_equal(frames[0], frames[1])
    for one, two in zip(*(env.annotate() for env in envs), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_look_is_its_name_and_changes_pictures_alone(make: Make) -> None:
    """Two environments of one look draw the same bytes; another look draws others, of the same episode."""
    stock, one, again, other = envs = [make("pick-place", look=look) for look in (STOCK, "A", "A", "B")]
    for env in envs:
        env.reset(3)
        for _ in range(5):
            env.step(env.expert_action())
    frames = [env.observe()["corner2"].astype(int) for env in envs]
    np.testing.assert_array_equal(frames[1], frames[2])
    for k, j in ((0, 1), (0, 3), (1, 3)):
        assert np.abs(frames[k] - frames[j]).mean() > 8, "a shift that is seen"
    for env in envs[1:]:
        np.testing.assert_array_equal(env.state(), stock.state())
        np.testing.assert_array_equal(env.goal, stock.goal)
        np.testing.assert_array_equal(env._env.model.site_rgba, stock._env.model.site_rgba)
        hidden, own = (e._env.model.geom_rgba[:, 3] for e in (env, stock))
        np.testing.assert_array_equal(hidden, own)
    (depth, labels), (moved, _), (same, _) = (env.annotate() for env in (stock, one, again))
    np.testing.assert_array_equal(moved, same)
    assert 0.005 < np.median(np.abs(moved - depth)) < 0.1, "seen from a few centimetres beside"
    goal = labels == SEGMENTATION_CLASSES.index("goal")
    assert goal.any() and (other.annotate()[1] == SEGMENTATION_CLASSES.index("goal")).any()


def params_of(folder: Path, **looks: Any) -> Params:
    """Of `reach`, half of whose episodes have no actions."""
    sets = [
        {"name": "metaworld", "weight": 1.0, "policy": True, "convert": LABELLED},
        {"name": "video", "weight": 1.0, "policy": False, "convert": SILENT},
    ]
    small = {"episodes": 4, "episodes_of": {}, "tasks": ["reach"], "annotate_every": 50, "tail": 0, "noisy_share": 0.0}
    return write_toy_params(folder / "params.yaml", {
        "collect": small | {"looks": ["A", "D"], "unlabelled": ["D"]} | looks,
        "convert": {"sets": sets, "path": str(folder / "raw")},
        "evaluate": {
            "protocols": ["metaworld"], "policy": "remote", "remote": {"url": "ws://localhost"},
            "metaworld": {"tasks": ["reach"], "look": "D"},
        },
    })  # fmt: skip


class Stopped(Exception):
    """With what a function was called."""


def stop(value: Any, *_: Any) -> None:
    raise Stopped(value)


@pytest.mark.usefixtures("started")
def test_unlabelled_video_reaches_the_video_model_alone_and_evaluation_its_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_of(tmp_path)
    collection.collect(tmp_path / "raw", params.collect, 5, 1, tmp_path / "scratch", "")
    meta = read_json(tmp_path / "raw/reach/meta.json")["provenance"]
    assert (meta["looks"], meta["unlabelled"]) == (["A", "D"], ["D"])
    assert [entry["look"] for entry in meta["episodes"]] == ["A", "D", "A", "D"]
    for index in range(4):
        vectors = set(load_file(tmp_path / f"raw/reach/episode_000{index}.safetensors")) & set(VECTORS)
        assert vectors == (set() if index % 2 else set(VECTORS))
    with pytest.raises(FileError, match="no episode of look 'B'; there are A, D"):
        open_source(tmp_path / "raw", Options(looks=("B",)))

    convert_sets(params, tmp_path / "episodes.zarr", tmp_path / "converting", tmp_path / "kept")
    store = open_store(tmp_path / "episodes.zarr")
    assert isinstance(store, JoinedStore) and store.sets["video"].attributes.statistics is None
    looks = np.array([entry["look"] for entry in store.episode_provenance])
    seen = store.episode_of(store.rows("train")), store.episode_of(choose_rows(store, "train", 1, None))
    assert set(looks[seen[0]]) == {"A", "D"} and set(looks[seen[1]]) == {"A"}
    held = store.episode_of(choose_rows(store, "held_out", 1, None))
    assert set(looks[held]) == {"A"} and set(looks[store.episodes("held_out")]) == {"A", "D"}
    depth = store.annotation("depth", "train")
    assert depth is not None and set(looks[store.episode_of(depth.rows)]) == {"A", "D"}, "which teachers learn from"

    demonstrations, policy = store.sets["metaworld"], cast(Any, SimpleNamespace(keys=("picture",), weights="0"))  # a server
    with monkeypatch.context() as patched, pytest.raises(Stopped) as caught:
        patched.setattr(metaworld, "Workers", stop)
        metaworld.run(demonstrations, policy, params.evaluate, cameras=("corner2",), proprioception=False, seed=0, workers=1)
    assert caught.value.args[0].keywords["look"] == "D", "what environments of the closed loop are made with"
    assert metaworld.setting_of(demonstrations, policy, params.evaluate)["look"] == "D"
    stock = params.evaluate.metaworld.model_copy(update={"look": STOCK})
    assert "look" not in metaworld.setting_of(demonstrations, policy, params.evaluate.model_copy(update={"metaworld": stock}))


def test_finished_episodes_of_the_stock_look_are_found_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "sha256_of_json", stop)
    for looks, kept in (({"looks": [STOCK], "unlabelled": []}, False), ({}, True)):
        with pytest.raises(Stopped) as caught:
            collection.collect(tmp_path / "raw", params_of(tmp_path, **looks).collect, 5, 1, tmp_path / "scratch", "")
        assert ({"looks", "unlabelled"} & caught.value.args[0]["params"].keys()) == ({"looks", "unlabelled"} if kept else set())
