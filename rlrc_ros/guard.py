"""What stands between any policy and the arm: limits, watchdog and latched stop, without ROS.

`Guard.step` is called at a fixed rate and returns what the controller gets, or nothing. Its states:

- waiting: nobody has the arm and nothing is published, so that other motions (homing, a planner)
  can use the same controller. It begins so, and comes back to it.
- active: follows the commands of one policy in one episode.
- holding: no command for two of the policy's periods, no sign of life of a policy's process, or no
  pose while one is needed. The arm is braked at the acceleration limit and kept still by zeros;
  after `HOLD_TIME` of standing in silence it is given up. Zeros have to be sent, because some
  controllers (ros2_control's forward controllers) go on with the last command they got; and have to
  end, because MoveIt Servo, fed with zeros, goes on commanding the present position against whoever
  moves the arm next.
- stopped: latched. Zeros until somebody releases it. An arm that was never moved gets nothing.

Times are seconds of a steady clock, positions m, speeds m/s and rad/s, all in `Limits.base_frame`.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from rlrc_ros.limits import Limits
from rlrc_ros.motion import (
    AXIS_SHARE,
    UNBOUNDED,
    ZERO,
    Bounds,
    MovingAverage,
    Quaternion,
    Vector,
    added,
    angle_between,
    clamped,
    cross,
    dot,
    pose_problem,
    rotated,
    scaled,
    toward,
    z_axis,
)

# m; farther than any wall that matters, and no overflow when squared.
_FAR = 1e6

WAITING, ACTIVE, HOLDING, STOPPED = "waiting", "active", "holding", "stopped"

LONGEST_SILENCE = 0.5
"""s; no policy is so slow that the arm goes on for longer than this without a command."""

HOLD_TIME = 0.5
"""How long zeros are sent to a standing arm after its policy has fallen silent, in s."""

REACTION_TIME = 0.05
"""How late an arm may follow a command, in s; it is braked that much earlier before a wall."""


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
    observation_age: float = 0.0
    """s since the oldest sensor stamp that it was computed from."""
    period: float = 0.0
    """s until the next one is due; 0 where that is unknown."""


class Pose(NamedTuple):
    """Where the end effector is."""

    position: Vector
    age: float
    """s since its stamp."""
    frame_id: str
    orientation: Quaternion = (0.0, 0.0, 0.0, 1.0)
    """Its z axis is what the cone is about."""


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
    limited_jerk: int = 0
    limited_workspace: int = 0
    limited_orientation: int = 0
    limited_gripper: int = 0
    stops_on_silence: int = 0
    liveliness_lost: int = 0
    stalls: int = 0


class Guard:
    """Decides at every step what the controller gets.

    Every output is finite and within the speed limits; outputs change by no more than acceleration
    and jerk allow in the time between them, except at an emergency stop or after a stall, when they
    are zero at once; and an arm that follows its outputs within `REACTION_TIME` leaves neither the
    workspace nor the cone. Where a measured pose jumps so that not all can be had, the arm is
    braked at the acceleration limit.
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
        self._alive = True
        self._rejection = ""
        self._holder: tuple[str, str, str] | None = None
        self._pose: Pose | None = None
        self._pose_time = -math.inf
        self._output: Output | None = None
        self._step_time: float | None = None
        self._still_since: float | None = None
        self._linear = MovingAverage(2 * limits.max_linear_acceleration / limits.max_linear_jerk)
        self._angular = MovingAverage(2 * limits.max_angular_acceleration / limits.max_angular_jerk)
        self._stop_reason = ""
        self._emergency = False
        self._emergency_pressed = False
        # No more time than this counts between two outputs, or the arm would jump after a stall.
        self._reach_time = 1.0 / limits.rate + REACTION_TIME
        # Every velocity that may be still ahead of the arm at the stamp of a usable pose.
        window = math.ceil((limits.pose_timeout + REACTION_TIME) * limits.rate) + 1
        self._recent: deque[tuple[Vector, Vector]] = deque([(ZERO, ZERO)], maxlen=window)

    def submit(self, now: float, command: Command) -> str:
        """Take a command in; returns why it is dropped, empty where it is accepted."""
        if any(value != 0.0 for value in (*command.linear, *command.angular)):
            self._motion_time = now
        counter, self._rejection = self._refusal(command)
        if self._rejection:
            self._count(counter)
            return self._rejection
        self.counts.accepted += 1
        self._holder = _source(command)
        self._command = self._slow_down(command)
        self._command_time = now
        self._still_since = None
        self._alive = True
        return ""

    @property
    def holder(self) -> tuple[str, str]:
        """Policy label and episode that have the arm; empty where nobody has it."""
        return self._holder[1:] if self._holder is not None else ("", "")

    def pose(self, now: float) -> Pose | None:
        """The last measured pose, where one is needed and this one will do."""
        return None if self._missing_pose(now) else self._pose

    def observe(self, now: float, pose: Pose) -> None:
        """Take a measured pose in."""
        self._pose, self._pose_time = pose, now

    def hear(self, alive: bool) -> None:
        """Whether a policy's process gives signs of life again, or no more.

        Middleware does not tell whose process it is: the arm is braked until there are such signs
        again, or until whoever has the arm commands.
        """
        self._alive = alive

    def stop(self, reason: str) -> None:
        """Brake at the acceleration limit and stay so until released."""
        self._stop_reason = self._stop_reason or reason

    def emergency_stop(self) -> None:
        """Zero at once, until released."""
        self._emergency = True
        self._stop_reason = "emergency stop"

    def press(self, pressed: bool) -> None:
        """An emergency stop by a button; letting go of it alone releases nothing."""
        self._emergency_pressed = pressed
        if pressed:
            self.emergency_stop()

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
        """Whether the last output had any speed, or the next one has though zero is wanted."""
        output = self._output
        moves = output is not None and (output.linear != ZERO or output.angular != ZERO)
        return moves or not (self._linear.at_rest and self._angular.at_rest)

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
        if elapsed > max(self.limits.controller_timeout, 2.0 / self.limits.rate):
            self._stand()
        self.state, self.reason = self._judge(now)
        if self.state == WAITING or (self._output is None and self.state != ACTIVE):
            return None
        self._output = self._next(now, dt=min(max(elapsed, 0.0), self._reach_time))
        self._recent.append((self._output.linear, self._output.angular))
        return self._output

    def _stand(self) -> None:
        """Go on from standstill: for want of commands the controller has stopped the arm."""
        if self.moving and self._output is not None:
            self.counts.stalls += 1
            self._output = Output(ZERO, ZERO, self._output.gripper)
        self._linear.reset()
        self._angular.reset()

    def _refusal(self, command: Command) -> tuple[str, str]:
        """The counter and the reason of a command that is to be dropped."""
        limits = self.limits
        label, episode = command.policy_label, command.episode_id
        numbers = (*command.linear, *command.angular, command.gripper, command.period)
        if not all(map(math.isfinite, numbers)):
            return "rejected_not_finite", "the command is not finite"
        if command.frame_id != limits.base_frame:
            frames = f"{command.frame_id!r}, not {limits.base_frame!r}"
            return "rejected_frame", f"the command is in frame {frames}"
        if not abs(command.age) <= limits.max_command_age:
            return "rejected_stale", f"the command's stamp is {command.age:.3g} s old"
        if not abs(command.observation_age) <= limits.max_observation_age:
            seen = f"what was seen {command.observation_age:.3g} s ago"
            return "rejected_stale", f"the command is for {seen}"
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
            linear=scaled(command.linear, factor),
            angular=scaled(command.angular, factor),
            gripper=gripper,
        )

    def _judge(self, now: float) -> tuple[str, str]:
        """The state this step is in, and why."""
        if self._stop_reason:
            return STOPPED, self._stop_reason
        if self._command is None:
            return WAITING, self._rejection
        if not self._alive:
            reason = "a policy's process gives no sign of life"
            return self._hold_in_silence(now, "liveliness_lost", reason)
        if now - self._command_time > (silence := self._longest_silence(self._command)):
            reason = f"no command for {silence:g} s"
            return self._hold_in_silence(now, "stops_on_silence", reason)
        if missing := self._missing_pose(now):
            return (WAITING if self._output is None else HOLDING), missing
        return ACTIVE, ""

    def _longest_silence(self, command: Command) -> float:
        if command.period <= 0.0:
            return self.limits.command_timeout
        return min(max(2.0 * command.period, 2.0 / self.limits.rate), LONGEST_SILENCE)

    def _hold_in_silence(self, now: float, counter: str, reason: str) -> tuple[str, str]:
        if self.moving:
            if self.state == ACTIVE or self.reason != reason:  # once for each reason to brake
                self._count(counter)
            return HOLDING, reason
        # A standing arm may be taken over by another policy or episode, and is given up in the end.
        self._holder = None
        if self._still_since is None:
            self._still_since = now
        if self._output is None or now - self._still_since >= HOLD_TIME:
            self._give_up()
            return WAITING, reason
        return HOLDING, reason

    def _count(self, counter: str) -> None:
        setattr(self.counts, counter, getattr(self.counts, counter) + 1)

    def _give_up(self) -> None:
        self._command = self._holder = self._still_since = None

    def _pose_age(self, now: float) -> float:
        return now - self._pose_time + (self._pose.age if self._pose is not None else math.inf)

    def _missing_pose(self, now: float) -> str:
        """Why workspace and cone cannot be kept; empty where they can, or there are none."""
        if not self.limits.needs_pose:
            return ""
        if self._pose is None:
            return "no ee_pose yet, and there are limits to keep that need it"
        pose, base_frame = self._pose, self.limits.base_frame
        if problem := pose_problem(pose.frame_id, pose.position, pose.orientation, base_frame):
            return f"ee_pose: {problem}"
        age = self._pose_age(now)
        if not abs(age) <= self.limits.pose_timeout:
            return f"ee_pose is older than {self.limits.pose_timeout:g} s, or of the future"
        return ""

    def _next(self, now: float, dt: float) -> Output:
        """The output after the last one, `dt` s later."""
        limits = self.limits
        gripper = self._output.gripper if self._output is not None else math.nan
        # The gripper keeps its width while the arm stops: it may be holding something.
        if self._emergency:
            self._linear.reset()
            self._angular.reset()
            return Output(ZERO, ZERO, gripper)
        to_linear = to_angular = ZERO
        if self.state == ACTIVE and self._command is not None:
            to_linear, to_angular = self._command.linear, self._command.angular
            gripper = self._grip(gripper, self._command.gripper, dt)
        bounds = self._velocity_bounds(now)
        allowed = clamped(to_linear, bounds)
        self.counts.limited_workspace += allowed != to_linear
        linear_now = toward(self._linear.last, allowed, bounds, limits.max_linear_acceleration * dt)
        angular_now = self._turn(now, to_angular, limits.max_angular_acceleration * dt)
        self.counts.limited_acceleration += linear_now != allowed or angular_now != to_angular
        linear, angular = self._linear.add(dt, linear_now), self._angular.add(dt, angular_now)
        self.counts.limited_jerk += linear != linear_now or angular != angular_now
        return Output(linear, angular, gripper)

    def _turn(self, now: float, wanted: Vector, change: float) -> Vector:
        """The angular velocity that goes towards the wanted one and can be braked in the cone."""
        last = self._angular.last
        if not self.limits.has_cone or self._pose is None or self._missing_pose(now):
            return toward(last, wanted, UNBOUNDED, change)
        axis, tool = self.limits.cone_axis, z_axis(self._pose.orientation)
        outward = cross(axis, tool)  # turns the tool away from the axis
        length = math.hypot(*outward)
        along = wanted
        if length > 1e-9 and dot(wanted, outward) > 0.0:
            along = added(wanted, scaled(outward, -dot(wanted, outward) / length**2))
        pending = max(self._pose_age(now), 0.0) + REACTION_TIME
        fastest = max(math.hypot(*angular) for _, angular in self._recent)
        slack = pending * fastest + self._angular.remaining()[1]
        for goal in (wanted, along, ZERO):
            turn = toward(last, goal, UNBOUNDED, change)
            if goal == ZERO or self._stays_in_cone(tool, turn, slack):
                break
        self.counts.limited_orientation += goal != wanted
        return turn

    def _stays_in_cone(self, tool: Vector, turn: Vector, slack: float) -> bool:
        """Whether the tool's axis can be braked within the cone, or comes no nearer to its wall.

        slack: rad that it may have turned, or may be still to turn, since it was measured.
        """
        speed = math.hypot(*turn)
        way = speed * self._reach_time + speed**2 / (2.0 * self.limits.max_angular_acceleration)
        if way == 0.0:
            return True
        axis = self.limits.cone_axis
        greatest = max(self.limits.max_tilt - slack, angle_between(axis, tool)) + 1e-12
        return all(
            angle_between(axis, rotated(tool, scaled(turn, way * share / speed))) <= greatest
            for share in (0.25, 0.5, 0.75, 1.0)
        )

    def _grip(self, last: float, wanted: float, dt: float) -> float:
        if math.isnan(last):  # nobody knows yet how far it is open
            return wanted
        change = self.limits.max_gripper_rate * dt
        gripper = min(max(wanted, last - change), last + change)
        self.counts.limited_gripper += gripper != wanted
        return gripper

    def _velocity_bounds(self, now: float) -> Bounds:
        """The least and the greatest velocity of each axis that can be braked before the wall."""
        low, high = self.limits.workspace_min, self.limits.workspace_max
        if low is None or high is None or self._pose is None or self._missing_pose(now):
            return UNBOUNDED
        # What was commanded since the pose's stamp, and a little before, may be still to come.
        pending = max(self._pose_age(now), 0.0) + REACTION_TIME
        bounds = []
        averaged, _ = self._linear.remaining()
        for axis, position in enumerate(added(self._pose.position, averaged)):
            velocities = [linear[axis] for linear, _ in self._recent]
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
        t, a = self._reach_time, self.limits.max_linear_acceleration * AXIS_SHARE
        distance = min(distance, _FAR)
        return 2.0 * distance / (t + math.sqrt(t * t + 2.0 * distance / a))


def _source(command: Command) -> tuple[str, str, str]:
    return command.publisher, command.policy_label, command.episode_id
