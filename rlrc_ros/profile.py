"""A robot profile: what the nodes have to know of one arm, from `config/robots/NAME.yaml`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

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
    """s, of the image's stamp when the policy looks."""


@dataclass(frozen=True, kw_only=True)
class JointSource:
    """Joint states, the gripper's finger among them."""

    topic: str
    max_age: float = 0.1
    """s."""
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
    max_gripper_rate: float = 2.0

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
    """Topic of the end effector's geometry_msgs/PoseStamped, which the guard keeps in its box."""
    ee_command: str
    """Topic of the controller's geometry_msgs/TwistStamped."""
    gripper_command: str
    """Topic of the gripper's std_msgs/Float64MultiArray: 0 closed to 1 open."""
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
            _refuse_empty(f"{key}.topic", source.topic)
        for key in ("base_frame", "ee_pose", "ee_command", "gripper_command"):
            _refuse_empty(key, getattr(self, key))


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
