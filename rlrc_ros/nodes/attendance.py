"""Whether whoever runs an episode is still there."""

from __future__ import annotations

from collections import deque

from rclpy.duration import Duration
from rclpy.event_handler import QoSLivelinessChangedInfo, SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, LivelinessPolicy, QoSProfile
from std_msgs.msg import String

LEASE = 1.0
"""s without a sign of life of a process after which it is taken for gone."""


class Attendance:
    """Those who attend an episode publish its id on `~/attended` before they ask for it.

    Their publisher promises signs of life (`common.ATTENDED_QOS`). A client that only asks for an
    episode, as `ros2 action send_goal` does, is not missed.
    """

    def __init__(self, node: Node) -> None:
        # Middleware tells that somebody is lost, and not who: it may be any of the latest.
        self._attended: deque[str] = deque(maxlen=4)
        self._lost: tuple[str, ...] = ()
        qos = QoSProfile(
            depth=4,
            durability=DurabilityPolicy.TRANSIENT_LOCAL,
            liveliness=LivelinessPolicy.AUTOMATIC,
            liveliness_lease_duration=Duration(seconds=LEASE),
        )
        node.create_subscription(
            String,
            "~/attended",
            lambda message: self._attended.append(message.data),
            qos,
            event_callbacks=SubscriptionEventCallbacks(liveliness=self._on_liveliness),
        )

    def _on_liveliness(self, change: QoSLivelinessChangedInfo) -> None:
        if change.not_alive_count_change > 0:
            self._lost = tuple(self._attended)

    def lost(self, episode_id: str) -> bool:
        """Whether the process that attended an episode was killed, frozen or cut off."""
        return episode_id in self._lost
