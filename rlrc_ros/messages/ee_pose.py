"""geometry_msgs/PoseStamped of the end effector to what a policy takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc_ros import motion
from rlrc_ros.motion import Vector, scaled, unit


def pose_problem(message: Any, base_frame: str) -> str:
    """Why a pose is of no use; empty where it is."""
    place, q = message.pose.position, message.pose.orientation
    position, orientation = (place.x, place.y, place.z), (q.x, q.y, q.z, q.w)
    return motion.pose_problem(message.header.frame_id, position, orientation, base_frame)


def pose_vector(message: Any, near: Sequence[float]) -> NDArray[np.float64]:
    """(6,): position in m, then the orientation's rotation vector in rad.

    Two rotation vectors of less than a full turn are the same orientation, angle · axis and
    (angle − 2π) · axis; the nearer one to `near` (3,) is taken, whichever sign the quaternion has.
    The shorter one would jump at half a turn, which is where a gripper that points down is.
    """
    place, q = message.pose.position, message.pose.orientation
    sine = math.hypot(q.x, q.y, q.z)
    turn: Vector = (0.0, 0.0, 0.0)
    if sine > 0.0:
        axis = unit((q.x, q.y, q.z))
        angle = 2.0 * math.atan2(sine, q.w)  # in [0, 2π]: of this sign of the quaternion
        both = scaled(axis, angle), scaled(axis, angle - 2.0 * math.pi)
        turn = min(both, key=lambda vector: math.dist(vector, near))
    return np.array([place.x, place.y, place.z, *turn])
