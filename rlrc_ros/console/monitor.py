"""What the console sees of the robot beside the trial: cameras, the guard, and its stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import cv2
import rclpy
from rclpy.client import Client
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from rlrc.msg import GuardStatus
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Bool
from std_srvs.srv import Trigger

from rlrc_ros.errors import UserError
from rlrc_ros.guard import STOPPED
from rlrc_ros.messages.image import image_to_rgb
from rlrc_ros.nodes import common, dead_ports
from rlrc_ros.profile import RobotProfile

FREE, ABSENT = "free", "absent"
SILENCE = 1.0
"""s without a status after which the guard counts as gone; it tells ten times a second."""
ANSWER_TIME = 5.0
"""s for the guard to answer."""
_LARGEST_SIDE = 960
_JPEG_QUALITY = 80


class Picture(NamedTuple):
    """A camera's latest picture."""

    number: int
    """How many came before it: another number, another picture."""
    age: float
    """s since it came."""
    jpeg: bytes


class _Came(NamedTuple):
    number: int
    at: float
    message: Any


class RobotMonitor:
    """A node of its own in a thread of its own: a stop never waits for anything else.

    Args:
        profile: the robot.
        on_change: called, from that thread, when the arm is stopped or freed.
    """

    def __init__(self, profile: RobotProfile, on_change: Callable[[], None]) -> None:
        self.cameras = list(profile.cameras)
        self._on_change = on_change
        self._came: dict[str, _Came] = {}
        self._encoded: dict[str, tuple[int, bytes]] = {}
        self._encoding = threading.Lock()
        self._guard: tuple[float, GuardStatus] | None = None
        self._context = rclpy.Context()
        rclpy.init(context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        with dead_ports.avoided():
            self._node = rclpy.create_node("rlrc_console", context=self._context)
        for name, camera in profile.cameras.items():
            kind = CompressedImage if camera.compressed else Image
            keep = partial(self._on_picture, name)
            self._node.create_subscription(kind, camera.topic, keep, common.SENSOR_QOS)
        self._node.create_subscription(GuardStatus, "command_guard/status", self._on_guard, 10)
        self._emergency = self._node.create_publisher(Bool, "emergency_stop", 10)
        release: Client[Any, Any] = self._node.create_client(Trigger, "command_guard/release")
        self._release = release
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._executor.spin, name="monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave the ROS graph."""
        self._executor.shutdown()
        self._thread.join(ANSWER_TIME)
        self._node.destroy_node()
        self._context.try_shutdown()

    def guard(self) -> dict[str, str]:
        """`state`: free, stopped or absent, and `reason`.

        No more: how often a policy keeps the guard waiting would tell a fast one from a slow one.
        """
        came = self._guard
        if came is None or time.monotonic() - came[0] > SILENCE:
            return {"state": ABSENT, "reason": "the command guard is silent"}
        if came[1].state == STOPPED:
            return {"state": STOPPED, "reason": came[1].reason}
        return {"state": FREE, "reason": ""}

    def emergency_stop(self) -> None:
        """Have the guard command zero at once and stay so until released.

        Raises:
            UserError: nobody listens: the arm has to be stopped by its own button.
        """
        self._emergency.publish(Bool(data=True))
        if not self._emergency.get_subscription_count():
            raise UserError("no command guard hears the stop: use the robot's own button")

    def release(self) -> None:
        """End a stop.

        Raises:
            UserError: the guard refuses, is missing or silent.
        """
        if self.guard()["state"] != STOPPED:
            raise UserError("nothing is stopped")
        if not self._release.service_is_ready():
            raise UserError("the command guard is not there")
        self._emergency.publish(Bool(data=False))
        deadline = time.monotonic() + ANSWER_TIME
        refusal = "the command guard did not answer"
        while time.monotonic() < deadline:
            response = self._answer(self._release.call_async(Trigger.Request()), deadline)
            if response is None:
                break
            if response.success:
                return
            refusal = response.message
            if "emergency_stop" not in refusal:
                break
            time.sleep(0.02)  # the service was faster than the topic
        raise UserError(f"not released: {refusal}")

    @staticmethod
    def _answer(future: Any, deadline: float) -> Any | None:
        """The future's result, once the node's thread has it; None where it does not come."""
        answered = threading.Event()
        future.add_done_callback(lambda _: answered.set())
        return future.result() if answered.wait(deadline - time.monotonic()) else None

    def picture(self, camera: str, after: int = -1) -> Picture | None:
        """The latest picture of a camera; None where there is none but number `after`.

        Raises:
            UserError: it is in an encoding that is not accepted.
        """
        came = self._came.get(camera)
        if came is None or came.number == after:
            return None
        with self._encoding:
            number, jpeg = self._encoded.get(camera, (-1, b""))
            if number != came.number:
                jpeg = _jpeg(came.message)
                self._encoded[camera] = (came.number, jpeg)
        return Picture(came.number, time.monotonic() - came.at, jpeg)

    def _on_picture(self, camera: str, message: Any) -> None:
        before = self._came.get(camera)
        number = before.number + 1 if before else 0
        self._came[camera] = _Came(number, time.monotonic(), message)

    def _on_guard(self, status: GuardStatus) -> None:
        before = self.guard()
        self._guard = (time.monotonic(), status)
        if before != self.guard():
            self._on_change()


def _jpeg(message: Any) -> bytes:
    rgb = image_to_rgb(message)
    scale = _LARGEST_SIDE / max(rgb.shape[:2])
    if scale < 1:
        rgb = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    return cv2.imencode(".jpg", rgb[..., ::-1], quality)[1].tobytes()
