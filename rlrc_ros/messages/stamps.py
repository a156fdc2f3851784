"""ROS stamps to numbers and back."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from builtin_interfaces.msg import Time


def to_nanoseconds(stamp: Any) -> int:
    """Nanoseconds since the epoch, exact."""
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def to_seconds(stamp: Any) -> float:
    """Seconds since the epoch; a float holds today's date to about 0.2 µs."""
    return stamp.sec + stamp.nanosec * 1e-9


def to_stamp(time: float) -> Time:
    """A builtin_interfaces/Time from an integer of nanoseconds or a float of seconds."""
    from builtin_interfaces.msg import Time

    nanoseconds = int(time) if isinstance(time, Integral) else round(time * 1e9)
    sec, nanosec = divmod(nanoseconds, 1_000_000_000)
    return Time(sec=sec, nanosec=nanosec)
