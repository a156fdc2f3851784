import math

import numpy as np
import pytest
from geometry_msgs.msg import PoseStamped, TwistStamped
from rlrc.msg import TaskState
from rlrc.srv import ResetScene
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray

from rlrc_ros.messages.command import twist_stamped
from rlrc_ros.messages.image import image_to_rgb
from rlrc_ros.messages.stamps import to_nanoseconds
from rlrc_ros.nodes.common import COMMAND_QOS, SENSOR_QOS
from tests.ros.conftest import a_tester

NAMESPACE = "sim_arm_test"
JOINTS = [*(f"joint{i}" for i in range(1, 8)), "finger_joint"]


class SimArm:
    """A controller's end and a subscriber's end of the running simulated arm."""

    def __init__(self, ros, process):
        self.ros, self.process = ros, process
        self.images = ros.collect(Image, "image_raw", SENSOR_QOS)
        self.joints = ros.collect(JointState, "joint_states", SENSOR_QOS)
        self.poses = ros.collect(PoseStamped, "ee_pose", SENSOR_QOS)
        self.tasks = ros.collect(TaskState, "sim_arm/task_state")
        self.twists = ros.publisher(TwistStamped, "ee_command", COMMAND_QOS)
        self.grippers = ros.publisher(Float64MultiArray, "gripper_command", COMMAND_QOS)
        assert ros.until(lambda: self.images and self.joints and self.poses and self.tasks)

    def reset(self, seed=7, task=""):
        return self.ros.call(ResetScene, "sim_arm/reset", seed=seed, task=task)

    def fresh(self, messages):
        """The next message that was sent after now."""
        now = self.ros.node.get_clock().now().nanoseconds
        assert self.ros.until(
            lambda: messages and to_nanoseconds(messages[-1][1].header.stamp) > now
        )
        return messages[-1][1]

    def position(self):
        point = self.fresh(self.poses).pose.position
        return np.array([point.x, point.y, point.z])

    def drive(self, seconds, *twist, frame="base"):
        for _ in range(round(seconds / 0.05)):
            stamp = self.ros.node.get_clock().now().to_msg()
            self.twists.publish(twist_stamped(np.array(twist), stamp, frame))
            self.ros.spin(0.05)

    def finger(self):
        return self.fresh(self.joints).position[JOINTS.index("finger_joint")]


@pytest.fixture(scope="module")
def arm(start_shared):
    process = start_shared("sim_arm_node", remappings={"__ns": f"/{NAMESPACE}"})
    with a_tester(NAMESPACE) as ros:
        yield SimArm(ros, process)


def test_sensors_come_at_their_rates_with_the_time_they_are_of(arm):
    streams = {"images": (arm.images, 30), "joints": (arm.joints, 50), "poses": (arm.poses, 50)}
    for messages, _ in streams.values():
        messages.clear()
    arm.ros.spin(2.0)
    for name, (messages, rate) in streams.items():
        stamps = np.array([to_nanoseconds(m.header.stamp) for _, m in messages]) * 1e-9
        assert (np.diff(stamps) > 0).all(), name
        # The median: a busy machine stalls now and then.
        assert 1 / np.median(np.diff(stamps)) == pytest.approx(rate, rel=0.25), name
        now = arm.ros.node.get_clock().now().nanoseconds * 1e-9
        assert abs(now - stamps[-1]) < 1.0, name


def test_an_image_is_what_its_header_says(arm):
    image = arm.fresh(arm.images)
    assert (image.height, image.width, image.encoding, image.step) == (128, 128, "rgb8", 384)
    assert image.header.frame_id == "camera_front"
    assert image_to_rgb(image).std() > 10, "a picture of something"


def test_joints_and_pose_are_named_finite_and_normalised(arm):
    state, pose = arm.fresh(arm.joints), arm.fresh(arm.poses)
    assert list(state.name) == JOINTS
    assert len(state.position) == len(state.velocity) == len(JOINTS)
    assert np.isfinite([*state.position, *state.velocity]).all()
    assert pose.header.frame_id == "base"
    q = pose.pose.orientation
    assert math.hypot(q.x, q.y, q.z, q.w) == pytest.approx(1.0, abs=1e-6)


def test_a_seed_gives_the_same_scene_every_time(arm):
    def scene(seed):
        response = arm.reset(seed)
        assert response.success, response.message
        assert arm.ros.until(lambda: arm.tasks[-1][1].seed == seed)
        return response, image_to_rgb(arm.fresh(arm.images)).astype(int)

    (first, before), (other, different), (again, after) = scene(7), scene(8), scene(7)
    assert first == again and first.instruction in first.instructions
    assert arm.tasks[-1][1].instruction == first.instruction and not arm.tasks[-1][1].success
    assert np.abs(before - after).mean() < 1.0 < np.abs(before - different).mean()
    assert other != first


def test_a_family_can_be_asked_for_and_an_unknown_one_is_refused(arm):
    pushed = arm.reset(7, "push")
    assert pushed.task == "push" and pushed.instruction.startswith("push")
    refused = arm.reset(7, "juggle")
    assert not refused.success and "juggle" in refused.message
    assert "\n" not in refused.message
    assert arm.tasks[-1][1].instruction == pushed.instruction or arm.ros.until(
        lambda: arm.tasks[-1][1].instruction == pushed.instruction
    )


def test_it_follows_commands_and_stops_when_they_stop(arm):
    arm.reset(7)
    before = arm.position()
    arm.drive(1.0, 0.0, 0.0, 0.05, 0.0, 0.0, 0.0)
    moved = arm.position() - before
    assert 0.02 < moved[2] < 0.08 and np.abs(moved[:2]).max() < 0.01
    arm.ros.spin(0.5)
    still = arm.position()
    arm.ros.spin(0.5)
    assert arm.position() == pytest.approx(still, abs=5e-4)


def test_bad_commands_move_nothing_and_are_named(arm):
    arm.reset(7)
    arm.ros.spin(0.3)
    before, finger = arm.position(), arm.finger()
    arm.drive(0.3, math.nan, 0.0, 0.1, 0.0, 0.0, 0.0)
    arm.drive(0.3, 0.0, 0.0, math.inf, 0.0, 0.0, 0.0)
    arm.ros.spin(1.0)  # the log is throttled
    arm.drive(0.3, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, frame="camera_front")
    for bad in ([math.nan], [], [0.0, 0.0]):
        arm.grippers.publish(Float64MultiArray(data=bad))
        arm.ros.spin(0.1)
    assert arm.position() == pytest.approx(before, abs=5e-4)
    assert arm.finger() == pytest.approx(finger, abs=5e-4)
    output = arm.process.output
    assert "ee_command ignored: a twist is six finite numbers" in output
    assert "ee_command ignored: in frame 'camera_front', not 'base'" in output
    assert "gripper_command ignored: a gripper opening is a number" in output
    assert arm.process.popen.poll() is None


def test_the_gripper_closes_and_opens(arm):
    arm.reset(7)
    arm.grippers.publish(Float64MultiArray(data=[0.0]))
    assert arm.ros.until(lambda: arm.finger() < 0.005, 10.0)
    arm.grippers.publish(Float64MultiArray(data=[1.0]))
    assert arm.ros.until(lambda: arm.finger() > 0.035, 10.0)


def test_sigint_ends_it(start):
    process = start("sim_arm_node", remappings={"__ns": "/sim_arm_ends"})
    with a_tester("sim_arm_ends") as ros:
        ros.published("image_raw")
        assert process.stop() == 0
    assert "Traceback" not in process.output


def test_a_nonsense_parameter_is_refused_in_one_line(start):
    process = start("sim_arm_node", {"camera_rate": "0.0"})
    assert process.wait() == 2
    assert "camera_rate (images, Hz) must be a number" in process.output
    assert len(process.output.splitlines()) == 1
