"""One frame in another, from the transforms that a robot publishes between its frames (REP-105).

What tf2's buffer does, for one pair of frames, without ROS. That one is not used because it comes
with apt's ROS 2 alone: nothing that stands between a policy and an arm should run untested.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from typing import NamedTuple

from rlrc_ros.errors import UserError
from rlrc_ros.motion import (
    Quaternion,
    Vector,
    added,
    is_rigid,
    multiplied,
    scaled,
    turn_quaternion,
    turned,
)

KEPT = 2.0
"""s of a frame's past. No older pose is ever of use: limits on age go no further."""


class Transform(NamedTuple):
    """A frame in its parent frame at a time."""

    stamp_ns: int
    position: Vector
    """m."""
    orientation: Quaternion


class _Frame:
    """Where a frame has been in its parent frame."""

    def __init__(self, parent: str, static: bool) -> None:
        self.parent, self.static = parent, static
        self.past: deque[Transform] = deque()

    def add(self, transform: Transform) -> None:
        age = (transform.stamp_ns - self.past[-1].stamp_ns) * 1e-9 if self.past else 1.0
        if self.static or age < -KEPT:  # the clock has been set back
            self.past.clear()
        elif age <= 0.0:
            return
        self.past.append(transform)
        while (transform.stamp_ns - self.past[0].stamp_ns) * 1e-9 > KEPT:
            self.past.popleft()

    def at(self, stamp_ns: int) -> Transform:
        """At a time that is within its past, between the two that were sent around it."""
        if self.static:
            return self.past[0]
        after = bisect_left(self.past, stamp_ns, key=lambda transform: transform.stamp_ns)
        later = self.past[after]
        if later.stamp_ns == stamp_ns:
            return later
        earlier = self.past[after - 1]
        share = (stamp_ns - earlier.stamp_ns) / (later.stamp_ns - earlier.stamp_ns)
        way = added(later.position, scaled(earlier.position, -1.0))
        position = added(earlier.position, scaled(way, share))
        return Transform(
            stamp_ns, position, _between(earlier.orientation, later.orientation, share)
        )


class Frames:
    """The frames of a robot, as messages tell of them.

    Args:
        base: the frame that poses are given in.
        tool: the frame whose pose it is.
    """

    def __init__(self, base: str, tool: str) -> None:
        self._base, self._tool = base, tool
        self._frames: dict[str, _Frame] = {}

    def add(self, parent: str, child: str, transform: Transform, static: bool) -> None:
        """Take a transform in; one that is not newer than the frame's latest is passed over.

        Raises:
            UserError: it is not finite, or its rotation no unit quaternion.
        """
        if not is_rigid(transform.position, transform.orientation):
            raise UserError(f"the transform of '{child}' in '{parent}' is no rigid motion")
        parent, child = parent.lstrip("/"), child.lstrip("/")  # as ROS 1 wrote them
        frame = self._frames.get(child)
        if frame is None or (frame.parent, frame.static) != (parent, static):
            frame = self._frames[child] = _Frame(parent, static)
        frame.add(transform)

    def pose(self) -> Transform:
        """The tool in the base, at the latest time that every frame between them is known at.

        Raises:
            UserError: there is no way between the two, nothing on it ever moves, or frames on it
                have no time in common.
        """
        (down, top), (up, other_top) = self._way_up(self._tool), self._way_up(self._base)
        pair = f"between {self._base} and {self._tool}"
        if top != other_top:
            why = f"above {self._tool} there is '{top}', above {self._base} '{other_top}'"
            raise UserError(f"no way {pair}: {why}")
        while down and up and down[-1] is up[-1]:  # above the frame where they meet
            down.pop()
            up.pop()
        moving = [frame for frame in (*down, *up) if not frame.static]
        if not moving:
            raise UserError(f"nothing moves {pair}: all transforms are static")
        stamp_ns = min(frame.past[-1].stamp_ns for frame in moving)
        if any(frame.past[0].stamp_ns > stamp_ns for frame in moving):
            raise UserError(f"the frames {pair} have no time in common: one is behind the others")
        tool, base = _chained(down, stamp_ns), _chained(up, stamp_ns)
        x, y, z, w = base.orientation
        back = (-x, -y, -z, w)
        position = turned(added(tool.position, scaled(base.position, -1.0)), back)
        return Transform(stamp_ns, position, multiplied(back, tool.orientation))

    def _way_up(self, name: str) -> tuple[list[_Frame], str]:
        """A frame and those above it, and the name of what is above all of them."""
        way: list[_Frame] = []
        while name in self._frames:
            if self._frames[name] in way:
                raise UserError(f"the transforms above '{name}' go round in a circle")
            way.append(self._frames[name])
            name = way[-1].parent
        return way, name


def _chained(way: list[_Frame], stamp_ns: int) -> Transform:
    """The first frame of a way up, in the parent of the last."""
    position: Vector = (0.0, 0.0, 0.0)
    orientation: Quaternion = (0.0, 0.0, 0.0, 1.0)
    for frame in way:
        step = frame.at(stamp_ns)
        position = added(step.position, turned(position, step.orientation))
        orientation = multiplied(step.orientation, orientation)
    return Transform(stamp_ns, position, orientation)


def _between(a: Quaternion, b: Quaternion, share: float) -> Quaternion:
    """Part of the shorter turn from one orientation to the other."""
    x, y, z, w = multiplied(b, (-a[0], -a[1], -a[2], a[3]))
    sine = math.copysign(math.hypot(x, y, z), w)  # of half the turn, w negated where that is longer
    if sine == 0.0:
        return a
    half = math.atan2(abs(sine), abs(w))
    return multiplied(turn_quaternion(scaled((x, y, z), 2.0 * share * half / sine)), a)
