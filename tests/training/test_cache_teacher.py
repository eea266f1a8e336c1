"""The teacher cache: what is computed on which frames, the statistics behind its metrics, and damaged stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from svam.episodes.store import EpisodeStore
from svam.models.teachers import Teacher
from svam.params import CacheTeacher
from svam.training.cache_teacher import Target, cache_windows
from svam.training.distill_data import GeneratedWindows, TeacherWindows
from svam.training.foresight_metrics import MOVED_LEVELS, ForesightScore, centred_cosine, moved_patches
from svam.training.teacher_metrics import confusion, depth_error, intersection_over_union
from tests.sources.common import refused
from tests.tiny_foresight import FRAMES, GRID, SIZE, make_teacher, make_video_teacher, write_windows

SECTION = CacheTeacher(reference="reconstruction", batch=4)
HELD_OUT = [False] * 5 + [True] * 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def windows(store: EpisodeStore, tmp_path_factory: pytest.TempPathFactory) -> GeneratedWindows:
    path = tmp_path_factory.mktemp("windows") / "generated"
    rows = [3, 1, 12, 25, 40, 60, 61, 66]  # rows 60 + 3 k of the episode that begins at row 60 are annotated
    write_windows(path, np.asarray(rows)[:, None] + 2 * np.arange(FRAMES), HELD_OUT)
    return GeneratedWindows(path)


def cached(
    path: Path, windows: GeneratedWindows, store: EpisodeStore, teacher: Teacher, target: Target = "generated", **changes: Any
) -> tuple[TeacherWindows, dict[str, Any]]:
    section = SECTION.model_copy(update=changes)
    path.mkdir()
    metrics = cache_windows(path, windows, store, teacher, "semantic", section, target, CPU)
    return TeacherWindows(path, windows), metrics


def seen(teacher: Teacher, frames: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What is stored for frames (k, H, W, 3): the teacher itself, in float16."""
    tokens = teacher.features(torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2) / 255.0).numpy()
    return np.asarray(tokens.astype(np.float16))


def test_each_array_is_the_teacher_on_its_frames(tmp_path: Path, windows: GeneratedWindows, store: EpisodeStore) -> None:
    teacher = make_teacher()
    cache, metrics = cached(tmp_path / "cache", windows, store, teacher)
    assert metrics["dense"] == {}, "this teacher has no head"
    assert cache.channels == 12 and cache.targets.dtype == np.float16 and cache.targets.shape == (8, FRAMES, GRID, GRID, 12)
    for array, frames in (
        (cache.targets, windows.frames), (cache.one_step, windows.one_step_frames),
        (cache.other_noise, windows.other_noise_frames),
    ):  # fmt: skip
        for number in range(len(frames)):
            expected = seen(teacher, frames[number])
            np.testing.assert_allclose(array[number].astype(float), expected.astype(float), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(
        cache.reference.astype(float), seen(teacher, windows.reconstruction).astype(float), rtol=1e-2, atol=1e-2
    )
    assert np.array_equal(cache.moved, moved_patches(windows.frames, GRID))


def test_the_reference_and_the_target_are_choices(tmp_path: Path, windows: GeneratedWindows, store: EpisodeStore) -> None:
    teacher = make_teacher()
    cache, metrics = cached(tmp_path / "cache", windows, store, teacher, "ground_truth", reference="frame")
    truth = store.frames(windows.rows.reshape(-1)).reshape(8, FRAMES, SIZE, SIZE, 3)
    expected = seen(teacher, truth.reshape(-1, SIZE, SIZE, 3)).reshape(8, FRAMES, GRID, GRID, 12)
    np.testing.assert_allclose(cache.targets.astype(float), expected.astype(float), rtol=1e-2, atol=1e-2)
    assert np.array_equal(cache.reference, cache.targets[:, 0])  # the recorded frame 0 is the observed one
    assert np.array_equal(cache.moved, moved_patches(truth, GRID))
    assert (cache.attributes["target"], cache.attributes["reference"]) == ("ground_truth", "frame")
    assert set(metrics["reference"]) == {"frame", "reconstruction"}  # measured whichever is used


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_a_teacher_of_video_sees_whole_clips(
    batch: int, tmp_path: Path, windows: GeneratedWindows, store: EpisodeStore
) -> None:
    """However few frames are looked at at a time; and the reference is the current frame as a clip in which nothing moves."""
    teacher = make_video_teacher()
    cache, _ = cached(tmp_path / "cache", windows, store, teacher, batch=batch)
    for array, frames in ((cache.targets, windows.frames), (cache.other_noise, windows.other_noise_frames)):
        clips = torch.from_numpy(np.array(frames)).permute(0, 1, 4, 2, 3) / 255.0
        np.testing.assert_allclose(array.astype(float), teacher.clip_features(clips).numpy(), rtol=1e-2, atol=1e-2)
    still = torch.from_numpy(np.array(windows.reconstruction)).permute(0, 3, 1, 2)[:, None].repeat(1, FRAMES, 1, 1, 1) / 255.0
    expected = teacher.clip_features(still).mean(dim=1).numpy()
    np.testing.assert_allclose(cache.reference.astype(float), expected, rtol=1e-2, atol=1e-2)
    assert np.abs(cache.targets[:, 0].astype(float) - cache.reference).max() > 0.1


def test_centres_come_from_training_windows_only(tmp_path: Path, windows: GeneratedWindows, store: EpisodeStore) -> None:
    """Other held-out windows change nothing that is stored of the training ones, nor what the cosine is taken around."""
    teacher = make_teacher()
    cache, metrics = cached(tmp_path / "cache", windows, store, teacher)
    centre = cache.targets[:5, 1:].astype(np.float64).mean(axis=(0, 1))
    truth, moved = cache.targets[5:, 1:].astype(np.float64), cache.moved[5:, 1:]
    reference = np.broadcast_to(cache.reference[5:, None].astype(np.float64), truth.shape)
    a, b = (truth - centre)[moved], (reference - centre)[moved]
    expected = ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean()
    assert metrics["reference"]["reconstruction"]["cosine_moved"] == pytest.approx(expected, abs=2e-2)


@pytest.mark.parametrize("objective", ["depth", "segmentation"])
def test_dense_predictions_are_compared_where_labels_are(
    objective: Any, tmp_path: Path, windows: GeneratedWindows, store: EpisodeStore
) -> None:
    teacher = make_teacher(objective)
    _, metrics = cached(tmp_path / "cache", windows, store, teacher)
    # Held-out rows 60 62 64 | 61 63 65 | 66 68 70, the first of each being observed: only row 63 is annotated.
    labels = store.annotation(objective)
    assert labels is not None
    truth = labels.values(np.flatnonzero(labels.rows == 63))
    frame = torch.from_numpy(windows.frames[6, 1][None]).permute(0, 3, 1, 2) / 255.0
    dense = teacher.predict(frame)
    if objective == "depth":
        expected = depth_error(dense.numpy(), truth, 0.5)
    else:
        names = ("background", "table", "arm", "gripper", "object", "fixture", "goal")
        expected = intersection_over_union(confusion(dense.argmax(1).numpy(), truth, 7), names)
    assert set(metrics["dense"]) == {"real", "generated", "one_step"}
    assert metrics["dense"]["generated"] == pytest.approx(expected, rel=1e-4)
    assert metrics["dense"]["generated"] != metrics["dense"]["real"]


def test_damaged_and_foreign_stores_are_one_sentence(tmp_path: Path, windows: GeneratedWindows, store: EpisodeStore) -> None:
    cached(tmp_path / "cache", windows, store, make_teacher())
    file = tmp_path / "cache" / "targets.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with refused(r"targets.npy: truncated or no array"):
        TeacherWindows(tmp_path / "cache", windows)
    file.write_bytes(whole)
    with refused(r"nowhere: no attributes.json in it; run the stage generate"):
        GeneratedWindows(tmp_path / "nowhere")
    write_windows(tmp_path / "other", windows.rows + 1, HELD_OUT)
    with refused(r"cache: made from other windows than .*other holds; run cache_teacher again"):
        TeacherWindows(tmp_path / "cache", GeneratedWindows(tmp_path / "other"))
    (tmp_path / "other" / "frames.npy").unlink()
    with refused(r"other: no frames.npy in it; run generate again"):
        GeneratedWindows(tmp_path / "other")
    write_windows(tmp_path / "far", windows.rows + 1000, HELD_OUT)
    with refused(r"far: rows up to 1070, but .* has 72; run generate on this store"):
        cached(tmp_path / "none", GeneratedWindows(tmp_path / "far"), store, make_teacher())
    write_windows(tmp_path / "blind", windows.rows, [False] * 8)
    with refused("no held-out window"):
        GeneratedWindows(tmp_path / "blind")


def test_moved_patches_by_hand() -> None:
    clip = np.zeros((1, 3, 4, 6, 3), dtype=np.uint8)
    clip[0, 1, 0, 0] = int(MOVED_LEVELS * 6)  # one of the six pixels of patch (0, 0): exactly the threshold, not above
    clip[0, 2, 0, 0] = int(MOVED_LEVELS * 6) + 1
    clip[0, 2, 3, 5, 0] = 255  # one colour of one pixel: 255 / 18 levels on average
    moved = moved_patches(clip, 2)
    assert moved.shape == (1, 3, 2, 2)
    assert not moved[0, :2].any()
    assert moved[0, 2].tolist() == [[True, False], [False, True]]
    uneven = moved_patches(np.concatenate([clip, clip[:, :, :, :1]], axis=3), 2)  # 7 columns: patches of 3 and 4
    assert uneven.shape == (1, 3, 2, 2)
    with pytest.raises(ValueError, match="cannot be cut into"):
        moved_patches(clip, 5)


def test_scores_by_hand() -> None:
    centre, scale = np.full((1, 2, 2), 1.0, np.float32), np.asarray([1.0, 2.0], np.float32)
    target = np.asarray([[2.0, 1.0], [1.0, 3.0]], np.float32).reshape(1, 1, 1, 2, 2)  # centred: (1, 0), (0, 2)
    guess = np.asarray([[2.0, 2.0], [3.0, 3.0]], np.float32).reshape(1, 1, 1, 2, 2)  # centred: (1, 1), (2, 2)
    still = np.asarray([[1.0, 1.0], [1.0, 1.0]], np.float32).reshape(1, 1, 1, 2, 2)
    moved = np.asarray([True, False]).reshape(1, 1, 1, 2)
    score, repeat = ForesightScore(centre, scale), ForesightScore(centre, scale)
    for s, prediction in ((score, guess), (repeat, still)):
        s.add(prediction, target, moved)
        s.add(prediction, target, moved)  # sums over batches
    result = score.result(repeat)
    # Errors per patch, in deviations: ((0)^2 + (1 / 2)^2) / 2 = 0.125 and (2^2 + 0) / 2 = 2; of repeat: 0.5 and 0.5.
    assert result["mse"] == pytest.approx((0.125 + 2.0) / 2) and result["mse_moved"] == pytest.approx(0.125)
    assert result["explained"] == pytest.approx(1 - 1.0625 / 0.5) and result["explained_moved"] == pytest.approx(0.75)
    assert result["cosine_moved"] == pytest.approx(np.sqrt(0.5))
    assert repeat.result(repeat)["explained"] == 0.0
    assert centred_cosine(guess, target, centre, ~moved) == pytest.approx([np.sqrt(0.5)])  # (2, 2) and (0, 2)
    assert centred_cosine(still, target, centre, moved) == pytest.approx([0.0])
    nothing = ForesightScore(centre, scale)
    nothing.add(guess, target, np.zeros_like(moved))
    assert nothing.result(nothing)["cosine_moved"] == nothing.result(nothing)["explained_moved"] == 0.0
