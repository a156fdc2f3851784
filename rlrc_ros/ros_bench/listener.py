"""The ear and the hand of a measurement: hears commands, asks for episodes and recordings."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import rclpy
from geometry_msgs.msg import TwistStamped
from rclpy.action.client import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from rlrc.action import RunEpisode
from rlrc.msg import GuardStatus, PolicyCommand
from rlrc.srv import ListPolicies, LoadPolicy, StartRecording, StopRecording

from rlrc_ros.errors import UserError
from rlrc_ros.messages.command import twist_array
from rlrc_ros.messages.stamps import to_nanoseconds
from rlrc_ros.ros_bench import topics
from rlrc_ros.ros_bench.rows import Sent, Speed

PATIENCE = 60.0
"""s for a node to start and to answer: loading a policy is part of it."""


class Listener:
    """Use in `with`; everything it hears is kept until `forget`.

    Args:
        alive: raises UserError where a process has ended.
        ee_command: the controller's topic.
        logs: where the processes write; named where one does not answer.
    """

    def __init__(self, alive: Callable[[], None], ee_command: str, logs: Path) -> None:
        self._alive, self._logs = alive, logs
        self._context = rclpy.Context()
        rclpy.init(context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        self._node = rclpy.create_node("bench", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self.commands: dict[str, list[Sent]] = {}
        """By topic."""
        self.speeds: list[Speed] = []
        for topic in ("policy_command", topics.RELAY_AT_RATE, topics.RELAY_ON_ARRIVAL):
            self.commands[topic] = []
            self._node.create_subscription(PolicyCommand, topic, self._keeper(topic), 100)
        self._node.create_subscription(TwistStamped, ee_command, self._on_twist, 100)
        self.liveliness_lost = 0
        """How often the guard has missed the policy's signs of life since it started."""
        self._node.create_subscription(GuardStatus, "command_guard/status", self._on_guard, 10)
        self._clients: dict[str, Any] = {
            "start": self._node.create_client(StartRecording, "recorder/start"),
            "stop": self._node.create_client(StopRecording, "recorder/stop"),
            "swap": self._node.create_client(LoadPolicy, "policy/load_policy"),
        }

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._executor.shutdown()
        self._node.destroy_node()
        self._context.try_shutdown()

    def forget(self) -> None:
        """Drop what was heard."""
        self.speeds.clear()
        for commands in self.commands.values():
            commands.clear()

    def spin(self, seconds: float) -> None:
        """Listen for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=min(left, 0.1))
        self._alive()

    def until(self, condition: Callable[[], Any], what: str, timeout: float = PATIENCE) -> None:
        """Listen until the condition holds; raises UserError where it does not in time."""
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                raise UserError(f"waited {timeout:g} s for {what}; see {self._logs}")
            self._executor.spin_once(timeout_sec=0.05)
            self._alive()

    def wait_for_policy(self) -> None:
        """Until a policy is loaded; the policy node may just have been started, or anew."""
        client: Any = self._node.create_client(ListPolicies, "policy/list_policies")
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            self.until(client.service_is_ready, "the policy node")
            asked = client.call_async(ListPolicies.Request())
            answer_by = time.monotonic() + 5.0
            while not asked.done() and time.monotonic() < answer_by:
                self._executor.spin_once(timeout_sec=0.05)
                self._alive()
            if asked.done() and any(policy.loaded for policy in asked.result().policies):
                self._node.destroy_client(client)
                return
            self.spin(0.2)
        raise UserError(f"the policy node loaded no policy within {PATIENCE:g} s; see {self._logs}")

    def episode(self, instruction: str, seconds: float) -> Any:
        """Begin an episode as soon as one can be; the future of its result.

        Its client is made anew, so that a policy node that was killed and started again is found.
        """
        client: Any = ActionClient(self._node, RunEpisode, "policy/run_episode")
        goal = RunEpisode.Goal(instruction=instruction, max_duration=seconds)
        end = time.monotonic() + PATIENCE
        while True:
            self.until(client.server_is_ready, "the policy node")
            sent = client.send_goal_async(goal)
            # The request of a client that the server has not found yet is never answered.
            answer_by = time.monotonic() + 2.0
            while not sent.done() and time.monotonic() < answer_by:
                self._executor.spin_once(timeout_sec=0.05)
                self._alive()
            if sent.done() and sent.result().accepted:
                return sent.result().get_result_async()
            if time.monotonic() > end:
                raise UserError(
                    f"the policy node took no goal within {PATIENCE:g} s; see {self._logs}"
                )
            self.spin(0.2)

    def swap(self, label: str) -> tuple[float, float]:
        """Make a resident policy the active one: ms of the call, and of the swap in it."""
        client = self._clients["swap"]
        self.until(client.service_is_ready, "the policy node")
        asked = time.perf_counter()
        future = client.call_async(LoadPolicy.Request(label=label))
        self.until(future.done, "the swap")
        answered = time.perf_counter()
        response = future.result()
        if not response.success:
            raise UserError(f"the policy node: {response.message}")
        return (answered - asked) * 1e3, response.seconds * 1e3

    def start_recording(self, episode_id: str) -> str:
        """The bag's URI."""
        response = self._call("start", StartRecording.Request(episode_id=episode_id))
        return str(response.uri)

    def stop_recording(self) -> None:
        """Finish the bag."""
        self._call("stop", StopRecording.Request(termination_reason="finished"))

    def _call(self, name: str, request: Any) -> Any:
        client = self._clients[name]
        self.until(client.service_is_ready, "the recorder")
        self.spin(0.3)  # it may not know yet where to answer
        future = client.call_async(request)
        self.until(future.done, f"the recorder's answer to {name}")
        response = future.result()
        if not response.success:
            raise UserError(f"the recorder: {response.message}")
        return response

    def _keeper(self, topic: str) -> Callable[[PolicyCommand], None]:
        commands = self.commands[topic]

        def keep(message: PolicyCommand) -> None:
            published = to_nanoseconds(message.header.stamp)
            commands.append(Sent(published, to_nanoseconds(message.observation_stamp)))

        return keep

    def _on_guard(self, message: GuardStatus) -> None:
        self.liveliness_lost = message.liveliness_lost

    def _on_twist(self, message: TwistStamped) -> None:
        speed = float(np.linalg.norm(twist_array(message.twist)))
        self.speeds.append(Speed(to_nanoseconds(message.header.stamp), speed))
