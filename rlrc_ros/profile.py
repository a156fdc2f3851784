"""A robot profile: what the nodes have to know of one arm, from `config/robots/NAME.yaml`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rlrc_ros.errors import UserError
from rlrc_ros.limits import Limits
from rlrc_ros.paths import config_file
from rlrc_ros.schema import from_dict, read_yaml


@dataclass(frozen=True, kw_only=True)
class CameraSource:
    """A camera, by the name that policies call it."""

    topic: str
    compressed: bool = False
    """sensor_msgs/CompressedImage instead of Image."""
    max_age: float = 0.2
    """s, of the image's stamp when the policy looks; older, and the step is skipped."""
    min_rate: float = 10.0
    """Hz; `rlrc robot check` complains of fewer."""


@dataclass(frozen=True, kw_only=True)
class JointSource:
    """Joint states, the gripper's finger among them."""

    topic: str
    """Of sensor_msgs/JointState with all joints that the policies were trained with."""
    max_age: float = 0.1
    """s, of the message's stamp when the policy looks."""
    min_rate: float = 20.0
    """Hz; `rlrc robot check` complains of fewer."""
    gripper_joint: str
    """The joint that tells the gripper's opening."""
    gripper_closed: float
    """Its position when closed, m or rad."""
    gripper_open: float
    """Its position when open."""

    def __post_init__(self) -> None:
        for name in ("gripper_closed", "gripper_open"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"joint_states.{name} is {getattr(self, name)}: give a number")
        if self.gripper_open == self.gripper_closed:
            raise UserError("joint_states: gripper_open and gripper_closed must differ")


@dataclass(frozen=True, kw_only=True)
class GuardLimits:
    """Parameters of the command guard; what they mean: `rlrc_ros.guard.Limits`."""

    max_linear_speed: float
    max_angular_speed: float
    max_linear_acceleration: float
    max_angular_acceleration: float
    workspace_min: tuple[float, ...]
    workspace_max: tuple[float, ...]
    max_linear_jerk: float = Limits.max_linear_jerk
    max_angular_jerk: float = Limits.max_angular_jerk
    cone_axis: tuple[float, ...] = Limits.cone_axis
    max_tilt: float = Limits.max_tilt
    max_gripper_rate: float = Limits.max_gripper_rate
    controller_timeout: float = Limits.controller_timeout
    policy_lease: float = Limits.policy_lease
    """s; longer where the policy node is on another machine than the guard."""

    def __post_init__(self) -> None:
        try:
            Limits(**vars(self))
        except UserError as error:
            raise UserError(f"guard: {error}") from None


@dataclass(frozen=True, kw_only=True)
class RobotProfile:
    """One arm, its sensors and its controller."""

    name: str
    base_frame: str
    """Frame of end-effector commands and poses."""
    cameras: dict[str, CameraSource]
    joint_states: JointSource
    ee_pose: str
    """Topic of the end effector's geometry_msgs/PoseStamped in `base_frame`: the guard keeps it in
    its box, and policies that take the end effector's pose take this one, which therefore has to
    be of the same point, along the same axes, as in their training data."""
    ee_pose_max_age: float = 0.1
    """s, of the pose's stamp when a policy that takes it looks; older, and the step is skipped."""
    ee_frame: str = ""
    """The frame whose pose `ee_pose_node` is to publish there, where the driver gives none; empty:
    it does."""
    ee_pose_source: Literal["joint_states", "tf"] = "joint_states"
    """What that pose is computed from: joint_states, with the URDF on robot_description; or tf, the
    transforms between `base_frame` and `ee_frame` on /tf and /tf_static, for frames that the URDF
    has not, such as a calibrated tool's."""
    ee_command: str
    """Topic of the arm's Cartesian controller."""
    ee_command_type: Literal["twist", "pose"] = "twist"
    """geometry_msgs/TwistStamped in m/s and rad/s, or PoseStamped; both in base_frame."""
    gripper_command: str
    """Topic of the gripper's std_msgs/Float64MultiArray, one number; or its action's name."""
    gripper_command_type: Literal["array", "action"] = "array"
    """action: control_msgs/action/GripperCommand, as ros2_control's GripperActionController and the
    drivers of many grippers offer it; goals are sent where the opening changes, 10 a second at
    most. For one that does each goal at leisure set `guard.max_gripper_rate` so high (100.0) that
    one goal closes it."""
    gripper_max_effort: float = 0.0
    """Of the action's goals, N or Nm, as its driver has it; 0 is no limit for most of them."""
    gripper_command_closed: float = 0.0
    """The number that closes the gripper: m, rad or a share, as its controller has it."""
    gripper_command_open: float = 1.0
    """The number that opens it."""
    max_skew: float = 0.15
    """s between the stamps of an observation's parts; more, and the step is skipped."""
    guard: GuardLimits
    simulated: bool = False
    """Start the simulated arm as well."""
    policies: dict[str, str] = field(default_factory=dict)
    """Bundles by label, loaded when the policy node is configured."""

    def __post_init__(self) -> None:
        if not self.cameras:
            raise UserError("cameras: name at least one")
        sources: dict[str, CameraSource | JointSource] = {"joint_states": self.joint_states}
        sources |= {f"cameras.{name}": camera for name, camera in self.cameras.items()}
        for key, source in sources.items():
            if not 0.0 < source.max_age < math.inf:
                raise UserError(f"{key}.max_age is {source.max_age}: it must be s greater than 0")
            if not 0.0 < source.min_rate < math.inf:
                raise UserError(f"{key}.min_rate is {source.min_rate}: it must be Hz above 0")
            _refuse_empty(f"{key}.topic", source.topic)
        for key in ("base_frame", "ee_pose", "ee_command", "gripper_command"):
            _refuse_empty(key, getattr(self, key))
        if self.ee_pose_source == "tf" and not self.ee_frame.strip():
            raise UserError("ee_frame is empty: ee_pose_source tf needs the tool's frame")
        if not 0.0 < self.ee_pose_max_age <= 2.0:
            age = self.ee_pose_max_age
            raise UserError(f"ee_pose_max_age is {age}: it must be s above 0 and at most 2")
        if not 0.0 < self.max_skew <= 2.0:
            raise UserError(f"max_skew is {self.max_skew}: it must be s above 0 and at most 2")
        closed, opened = self.gripper_command_closed, self.gripper_command_open
        if not (math.isfinite(closed) and math.isfinite(opened)) or closed == opened:
            raise UserError("gripper_command_open and gripper_command_closed must be two numbers")
        if not 0.0 <= self.gripper_max_effort <= 1000.0:
            raise UserError(f"gripper_max_effort is {self.gripper_max_effort}: give 0 to 1000")
        if self.simulated and self.gripper_command_type != "array":
            raise UserError("gripper_command_type: the simulated arm takes an array, on a topic")


def _refuse_empty(key: str, value: str) -> None:
    if not value.strip():
        raise UserError(f"{key} is empty")


def load_profile(name: str | Path) -> RobotProfile:
    """A profile by path, or by the name of one of the package's own.

    Raises:
        UserError: naming the file, the key and what is wrong.
    """
    file = config_file("robots", name)
    return from_dict(RobotProfile, read_yaml(file), str(file))
