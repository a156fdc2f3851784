"""The yardstick: the least that a node in Python can do with cameras and joint states.

    python -m rlrc_ros.ros_bench.relay RATE TOPIC …

Publishes a command for every image when it comes, and RATE times a second one for the oldest of the
latest messages of the topics named, as a policy looks at them. It looks at no pixel.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from rclpy.node import Node
from rlrc.msg import PolicyCommand
from sensor_msgs.msg import Image, JointState

from rlrc_ros.messages.command import policy_command
from rlrc_ros.messages.stamps import to_nanoseconds
from rlrc_ros.nodes import common
from rlrc_ros.ros_bench import topics


class Relay(Node):
    """Messages in, their stamps out."""

    def __init__(self, rate: float, looked_at: list[str]) -> None:
        super().__init__("relay")
        self._looked_at = looked_at
        self._latest: dict[str, Any] = {}
        self._at_rate = self.create_publisher(
            PolicyCommand, topics.RELAY_AT_RATE, common.COMMAND_QOS
        )
        self._on_arrival = self.create_publisher(
            PolicyCommand, topics.RELAY_ON_ARRIVAL, common.COMMAND_QOS
        )
        for topic in topics.CAMERAS:
            self.create_subscription(Image, topic, self._keeper(topic, True), common.SENSOR_QOS)
        joints = topics.JOINT_STATES
        self.create_subscription(JointState, joints, self._keeper(joints, False), common.SENSOR_QOS)
        self.create_timer(1 / rate, self._tick, clock=common.STEADY_CLOCK)

    def _keeper(self, topic: str, relayed: bool) -> Any:
        def keep(message: Any) -> None:
            self._latest[topic] = message
            if relayed:
                self._publish(self._on_arrival, message.header.stamp)

        return keep

    def _tick(self) -> None:
        if all(topic in self._latest for topic in self._looked_at):
            stamps = [self._latest[topic].header.stamp for topic in self._looked_at]
            self._publish(self._at_rate, min(stamps, key=to_nanoseconds))

    def _publish(self, publisher: Any, observed: Any) -> None:
        command = policy_command(
            np.zeros(6),
            0.0,
            stamp=self.get_clock().now().to_msg(),
            observation_stamp=observed,
            frame_id="base",
            policy_label="relay",
            episode_id="relay",
            step=0,
        )
        publisher.publish(command)


def main() -> int:
    """Run the node."""
    rate, *looked_at = sys.argv[1:]
    return common.run(lambda: Relay(float(rate), looked_at))


if __name__ == "__main__":
    sys.exit(main())
