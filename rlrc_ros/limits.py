"""What a command to an arm may be: speeds, accelerations, jerks, workspace, cone, ages."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlrc_ros.errors import UserError
from rlrc_ros.motion import Vector


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a command may be. Raises UserError where the numbers make no sense."""

    rate: float = 100.0
    """Hz, how often `Guard.step` is called."""
    base_frame: str = "base_link"
    """The only frame commands and poses are accepted in."""
    max_linear_speed: float = 0.25
    """m/s, length of the vector."""
    max_angular_speed: float = 1.0
    """rad/s, length of the vector."""
    max_linear_acceleration: float = 1.0
    """m/s², length of the vector; for braking too."""
    max_angular_acceleration: float = 4.0
    """rad/s², length of the vector; for braking too."""
    max_linear_jerk: float = 20.0
    """m/s³, length of the vector; inf: none. Delays every command by acceleration / jerk."""
    max_angular_jerk: float = 80.0
    """rad/s³, length of the vector; inf: none."""
    workspace_min: Vector | None = None
    """Lower corner of the box that the end effector stays in, in m; None: no box."""
    workspace_max: Vector | None = None
    """Upper corner."""
    cone_axis: Vector = (0.0, 0.0, -1.0)
    """Direction in the base frame that the end effector's z axis keeps to; down by default."""
    max_tilt: float = math.pi
    """rad, the greatest angle between the two; π: no cone."""
    pose_output: bool = False
    """The controller takes poses, which are counted from where the arm is."""
    pose_timeout: float = 0.1
    """s, the oldest pose that box and cone can be kept with."""
    command_timeout: float = 0.2
    """s of silence after which the arm is braked, where commands do not tell their period; those
    that do are waited for two periods, and `LONGEST_SILENCE` at most."""
    policy_lease: float = 0.025
    """s without a sign of life of a policy's process after which the arm is braked. The middleware
    sends those, whatever the policy is doing: `rlrc_ros.nodes.common.POLICY_QOS`."""
    max_command_age: float = 0.2
    """s between a command's stamp and now, either way."""
    max_observation_age: float = 1.0
    """s between the oldest sensor stamp that a command was computed from and now, either way."""
    controller_timeout: float = 0.1
    """s of silence after which the controller stops the arm by itself. A guard that was held up for
    so long begins from standstill."""
    max_gripper_rate: float = 2.0
    """1/s, full openings a second."""
    labels: tuple[str, ...] = ()
    """Policy labels that may command; empty: any label, but not none."""

    def __post_init__(self) -> None:
        """Refuse numbers that would guard nothing."""
        for name in (
            "rate",
            "max_linear_speed",
            "max_angular_speed",
            "max_linear_acceleration",
            "max_angular_acceleration",
            "max_linear_jerk",
            "max_angular_jerk",
            "pose_timeout",
            "command_timeout",
            "policy_lease",
            "max_command_age",
            "max_observation_age",
            "controller_timeout",
            "max_gripper_rate",
        ):
            value = getattr(self, name)
            if not (value > 0 and (math.isfinite(value) or name.endswith("jerk"))):
                raise UserError(f"{name} is {value}: it must be a number greater than 0")
        if not 0 < self.max_tilt <= math.pi:
            raise UserError(f"max_tilt is {self.max_tilt}: it must be an angle in (0, π] rad")
        if len(self.cone_axis) != 3 or not 1e-6 < math.hypot(*self.cone_axis) < math.inf:
            raise UserError(f"cone_axis is {list(self.cone_axis)}: it must be a direction x, y, z")
        if not self.base_frame:
            raise UserError("base_frame is empty: name the frame of the commands")
        if "" in self.labels:
            raise UserError("labels contains an empty label: list the labels, or leave it empty")
        if (self.workspace_min is None) != (self.workspace_max is None):
            raise UserError("workspace_min and workspace_max belong together: set both or neither")
        if self.workspace_min is not None and self.workspace_max is not None:
            corners = (self.workspace_min, self.workspace_max)
            if any(len(c) != 3 or not all(map(math.isfinite, c)) for c in corners):
                raise UserError("workspace_min and workspace_max take 3 finite numbers each, in m")
            if any(low >= high for low, high in zip(*corners, strict=True)):
                raise UserError(
                    f"workspace_min {list(self.workspace_min)} must be less than"
                    f" workspace_max {list(self.workspace_max)} on every axis"
                )

    @property
    def has_cone(self) -> bool:
        """Whether the end effector's orientation is limited."""
        return self.max_tilt < math.pi

    @property
    def needs_pose(self) -> bool:
        """Whether nothing may move while nobody knows where the arm is."""
        return self.workspace_min is not None or self.has_cone or self.pose_output
