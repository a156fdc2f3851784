import math
import signal
import statistics
import time

import pytest
from geometry_msgs.msg import PoseStamped, TwistStamped
from rlrc.msg import GuardStatus, PolicyCommand
from std_msgs.msg import Bool, Float64MultiArray
from std_srvs.srv import Trigger

from rlrc_ros.messages.command import policy_command, twist_array
from rlrc_ros.nodes.common import COMMAND_QOS, SENSOR_QOS

PERIOD = 0.01
# Braked within one period, so that when it stops is when it decided to.
ABRUPT = {"max_linear_acceleration": 50.0, "max_angular_acceleration": 200.0}


class Arm:
    """The policy's end and the controller's end of a running guard."""

    def __init__(self, ros, start, **parameters):
        self.ros = ros
        self.guard = start("command_guard_node", parameters)
        self.twists = ros.collect(TwistStamped, "ee_command", COMMAND_QOS)
        self.grippers = ros.collect(Float64MultiArray, "gripper_command", COMMAND_QOS)
        self.states = ros.collect(GuardStatus, "command_guard/status")
        self.publisher = ros.publisher(PolicyCommand, "policy_command", COMMAND_QOS)
        ros.published("ee_command")
        assert ros.until(lambda: self.states)

    def send(self, x=0.1, label="A", episode="e1", frame="base_link", age=0.0, gripper=0.5):
        clock = self.ros.node.get_clock()
        now = clock.now()
        stamp = type(now)(nanoseconds=now.nanoseconds - round(age * 1e9)).to_msg()
        self.publisher.publish(
            policy_command(
                [x, 0.0, 0.0, 0.0, 0.0, 0.0],
                gripper,
                stamp=stamp,
                observation_stamp=stamp,
                frame_id=frame,
                policy_label=label,
                episode_id=episode,
                step=0,
            )
        )

    def drive(self, seconds, every=None, **command):
        """Send the command at 20 Hz, and `every` time do something else too."""
        for _ in range(round(seconds / 0.05)):
            self.send(**command)
            if every is not None:
                every()
            self.ros.spin(0.05)

    def drive_until(self, condition, every=None, **command):
        """Send the command at 20 Hz until the condition holds; whether it came to hold."""
        deadline = time.monotonic() + 10.0
        while not (held := condition()) and time.monotonic() < deadline:
            self.drive(0.05, every=every, **command)
        return held

    @property
    def speed(self):
        """x of the last twist, in m/s."""
        return self.twists[-1][1].twist.linear.x

    @property
    def status(self):
        return self.states[-1][1]

    def reaches(self, state):
        return self.ros.until(lambda: self.status.state == state, 5.0)


def test_commands_arrive_at_the_guards_rate_and_silence_stops_the_arm(ros, start):
    arm = Arm(ros, start, **ABRUPT)
    ros.spin(0.3)
    assert not arm.twists and not arm.grippers and arm.status.state == "waiting"
    arm.drive(1.0, x=0.1, gripper=0.25)
    assert arm.speed == pytest.approx(0.1)
    assert arm.twists[-1][1].header.frame_id == "base_link"
    assert arm.grippers[-1][1].data[0] == 0.25
    intervals = [b[0] - a[0] for a, b in zip(arm.twists, arm.twists[1:], strict=False)]
    assert statistics.median(intervals) == pytest.approx(PERIOD, rel=0.2)
    assert arm.status.state == "active" and arm.status.accepted >= 18

    arm.send(x=0.1)
    arm.twists.clear()
    ros.spin(1.5)
    moving = [t for t, m in arm.twists if m.twist.linear.x != 0.0]
    still = [t for t, m in arm.twists if m.twist.linear.x == 0.0]
    # Two of the guard's periods and 20 ms after the timeout, and as much again for a busy machine.
    assert 0.15 <= still[0] - moving[0] <= 0.2 + 2 * (2 * PERIOD + 0.02)
    assert 0.4 < still[-1] - still[0] < 0.7
    assert arm.status.state == "waiting" and arm.status.stops_on_silence == 1


def test_bad_commands_are_dropped_and_counted(ros, start):
    arm = Arm(ros, start, labels="[A]")
    for bad in (
        {"x": math.nan},
        {"label": ""},
        {"label": "B"},
        {"episode": ""},
        {"frame": "camera"},
        {"age": 1.0},
        {"age": -1.0},
    ):
        arm.send(**bad)
        ros.spin(0.05)
    assert ros.until(lambda: arm.status.rejected_stale == 2)
    assert arm.status.rejected_not_finite == 1 and arm.status.rejected_frame == 1
    assert arm.status.rejected_source == 3 and arm.status.accepted == 0
    assert not arm.twists and not arm.grippers


def test_a_second_publisher_cannot_take_the_arm(ros, start):
    arm = Arm(ros, start)
    first, second = arm.publisher, ros.publisher(PolicyCommand, "policy_command", COMMAND_QOS)
    ros.spin(0.3)

    def intrude():
        arm.publisher = second
        arm.send(x=-0.2)
        arm.publisher = first

    arm.drive(0.3, x=0.1)
    arm.drive(0.5, every=intrude, x=0.1)
    assert all(m.twist.linear.x >= 0.0 for _, m in arm.twists) and arm.speed > 0.0
    assert ros.until(lambda: arm.status.rejected_source >= 8)


def test_sigterm_brakes_and_leaves_a_stop_as_the_last_command(ros, start):
    arm = Arm(ros, start, max_linear_acceleration=1.0)
    arm.drive(0.8, x=0.2)
    assert arm.speed == pytest.approx(0.2)
    arm.twists.clear()
    arm.guard.send(signal.SIGTERM)
    assert ros.until(lambda: arm.guard.popen.poll() is not None)
    ros.spin(0.3)
    speeds = [m.twist.linear.x for _, m in arm.twists]
    assert arm.guard.popen.returncode == 0
    assert speeds[-1] == 0.0 and len(set(speeds)) > 5, "braked, not cut off"
    assert arm.status.state == "stopped"


def test_sigint_of_an_arm_that_never_moved_publishes_nothing(ros, start):
    arm = Arm(ros, start)
    assert arm.guard.stop() == 0
    ros.spin(0.2)
    assert not arm.twists


def test_an_emergency_stop_latches_until_released(ros, start):
    # So late that a busy machine, where commands do not come in time, is not what stops the arm.
    arm = Arm(ros, start, command_timeout=2.0, max_command_age=2.0)
    button = ros.publisher(Bool, "emergency_stop")
    refused = ros.call(Trigger, "command_guard/release")
    assert not refused.success and refused.message == "nothing is stopped"
    assert arm.drive_until(lambda: arm.twists and arm.speed > 0.15, x=0.2)
    arm.twists.clear()
    button.publish(Bool(data=True))
    assert arm.reaches("stopped") and arm.status.reason == "emergency stop"
    steps = [twist_array(m.twist)[0] for _, m in arm.twists]
    assert min((step for step in steps if step), default=1.0) > 0.15, "zero at once, no ramp"
    assert steps[-1] == 0.0
    button.publish(Bool(data=False))
    arm.drive(0.3, x=0.2)
    assert arm.status.state == "stopped" and arm.speed == 0.0
    refused = ros.call(Trigger, "command_guard/release")
    assert not refused.success and "still coming in" in refused.message
    ros.spin(2.2)
    assert ros.call(Trigger, "command_guard/release").success
    assert arm.reaches("waiting")
    assert arm.drive_until(lambda: arm.speed > 0.0, x=0.2)
    assert arm.status.rejected_stopped >= 4


def test_the_stop_service_stops_until_released(ros, start):
    arm = Arm(ros, start)
    arm.drive(0.3)
    assert ros.call(Trigger, "command_guard/stop").success
    arm.drive(0.5)
    assert arm.speed == 0.0 and arm.status.state == "stopped"
    assert arm.status.reason == "stop asked for"


def test_the_arm_is_kept_in_its_workspace(ros, start):
    arm = Arm(ros, start, workspace_min="[-1.0, -1.0, 0.0]", workspace_max="[1.0, 1.0, 1.0]")
    poses = ros.publisher(PoseStamped, "ee_pose", SENSOR_QOS)

    def at(x):
        message = PoseStamped()
        message.header.stamp = ros.node.get_clock().now().to_msg()
        message.header.frame_id = "base_link"
        message.pose.position.x, message.pose.position.z = x, 0.5
        poses.publish(message)

    arm.drive(0.3)
    assert not arm.twists, "moved without knowing where it is"
    assert arm.drive_until(lambda: arm.twists and arm.speed > 0.19, lambda: at(0.0), x=0.2)
    assert arm.drive_until(lambda: arm.speed == 0.0, lambda: at(1.1), x=0.2)
    arm.drive(0.3, every=lambda: at(1.1), x=0.2)
    assert arm.speed == 0.0 and arm.status.limited_workspace > 0
    assert arm.drive_until(lambda: arm.speed < -0.19, lambda: at(1.1), x=-0.2)
    arm.drive(0.5, x=-0.2)
    assert arm.speed == 0.0 and "ee_pose" in arm.status.reason


def test_a_dry_run_commands_nothing(ros, start):
    arm = Arm(ros, start, dry_run="true")
    arm.drive(0.5)
    assert arm.status.state == "active" and not arm.twists and not arm.grippers


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_linear_speed", "-1.0", "max_linear_speed (m/s, of the vector) must be a number"),
        ("rate", "100", "rate (commands to the controller, Hz) must be a number"),
        ("workspace_min", "[0.0, 0.0, 0.0]", "workspace_min and workspace_max belong together"),
    ],
)
def test_a_nonsense_parameter_is_refused_in_one_line(start, name, value, words):
    guard = start("command_guard_node", {name: value})
    assert guard.wait() == 2
    assert words in guard.output and len(guard.output.splitlines()) == 1


def test_state_changes_are_logged_once(ros, start):
    arm = Arm(ros, start)
    arm.drive(0.5)
    assert arm.reaches("waiting")
    ros.spin(0.3)
    lines = [line for line in arm.guard.output.splitlines() if "→" in line]
    assert [line.split("]: ")[1] for line in lines] == [
        "waiting → active",
        "active → holding: no command for 0.2 s",
        "holding → waiting: no command for 0.2 s",
    ]
