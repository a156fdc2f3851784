"""What the robot's sensors send, as parameters name them, into an ObservationBuffer."""

from __future__ import annotations

import math
from functools import partial

from geometry_msgs.msg import PoseStamped
from rclpy.exceptions import NameValidationException
from rclpy.node import Node
from sensor_msgs.msg import CompressedImage, Image, JointState

from rlrc_ros.errors import UserError
from rlrc_ros.messages.observation import MAX_SKEW, ObservationBuffer
from rlrc_ros.nodes import common
from rlrc_ros.vla.config import BundleConfig

DEFAULT_AGE = 0.2
"""s, of an image whose camera names no limit."""


def listen(node: Node, base_frame: str) -> ObservationBuffer:
    """Declare the parameters `cameras`, `…_max_age` and `max_skew`, and subscribe.

    Not to the end effector's pose yet, which comes often and few policies take (`listen_as_asked`).

    Args:
        node: subscribes.
        base_frame: what that pose has to be in.

    Raises:
        UserError: one of them makes no sense.
    """
    cameras = common.texts(
        node, "cameras", "cameras, each as name=topic,raw|compressed,oldest age in s"
    )
    age = common.number(
        node, "joint_states_max_age", 0.1, "oldest joint state that will do, s", 0.001, 2.0
    )
    pose_age = common.number(
        node, "ee_pose_max_age", 0.1, "oldest end effector's pose that will do, s", 0.001, 2.0
    )
    skew = common.number(
        node, "max_skew", MAX_SKEW, "s between the parts of an observation", 0.001, 2
    )
    joints, pose = ObservationBuffer.JOINT_STATES, ObservationBuffer.EE_POSE
    max_age, kinds = {joints: age, pose: pose_age}, {}
    topics = {source: node.resolve_topic_name(source) for source in (joints, pose)}
    for text in cameras:
        name, _, rest = text.partition("=")
        topic, kind, oldest = (*rest.split(","), "", "")[:3]
        try:
            max_age[name] = float(oldest or DEFAULT_AGE)
            kinds[name] = {"raw": Image, "compressed": CompressedImage}[kind or "raw"]
            topics[name] = node.resolve_topic_name(topic)
            usable = name not in ("", joints, pose) and 0.0 < max_age[name] < math.inf
        except (KeyError, ValueError, RuntimeError, NameValidationException):
            usable = False
        if not usable:
            raise UserError(f"parameter cameras: '{text}' is not name=topic,raw|compressed,seconds")
    buffer = ObservationBuffer(max_age, topics, skew, base_frame)
    for name, kind in kinds.items():
        node.create_subscription(kind, topics[name], partial(buffer.add, name), common.CAMERA_QOS)
    node.create_subscription(
        JointState, "joint_states", partial(buffer.add, joints), common.SENSOR_QOS
    )
    return buffer


def listen_as_asked(node: Node, buffer: ObservationBuffer, config: BundleConfig) -> None:
    """Have the buffer hear the end effector's pose too, from the first policy on that takes it."""
    contract, topic = config.proprioception, node.resolve_topic_name("ee_pose")
    heard = any(subscription.topic_name == topic for subscription in node.subscriptions)
    if contract is None or not contract.ee_pose or heard:
        return
    add = partial(buffer.add, ObservationBuffer.EE_POSE)
    node.create_subscription(PoseStamped, "ee_pose", add, common.SENSOR_QOS)
