"""The fast style: what is averaged, what is simplified, and that its pictures show what the whole meshes show."""

from __future__ import annotations

from itertools import pairwise

import mujoco
import numpy as np
from numpy.typing import NDArray

from svam.contract import SEGMENTATION_CLASSES
from svam.simulation import rendering
from svam.simulation.metaworld import TaskEnvironment
from svam.simulation.rendering import Renderer, average, fast_samples, simplify

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


def test_small_pictures_have_more_samples() -> None:
    assert [fast_samples(size) for size in (32, 64, 95, 96, 128, 255, 256, 512)] == [3, 3, 3, 2, 2, 2, 1, 1]
    assert all(fast_samples(a) >= fast_samples(b) for a, b in pairwise(range(16, 600)))


def grid_mesh(side: int, spacing: float) -> mujoco.MjModel:
    """A flat sheet of side x side squares, two triangles each, and a tetrahedron."""
    x, y = np.meshgrid(np.arange(side + 1), np.arange(side + 1), indexing="ij")
    # MuJoCo wants a volume: the sheet is closed by one point below it.
    points = np.concatenate([np.stack([x, y, 0 * x], -1).reshape(-1, 3) * spacing, [[0.0, 0.0, -0.5]]])
    corner = (np.arange(side)[:, None] * (side + 1) + np.arange(side)).reshape(-1)
    across, after = corner + 1, corner + side + 1
    faces = np.concatenate([np.stack([corner, after, across], -1), np.stack([across, after, after + 1], -1)])
    edge = [[side + 1, 0, (side + 1) ** 2]]
    return mujoco.MjModel.from_xml_string(
        f"""<mujoco><asset>
        <mesh name="sheet" inertia="shell" vertex="{" ".join(map(str, points.reshape(-1)))}"
              face="{" ".join(map(str, [*faces.reshape(-1), *np.ravel(edge)]))}"/>
        <mesh name="small" vertex="0 0 0  0.001 0 0  0 0.001 0  0 0 0.001"/>
        </asset><worldbody><geom type="mesh" mesh="sheet"/><geom type="mesh" mesh="small"/></worldbody></mujoco>"""
    )


def areas(model: mujoco.MjModel, mesh: int) -> NDArray[np.float64]:
    start, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    corners = model.mesh_vert[model.mesh_vertadr[mesh] :][model.mesh_face[start : start + count]].astype(np.float64)
    sides = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    return np.asarray(np.linalg.norm(np.cross(*sides), axis=1) / 2, dtype=np.float64)


def test_large_meshes_keep_their_surface_with_fewer_faces() -> None:
    model = grid_mesh(40, 0.01)
    before, faces = areas(model, 0).sum(), int(model.mesh_facenum[0])
    assert faces == 2 * 40 * 40 + 1
    small = model.mesh_face[model.mesh_faceadr[1] :].copy()
    simplify(model, 0.0399)
    left = int(model.mesh_facenum[0])
    assert left < faces / 8
    assert areas(model, 0).min() > 0.0
    assert abs(areas(model, 0).sum() / before - 1.0) < 0.1
    np.testing.assert_array_equal(model.mesh_face[model.mesh_faceadr[1] :], small)  # however small its triangles are
    kept = np.sort(model.mesh_face[:left], axis=1)
    assert len(np.unique(kept, axis=0)) == left


def test_cells_finer_than_the_mesh_change_nothing() -> None:
    model = grid_mesh(40, 0.01)
    face, normal = model.mesh_face.copy(), model.mesh_facenormal.copy()
    simplify(model, 0.0001)
    assert model.mesh_facenum[0] == 2 * 40 * 40 + 1
    np.testing.assert_array_equal(model.mesh_face, face)
    np.testing.assert_array_equal(model.mesh_facenormal, normal)


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
        for _ in range(8):
            for _ in range(5):
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


def test_the_same_moment_is_the_same_picture_in_every_renderer() -> None:
    for size in (64, 96, 256):
        pictures = []
        for _ in range(2):
            env = TaskEnvironment("reach", size)
            env.reset(5)
            env.step(env.expert_action())
            pictures += [env.observe()["corner2"], env.observe()["corner2"]]
            env.close()
        assert pictures[0].shape == (size, size, 3)
        for other in pictures[1:]:
            np.testing.assert_array_equal(pictures[0], other)
