"""Sensor messages to what a policy sees: one translation for live messages and for bags."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlrc_ros.errors import UserError
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
        joint_state: the message, None where the policy takes no proprioception.
        stamps: header stamps in ns since the epoch, by source.
    """

    images: dict[str, Any]
    joint_state: Any | None
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
        contract, proprioception = config.proprioception, None
        if contract is not None:
            names = [*contract.joints, gripper.joint] if contract.gripper else contract.joints
            proprioception = ordered_positions(self.joint_state, names)
            if contract.gripper:
                proprioception[-1] = gripper.opening(proprioception[-1])
        return Observation(images, instruction, proprioception)


class ObservationBuffer:
    """Keeps the latest message of each source and says whether they make an observation.

    Args:
        max_age: s, of a message's stamp when looked at, by source: camera names and `joint_states`.
        topics: the same sources' topics, for error messages.
        max_skew: s, between the stamps of an observation's parts.
    """

    JOINT_STATES = "joint_states"

    def __init__(
        self, max_age: Mapping[str, float], topics: Mapping[str, str], max_skew: float
    ) -> None:
        self._max_age, self._topics, self._max_skew = dict(max_age), dict(topics), max_skew
        self._latest: dict[str, Any] = {}
        self._arrived: dict[str, float] = {}
        """s of the steady clock, when the latest of each source came."""
        self._lock = threading.Lock()

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
        for camera in config.cameras:
            if camera.name not in self._topics:
                raise UserError(
                    f"the policy looks through camera '{camera.name}'; cameras here: "
                    f"{', '.join(sorted(set(self._topics) - {self.JOINT_STATES})) or 'none'}"
                )

    def snapshot(self, config: BundleConfig, now_ns: int) -> Snapshot:
        """The latest of what the policy needs, as of `now_ns`.

        Raises:
            UserError: a source has sent nothing or nothing recent, is ahead of time, or the parts
                lie too far apart in time; one line that names the topic.
        """
        cameras = [camera.name for camera in config.cameras]
        sources = [*cameras, self.JOINT_STATES] if config.proprioception else cameras
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
        images = {name: messages[name] for name in cameras}
        return Snapshot(images, messages.get(self.JOINT_STATES), stamps)


def _ns(message: Any) -> int:
    return to_nanoseconds(message.header.stamp)
