"""Sensor messages to what a policy sees: one translation for live messages and for bags."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc_ros.errors import UserError
from rlrc_ros.messages.ee_pose import pose_problem, pose_vector
from rlrc_ros.messages.image import image_to_rgb
from rlrc_ros.messages.joint_state import ordered_positions
from rlrc_ros.messages.stamps import to_nanoseconds
from rlrc_ros.vla.config import BundleConfig
from rlrc_ros.vla.processor import Observation

MAX_SKEW = 0.15
"""s between the stamps of an observation's parts, where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Gripper:
    """Where among the joint states the gripper's opening is found.

    Attributes:
        joint: the finger's joint.
        closed: its position at opening 0, m or rad.
        open: its position at opening 1.
    """

    joint: str
    closed: float
    open: float

    def __post_init__(self) -> None:
        if self.open == self.closed:
            raise UserError(
                f"gripper_open and gripper_closed are both {self.open:g}: they must differ"
            )

    def opening(self, position: float) -> float:
        """Position of the joint to opening in [0, 1]."""
        return float(np.clip((position - self.closed) / (self.open - self.closed), 0.0, 1.0))


@dataclass
class Snapshot:
    """The latest message of every source a policy needs, not decoded yet.

    Attributes:
        images: messages by camera name.
        joint_state: the message, None where the policy takes none.
        ee_pose: the end effector's pose, None where the policy does not take it.
        stamps: header stamps in ns since the epoch, by source.
    """

    images: dict[str, Any]
    joint_state: Any | None
    ee_pose: Any | None
    stamps: dict[str, int]

    @property
    def oldest_ns(self) -> int:
        """The oldest stamp among them."""
        return min(self.stamps.values())

    def decode(self, config: BundleConfig, gripper: Gripper, instruction: str) -> Observation:
        """What the policy sees.

        Raises:
            UserError: an image in an encoding that is not accepted, a joint that is missing or not
                finite.
        """
        images = {}
        for name, message in self.images.items():
            try:
                images[name] = image_to_rgb(message)
            except UserError as error:
                raise UserError(f"camera '{name}': {error}") from None
        return Observation(images, instruction, self._proprioception(config, gripper))

    def _proprioception(self, config: BundleConfig, gripper: Gripper) -> NDArray[np.float64] | None:
        contract = config.proprioception
        if contract is None:
            return None
        values = []
        if contract.ee_pose:
            values.append(pose_vector(self.ee_pose, contract.mean[3:6]))
        if contract.takes_joint_states:
            names = [*contract.joints, gripper.joint] if contract.gripper else contract.joints
            positions = ordered_positions(self.joint_state, names)
            if contract.gripper:
                positions[-1] = gripper.opening(positions[-1])
            values.append(positions)
        return np.concatenate(values)


class ObservationBuffer:
    """Keeps the latest message of each source and says whether they make an observation.

    Args:
        max_age: s, of a message's stamp when looked at, by source: camera names, `joint_states` and
            `ee_pose`.
        topics: the same sources' topics, for error messages.
        max_skew: s, between the stamps of an observation's parts.
        base_frame: what the end effector's pose has to be in.
    """

    JOINT_STATES, EE_POSE = "joint_states", "ee_pose"

    def __init__(
        self,
        max_age: Mapping[str, float],
        topics: Mapping[str, str],
        max_skew: float,
        base_frame: str,
    ) -> None:
        self._max_age, self._topics, self._max_skew = dict(max_age), dict(topics), max_skew
        self._base_frame = base_frame
        self._latest: dict[str, Any] = {}
        self._arrived: dict[str, float] = {}
        """s of the steady clock, when the latest of each source came."""
        self._lock = threading.Lock()

    @classmethod
    def sources(cls, config: BundleConfig) -> list[str]:
        """What a policy's observation is made of: its cameras' names first."""
        found, contract = [camera.name for camera in config.cameras], config.proprioception
        if contract is not None and contract.takes_joint_states:
            found.append(cls.JOINT_STATES)
        if contract is not None and contract.ee_pose:
            found.append(cls.EE_POSE)
        return found

    def add(self, source: str, message: Any) -> None:
        """Take a message in; one that is not newer than the source's latest is ignored.

        Unless it is older by more than its age limit: then the clock has been set back.
        """
        with self._lock:
            latest = self._latest.get(source)
            newer = 1.0 if latest is None else (_ns(message) - _ns(latest)) * 1e-9
            if newer > 0.0 or newer < -self._max_age.get(source, 0.0):
                self._latest[source], self._arrived[source] = message, time.monotonic()

    def forget(self) -> None:
        """Drop everything: the next snapshot needs new messages."""
        with self._lock:
            self._latest.clear()

    def check(self, config: BundleConfig) -> None:
        """Raises UserError where the policy looks through a camera that is not here."""
        cameras = sorted(set(self._topics) - {self.JOINT_STATES, self.EE_POSE})
        for camera in config.cameras:
            if camera.name not in cameras:
                raise UserError(
                    f"the policy looks through camera '{camera.name}'; cameras here: "
                    f"{', '.join(cameras) or 'none'}"
                )

    def snapshot(self, config: BundleConfig, now_ns: int) -> Snapshot:
        """The latest of what the policy needs, as of `now_ns`.

        Raises:
            UserError: a source has sent nothing or nothing recent, is ahead of time, or the parts
                lie too far apart in time, or the end effector's pose is in another frame or not
                finite; one line that names the topic.
        """
        sources = self.sources(config)
        self.check(config)
        with self._lock:
            messages = {source: self._latest.get(source) for source in sources}
            arrived = {source: self._arrived.get(source, 0.0) for source in sources}
        stamps = {}
        for source, message in messages.items():
            if message is None:
                raise UserError(f"nothing has come on {self._topics[source]} ('{source}')")
            age = (now_ns - _ns(message)) * 1e-9
            # Simulated time may stand still, and would keep a message young for ever.
            oldest = max(age, time.monotonic() - arrived[source])
            if oldest > self._max_age[source]:
                raise UserError(
                    f"{self._topics[source]} ('{source}') is {oldest:.2f} s old, "
                    f"{self._max_age[source]:g} s are allowed"
                )
            # A source whose clock is ahead would pass for fresh long after it has died.
            if age < -self._max_age[source]:
                raise UserError(
                    f"{self._topics[source]} ('{source}') is stamped {-age:.2f} s in the future; "
                    "synchronise the clocks"
                )
            stamps[source] = _ns(message)
        skew = (max(stamps.values()) - min(stamps.values())) * 1e-9
        if skew > self._max_skew:
            late = min(stamps, key=lambda source: stamps[source])
            raise UserError(
                f"{self._topics[late]} ('{late}') is {skew:.2f} s behind the other sources, "
                f"{self._max_skew:g} s are allowed"
            )
        pose = messages.get(self.EE_POSE)
        if pose is not None and (problem := pose_problem(pose, self._base_frame)):
            raise UserError(f"{self._topics[self.EE_POSE]} ('{self.EE_POSE}'): {problem}")
        images = {camera.name: messages[camera.name] for camera in config.cameras}
        return Snapshot(images, messages.get(self.JOINT_STATES), pose, stamps)


def _ns(message: Any) -> int:
    return to_nanoseconds(message.header.stamp)
