"""Two foresight cameras: each frozen part sees one picture at a time, nothing crosses over, and the policy sees both."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from svam.contract import ContractError, Observation
from svam.episodes.convert import convert
from svam.episodes.joined import open_store
from svam.episodes.store import SPLITS, EpisodeStore
from svam.files import sha256_tree
from svam.models.autoencoder import Autoencoder
from svam.models.foresight import part_folders
from svam.models.svam import SVAM
from svam.models.video import VideoModel
from svam.models.views import apart, together
from svam.resume import Resume
from svam.serving.request import read_request
from svam.serving.server import describe
from svam.training.distill_data import recorded
from svam.training.encode import encode_frames
from svam.training.feature_cache import FeatureCache
from svam.training.generate import choose_windows
from svam.training.latents import LatentClips, LatentsOfCameras, open_latents
from svam.training.prepare_backbones.autoencoder import task_of_rows
from svam.training.train_policy import load_foresight, train
from tests.recorded import CAMERAS, SETTINGS, Recorded, make_episode
from tests.serving.peers import encoded
from tests.tiny import GENERATE, make_svam, observations, policy_params, save_all_parts
from tests.tiny_foresight import FRAMES, GRID, SIZE, make_store
from tests.toy import ADAM

CPU = torch.device("cpu")
EVERYTHING = ["geometric", "semantic", "one_step", "observation"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`episodes.zarr` of two foresight cameras, and all its parts."""
    root = tmp_path_factory.mktemp("cameras")
    save_all_parts(root, make_store(root / "episodes.zarr", foreseen=2))
    return root


@pytest.fixture(scope="module")
def pair(root: Path) -> EpisodeStore:
    return open_store(root / "episodes.zarr")


@pytest.fixture(scope="module")
def parts(root: Path) -> dict[str, Path]:
    return part_folders(root / "backbones", root / "video", root / "decouplers")


def test_apart_and_together() -> None:
    pictures = torch.arange(2 * 3 * 4).view(2, 3, 4, 1, 1).expand(2, 3, 4, 2, 5)  # B, T, two cameras of two rows
    single = apart(pictures, 2)
    assert single.shape == (4, 3, 2, 2, 5)
    assert torch.equal(single[0], pictures[0, :, :2]) and torch.equal(single[3], pictures[1, :, 2:])
    assert torch.equal(together(single, 2), pictures)
    assert apart(pictures, 1) is pictures and together(pictures, 1) is pictures


def test_numbers_of_pictures(pair: EpisodeStore) -> None:
    assert pair.foreseen == CAMERAS
    rows = np.array([3, 70, 0, 71], dtype=np.int64)
    mixed = pair.frames(rows + len(pair) * np.array([0, 1, 1, 0]))
    for picture, row, camera in zip(mixed, rows, ("front", "wrist", "wrist", "front"), strict=True):
        assert np.array_equal(picture, pair.frames(np.array([row]), camera)[0])
    seen = pair.seen(rows.reshape(2, 2))
    assert seen.shape == (2, 2, 2 * SIZE, SIZE, 3) and np.array_equal(seen[1, 1, SIZE:], pair.frames(rows[3:], "wrist")[0])
    assert pair.pictures("train").tolist() == [*pair.rows("train"), *(pair.rows("train") + len(pair))]
    with pytest.raises(ContractError, match=r"pictures 0..144 were asked for, there are 0..143"):
        pair.frames(np.array([0, 144]))


def test_conversion_refuses_cameras_that_do_not_go_together(tmp_path: Path) -> None:
    episodes = [make_episode("push", 12, k, SIZE) for k in range(4)]
    with pytest.raises(ContractError, match=r"convert.foreseen is 3, but there are only the cameras \['front', 'wrist'\]"):
        convert(Recorded(episodes), tmp_path / "store", SETTINGS.model_copy(update={"foreseen": 3}), 0)
    small = [dataclasses.replace(e, frames={**e.frames, "wrist": np.asarray(e.frames["wrist"])[:, :8]}) for e in episodes]
    with pytest.raises(ContractError, match=r"their pictures differ in size, .*'wrist': \(8, 16\).*: set convert.image_size"):
        convert(Recorded(small), tmp_path / "store", SETTINGS.model_copy(update={"foreseen": 2}), 0)


def test_clips_of_every_camera_are_drawn_and_none_crosses_over(root: Path, pair: EpisodeStore, tmp_path: Path) -> None:
    folder, autoencoder = root / "backbones/autoencoder", Autoencoder.load(root / "backbones/autoencoder")
    with Resume(None).directory(tmp_path / "latents") as partial:
        encode_frames(partial, pair, autoencoder, sha256_tree(folder), 16, CPU)
    latents = open_latents(tmp_path / "latents", pair, autoencoder, folder)
    assert isinstance(latents, LatentsOfCameras) and latents.shape == (2 * len(pair), 4, SIZE // 4, SIZE // 4)
    of_wrist = np.load(tmp_path / "latents/wrist.npy")
    assert not np.array_equal(of_wrist, np.load(tmp_path / "latents/front.npy"))
    for side in SPLITS:
        clips = LatentClips(pair, side, latents, FRAMES, 2)
        half = len(pair.rows(side))
        assert len(clips) == 2 * half
        first, second = clips.clip_rows(np.arange(half)), clips.clip_rows(np.arange(half, 2 * half))
        assert np.array_equal(second, first + len(pair)) and first.max() < len(pair)
        assert np.array_equal(clips.clips(np.array([half + 1]))[0].numpy(), of_wrist[first[1]])
        assert np.array_equal(clips.episode_of(np.array([half + 1])), clips.episode_of(np.array([1])))


def test_windows_are_of_all_cameras_and_keep_to_one(root: Path, pair: EpisodeStore) -> None:
    windows = choose_windows(pair, GENERATE, VideoModel.load(root / "video").config, 0)
    cameras = windows.rows // len(pair)
    assert (cameras == cameras[:, :1]).all() and cameras[:, 0].tolist() == [0, 0, 1, 1, 0, 1]
    episodes = pair.episode_of(windows.rows % len(pair))
    assert (episodes == episodes[:, :1]).all()
    assert np.array_equal(recorded(pair, windows.rows)[2], pair.frames(windows.rows[2] - len(pair), "wrist"))
    assert len(set(windows.seeds)) == len(windows.seeds)


def test_each_camera_has_a_background_of_its_own(pair: EpisodeStore) -> None:
    tasks = task_of_rows(pair, np.arange(2 * len(pair)))
    assert np.array_equal(tasks[len(pair) :], tasks[: len(pair)] + 2) and set(tasks.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
def test_cameras_are_a_batch_to_the_frozen_parts(noise: str, pair: EpisodeStore, tmp_path: Path) -> None:
    """The tokens of one camera are what it would have alone; with fresh noise the second draws another than the first."""
    foresight = load_foresight(policy_params(context=EVERYTHING, observation_encoder="frozen"), GENERATE,
                               save_all_parts(tmp_path, pair, noise))  # fmt: skip
    rows, sentences = np.arange(2), ["push a", "pull b"]
    alone = [
        foresight.encode(torch.from_numpy(pair.frames(rows, camera)), sentences, EVERYTHING, [4, 5]).entries
        for camera in CAMERAS
    ]
    foresight.views = 2
    both = foresight.encode(torch.from_numpy(pair.seen(rows)), sentences, EVERYTHING, [4, 5]).entries
    for entry, values in both.items():
        assert values.shape[2:4] == (2 * GRID, GRID)
        torch.testing.assert_close(values[:, :, :GRID], alone[0][entry], rtol=1e-4, atol=1e-4)
        same = torch.allclose(values[:, :, GRID:], alone[1][entry], rtol=1e-4, atol=1e-4)
        assert same == (noise == "fixed" or entry != "one_step")  # untrained decouplers do not look at it


@pytest.mark.parametrize("changes", [{}, {"context": ["observation"]}])
def test_both_frames_reach_the_actions(changes: dict[str, list[str]], pair: EpisodeStore, parts: dict[str, Path]) -> None:
    svam = make_svam(pair, parts, **changes)
    observation = observations(pair, 1)[0]
    before = svam.act([observation])
    for camera in CAMERAS:
        frames = {**observation.frames, camera: 255 - observation.frames[camera]}
        assert np.abs(svam.act([dataclasses.replace(observation, frames=frames)]) - before).max() > 1e-4
    with pytest.raises(ContractError, match=r"no camera 'wrist', on which the policy was trained; found \['front'\]"):
        svam.act([dataclasses.replace(observation, frames={"front": observation.frames["front"]})])


def test_a_saved_policy_says_its_cameras(pair: EpisodeStore, parts: dict[str, Path], tmp_path: Path) -> None:
    svam = make_svam(pair, parts)
    svam.save(tmp_path / "svam")
    loaded = SVAM.load(tmp_path / "svam")
    assert loaded.cameras == CAMERAS and loaded.foresight.views == 2
    seen = observations(pair, 2)
    np.testing.assert_array_equal(svam.act(seen), loaded.act(seen))


def test_a_server_asks_for_every_camera(pair: EpisodeStore, parts: dict[str, Path]) -> None:
    svam = make_svam(pair, parts)
    assert describe(svam, "abc", 1)["cameras"] == {"front": [SIZE, SIZE], "wrist": [SIZE, SIZE]}
    frames = observations(pair, 1)[0].frames
    named = {"prompt": "push a", "observation/front": frames["front"], "wrist": frames["wrist"]}
    found = read_request(encoded(named), svam)
    assert all(np.array_equal(found.observation.frames[camera], frames[camera]) for camera in CAMERAS)
    assert read_request(encoded(named | {"wrist": 255 - frames["wrist"]}), svam).seed != found.seed
    with pytest.raises(ContractError, match=r"no picture of camera 'wrist'.*send it as 'wrist' or 'observation/wrist'"):
        read_request(encoded({"prompt": "push a", "front": frames["front"], "observation/image": frames["wrist"]}), svam)


def test_a_policy_learns_what_the_second_camera_alone_shows(parts: dict[str, Path], tmp_path: Path) -> None:
    """The first camera is noise; the second is bright where actions are 1, dark where they are -1. It takes two trainings."""
    episodes = []
    for k in range(12):
        made, sign = make_episode("push", 12, k, SIZE), 1 if k % 2 else -1
        wrist = np.full_like(made.frames["wrist"], 128 + 100 * sign)
        actions = np.full_like(made.actions, sign)
        frames = {"front": made.frames["front"], "wrist": wrist}
        episodes.append(dataclasses.replace(made, instruction="push a", frames=frames, actions=actions, expert_actions=actions))
    errors = {}
    for foreseen, steps in ((1, 20), (2, 80)):
        convert(Recorded(episodes), tmp_path / f"{foreseen}.zarr", SETTINGS.model_copy(update={"foreseen": foreseen}), 0)
        store = open_store(tmp_path / f"{foreseen}.zarr")
        training = {**ADAM, "steps": steps, "batch": 8, "learning_rate": 0.01, "ema": 0.9}
        section = policy_params(context=["observation"], observation_encoder="frozen", training=training, evaluate_every=steps)
        cache = FeatureCache(tmp_path / "cache", 1.0)
        svam = train(store, load_foresight(section, GENERATE, parts), parts, section, cache, 0, CPU)
        errors[foreseen] = svam.selected["action_error"]
    assert errors[2] < 0.25 < 0.5 < errors[1]
    front, grey = np.asarray(episodes[0].frames["front"])[0], np.full((SIZE, SIZE, 3), 128, np.uint8)
    bright, dark = (Observation({"front": front, "wrist": wrist}, "push a") for wrist in (grey + 100, grey - 100))
    assert svam.act([bright]).mean() > 0.5 and svam.act([dark]).mean() < -0.5
