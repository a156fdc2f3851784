"""Rotations, by MuJoCo's own functions.

Quaternions are (4,) w, x, y, z as in MuJoCo; rotation vectors (3,) are in radians.
"""

from __future__ import annotations

import math

import numpy as np

from rlrc_ros.sim.model import mujoco


def from_vector(vector: np.ndarray) -> np.ndarray:
    """Quaternion of a rotation vector."""
    angle = math.hypot(*vector)
    quaternion = np.empty(4)
    axis = np.asarray(vector) / angle if angle else np.array([0.0, 0.0, 1.0])
    mujoco.mju_axisAngle2Quat(quaternion, axis, angle)
    return quaternion


def from_matrix(matrix: np.ndarray) -> np.ndarray:
    """Quaternion of a rotation matrix, (3, 3) or flat."""
    quaternion = np.empty(4)
    mujoco.mju_mat2Quat(quaternion, matrix.ravel())
    return quaternion


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quaternion of first b, then a."""
    product = np.empty(4)
    mujoco.mju_mulQuat(product, a, b)
    return product


def difference(to: np.ndarray, since: np.ndarray) -> np.ndarray:
    """Rotation vector, at most half a turn, that takes `since` to `to`, in the frame of both."""
    inverse, vector = np.empty(4), np.empty(3)
    mujoco.mju_negQuat(inverse, since)
    mujoco.mju_quat2Vel(vector, multiply(to, inverse), 1.0)
    return vector


def pointing_down(yaw: float) -> np.ndarray:
    """Quaternion of a gripper that points down, its x axis turned by `yaw` about the base's z."""
    return np.array([0.0, math.cos(yaw / 2), math.sin(yaw / 2), 0.0])


def look_at(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Quaternion of a camera at a position that looks at a target, its image upright."""
    back = (position - target) / np.linalg.norm(position - target)
    right = np.cross((0, 0, 1), back)
    right /= np.linalg.norm(right)
    return from_matrix(np.column_stack([right, np.cross(back, right), back]))
