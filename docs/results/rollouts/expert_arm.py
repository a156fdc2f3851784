"""The simulated arm's node, with the scripted expert at the operator's stick.

It publishes what the expert would do now, ten times a second, on operator/twist and
operator/gripper. Nobody obeys unless `operator_node` has taken the arm over.
"""

import sys

from geometry_msgs.msg import TwistStamped
from std_msgs.msg import Float64

from rlrc_ros.messages.command import action_to_twist, twist_stamped
from rlrc_ros.nodes import common
from rlrc_ros.nodes.sim_arm_node import SimArmNode
from rlrc_ros.sim.expert import expert_action
from rlrc_ros.sim.tabletop import CONTROL_RATE


class _ExpertArm(SimArmNode):
    def __init__(self) -> None:
        super().__init__()
        self._stick = self.create_publisher(TwistStamped, "operator/twist", common.COMMAND_QOS)
        self._hand = self.create_publisher(Float64, "operator/gripper", common.COMMAND_QOS)
        self.create_timer(1 / CONTROL_RATE, self._move_stick, clock=common.STEADY_CLOCK)

    def _move_stick(self) -> None:
        twist, opening = action_to_twist(expert_action(self._world), CONTROL_RATE)
        self._hand.publish(Float64(data=opening))
        stamp = self.get_clock().now().to_msg()
        self._stick.publish(twist_stamped(twist, stamp, self._frame))


if __name__ == "__main__":
    sys.exit(common.run(_ExpertArm, _ExpertArm.close))
