"""Two cameras, joint states and a pose, published on command.

    python -m rlrc_ros.ros_bench.sources NOTES JOINT …

A line "SECONDS SUBSCRIBERS" on standard input is a burst: once so many listen to each camera it
prints {"began": …}, publishes for so long, and prints {"sent": …}, the number of messages by topic.
The stamps of all images go into NOTES, as `stamps` reads it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rclpy
from geometry_msgs.msg import PoseStamped
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image, JointState

from rlrc_ros.messages.image import rgb_to_image
from rlrc_ros.messages.joint_state import joint_state
from rlrc_ros.messages.stamps import to_stamp
from rlrc_ros.nodes.common import SENSOR_QOS
from rlrc_ros.ros_bench import topics
from rlrc_ros.ros_bench.stamps import StampWriter

MATCHING_TIME = 30.0
"""s for the subscribers to be found."""
POSITION = (0.45, 0.0, 0.2)
"""m: in the middle of the simulated arm's workspace; its gripper points down."""


class Sources:
    """The publishers, and what each has sent."""

    def __init__(self, joints: list[str], stamps: Path) -> None:
        self.node = rclpy.create_node("sources")
        self.cameras = [self.node.create_publisher(Image, t, SENSOR_QOS) for t in topics.CAMERAS]
        self.joints = self.node.create_publisher(JointState, topics.JOINT_STATES, SENSOR_QOS)
        self.poses = self.node.create_publisher(PoseStamped, topics.EE_POSE, SENSOR_QOS)
        picture = np.random.default_rng(0).integers(
            0, 256, (topics.HEIGHT, topics.WIDTH, 3), np.uint8
        )
        self._image = rgb_to_image(picture, to_stamp(0), "camera")
        self._joint_names = joints
        self._pose = PoseStamped()
        self._pose.header.frame_id = "base"
        point = self._pose.pose.position
        point.x, point.y, point.z = POSITION
        self._pose.pose.orientation.x, self._pose.pose.orientation.w = 1.0, 0.0
        self._stamps = StampWriter(stamps)
        self.sent: Counter[str] = Counter()

    def wait(self, subscribers: int) -> None:
        """Until so many listen to each camera; raises SystemExit where they do not come."""
        end = time.monotonic() + MATCHING_TIME
        while any(p.get_subscription_count() < subscribers for p in self.cameras):
            if time.monotonic() > end:
                counts = [p.get_subscription_count() for p in self.cameras]
                raise SystemExit(f"{counts} subscribers to the cameras, not {subscribers}")
            time.sleep(0.02)
        time.sleep(1.0)  # a subscriber may find the publisher later than the publisher finds it

    def publish(self, seconds: float) -> dict[str, int]:
        """For so long; returns what was sent."""
        self.sent.clear()
        period = 1 / topics.CAMERA_RATE
        # The cameras are not synchronised.
        due: list[tuple[float, float, Callable[[int], None], int]] = [
            (0.0, period, self._camera, 0),
            (period / 2, period, self._camera, 1),
            (0.0, 1 / topics.JOINT_RATE, self._arm, 0),
        ]
        begin = time.monotonic()
        while True:
            due.sort(key=lambda entry: entry[0])
            at, period, publish, number = due[0]
            if at >= seconds:
                break
            time.sleep(max(0.0, begin + at - time.monotonic()))
            publish(number)
            due[0] = (at + period, period, publish, number)
        self._stamps.flush()
        return dict(self.sent)

    def _camera(self, number: int) -> None:
        now = time.time_ns()
        self._image.header.stamp = to_stamp(now)
        self.cameras[number].publish(self._image)
        self._stamps.write(number, now)
        self.sent[topics.CAMERAS[number]] += 1

    def _arm(self, _: int) -> None:
        stamp = to_stamp(time.time_ns())
        zeros = [0.0] * len(self._joint_names)
        self.joints.publish(joint_state(self._joint_names, zeros, [], stamp))
        self._pose.header.stamp = stamp
        self.poses.publish(self._pose)
        self.sent[topics.JOINT_STATES] += 1


def main(notes: str, *joints: str) -> None:
    """Serve bursts until standard input ends, or SIGINT."""
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    sources = Sources(list(joints), Path(notes))
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            seconds, subscribers = line.split()
            sources.wait(int(subscribers))
            print(json.dumps({"began": time.time_ns()}), flush=True)
            print(json.dumps({"sent": sources.publish(float(seconds))}), flush=True)
    sources.node.destroy_node()
    rclpy.try_shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
