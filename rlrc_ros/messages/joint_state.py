"""Joint states to vectors and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlrc_ros.errors import UserError

if TYPE_CHECKING:
    from sensor_msgs.msg import JointState


def ordered_positions(message: Any, names: Sequence[str]) -> np.ndarray:
    """Positions of the named joints in the order of `names`, (N,) float64, in rad or m.

    Joints are matched by name, whatever order the message has them in; those nobody asked for are
    ignored.

    Raises:
        UserError: A joint is missing, occurs twice or is not finite, or there are not as many
            positions as names.
    """
    came = list(message.name)
    if len(message.position) != len(came):
        raise UserError(
            f"joint state has {len(came)} names but {len(message.position)} positions: {came}"
        )
    if missing := [name for name in names if name not in came]:
        raise UserError(
            f"joint state lacks {', '.join(missing)}; it has {', '.join(came) or 'no joints'}"
        )
    if double := [name for name in names if came.count(name) > 1]:
        raise UserError(f"joint state names {', '.join(double)} more than once: {', '.join(came)}")
    positions = np.array([message.position[came.index(name)] for name in names], np.float64)
    if not np.isfinite(positions).all():
        bad = ", ".join(
            f"{name} {value}"
            for name, value in zip(names, positions, strict=True)
            if not np.isfinite(value)
        )
        raise UserError(f"joint state is not finite: {bad}")
    return positions


def joint_state(
    names: Sequence[str],
    positions: Sequence[float] | np.ndarray,
    velocities: Sequence[float] | np.ndarray,
    stamp: Any,
) -> JointState:
    """A sensor_msgs/JointState.

    Args:
        names: N joint names.
        positions: (N,), rad or m.
        velocities: (N,), rad/s or m/s, or empty where they are not known.
        stamp: builtin_interfaces/Time of the measurement.
    """
    from sensor_msgs.msg import JointState

    if len(positions) != len(names) or len(velocities) not in (0, len(names)):
        raise UserError(
            f"{len(names)} joints, {len(positions)} positions, {len(velocities)} velocities:"
            " the numbers differ"
        )
    message = JointState(
        name=list(names),
        position=[float(x) for x in positions],
        velocity=[float(x) for x in velocities],
    )
    message.header.stamp = stamp
    return message
