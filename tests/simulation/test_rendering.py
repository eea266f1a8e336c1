"""The fast style: what is averaged, and that its pictures show what the whole meshes show."""

from __future__ import annotations

import numpy as np

from svam.contract import SEGMENTATION_CLASSES
from svam.simulation import rendering
from svam.simulation.metaworld import TaskEnvironment
from svam.simulation.rendering import Renderer, average

GOAL, GRIPPER = SEGMENTATION_CLASSES.index("goal"), SEGMENTATION_CLASSES.index("gripper")


def test_a_pixel_is_the_mean_of_its_samples() -> None:
    samples = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    for number in (1, 2, 3):
        squares = samples.reshape(12 // number, number, 18 // number, number, 3).astype(np.float64)
        expected = np.floor(squares.mean(axis=(1, 3)) + 0.5)
        pixels = average(samples, number)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(average(np.full((6, 6, 3), 255, np.uint8), 3), np.full((2, 2, 3), 255))


def test_fast_pictures_show_what_the_whole_meshes_show() -> None:
    for task, size in (("drawer-open", 64), ("reach", 64), ("coffee-button", 128)):
        env = TaskEnvironment(task, size)
        before = env._env.model.mesh_facenum.copy(), env._env.model.vis.global_.offwidth
        whole, kept = TaskEnvironment(task, size), (rendering.LARGE_MESH, rendering.ROUND)
        try:
            rendering.LARGE_MESH, rendering.ROUND = 10**9, (28, 16)
            whole._renderer.close()
            whole._renderer = Renderer(whole._env.model, size, "fast")
        finally:
            rendering.LARGE_MESH, rendering.ROUND = kept
        np.testing.assert_array_equal(env._env.model.mesh_facenum, before[0])  # the physics' own meshes
        assert env._env.model.vis.global_.offwidth == before[1]
        env.reset(1)
        whole.reset(1)
        different = 0
        for _ in range(4):
            for _ in range(10):
                action = env.expert_action()
                env.step(action)
                whole.step(action)
            np.testing.assert_array_equal(env.state(), whole.state())
            a, b = env.observe()["corner2"].astype(int), whole.observe()["corner2"].astype(int)
            different += int((a != b).any())
            assert np.abs(a - b).mean() < 0.6, task
            assert (np.abs(a - b).max(axis=-1) > 32).mean() < 0.01, task
            (depth, labels), (whole_depth, whole_labels) = env.annotate(), whole.annotate()
            same = labels == whole_labels
            assert same.mean() > 0.99 and np.median(np.abs(depth - whole_depth)[same]) < 0.002, task
            assert ((labels == GOAL) != (whole_labels == GOAL)).sum() <= 2, task
            assert (labels == GRIPPER).any(), task
        assert different, "nothing was simplified"
        env.close()
        whole.close()
