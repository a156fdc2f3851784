"""What stands between any policy and the arm: limits, watchdog and latched stop, without ROS.

`Guard.step` is called at a fixed rate and returns what the controller gets, or nothing. Its states:

- waiting: nobody has the arm and nothing is published, so that other motions (homing, a planner)
  can use the same controller. It begins so, and comes back to it.
- active: follows the commands of one policy in one episode.
- holding: no command for `command_timeout`, or no pose while there is a workspace. The arm is
  braked at the acceleration limit and kept still by zeros; after `HOLD_TIME` of standing in silence
  it is given up. Zeros have to be sent, because some controllers (ros2_control's forward
  controllers) go on with the last command they got; and have to end, because MoveIt Servo, fed
  with zeros, goes on commanding the present position against whoever moves the arm next.
- stopped: latched. Zeros until somebody releases it. An arm that was never moved gets nothing.

Times are seconds of a steady clock, positions m, speeds m/s and rad/s, all in `Limits.base_frame`.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from rlrc_ros.errors import UserError

Vector = tuple[float, float, float]
ZERO: Vector = (0.0, 0.0, 0.0)
_UNBOUNDED = ((-math.inf, math.inf),) * 3
# What each of three axes may use of a limit on the length of their vector.
_AXIS_SHARE = 1.0 / math.sqrt(3.0)
# m; farther than any wall that matters, and no overflow when squared.
_FAR = 1e6

WAITING, ACTIVE, HOLDING, STOPPED = "waiting", "active", "holding", "stopped"

HOLD_TIME = 0.5
"""How long zeros are sent to a standing arm after its policy has fallen silent, in s."""

REACTION_TIME = 0.05
"""How late an arm may follow a command, in s; it is braked that much earlier before a wall."""


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
    workspace_min: Vector | None = None
    """Lower corner of the box that the end effector stays in, in m; None: no box."""
    workspace_max: Vector | None = None
    """Upper corner."""
    pose_timeout: float = 0.1
    """s, the oldest pose that the box can be kept with."""
    command_timeout: float = 0.2
    """s of silence after which the arm is braked: two periods of a policy at 10 Hz."""
    max_command_age: float = 0.2
    """s between a command's stamp and now, either way."""
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
            "pose_timeout",
            "command_timeout",
            "max_command_age",
            "max_gripper_rate",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} is {value}: it must be a number greater than 0")
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


class Command(NamedTuple):
    """A policy's command as it arrived."""

    linear: Vector
    angular: Vector
    gripper: float
    """0 closed, 1 open."""
    age: float
    """s since its stamp; negative: the stamp is in the future."""
    frame_id: str
    policy_label: str
    episode_id: str
    publisher: str = ""
    """Tells publishers apart that claim the same label and episode; empty where that is unknown."""


class Pose(NamedTuple):
    """Where the end effector is."""

    position: Vector
    age: float
    """s since its stamp."""
    frame_id: str


class Output(NamedTuple):
    """What the controllers get."""

    linear: Vector
    angular: Vector
    gripper: float


@dataclass
class Counts:
    """Since the start; named as in rlrc/GuardStatus.

    Accepted, rejected and limited speeds count commands; the other limits count outputs.
    """

    accepted: int = 0
    rejected_not_finite: int = 0
    rejected_stale: int = 0
    rejected_frame: int = 0
    rejected_source: int = 0
    rejected_stopped: int = 0
    limited_linear_speed: int = 0
    limited_angular_speed: int = 0
    limited_acceleration: int = 0
    limited_workspace: int = 0
    limited_gripper: int = 0
    stops_on_silence: int = 0


class Guard:
    """Decides at every step what the controller gets.

    Every output is finite and within the speed limits; consecutive outputs differ by no more than
    the acceleration limits allow in the time between them, except at an emergency stop; and an arm
    that follows its outputs within `REACTION_TIME` does not leave the workspace. Where a measured
    pose jumps so that both cannot be had, the arm is braked at the acceleration limit.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.counts = Counts()
        self.state = WAITING
        self.reason = ""
        """Why it is not active; empty when it is."""
        self._command: Command | None = None
        self._command_time = -math.inf
        self._motion_time = -math.inf
        self._rejection = ""
        self._holder: tuple[str, str, str] | None = None
        self._pose: Pose | None = None
        self._pose_time = -math.inf
        self._output: Output | None = None
        self._step_time: float | None = None
        self._still_since: float | None = None
        self._stop_reason = ""
        self._emergency = False
        self._emergency_pressed = False
        # No more time than this counts between two outputs, or the arm would jump after a stall.
        self._reach_time = 1.0 / limits.rate + REACTION_TIME
        # Every velocity that may be still ahead of the arm at the stamp of a usable pose.
        window = math.ceil((limits.pose_timeout + REACTION_TIME) * limits.rate) + 1
        self._recent: deque[Vector] = deque([ZERO], maxlen=window)

    def submit(self, now: float, command: Command) -> str:
        """Take a command in; returns why it is dropped, empty where it is accepted."""
        if any(value != 0.0 for value in (*command.linear, *command.angular)):
            self._motion_time = now
        counter, self._rejection = self._refusal(command)
        if self._rejection:
            setattr(self.counts, counter, getattr(self.counts, counter) + 1)
            return self._rejection
        self.counts.accepted += 1
        self._holder = _source(command)
        self._command = self._slow_down(command)
        self._command_time = now
        self._still_since = None
        return ""

    def observe(self, now: float, pose: Pose) -> None:
        """Take a measured pose in."""
        self._pose, self._pose_time = pose, now

    def stop(self, reason: str) -> None:
        """Brake at the acceleration limit and stay so until released."""
        self._stop_reason = self._stop_reason or reason

    def emergency_stop(self, pressed: bool) -> None:
        """Zero at once where `pressed`, until released; letting go alone releases nothing."""
        self._emergency_pressed = pressed
        if pressed:
            self._emergency = True
            self._stop_reason = "emergency stop"

    def release(self, now: float) -> str:
        """End a latched stop; returns why it is refused, empty where the arm is free again."""
        if not self._stop_reason:
            return "nothing is stopped"
        if self._emergency_pressed:
            return "emergency_stop is still true"
        if self.moving:
            return "the arm is still being braked"
        if now - self._motion_time < self.limits.command_timeout:
            return "commands with speed are still coming in: end the episode first"
        self._stop_reason = self._rejection = ""
        self._emergency = False
        self._give_up()
        self.state, self.reason = WAITING, ""
        return ""

    @property
    def moving(self) -> bool:
        """Whether the last output had any speed."""
        output = self._output
        return output is not None and (output.linear != ZERO or output.angular != ZERO)

    def step(
        self, now: float, command: Command | None = None, pose: Pose | None = None
    ) -> Output | None:
        """What the controllers get now; None: nothing.

        Args:
            now: Steady clock, in s.
            command: A command that came since the last step; the same as `submit` before it.
            pose: A pose that came since the last step; the same as `observe` before it.
        """
        if pose is not None:
            self.observe(now, pose)
        if command is not None:
            self.submit(now, command)
        elapsed = 1.0 / self.limits.rate if self._step_time is None else now - self._step_time
        self._step_time = now
        self.state, self.reason = self._judge(now)
        if self.state == WAITING or (self._output is None and self.state != ACTIVE):
            return None
        self._output = self._next(now, dt=min(max(elapsed, 0.0), self._reach_time))
        self._recent.append(self._output.linear)
        return self._output

    def _refusal(self, command: Command) -> tuple[str, str]:
        """The counter and the reason of a command that is to be dropped."""
        limits = self.limits
        label, episode = command.policy_label, command.episode_id
        if not all(map(math.isfinite, (*command.linear, *command.angular, command.gripper))):
            return "rejected_not_finite", "the command is not finite"
        if command.frame_id != limits.base_frame:
            frames = f"{command.frame_id!r}, not {limits.base_frame!r}"
            return "rejected_frame", f"the command is in frame {frames}"
        if not abs(command.age) <= limits.max_command_age:
            return "rejected_stale", f"the command's stamp is {command.age:.3g} s old"
        if not label or not episode:
            return "rejected_source", "the command has no policy_label or no episode_id"
        if limits.labels and label not in limits.labels:
            return "rejected_source", f"policy label {label!r} is not among the allowed labels"
        if self._holder is not None and _source(command) != self._holder:
            _, holder, held = self._holder
            second = "another publisher" if (label, episode) == (holder, held) else repr(label)
            return "rejected_source", f"{second} commands while {holder!r} has the arm in {held!r}"
        if self._stop_reason:
            return "rejected_stopped", self._stop_reason
        return "", ""

    def _slow_down(self, command: Command) -> Command:
        """The command within the speed limits; one factor for both parts keeps its path."""
        linear, angular = math.hypot(*command.linear), math.hypot(*command.angular)
        factor = 1.0
        if linear > self.limits.max_linear_speed:
            self.counts.limited_linear_speed += 1
            factor = self.limits.max_linear_speed / linear
        if angular > self.limits.max_angular_speed:
            self.counts.limited_angular_speed += 1
            factor = min(factor, self.limits.max_angular_speed / angular)
        gripper = min(max(command.gripper, 0.0), 1.0)
        self.counts.limited_gripper += gripper != command.gripper
        return command._replace(
            linear=_scaled(command.linear, factor),
            angular=_scaled(command.angular, factor),
            gripper=gripper,
        )

    def _judge(self, now: float) -> tuple[str, str]:
        """The state this step is in, and why."""
        if self._stop_reason:
            return STOPPED, self._stop_reason
        if self._command is None:
            return WAITING, self._rejection
        if now - self._command_time > self.limits.command_timeout:
            return self._hold_in_silence(now)
        if missing := self._missing_pose(now):
            return (WAITING if self._output is None else HOLDING), missing
        return ACTIVE, ""

    def _hold_in_silence(self, now: float) -> tuple[str, str]:
        reason = f"no command for {self.limits.command_timeout:g} s"
        if self.moving:
            self.counts.stops_on_silence += self.state == ACTIVE
            return HOLDING, reason
        # A standing arm may be taken over by another policy or episode, and is given up in the end.
        self._holder = None
        if self._still_since is None:
            self._still_since = now
        if self._output is None or now - self._still_since >= HOLD_TIME:
            self._give_up()
            return WAITING, reason
        return HOLDING, reason

    def _give_up(self) -> None:
        self._command = self._holder = self._still_since = None

    def _pose_age(self, now: float) -> float:
        return now - self._pose_time + (self._pose.age if self._pose is not None else math.inf)

    def _missing_pose(self, now: float) -> str:
        """Why the workspace cannot be kept; empty where it can, or where there is none."""
        if self.limits.workspace_min is None:
            return ""
        if self._pose is None:
            return "no ee_pose yet, and there is a workspace to keep"
        if self._pose.frame_id != self.limits.base_frame:
            return f"ee_pose is in frame {self._pose.frame_id!r}, not {self.limits.base_frame!r}"
        if not all(map(math.isfinite, self._pose.position)):
            return "ee_pose is not finite"
        age = self._pose_age(now)
        if not abs(age) <= self.limits.pose_timeout:
            return f"ee_pose is older than {self.limits.pose_timeout:g} s, or of the future"
        return ""

    def _next(self, now: float, dt: float) -> Output:
        """The output after the last one, `dt` s later."""
        limits = self.limits
        linear, angular, gripper = self._output or Output(ZERO, ZERO, math.nan)
        # The gripper keeps its width while the arm stops: it may be holding something.
        if self._emergency:
            return Output(ZERO, ZERO, gripper)
        to_linear = to_angular = ZERO
        if self.state == ACTIVE and self._command is not None:
            to_linear, to_angular = self._command.linear, self._command.angular
            gripper = self._grip(gripper, self._command.gripper, dt)
        bounds = self._velocity_bounds(now)
        allowed = _clamped(to_linear, bounds)
        self.counts.limited_workspace += allowed != to_linear
        linear_now = _toward(linear, allowed, bounds, limits.max_linear_acceleration * dt)
        angular_now = _toward(angular, to_angular, _UNBOUNDED, limits.max_angular_acceleration * dt)
        self.counts.limited_acceleration += linear_now != allowed or angular_now != to_angular
        return Output(linear_now, angular_now, gripper)

    def _grip(self, last: float, wanted: float, dt: float) -> float:
        if math.isnan(last):  # nobody knows yet how far it is open
            return wanted
        change = self.limits.max_gripper_rate * dt
        gripper = min(max(wanted, last - change), last + change)
        self.counts.limited_gripper += gripper != wanted
        return gripper

    def _velocity_bounds(self, now: float) -> tuple[tuple[float, float], ...]:
        """The least and the greatest velocity of each axis that can be braked before the wall."""
        low, high = self.limits.workspace_min, self.limits.workspace_max
        if low is None or high is None or self._pose is None or self._missing_pose(now):
            return _UNBOUNDED
        # What was commanded since the pose's stamp, and a little before, may be still to come.
        pending = max(self._pose_age(now), 0.0) + REACTION_TIME
        bounds = []
        for axis, position in enumerate(self._pose.position):
            velocities = [velocity[axis] for velocity in self._recent]
            up = high[axis] - position - pending * max(0.0, *velocities)
            down = position - low[axis] - pending * max(0.0, -min(velocities))
            bounds.append((-self._fastest(down), self._fastest(up)))
        return tuple(bounds)

    def _fastest(self, distance: float) -> float:
        """The greatest speed v towards a wall with v·t + v²/(2a) ≤ distance.

        t is the time until the next output, a the deceleration that is left to one axis where all
        three brake at once.
        """
        if distance <= 0.0:
            return 0.0
        t, a = self._reach_time, self.limits.max_linear_acceleration * _AXIS_SHARE
        distance = min(distance, _FAR)
        return 2.0 * distance / (t + math.sqrt(t * t + 2.0 * distance / a))


def _source(command: Command) -> tuple[str, str, str]:
    return command.publisher, command.policy_label, command.episode_id


def _scaled(vector: Vector, factor: float) -> Vector:
    return vector[0] * factor, vector[1] * factor, vector[2] * factor


def _clamped(vector: Vector, bounds: tuple[tuple[float, float], ...]) -> Vector:
    x, y, z = (
        min(max(value, low), high) for value, (low, high) in zip(vector, bounds, strict=True)
    )
    return x, y, z


def _toward(
    last: Vector, goal: Vector, bounds: tuple[tuple[float, float], ...], change: float
) -> Vector:
    """From `last` towards `goal`, which is within `bounds`, by no more than `change` in length.

    What it takes to get back within the bounds comes first; the way to the goal gets what is left.
    """
    share = change * _AXIS_SHARE
    must = [
        min(max(inside - value, -share), share)
        for value, inside in zip(last, _clamped(last, bounds), strict=True)
    ]
    start = [value + step for value, step in zip(last, must, strict=True)]
    way = [to - value for value, to in zip(start, goal, strict=True)]
    # The greatest s in [0, 1] with |must + s·way| ≤ change.
    way2 = sum(w * w for w in way)
    along = sum(m * w for m, w in zip(must, way, strict=True))
    left = max(change * change - sum(m * m for m in must), 0.0)
    if way2 + 2.0 * along <= left:
        return goal
    s = (math.sqrt(along * along + way2 * left) - along) / way2
    x, y, z = (value + s * w for value, w in zip(start, way, strict=True))
    return x, y, z
