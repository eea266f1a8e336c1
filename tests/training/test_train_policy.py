"""Training of the policy: which rows, which targets, what is cached, what is kept."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from svam.code import _read
from svam.contract import ContractError
from svam.episodes.joined import open_store
from svam.episodes.store import EpisodeStore
from svam.files import FileError, sha256_tree, write_json
from svam.models.foresight import ForesightModel
from svam.models.svam import SVAM
from svam.normalisation import normalise_actions, normalise_proprioception
from svam.training import train_policy as training
from svam.training.feature_cache import FeatureCache
from svam.training.train_policy import action_error, cached_features, choose_rows, load_foresight, observe, train
from tests.tiny import GENERATE, SIZE, make_store, observations, policy_params, save_all_parts
from tests.toy import ADAM

CPU = torch.device("cpu")


def run(store: EpisodeStore, folders: dict[str, Path], cache: Path, live: Path | None = None, **changes: Any) -> SVAM:
    section = policy_params(**changes)
    foresight = load_foresight(section, GENERATE, folders)
    return train(store, foresight, folders, section, FeatureCache(cache, 1.0), 0, CPU, live)


def test_rows_are_every_nth_of_the_side(store: EpisodeStore) -> None:
    """Six episodes of 12 steps, two tasks of three; one of each task is held out."""
    train_side, held = store.episodes("train").tolist(), store.episodes("held_out").tolist()
    assert (len(train_side), len(held)) == (4, 2)
    assert choose_rows(store, "train", 5, None).tolist() == [12 * e + k for e in train_side for k in (0, 5, 10)]
    assert choose_rows(store, "held_out", 12, None).tolist() == [12 * e for e in held]
    assert choose_rows(store, "train", 12, 1).tolist() == [12 * e for e in train_side[:2]]


def test_few_demonstrations_choose_their_checkpoint_by_as_few(
    store: EpisodeStore, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy of n demonstrations a task that was chosen by all held-out episodes would have seen more than it says."""
    sides: list[tuple[str, int | None]] = []

    def watched(store: EpisodeStore, split: Any, stride: int, episodes_per_task: int | None) -> Any:
        sides.append((split, episodes_per_task))
        return choose_rows(store, split, stride, episodes_per_task)

    monkeypatch.setattr(training, "choose_rows", watched)
    run(store, folders, tmp_path / "cache", episodes_per_task=1, training=steps(1) | {"warmup": 0})
    assert sides == [("train", 1), ("held_out", 1)]


def test_targets_are_the_experts_padded_and_masked(store: EpisodeStore) -> None:
    rows = np.array([0, 10], dtype=np.int64)  # the second is the last but one of its episode
    found = observe(store, rows, 4, True, seed=0)
    expert = store.vector("expert_actions", np.arange(12))
    np.testing.assert_array_equal(found.actions[0], expert[0:4])
    np.testing.assert_array_equal(found.actions[1], expert[[10, 11, 11, 11]])
    assert found.mask.tolist() == [[True] * 4, [True, True, False, False]]
    state = normalise_proprioception(store.statistics, store.vector("proprioception", rows))
    np.testing.assert_array_equal(found.proprioception, state)
    task = store.task_of(0)
    assert set(found.instructions) <= set(store.instructions[task]["train"])
    assert found.instructions == observe(store, rows, 4, False, seed=0).instructions
    drawn = {observe(store, rows, 4, False, seed=s).instructions[0] for s in range(20)}
    assert drawn == set(store.instructions[task]["train"])


def test_without_expert_actions_the_executed_ones_are_targets(store: EpisodeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    has = store.has
    monkeypatch.setattr(store, "has", lambda name: name != "expert_actions" and has(name))
    found = observe(store, np.array([3], dtype=np.int64), 2, False, seed=0)
    np.testing.assert_array_equal(found.actions[0], store.vector("actions", np.array([3, 4])))
    monkeypatch.setattr(store, "has", lambda name: name != "proprioception" and has(name))
    with pytest.raises(ContractError, match="the episodes hold no proprioception"):
        observe(store, np.array([3], dtype=np.int64), 2, True, seed=0)


def test_the_caches_address_covers_all_code_that_computes_features(
    store: EpisodeStore, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit of a module that foresight is built from, or another version of a library, leaves no stale features behind."""
    foresight = load_foresight(policy_params(context=["one_step"]), GENERATE, folders)

    def address() -> str:
        return json.dumps(training.sources_of(["one_step"], foresight, folders, ["corner2"]))

    before = address()
    assert "svam/models/video.py" in before and "svam/models/perceiver.py" not in before
    monkeypatch.setattr("svam.code.version", lambda name: "0.0" if name == "diffusers" else version(name))
    assert address() != before
    monkeypatch.undo()
    assert address() == before
    monkeypatch.setattr("svam.code._digest", lambda words: "0")
    _read.cache_clear()
    assert address() != before
    _read.cache_clear()


def test_a_second_run_encodes_nothing_and_gives_the_same_bytes(
    store: EpisodeStore, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(store, folders, tmp_path / "cache").save(tmp_path / "first")
    run(store, folders, tmp_path / "other cache").save(tmp_path / "cold")
    assert sha256_tree(tmp_path / "first") == sha256_tree(tmp_path / "cold")

    def never(*arguments: Any) -> None:
        raise AssertionError("a frozen part ran although its features were cached")

    monkeypatch.setattr(ForesightModel, "encode", never)
    run(store, folders, tmp_path / "cache").save(tmp_path / "again")
    assert sha256_tree(tmp_path / "first") == sha256_tree(tmp_path / "again")
    run(store, folders, tmp_path / "cache", context=["one_step"])  # a variant on a subset shares the rows
    assert len(list((tmp_path / "cache").glob("*/index.json"))) == 3


def test_its_own_seed_changes_the_policy_and_no_feature(store: EpisodeStore, folders: dict[str, Path], tmp_path: Path) -> None:
    """Training seeds are compared on the same foresight, which is computed once."""
    for name, seed in (("global", None), ("zero", 0), ("one", 1)):
        run(store, folders, tmp_path / "cache", seed=seed).save(tmp_path / name)
        if name == "global":
            rows = {file: file.read_bytes() for file in (tmp_path / "cache").glob("*/index.json")}
    assert rows == {file: file.read_bytes() for file in (tmp_path / "cache").glob("*/index.json")}
    assert sha256_tree(tmp_path / "global") == sha256_tree(tmp_path / "zero") != sha256_tree(tmp_path / "one")


def test_cached_features_are_what_act_computes(store: EpisodeStore, folders: dict[str, Path], tmp_path: Path) -> None:
    svam = run(store, folders, tmp_path / "cache")
    section = policy_params()
    rows = np.arange(4, dtype=np.int64)
    sentences = [store.instruction_of(0, i) for i in range(4)]
    cached = FeatureCache(tmp_path / "cache", 1.0).fill(
        training.ObservationSet.of(sentences, lambda p: store.frames(rows[p])),
        training.sources_of(list(section.context), svam.foresight, folders, ["front"]), training.encoder_of(svam.foresight), 4,
    )  # fmt: skip
    inputs = svam.encode(observations(store, 4))
    for entry, values in cached.read(np.arange(4)).items():
        np.testing.assert_array_equal(values, inputs.entries[entry].numpy())


def test_equal_frames_of_unequal_futures_are_two_observations(folders: dict[str, Path], tmp_path: Path) -> None:
    """What the recorded future shows hangs on more than the frame and sentence that other features are addressed by."""
    frames = np.random.default_rng(5).integers(0, 256, (12, SIZE, SIZE, 3)).astype(np.uint8)
    frames[1] = frames[0]
    store, section = (
        make_store(tmp_path / "episodes.zarr", frames={"front": frames, "wrist": frames}),
        policy_params(context=["one_step", "recorded"]),
    )
    foresight, rows = load_foresight(section, GENERATE, folders), np.arange(4, dtype=np.int64)
    for _ in range(2):  # the second time all of it is in the cache
        features = cached_features(
            store, foresight, folders, FeatureCache(tmp_path / "cache", 1.0), section, rows, ["push a"] * 4
        )
        read = features.read(rows)
        features.close()
        assert (read["one_step"][0] == read["one_step"][1]).all() and (read["recorded"][0, 0] == read["recorded"][1, 0]).all()
        assert (read["recorded"][0, 1:] != read["recorded"][1, 1:]).any()
    assert run(store, folders, tmp_path / "cache", context=["recorded"]).selected["action_error"] > 0


def test_computed_features_are_the_cached_ones(
    store: EpisodeStore, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same policy to the byte where noise is fixed, and nothing on the disk."""
    context = ["geometric", "one_step", "observation"]  # with frames for a trained encoder
    run(store, folders, tmp_path / "cache", context=context).save(tmp_path / "cached")
    run(store, folders, tmp_path / "none", context=context, features="computed").save(tmp_path / "computed")
    assert sha256_tree(tmp_path / "cached") == sha256_tree(tmp_path / "computed")
    assert not (tmp_path / "none").exists()
    assert "computes the features of 16 observations, in about 0.0" in capsys.readouterr().err


def test_what_computing_features_takes_is_said_of_each_process(
    store: EpisodeStore, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An hour a batch of 4, of which each of three processes needs two for its 5 observations."""
    foresight = load_foresight(policy_params(context=["observation"]), GENERATE, folders)
    observations = training.ObservationSet(["push a"] * 6, store.frames, [])
    hours = iter([0.0, 3600.0])
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(hours))
    monkeypatch.setattr("svam.processes.count", lambda: 3)
    training.ComputedFeatures(foresight, observations, [training.FRAMES], 4).announce(7, 5)
    assert "computes the features of 105 observations, in about 14.00 hours" in capsys.readouterr().err


def test_computed_features_are_drawn_anew_where_noise_is_fresh(store: EpisodeStore, tmp_path: Path) -> None:
    folders = save_all_parts(tmp_path, store, noise="fresh")
    foresight = load_foresight(policy_params(), GENERATE, folders)
    sentences = [store.instruction_of(0, i) for i in range(6)]
    observations = training.ObservationSet(sentences, store.frames, [])
    computed = training.ComputedFeatures(foresight, observations, ["one_step"], 4)
    first, other, seen = (computed.read(np.array([2, 4]), draw)["one_step"] for draw in (0, 1, None))
    assert first.shape == other.shape == (2, *computed.shapes["one_step"])
    assert not torch.equal(first, other) and torch.equal(first, computed.read(np.array([2, 4]), 0)["one_step"])
    part = computed.part(2, 6).read(np.array([0, 2]))["one_step"]
    assert torch.equal(part, seen)  # of the observation itself, as it would be cached, and of the same ones
    frames = store.frames(np.array([2, 4, 2, 4]))
    cached = training.encoder_of(foresight)(frames, [sentences[i] for i in (2, 4, 2, 4)], ["one_step"])["one_step"]
    np.testing.assert_array_equal(seen.numpy(), cached[:2])


def test_what_is_not_used_does_not_run(
    store: EpisodeStore, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy on the observed frame alone: no video model, no teacher, no decoupler needs to exist."""
    svam = run(store, {"text": folders["text"]}, tmp_path / "cache", context=["observation"])
    assert [p.name.split("-")[0] for p in (tmp_path / "cache").iterdir()] == ["frames"]
    svam.save(tmp_path / "svam")
    assert {p.name for p in (tmp_path / "svam").iterdir()} == {"manifest.json", "policy", "text"}
    assert SVAM.load(tmp_path / "svam").act(observations(store, 1)).shape == (1, 4, 3)


def test_nothing_leaks_from_held_out_episodes(store: EpisodeStore, folders: dict[str, Path], tmp_path: Path) -> None:
    """The inputs' statistics are those of training rows alone."""
    svam = run(store, folders, tmp_path / "cache", context=["one_step"])
    rows = choose_rows(store, "train", 3, None)
    seen = observe(store, rows, 4, False, seed=0)
    encoded = svam.encode_frames(store.frames(rows), seen.instructions, ["one_step"], list(range(len(rows))))
    values = encoded.entries["one_step"].double().flatten(0, 3)
    torch.testing.assert_close(svam.network.mean_one_step, values.mean(0).float(), rtol=1e-3, atol=1e-3)  # type: ignore[arg-type]
    torch.testing.assert_close(svam.network.std_one_step, values.std(0, correction=0).float(), rtol=1e-3, atol=1e-3)  # type: ignore[arg-type]


def test_the_best_averaged_weights_are_kept(
    store: EpisodeStore, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([0.5, 0.2, 0.9])
    weights: list[torch.Tensor] = []

    def judged(svam: SVAM, *arguments: Any) -> dict[str, float]:
        weights.append(svam.network.diffusion.position.detach().clone())
        return {"action_error": next(errors)}

    monkeypatch.setattr(training, "action_error", judged)
    svam = run(store, folders, tmp_path / "cache", tmp_path / "live", context=["one_step"], training=steps(6))
    assert svam.selected == {"action_error": 0.2, "step": 4.0}
    assert torch.equal(svam.network.diffusion.position, weights[1]) and not torch.equal(weights[1], weights[2])
    assert "held_out" in json.loads((tmp_path / "live/metrics.json").read_text())


def steps(count: int) -> dict[str, Any]:
    return {**ADAM, "steps": count, "batch": 4, "learning_rate": 0.003}


def test_action_error_by_hand(
    store: EpisodeStore, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that is off by 0.5 everywhere, and by 100 where the chunk is padding."""
    found: list[dict[str, float]] = []

    def judged(svam: SVAM, data: training.TrainingData, *arguments: Any) -> dict[str, float]:
        target, mask = data.observations.actions, data.observations.mask
        assert len(target) == 8 and not mask.all()
        starts = iter((0, 3, 6))

        def off(inputs: Any, seeds: list[int]) -> Any:
            start = next(starts)
            positions = np.resize(np.arange(start, min(start + 3, len(target))), 3)
            return target[positions] + np.where(mask[positions], 0.5, 100.0)[..., None]

        with monkeypatch.context() as patch:
            patch.setattr(svam, "sample", off)
            found.append(action_error(svam, data, 3, 0))
        return found[-1]

    monkeypatch.setattr(training, "action_error", judged)
    run(store, folders, tmp_path / "cache", context=["one_step"], evaluate_every=4)
    assert found == [pytest.approx({"action_error": 0.5, "first_action_error": 0.5}, rel=1e-5)]


def test_a_camera_that_the_video_model_does_not_know_is_one_sentence(
    store: EpisodeStore, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["video"], tmp_path / "video")
    config = json.loads((tmp_path / "video/config.json").read_text())
    (tmp_path / "video/config.json").write_text(json.dumps(config | {"camera": "top"}))
    message = r"foresight cameras are \('front', \(16, 16\)\), but .* trained on \('top', \(16, 16\)\)"
    with pytest.raises(ContractError, match=message):
        run(store, folders | {"video": tmp_path / "video"}, tmp_path / "cache")


def test_a_missing_part_is_named(store: EpisodeStore, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileError, match="nowhere"):
        run(store, folders | {"decoupler_semantic": tmp_path / "nowhere"}, tmp_path / "cache")


def test_a_step_takes_one_of_several_draws(store: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fresh noise: each draw is what the video model computes from its own seed, and the first is the one of a single."""
    folders = save_all_parts(tmp_path / "fresh", store, noise="fresh")
    taken: list[torch.Tensor] = []

    def watched(svam: SVAM, batch: Any, *arguments: Any) -> torch.Tensor:
        taken.extend(batch.inputs.entries["one_step"])
        return loss(svam, batch, *arguments)

    loss = SVAM.loss
    monkeypatch.setattr(SVAM, "loss", watched)
    changes: dict[str, Any] = {"context": ["one_step", "observation"], "episodes_per_task": 1, "observation_stride": 12}
    changes |= {"observation_encoder": "frozen", "training": {**steps(6), "batch": 2}}
    for draws in (1, 3):
        taken.clear()
        run(store, folders, tmp_path / "cache", feature_draws=draws, **changes)
        assert len(taken) == 12 and len({tuple(features.flatten().tolist()) for features in taken}) == 2 * draws
    names = sorted(file.name.split("-")[0] for file in (tmp_path / "cache").iterdir() if file.is_dir())
    assert names == ["observation", "one_step", "one_step@1", "one_step@2"], "the frame's own tokens have no noise"
    rows = [file.read_bytes() for file in sorted((tmp_path / "cache").glob("one_step*/rows.bin"))]
    assert len(set(rows)) == 3 and len({len(row) for row in rows}) == 1


@pytest.fixture
def joined(tmp_path: Path) -> EpisodeStore:
    """Two sets, the second of two action dimensions and without an expert."""
    (tmp_path / "joined").mkdir()
    make_store(tmp_path / "joined/wide")
    narrow = np.random.default_rng(0).uniform(5, 9, (12, 2)).astype(np.float32)
    make_store(tmp_path / "joined/narrow", actions=narrow, expert_actions=None)
    sets = [{"name": name, "weight": weight, "policy": True} for name, weight in (("wide", 1.0), ("narrow", 2.0))]
    write_json(tmp_path / "joined/sets.json", {"schema_version": 1, "sets": sets})
    return open_store(tmp_path / "joined")


def test_a_policy_of_two_sets_answers_each_in_its_own_numbers(
    joined: EpisodeStore, folders: dict[str, Path], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"context": ["one_step"], "proprioception": True}
    svam = run(joined, folders, tmp_path / "cache", **changes)
    assert list(svam.sets) == ["wide", "narrow"] and svam.config.action_dimensions == 3 and svam.selected["action_error"] > 0
    seen = observations(joined.sets["narrow"], 2, proprioception=True)
    for name, width in (("wide", 3), ("narrow", 2)):
        acting = svam.acting_as(name)
        actions, s = acting.act(seen), joined.sets[name].statistics.actions
        assert actions.shape == (2, 4, width)
        assert (actions >= np.asarray(s.min) - 1e-4).all() and (actions <= np.asarray(s.max) + 1e-4).all()
    svam.save(tmp_path / "svam")
    loaded = SVAM.load(tmp_path / "svam")
    assert list(loaded.sets) == ["wide", "narrow"] and loaded.statistics == loaded.sets["wide"].statistics
    np.testing.assert_array_equal(loaded.acting_as("narrow").act(seen), actions)
    with pytest.raises(ContractError, match="learnt from no set 'c'; its sets are wide, narrow"):
        loaded.acting_as("c")


def test_dimensions_that_a_set_does_not_have_are_masked(joined: EpisodeStore, folders: dict[str, Path], tmp_path: Path) -> None:
    rows = choose_rows(joined, "train", 6, None)
    assert (rows >= 72).mean() == pytest.approx(2 / 3, abs=0.05)
    svam = run(joined, folders, tmp_path / "cache", context=["one_step"])
    observed = observe(joined, np.array([0, 72, 82], dtype=np.int64), 4, False, seed=0)
    features = FeatureCache(tmp_path / "cache", 1.0)
    data = training.TrainingData(observed, features, svam.foresight, svam, CPU)  # type: ignore[arg-type]
    assert data.mask.shape == (3, 4, 3) and data.mask[0].all() and not data.mask[1:, :, 2].any()
    assert data.mask[2, :, 0].tolist() == [True, True, False, False]
    own = joined.sets["narrow"]
    expected = normalise_actions(own.statistics, own.vector("actions", np.arange(4)))
    np.testing.assert_array_equal(data.actions[1, :, :2], expected)
    assert (data.actions[1, :, 2] == 0).all()
