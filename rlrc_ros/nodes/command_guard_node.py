"""The only node that commands the arm: limits, watchdog and latched stop at a fixed rate.

    ros2 run rlrc command_guard_node --ros-args -p max_linear_speed:=0.1 \
        -p workspace_min:="[0.3, -0.3, 0.02]" -p workspace_max:="[0.7, 0.3, 0.5]"

The decisions are in `rlrc_ros.guard`; this file turns messages into its inputs and its outputs into
messages. A timer on the steady clock publishes, never a callback.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.duration import Duration
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import LivelinessPolicy, QoSProfile
from rlrc.msg import GuardStatus, PolicyCommand
from std_msgs.msg import Bool
from std_srvs.srv import Trigger

from rlrc_ros.errors import UserError
from rlrc_ros.guard import HOLDING, STOPPED, WAITING, Command, Guard, Output, Pose
from rlrc_ros.limits import Limits
from rlrc_ros.messages.stamps import to_nanoseconds
from rlrc_ros.motion import Vector
from rlrc_ros.nodes import common
from rlrc_ros.nodes.gripper import gripper
from rlrc_ros.pose_target import PoseTarget

if TYPE_CHECKING:
    from rclpy.event_handler import QoSLivelinessChangedInfo
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

        self._gripper = gripper(self)
        self._target = PoseTarget(limits) if limits.pose_output else None
        self._command_publisher = self.create_publisher(
            PoseStamped if limits.pose_output else TwistStamped, "ee_command", common.COMMAND_QOS
        )
        self._status_publisher = self.create_publisher(GuardStatus, "~/status", 10)
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)

        # Deeper than the latest one: a second publisher must not push out, unseen and uncounted,
        # what the first one commands.
        qos = QoSProfile(
            depth=10,
            liveliness=LivelinessPolicy.AUTOMATIC,
            liveliness_lease_duration=Duration(seconds=limits.policy_lease),
        )
        events = SubscriptionEventCallbacks(liveliness=self._on_liveliness)
        self.create_subscription(
            PolicyCommand, "policy_command", self._on_command, qos, event_callbacks=events
        )
        self.create_subscription(PoseStamped, "ee_pose", self._on_pose, common.SENSOR_QOS)
        self.create_subscription(Bool, "emergency_stop", self._on_emergency_stop, 10)
        self.create_service(Trigger, "~/stop", self._on_stop)
        self.create_service(Trigger, "~/emergency_stop", self._on_emergency_stop_asked)
        self.create_service(Trigger, "~/release", self._on_release)

        self.create_timer(self._period, self._tick, clock=common.STEADY_CLOCK)
        self.create_timer(0.1, self._publish_status, clock=common.STEADY_CLOCK)
        self.create_timer(1.0, self._publish_diagnostics, clock=common.STEADY_CLOCK)
        priority = common.integer(
            self, "realtime_priority", 10, "of SCHED_FIFO, where that is allowed; 0: none", 0, 98
        )
        refusal = common.run_ahead(priority) if priority else "realtime_priority is 0"
        self._scheduling = refusal or f"SCHED_FIFO, priority {priority}"
        self.get_logger().info(f"{'dry run, ' if self._dry_run else ''}{limits}")
        if refusal:
            self.get_logger().info(f"runs as other processes do ({refusal}): late where they work")

    def leave_standing(self) -> None:
        """Brake, and let a stop be the last that is published."""
        if self._guard.state != WAITING:
            self._guard.stop("the guard is shutting down")
            self._tick()
            deadline = time.monotonic() + BRAKING_TIME
            while self._guard.moving and time.monotonic() < deadline:
                time.sleep(self._period)
                self._tick()
            self._guard.emergency_stop()
            self._tick()
            self._publish_status()
            self._command_publisher.wait_for_all_acked(Duration(seconds=0.2))

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
                observation_age=self._age(message.observation_stamp),
                period=message.period,
            ),
        )
        if rejection:
            self.get_logger().warning(f"dropped: {rejection}", throttle_duration_sec=5.0)

    def _on_liveliness(self, change: QoSLivelinessChangedInfo) -> None:
        # Not by the counts of who is alive: those that are dead stay in them for many seconds.
        if change.not_alive_count_change > 0:
            self._guard.hear(False)
        elif change.not_alive_count_change < 0 and change.alive_count_change > 0:
            self._guard.hear(True)

    def _on_pose(self, message: PoseStamped) -> None:
        header, q = message.header, message.pose.orientation
        pose = Pose(
            _vector(message.pose.position),
            self._age(header.stamp),
            header.frame_id,
            (q.x, q.y, q.z, q.w),
        )
        self._guard.observe(time.monotonic(), pose)

    def _on_emergency_stop(self, message: Bool) -> None:
        self._guard.press(message.data)
        self._tick()

    def _on_emergency_stop_asked(
        self, _: Trigger.Request, response: Trigger.Response
    ) -> Trigger.Response:
        self._guard.emergency_stop()
        self._tick()
        response.success, response.message = True, "stopped until ~/release is called"
        return response

    def _on_stop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._guard.stop("stop asked for")
        response.success, response.message = True, "stopped until ~/release is called"
        return response

    def _on_release(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        refusal = self._guard.release(time.monotonic())
        response.success, response.message = not refusal, refusal or "released"
        return response

    def _tick(self) -> None:
        now = time.monotonic()
        output = self._guard.step(now)
        if output is not None:
            self._publish(now, output)
        else:
            self._gripper.pause()
            if self._target is not None:
                self._target.pause()
        if self._guard.state != self._reported:
            self._report()

    def _publish(self, now: float, output: Output) -> None:
        command = self._twist(output) if self._target is None else self._pose(now, output)
        if self._dry_run or command is None:
            return
        if time.monotonic() - now > self._guard.limits.controller_timeout:
            return  # held up since it was decided: the arm stands, and the next step begins there
        command.header.stamp = self.get_clock().now().to_msg()
        command.header.frame_id = self._guard.limits.base_frame
        self._command_publisher.publish(command)
        self._gripper.command(output.gripper)

    def _twist(self, output: Output) -> TwistStamped:
        message = TwistStamped()
        linear, angular = message.twist.linear, message.twist.angular
        linear.x, linear.y, linear.z = output.linear
        angular.x, angular.y, angular.z = output.angular
        return message

    def _pose(self, now: float, output: Output) -> PoseStamped | None:
        assert self._target is not None
        target = self._target.advance(now, output, self._guard.pose(now))
        if target is None:
            return None
        message = PoseStamped()
        position, q = message.pose.position, message.pose.orientation
        (position.x, position.y, position.z), (q.x, q.y, q.z, q.w) = target
        return message

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
        self._publish_diagnostics()

    def _publish_status(self) -> None:
        guard = self._guard
        status = GuardStatus(state=guard.state, reason=guard.reason, **asdict(guard.counts))
        status.policy_label, status.episode_id = guard.holder
        status.dry_run = self._dry_run
        status.header.stamp = self.get_clock().now().to_msg()
        self._status_publisher.publish(status)

    def _publish_diagnostics(self) -> None:
        guard = self._guard
        level = {HOLDING: DiagnosticStatus.WARN, STOPPED: DiagnosticStatus.ERROR}.get(
            guard.state, DiagnosticStatus.OK
        )
        message = f"{guard.state}{': ' + guard.reason if guard.reason else ''}"
        values: dict[str, object] = {"dry run": self._dry_run, "scheduling": self._scheduling}
        values |= asdict(guard.counts)
        if self._target is not None:
            values["target waited"] = self._target.waited
        self._diagnostics_publisher.publish(common.diagnostics(self, level, message, values))

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

    output = common.text(node, "output", "twist", "what the controller takes: twist or pose")
    if output not in ("twist", "pose"):
        raise UserError(f"parameter output: '{output}' is neither twist nor pose")
    return Limits(
        pose_output=output == "pose",
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
        max_linear_jerk=number("max_linear_jerk", "m/s³, of the vector", 0.1, 1e5),
        max_angular_jerk=number("max_angular_jerk", "rad/s³, of the vector", 0.1, 1e5),
        cone_axis=corner("cone_axis", "what ee_pose's z axis keeps to, x, y, z; empty: down")
        or default.cone_axis,
        max_tilt=number("max_tilt", "greatest angle from cone_axis, rad; π: any", 0.01, math.pi),
        pose_timeout=number("pose_timeout", "oldest ee_pose that will do, s", 0.01, 2.0),
        command_timeout=number("command_timeout", "silence before the arm is braked, s", 0.02, 2.0),
        policy_lease=number(
            "policy_lease", "s without a policy's sign of life before the arm is braked", 0.015, 2.0
        ),
        max_command_age=number("max_command_age", "oldest command by its stamp, s", 0.01, 2.0),
        max_observation_age=number(
            "max_observation_age", "oldest sensor stamp that a command may come from, s", 0.01, 10.0
        ),
        controller_timeout=number(
            "controller_timeout", "silence before the controller stops by itself, s", 0.02, 10.0
        ),
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
