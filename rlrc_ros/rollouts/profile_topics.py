"""The topics of a robot profile: what a recording of that robot has to hold."""

from __future__ import annotations

from typing import NamedTuple

from rlrc_ros.profile import CameraSource, RobotProfile

OWN_TOPICS = (
    *("policy_command", "policy/status", "command_guard/status", "emergency_stop"),
    *("/diagnostics", "/tf", "/tf_static", "/robot_description", "/clock"),
)
"""Recorded with those of the profile where somebody publishes them."""


class ProfileTopic(NamedTuple):
    """A topic that a profile names."""

    topic: str
    """As the profile names it: relative to the robot's namespace, or absolute."""
    role: str
    """Its key in the profile."""
    type: str
    """As in sensor_msgs/msg/Image; empty where more than one will do."""
    max_age: float | None
    """s that the source may be silent; None where the profile sets no limit."""
    min_rate: float | None = None
    """Hz that it should keep; None like `max_age`."""


def profile_topics(profile: RobotProfile) -> list[ProfileTopic]:
    """The topics of a profile."""
    topics = [
        ProfileTopic(
            camera.topic, f"cameras.{name}", _image(camera), camera.max_age, camera.min_rate
        )
        for name, camera in profile.cameras.items()
    ]
    joints = profile.joint_states
    kind = "sensor_msgs/msg/JointState"
    topics.append(ProfileTopic(joints.topic, "joint_states", kind, joints.max_age, joints.min_rate))
    roles = ["ee_pose", "ee_command"]
    if profile.gripper_command_type == "array":
        roles.append("gripper_command")
    for role in roles:
        kind = "geometry_msgs/msg/PoseStamped" if role == "ee_pose" else ""
        topics.append(ProfileTopic(getattr(profile, role), role, kind, None))
    return topics


def _image(camera: CameraSource) -> str:
    return f"sensor_msgs/msg/{'CompressedImage' if camera.compressed else 'Image'}"
