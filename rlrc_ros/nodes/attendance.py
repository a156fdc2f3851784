"""Whether whoever runs an episode is still there."""

from __future__ import annotations

from rclpy.duration import Duration
from rclpy.event_handler import QoSLivelinessChangedInfo, SubscriptionEventCallbacks
from rclpy.exceptions import NameValidationException
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, LivelinessPolicy, QoSProfile
from std_msgs.msg import String

from rlrc_ros.errors import UserError

LEASE = 1.0
"""s without a sign of life of a process after which it is taken for gone."""

_QOS = QoSProfile(
    depth=1,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
    liveliness=LivelinessPolicy.AUTOMATIC,
    liveliness_lease_duration=Duration(seconds=LEASE),
)


class Attendance:
    """Watches the topic that one client alone publishes on (`common.ATTENDED_QOS`).

    Middleware tells that some publisher of a topic is gone, and not which one: hence a topic for
    each client. Killed, frozen, cut off or ended in good order, all of them are gone.

    Args:
        node: what subscribes.
        topic: the client's; empty where nobody attends, as with `ros2 action send_goal`.

    Raises:
        UserError: the topic's name makes no sense.
    """

    def __init__(self, node: Node, topic: str) -> None:
        self.come = not topic
        """Whether the client was there, if only for a moment."""
        self.lost = False
        """Whether it is gone since, be it back or not."""
        self._node, self._subscription = node, None
        if not topic:
            return
        try:
            self._subscription = node.create_subscription(
                String,
                topic,
                lambda _: None,
                _QOS,
                event_callbacks=SubscriptionEventCallbacks(liveliness=self._on_liveliness),
            )
        except (NameValidationException, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"attended_on: '{topic}' is no topic: {reason}") from None

    def _on_liveliness(self, change: QoSLivelinessChangedInfo) -> None:
        self.lost = self.lost or (self.come and change.alive_count == 0)
        self.come = self.come or change.alive_count > 0

    def close(self) -> None:
        """Watch no longer: who leaves from now on is not missed."""
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
