"""Faults of policy node and guard with a simulated arm between them, all of them real processes."""

import itertools
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.action.client import ActionClient
from rlrc.action import RunEpisode
from rlrc.msg import GuardStatus, PolicyStatus
from rlrc.srv import ResetScene
from std_srvs.srv import Trigger

from rlrc_ros import bringup
from rlrc_ros.messages.command import twist_array
from rlrc_ros.nodes.common import COMMAND_QOS, SENSOR_QOS
from rlrc_ros.profile import load_profile
from tests.ros.conftest import a_tester

FAULTS = ("moves", "nan", "raises", "hangs")
SCRIPT = Path(__file__).with_name("faulty_policy_node.py")
numbers = itertools.count()


class Stack:
    """Simulated arm, guard and a policy node that misbehaves on demand."""

    def __init__(self, ros, start, bundles, tmp):
        self.ros, self.start = ros, start
        policies = {}
        for fault in FAULTS:
            policies[fault] = shutil.copytree(bundles["compressed"].path, tmp / fault)
        profile = load_profile("sim")
        cameras = {"front": replace(profile.cameras["front"], max_age=1.0)}  # a busy machine
        joints = replace(profile.joint_states, max_age=1.0)
        profile = replace(profile, cameras=cameras, joint_states=joints, max_skew=1.0)
        specs = bringup.nodes(profile, output_dir=str(tmp), policies=policies)
        self.specs = {spec.executable: spec for spec in specs}
        # What the sensors may be late by, their poses may be too.
        self.specs["command_guard_node"].parameters["pose_timeout"] = 1.0
        self.processes = {name: self.run(name) for name in self.specs if name != "recorder_node"}
        self.twists = ros.collect(TwistStamped, "ee_command", COMMAND_QOS)
        self.poses = ros.collect(PoseStamped, "ee_pose", SENSOR_QOS)
        self.guard_states = ros.collect(GuardStatus, "command_guard/status")
        self.states = ros.collect(PolicyStatus, "policy/status")
        self.diagnostics = ros.collect(DiagnosticArray, "/diagnostics")
        self._action = ActionClient(ros.node, RunEpisode, "policy/run_episode")
        assert ros.until(self._action.server_is_ready, 60.0)
        assert ros.until(lambda: self.poses and self.guard_states and self.states, 60.0)

    def run(self, name, *more):
        spec = self.specs[name]
        program = [sys.executable, SCRIPT] if name == "policy_node" else spec.command()[:1]
        words = [*program, "--ros-args", *spec.ros_arguments()]
        return self.start([*words, "-r", "__ns:=/faults", *more])

    def begin(self, label, action=None):
        """An episode that moves the arm: its result's future."""
        action = action or self._action

        def ask():
            goal = RunEpisode.Goal(
                instruction="put the red cube on the blue plate",
                max_duration=60.0,
                policy_label=label,
                episode_id=f"episode{next(numbers)}",
            )
            future = action.send_goal_async(goal)
            assert self.ros.until(future.done)
            self.handle = future.result()
            return self.handle.accepted

        assert self.ros.until(ask, 60.0), "no goal is taken"
        future = self.handle.get_result_async()
        self.twists.clear()
        assert self.ros.until(self.moves, 30.0), (
            f"the arm does not move: {self.guard_states[-1:]}, {self.states[-1:]}, "
            f"{self.processes['policy_node'].output[-1000:]}"
        )
        return future

    def moves(self):
        return bool(self.twists) and self.twists[-1][1].twist.linear.x > 0.005

    def stray_twists(self):
        """How many twists have moved the arm.

        A process may be frozen while it is sending one, which then goes out when it thaws.
        """
        return sum(bool(twist_array(message.twist).any()) for _, message in self.twists)

    def result(self, future):
        assert self.ros.until(future.done, 40.0), "the episode does not end"
        return future.result().result

    def stands(self, seconds=1.0):
        """Whether the arm comes to rest, and stays there."""
        assert self.ros.until(lambda: not self.twists or not self.moves(), 10.0)
        self.ros.spin(1.0)
        self.poses.clear()
        assert self.ros.until(lambda: len(self.poses) > 5)
        self.ros.spin(seconds)
        xs = [message.pose.position.x for _, message in self.poses]
        return max(xs) - min(xs) < 1e-3

    def said(self, name, words):
        """Whether a node's diagnostics come to say so."""

        def holds():
            statuses = [status for _, message in self.diagnostics for status in message.status]
            return any(name in status.name and words in status.message for status in statuses)

        return self.ros.until(holds, 10.0)


@pytest.fixture(scope="module")
def shared_stack(start_shared, bundles, tmp_path_factory):
    with a_tester("faults") as ros:
        yield Stack(ros, start_shared, bundles, tmp_path_factory.mktemp("faults"))


@pytest.fixture
def stack(shared_stack):
    """The nodes that the tests of this module share, in order; the arm at home, nothing running."""
    stack = shared_stack
    for process in stack.processes.values():
        process.send(signal.SIGCONT)  # what a test that failed has left frozen
    assert stack.ros.until(lambda: stack.states[-1][1].state == "idle", 30.0)
    assert stack.ros.call(ResetScene, "sim_arm/reset", seed=7).success
    stack.guard_states.clear(), stack.diagnostics.clear()
    assert stack.ros.until(lambda: stack.guard_states)
    return stack


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nan", "UserError: the policy gave an action that is not finite"),
        ("raises", "RuntimeError: the weights have melted"),
    ],
)
def test_a_policy_that_fails_ends_its_episode_and_the_arm_stands(stack, fault, words):
    result = stack.result(stack.begin(fault))
    assert (result.termination_reason, result.message) == ("policy_error", words)
    assert stack.stands() and stack.said("policy", words)
    assert not any(message.rejected_not_finite for _, message in stack.guard_states)


def test_a_policy_that_hangs_stops_the_arm_at_once_and_the_episode_in_the_end(stack):
    stops = stack.guard_states[-1][1].stops_on_silence
    future = stack.begin("hangs")
    assert stack.ros.until(lambda: stack.guard_states[-1][1].stops_on_silence > stops, 10.0)
    assert stack.said("command_guard", "no command for 0.2 s")
    assert stack.stands() and not future.done(), "the arm stands long before the policy is back"
    cancelled = stack.handle.cancel_goal_async()
    assert stack.ros.until(cancelled.done)
    result = stack.result(future)
    assert result.termination_reason == "operator_stop" and result.deadline_misses > 5
    assert stack.stands()


def test_a_frozen_policy_node_leaves_a_standing_arm_and_does_not_go_on(stack):
    stops = stack.guard_states[-1][1].liveliness_lost
    future = stack.begin("moves")
    stack.processes["policy_node"].send(signal.SIGSTOP)
    assert stack.ros.until(lambda: stack.guard_states[-1][1].liveliness_lost > stops, 10.0)
    assert stack.said("command_guard", "a policy's process gives no sign of life")
    assert stack.stands(2.0)
    stack.processes["policy_node"].send(signal.SIGCONT)
    result = stack.result(future)
    assert result.termination_reason == "policy_error" and "was held up for" in result.message
    assert stack.stands() and stack.said("policy", "was held up for")


def test_a_frozen_guard_leaves_a_standing_arm_and_the_episode_ends(stack):
    future = stack.begin("moves")
    stack.processes["command_guard_node"].send(signal.SIGSTOP)
    result = stack.result(future)
    assert result.termination_reason == "guard_stop"
    assert result.message.startswith("nothing has come from the command guard for ")
    stack.twists.clear()
    assert stack.stands() and not stack.twists
    stack.processes["command_guard_node"].send(signal.SIGCONT)
    assert stack.ros.until(lambda: stack.guard_states[-1][1].state == "waiting", 10.0)
    assert stack.stray_twists() <= 1, "moved by old commands"
    assert stack.stands()


def test_both_frozen_leave_a_standing_arm(stack):
    future = stack.begin("moves")
    for name in ("policy_node", "command_guard_node"):
        stack.processes[name].send(signal.SIGSTOP)
    stack.ros.spin(2.0)
    stack.twists.clear()
    assert stack.stands() and not stack.twists
    for name in ("policy_node", "command_guard_node"):
        stack.processes[name].send(signal.SIGCONT)
    result = stack.result(future)
    assert result.termination_reason in ("policy_error", "guard_stop")
    assert stack.stands() and stack.stray_twists() <= 1


def test_the_guard_takes_one_of_two_policy_nodes(stack):
    second = stack.run("policy_node", "-r", "__node:=second_policy")
    action = ActionClient(stack.ros.node, RunEpisode, "second_policy/run_episode")
    assert stack.ros.until(action.server_is_ready, 60.0)
    first = stack.begin("moves")
    loser = stack.begin("moves", action)
    result = stack.result(loser)
    assert result.termination_reason == "guard_stop" and "has the arm" in result.message
    assert not first.done() and stack.moves()
    assert stack.guard_states[-1][1].rejected_source > 0
    second.kill()
    assert stack.ros.call(Trigger, "policy/finish_episode").success
    assert stack.result(first).termination_reason == "finished"


def test_a_killed_guard_leaves_a_standing_arm_and_a_new_one_takes_over(stack):
    future = stack.begin("moves")
    stack.processes["command_guard_node"].send(signal.SIGKILL)
    assert stack.result(future).termination_reason == "guard_stop"
    stack.twists.clear()
    assert stack.stands() and not stack.twists
    stack.guard_states.clear()
    stack.processes["command_guard_node"] = stack.run("command_guard_node")
    assert stack.ros.until(lambda: stack.guard_states, 60.0)
    future = stack.begin("moves")
    assert stack.ros.call(Trigger, "command_guard/emergency_stop").success
    assert stack.result(future).message == "emergency stop"
    assert stack.stands()
    assert stack.ros.until(lambda: stack.ros.call(Trigger, "command_guard/release").success, 10.0)


def test_both_killed_leave_a_standing_arm(stack):
    stack.begin("moves")
    for name in ("policy_node", "command_guard_node"):
        stack.processes[name].send(signal.SIGKILL)
    time.sleep(0.5)
    stack.ros.spin(0.5)
    stack.twists.clear()
    assert stack.stands() and not stack.twists
