"""Looks: MetaWorld's scenes in other colours and light, from a slightly other camera, as CALVIN's environments A to D differ.

`stock` is MetaWorld's own. What any other look changes is drawn from its name alone, a tint also from what is tinted: one look
is the same room for every task, seed and machine. Where things are, the sentences and the markers of goals stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import SEGMENTATION_CLASSES
from svam.seeds import generator

STOCK = "stock"
SURROUNDINGS, THINGS = (0.4, 1.0), (0.75, 1.25)
"""Factors of red, green and blue, drawn each: of floor, walls and table, whose colour is at its most in the stock look;
and of the robot and what it handles, where less is changed, so that dark, white and red things stay dark, white and red, and a
person tells them from one another and from the markers of goals."""
GLOW, LAMP = (0.75, 1.1), (0.4, 1.6)
"""Factors of red, green and blue of the light that is everywhere, and of that of each lamp."""
LAMP_METRES, LAMP_TURN = 0.4, 0.3
"""The most that a lamp is moved along each axis, and that is added to each component of its direction, whose length is 1."""
CAMERA_METRES, CAMERA_DEGREES = 0.03, 2.0
"""The most that a camera is moved along each axis, and turned about any: each is about four of 128 pixels."""
_NO_COLOUR = (0.5, 0.5, 0.5, 1.0)


def put_on(model: Any, look: str, classes: Mapping[int, NDArray[np.uint8]]) -> None:
    """Change a fresh `mujoco.MjModel` before anything is drawn of it; cameras that hang on the robot stay where they are.

    classes: kind of drawn thing (mjtObj) -> (things,) class number, of geoms at least.
    """
    if look == STOCK:
        return
    import mujoco

    around = [SEGMENTATION_CLASSES.index(name) for name in ("background", "table")]
    surroundings = np.isin(classes[int(mujoco.mjtObj.mjOBJ_GEOM)], around)
    done = set(model.site_matid.tolist())  # what markers are made of stays
    for geom in range(model.ngeom):
        colours, place, material = model.geom_rgba, geom, int(model.geom_matid[geom])
        name = str(colours[geom].tolist())  # equal colours, such as the arm's, get equal tints
        if material >= 0 and tuple(colours[geom]) == _NO_COLOUR:  # MuJoCo then draws the material's, else the geom's own
            if material in done:
                continue
            done.add(material)
            colours, place, name = model.mat_rgba, material, model.mat(material).name
        if colours[place, 3] == 1.0:
            tint = generator("look", look, name).uniform(*(SURROUNDINGS if surroundings[geom] else THINGS), 3)
            colours[place, :3] = np.clip(colours[place, :3] * tint, 0.0, 1.0)

    random = generator("look", look, "light")
    glow = random.uniform(*GLOW, 3)
    for part in (model.vis.headlight.ambient, model.vis.headlight.diffuse):
        part[:] *= glow
    for light in range(model.nlight):
        model.light_pos[light] += random.uniform(-LAMP_METRES, LAMP_METRES, 3)
        turned = model.light_dir[light] + random.uniform(-LAMP_TURN, LAMP_TURN, 3)
        model.light_dir[light] = turned / np.linalg.norm(turned)
        model.light_diffuse[light] *= random.uniform(*LAMP, 3)

    for camera in np.flatnonzero(model.cam_bodyid == 0).tolist():
        random = generator("look", look, "camera", model.camera(camera).name)
        model.cam_pos[camera] += random.uniform(-CAMERA_METRES, CAMERA_METRES, 3)
        axis, turn, before = random.normal(size=3), np.empty(4), model.cam_quat[camera].copy()
        angle = np.deg2rad(random.uniform(-CAMERA_DEGREES, CAMERA_DEGREES))
        mujoco.mju_axisAngle2Quat(turn, axis / np.linalg.norm(axis), angle)
        mujoco.mju_mulQuat(model.cam_quat[camera], turn, before)
