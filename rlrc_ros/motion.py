"""Motion of an end effector in plain numbers: vectors, quaternions, limits on how they change.

Vectors are (x, y, z), quaternions (x, y, z, w) of unit length, both in the base frame.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import islice

Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]
Bounds = tuple[tuple[float, float], ...]
ZERO: Vector = (0.0, 0.0, 0.0)
UNBOUNDED: Bounds = ((-math.inf, math.inf),) * 3
AXIS_SHARE = 1.0 / math.sqrt(3.0)
"""What each of three axes may use of a limit on the length of their vector."""


def scaled(vector: Vector, factor: float) -> Vector:
    """The vector times a number."""
    return vector[0] * factor, vector[1] * factor, vector[2] * factor


def added(a: Vector, b: Vector) -> Vector:
    """The sum of two vectors."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def dot(a: Vector, b: Vector) -> float:
    """The scalar product."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: Vector, b: Vector) -> Vector:
    """The vector product."""
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def angle_between(a: Vector, b: Vector) -> float:
    """An angle in [0, π] rad; exact for small angles too."""
    return math.atan2(math.hypot(*cross(a, b)), dot(a, b))


def unit(vector: Vector) -> Vector:
    """Along a vector that is not zero, of length 1; of next to nothing too."""
    length = math.hypot(*vector)
    return vector[0] / length, vector[1] / length, vector[2] / length


def rotated(vector: Vector, turn: Vector) -> Vector:
    """The vector turned by a rotation vector in rad (Rodrigues' formula)."""
    angle = math.hypot(*turn)
    if angle == 0.0:
        return vector
    axis = unit(turn)
    cosine, sine = math.cos(angle), math.sin(angle)
    along = scaled(axis, dot(axis, vector) * (1.0 - cosine))
    return added(added(scaled(vector, cosine), scaled(cross(axis, vector), sine)), along)


def z_axis(quaternion: Quaternion) -> Vector:
    """The z axis of a frame with this orientation."""
    x, y, z, w = quaternion
    return 2.0 * (x * z + w * y), 2.0 * (y * z - w * x), 1.0 - 2.0 * (x * x + y * y)


def multiplied(a: Quaternion, b: Quaternion) -> Quaternion:
    """The rotation b, then the rotation a, of unit length."""
    ax, ay, az, aw = a
    bx, by, bz, bw = b
    x = aw * bx + ax * bw + ay * bz - az * by
    y = aw * by - ax * bz + ay * bw + az * bx
    z = aw * bz + ax * by - ay * bx + az * bw
    w = aw * bw - ax * bx - ay * by - az * bz
    length = math.hypot(x, y, z, w)
    return x / length, y / length, z / length, w / length


def turn_quaternion(turn: Vector) -> Quaternion:
    """The quaternion of a rotation vector in rad."""
    angle = math.hypot(*turn)
    if angle == 0.0:
        return 0.0, 0.0, 0.0, 1.0
    x, y, z = scaled(turn, math.sin(angle / 2.0) / angle)
    return x, y, z, math.cos(angle / 2.0)


def turned(vector: Vector, orientation: Quaternion) -> Vector:
    """A vector of the frame with this orientation, in the frame around it."""
    x, y, z, w = orientation
    axis = (x, y, z)
    twice = scaled(cross(axis, vector), 2.0)
    return added(vector, added(scaled(twice, w), cross(axis, twice)))


def turn_between(a: Quaternion, b: Quaternion) -> float:
    """The angle in [0, π] rad of the rotation from one orientation to the other."""
    conjugate = (-a[0], -a[1], -a[2], a[3])
    x, y, z, w = multiplied(b, conjugate)
    return 2.0 * math.atan2(math.hypot(x, y, z), abs(w))


def pose_problem(frame: str, position: Vector, orientation: Quaternion, base_frame: str) -> str:
    """Why a pose in a frame is of no use to who wants it in `base_frame`; empty where it is."""
    if frame != base_frame:
        return f"it is in frame '{frame}', base_frame is '{base_frame}'"
    if not is_rigid(position, orientation):
        return "it is not finite, or its orientation is no unit quaternion"
    return ""


def is_rigid(position: Vector, orientation: Quaternion) -> bool:
    """Whether both are finite, and the orientation of unit length within 1%."""
    return all(map(math.isfinite, position)) and abs(math.hypot(*orientation) - 1.0) < 0.01


def clamped(vector: Vector, bounds: Bounds) -> Vector:
    """The vector with each axis within its bounds."""
    x, y, z = (
        min(max(value, low), high) for value, (low, high) in zip(vector, bounds, strict=True)
    )
    return x, y, z


def toward(last: Vector, goal: Vector, bounds: Bounds, change: float) -> Vector:
    """From `last` towards `goal`, which is within `bounds`, by no more than `change` in length.

    What it takes to get back within the bounds comes first; the way to the goal gets what is left.
    """
    share = change * AXIS_SHARE
    must = [
        min(max(inside - value, -share), share)
        for value, inside in zip(last, clamped(last, bounds), strict=True)
    ]
    start = [value + step for value, step in zip(last, must, strict=True)]
    way = [to - value for value, to in zip(start, goal, strict=True)]
    # The greatest s in [0, 1] with |must + s·way| ≤ change.
    way2 = sum(w * w for w in way)
    along = sum(m * w for m, w in zip(must, way, strict=True))
    left = max(change * change - sum(m * m for m in must), 0.0)
    if way2 + 2.0 * along <= left:
        return goal
    s = (math.sqrt(along * along + way2 * left) - along) / way2
    x, y, z = (value + s * w for value, w in zip(start, way, strict=True))
    return x, y, z


class MovingAverage:
    """Limits jerk: the mean velocity over a window, of a velocity that changes linearly in between.

    Where the acceleration that goes in is at most a, what comes out has no more than that, and a
    jerk of at most 2a / window. A mean of velocities lies in whatever ball the velocities lie in,
    and an arm that follows it is always at a mean of the places where one would be that followed
    the velocities themselves: it stays in every convex region that that one stays in.

    Args:
        window: s; 0: what goes in comes out.
    """

    def __init__(self, window: float) -> None:
        self._window = window
        self._parts: deque[tuple[float, Vector, Vector]] = deque()
        self.last: Vector = ZERO
        """What went in last."""

    def reset(self) -> None:
        """From standstill."""
        self._parts.clear()
        self.last = ZERO

    @property
    def at_rest(self) -> bool:
        """Whether all of the window is zero."""
        return self.last == ZERO and all(begin == ZERO for _, begin, _ in self._parts)

    def add(self, dt: float, velocity: Vector) -> Vector:
        """Take in the velocity `dt` s after the last; returns the mean."""
        if self._window == 0.0:
            self.last = velocity
            return velocity
        if dt > 0.0:
            self._parts.append((dt, self.last, velocity))
            self.last = velocity
        covered = 0.0
        sums = [0.0, 0.0, 0.0]
        steady = True
        for length, begin, end in reversed(self._parts):
            left = self._window - covered
            if left <= 0.0:
                break
            if length > left:  # only its end is within the window
                begin, length = _between(end, begin, left / length), left
            for axis in range(3):
                sums[axis] += 0.5 * (begin[axis] + end[axis]) * length
            steady = steady and begin == end == self.last
            covered += length
        while covered >= self._window and sum(p[0] for p in islice(self._parts, 1, None)) > (
            self._window
        ):
            self._parts.popleft()
        if steady and (covered >= self._window or self.last == ZERO):
            return self.last
        return sums[0] / self._window, sums[1] / self._window, sums[2] / self._window

    def remaining(self) -> tuple[Vector, float]:
        """The way that is still to come when zero goes in from now on, and a bound on its length.

        m where m/s went in. The bound holds for directions that change on the way too.
        """
        way, bound, covered = ZERO, 0.0, 0.0
        for length, begin, end in reversed(self._parts):
            left = self._window - covered
            if left <= 0.0:
                break
            if length > left:
                begin, length = _between(end, begin, left / length), left
            # What came in u s ago comes out for (window - u) s more: 1 / window of it.
            late, early = left / self._window, (left - length) / self._window
            to_end, to_begin = length * (2 * late + early) / 6, length * (late + 2 * early) / 6
            way = added(way, added(scaled(end, to_end), scaled(begin, to_begin)))
            bound += math.hypot(*end) * to_end + math.hypot(*begin) * to_begin
            covered += length
        return way, bound


def _between(a: Vector, b: Vector, share: float) -> Vector:
    return added(a, scaled(added(b, scaled(a, -1.0)), share))
