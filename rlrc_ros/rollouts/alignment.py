"""A bag back into the observations and actions of its policy, by header stamps.

What the live node saw is put together again by the live node's own code: messages go through an
`ObservationBuffer`, and its snapshots are decoded as they were then. A command names the header
stamps of what it was computed from, so each observation is the very one, however late a message
came. A command that names none (one later in a chunk of actions, or of an older bag) gets what a
node would have seen when the command was issued.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rosbags.highlevel import AnyReader
from rosbags.interfaces import Connection

from rlrc_ros.errors import UserError
from rlrc_ros.messages.command import command_arrays, observed_stamps, twist_to_action
from rlrc_ros.messages.observation import Gripper, ObservationBuffer
from rlrc_ros.messages.stamps import to_nanoseconds
from rlrc_ros.profile import RobotProfile
from rlrc_ros.rollouts.bag import open_bag
from rlrc_ros.rollouts.episode import Episode, read_episode
from rlrc_ros.vla.config import BundleConfig
from rlrc_ros.vla.processor import Observation

_COMMAND_TYPE = "rlrc/msg/PolicyCommand"
_COMMANDS = "/policy_command"
FASTER = 0.75
"""Of a period: commands that come closer together than this were recorded at a higher rate."""


@dataclass(frozen=True)
class Contract:
    """Which sources an observation is made of, and where they are found.

    Attributes:
        config: of the bundle that will be trained: cameras, joints, control rate.
        profile: of the robot that was recorded: topics, gripper.
    """

    config: BundleConfig
    profile: RobotProfile

    @property
    def gripper(self) -> Gripper:
        """Where the gripper's opening is found."""
        joints = self.profile.joint_states
        return Gripper(
            joint=joints.gripper_joint, closed=joints.gripper_closed, open=joints.gripper_open
        )

    def topics(self) -> dict[str, str]:
        """Topics by source, as the profile names them.

        Raises:
            UserError: the robot lacks a camera that the policy looks through.
        """
        self.buffer().check(self.config)
        topics = self._all_topics()
        return {source: topics[source] for source in ObservationBuffer.sources(self.config)}

    def buffer(self) -> ObservationBuffer:
        """An empty one, with the limits of the live node."""
        profile = self.profile
        max_age = {name: camera.max_age for name, camera in profile.cameras.items()}
        max_age[ObservationBuffer.JOINT_STATES] = profile.joint_states.max_age
        max_age[ObservationBuffer.EE_POSE] = profile.ee_pose_max_age
        return ObservationBuffer(max_age, self._all_topics(), profile.max_skew, profile.base_frame)

    def _all_topics(self) -> dict[str, str]:
        profile = self.profile
        topics = {name: camera.topic for name, camera in profile.cameras.items()}
        topics[ObservationBuffer.JOINT_STATES] = profile.joint_states.topic
        return topics | {ObservationBuffer.EE_POSE: profile.ee_pose}


class Step(NamedTuple):
    """One control step."""

    observation: Observation
    action: NDArray[np.float64]
    """(7,): m and rad per control step of the contract's rate, gripper in [0, 1], 1 open."""
    stamps: dict[str, int]
    """Header stamps in ns of what the observation is made of, by source."""


class _Command(NamedTuple):
    issued_ns: int
    looked: dict[str, int]
    twist: NDArray[np.float64]
    gripper: float
    label: str
    step: int


class _Due(NamedTuple):
    """A command, and which message of each source its observation is made of."""

    command: _Command
    now_ns: int
    stamps: dict[str, int]


@dataclass
class AlignedEpisode:
    """An episode's bag, ready to be read step by step.

    Args:
        uri: the bag's directory.
        contract: what an observation is made of.

    Attributes:
        episode: what episode.json says.
        policy_label: what its commands were labelled with.
        missed: periods of the contract's rate without a command.
        lost: control steps that could not be put together again, by reason; complete when
            `steps` has ended.

    Raises:
        UserError: the bag cannot be read, or holds no command of its episode, or lacks a topic.
    """

    uri: Path
    contract: Contract
    episode: Episode = field(init=False)
    policy_label: str = field(init=False)
    missed: int = field(init=False)
    lost: Counter[str] = field(init=False, default_factory=Counter)

    def __post_init__(self) -> None:
        self.episode = read_episode(self.uri)
        if not self.episode.instruction.strip():
            raise UserError(f"{self.uri}: its episode.json names no instruction")
        commands, stamps = self._read_stamps()
        self.policy_label = commands[0].label
        period = 1e9 / self.contract.config.control_rate
        kept = _thinned(commands, period)
        span = kept[-1].issued_ns - kept[0].issued_ns
        self.missed = max(0, round(span / period) + 1 - len(kept))
        self._due = [due for command in kept if (due := self._find(command, stamps)) is not None]

    def steps(self) -> Iterator[Step]:
        """Observations and actions in order; holds few messages at a time."""
        waiting: dict[str, dict[int, Any]] = defaultdict(dict)
        wanted = {(source, stamp) for due in self._due for source, stamp in due.stamps.items()}
        place = 0
        with open_bag(self.uri) as reader:
            sources = {c.topic: source for source, c in self._connections(reader).items()}
            chosen = [c for c in reader.connections if c.topic in sources]
            for connection, _, data in reader.messages(chosen):
                source, stamp = sources[connection.topic], _header_stamp(data)
                if (source, stamp) in wanted:
                    message = reader.deserialize(data, connection.msgtype)
                    waiting[source][stamp] = message
                while place < len(self._due) and _is_there(self._due[place], waiting):
                    yield from self._step(self._due[place], waiting)
                    place += 1
        if left := len(self._due) - place:
            self.lost["stamps went back in time: a clock was set during the episode"] += left

    def _step(self, due: _Due, waiting: dict[str, dict[int, Any]]) -> Iterator[Step]:
        contract, command = self.contract, due.command
        buffer = contract.buffer()  # anew: how fast a bag is read must not age what is in it
        for source, stamp in due.stamps.items():
            buffer.add(source, waiting[source][stamp])
            for old in [other for other in waiting[source] if other < stamp]:
                del waiting[source][old]
        try:
            snapshot = buffer.snapshot(contract.config, due.now_ns)
            observation = snapshot.decode(
                contract.config, contract.gripper, self.episode.instruction
            )
            rate = contract.config.control_rate
            action = twist_to_action(command.twist, command.gripper, rate)
            if not np.isfinite(action).all():
                raise UserError("a command is not finite")
        except UserError as error:
            self.lost[str(error)] += 1
            return
        yield Step(observation, action, due.stamps)

    def _read_stamps(self) -> tuple[list[_Command], dict[str, list[int]]]:
        """The episode's commands, and every header stamp of each source, both in order."""
        commands: list[_Command] = []
        stamps: dict[str, list[int]] = {}
        with open_bag(self.uri) as reader:
            connections = self._connections(reader)
            topics = {connection.topic: source for source, connection in connections.items()}
            stamps = {source: [] for source in connections}
            topics[_commands_topic(reader, self.uri)] = ""
            chosen = [c for c in reader.connections if c.topic in topics]
            for connection, _, data in reader.messages(chosen):
                if source := topics[connection.topic]:
                    stamps[source].append(_header_stamp(data))
                    continue
                message: Any = reader.deserialize(data, connection.msgtype)
                if message.episode_id == self.episode.episode_id:
                    commands.append(_command(message))
        commands.sort(key=lambda command: (command.issued_ns, command.step))
        # The node ends an episode with a stop of its own, which no policy chose.
        if commands and not commands[-1].looked and not commands[-1].twist.any():
            commands.pop()
        if not commands:
            raise UserError(f"{self.uri} holds no command of a policy in its episode")
        return commands, {source: sorted(times) for source, times in stamps.items()}

    def _find(self, command: _Command, stamps: dict[str, list[int]]) -> _Due | None:
        """Which messages the command's observation is made of; None where one is not there."""
        now = max(command.looked.values(), default=command.issued_ns)
        found = {}
        for source, times in stamps.items():
            wanted = command.looked.get(source, now)
            place = bisect_right(times, wanted) - 1
            if place < 0 or (source in command.looked and times[place] != wanted):
                self.lost[f"the bag lacks the message of '{source}' that the policy saw"] += 1
                return None
            found[source] = times[place]
        return _Due(command, now, found)

    def _connections(self, reader: AnyReader) -> dict[str, Connection]:
        """The connection of every source."""
        namespace = _commands_topic(reader, self.uri).removesuffix(_COMMANDS)
        there = {connection.topic: connection for connection in reader.connections}
        found = {}
        for source, topic in self.contract.topics().items():
            name = topic if topic.startswith("/") else f"{namespace}/{topic}"
            if name not in there:
                raise UserError(f"{self.uri} has no topic {name} ('{source}')")
            found[source] = there[name]
        return found


def _commands_topic(reader: AnyReader, uri: Path) -> str:
    topics = {c.topic for c in reader.connections if c.msgtype == _COMMAND_TYPE}
    topics = {topic for topic in topics if topic.endswith(_COMMANDS)}
    if len(topics) != 1:
        found = ", ".join(sorted(topics)) or "none"
        raise UserError(f"{uri}: wanted one topic policy_command of {_COMMAND_TYPE}, found {found}")
    return topics.pop()


def _command(message: Any) -> _Command:
    twist, gripper = command_arrays(message)
    issued = to_nanoseconds(message.header.stamp)
    looked = observed_stamps(message)
    return _Command(issued, looked, twist, gripper, message.policy_label, message.step)


def _thinned(commands: list[_Command], period: float) -> list[_Command]:
    """At most one command a period (ns); all of them unless they were recorded at a higher rate."""
    times = np.array([command.issued_ns for command in commands])
    if len(times) < 3 or np.median(np.diff(times)) >= FASTER * period:
        return commands
    slots = np.round((times - times[0]) / period)
    off = np.abs((times - times[0]) / period - slots)
    nearest = {slot: np.flatnonzero(slots == slot) for slot in np.unique(slots)}
    return [commands[rows[off[rows].argmin()]] for rows in nearest.values()]


def _is_there(due: _Due, waiting: dict[str, dict[int, Any]]) -> bool:
    return all(stamp in waiting[source] for source, stamp in due.stamps.items())


def _header_stamp(data: bytes | memoryview) -> int:
    """The stamp in ns of a serialised message that begins with a std_msgs/Header.

    CDR (OMG DDSI-RTPS 9.4.2, 10.2): 4 bytes of encapsulation, whose second tells the byte order,
    then the stamp's two words.
    """
    sec, nanosec = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return int(sec) * 1_000_000_000 + int(nanosec)
