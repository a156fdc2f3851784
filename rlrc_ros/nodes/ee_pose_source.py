"""Where the end effector is, for arms whose drivers do not say: from joint states or from tf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from geometry_msgs.msg import PoseStamped
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import JointState
from std_msgs.msg import String

from rlrc_ros.errors import UserError
from rlrc_ros.kinematics import Chain
from rlrc_ros.messages.joint_state import ordered_positions
from rlrc_ros.messages.stamps import to_nanoseconds, to_stamp
from rlrc_ros.motion import Quaternion, Vector
from rlrc_ros.nodes import common
from rlrc_ros.transforms import Frames, Transform

SOURCES = ("joint_states", "tf")

Take = Callable[[PoseStamped], None]
Complain = Callable[[str], None]

_TF_QOS = QoSProfile(depth=100)
_TF_STATIC_QOS = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
"""As tf2_ros listens."""


def listen(
    node: Node,
    source: str,
    base: str,
    tool: str,
    take: Take,
    complain: Complain,
    joint_states: str = "joint_states",
) -> None:
    """Subscribe, and hand on the tool's pose in the base whenever there is a new one.

    Args:
        node: subscribes.
        source: one of SOURCES.
        base: the frame poses are given in.
        tool: the frame whose pose it is.
        take: gets each pose. Its stamp is the joint state's, or the latest at which tf knows all
            frames between the two.
        complain: gets the reason, each time that there is none.
        joint_states: their topic.

    Raises:
        UserError: there is no such source, or what it takes is not installed.
    """
    if source not in SOURCES:
        raise UserError(f"parameter source is '{source}'; it must be {' or '.join(SOURCES)}")
    if source == "tf":
        _Tf(node, base, tool, take, complain)
    else:
        _Kinematics(node, base, tool, take, complain, joint_states)


def _pose(frame: str, stamp: Any, position: Vector, orientation: Quaternion) -> PoseStamped:
    pose = PoseStamped()
    pose.header.stamp, pose.header.frame_id = stamp, frame
    place, q = pose.pose.position, pose.pose.orientation
    place.x, place.y, place.z = position
    q.x, q.y, q.z, q.w = orientation
    return pose


class _Kinematics:
    """From joint states and the URDF on `robot_description`."""

    def __init__(
        self, node: Node, base: str, tool: str, take: Take, complain: Complain, joint_states: str
    ) -> None:
        self._node, self._base, self._tool = node, base, tool
        self._take, self._complain = take, complain
        self._chain: Chain | None = None
        node.create_subscription(
            String, "robot_description", self._on_description, common.LATCHED_QOS
        )
        node.create_subscription(JointState, joint_states, self._on_joints, common.SENSOR_QOS)

    def _on_description(self, message: String) -> None:
        try:
            self._chain = Chain(message.data, self._base, self._tool)
        except UserError as error:
            self._chain = None
            self._complain(str(error))
        else:
            self._node.get_logger().info(f"{self._tool} by {', '.join(self._chain.names)}")

    def _on_joints(self, message: JointState) -> None:
        if self._chain is None:
            return
        names = self._chain.names
        if names and not set(names) & set(message.name):  # the gripper's own joint states
            return
        try:
            values = ordered_positions(message, names)
        except UserError as error:
            self._complain(str(error))
            return
        where = self._chain.pose(dict(zip(names, values.tolist(), strict=True)))
        self._take(_pose(self._base, message.header.stamp, *where))


class _Tf:
    """From the transforms on /tf and /tf_static."""

    def __init__(self, node: Node, base: str, tool: str, take: Take, complain: Complain) -> None:
        try:
            from tf2_msgs.msg import TFMessage
        except ImportError:
            raise UserError(
                "tf2_msgs is not installed; apt install ros-$ROS_DISTRO-tf2-msgs"
            ) from None
        self._base, self._frames = base, Frames(base, tool)
        self._take, self._complain = take, complain
        self._last_ns = 0
        node.create_subscription(TFMessage, "/tf_static", self._on_static, _TF_STATIC_QOS)
        node.create_subscription(TFMessage, "/tf", self._on_moving, _TF_QOS)

    def _on_static(self, message: Any) -> None:
        self._add(message, static=True)

    def _on_moving(self, message: Any) -> None:
        self._add(message, static=False)
        try:
            stamp_ns, position, orientation = self._frames.pose()
        except UserError as error:
            self._complain(str(error))
            return
        if stamp_ns != self._last_ns:
            self._last_ns = stamp_ns
            self._take(_pose(self._base, to_stamp(stamp_ns), position, orientation))

    def _add(self, message: Any, static: bool) -> None:
        for stamped in message.transforms:
            place, q = stamped.transform.translation, stamped.transform.rotation
            transform = Transform(
                to_nanoseconds(stamped.header.stamp),
                (place.x, place.y, place.z),
                (q.x, q.y, q.z, q.w),
            )
            try:
                self._frames.add(stamped.header.frame_id, stamped.child_frame_id, transform, static)
            except UserError as error:
                self._complain(str(error))
