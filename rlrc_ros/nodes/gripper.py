"""What the command guard tells a gripper: a number on a topic, or goals of an action."""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

from rclpy.action.client import ActionClient
from rclpy.node import Node
from std_msgs.msg import Float64MultiArray

from rlrc_ros.errors import UserError
from rlrc_ros.nodes import common

_ANY = (-1000.0, 1000.0)

GOAL_INTERVAL = 0.1
"""s between two goals at least: drivers of grippers take each of them apart."""
SAME = 0.01
"""Of the way from closed to open; nearer to the last goal, and none is sent."""
ANSWER_TIME = 1.0
"""s for a driver to take a goal; then the next one is sent all the same."""


class Gripper(Protocol):
    """Told at the guard's rate."""

    def command(self, opening: float) -> None:
        """How far it is to be open: 0 closed, 1 open."""

    def pause(self) -> None:
        """Nobody has the arm: others may use the gripper."""


def gripper(node: Node) -> Gripper:
    """Declare the parameters of the gripper, and connect to it.

    Raises:
        UserError: one of them makes no sense, or control_msgs is wanted and not installed.
    """
    closed = common.number(
        node, "gripper_command_closed", 0.0, "what closes the gripper, in its own unit", *_ANY
    )
    opened = common.number(
        node, "gripper_command_open", 1.0, "what opens the gripper, in its own unit", *_ANY
    )
    action = common.text(
        node, "gripper_action", "", "control_msgs/action/GripperCommand; empty: gripper_command"
    )
    effort = common.number(
        node, "gripper_max_effort", 0.0, "of the action's goals, N or Nm", 0.0, _ANY[1]
    )
    return _Action(node, action, closed, opened, effort) if action else _Topic(node, closed, opened)


class _Topic:
    def __init__(self, node: Node, closed: float, opened: float) -> None:
        self._closed, self._opened = closed, opened
        self._publisher = node.create_publisher(
            Float64MultiArray, "gripper_command", common.COMMAND_QOS
        )

    def command(self, opening: float) -> None:
        position = self._closed + opening * (self._opened - self._closed)
        self._publisher.publish(Float64MultiArray(data=[position]))

    def pause(self) -> None:
        pass


class _Action:
    """A goal takes over from the one before; whether that is reached is not waited for."""

    def __init__(
        self, node: Node, name: str, closed: float, opened: float, max_effort: float
    ) -> None:
        try:
            from control_msgs.action import GripperCommand
        except ImportError:
            raise UserError(
                "parameter gripper_action: control_msgs is not installed; "
                "sudo apt install ros-$ROS_DISTRO-control-msgs"
            ) from None
        self._kind: Any = GripperCommand
        self._node, self._closed, self._opened = node, closed, opened
        self._max_effort = max_effort
        self._client: Any = ActionClient(node, GripperCommand, name)
        self._goal: float | None = None
        """The opening of the last goal; None: whatever comes next is sent."""
        self._sent_at = -math.inf
        self._answered = True

    def command(self, opening: float) -> None:
        now = time.monotonic()
        since = now - self._sent_at
        if since < GOAL_INTERVAL or not (self._answered or since > ANSWER_TIME):
            return
        if self._goal is not None and abs(opening - self._goal) < SAME:
            return
        if not self._client.server_is_ready():
            self._warn("nobody offers its action")
            return
        goal = self._kind.Goal()
        goal.command.position = self._closed + opening * (self._opened - self._closed)
        goal.command.max_effort = self._max_effort
        self._goal, self._sent_at, self._answered = opening, now, False
        self._client.send_goal_async(goal).add_done_callback(self._on_answer)

    def pause(self) -> None:
        self._goal = None

    def _on_answer(self, future: Any) -> None:
        self._answered = True
        if not future.result().accepted:
            self._goal = None
            self._warn("its driver refuses the goal")

    def _warn(self, problem: str) -> None:
        self._node.get_logger().warning(f"gripper: {problem}", throttle_duration_sec=5.0)
