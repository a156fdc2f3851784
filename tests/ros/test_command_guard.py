import importlib.util
import itertools
import math
import os
import signal
import statistics
import sys
import time
from pathlib import Path

import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from rcl_interfaces.srv import SetParameters
from rclpy.action.server import ActionServer, GoalResponse
from rlrc.msg import GuardStatus, PolicyCommand
from std_msgs.msg import Bool, Float64MultiArray
from std_srvs.srv import Trigger

from rlrc_ros.messages.command import policy_command, twist_array
from rlrc_ros.nodes.common import COMMAND_QOS, POLICY_QOS, SENSOR_QOS
from tests.ros.conftest import BIN

PERIOD = 0.01
# Braked within one period, so that when it stops is when it decided to.
ABRUPT = {"max_linear_acceleration": 50.0, "max_linear_jerk": 1e5}


class Arm:
    """The policy's end and the controller's end of a running guard."""

    def __init__(self, ros, start, environment=None, **parameters):
        self.ros = ros
        # On a busy machine this process may seem dead for some ms. What then: test_stack.
        parameters = {"policy_lease": 2.0} | parameters
        self.guard = start("command_guard_node", parameters, environment)
        kind = PoseStamped if parameters.get("output") == "pose" else TwistStamped
        self.twists = ros.collect(kind, "ee_command", COMMAND_QOS)
        self.grippers = ros.collect(Float64MultiArray, "gripper_command", COMMAND_QOS)
        self.states = ros.collect(GuardStatus, "command_guard/status")
        self.publisher = ros.publisher(PolicyCommand, "policy_command", POLICY_QOS)
        ros.published("ee_command")
        assert ros.until(lambda: self.states)
        self._poses = ros.node.create_publisher(PoseStamped, "ee_pose", SENSOR_QOS)

    def stamp(self, age=0.0):
        now = self.ros.node.get_clock().now()
        return type(now)(nanoseconds=now.nanoseconds - round(age * 1e9)).to_msg()

    def at(self, x, y=0.0, z=0.5):
        """Say where the arm is, its tool pointing down."""
        message = PoseStamped()
        message.header.stamp, message.header.frame_id = self.stamp(), "base_link"
        position, orientation = message.pose.position, message.pose.orientation
        position.x, position.y, position.z = float(x), float(y), float(z)
        orientation.x, orientation.w = 1.0, 0.0
        self._poses.publish(message)

    def send(
        self, x=0.1, label="A", episode="e1", frame="base_link", age=0.0, gripper=0.5, seen=0.0
    ):
        self.publisher.publish(
            policy_command(
                [x, 0.0, 0.0, 0.0, 0.0, 0.0],
                gripper,
                stamp=self.stamp(age),
                observation_stamp=self.stamp(seen),
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
        {"seen": 2.0},
    ):
        arm.send(**bad)
        ros.spin(0.05)
    assert ros.until(lambda: arm.status.rejected_stale == 3)
    assert arm.status.rejected_not_finite == 1 and arm.status.rejected_frame == 1
    assert arm.status.rejected_source == 3 and arm.status.accepted == 0
    assert not arm.twists and not arm.grippers


def test_a_second_publisher_cannot_take_the_arm(ros, start):
    arm = Arm(ros, start)
    first, second = arm.publisher, ros.publisher(PolicyCommand, "policy_command", POLICY_QOS)
    ros.spin(0.3)

    def intrude():
        arm.publisher = second
        arm.send(x=-0.2)
        arm.publisher = first

    arm.drive(0.3, x=0.1)
    arm.drive(0.5, every=intrude, x=0.1)
    assert all(m.twist.linear.x >= 0.0 for _, m in arm.twists) and arm.speed > 0.0
    assert ros.until(lambda: arm.status.rejected_source >= 8)


def test_a_publisher_that_promises_no_sign_of_life_is_not_heard(ros, start):
    arm = Arm(ros, start)
    arm.publisher = ros.node.create_publisher(PolicyCommand, "policy_command", COMMAND_QOS)
    said = "offering incompatible QoS. No messages will be received from it"
    assert ros.until(lambda: said in arm.guard.output)
    arm.drive(0.3)
    assert not arm.twists and arm.status.accepted == arm.status.rejected_source == 0


def test_sigterm_brakes_and_leaves_a_stop_as_the_last_command(ros, start):
    arm = Arm(ros, start, max_linear_acceleration=1.0)
    arm.drive(1.0, x=0.2)
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
    at = arm.at
    arm.drive(0.3)
    assert not arm.twists, "moved without knowing where it is"
    assert arm.drive_until(lambda: arm.twists and arm.speed > 0.19, lambda: at(0.0), x=0.2)
    assert arm.drive_until(lambda: arm.speed == 0.0, lambda: at(1.1), x=0.2)
    arm.drive(0.3, every=lambda: at(1.1), x=0.2)
    assert arm.speed == 0.0 and arm.status.limited_workspace > 0
    assert arm.drive_until(lambda: arm.speed < -0.19, lambda: at(1.1), x=-0.2)
    arm.drive(0.5, x=-0.2)
    assert arm.speed == 0.0 and "ee_pose" in arm.status.reason


def test_a_controller_of_poses_gets_poses_that_go_on_from_where_the_arm_is(ros, start):
    arm = Arm(
        ros,
        start,
        output="pose",
        workspace_min="[-1.0, -1.0, 0.0]",
        workspace_max="[1.0, 1.0, 1.0]",
        max_tilt=0.5,
    )
    arm.drive(0.3)
    assert not arm.twists, "moved without knowing where it is"
    arm.at(0.3)
    where = lambda: arm.twists[-1][1].pose  # noqa: E731
    follow = lambda: arm.at(where().position.x if arm.twists else 0.3)  # noqa: E731
    assert arm.drive_until(lambda: arm.twists and where().position.x > 0.36, follow, x=0.2)
    xs = [m.pose.position.x for _, m in arm.twists]
    assert 0.3 <= xs[0] < 0.31 and all(0.0 <= b - a < 0.0055 for a, b in itertools.pairwise(xs))
    assert where().position.z == 0.5 and where().orientation.x == pytest.approx(1.0)
    assert arm.twists[-1][1].header.frame_id == "base_link"
    stopped = ros.call(Trigger, "command_guard/emergency_stop")
    assert stopped.success and arm.reaches("stopped")
    here = where().position.x
    arm.drive(0.3, every=lambda: arm.at(here), x=0.2)
    assert where().position.x == here


def test_an_emergency_stop_may_be_asked_for_by_a_service(ros, start):
    arm = Arm(ros, start, command_timeout=2.0, max_command_age=2.0)
    assert arm.drive_until(lambda: arm.twists and arm.speed > 0.15, x=0.2)
    assert ros.call(Trigger, "command_guard/emergency_stop").success
    assert arm.reaches("stopped") and arm.status.reason == "emergency stop"
    assert arm.speed == 0.0
    ros.spin(2.2)
    assert ros.call(Trigger, "command_guard/release").success


def test_a_guard_that_was_frozen_goes_on_from_standstill(ros, start):
    arm = Arm(ros, start, max_linear_acceleration=0.5, command_timeout=1.0)
    assert arm.drive_until(lambda: arm.twists and arm.speed > 0.19, x=0.2)
    arm.guard.send(signal.SIGSTOP)
    ros.spin(0.7)
    arm.twists.clear()
    arm.guard.send(signal.SIGCONT)
    assert ros.until(lambda: len(arm.twists) > 5)
    # What the 0.06 s allow that count between two outputs.
    assert all(m.twist.linear.x < 0.04 for _, m in arm.twists[:2]), "0.2 m/s from standstill"
    assert ros.until(lambda: arm.status.stalls == 1)


def test_the_holder_of_the_arm_and_what_is_limited_are_told(ros, start):
    arm = Arm(ros, start)
    assert arm.drive_until(lambda: arm.status.state == "active", x=0.9)
    assert (arm.status.policy_label, arm.status.episode_id) == ("A", "e1")
    assert not arm.status.dry_run
    assert arm.status.limited_linear_speed and arm.status.limited_jerk
    assert arm.reaches("waiting") and arm.status.episode_id == ""


# Without the capability, and with no real-time priority allowed, as for an ordinary user.
UNPRIVILEGED = """
import ctypes, os, resource, sys
ctypes.CDLL(None).prctl(24, 23, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_SYS_NICE
resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("privileged", [True, False])
def test_it_runs_ahead_of_other_processes_where_it_may(ros, start, privileged):
    diagnostics = ros.collect(DiagnosticArray, "/diagnostics")
    command = BIN / "command_guard_node"
    guard = start([command] if privileged else [sys.executable, "-c", UNPRIVILEGED, command])
    assert ros.until(lambda: diagnostics)
    values = {v.key: v.value for v in diagnostics[-1][1].status[0].values}
    tasks = [int(task.name) for task in Path(f"/proc/{guard.pid}/task").iterdir()]
    policies = {os.sched_getscheduler(task) for task in tasks}
    if values["scheduling"] == "SCHED_FIFO, priority 10":
        assert privileged and policies == {os.SCHED_FIFO} and len(tasks) > 5
    else:
        assert policies == {os.SCHED_OTHER}
        assert "Operation not permitted" in values["scheduling"]
        assert "runs as other processes do ([Errno 1]" in guard.output
    assert guard.stop() == 0


def test_a_dry_run_commands_nothing(ros, start):
    arm = Arm(ros, start, dry_run="true")
    arm.drive(0.5)
    assert arm.status.state == "active" and not arm.twists and not arm.grippers
    assert arm.status.dry_run


def test_the_gripper_gets_its_own_unit(ros, start):
    arm = Arm(ros, start, gripper_command_closed=0.8, gripper_command_open=0.0)
    arm.drive(0.3, gripper=0.25)
    assert arm.grippers[-1][1].data[0] == pytest.approx(0.6)


def test_a_gripper_behind_an_action_gets_few_goals(ros, start):
    control_msgs = pytest.importorskip("control_msgs.action", reason="comes with apt's ROS 2")
    goals, answers = [], [GoalResponse.REJECT]

    def take(goal):
        goals.append((goal.command.position, goal.command.max_effort))
        return answers.pop() if answers else GoalResponse.ACCEPT

    def move(handle):
        handle.succeed()
        return control_msgs.GripperCommand.Result(reached_goal=True)

    ActionServer(ros.node, control_msgs.GripperCommand, "grip", move, goal_callback=take)
    unit = {"gripper_command_closed": 0.8, "gripper_command_open": 0.0, "gripper_max_effort": 9.0}
    arm = Arm(ros, start, gripper_action="grip", max_gripper_rate=4.0, **unit)
    arm.drive(1.0, gripper=0.25)
    assert goals == [(pytest.approx(0.6), 9.0)] * 2, "asked again, since it refused, and then not"
    arm.drive(1.0, gripper=1.0)
    positions = [position for position, _ in goals]
    assert positions == sorted(positions, reverse=True) and positions[-1] == pytest.approx(0.0)
    assert 3 <= len(goals) <= 6, "opening takes 0.2 s, and goals lie 0.1 s apart"
    assert arm.reaches("waiting")
    arm.drive(0.5, gripper=1.0)
    assert goals[-2:] == [(pytest.approx(0.0), 9.0)] * 2, "somebody may have closed it meanwhile"
    assert not arm.grippers


def test_a_gripper_whose_action_nobody_offers_is_told_and_the_arm_moves(ros, start):
    pytest.importorskip("control_msgs.action", reason="comes with apt's ROS 2")
    arm = Arm(ros, start, gripper_action="nowhere")
    assert arm.drive_until(lambda: "gripper: nobody offers its action" in arm.guard.output)
    assert arm.speed > 0.0


def test_an_action_without_its_messages_is_refused_in_one_line(start):
    if importlib.util.find_spec("control_msgs"):
        pytest.skip("they are installed")
    guard = start("command_guard_node", {"gripper_action": "grip"})
    assert guard.wait() == 2 and len(guard.output.splitlines()) == 1
    assert "sudo apt install ros-$ROS_DISTRO-control-msgs" in guard.output


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_linear_speed", "-1.0", "max_linear_speed (m/s, of the vector) must be a number"),
        ("rate", "100", "rate (commands to the controller, Hz) must be a number"),
        ("workspace_min", "[0.0, 0.0, 0.0]", "workspace_min and workspace_max belong together"),
        ("output", "joints", "parameter output: 'joints' is neither twist nor pose"),
        ("cone_axis", "[0.0, 0.0, 0.0]", "cone_axis is [0.0, 0.0, 0.0]: it must be a direction"),
    ],
)
def test_a_nonsense_parameter_is_refused_in_one_line(start, name, value, words):
    guard = start("command_guard_node", {name: value})
    assert guard.wait() == 2
    assert words in guard.output and len(guard.output.splitlines()) == 1


def test_parameters_cannot_be_changed_while_it_runs(ros, start):
    arm = Arm(ros, start)
    for value in (5.0, math.nan, -1.0, "fast"):
        parameter = rclpy.Parameter("max_linear_speed", value=value).to_parameter_msg()
        name = "command_guard/set_parameters"
        response = ros.call(SetParameters, name, parameters=[parameter])
        assert not response.results[0].successful and response.results[0].reason
    assert arm.drive_until(lambda: arm.twists and arm.speed > 0.24, x=2.0)
    assert max(m.twist.linear.x for _, m in arm.twists) <= 0.25


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
