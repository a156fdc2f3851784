"""Counts the talker's images as one that takes what comes (best effort): `python reader.py`."""

import rclpy
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image, JointState


def main():
    rclpy.init(signal_handler_options=SignalHandlerOptions.ALL)
    node = rclpy.create_node("reader")
    qos = QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT)
    images = []

    def count(_):
        images.append(1)
        print(f"image {len(images)}", flush=True)

    for name in ("1", "2"):
        node.create_subscription(Image, f"camera{name}/image", count, qos, raw=True)
    node.create_subscription(JointState, "joint_states", lambda _: None, qos)
    while rclpy.ok():
        rclpy.spin_once(node, timeout_sec=0.1)


if __name__ == "__main__":
    main()
