"""An operator takes over from a policy on the simulated arm: real nodes and real bags."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from geometry_msgs.msg import TwistStamped
from rclpy.action.client import ActionClient
from rlrc.action import RunEpisode
from rlrc.msg import GuardStatus
from rlrc.srv import LabelEpisode
from std_msgs.msg import Float64
from std_srvs.srv import Trigger

from rlrc_ros import bringup
from rlrc_ros.messages.command import command_arrays, twist_stamped
from rlrc_ros.profile import load_profile
from rlrc_ros.rollouts.alignment import Contract
from rlrc_ros.rollouts.bag import read_messages
from rlrc_ros.rollouts.episode import read_episode
from rlrc_ros.rollouts.export import ExportReport, Filters, find_bags, rollouts
from rlrc_ros.rollouts.verify import verify
from tests.ros.conftest import a_tester, starting

INSTRUCTION = "put the red cube on the blue plate"
UP = (0.0, 0.0, 0.05, 0.0, 0.0, 0.0)


class Arm:
    """The nodes of the simulated arm, a policy's episode, and a hand at the stick."""

    def __init__(self, ros, start, bags, bundle):
        self.ros, self._start, self.bags = ros, start, bags
        self.profile = load_profile("sim")
        specs = bringup.nodes(self.profile, output_dir=str(bags), policies={"A": str(bundle.path)})
        for spec in specs:  # a busy machine may be late
            if spec.executable == "policy_node":
                ages = dict.fromkeys(("joint_states_max_age", "ee_pose_max_age"), 0.5)
                cameras = ["front=/camera/front/image_raw,raw,0.5"]
                spec.parameters |= {"cameras": cameras, "max_skew": 1.0, **ages}
            start(spec.command())
        self.operator = self.start_operator()
        self.guard = ros.collect(GuardStatus, "command_guard/status")
        self._action = ActionClient(ros.node, RunEpisode, "policy/run_episode")
        self._stick = ros.publisher(TwistStamped, "operator/twist")
        self._hand = ros.publisher(Float64, "operator/gripper")
        assert ros.until(self._action.server_is_ready, 60.0)
        assert ros.until(lambda: self.guard)

    def start_operator(self):
        return self._start("operator_node")

    def close(self):
        self._action.destroy()

    def ask(self, name):
        return self.ros.call(Trigger, f"operator/{name}")

    def run_policy(self, episode_id):
        """Its result's future, once it has the arm."""

        def begin():
            goal = RunEpisode.Goal(
                instruction=INSTRUCTION, max_duration=60.0, record=True, episode_id=episode_id
            )
            future = self._action.send_goal_async(goal)
            assert self.ros.until(future.done)
            return future.result() if future.result().accepted else None

        handle = self.ros.until(begin, 60.0)
        assert self.ros.until(lambda: self.holder() == episode_id, 40.0)
        return handle.get_result_async()

    def holder(self):
        return self.guard[-1][1].episode_id

    def push(self, twist=UP, gripper=None, seconds=1.0, frame="base"):
        """Move the stick so for a while."""
        if gripper is not None:
            self._hand.publish(Float64(data=gripper))
            self.ros.spin(0.3)  # topics keep no order between them
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stamp = self.ros.node.get_clock().now().to_msg()
            self._stick.publish(twist_stamped(twist, stamp, frame))
            self.ros.spin(0.05)

    def ended(self, episode_id):
        """The episode of a bag that is finished, and its commands."""
        bag = self.bags / episode_id
        assert self.ros.until(bag.is_dir), f"{bag} is not finished"
        assert verify(bag).ok
        commands = [m for _, m, _ in read_messages(bag, ["/policy_command"])]
        return read_episode(bag), [m for m in commands if m.episode_id == episode_id]


@pytest.fixture(scope="module")
def arm(ros_environment, bundles, tmp_path_factory):
    directory = tmp_path_factory.mktemp("operator")
    with starting(ros_environment, directory) as start, a_tester() as ros:
        arm = Arm(ros, start, directory / "bags", bundles["original"])
        yield arm
        arm.close()


def test_there_is_nothing_to_take_over_or_hand_back_at_first(arm):
    assert "no episode of a policy" in arm.ask("take_over").message
    assert not arm.ask("hand_back").success
    arm.push(seconds=0.3)
    assert arm.guard[-1][1].accepted == 0, "a stick alone has nothing to say"


def test_a_takeover_is_an_episode_of_its_own_label_and_can_be_exported(arm, bundles):
    result = arm.run_policy("one")
    arm.push(seconds=0.3)
    assert arm.holder() == "one", "the stick does not disturb a policy"
    taken = arm.ask("take_over")
    assert taken.success, taken.message
    assert arm.ros.until(result.done, 40.0)
    assert result.result().result.termination_reason == "operator_stop"
    assert "goes on already" in arm.ask("take_over").message
    assert arm.ros.until(lambda: arm.holder() == "", 10.0), "nothing is sent while it is silent"
    arm.push(gripper=0.25)
    assert arm.holder() == "one-operator"
    back = arm.ask("hand_back")
    assert back.success and Path(back.message).name == "one-operator", back.message
    arm.push(seconds=0.3)
    label = {"uri": back.message, "outcome": "success"}
    assert arm.ros.call(LabelEpisode, "recorder/label", **label).success

    episode, commands = arm.ended("one-operator")
    assert (episode.instruction, episode.policy_label) == (INSTRUCTION, "operator")
    assert episode.termination_reason == "finished"
    assert episode.metadata == {"takeover_of": "one", "policy_label": "A"}
    *steps, stop = commands
    assert len(steps) >= 5 and {m.policy_label for m in commands} == {"operator"}
    for message in steps:
        np.testing.assert_allclose(command_arrays(message).twist, UP)
        assert message.gripper == 0.25
    assert not command_arrays(stop).twist.any() and stop.gripper == 0.25

    contract, report = Contract(bundles["original"].config, arm.profile), ExportReport()
    found = find_bags([arm.bags])
    (exported,) = rollouts(found, contract, Filters(policies=["operator"]), lambda s: s, report)
    assert exported.facts["policy_label"] == "operator" and not report.unusable
    rate = contract.config.control_rate
    for step in exported.steps:
        np.testing.assert_allclose(step.action, [*np.array(UP) / rate, 0.25])
    assert 5 <= len(exported.steps) <= len(steps)


def test_an_emergency_stop_ends_a_takeover(arm):
    result = arm.run_policy("two")
    assert arm.ask("take_over").success and arm.ros.until(result.done, 40.0)
    arm.push(gripper=1.0, seconds=0.5)
    assert arm.ros.call(Trigger, "command_guard/emergency_stop").success
    episode, _ = arm.ended("two-operator")
    assert episode.termination_reason == "guard_stop"
    assert "release it first" in arm.ask("take_over").message
    assert arm.ros.until(lambda: arm.ros.call(Trigger, "command_guard/release").success, 10.0)
    assert arm.ros.until(lambda: arm.guard[-1][1].state == "waiting")
    arm.ros.spin(0.5)
    again = arm.ask("take_over")  # goes on from where it was stopped
    assert again.success and Path(again.message).name == "two-operator-2", again.message
    arm.push(seconds=0.3, frame="camera")
    assert arm.ros.until(lambda: arm.guard[-1][1].rejected_frame > 0)
    arm.push(seconds=0.5)

    arm.operator.send(signal.SIGTERM)
    assert arm.operator.wait(20.0) == 0, arm.operator.output
    episode, commands = arm.ended("two-operator-2")
    assert episode.termination_reason == "node_deactivated"
    assert not command_arrays(commands[-1]).twist.any()
    assert "Traceback" not in arm.operator.output
