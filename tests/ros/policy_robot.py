"""Camera, joints, guard and ear around a policy node, for the tests of it."""

import itertools

import numpy as np
from action_msgs.msg import GoalStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.action.client import ActionClient
from rlrc.action import RunEpisode
from rlrc.msg import GuardStatus, PolicyCommand, PolicyStatus
from rlrc.srv import ListPolicies, LoadPolicy
from sensor_msgs.msg import Image, JointState

from rlrc_ros.messages.command import command_arrays
from rlrc_ros.messages.image import rgb_to_image
from rlrc_ros.messages.joint_state import joint_state
from rlrc_ros.nodes.common import SENSOR_QOS

JOINTS = [*(f"joint{i}" for i in range(1, 8)), "finger_joint"]
INSTRUCTION = "put the red cube on the blue plate"

CLIENT = f"""
import sys
from rlrc_ros.trials.client import RobotClient
with RobotClient() as client:
    client.wait_until_ready(lambda: None, simulated=False)
    outcome = client.run_episode("{INSTRUCTION}", "original", sys.argv[1], 60.0, record=False)
    print(outcome.result.termination_reason)
"""
"""A process that runs the episode it is given the id of, and prints how it ended."""
numbers = itertools.count()


class Robot:
    """What the policy node stands between: sensors that can be broken, and an ear for commands."""

    def __init__(self, ros, process):
        self.ros, self.process = ros, process
        self.repair()
        node = ros.node
        self._images = node.create_publisher(Image, "image", SENSOR_QOS)
        self._joints = node.create_publisher(JointState, "joint_states", SENSOR_QOS)
        self.guard = node.create_publisher(GuardStatus, "command_guard/status", 10)
        node.create_timer(1 / 30, self._look)
        node.create_timer(1 / 50, self._feel)
        node.create_timer(0.1, self._guarded)
        self.commands = ros.collect(PolicyCommand, "policy_command")
        self.states = ros.collect(PolicyStatus, "policy/status")
        self._action = ActionClient(node, RunEpisode, "policy/run_episode")
        self.feedback = []

    def ready(self):
        """Everything has found everything."""
        assert self.ros.until(self._action.server_is_ready, 90.0)
        assert self.ros.until(lambda: self._images.get_subscription_count() > 0)
        assert self.ros.until(lambda: self._joints.get_subscription_count() > 0)
        assert self.ros.until(lambda: self.guard.get_subscription_count() > 0)
        assert self.ros.until(lambda: self.states)
        return self

    def repair(self):
        self.seeing, self.encoding, self.names = True, "rgb8", JOINTS
        self.size, self.guarding, self.holder = (64, 64), True, ""
        self.frozen_at = None
        self.positions = np.linspace(-0.4, 0.4, len(JOINTS))

    def stamp(self):
        return self.ros.node.get_clock().now().to_msg()

    def _look(self):
        if self.seeing:
            picture = np.random.default_rng(0).integers(0, 255, (*self.size, 3), np.uint8)
            image = rgb_to_image(picture, self.frozen_at or self.stamp(), "camera")
            image.encoding = self.encoding
            self._images.publish(image)

    def _guarded(self):
        if self.guarding:
            self.guard.publish(GuardStatus(state="active", episode_id=self.holder, accepted=9))

    def _feel(self):
        positions = self.positions[: len(self.names)]
        self._joints.publish(joint_state(self.names, positions, [], self.stamp()))

    def ask(self, instruction=INSTRUCTION, label="", seconds=20.0, **goal):
        """Ask for an episode: the goal handle's future."""
        self.feedback.clear()
        goal = RunEpisode.Goal(
            instruction=instruction, max_duration=seconds, policy_label=label, **goal
        )
        return self._action.send_goal_async(goal, lambda m: self.feedback.append(m.feedback))

    def send(self, **goal):
        """Ask for an episode: its id and its goal handle."""
        episode_id = f"episode{next(numbers)}"
        future = self.ask(episode_id=episode_id, **goal)
        assert self.ros.until(future.done)
        return episode_id, future.result()

    def result(self, handle, future=None):
        """How the episode ended: status and result."""
        future = future or handle.get_result_async()
        assert self.ros.until(future.done, 40.0), "the episode does not end"
        return future.result().status, future.result().result

    def run(self, **goal):
        episode_id, handle = self.send(**goal)
        assert handle.accepted
        status, result = self.result(handle)
        self.ros.spin(0.1)
        return episode_id, status, result

    def of(self, episode_id):
        """The commands of an episode."""
        return [message for _, message in self.commands if message.episode_id == episode_id]

    def acts(self, episode_id, steps=3):
        assert self.ros.until(lambda: len(self.of(episode_id)) >= steps), "no commands come"

    def stands(self, episode_id):
        """Its last command is a stop, and nothing comes after it."""
        self.ros.spin(0.3)
        commands = self.of(episode_id)
        assert commands and not command_arrays(commands[-1]).twist.any()
        self.ros.spin(0.3)
        return len(self.of(episode_id)) == len(commands)

    def load(self, label, policy=""):
        return self.ros.call(LoadPolicy, "policy/load_policy", label=label, policy=policy)

    def policies(self):
        listed = self.ros.call(ListPolicies, "policy/list_policies").policies
        return {info.label: info for info in listed}

    def change(self, transition):
        request = Transition(id=transition)
        return self.ros.call(ChangeState, "policy/change_state", transition=request).success

    def state(self):
        return self.ros.call(GetState, "policy/get_state").current_state.label


def parameters(bundles, **changes):
    given = [f"{label}={bundle.path}" for label, bundle in bundles.items()]
    return {
        "policies": str(given),
        "cameras": "[front=image]",
        "joint_states_max_age": 0.5,
        "autostart": "true",
        **changes,
    }


def broken(robot, episode_id, status, result):
    assert status == GoalStatus.STATUS_ABORTED
    assert "\n" not in result.message
    assert result.steps == 0 and not robot.of(episode_id), "commanded from bad input"
    return f"{result.termination_reason}: {result.message}"
