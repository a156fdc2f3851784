"""Listens to the talker, sleeps for 1.5 s, and listens on: `python sleeper.py`.

Prints the private memory in bytes before and after the sleep, and then with every image it has
read: "slept before after", "image number memory".
"""

import ctypes
import time
from pathlib import Path

import rclpy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image, JointState


def main():
    rclpy.init(signal_handler_options=SignalHandlerOptions.ALL)
    node = rclpy.create_node("sleeper")
    images = []
    node.create_subscription(Image, "camera1/image", lambda _: images.append(1), 100, raw=True)
    node.create_subscription(JointState, "joint_states", lambda _: None, 100)
    while len(images) < 10:
        rclpy.spin_once(node)
    before = private_memory()
    time.sleep(1.5)
    print(f"slept {before} {private_memory()}", flush=True)
    while rclpy.ok():
        rclpy.spin_once(node, timeout_sec=0.1)
        print(f"image {len(images)} {private_memory()}", flush=True)


def private_memory():
    """Bytes, without what free() has got back and not yet given to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    words = Path("/proc/self/status").read_text().split()
    return 1024 * int(words[words.index("RssAnon:") + 1])


if __name__ == "__main__":
    main()
