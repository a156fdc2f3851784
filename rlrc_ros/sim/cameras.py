"""The tabletop's two cameras and its light, rendered headless through EGL."""

from __future__ import annotations

import atexit
import weakref

import cv2
import numpy as np

from rlrc_ros.errors import UserError
from rlrc_ros.sim import rotations
from rlrc_ros.sim.model import APT_LINE, mujoco
from rlrc_ros.sim.scene import Scene

CAMERAS = ("front", "wide")

# Opposite the arm, so that it hides little, and no farther than sees the whole workspace with the
# gripper at the height it carries things at.
FRONT_POSITION = np.array([1.218, 0.0, 1.065])
FRONT_TARGET = np.array([0.53, 0.0, 0.082])
FRONT_FOVY = 26.5  # degrees
WIDE_POSITION = np.array([1.35, 0.95, 0.75])
WIDE_TARGET = np.array([0.36, -0.01, 0.17])

# Rendered twice as large and averaged: smooth edges, at half the cost of OpenGL's multisampling in
# software Mesa.
SUPERSAMPLING = 2


class Cameras:
    """Cameras of one model. The first `render` sets up OpenGL, for the thread that calls it."""

    def __init__(self, model: mujoco.MjModel):
        self._model = model
        self._front = model.camera("front").id
        model.cam_fovy[self._front] = FRONT_FOVY
        wide = model.camera("wide").id
        model.cam_pos[wide] = WIDE_POSITION
        model.cam_quat[wide] = rotations.look_at(WIDE_POSITION, WIDE_TARGET)
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}

    def place(self, scene: Scene) -> None:
        """Write a scene's light and the front camera's displacement into the model."""
        model = self._model
        direction = np.array(scene.light_direction)
        model.light_dir[0] = direction / np.linalg.norm(direction)
        model.light_diffuse[0] = scene.light
        model.vis.headlight.ambient[:] = scene.ambient
        model.cam_pos[self._front] = FRONT_POSITION + scene.camera_shift
        model.cam_quat[self._front] = rotations.multiply(
            rotations.from_vector(np.array(scene.camera_turn)),
            rotations.look_at(FRONT_POSITION, FRONT_TARGET),
        )

    def render(self, data: mujoco.MjData, camera: str, size: tuple[int, int]) -> np.ndarray:
        """(height, width, 3) uint8 RGB, upright; `size` is (height, width).

        Raises UserError for an unknown camera, and where OpenGL is missing.
        """
        if camera not in CAMERAS:
            raise UserError(f"no camera '{camera}'; there are: {', '.join(CAMERAS)}")
        if size not in self._renderers:
            height, width = (SUPERSAMPLING * length for length in size)
            renderer = make_renderer(self._model, height, width)
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
            self._renderers[size] = renderer
        renderer = self._renderers[size]
        renderer.update_scene(data, camera)
        image = renderer.render()
        return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)

    def close(self) -> None:
        """Free the OpenGL contexts; a later `render` makes new ones."""
        while self._renderers:
            self._renderers.popitem()[1].close()


_live: weakref.WeakSet[mujoco.Renderer] = weakref.WeakSet()


def make_renderer(
    model: mujoco.MjModel, height: int, width: int, max_geom: int = 100
) -> mujoco.Renderer:
    """A renderer of exactly this size, freed before the process ends.

    Raises UserError where OpenGL is missing.
    """
    # The framebuffer is cleared whole for every frame, so it is no larger than the image.
    model.vis.global_.offheight, model.vis.global_.offwidth = height, width
    try:
        renderer = mujoco.Renderer(model, height, width, max_geom=max_geom)
    except (ImportError, AttributeError, RuntimeError, mujoco.FatalError) as error:
        raise UserError(
            f"cannot render ({error}); MUJOCO_GL must be egl (or osmesa) before anything imports "
            f"mujoco, and EGL needs: {APT_LINE}"
        ) from error
    if not _live:
        # The first renderer had MuJoCo register the end of its display: this runs before that.
        atexit.register(_close_live)
    _live.add(renderer)
    return renderer


def _close_live() -> None:
    for renderer in list(_live):
        renderer.close()
