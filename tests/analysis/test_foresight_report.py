"""The gap and the depth probe by hand-made cases: clips that are equal, shifted, blurred or frozen; depth that is linear."""

from __future__ import annotations

import numpy as np
import pytest

from svam.analysis import attention, depth_probe, gap
from svam.report.grid import heat
from svam.training.distill_data import annotated_frames

STEPS, SIZE, PATCHES = 5, 16, 4
ARM, GRIPPER, OBJECT = 2, 3, 4


def moving_square(shift: int = 0, speed: int = 2, count: int = 2) -> np.ndarray:
    """Clips (count, STEPS, SIZE, SIZE, 3): a bright square of 4 pixels that moves right by `speed` a frame, on noise that
    stays. Frame 0 is always the same; `shift` displaces the others."""
    rng = np.random.default_rng(0)
    clip = np.broadcast_to(rng.integers(0, 60, (SIZE, SIZE, 3)), (count, STEPS, SIZE, SIZE, 3)).astype(np.uint8)
    for t in range(STEPS):
        left = speed * t + (shift if t else 0)
        clip[:, t, 6:10, left : left + 4] = 250
    return clip


def blurred(clips: np.ndarray) -> np.ndarray:
    """Every frame but the first averaged with its neighbours, three pixels wide."""
    wide = clips.astype(float)
    for axis in (2, 3):
        wide = (np.roll(wide, 1, axis) + wide + np.roll(wide, -1, axis)) / 3
    wide[:, 0] = clips[:, 0]
    return np.rint(wide).astype(np.uint8)


def values(clips: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    return {name: gap.value_of(sums) for name, sums in gap.pixel_sums(clips, truth, truth, PATCHES).items()}


def labels_in(clips: np.ndarray) -> np.ndarray:
    """The square is the gripper."""
    return np.where(clips[:, 1:, ..., 0] == 250, GRIPPER, 0)


def test_a_shift_and_a_blur_are_worse_each_in_its_way() -> None:
    truth = moving_square()
    near, far, soft = (values(clips, truth) for clips in (moving_square(1), moving_square(3), blurred(truth)))
    assert 0 < near["error"] < far["error"] and near["sharpness"] == pytest.approx(1.0, abs=0.1)
    assert near["motion_found"] >= far["motion_found"] and far["motion_false"] > 0
    assert soft["sharpness"] < 0.6 and soft["sharpness_moved"] < 0.6
    # In squared error the blur beats the sharp clip that is three pixels off.
    assert soft["error"] < far["error"]


def test_sums_by_hand() -> None:
    truth = np.zeros((1, 3, 4, 4, 3), np.uint8)
    truth[0, 1, 0, 0], truth[0, 2, 0, 1] = 30, 60
    made = np.zeros_like(truth)
    made[0, 1, 0, 0] = 40
    sums = gap.pixel_sums(made, truth, truth, 2)
    # Errors 10 and 60 in three colours; the truth differs from its first frame by 30 and 60.
    assert sums["error"].numerator == 3 * (10**2 + 60**2) and sums["error"].denominator == 3 * (30**2 + 60**2)
    # Changes: truth (+30 | 0), (-30 | +60); made (+40 | 0), (-40 | 0).
    assert sums["change_error"].numerator == 3 * (10**2 + 10**2 + 60**2)
    assert sums["change_error"].denominator == 3 * (30**2 + 30**2 + 60**2)
    # A patch of four pixels moves above 8 levels: truth 7.5 and 15, made 10 and 0.
    assert sums["motion_found"] == (0.0, 1.0) and sums["motion_false"] == (1.0, 7.0)
    energy = gap.gradient_energy(truth[0])
    assert energy[1].sum() == 2 * 30**2 and energy[2].sum() == 3 * 60**2
    with pytest.raises(ValueError, match="differ in shape"):
        gap.pixel_sums(made[:, :2], truth, truth, 2)


def test_intersection_over_union_by_hand() -> None:
    truth = np.zeros((2, 1, 4, 4), np.uint8)
    truth[:, :, 0], truth[:, :, 1] = ARM, GRIPPER
    made = np.zeros_like(truth)
    made[:, :, 0], made[:, :, 2] = GRIPPER, OBJECT
    sums = gap.label_sums(made, truth, np.array([[True], [False]]), "iou")
    # Arm taken for gripper is still robot: 4 of 8 pixels; as grippers they are disjoint; the object is invented.
    assert [gap.value_of(sums[f"iou_{region}"]) for region in gap.REGIONS] == [0.5, 0.0, 0.0]
    assert sums["iou_robot"].denominator.tolist() == [8.0, 0.0]
    same = gap.label_sums(truth, truth, np.ones((2, 1), bool), "agree")
    assert gap.value_of(same["agree_robot"]) == gap.value_of(same["agree_gripper"]) == 1.0
    assert gap.value_of(same["agree_object"]) is None


def test_annotated_frames_skip_the_observed_one_and_repeats() -> None:
    rows = np.array([[0, 2, 4, 6], [4, 6, 6, 6], [1, 3, 5, 7]])
    assert annotated_frames(rows, np.array([0, 4, 6])).tolist() == [[0, 2], [0, 3], [1, 1]]
    assert annotated_frames(rows, np.empty(0, np.int64)).shape == (0, 2)


def compared(many: np.ndarray, one: np.ndarray, truth: np.ndarray, episodes: np.ndarray) -> dict:
    sums, everywhere = {}, np.ones((len(truth), STEPS - 1), bool)
    for row, clips in (("multi_step", many), ("one_step", one)):
        sums[row] = gap.pixel_sums(clips, truth, truth, PATCHES)
        sums[row] |= gap.label_sums(labels_in(clips), labels_in(truth), everywhere, "agree")
    return gap.summary(sums, episodes, 1000, 0)


def test_the_verdict_follows_the_intervals() -> None:
    truth = moving_square(count=12)
    episodes = np.repeat(np.arange(12), 1)
    result = compared(truth, blurred(truth), truth, episodes)
    findings = {name: line["finding"] for name, line in result["difference"].items()}
    assert findings["sharpness"] == findings["agree_gripper"] == findings["error"] == "better"
    assert "agree_object" not in findings  # nowhere to be seen
    assert result["difference"]["agree_gripper"]["value"] > 0 > result["difference"]["error"]["value"]
    assert "better in error" in result["verdict"] and result["verdict"] in gap.markdown(result)
    swapped = compared(blurred(truth), truth, truth, episodes)
    assert swapped["difference"]["sharpness"]["finding"] == "worse"
    assert swapped["difference"]["error"]["value"] == pytest.approx(-result["difference"]["error"]["value"])
    same = compared(truth, truth, truth, episodes)
    assert {line["finding"] for line in same["difference"].values()} == {"not distinguishable"}
    # One window in four is worse by far, the others a little better: that says nothing about the mean.
    mixed = np.where(np.arange(12)[:, None, None, None, None] % 4 == 0, moving_square(3, count=12), truth)
    assert (
        compared(mixed, moving_square(1, count=12), truth, episodes)["difference"]["error"]["finding"] == "not distinguishable"
    )


def test_episodes_are_resampled_not_windows() -> None:
    """Twelve windows of three episodes are three draws: too few for a verdict, and wider intervals."""
    truth = moving_square(count=12)
    few = compared(truth, blurred(truth), truth, np.repeat(np.arange(3), 4))
    assert few["episodes"] == 3 and few["verdict"].startswith("No verdict: 3 held-out episodes")
    assert {line["finding"] for line in few["difference"].values()} == {"not distinguishable"}
    spread = np.random.default_rng(0).normal(size=3).repeat(4)
    sums = gap.Sums(spread, np.ones(12))
    together = gap.EpisodeBootstrap(np.repeat(np.arange(3), 4), 4000, 0).ratios(sums)
    apart = gap.EpisodeBootstrap(np.arange(12), 4000, 0).ratios(sums)
    assert together.std() == pytest.approx(2 * apart.std(), rel=0.1)
    # A resample in which there is nothing to count is left out.
    ratios = gap.EpisodeBootstrap(np.array([5, 9]), 1000, 0).ratios(gap.Sums(np.array([1.0, 0.0]), np.array([2.0, 0.0])))
    assert set(ratios[~np.isnan(ratios)]) == {0.5} and np.isnan(ratios).any()


def test_depth_goes_to_patches_and_back() -> None:
    depth = np.random.default_rng(0).uniform(1, 2, (3, 12, 8)).astype(np.float32)
    patches = depth_probe.to_patches(depth, 4)
    assert patches.shape == (3, 16, 6)
    np.testing.assert_array_equal(patches[1, 5], depth[1, 3:6, 2:4].reshape(-1))
    np.testing.assert_array_equal(depth_probe.from_patches(patches, 4, 12, 8), depth)
    uneven = np.broadcast_to(np.arange(10, dtype=np.float32), (1, 10, 10))
    again = depth_probe.from_patches(depth_probe.to_patches(uneven, 4), 4, 10, 10)
    assert again.shape == (1, 10, 10) and np.abs(again - uneven).max() <= 2


def linear_depth(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (count, 4, 6), and depth (count, 4, 4) whose inverse is linear in them around a map of its own."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    weight, bias = fixed.normal(scale=0.05, size=(6, 4)), fixed.uniform(0.5, 1.0, (4, 4))
    tokens = rng.normal(size=(count, 4, 6))
    return tokens.astype(np.float32), (1.0 / (bias + tokens @ weight)).astype(np.float32)


def test_the_head_recovers_linear_depth_and_passes_over_holes() -> None:
    tokens, depth = linear_depth(400, 1)
    holes = depth.copy()
    holes[::7, 1, 2] = 0.0
    held_out, truth = linear_depth(20, 2)
    for seen in (depth, holes):
        head = depth_probe.DepthHead(seen)
        for block in range(0, 400, 100):
            head.add(tokens[block : block + 100], seen[block : block + 100])
        head.fit()
        assert np.abs(head.predict(held_out) - truth).max() < 0.05 < np.abs(head.mean(20) - truth).max()


def test_informed_features_read_depth_better_and_the_interval_says_so() -> None:
    """The geometric tokens hold the depth, the repeated ones are noise: its head falls back on the mean."""
    rng = np.random.default_rng(3)
    tokens, patches = linear_depth(320, 1)
    depth = depth_probe.from_patches(patches, 2, 4, 4)
    noise = rng.normal(size=tokens.shape).astype(np.float32)

    def features(numbers: np.ndarray, frames: np.ndarray) -> dict[str, np.ndarray]:
        assert (frames == 1).all()
        return {name: values[numbers].reshape(-1, 2, 2, 6) for name, values in (("geometric", tokens), ("repeat", noise))}

    train, test = ((n, np.ones_like(n), depth[n]) for n in (np.arange(300), np.arange(300, 320)))
    heads = depth_probe.fit_heads(features, train, 2, 64)
    predicted = depth_probe.read_depth(heads, features, test, 2, 8)
    assert list(predicted) == ["geometric", "repeat", "mean"]
    moved = np.zeros((20, 2, 2), bool)
    moved[:, 0] = True
    boot = gap.EpisodeBootstrap(np.arange(20), 1000, 0)
    scores = depth_probe.score_depth(predicted, test, moved, 0.5, boot)
    assert scores["sources"]["geometric"]["rmse_m"] < 0.3 * scores["sources"]["mean"]["rmse_m"]
    by_hand = np.sqrt(np.mean(np.square(predicted["repeat"][:, :2] - test[2][:, :2], dtype=np.float64)))
    assert scores["sources"]["repeat"]["moved_rmse_m"] == pytest.approx(by_hand)
    assert 0 < scores["difference"]["repeat"]["low"] < scores["difference"]["repeat"]["value"]
    still = depth_probe.score_depth(predicted, test, np.zeros_like(moved), 0.5, boot)
    assert still["difference"] == {} and "moved_rmse_m" not in still["sources"]["repeat"]
    assert "| geometric foresight |" in depth_probe.markdown(scores)


def test_attention_on_what_moves_by_hand() -> None:
    frames = np.zeros((1, 3, 8, 8, 3), np.uint8)
    frames[0, 1, :4, :4] = 200  # the first of four patches moves
    weights = np.full((1, 3, 2, 2, 2), 0.25)
    weights[0, 1, 0] = [[0.7, 0.1], [0.1, 0.1]]
    lines = attention.score_attention(weights, frames)
    assert lines == [
        {"frame": 1, "on_moved": pytest.approx((0.7 + 0.25) / 2), "moved": 0.25, "neighbourhood": pytest.approx(1.0)}
    ]


def test_the_neighbourhood_is_three_cells_wide_and_cut_at_the_border() -> None:
    weights = np.zeros((2, 5, 5))
    weights[0, 2, 3], weights[0, 1, 2], weights[0, 4, 4] = 0.6, 0.3, 0.1
    weights[1, 0, 0], weights[1, 1, 1], weights[1, 0, 2] = 0.5, 0.3, 0.2
    assert attention.peaks(weights).tolist() == [[2, 3], [0, 0]]
    assert attention.around_peak(weights).sum(axis=(1, 2)) == pytest.approx([0.9, 0.8])


def test_the_path_lies_within_the_cell_of_the_maximum() -> None:
    weights = np.zeros((2, 2, 5, 5))
    weights[0, :, 2, 3] = 1.0  # both queries at one cell: its middle
    weights[1, 0, 0, 1], weights[1, 1, 0, 2] = 1.0, 1.0  # one beside the other: between them
    np.testing.assert_allclose(attention.attention_path(weights), [[0.7, 0.5], [0.4, 0.1]])


def test_heat_is_cut_at_its_ends_and_grey_where_nothing_is_known() -> None:
    cells = heat(np.array([-5.0, 0.0, 1.0, 9.0, np.nan]), 0.0, 1.0)
    assert (cells[0] == cells[1]).all() and (cells[2] == cells[3]).all() and cells[4].tolist() == [128] * 3
    assert (cells[1] != cells[2]).any()
