"""Whether whoever asked for something that lasts, an episode or a recording, is still there."""

from __future__ import annotations

import secrets
import time

from rclpy.duration import Duration
from rclpy.event_handler import QoSLivelinessChangedInfo, SubscriptionEventCallbacks
from rclpy.exceptions import NameValidationException
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, LivelinessPolicy, QoSProfile
from std_msgs.msg import String

from rlrc_ros.errors import UserError

LEASE = 1.0
"""s without a sign of life of a process after which it is taken for gone."""
DISCOVERY_TIME = 5.0
"""s to wait for its first sign of life."""

ATTENDED_QOS = QoSProfile(
    depth=1,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
    liveliness=LivelinessPolicy.AUTOMATIC,
    liveliness_lease_duration=Duration(seconds=0.5),
)
"""What is attended, with a promise of a sign of life every 0.5 s: the middleware's, from a thread
that Python's lock does not hold up."""

_WATCHED_QOS = QoSProfile(
    depth=1,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
    liveliness=LivelinessPolicy.AUTOMATIC,
    liveliness_lease_duration=Duration(seconds=LEASE),
)


def attending(node: Node, server: str) -> Publisher[String]:
    """A publisher for what the node attends at a server, on a topic that is this node's alone."""
    topic = f"{server}/attended/{node.get_name()}_{secrets.token_hex(4)}"
    return node.create_publisher(String, topic, ATTENDED_QOS)


class Attendance:
    """Watches a topic that one client alone publishes on, as `attending` does.

    Middleware tells that some publisher of a topic is gone, and not which one: hence a topic for
    each client. Killed, frozen, cut off or ended in good order, all of them are gone.

    Args:
        node: what subscribes.
        topic: the client's; empty where nobody attends, as with `ros2 action send_goal`.

    Raises:
        UserError: the topic's name makes no sense.
    """

    def __init__(self, node: Node, topic: str) -> None:
        self.present = not topic
        """Whether the client is there, or nobody attends."""
        self.come = not topic
        """Whether it was there, if only for a moment."""
        self._gone, self._began = False, time.monotonic()
        self._node, self._subscription = node, None
        if not topic:
            return
        try:
            self._subscription = node.create_subscription(
                String,
                topic,
                self._on_message,
                _WATCHED_QOS,
                event_callbacks=SubscriptionEventCallbacks(liveliness=self._on_liveliness),
            )
        except (NameValidationException, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"attended_on: '{topic}' is no topic: {reason}") from None

    def _on_message(self, _: String) -> None:
        self.come, self.present = True, not self._gone

    def _on_liveliness(self, change: QoSLivelinessChangedInfo) -> None:
        # Changes, not counts: to who subscribes anew to a client that it knew, Fast DDS 3.2 does
        # not tell that it is there, and counts down to -1 when it goes.
        if change.alive_count_change < 0 or change.not_alive_count_change > 0:
            self.present, self._gone = False, True
        elif change.alive_count_change > 0:
            self.come = self.present = True

    @property
    def attends(self) -> bool:
        """Whether there is such a client and it is there."""
        return self._subscription is not None and self.present

    @property
    def lost(self) -> bool:
        """Whether the client has gone, be it back or not, or has not come in DISCOVERY_TIME."""
        return self._gone or not (self.come or time.monotonic() - self._began < DISCOVERY_TIME)

    def close(self) -> None:
        """Watch no longer: who leaves from now on is not missed."""
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
