"""`rlrc robot check` as a process, against a robot that the test plays."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml
from geometry_msgs.msg import PoseStamped, TransformStamped, TwistStamped
from rclpy.action.server import ActionServer
from rclpy.qos import DurabilityPolicy, QoSProfile
from rlrc.action import RunEpisode
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray, String
from tf2_msgs.msg import TFMessage

from rlrc_ros.messages.image import rgb_to_image
from rlrc_ros.messages.joint_state import joint_state
from rlrc_ros.nodes.common import COMMAND_QOS, SENSOR_QOS
from rlrc_ros.profile import load_profile
from rlrc_ros.robot_check import check, report
from tests.ros.conftest import BIN
from tests.test_kinematics import panda
from tests.test_profile import CONFIG

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
JOINTS = [*(f"joint{i}" for i in range(1, 8)), "finger_joint"]
PARTS = ["cameras.front", "joint_states", "ee_pose", "ee_command", "gripper_command"]


class Robot:
    """Drivers and controllers; each part can be told to misbehave."""

    def __init__(self, ros):
        self.ros = ros
        self.frame, self.where, self.encoding, self.joints = "base", 0.5, "rgb8", JOINTS
        self.publish = {"image": True, "joints": True, "pose": True}
        node = ros.node
        self.images = node.create_publisher(Image, "camera/front/image_raw", SENSOR_QOS)
        self.states = node.create_publisher(JointState, "joint_states", SENSOR_QOS)
        self.poses = node.create_publisher(PoseStamped, "ee_pose", SENSOR_QOS)
        self.picture = np.zeros((32, 32, 3), np.uint8)
        node.create_timer(1 / 30, self._look)
        node.create_timer(1 / 50, self._feel)

    def controller(self, kind=TwistStamped, qos=COMMAND_QOS):
        self.ros.node.create_subscription(kind, "ee_command", lambda _: None, qos)
        self.ros.node.create_subscription(
            Float64MultiArray, "gripper_command", lambda _: None, COMMAND_QOS
        )

    def _look(self):
        image = rgb_to_image(self.picture, self.ros.node.get_clock().now().to_msg(), "camera")
        image.encoding = self.encoding
        if self.publish["image"]:
            self.images.publish(image)

    def _feel(self):
        stamp = self.ros.node.get_clock().now().to_msg()
        if self.publish["joints"]:
            positions = np.zeros(len(self.joints))
            self.states.publish(joint_state(self.joints, positions, [], stamp))
        pose = PoseStamped()
        pose.header.stamp, pose.header.frame_id = stamp, self.frame
        pose.pose.position.x, pose.pose.position.z = self.where, 0.2
        if self.publish["pose"]:
            self.poses.publish(pose)


@pytest.fixture
def profile(tmp_path, bundles):
    """profile(keys …) → the file of the simulated arm's profile, for a busy machine, changed."""

    def profile(**changes):
        data = yaml.safe_load((CONFIG / "sim.yaml").read_text())
        data["cameras"]["front"] |= {"max_age": 2.0, "min_rate": 2.0}
        data["joint_states"] |= {"max_age": 2.0, "min_rate": 2.0}
        data["ee_pose_max_age"] = 2.0
        data["policies"] = {"A": str(bundles["original"].path)}
        file = tmp_path / "robot.yaml"
        file.write_text(yaml.safe_dump(data | changes))
        return file

    return profile


@pytest.fixture
def problems(ros, profile, bundles):
    """problems(keys …) → what of the changed profile does not fit the robot, by part."""

    def problems(**changes):
        loaded = load_profile(profile(**changes))
        policies = {"A": bundles["original"].config}
        with ThreadPoolExecutor(1) as pool:  # beside the robot, which lives in this thread
            checking = pool.submit(check, loaded, policies, seconds=1.0, discovery=1.5)
            assert ros.until(checking.done, 60.0)
        data = report(checking.result())
        assert data["ok"] == (not data["problems"])
        return {f["part"]: f["problem"] for f in data["findings"] if f["problem"]}

    return problems


def run(ros, start, *words):
    process = start([BIN / "rlrc", "robot", "check", *words])
    assert ros.until(lambda: process.popen.poll() is not None, 60.0)
    return process


def test_the_command_says_what_fits_and_what_does_not(ros, start, profile):
    Robot(ros).controller()
    process = run(ros, start, profile())
    assert process.popen.returncode == 0, process.output
    lines = process.output.strip().splitlines()
    assert lines[-1] == "sim fits" and len(lines) == len(PARTS) + 3
    assert all(line.startswith("ok ") for line in lines[:-1])
    process = run(ros, start, profile(base_frame="world"), "--json", "--seconds", "1")
    data = json.loads(process.output.strip().splitlines()[-1])
    assert process.popen.returncode == 1 and not data["ok"] and data["problems"] == 1


def test_mistakes_are_one_line(ros, start, profile):
    process = run(ros, start, profile(base_fram="base"))
    assert process.popen.returncode == 2
    (line,) = process.output.strip().splitlines()
    assert "unknown key 'base_fram'; did you mean 'base_frame'?" in line


def test_a_silent_graph_is_all_missing(problems):
    found = problems()
    assert set(found) == {*PARTS, "policies.A"}
    assert found["joint_states"] == "nobody publishes it"
    assert found["ee_command"] == "nobody listens to it; is the controller loaded and active?"


def test_what_does_not_fit_is_named(ros, problems):
    robot = Robot(ros)
    robot.frame, robot.encoding, robot.joints = "base_link", "16UC1", JOINTS[1:]
    robot.controller(PoseStamped)
    ros.node.create_publisher(Float64MultiArray, "gripper_command", 10)
    found = problems()
    assert "image encoding '16UC1'" in found["cameras.front"]
    assert found["ee_pose"] == "it is in frame 'base_link', base_frame is 'base'"
    assert "not geometry_msgs/msg/TwistStamped" in found["ee_command"]
    assert found["gripper_command"] == "/tester may command the arm too; only the guard should"
    assert found["policies.A"].startswith("joint state lacks joint1; it has joint2")
    assert "joint_states" not in found


def test_a_wrong_name_gets_the_right_ones_and_qos_and_silence_are_told(ros, problems):
    robot = Robot(ros)
    robot.publish["joints"], robot.where = False, 0.9
    robot.controller(qos=LATCHED)
    found = problems(cameras={"wrist": {"topic": "image", "min_rate": 2.0}})
    assert found["cameras.wrist"] == (
        "nobody publishes it; of its type there are /camera/front/image_raw"
    )
    assert found["joint_states"].startswith("it is published, but nothing came in 1 s")
    assert found["ee_pose"].startswith("the arm is outside of its workspace, at 0.900, 0.000")
    assert found["ee_command"].startswith("QoS does not fit: ")
    assert found["policies.A"] == "it looks through front; cameras: wrist"


def test_a_gripper_behind_an_action_is_looked_for(ros, problems):
    Robot(ros).controller()
    action = {"simulated": False, "gripper_command_type": "action"}
    found = problems(**action)
    assert found == {
        "gripper_command": "nobody offers this action; is the gripper's driver running?"
    }
    server = ActionServer(ros.node, RunEpisode, "gripper_command", lambda _: None)
    other = "it is of type rlrc/action/RunEpisode_SendGoal, not control_msgs/action/GripperCommand_"
    assert problems(**action)["gripper_command"].startswith(other)
    server.destroy()


def test_slow_and_late_sources_are_told(ros, problems):
    Robot(ros).controller()
    slow = {"front": {"topic": "camera/front/image_raw", "min_rate": 200.0}}
    late = {
        "topic": "joint_states", "max_age": 1e-6, "gripper_joint": "finger_joint",
        "gripper_closed": 0.0, "gripper_open": 0.04, "min_rate": 2.0,
    }  # fmt: skip
    found = problems(cameras=slow, joint_states=late, ee_pose_max_age=1e-6)
    assert found["cameras.front"].endswith("Hz; 200 are wanted")
    for part in ("joint_states", "ee_pose"):
        assert "synchronise the clocks, or raise max_age" in found[part]


def test_a_pose_that_is_to_be_computed_is_computed(ros, problems):
    robot = Robot(ros)
    robot.controller()
    by_tf = {"ee_frame": "tcp", "ee_pose_source": "tf"}
    assert problems(**by_tf) == {"ee_pose": "nobody publishes /tf, which it is computed from"}
    transforms = ros.node.create_publisher(TFMessage, "/tf", 10)
    at = {"base": 0.5, "mount": 0.0}

    def send():
        stamped = TransformStamped(child_frame_id="tcp")
        stamped.header.frame_id, stamped.transform.translation.x = next(iter(at.items()))
        stamped.transform.translation.z = 0.2
        stamped.header.stamp = ros.node.get_clock().now().to_msg()
        transforms.publish(TFMessage(transforms=[stamped]))

    ros.node.create_timer(1 / 50, send)
    assert not problems(**by_tf)
    del at["base"]
    why = "no way between base and tcp: above tcp there is 'mount', above base 'base'"
    assert problems(**by_tf) == {"ee_pose": why}

    by_joints = {"ee_frame": "tcp", "base_frame": "link0"}
    why = "nobody publishes /robot_description, which it is computed from"
    assert problems(**by_joints) == {"ee_pose": why}
    description = ros.node.create_publisher(String, "robot_description", LATCHED)
    description.publish(String(data=panda()))
    assert "the arm is outside of its workspace" in problems(**by_joints)["ee_pose"]
