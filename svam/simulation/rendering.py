"""Off-screen pictures of MuJoCo scenes without a display: choose a GL library that works, draw colour, depth and labels.

Every renderer owns its GL context, makes it current before it touches GL, and frees its buffers inside it. (mujoco's own
`Renderer.close` frees the context first and then deletes buffers by number in whatever context is current, which is how
several environments in one process corrupt one another's pictures.)
"""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from importlib import import_module
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svam.machine import MachineError

BACKENDS = ("egl", "osmesa")
_CHECKED = "SVAM_GL_CHECKED"
FAST_SAMPLES = 3
"""The fast style draws this many samples per pixel and direction and averages them. Software rendering hardly notices (7 ms
a picture at 64 px become 10), and a goal marker of two pixels keeps its position and size to a fraction of a pixel."""
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
    asked = os.environ.get("MUJOCO_GL", "").lower()
    if asked and os.environ.get(_CHECKED) == asked:
        return asked
    candidates = (asked,) if asked else BACKENDS
    for backend in candidates:
        if _works(backend, seconds):
            os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = os.environ[_CHECKED] = backend
            return backend
    tried = f"MUJOCO_GL={asked} does not draw" if asked else "neither EGL nor OSMesa draws"
    raise MachineError(
        f"no off-screen OpenGL: {tried} here; install the Debian packages `libegl1 libgl1` (EGL) or `libosmesa6` "
        "(OSMesa), e.g. `sudo apt-get install -y libegl1 libgl1`" + (", or unset MUJOCO_GL" if asked else "")
    )


class Renderer:
    """Pictures of one model at one size.

    model: `mujoco.MjModel`; its off-screen buffer settings are changed to fit.
    style: "fast" draws neither shadows nor reflections and averages `FAST_SAMPLES`^2 samples a pixel; "full" is mujoco's
    stock look.
    """

    def __init__(self, model: Any, size: int, style: Literal["fast", "full"]) -> None:
        backend = choose_backend()
        import mujoco

        self._mujoco, self._model, self._size = mujoco, model, size
        self._samples = FAST_SAMPLES if style == "fast" else 1
        drawn = size * self._samples
        model.vis.global_.offwidth = model.vis.global_.offheight = drawn
        if style == "fast":
            model.vis.quality.offsamples = 0
            model.vis.quality.shadowsize = 0
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
        self._context: Any = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
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
        size, samples = self._size, self._samples
        pixels = np.empty((size * samples, size * samples, 3), np.uint8)
        self._mujoco.mjr_readPixels(pixels, None, self._fine, self._context)
        if samples == 1:
            return pixels
        total = pixels.reshape(size, samples, size, samples, 3).sum(axis=(1, 3), dtype=np.uint16)
        return np.asarray((total + samples**2 // 2) // samples**2, dtype=np.uint8)

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
        """Free GL memory; closing twice is harmless."""
        self._free()


def _free(gl: Any, context: Any) -> None:
    """Buffers first, in their own GL context, then that context."""
    gl.make_current()
    context.free()
    gl.free()
