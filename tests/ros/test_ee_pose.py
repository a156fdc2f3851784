import pytest
from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import JointState
from std_msgs.msg import String

from rlrc_ros.kinematics import Chain
from rlrc_ros.messages.joint_state import joint_state
from rlrc_ros.messages.stamps import to_stamp
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
