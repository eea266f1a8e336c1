"""Off-screen pictures of MuJoCo scenes without a display: choose a GL library that works, draw colour, depth and labels.

Every renderer owns its GL context, makes it current before it touches GL, and frees its buffers inside it. (mujoco's own
`Renderer.close` frees the context first and then deletes buffers by number in whatever context is current, which is how
several environments in one process corrupt one another's pictures.)
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import weakref
from importlib import import_module
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svam.errors import MachineError

BACKENDS = ("egl", "osmesa")
_CHECKED = "SVAM_GL_CHECKED"
FAST_SAMPLES = ((96, 3), (256, 2))
"""The fast style draws several samples per pixel and direction and averages them: 3 below 96 pixels, 2 below 256, else 1. A
goal marker of two pixels then keeps its position and size to a fraction of a pixel, and at any size at least 192 pixels are
drawn from 64 pixels on."""
COARSE_METRES, COARSE_DRAWN = 0.006, 256
"""The fast style merges the vertices of large meshes that lie in one cell of this many metres where up to `COARSE_DRAWN`
pixels are drawn, and in finer cells in proportion beyond: about a sample's width at a metre's distance."""
ROUND = (16, 10)
"""Slices and stacks of spheres and cylinders in the fast style (MuJoCo's own: 28 and 16): a corner of the outline is then
off by 2 % of the radius, half a millimetre of a goal marker's."""
LARGE_MESH = 1000
"""Faces from which a mesh is large: the robot's parts, not the things it handles. They are 98 % of a scene's triangles,
most of them smaller than a sample, and software rendering spends half of a small picture's time on them."""
_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 0 3"/><geom type="sphere" size="1" rgba="1 0 0 1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
assert renderer.render()[16, 16, 0] > 0
renderer.close()
print("drawn")
"""


def _works(backend: str, seconds: float) -> bool:
    """Whether a process of its own can draw a red ball: a broken driver may abort or hang, which no `except` catches."""
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except (subprocess.TimeoutExpired, OSError):
        return False
    return probe.returncode == 0 and "drawn" in probe.stdout


def choose_backend(seconds: float = 60.0) -> str:
    """The GL library that draws here: the one in MUJOCO_GL if it is set, else EGL, else OSMesa.

    The choice is tried in a process of its own and then left in the environment, so that child processes inherit it.

    Raises:
        MachineError: nothing draws within `seconds` each; the message names the Debian packages to install.
    """
    requested = os.environ.get("MUJOCO_GL", "").lower()
    if requested and os.environ.get(_CHECKED) == requested:
        return requested
    candidates = (requested,) if requested else BACKENDS
    for backend in candidates:
        if _works(backend, seconds):
            os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = os.environ[_CHECKED] = backend
            return backend
    tried = f"MUJOCO_GL={requested} does not draw" if requested else "neither EGL nor OSMesa draws"
    unset = ", or unset MUJOCO_GL" if requested else ""
    raise MachineError(
        f"no off-screen OpenGL: {tried} here; install the Debian packages `libegl1 libgl1` (EGL) or `libosmesa6` "
        f"(OSMesa), e.g. `sudo apt-get install -y libegl1 libgl1`{unset}"
    )


def fast_samples(size: int) -> int:
    """Samples per pixel and direction of the fast style's pictures of `size` pixels; see `FAST_SAMPLES`."""
    return next((samples for below, samples in FAST_SAMPLES if size < below), 1)


def average(pixels: NDArray[np.uint8], samples: int) -> NDArray[np.uint8]:
    """(H * samples, W * samples, 3) uint8 to (H, W, 3) uint8: the mean of each square of samples, halves rounded up."""
    if samples == 1:
        return pixels
    height, width = pixels.shape[0] // samples, pixels.shape[1] // samples
    # Rows first, then columns: whole rows of memory are added, an order of magnitude faster than a sum over two axes.
    rows = pixels.reshape(height, samples, -1)
    total = rows[:, 0].astype(np.uint16)
    for row in range(1, samples):
        total += rows[:, row]
    columns = total.reshape(height, width, samples, 3)
    mean = columns[:, :, 0] + samples**2 // 2
    for column in range(1, samples):
        mean += columns[:, :, column]
    mean //= samples**2
    return mean.astype(np.uint8)


def simplify(model: Any, cell: float) -> None:
    """Merge the vertices of every mesh of `LARGE_MESH` faces or more that share a cubic cell of `cell` metres, in place.

    For drawing alone: `model` is a copy that no physics sees. A vertex becomes the first of its cell, faces that lose their
    area or repeat another are left out, and each keeps its normals and texture coordinates. (Rossignac and Borrel 1993.)
    """
    for mesh in np.flatnonzero(model.mesh_facenum >= LARGE_MESH):
        start, count = int(model.mesh_vertadr[mesh]), int(model.mesh_vertnum[mesh])
        cells = np.floor(model.mesh_vert[start : start + count] / cell).astype(np.int64)
        _, first, cell_of = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        start, count = int(model.mesh_faceadr[mesh]), int(model.mesh_facenum[mesh])
        faces = first[cell_of][model.mesh_face[start : start + count]]
        a, b, c = faces.T
        used = np.flatnonzero((a != b) & (b != c) & (a != c))
        # Equal faces may begin at different corners; turned so that the lowest leads, they are equal rows.
        turned = np.take_along_axis(faces[used], (faces[used].argmin(axis=1)[:, None] + np.arange(3)) % 3, axis=1)
        used = used[np.sort(np.unique(turned, axis=0, return_index=True)[1])]
        if not len(used):  # smaller than a cell: drawn as it is
            continue
        model.mesh_face[start : start + len(used)] = faces[used]
        for array in (model.mesh_facenormal, model.mesh_facetexcoord):
            array[start : start + len(used)] = array[start : start + count][used]
        model.mesh_facenum[mesh] = len(used)


class Renderer:
    """Pictures of one model at one size.

    model: `mujoco.MjModel`; it is not changed.
    style: "fast" draws neither shadows nor reflections, simplifies large meshes and round things to about the size of a
    sample, and averages `fast_samples`^2 samples a pixel; "full" is mujoco's stock look.
    """

    def __init__(self, model: Any, size: int, style: Literal["fast", "full"]) -> None:
        backend = choose_backend()
        import mujoco

        self._mujoco, self._model, self._size = mujoco, model, size
        self._samples = fast_samples(size) if style == "fast" else 1
        drawn = size * self._samples
        drawn_model = copy.deepcopy(model)  # what is uploaded for drawing
        drawn_model.vis.global_.offwidth = drawn_model.vis.global_.offheight = drawn
        if style == "fast":
            drawn_model.vis.quality.offsamples = 0
            drawn_model.vis.quality.shadowsize = 0
            drawn_model.vis.quality.numslices, drawn_model.vis.quality.numstacks = ROUND
            simplify(drawn_model, COARSE_METRES * min(1.0, COARSE_DRAWN / drawn))
        # The class is taken from its own module: `mujoco.GLContext` was fixed when mujoco was first imported.
        module = import_module(f"mujoco.{backend}") if backend in BACKENDS else mujoco
        self._gl: Any = module.GLContext(drawn, drawn)
        self._gl.make_current()
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        if style == "fast":
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._fine, self._coarse = mujoco.MjrRect(0, 0, drawn, drawn), mujoco.MjrRect(0, 0, size, size)
        self._context: Any = mujoco.MjrContext(drawn_model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        # Also runs when the renderer is garbage or the interpreter ends, while the GL modules are still whole.
        self._free = weakref.finalize(self, _free, self._gl, self._context)

    def _draw(self, data: Any, camera: int, rectangle: Any) -> None:
        self._gl.make_current()
        self._camera.fixedcamid = camera
        self._mujoco.mjv_updateScene(
            self._model, data, self._option, None, self._camera, self._mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        self._mujoco.mjr_render(rectangle, self._scene, self._context)

    def colour(self, data: Any, camera: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB seen by camera number `camera`, rows from the bottom up as GL gives them."""
        self._draw(data, camera, self._fine)
        pixels = np.empty((self._fine.height, self._fine.width, 3), np.uint8)
        self._mujoco.mjr_readPixels(pixels, None, self._fine, self._context)
        return average(pixels, self._samples)

    def annotations(self, data: Any, camera: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Depth (H, W) float32 in metres along the optical axis, and what is drawn, (H, W, 2) int32 as (mjtObj, number)
        or (-1, -1) where nothing is; rows from the bottom up. One drawing serves both."""
        flags = self._mujoco.mjtRndFlag
        self._scene.flags[flags.mjRND_SEGMENT] = self._scene.flags[flags.mjRND_IDCOLOR] = 1
        try:
            self._draw(data, camera, self._coarse)
        finally:
            self._scene.flags[flags.mjRND_SEGMENT] = self._scene.flags[flags.mjRND_IDCOLOR] = 0
        colour = np.empty((self._size, self._size, 3), np.uint8)
        buffer = np.empty((self._size, self._size), np.float32)
        self._mujoco.mjr_readPixels(colour, buffer, self._coarse, self._context)

        # Depth from GL's reversed buffer b (1 at the near plane, 0 at the far plane): 1/z is linear in b.
        extent = self._model.stat.extent
        near, far = self._model.vis.map.znear * extent, self._model.vis.map.zfar * extent
        depth = 1.0 / (1.0 / far + buffer.astype(np.float64) * (1.0 / near - 1.0 / far))

        number = colour.astype(np.int64) @ np.array([1, 256, 65536])
        what = np.full((self._scene.ngeom + 1, 2), -1, np.int32)
        for geom in self._scene.geoms[: self._scene.ngeom]:
            if geom.segid != -1:
                what[geom.segid + 1] = geom.objtype, geom.objid
        return depth.astype(np.float32), what[np.where(number < len(what), number, 0)]

    def close(self) -> None:
        self._free()


def _free(gl: Any, context: Any) -> None:
    """Buffers first, in their own GL context, then that context."""
    gl.make_current()
    context.free()
    gl.free()
