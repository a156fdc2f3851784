"""The simulated tabletop behind the topics of a real arm's drivers.

    ros2 run rlrc sim_arm_node

Real time: the simulation follows the wall clock. A velocity command holds until the next one, but
no longer than `command_timeout`, as velocity controllers for real arms have it.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.node import Node
from rlrc.msg import TaskState
from rlrc.srv import ResetScene
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray

from rlrc_ros.errors import UserError
from rlrc_ros.messages.command import twist_array
from rlrc_ros.messages.image import rgb_to_image
from rlrc_ros.messages.joint_state import joint_state
from rlrc_ros.nodes import common
from rlrc_ros.sim.model import FINGER_STROKE
from rlrc_ros.sim.world import World

FINGER_JOINT = "finger_joint"
LONGEST_STEP = 0.1
"""s simulated at once; after a longer stall of the process the simulation falls behind."""


class SimArmNode(Node):
    """Commands in, sensors out."""

    def __init__(self) -> None:
        super().__init__("sim_arm")
        self._frame = common.text(self, "base_frame", "base", "frame of commands and poses")
        rate = common.number(self, "rate", 50.0, "joint states and poses, Hz", 10.0, 200.0)
        camera_rate = common.number(self, "camera_rate", 30.0, "images, Hz", 1.0, 60.0)
        size = common.integer(self, "image_size", 128, "width and height, pixels", 16, 1024)
        self._timeout = common.number(
            self, "command_timeout", 0.1, "s that a velocity command holds", 0.02, 2.0
        )
        self._world = World(size)
        self._commanded = self._advanced = time.monotonic()

        self._joints = self.create_publisher(JointState, "joint_states", common.SENSOR_QOS)
        self._pose = self.create_publisher(PoseStamped, "ee_pose", common.SENSOR_QOS)
        self._image = self.create_publisher(Image, "image_raw", common.SENSOR_QOS)
        self._task = self.create_publisher(TaskState, "~/task_state", 10)
        self.create_subscription(TwistStamped, "ee_command", self._on_twist, common.COMMAND_QOS)
        self.create_subscription(
            Float64MultiArray, "gripper_command", self._on_gripper, common.COMMAND_QOS
        )
        self.create_service(ResetScene, "~/reset", self._on_reset)
        self.create_timer(1 / rate, self._advance, clock=common.STEADY_CLOCK)
        self.create_timer(1 / camera_rate, self._publish_image, clock=common.STEADY_CLOCK)
        self.create_timer(0.1, self._publish_task, clock=common.STEADY_CLOCK)
        self.get_logger().info("simulated arm ready")

    def close(self) -> None:
        """Free the renderer in the thread that made it."""
        self._world.close()

    def _on_twist(self, message: TwistStamped) -> None:
        try:
            if message.header.frame_id != self._frame:
                raise UserError(f"in frame '{message.header.frame_id}', not '{self._frame}'")
            self._world.set_twist(twist_array(message.twist))
            self._commanded = time.monotonic()
        except UserError as error:
            self.get_logger().error(f"ee_command ignored: {error}", throttle_duration_sec=1.0)

    def _on_gripper(self, message: Float64MultiArray) -> None:
        try:
            if len(message.data) != 1:
                raise UserError(f"wanted one number, got {len(message.data)}")
            self._world.set_gripper(message.data[0])
        except UserError as error:
            self.get_logger().error(f"gripper_command ignored: {error}", throttle_duration_sec=1.0)

    def _on_reset(
        self, request: ResetScene.Request, response: ResetScene.Response
    ) -> ResetScene.Response:
        try:
            scene = self._world.reset(request.seed, request.task or None)
        except UserError as error:
            response.message = str(error)
            return response
        self._advanced = time.monotonic()
        response.success = True
        response.task, response.instruction = scene.family, scene.instruction
        response.instructions = list(scene.instructions)
        self.get_logger().info(f"scene {scene.seed}: {scene.instruction}")
        return response

    def _advance(self) -> None:
        now = time.monotonic()
        if now - self._commanded > self._timeout:
            self._world.set_twist(np.zeros(6))
        self._world.advance(min(now - self._advanced, LONGEST_STEP))
        self._advanced = now
        stamp = self.get_clock().now().to_msg()
        world = self._world
        names = [*world.joint_names, FINGER_JOINT]
        finger = world.gripper_opening() * FINGER_STROKE
        positions = np.append(world.joint_positions(), finger)
        velocities = np.append(world.joint_velocities(), 0.0)
        self._joints.publish(joint_state(names, positions, velocities, stamp))
        pose = PoseStamped()
        pose.header.stamp, pose.header.frame_id = stamp, self._frame
        position, orientation = pose.pose.position, pose.pose.orientation
        position.x, position.y, position.z = map(float, world.ee_position())
        orientation.x, orientation.y, orientation.z, orientation.w = map(
            float, world.ee_quaternion()
        )
        self._pose.publish(pose)

    def _publish_image(self) -> None:
        stamp = self.get_clock().now().to_msg()
        self._image.publish(rgb_to_image(self._world.render(), stamp, "camera_front"))

    def _publish_task(self) -> None:
        scene = self._world.scene
        state = TaskState(seed=scene.seed, task=scene.family, instruction=scene.instruction)
        state.header.stamp = self.get_clock().now().to_msg()
        state.success = self._world.success()
        self._task.publish(state)


def main() -> int:
    """Run the node."""
    return common.run(SimArmNode, SimArmNode.close)


if __name__ == "__main__":
    sys.exit(main())
