"""The recorder's subscriptions: what is published and wanted, and where its messages go."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from rclpy.topic_endpoint_info import TopicEndpointInfo

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts.definitions import message_definition
from rlrc_ros.rollouts.preroll import Preroll
from rlrc_ros.rollouts.recording import Recording

if TYPE_CHECKING:
    from rclpy.subscription import MessageInfo

QUEUE_DEPTH = 100
"""Messages of a topic that may wait while the process is busy with others."""
_TYPE_NAME = re.compile(r"\w+/msg/\w+")


@dataclass
class _Topic:
    """A topic that is listened to.

    Attributes:
        name: absolute.
        type_name: as in sensor_msgs/msg/Image.
        message_type: the class of that name.
        definition: see `message_definition`.
        offered: the publishers' QoS profiles, as rosbag2 writes them down.
        type_hash: RIHS01 hash of the type.
        subscription: through which it is heard.
        channel: in the bag that is being recorded; None between recordings.
    """

    name: str
    type_name: str
    message_type: Any
    definition: str
    offered: list[dict[str, Any]]
    type_hash: str
    subscription: Subscription[Any] = field(init=False)
    channel: int | None = None


class Topics:
    """Listens to topics, and writes what comes into a recording, or between two into a pre-roll.

    Latched topics are heard during recordings only, each time anew: what was said last before an
    episode, however long ago, belongs into its bag.

    Args:
        node: subscribes.
        is_wanted: whether a topic, given by its absolute name, should be recorded.
        preroll: what to fill between recordings; None: nothing is heard then.
    """

    def __init__(
        self, node: Node, is_wanted: Callable[[str], bool], preroll: Preroll | None
    ) -> None:
        self._node, self._is_wanted, self._preroll = node, is_wanted, preroll
        self._topics: dict[str, _Topic] = {}
        self._recording: Recording | None = None
        self._unusable: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._topics)

    def __contains__(self, name: str) -> bool:
        return name in self._topics

    def begin(self, recording: Recording) -> None:
        """From now on messages go there, those of the pre-roll first."""
        self._recording = recording
        self._unusable.clear()
        for topic in self._topics.values():
            self._add_channel(topic, recording)
        for message in self._preroll.take() if self._preroll else ():
            known = self._topics.get(message.topic)
            if known is not None and known.channel is not None:
                recording.write(known.channel, message.received, message.sent, message.data)
        self.discover()

    def end(self) -> None:
        """Hand over what has come so far, and nothing more."""
        for topic in list(self._topics.values()):
            if self._preroll is None or _is_latched(topic):
                self._unsubscribe(topic)
            else:
                self._drain(topic)
                topic.channel = None
        self._recording = None

    def discover(self) -> None:
        """Subscribe to what is published by now and wanted."""
        if self._recording is None and self._preroll is None:
            return
        for name, types in self._node.get_topic_names_and_types():
            if not self._is_wanted(name) or name in self._unusable:
                continue
            publishers = self._node.get_publishers_info_by_topic(name)
            if not publishers:
                continue
            try:
                self._subscribe(name, types, publishers)
            except UserError as error:
                self._unusable[name] = str(error)
                if self._recording is not None:
                    self._recording.unrecorded[name] = str(error)
                self._node.get_logger().warning(f"{name} is not recorded: {error}")

    def all_matched(self) -> bool:
        """Whether every publisher of the topics has been found."""
        return all(
            topic.subscription.get_publisher_count() >= self._node.count_publishers(name)
            for name, topic in self._topics.items()
        )

    def _subscribe(
        self, name: str, types: Sequence[str], publishers: Sequence[TopicEndpointInfo]
    ) -> None:
        qos = _matching_qos([publisher.qos_profile for publisher in publishers])
        topic = self._topics.get(name)
        if topic is not None:
            heard = topic.subscription.qos_profile
            same_qos = (heard.reliability, heard.durability) == (qos.reliability, qos.durability)
            if same_qos and topic.type_name in types:
                return
            # A publisher has come that the subscription as it is would not hear.
            self._unsubscribe(topic)
            if topic.type_name not in types:
                topic = None
        if qos.durability == DurabilityPolicy.TRANSIENT_LOCAL and self._recording is None:
            return
        if topic is None:
            topic = _described(name, types, publishers)
            if self._recording is not None:
                self._add_channel(topic, self._recording)
        topic.subscription = self._node.create_subscription(
            topic.message_type, name, partial(self._take, topic), qos, raw=True
        )
        self._topics[name] = topic

    def _unsubscribe(self, topic: _Topic) -> None:
        self._drain(topic)
        self._node.destroy_subscription(topic.subscription)
        del self._topics[topic.name]

    def _drain(self, topic: _Topic) -> None:
        """Take what has come and waits for its callback."""
        subscription = topic.subscription
        for _ in range(QUEUE_DEPTH):
            with subscription.handle:
                taken = subscription.handle.take_message(subscription.msg_type, True)
            if taken is None:
                break
            self._take(topic, *taken)

    def _take(self, topic: _Topic, data: bytes, info: MessageInfo) -> None:
        received = info["received_timestamp"] or time.time_ns()
        sent = info["source_timestamp"] or received
        if topic.channel is not None and self._recording is not None:
            self._recording.write(topic.channel, received, sent, data)
        elif self._preroll is not None:
            self._preroll.add(topic.name, received, sent, data)

    @staticmethod
    def _add_channel(topic: _Topic, recording: Recording) -> None:
        topic.channel = recording.add_topic(
            topic.name, topic.type_name, topic.definition, topic.offered, topic.type_hash
        )


def _described(name: str, types: Sequence[str], publishers: Sequence[TopicEndpointInfo]) -> _Topic:
    """A topic that nothing subscribes to yet; raises UserError where it cannot be recorded."""
    if len(types) > 1:
        raise UserError(f"it is published with more than one type: {', '.join(types)}")
    return _Topic(
        name,
        types[0],
        _message_type(types[0]),
        message_definition(types[0]),
        [_as_rosbag2(publisher.qos_profile) for publisher in publishers],
        str(publishers[0].topic_type_hash),
    )


def _is_latched(topic: _Topic) -> bool:
    return bool(topic.subscription.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL)


def _message_type(type_name: str) -> Any:
    if not _TYPE_NAME.fullmatch(type_name):
        raise UserError(f"{type_name!r} is not a message type")
    package, _, name = type_name.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), name)
    except (ImportError, AttributeError):
        raise UserError(f"its type {type_name} is not installed here") from None


def _matching_qos(offered: Sequence[QoSProfile]) -> QoSProfile:
    """The most that every publisher offers, so that all of them are heard."""
    reliable = all(qos.reliability == ReliabilityPolicy.RELIABLE for qos in offered)
    latched = all(qos.durability == DurabilityPolicy.TRANSIENT_LOCAL for qos in offered)
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=QUEUE_DEPTH,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


def _as_rosbag2(qos: QoSProfile) -> dict[str, Any]:
    """A profile as rosbag2 writes it down."""

    def duration(nanoseconds: int) -> dict[str, int]:
        sec, nsec = divmod(nanoseconds, 1_000_000_000)
        return {"sec": sec, "nsec": nsec}

    return {
        "history": qos.history.name.lower(),
        "depth": qos.depth,
        "reliability": qos.reliability.name.lower(),
        "durability": qos.durability.name.lower(),
        "deadline": duration(qos.deadline.nanoseconds),
        "lifespan": duration(qos.lifespan.nanoseconds),
        "liveliness": qos.liveliness.name.lower(),
        "liveliness_lease_duration": duration(qos.liveliness_lease_duration.nanoseconds),
        "avoid_ros_namespace_conventions": qos.avoid_ros_namespace_conventions,
    }
