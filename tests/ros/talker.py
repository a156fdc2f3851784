"""Cameras at 30 Hz and an arm at 100 Hz: `python talker.py subscribers seconds [camera …]`.

Waits until every topic has so many subscribers, publishes for so long, says how much, and stays
until it is killed, as a robot does.
"""

import sys
import time

import numpy as np
import rclpy
from builtin_interfaces.msg import Time
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from rlrc_ros.messages.image import rgb_to_image
from rlrc_ros.messages.joint_state import joint_state


def main(subscribers, seconds, *cameras):
    rclpy.init(signal_handler_options=SignalHandlerOptions.ALL)
    node = rclpy.create_node("talker")
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    description = node.create_publisher(String, "robot_description", latched)
    description.publish(String(data="<robot/>"))
    # Reliable, unlike a real camera, so that a test can count them on a busy machine too.
    images = [node.create_publisher(Image, f"camera{name}/image", 100) for name in cameras]
    joints = node.create_publisher(JointState, "joint_states", 100)
    while rclpy.ok() and any(p.get_subscription_count() < subscribers for p in [*images, joints]):
        time.sleep(0.01)
    time.sleep(1.5)  # a subscriber may find the publisher later than the publisher finds it
    picture = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    begin, sent_images, sent_joints = time.monotonic(), 0, 0
    while rclpy.ok() and (now := time.monotonic() - begin) < seconds:
        if now >= sent_joints / 100:
            stamp = Time(sec=sent_joints)
            joints.publish(joint_state(["a", "b"], [sent_joints, 0.5], [], stamp))
            sent_joints += 1
        if now >= sent_images / 30:
            picture[0, 0] = sent_images % 256
            for publisher in images:
                publisher.publish(rgb_to_image(picture, Time(sec=sent_images), "camera"))
            sent_images += 1
        time.sleep(0.001)
    print(f"sent {sent_images} {sent_joints}", flush=True)
    while rclpy.ok():
        time.sleep(0.1)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:])
