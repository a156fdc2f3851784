"""A robot profile as the list of nodes to start, with parameters and remappings.

The launch files hand the list to launch_ros; where `launch` is not installed (`rlrc demo`, the
tests) the same list is started as plain processes.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rlrc_ros.errors import UserError
from rlrc_ros.profile import RobotProfile

# Fast DDS 3 (Kilted) calls it by another name than 2 (Jazzy), and warns of the old one.
_PROFILES = "FASTRTPS" if os.environ.get("ROS_DISTRO") == "jazzy" else "FASTDDS"
TRANSPORT_ENVIRONMENT = {
    f"{_PROFILES}_DEFAULT_PROFILES_FILE": str(Path(__file__).with_name("fastdds.xml")),
    "RMW_FASTRTPS_USE_QOS_FROM_XML": "1",  # of what it says on memory; ROS's own QoS stays
}
"""Has to be set in every process that sends images, or Fast DDS drops most of them.

The profile gives each process enough shared memory for images, and lets go of what readers have
taken. Fast DDS's own answer to the first, FASTDDS_BUILTIN_TRANSPORTS=LARGE_DATA, adds TCP channels:
with 3.2 about one start in a hundred never finds its peers, and then deadlocks at exit.
ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST undoes the profile: rmw_fastrtps then chooses the transports
itself.
"""


@dataclass
class NodeSpec:
    """One node to start.

    Attributes:
        executable: as `ros2 run rlrc` knows it.
        parameters: ROS parameters by name.
        remappings: topics by the name that the node uses.
        enclave: of SROS 2, from which it takes its keys; empty: none.
    """

    executable: str
    parameters: dict[str, Any] = field(default_factory=dict)
    remappings: dict[str, str] = field(default_factory=dict)
    enclave: str = ""

    def command(self) -> list[str]:
        """The command line of a plain process.

        Raises:
            UserError: the executable is not installed.
        """
        return [str(_executable(self.executable)), "--ros-args", *self.ros_arguments()]

    def ros_arguments(self) -> list[str]:
        """Enclave, parameters and remappings as they follow `--ros-args`."""
        words = ["--enclave", self.enclave] if self.enclave else []
        for name, value in self.parameters.items():
            # JSON is YAML, which is what rcl reads parameters as.
            words += ["-p", f"{name}:={json.dumps(value)}"]
        for name, other in self.remappings.items():
            words += ["-r", f"{name}:={other}"]
        return words


def _executable(name: str) -> Path:
    """A node beside the command that runs, as in lib/rlrc of a workspace, or beside Python."""
    directories = [Path(sys.argv[0]).resolve().parent, Path(sys.executable).parent]
    for directory in directories:
        if (path := directory / name).is_file():
            return path
    raise UserError(f"{name} is neither in {directories[0]} nor in {directories[1]}; install rlrc")


def nodes(
    profile: RobotProfile,
    *,
    output_dir: str,
    policies: Mapping[str, str] | None = None,
    sealed: str = "",
    record_topics: list[str] | None = None,
    dry_run: bool = False,
    device: str = "cpu",
    use_sim_time: bool = False,
    enclave: str = "",
) -> list[NodeSpec]:
    """The nodes of a robot.

    Args:
        profile: the robot.
        output_dir: where recordings go.
        policies: bundles by label, instead of the profile's own.
        sealed: file with the policies of a blinded trial, instead of either.
        record_topics: what to record; None: every topic.
        dry_run: the guard sends nothing to the controllers.
        device: where policies run, as torch names it.
        use_sim_time: stamps are of the topic /clock.
        enclave: where the nodes' own enclaves are, as /rlrc has /rlrc/command_guard; empty: none.

    Raises:
        UserError: the enclave is no absolute name.
    """
    if enclave and not re.fullmatch(r"(/[A-Za-z_]\w*)+", enclave, re.ASCII):
        raise UserError(f"enclave: '{enclave}' is no absolute name such as /rlrc")
    joints, limits = profile.joint_states, profile.guard
    # Actions cannot be remapped.
    by_action = profile.gripper_command_type == "action"
    action = {"gripper_action": profile.gripper_command} if by_action else {}
    policies = profile.policies if policies is None else policies
    blinded = {"sealed": sealed} if sealed else {}
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
    if profile.ee_frame:
        specs.append(
            NodeSpec(
                "ee_pose_node",
                {
                    "base_frame": profile.base_frame,
                    "ee_frame": profile.ee_frame,
                    "source": profile.ee_pose_source,
                },
                {"joint_states": joints.topic, "ee_pose": profile.ee_pose},
            )
        )
    specs.append(
        NodeSpec(
            "command_guard_node",
            {
                "base_frame": profile.base_frame,
                "output": profile.ee_command_type,
                "gripper_command_closed": profile.gripper_command_closed,
                "gripper_command_open": profile.gripper_command_open,
                "gripper_max_effort": profile.gripper_max_effort,
                **action,
                **{
                    name: list(value) if isinstance(value, tuple) else value
                    for name, value in vars(limits).items()
                },
                "dry_run": dry_run,
            },
            {
                "ee_pose": profile.ee_pose,
                "ee_command": profile.ee_command,
                "gripper_command": profile.gripper_command,
            },
        )
    )
    # Without the policies: their paths would tell who is who in a blinded trial.
    robot = json.dumps(asdict(replace(profile, policies={})))
    recorded: dict[str, Any] = {"profile": robot}
    recorded |= {"topics": record_topics} if record_topics else {}
    specs.append(NodeSpec("recorder_node", {"output_dir": output_dir, **recorded}))
    specs.append(
        NodeSpec(
            "policy_node",
            {
                "base_frame": profile.base_frame,
                "device": device,
                "policies": [] if sealed else [f"{k}={path}" for k, path in policies.items()],
                **blinded,
                "cameras": [_camera(name, source) for name, source in profile.cameras.items()],
                "joint_states_max_age": joints.max_age,
                "ee_pose_max_age": profile.ee_pose_max_age,
                "max_skew": profile.max_skew,
                "gripper_joint": joints.gripper_joint,
                "gripper_closed": joints.gripper_closed,
                "gripper_open": joints.gripper_open,
                "autostart": True,
            },
            {"joint_states": joints.topic, "ee_pose": profile.ee_pose},
        )
    )
    if use_sim_time:
        for spec in specs:
            spec.parameters["use_sim_time"] = True
    if enclave:
        for spec in specs:
            spec.enclave = f"{enclave}/{spec.executable.removesuffix('_node')}"
    return specs


def _camera(name: str, source: Any) -> str:
    kind = "compressed" if source.compressed else "raw"
    return f"{name}={source.topic},{kind},{source.max_age}"
