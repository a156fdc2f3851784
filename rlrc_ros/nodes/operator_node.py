"""An operator's takeover: the arm by hand where a policy got stuck, recorded as an episode.

    ros2 run rlrc operator_node
    ros2 service call /operator/take_over std_srvs/srv/Trigger
    ros2 service call /operator/hand_back std_srvs/srv/Trigger

In between, what a teleop tool publishes on `operator/twist` (m/s and rad/s in the base frame, with
a stamp) and `operator/gripper` (0 closed, 1 open) goes to the command guard, under all of its
limits, with a label of its own. Nothing is sent while the tool is silent. The bag is the policy's
episode continued: same instruction, other label. `rlrc bag export --policy operator` finds it.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from action_msgs.srv import CancelGoal
from geometry_msgs.msg import TwistStamped
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.client import Client
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rlrc.msg import GuardStatus, PolicyCommand, PolicyStatus
from rlrc.srv import StartRecording
from std_msgs.msg import Float64
from std_srvs.srv import Trigger

from rlrc_ros import execution
from rlrc_ros.errors import UserError
from rlrc_ros.guard import STOPPED
from rlrc_ros.messages.command import policy_command, twist_array
from rlrc_ros.nodes import common
from rlrc_ros.nodes.recorder_client import RecorderClient

PATIENCE = 10.0
"""s for the policy's episode to end and its bag to be closed."""
SILENCE = 2.0
"""s without a word that its episode runs, which comes with every step; then it does no more."""
FAREWELL_TIME = 3.0
"""s that a takeover cut off by SIGINT or SIGTERM may take to close its bag."""


class OperatorNode(Node):
    """A stick's commands in, those of a labelled episode out."""

    def __init__(self) -> None:
        super().__init__("operator")
        self._label = common.text(self, "label", "operator", "what the commands are labelled with")
        if not self._label:
            raise UserError("parameter label is empty: the command guard takes nothing unlabelled")
        self._policy = PolicyStatus()
        """Of the last running episode, whatever came after."""
        self._running_at = -math.inf
        """When it last said that it runs; in the past once it has said that none does."""
        self._stopped = ""
        """Why the guard has stopped the arm; empty where it has not."""
        self._opening: float | None = None
        """Last commanded opening of the gripper, by a policy or the operator."""
        self._episode_id = ""
        """Of the takeover; empty where there is none."""
        self._busy = False
        """A takeover is beginning or ending."""
        self._uri, self._steps, self._frame = "", 0, ""
        self._takeovers: Counter[str] = Counter()

        self._commands = self.create_publisher(PolicyCommand, "policy_command", common.POLICY_QOS)
        self.create_subscription(PolicyStatus, "policy/status", self._on_policy, 10)
        self.create_subscription(GuardStatus, "command_guard/status", self._on_guard, 10)
        self.create_subscription(
            PolicyCommand, "policy_command", self._on_command, QoSProfile(depth=10)
        )
        self.create_subscription(TwistStamped, "operator/twist", self._on_twist, common.COMMAND_QOS)
        self.create_subscription(Float64, "operator/gripper", self._on_gripper, common.COMMAND_QOS)
        self._cancel: Client[Any, Any] = self.create_client(
            CancelGoal, "policy/run_episode/_action/cancel_goal"
        )
        self._recorder = RecorderClient(self, self._on_recorder_lost)
        # Of a group of their own: in the node's, nothing else would run while they wait.
        apart = ReentrantCallbackGroup()
        for name, answer in {"take_over": self._take_over, "hand_back": self._hand_back}.items():
            self.create_service(Trigger, f"~/{name}", answer, callback_group=apart)
        self.get_logger().info(f"ready to take over as '{self._label}'")

    def leave(self) -> None:
        """Before the process ends: stop the arm and close the bag."""
        if not self._episode_id or self._busy:
            return
        self._recorder.hurry(FAREWELL_TIME / 2)
        executor, deadline = self.executor, time.monotonic() + FAREWELL_TIME
        assert executor is not None
        task = executor.create_task(self._end_quietly, execution.NODE_DEACTIVATED)
        while not task.done() and time.monotonic() < deadline:
            executor.spin_once(timeout_sec=0.1)

    def _on_policy(self, status: PolicyStatus) -> None:
        running = status.state == "running"
        self._running_at = time.monotonic() if running else -math.inf
        if running:
            self._policy = status

    def _policy_runs(self) -> bool:
        return time.monotonic() - self._running_at < SILENCE

    def _on_guard(self, status: GuardStatus) -> None:
        self._stopped = status.reason if status.state == STOPPED else ""
        if self._stopped:
            self._end_soon(execution.GUARD_STOP, self._stopped)

    def _on_recorder_lost(self, reason: str) -> None:
        self._end_soon(execution.RECORDING_LOST, reason)

    def _on_command(self, command: PolicyCommand) -> None:
        # Not what this node has sent itself: it comes late, and the stick may have moved on.
        if command.policy_label != self._label and math.isfinite(command.gripper):
            self._opening = command.gripper

    def _on_gripper(self, message: Float64) -> None:
        if self._episode_id and math.isfinite(message.data):
            self._opening = message.data

    def _on_twist(self, message: TwistStamped) -> None:
        if not self._episode_id or self._busy:
            return
        if self._opening is None:
            self.get_logger().warning(
                "dropped: nobody has commanded the gripper yet; publish operator/gripper first",
                throttle_duration_sec=5.0,
            )
            return
        self._frame = message.header.frame_id
        self._publish(twist_array(message.twist), message.header.stamp)

    def _publish(self, twist: Any, stamp: Any) -> None:
        command = policy_command(
            twist,
            self._opening if self._opening is not None else math.nan,
            stamp=stamp,
            observation_stamp=stamp,
            frame_id=self._frame,
            policy_label=self._label,
            episode_id=self._episode_id,
            step=self._steps,
        )
        self._commands.publish(command)
        self._steps += 1

    async def _take_over(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return await self._answer(response, self._begin)

    async def _hand_back(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        async def end() -> str:
            if not self._episode_id:
                raise UserError("nothing was taken over")
            return await self._end(execution.FINISHED)

        return await self._answer(response, end)

    async def _answer(self, response: Trigger.Response, do: Callable[[], Any]) -> Trigger.Response:
        try:
            if self._busy:
                raise UserError("a takeover is beginning or ending")
            response.message, response.success = await do(), True
        except UserError as error:
            response.message = str(error)
        return response

    async def _begin(self) -> str:
        """Stop the policy, then record; the bag's URI."""
        taken = self._policy
        if self._episode_id:
            raise UserError(f"{self._episode_id} goes on already")
        if not taken.episode_id:
            raise UserError("no episode of a policy has been heard of: there is none to take over")
        if self._stopped:
            raise UserError(f"the command guard is stopped: {self._stopped}; release it first")
        self._busy = True
        try:
            await self._stop_policy()
            self._takeovers[taken.episode_id] += 1
            count = self._takeovers[taken.episode_id]
            episode_id = f"{taken.episode_id}-{self._label}" + (f"-{count}" if count > 1 else "")
            about = {"takeover_of": taken.episode_id, "policy_label": taken.policy_label}
            self._uri = await self._recorder.start(
                StartRecording.Request(
                    episode_id=episode_id,
                    instruction=taken.instruction,
                    policy_label=self._label,
                    metadata_json=json.dumps(about),
                )
            )
            self._episode_id, self._steps = episode_id, 0
        finally:
            self._busy = False
        self.get_logger().info(f"{episode_id}: the operator has the arm, to {taken.instruction}")
        return self._uri

    async def _stop_policy(self) -> None:
        if not self._policy_runs():
            return
        # Names no goal, so all are meant (action_msgs/CancelGoal).
        self._cancel.call_async(CancelGoal.Request())
        if not await common.until(self, lambda: not self._policy_runs(), PATIENCE):
            raise UserError(f"the policy's episode has not ended within {PATIENCE:g} s")

    def _end_soon(self, reason: str, message: str) -> None:
        if self._episode_id and not self._busy:
            self.get_logger().warning(f"{self._episode_id}: {reason}: {message}")
            assert self.executor is not None
            self.executor.create_task(self._end_quietly, reason)

    async def _end_quietly(self, reason: str) -> None:
        """As `_end`, where nobody waits for the answer; the log has it."""
        with suppress(UserError):
            await self._end(reason)

    async def _end(self, reason: str) -> str:
        """Stop the arm, close the bag; its URI."""
        self._busy = True
        try:
            if self._steps:
                self._publish(np.zeros(6), self.get_clock().now().to_msg())
            problem = await self._recorder.stop(self._episode_id, reason)
        finally:
            ended, self._episode_id, self._busy = self._episode_id, "", False
        self.get_logger().info(f"{ended}: {reason}, {self._steps} commands {problem}")
        if problem:
            raise UserError(f"{self._uri}: {problem}")
        return self._uri


def main() -> int:
    """Run the node."""
    return common.run(OperatorNode, OperatorNode.leave)


if __name__ == "__main__":
    sys.exit(main())
