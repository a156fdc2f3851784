"""The only node that commands the arm: limits, watchdog and latched stop at a fixed rate.

    ros2 run rlrc command_guard_node --ros-args -p max_linear_speed:=0.1 \
        -p workspace_min:="[0.3, -0.3, 0.02]" -p workspace_max:="[0.7, 0.3, 0.5]"

The decisions are in `rlrc_ros.guard`; this file turns messages into its inputs and its outputs into
messages. A timer on the steady clock publishes, never a callback.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.duration import Duration
from rclpy.node import Node
from rlrc.msg import GuardStatus, PolicyCommand
from std_msgs.msg import Bool, Float64MultiArray
from std_srvs.srv import Trigger

from rlrc_ros.errors import UserError
from rlrc_ros.guard import (
    HOLDING,
    STOPPED,
    WAITING,
    Command,
    Guard,
    Limits,
    Output,
    Pose,
    Vector,
)
from rlrc_ros.messages.stamps import to_nanoseconds
from rlrc_ros.nodes import common

if TYPE_CHECKING:
    from rclpy.subscription import MessageInfo

BRAKING_TIME = 1.0
"""How long the node may go on braking after SIGTERM before it sends zero, in s."""


class CommandGuardNode(Node):
    """Policy commands in, limited commands out."""

    def __init__(self) -> None:
        super().__init__("command_guard")
        limits = _limits(self)
        self._dry_run = common.flag(
            self, "dry_run", False, "publish nothing to the controllers; everything else as usual"
        )
        self._guard = Guard(limits)
        self._period = 1.0 / limits.rate
        self._reported = WAITING

        self._twist = TwistStamped()
        self._twist.header.frame_id = limits.base_frame
        self._twist_publisher = self.create_publisher(
            TwistStamped, "ee_command", common.COMMAND_QOS
        )
        self._gripper_publisher = self.create_publisher(
            Float64MultiArray, "gripper_command", common.COMMAND_QOS
        )
        self._status_publisher = self.create_publisher(GuardStatus, "~/status", 10)
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)

        # Deeper than the latest one: a second publisher must not push out, unseen and uncounted,
        # what the first one commands.
        self.create_subscription(PolicyCommand, "policy_command", self._on_command, 10)
        self.create_subscription(PoseStamped, "ee_pose", self._on_pose, common.SENSOR_QOS)
        self.create_subscription(Bool, "emergency_stop", self._on_emergency_stop, 10)
        self.create_service(Trigger, "~/stop", self._on_stop)
        self.create_service(Trigger, "~/release", self._on_release)

        self.create_timer(self._period, self._tick, clock=common.STEADY_CLOCK)
        self.create_timer(0.1, self._publish_status, clock=common.STEADY_CLOCK)
        self.create_timer(1.0, self._publish_diagnostics, clock=common.STEADY_CLOCK)
        self.get_logger().info(f"{'dry run, ' if self._dry_run else ''}{limits}")

    def leave_standing(self) -> None:
        """Brake, and let a stop be the last that is published."""
        if self._guard.state != WAITING:
            self._guard.stop("the guard is shutting down")
            self._tick()
            deadline = time.monotonic() + BRAKING_TIME
            while self._guard.moving and time.monotonic() < deadline:
                time.sleep(self._period)
                self._tick()
            self._guard.emergency_stop(True)
            self._tick()
            self._publish_status()
            self._twist_publisher.wait_for_all_acked(Duration(seconds=0.2))

    def _on_command(self, message: PolicyCommand, info: MessageInfo) -> None:
        # Jazzy's rclpy does not tell publishers apart; label and episode have to do there.
        publisher = info.get("publisher_gid")
        rejection = self._guard.submit(
            time.monotonic(),
            Command(
                linear=_vector(message.twist.linear),
                angular=_vector(message.twist.angular),
                gripper=message.gripper,
                age=self._age(message.header.stamp),
                frame_id=message.header.frame_id,
                policy_label=message.policy_label,
                episode_id=message.episode_id,
                publisher=publisher["data"].hex() if publisher else "",
            ),
        )
        if rejection:
            self.get_logger().warning(f"dropped: {rejection}", throttle_duration_sec=5.0)

    def _on_pose(self, message: PoseStamped) -> None:
        header = message.header
        pose = Pose(_vector(message.pose.position), self._age(header.stamp), header.frame_id)
        self._guard.observe(time.monotonic(), pose)

    def _on_emergency_stop(self, message: Bool) -> None:
        self._guard.emergency_stop(message.data)

    def _on_stop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._guard.stop("stop asked for")
        response.success, response.message = True, "stopped until ~/release is called"
        return response

    def _on_release(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        refusal = self._guard.release(time.monotonic())
        response.success, response.message = not refusal, refusal or "released"
        return response

    def _tick(self) -> None:
        output = self._guard.step(time.monotonic())
        if output is not None and not self._dry_run:
            self._publish(output)
        if self._guard.state != self._reported:
            self._report()

    def _publish(self, output: Output) -> None:
        twist = self._twist.twist
        twist.linear.x, twist.linear.y, twist.linear.z = output.linear
        twist.angular.x, twist.angular.y, twist.angular.z = output.angular
        self._twist.header.stamp = self.get_clock().now().to_msg()
        self._twist_publisher.publish(self._twist)
        self._gripper_publisher.publish(Float64MultiArray(data=[output.gripper]))

    def _report(self) -> None:
        """Say once that the state has changed."""
        state, reason = self._guard.state, self._guard.reason
        line = f"{self._reported} → {state}{': ' + reason if reason else ''}"
        if state in (HOLDING, STOPPED):
            self.get_logger().warning(line)
        else:
            self.get_logger().info(line)
        self._reported = state
        self._publish_status()

    def _publish_status(self) -> None:
        guard = self._guard
        status = GuardStatus(state=guard.state, reason=guard.reason, **asdict(guard.counts))
        status.header.stamp = self.get_clock().now().to_msg()
        self._status_publisher.publish(status)

    def _publish_diagnostics(self) -> None:
        guard = self._guard
        level = {HOLDING: DiagnosticStatus.WARN, STOPPED: DiagnosticStatus.ERROR}.get(
            guard.state, DiagnosticStatus.OK
        )
        message = f"{guard.state}{': ' + guard.reason if guard.reason else ''}"
        self._diagnostics_publisher.publish(
            common.diagnostics(self, level, message, asdict(guard.counts))
        )

    def _age(self, stamp: Any) -> float:
        return (self.get_clock().now().nanoseconds - to_nanoseconds(stamp)) * 1e-9


def _limits(node: Node) -> Limits:
    """The node's parameters; raises UserError where one makes no sense."""
    default = Limits()

    def number(name: str, description: str, low: float, high: float) -> float:
        return common.number(node, name, getattr(default, name), description, low, high)

    def corner(name: str, description: str) -> Vector | None:
        values = common.numbers(node, name, description)
        if len(values) not in (0, 3):
            raise UserError(f"parameter {name}: wanted 3 numbers, x, y and z, got {values}")
        return (values[0], values[1], values[2]) if values else None

    return Limits(
        rate=number("rate", "commands to the controller, Hz", 10.0, 1000.0),
        base_frame=common.text(
            node, "base_frame", default.base_frame, "the frame of commands, poses and workspace"
        ),
        max_linear_speed=number("max_linear_speed", "m/s, of the vector", 0.001, 5.0),
        max_angular_speed=number("max_angular_speed", "rad/s, of the vector", 0.001, 10.0),
        max_linear_acceleration=number(
            "max_linear_acceleration", "m/s², of the vector, braking too", 0.01, 50.0
        ),
        max_angular_acceleration=number(
            "max_angular_acceleration", "rad/s², of the vector, braking too", 0.01, 200.0
        ),
        workspace_min=corner("workspace_min", "lower corner x, y, z in m; empty: no workspace"),
        workspace_max=corner("workspace_max", "upper corner x, y, z in m; empty: no workspace"),
        pose_timeout=number("pose_timeout", "oldest ee_pose that will do, s", 0.01, 2.0),
        command_timeout=number("command_timeout", "silence before the arm is braked, s", 0.02, 2.0),
        max_command_age=number("max_command_age", "oldest command by its stamp, s", 0.01, 2.0),
        max_gripper_rate=number("max_gripper_rate", "full openings a second, 1/s", 0.01, 100.0),
        labels=tuple(common.texts(node, "labels", "policy labels that may command; empty: any")),
    )


def _vector(message: Any) -> Vector:
    return message.x, message.y, message.z


def main() -> int:
    """Run the node."""
    return common.run(CommandGuardNode, CommandGuardNode.leave_standing)


if __name__ == "__main__":
    sys.exit(main())
