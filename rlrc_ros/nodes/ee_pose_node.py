"""Where the end effector is, for arms whose drivers do not say.

    ros2 run rlrc ee_pose_node --ros-args -p base_frame:=link_base -p ee_frame:=link_tcp

computes it from joint states and the URDF; with `-p source:=tf` it comes from /tf and /tf_static.
The pose carries the stamp of what it was computed from.
"""

from __future__ import annotations

import sys
import time

from geometry_msgs.msg import PoseStamped
from rclpy.node import Node

from rlrc_ros.nodes import common, ee_pose_source

SAID_AGAIN = 5.0
"""s after which the log says once more why there is no pose."""


class EePoseNode(Node):
    """Joint states or transforms in, poses out."""

    def __init__(self) -> None:
        super().__init__("ee_pose")
        self._problem, self._said = "", 0.0
        base = common.text(self, "base_frame", "base_link", "the frame poses are given in")
        tool = common.text(self, "ee_frame", "tool0", "the frame whose pose it is")
        source = common.text(
            self, "source", "joint_states", "joint_states (with robot_description), or tf"
        )
        poses = self.create_publisher(PoseStamped, "ee_pose", common.SENSOR_QOS)
        ee_pose_source.listen(self, source, base, tool, poses.publish, self._complain)

    def _complain(self, problem: str) -> None:
        now = time.monotonic()
        if problem != self._problem or now - self._said > SAID_AGAIN:
            self._problem, self._said = problem, now
            self.get_logger().error(f"no pose: {problem}")


def main() -> int:
    """Run the node."""
    return common.run(EePoseNode)


if __name__ == "__main__":
    sys.exit(main())
