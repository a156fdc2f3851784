"""End-effector commands: actions of a policy to twists, and messages to arrays and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlrc_ros.errors import UserError
from rlrc_ros.messages.stamps import to_nanoseconds, to_stamp

if TYPE_CHECKING:
    from geometry_msgs.msg import Twist, TwistStamped
    from rlrc.msg import PolicyCommand


class CommandArrays(NamedTuple):
    """What a PolicyCommand commands."""

    twist: np.ndarray
    """(6,) float64: linear m/s, then angular rad/s."""
    gripper: float
    """0 closed, 1 open."""


def action_to_twist(action: np.ndarray, rate: float) -> tuple[np.ndarray, float]:
    """The velocity that makes one control step's displacement, and the gripper's opening.

    Args:
        action: (7,): displacement in m and rotation vector in rad, both of one control step;
            gripper in [0, 1], 1 open.
        rate: Control rate in Hz.

    Returns:
        (6,) float64 in m/s and rad/s, in the frame of the action, and the gripper as it came.
    """
    if np.shape(action) != (7,):
        raise UserError(
            f"an action has 7 numbers (3 m, 3 rad, gripper), got shape {np.shape(action)}"
        )
    return np.asarray(action[:6], np.float64) * rate, float(action[6])


def twist_to_action(twist: np.ndarray, gripper: float, rate: float) -> np.ndarray:
    """The action (7,) that `action_to_twist` turns into this twist and gripper."""
    return np.append(np.asarray(twist, np.float64) / rate, gripper)


def policy_command(
    twist: np.ndarray,
    gripper: float,
    *,
    stamp: Any,
    observation_stamp: Any,
    frame_id: str,
    policy_label: str,
    episode_id: str,
    step: int,
    period: float = 0.0,
    observed: Mapping[str, int] | None = None,
) -> PolicyCommand:
    """A command for the guard.

    Args:
        twist: (6,) linear m/s then angular rad/s, in `frame_id`.
        gripper: 0 closed, 1 open.
        stamp: When the command is issued; the guard drops it once it is too old.
        observation_stamp: The oldest sensor stamp it was computed from.
        frame_id: The robot's base frame.
        policy_label: The label the policy runs under.
        episode_id: The episode it belongs to.
        step: Control step within the episode, from 0.
        period: Seconds until the next command is due; 0 where that is unknown.
        observed: Header stamps, in ns, of what it was computed from, by source: `Snapshot.stamps`;
            none where no new look was taken.
    """
    from rlrc.msg import PolicyCommand

    message = PolicyCommand(
        observation_stamp=observation_stamp,
        twist=_twist(twist),
        gripper=float(gripper),
        policy_label=policy_label,
        episode_id=episode_id,
        step=step,
        period=float(period),
        observed_sources=list(observed or ()),
        observed_stamps=[to_stamp(stamp) for stamp in (observed or {}).values()],
    )
    message.header.stamp = stamp
    message.header.frame_id = frame_id
    return message


def command_arrays(message: Any) -> CommandArrays:
    """The numbers of a PolicyCommand, live or from a bag."""
    return CommandArrays(twist_array(message.twist), float(message.gripper))


def observed_stamps(message: Any) -> dict[str, int]:
    """What a PolicyCommand was computed from: header stamps in ns by source; may be empty.

    Bags that were recorded before commands said it have none either.
    """
    sources = getattr(message, "observed_sources", ())
    stamps = map(to_nanoseconds, getattr(message, "observed_stamps", ()))
    return dict(zip(sources, stamps, strict=False))


def twist_stamped(twist: Sequence[float] | np.ndarray, stamp: Any, frame_id: str) -> TwistStamped:
    """A geometry_msgs/TwistStamped of (6,): linear m/s, then angular rad/s, in `frame_id`."""
    from geometry_msgs.msg import TwistStamped

    message = TwistStamped(twist=_twist(twist))
    message.header.stamp = stamp
    message.header.frame_id = frame_id
    return message


def twist_array(twist: Any) -> np.ndarray:
    """The (6,) float64 of a geometry_msgs/Twist: linear m/s, then angular rad/s."""
    linear, angular = twist.linear, twist.angular
    return np.array([linear.x, linear.y, linear.z, angular.x, angular.y, angular.z], np.float64)


def _twist(values: Sequence[float] | np.ndarray) -> Twist:
    from geometry_msgs.msg import Twist, Vector3

    x, y, z, roll, pitch, yaw = (float(value) for value in values)
    return Twist(linear=Vector3(x=x, y=y, z=z), angular=Vector3(x=roll, y=pitch, z=yaw))
