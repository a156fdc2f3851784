"""Where the end effector is, for arms whose drivers do not say: from joint states and the URDF.

    ros2 run rlrc ee_pose_node --ros-args -p base_frame:=link_base -p ee_frame:=link_tcp

The pose carries the stamp of the joint state that it was computed from.
"""

from __future__ import annotations

import sys

from geometry_msgs.msg import PoseStamped
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_msgs.msg import String

from rlrc_ros.errors import UserError
from rlrc_ros.kinematics import Chain
from rlrc_ros.messages.joint_state import ordered_positions
from rlrc_ros.nodes import common


class EePoseNode(Node):
    """Joint states in, poses out."""

    def __init__(self) -> None:
        super().__init__("ee_pose")
        self._base = common.text(self, "base_frame", "base_link", "the link poses are given in")
        self._tip = common.text(self, "ee_frame", "tool0", "the link whose pose it is")
        self._chain: Chain | None = None
        self._poses = self.create_publisher(PoseStamped, "ee_pose", common.SENSOR_QOS)
        self.create_subscription(
            String, "robot_description", self._on_description, common.LATCHED_QOS
        )
        self.create_subscription(JointState, "joint_states", self._on_joints, common.SENSOR_QOS)

    def _on_description(self, message: String) -> None:
        try:
            self._chain = Chain(message.data, self._base, self._tip)
        except UserError as error:
            self._chain = None
            self.get_logger().error(str(error))
        else:
            self.get_logger().info(f"{self._tip} by {', '.join(self._chain.names)}")

    def _on_joints(self, message: JointState) -> None:
        if self._chain is None:
            return
        names = self._chain.names
        if names and not set(names) & set(message.name):  # the gripper's own joint states
            return
        try:
            values = ordered_positions(message, names)
        except UserError as error:
            self.get_logger().error(f"no pose: {error}", throttle_duration_sec=5.0)
            return
        position, orientation = self._chain.pose(dict(zip(names, values.tolist(), strict=True)))
        pose = PoseStamped()
        pose.header.stamp, pose.header.frame_id = message.header.stamp, self._base
        place, q = pose.pose.position, pose.pose.orientation
        place.x, place.y, place.z = position
        q.x, q.y, q.z, q.w = orientation
        self._poses.publish(pose)


def main() -> int:
    """Run the node."""
    return common.run(EePoseNode)


if __name__ == "__main__":
    sys.exit(main())
