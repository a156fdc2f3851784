import math

import pytest
from geometry_msgs.msg import PoseStamped, TransformStamped
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from tf2_msgs.msg import TFMessage

from rlrc_ros.kinematics import Chain
from rlrc_ros.messages.ee_pose import pose_problem, pose_vector
from rlrc_ros.messages.joint_state import joint_state
from rlrc_ros.messages.stamps import to_stamp
from rlrc_ros.motion import turn_quaternion
from rlrc_ros.nodes.common import LATCHED_QOS, SENSOR_QOS
from rlrc_ros.sim.model import HOME, JOINT_NAMES
from tests.test_kinematics import panda


def test_poses_follow_the_joints_with_their_stamps(ros, start):
    node = start("ee_pose_node", {"base_frame": "link0", "ee_frame": "tcp"})
    poses = ros.collect(PoseStamped, "ee_pose", SENSOR_QOS)
    joints = ros.publisher(JointState, "joint_states", SENSOR_QOS)
    description = ros.node.create_publisher(String, "robot_description", LATCHED_QOS)
    ros.published("ee_pose")
    state = joint_state(JOINT_NAMES[::-1], HOME[::-1], [], to_stamp(12.5))

    def comes():
        joints.publish(state)
        ros.spin(0.05)
        return bool(poses)

    ros.spin(0.3)
    assert not comes(), "a pose without a description"
    description.publish(String(data=panda()))
    assert ros.until(comes)
    pose = poses[-1][1]
    assert (pose.header.stamp, pose.header.frame_id) == (to_stamp(12.5), "link0")
    expected, _ = Chain(panda(), "link0", "tcp").pose(dict(zip(JOINT_NAMES, HOME, strict=True)))
    position = pose.pose.position
    assert (position.x, position.y, position.z) == pytest.approx(expected)

    ros.spin(0.2)
    poses.clear()
    joints.publish(joint_state(["finger_joint"], [0.0], [], to_stamp(13.0)))
    joints.publish(joint_state(JOINT_NAMES[:3], HOME[:3], [], to_stamp(13.0)))
    assert ros.until(lambda: "no pose: joint state lacks joint4" in node.output)
    description.publish(String(data="<robot/>"))
    assert ros.until(lambda: "no way from link0 to tcp" in node.output)
    assert not poses and not comes()


def transform(parent, child, stamp, position, turn=(0.0, 0.0, 0.0)):
    """A TFMessage of one transform."""
    stamped = TransformStamped(child_frame_id=child)
    stamped.header.stamp, stamped.header.frame_id = to_stamp(stamp), parent
    place, q = stamped.transform.translation, stamped.transform.rotation
    place.x, place.y, place.z = position
    q.x, q.y, q.z, q.w = turn_quaternion(turn)
    return TFMessage(transforms=[stamped])


def test_poses_come_from_tf_with_the_stamp_at_which_all_of_it_is_known(ros, start):
    """A rail and an arm that tell of themselves at times of their own, and a tool that is fixed."""
    node = start(
        "ee_pose_node",
        {"base_frame": "base", "ee_frame": "tool", "source": "tf"},
        remappings={"ee_pose": "pose_of_tf"},
    )
    poses = ros.collect(PoseStamped, "pose_of_tf", SENSOR_QOS)
    moving = ros.publisher(TFMessage, "/tf")
    ros.published("pose_of_tf")
    moving.publish(transform("base", "rail", 10.0, (1.0, 0.0, 0.0)))
    assert ros.until(lambda: "no pose: no way between base and tool: above tool" in node.output)
    static = ros.node.create_publisher(TFMessage, "/tf_static", LATCHED_QOS)
    static.publish(transform("hand", "tool", 0.0, (0.0, 0.0, 0.1), (0.0, 0.0, 0.5)))
    assert ros.until(lambda: static.get_subscription_count() > 0)
    ros.spin(0.3)
    moving.publish(transform("rail", "hand", 10.0, (0.0, 0.0, 0.5), (math.pi, 0.0, 0.0)))
    assert ros.until(lambda: poses and poses[-1][1].header.stamp == to_stamp(10.0))
    moving.publish(transform("base", "rail", 10.4, (3.0, 0.0, 0.0)))
    moving.publish(transform("rail", "hand", 10.1, (0.0, 0.0, 0.7), (math.pi, 0.0, 0.0)))
    assert ros.until(lambda: poses and poses[-1][1].header.stamp == to_stamp(10.1))
    pose = poses[-1][1]
    assert not pose_problem(pose, "base")
    expected = (1.5, 0.0, 0.6, *pose_vector(pose, (math.pi, 0.0, 0.0))[3:])
    assert pose_vector(pose, (math.pi, 0.0, 0.0)) == pytest.approx(expected)
    assert [message.header.stamp for _, message in poses] == [to_stamp(10.0), to_stamp(10.1)]
    ros.spin(0.2)
    poses.clear()
    broken = transform("rail", "hand", 10.2, (0.0, math.nan, 0.0))
    moving.publish(broken)
    ros.spin(0.5)
    assert not poses


def test_a_source_of_poses_that_there_is_not_is_one_line(start):
    node = start("ee_pose_node", {"source": "camera"})
    assert node.wait(90.0) == 2
    line = "ee_pose_node: parameter source is 'camera'; it must be joint_states or tf"
    assert node.output.strip().splitlines()[-1] == line
