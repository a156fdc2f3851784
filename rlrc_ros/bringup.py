"""A robot profile as the list of nodes to start, with parameters and remappings.

The launch files hand the list to launch_ros; where `launch` is not installed (`rlrc demo`, the
tests) the same list is started as plain processes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlrc_ros.profile import RobotProfile

TRANSPORT_ENVIRONMENT = {
    "FASTDDS_BUILTIN_TRANSPORTS": "LARGE_DATA?max_msg_size=4MB&sockets_size=4MB"
}
"""Has to be set in every process that sends or receives images, or Fast DDS drops most of them.

ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST undoes it: rmw_fastrtps then chooses the transports itself.
"""


@dataclass
class NodeSpec:
    """One node to start.

    Attributes:
        executable: as `ros2 run rlrc` knows it.
        parameters: ROS parameters by name.
        remappings: topics by the name that the node uses.
    """

    executable: str
    parameters: dict[str, Any] = field(default_factory=dict)
    remappings: dict[str, str] = field(default_factory=dict)

    def command(self) -> list[str]:
        """The process's command line, with the executables beside this interpreter."""
        words = [str(Path(sys.executable).parent / self.executable), "--ros-args"]
        for name, value in self.parameters.items():
            # JSON is YAML, which is what rcl reads parameters as.
            words += ["-p", f"{name}:={json.dumps(value)}"]
        for name, other in self.remappings.items():
            words += ["-r", f"{name}:={other}"]
        return words


def process_environment() -> dict[str, str]:
    """Environment variables for a node's process."""
    return {**os.environ, **TRANSPORT_ENVIRONMENT}


def nodes(
    profile: RobotProfile,
    *,
    output_dir: str,
    policies: Mapping[str, str] | None = None,
    record_topics: list[str] | None = None,
    dry_run: bool = False,
) -> list[NodeSpec]:
    """The nodes of a robot.

    Args:
        profile: the robot.
        output_dir: where recordings go.
        policies: bundles by label, instead of the profile's own.
        record_topics: what to record; None: every topic.
        dry_run: the guard sends nothing to the controllers.
    """
    joints, limits = profile.joint_states, profile.guard
    policies = profile.policies if policies is None else policies
    specs = []
    if profile.simulated:
        camera = next(iter(profile.cameras.values()))
        specs.append(
            NodeSpec(
                "sim_arm_node",
                {"base_frame": profile.base_frame},
                {
                    "image_raw": camera.topic,
                    "joint_states": joints.topic,
                    "ee_pose": profile.ee_pose,
                    "ee_command": profile.ee_command,
                    "gripper_command": profile.gripper_command,
                },
            )
        )
    specs.append(
        NodeSpec(
            "command_guard_node",
            {
                "base_frame": profile.base_frame,
                "max_linear_speed": limits.max_linear_speed,
                "max_angular_speed": limits.max_angular_speed,
                "max_linear_acceleration": limits.max_linear_acceleration,
                "max_angular_acceleration": limits.max_angular_acceleration,
                "workspace_min": list(limits.workspace_min),
                "workspace_max": list(limits.workspace_max),
                "max_gripper_rate": limits.max_gripper_rate,
                "dry_run": dry_run,
            },
            {
                "ee_pose": profile.ee_pose,
                "ee_command": profile.ee_command,
                "gripper_command": profile.gripper_command,
            },
        )
    )
    recorded = {"topics": record_topics} if record_topics else {}
    specs.append(NodeSpec("recorder_node", {"output_dir": output_dir, **recorded}))
    specs.append(
        NodeSpec(
            "policy_node",
            {
                "base_frame": profile.base_frame,
                "policies": [f"{label}={path}" for label, path in policies.items()],
                "cameras": [_camera(name, source) for name, source in profile.cameras.items()],
                "joint_states_max_age": joints.max_age,
                "gripper_joint": joints.gripper_joint,
                "gripper_closed": joints.gripper_closed,
                "gripper_open": joints.gripper_open,
                "autostart": True,
            },
            {"joint_states": joints.topic},
        )
    )
    return specs


def _camera(name: str, source: Any) -> str:
    kind = "compressed" if source.compressed else "raw"
    return f"{name}={source.topic},{kind},{source.max_age}"
