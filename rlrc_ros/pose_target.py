"""The guard's velocities as target poses, for controllers that take those."""

from __future__ import annotations

import math

from rlrc_ros.guard import Output, Pose
from rlrc_ros.limits import Limits
from rlrc_ros.motion import (
    Quaternion,
    Vector,
    added,
    angle_between,
    multiplied,
    scaled,
    turn_between,
    turn_quaternion,
    z_axis,
)

MAX_LEAD = 0.05
"""m that the target may be ahead of the arm. A compliant controller pushes the harder the farther
ahead its target is: an arm that is held up is not to be pushed harder and harder."""
MAX_LEAD_ANGLE = 0.35
"""rad, the same for the orientation."""


class PoseTarget:
    """Goes from where the arm is with the velocities that the guard lets through.

    A target never moves faster than the velocities say, never out of the workspace or the cone, and
    never farther ahead of the arm than MAX_LEAD and MAX_LEAD_ANGLE; it waits where it would.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._position: Vector | None = None
        self._orientation: Quaternion = (0.0, 0.0, 0.0, 1.0)
        self._running = False
        self._time = 0.0
        self._reach_time = 2.0 / limits.rate
        self.waited = 0
        """How many steps the target has waited for the arm, or at a wall."""

    def pause(self) -> None:
        """Nothing is sent for now; another may move the arm."""
        self._running = False

    def advance(
        self, now: float, output: Output, pose: Pose | None
    ) -> tuple[Vector, Quaternion] | None:
        """The next target; None while nobody knows where the arm is.

        Args:
            now: steady clock, s.
            output: what the guard lets through.
            pose: where the arm was measured last, None where that will not do: the target waits.
        """
        if pose is None:
            self._time = now
            return (self._position, self._orientation) if self._running and self._position else None
        if not self._running or self._position is None:
            self._begin(pose)
        dt = min(max(now - self._time, 0.0), self._reach_time) if self._running else 0.0
        self._running, self._time = True, now
        assert self._position is not None
        position = self._kept_in(added(self._position, scaled(output.linear, dt)))
        turn = multiplied(turn_quaternion(scaled(output.angular, dt)), self._orientation)
        if self._may_go(math.dist(position, pose.position), self._lead(pose), MAX_LEAD):
            self._position = position
        lead_now = turn_between(pose.orientation, self._orientation)
        if self._may_go(turn_between(pose.orientation, turn), lead_now, MAX_LEAD_ANGLE) and (
            self._may_go(self._tilt(turn), self._tilt(self._orientation), self._limits.max_tilt)
        ):
            self._orientation = turn
        return self._position, self._orientation

    def _begin(self, pose: Pose) -> None:
        """From the last target where the arm is near it, so that it does not sag; else the arm."""
        near = (
            self._position is not None
            and self._lead(pose) <= MAX_LEAD
            and turn_between(pose.orientation, self._orientation) <= MAX_LEAD_ANGLE
        )
        if not near:
            self._position = pose.position
            self._orientation = multiplied((0.0, 0.0, 0.0, 1.0), pose.orientation)

    def _lead(self, pose: Pose) -> float:
        assert self._position is not None
        return math.dist(self._position, pose.position)

    def _tilt(self, orientation: Quaternion) -> float:
        return angle_between(self._limits.cone_axis, z_axis(orientation))

    def _may_go(self, then: float, now: float, most: float) -> bool:
        if then <= most or then <= now:
            return True
        self.waited += 1
        return False

    def _kept_in(self, position: Vector) -> Vector:
        """The position within the workspace, or no farther outside than the target is already."""
        low, high, last = self._limits.workspace_min, self._limits.workspace_max, self._position
        if low is None or high is None or last is None:
            return position
        x, y, z = (
            min(max(to, min(least, at)), max(most, at))
            for to, at, least, most in zip(position, last, low, high, strict=True)
        )
        return x, y, z
