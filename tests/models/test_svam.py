"""The SVAM object: every variant builds, acts, and comes back bit for bit from its folder; a misfit is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from svam.contract import CHECKPOINT_SCHEMA, ContractError, Observation
from svam.conversion import Difference
from svam.episodes.store import EpisodeStore
from svam.evaluation.offline import encode_rows, true_features
from svam.files import sha256_tree
from svam.models.manifest import write_manifest
from svam.models.observation import ObservationEncoder
from svam.models.svam import OLDER, SVAM, Batch, PolicyNetwork
from svam.models.teachers import as_unit
from svam.normalisation import denormalise_actions, normalise_actions
from svam.params import load_params
from tests import ROOT
from tests.sources.common import refused
from tests.tiny import FRAMES, SIZE, make_svam, observations, policy_params, save_all_parts
from tests.tiny_foresight import GRID, make_video_teacher

VIDEO = {"text", "autoencoder", "video"}
TEACHERS, DECOUPLERS = {"teacher_geometric", "teacher_semantic"}, {"decoupler_geometric", "decoupler_semantic"}
# The published variants (and the other choices of the section): what changes, the folder's parts, the context's tokens.
VARIANTS: dict[str, tuple[dict[str, Any], set[str], int]] = {
    "S-VAM": ({}, VIDEO | TEACHERS | DECOUPLERS, 2 * FRAMES),
    "VPP": ({"context": ["one_step"]}, VIDEO, 2 * FRAMES),
    "Diffusion Policy": ({"context": ["observation"]}, {"text"}, 2),
    "Diffusion Policy, frozen encoder": (
        {"context": ["observation"], "observation_encoder": "frozen"}, {"text"} | TEACHERS, 2,
    ),
    "multi-step VAM": ({"context": ["generated"]}, VIDEO | TEACHERS, 2 * FRAMES),
    "SuSIE-like": ({"context": ["goal_frame"]}, VIDEO | TEACHERS, 2),
    "w/o geometric": ({"context": ["semantic", "one_step"]}, VIDEO | {"teacher_semantic", "decoupler_semantic"}, 2 * FRAMES),
    "w/o semantic": ({"context": ["geometric", "one_step"]}, VIDEO | {"teacher_geometric", "decoupler_geometric"}, 2 * FRAMES),
    "w/o Uni-Perceiver": ({"aggregator": "mean_pool"}, VIDEO | TEACHERS | DECOUPLERS, FRAMES),
    "w/o original diffusion feature": ({"context": ["geometric", "semantic"]}, VIDEO | TEACHERS | DECOUPLERS, 2 * FRAMES),
    "epsilon": ({"objective": "epsilon"}, VIDEO | TEACHERS | DECOUPLERS, 2 * FRAMES),
    "proprioception": ({"context": ["one_step"], "proprioception": True}, VIDEO, 2 * FRAMES),
    "pooled sentence": ({"context": ["one_step"], "sentence": "pooled"}, VIDEO, 2 * FRAMES),
    "all entries": (
        {"context": ["geometric", "semantic", "one_step", "generated", "goal_frame", "observation"]},
        VIDEO | TEACHERS | DECOUPLERS, 2 * FRAMES + 2,  # the two single frames have one grid, and so one group
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def svam(store: EpisodeStore, folders: dict[str, Path]) -> SVAM:
    return make_svam(store, folders)


@pytest.fixture
def saved(svam: SVAM, tmp_path: Path) -> Path:
    svam.save(tmp_path / "svam")
    return tmp_path / "svam"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_params_alone(name: str, store: EpisodeStore, folders: dict[str, Path], tmp_path: Path) -> None:
    changes, parts, tokens = VARIANTS[name]
    used = {part: folder for part, folder in folders.items() if part in parts}  # what a variant does not use is not loaded
    model = make_svam(store, used, **changes)
    assert model.needs_proprioception == ("proprioception" in changes)
    seen = observations(store, 2, model.needs_proprioception)
    actions = model.act(seen)
    assert actions.shape == (2, 4, 3) and actions.dtype == np.float32
    extra = model.config.text[0] + model.needs_proprioception
    inputs = model.encode(seen)
    assert model.network.context(inputs).shape[1] == tokens + extra
    assert set(inputs.entries) == set(model.config.shapes)
    assert {e: tuple(v.shape[1:]) for e, v in inputs.entries.items()} == model.config.shapes
    assert bool(model.network.attention(inputs)) == (model.config.aggregator == "uni_perceiver")

    model.save(tmp_path / "svam")
    assert {p.name for p in (tmp_path / "svam").iterdir()} == parts | {"policy", "manifest.json"}
    loaded = SVAM.load(tmp_path / "svam")
    np.testing.assert_array_equal(loaded.act(seen), actions)
    assert (loaded.config, loaded.statistics) == (model.config, model.statistics)
    loaded.save(tmp_path / "again")
    assert sha256_tree(tmp_path / "again") == sha256_tree(tmp_path / "svam")


def test_the_recorded_future_is_what_the_teachers_see_and_nobody_acts_on_it(
    store: EpisodeStore, folders: dict[str, Path]
) -> None:
    model, rows = make_svam(store, folders, context=["recorded", "one_step"]), np.array([0, 9], dtype=np.int64)
    inputs = encode_rows(store, model, rows, 0)
    clips = store.frames(np.array([0, 2, 4, 9, 11, 11])).reshape(2, FRAMES, SIZE, SIZE, 3)  # the last runs past its episode
    seen = true_features(model, clips, "recorded")
    np.testing.assert_allclose(inputs.entries["recorded"].float().numpy(), seen, rtol=2e-3, atol=2e-3)  # float16
    assert model.sample(inputs, [0, 1]).shape == (2, 4, 3)
    with pytest.raises(ContractError, match="'recorded', what the teachers see in the recorded future, which nobody has"):
        model.act(observations(store, 1))


def test_a_folder_of_before_some_params_still_loads(svam: SVAM, saved: Path, store: EpisodeStore) -> None:
    """Of before a policy could have dropout, free queries, or one token for the sentence."""
    file = saved / "policy/config.json"
    record = json.loads(file.read_text())
    for section, keys in OLDER.items():
        for key in keys:
            del record["svam"][section][key]
    for key in ("guidance_last", "resize", "feature_time_ids"):
        del record["svam"]["sampler"][key]
    del record["svam"]["sentence"]
    file.write_text(json.dumps(record))
    (saved / "manifest.json").unlink()
    write_manifest(saved)
    loaded = SVAM.load(saved)
    assert loaded.config == svam.config
    np.testing.assert_array_equal(loaded.act(observations(store, 2)), svam.act(observations(store, 2)))


def test_the_default_variants_are_of_one_size(store: EpisodeStore, svam: SVAM) -> None:
    """What is trained with the policy, at the default sizes: comparisons at an equal budget rest on it."""
    section = load_params(ROOT / "params.yaml").train_policy
    sizes = {}
    for context in (["geometric", "semantic", "one_step"], ["one_step"], ["observation"]):
        shapes = {"geometric": (6, 8, 8, 96), "semantic": (6, 8, 8, 96), "one_step": (6, 8, 8, 192)}
        config = svam.config.model_copy(update={
            "context": context, "perceiver": section.perceiver, "transformer": section.transformer, "chunk": section.chunk,
            "shapes": {entry: shapes[entry] for entry in context if entry in shapes}, "image_size": (64, 64),
        })  # fmt: skip
        sizes[context[-1], len(context)] = sum(p.numel() for p in PolicyNetwork(config, store.statistics).parameters())
    assert max(sizes.values()) < 1.1 * sizes["one_step", 3] and min(sizes.values()) > 0.9 * sizes["one_step", 3], sizes


def test_what_a_conversion_did_is_undone(svam: SVAM, store: EpisodeStore, tmp_path: Path) -> None:
    """The network answers as the store has actions; `act` as the data set has them, from where the robot is."""
    changes = {
        "differences": [Difference(columns=[0, 2], proprioception=[0, 2], kind="linear", frame="fixed")],
        "binary_dimensions": [2], "binary_values": [0.0, 1.0],
    }  # fmt: skip
    convention = store.statistics.convention.model_copy(update=changes)
    statistics = store.statistics.model_copy(update={"convention": convention})
    model = SVAM(svam.config, statistics, svam.foresight, svam.network)
    seen = observations(store, 2, proprioception=True)
    actions, stored = model.act(seen), model.sample(model.encode(seen), [0, 1])
    for action, way, observation in zip(actions, stored, seen, strict=True):
        assert observation.proprioception is not None and set(np.unique(way[:, 2])) <= {-1, 1}
        np.testing.assert_allclose(action[:, :2], observation.proprioception + np.cumsum(way[:, :2], axis=0), rtol=1e-5)
        assert (action[:, 2] == (way[:, 2] + 1) / 2).all()
    assert model.needs_proprioception and not svam.needs_proprioception
    with refused(r"proprioception has shape None, expected \(2,\)"):
        model.act(observations(store, 1))
    model.save(tmp_path / "svam")
    loaded = SVAM.load(tmp_path / "svam")
    assert loaded.statistics == statistics and (loaded.act(seen) == actions).all()
    assert loaded.act([loaded.example()]).shape == (1, 4, 3)


def test_inputs_are_normalised_per_channel(svam: SVAM, store: EpisodeStore) -> None:
    inputs = svam.encode(observations(store, 3))
    values = inputs.entries["one_step"].float()
    network = type(svam.network)(svam.config, svam.statistics)
    network.load_state_dict(svam.network.state_dict())
    network.set_input_statistics("one_step", values.mean((0, 1, 2, 3)), values.std((0, 1, 2, 3), correction=0))
    normalised = network._group(["one_step"], inputs)
    torch.testing.assert_close(normalised.mean((0, 1, 2, 3)), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.std((0, 1, 2, 3), correction=0), torch.ones(64), atol=1e-3, rtol=0)


def test_noise_seeds_decide_and_padding_does_not(svam: SVAM, store: EpisodeStore) -> None:
    seen = observations(store, 5)
    base = svam.act(seen, [1, 2, 3, 4, 5])
    low, high = np.asarray(store.statistics.actions.min), np.asarray(store.statistics.actions.max)
    assert (base >= low - 1e-5).all() and (base <= high + 1e-5).all(), "in physical units"
    np.testing.assert_array_equal(base, svam.act(seen, [1, 2, 3, 4, 5]))
    assert (base[0] != svam.act(seen, [9, 2, 3, 4, 5])[0]).any()
    svam.pad_to = 4
    try:
        padded = svam.act(seen, [1, 2, 3, 4, 5])
        np.testing.assert_allclose(padded, base, atol=1e-4)
        for count in (1, 2, 3, 4):  # the same bits whatever came along
            np.testing.assert_array_equal(svam.act(seen[:count], [1, 2, 3, 4][:count]), padded[:count])
        np.testing.assert_array_equal(svam.act(seen[4:], [5]), padded[4:])
        assert svam.act([], []).shape == (0, 4, 3)
    finally:
        svam.pad_to = None


@pytest.mark.parametrize("views", [1, 2])
def test_crops_are_the_batchs_own_however_many_processes_share_it(views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, frames = ObservationEncoder((40, 20), 16, views).train(), torch.randint(0, 256, (4, views * 40, 20, 3)).byte()

    def tokens(rows: slice, seed: int) -> Tensor:
        encoded: Tensor = encoder(frames[rows], torch.Generator().manual_seed(seed))
        return encoded

    every = slice(0, 4)
    whole, centre = tokens(every, 0), encoder(frames)
    assert not torch.allclose(whole, tokens(every, 1)) and torch.equal(whole, tokens(every, 0))
    monkeypatch.setattr("svam.shares.count", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr("svam.shares.number", lambda number=number: number)
        rows = slice(2 * number, 2 * number + 2)
        torch.testing.assert_close(tokens(rows, 0), whole[rows])
    encoder.eval()
    assert torch.equal(tokens(every, 0), centre) and not torch.allclose(whole, centre)


def test_frames_and_instructions_matter(svam: SVAM, store: EpisodeStore) -> None:
    one, two = observations(store, 2)
    base = svam.act([one], [0])
    assert (svam.act([replace(one, frames=two.frames)], [0]) != base).any()
    assert (svam.act([replace(one, instruction="pull b")], [0]) != base).any()


def test_a_teacher_of_video_sees_whole_clips_and_a_frame_that_stands_still(
    store: EpisodeStore, folders: dict[str, Path]
) -> None:
    foresight = make_svam(store, folders, context=["geometric", "generated"]).foresight
    teacher = foresight.teachers["geometric"] = make_video_teacher()
    clips = torch.from_numpy(store.frames(np.arange(2 * FRAMES))).unflatten(0, (2, FRAMES))
    seen = as_unit(foresight.reconstruct(clips.flatten(0, 1))).unflatten(0, (2, FRAMES))  # as the decouplers' references
    still = teacher.clip_features(seen[:, :1].expand_as(seen)).mean(dim=1)
    torch.testing.assert_close(foresight.reference_features("geometric", clips[:, 0]), still)
    torch.testing.assert_close(foresight.recorded_features("geometric", clips), teacher.clip_features(seen))
    assert foresight.sees_clips("geometric") and not foresight.sees_clips("semantic")
    # A goal frame is the last one of its clip, whether or not the others are asked for too.
    alone, both = (
        foresight.encode(clips[:, 0], ["push a"] * 2, entries, [0, 1]).entries
        for entries in (["goal_frame"], ["goal_frame", "generated"])
    )
    assert both["generated"].shape == (2, FRAMES, GRID, GRID, 24)
    torch.testing.assert_close(alone["goal_frame"], both["generated"][:, -1:])


def test_fresh_video_noise_follows_the_seed_and_is_not_the_chunks(
    store: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_svam(store, save_all_parts(tmp_path, store, noise="fresh"), chunk=16)  # torch draws by sixteens
    seen = observations(store, 1)
    first, second = (model.encode(seen, [seed]).entries["one_step"] for seed in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(first, model.encode(seen, [1]).entries["one_step"])
    noises: list[Tensor] = []
    for part, method, place in ((model.foresight.video, "one_step", 2), (model.network.diffusion, "sample", 1)):
        compute = getattr(part, method)

        def recorded(*arguments: Any, compute: Any = compute, place: int = place) -> Any:
            noises.append(arguments[place].flatten())
            return compute(*arguments)

        monkeypatch.setattr(part, method, recorded)
    model.act(seen, [1])
    video, chunk = noises
    assert not torch.equal(video[: len(chunk)], chunk)
    assert torch.equal(chunk, torch.randn(len(chunk), generator=torch.Generator().manual_seed(1)))


FAULTS: list[tuple[str, Callable[[Observation], Observation], str]] = [
    ("camera", lambda o: replace(o, frames={"wrist": o.frames["front"]}), "no camera 'front', on which .* found \\['wrist'\\]"),
    (
        "size", lambda o: replace(o, frames={"front": np.zeros((8, 16, 3), np.uint8)}),
        r"uint8 \(8, 16, 3\), expected uint8 \(16, 16, 3\)",
    ),
    ("dtype", lambda o: replace(o, frames={"front": o.frames["front"].astype(np.float32)}), "gives float32"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fault", "message"), FAULTS, ids=[f[0] for f in FAULTS])
def test_a_misfit_observation_is_one_sentence(
    name: str, fault: Callable[[Observation], Observation], message: str, svam: SVAM, store: EpisodeStore
) -> None:
    with refused(message):
        svam.act([fault(observations(store, 1)[0])])


def test_proprioception_must_be_there_and_fit(store: EpisodeStore, folders: dict[str, Path]) -> None:
    model = make_svam(store, folders, context=["one_step"], proprioception=True)
    seen = observations(store, 1, proprioception=True)[0]
    model.act([seen])
    for wrong, shape in ((None, "None"), (np.zeros(5, np.float32), r"\(5,\)")):
        with refused(rf"proprioception has shape {shape}, expected \(2,\)"):
            model.act([replace(seen, proprioception=wrong)])
    with refused("NaN"):
        model.act([replace(seen, proprioception=np.full(2, np.nan, np.float32))])
    with refused("found 2, expected one for each of 1"):
        model.act([seen], [1, 2])


def test_nan_fails_loudly(store: EpisodeStore, folders: dict[str, Path]) -> None:
    model = make_svam(store, folders, context=["one_step"])
    with torch.no_grad():
        model.network.diffusion.to_actions[1].bias[0] = float("nan")
    with refused("the policy returned NaN or infinity for observation 0 of 2"):
        model.act(observations(store, 2))


def edited(file: Path, edit: Callable[[bytes], bytes]) -> None:
    file.write_bytes(edit(file.read_bytes()))


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("missing", lambda folder: shutil.rmtree(folder / "video/unet"), "part 'video' lacks its file video/unet/"),
    (
        "truncated", lambda folder: edited(folder / "decoupler_semantic/model.safetensors", lambda data: data[:-7]),
        "part 'decoupler_semantic': decoupler_semantic/model.safetensors has .* bytes, the manifest lists",
    ),
    (
        "flipped", lambda folder: edited(folder / "policy/model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        "part 'policy': policy/model.safetensors was changed after it was saved",
    ),
    ("no manifest", lambda folder: (folder / "manifest.json").unlink(), "manifest.json: no such file"),
    (
        "no part", lambda folder: edited(folder / "manifest.json", lambda data: data.replace(b'"text": {', b'"speech": {')),
        "part 'text' is not in the manifest",
    ),
    ("nothing", shutil.rmtree, "svam: no such folder"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES, ids=[damage[0] for damage in DAMAGES])
def test_a_damaged_folder_is_one_sentence_that_names_the_part(
    name: str, damage: Callable[[Path], Any], message: str, saved: Path
) -> None:
    damage(saved)
    with refused(message):
        SVAM.load(saved)


def test_a_folder_of_an_older_version_is_one_sentence(saved: Path) -> None:
    now, file = CHECKPOINT_SCHEMA, saved / "policy/config.json"
    file.write_text(file.read_text().replace(f'"schema_version": {now}', f'"schema_version": {now - 1}'))
    write_manifest(saved)
    with refused(f"policy/config.json: schema_version is {now - 1}, but .* of the code reads {now}"):
        SVAM.load(saved)


def test_it_overfits_one_batch_and_act_repeats_it(store: EpisodeStore, folders: dict[str, Path]) -> None:
    """The whole path: observations -> encode -> loss; afterwards act returns the demonstrated actions."""
    wider = policy_params().transformer.model_dump() | {"width": 32, "steps": 10}
    model = make_svam(store, folders, context=["one_step", "observation"], transformer=wider)
    seen = observations(store, 4)
    seen = [replace(o, frames={"front": np.roll(o.frames["front"], 3 * i, 0)}) for i, o in enumerate(seen)]
    inputs = model.encode(seen)
    rows = np.arange(16).reshape(4, 4)
    physical = store.vector("expert_actions", rows.reshape(-1)).reshape(4, 4, 3)
    physical = denormalise_actions(model.statistics, 0.8 * normalise_actions(model.statistics, physical))
    target = torch.from_numpy(normalise_actions(model.statistics, physical))
    batch = Batch(inputs, target, torch.ones(4, 4, dtype=torch.bool))
    values = inputs.entries["one_step"].float()
    model.network.set_input_statistics("one_step", values.mean((0, 1, 2, 3)), values.std((0, 1, 2, 3)))
    random, losses = torch.Generator().manual_seed(0), []
    optimiser = torch.optim.Adam(model.network.parameters(), lr=0.008)
    for _ in range(150):
        loss = model.loss(batch, random, draws=4)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.4 * np.mean(losses[:5])
    model.network.eval()
    assert np.abs(model.act(seen) - physical).mean() < 0.5 * np.abs(physical - physical.mean(0)).mean()
