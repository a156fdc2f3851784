"""The nodes as a script sees them: calls that block, with time limits and clear errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import rclpy
from rclpy.action.client import ActionClient
from rclpy.client import Client
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from rlrc.action import RunEpisode
from rlrc.msg import GuardStatus, TaskState
from rlrc.srv import LabelEpisode, ListPolicies, LoadPolicy, ResetScene
from std_srvs.srv import Trigger

from rlrc_ros.errors import UserError
from rlrc_ros.messages.stamps import to_nanoseconds

ANSWER_TIME = 30.0
"""s for a service to answer; loading a large policy takes longer, see `load_policy`."""


@dataclass
class EpisodeOutcome:
    """How an episode went, as the nodes and the simulator's ground truth tell it.

    Attributes:
        result: what the policy node answered.
        success: whether the task was done.
        duration: s from sending the goal to the end of the episode.
        guard: by how much the guard's counters rose.
    """

    result: RunEpisode.Result
    success: bool
    duration: float
    guard: dict[str, int]


class RobotClient:
    """Talks to the policy node, the recorder, the guard and the simulated arm. Use in `with`."""

    def __init__(self) -> None:
        self._context = rclpy.Context()
        rclpy.init(context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        self._node = rclpy.create_node("rlrc_client", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._alive: Callable[[], None] = lambda: None
        self._task: TaskState | None = None
        self._guard: GuardStatus | None = None
        self._node.create_subscription(TaskState, "sim_arm/task_state", self._on_task, 10)
        self._node.create_subscription(GuardStatus, "command_guard/status", self._on_guard, 10)
        self._run: ActionClient[Any, Any, Any] = ActionClient(
            self._node, RunEpisode, "policy/run_episode"
        )
        # All at once: a service may not know yet where to answer a client that has just appeared.
        self._clients: dict[str, Client[Any, Any]] = {
            name: self._node.create_client(kind, name)
            for name, kind in {
                "policy/list_policies": ListPolicies,
                "policy/load_policy": LoadPolicy,
                "policy/finish_episode": Trigger,
                "recorder/label": LabelEpisode,
                "sim_arm/reset": ResetScene,
            }.items()
        }

    def __enter__(self) -> RobotClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
        self._run.destroy()
        self._node.destroy_node()
        self._context.try_shutdown()

    def wait_until_ready(self, alive: Callable[[], None], timeout: float = 60.0) -> None:
        """Wait until all nodes answer.

        alive: called in every wait from now on; raises when a node has died.

        Raises:
            UserError: not all of them are there in time.
        """
        self._alive = alive
        waiting = {
            "policy/run_episode": self._run.server_is_ready,
            "command_guard": lambda: self._guard is not None,
            "sim_arm": lambda: self._task is not None,
            "recorder": self._clients["recorder/label"].service_is_ready,
        }

        if not self._until(lambda: all(there() for there in waiting.values()), timeout):
            missing = [name for name, there in waiting.items() if not there()]
            raise UserError(f"no answer from {', '.join(missing)} within {timeout:g} s")
        deadline = time.monotonic() + timeout
        while not self.policies():
            if time.monotonic() > deadline:
                raise UserError(f"policy_node has loaded nothing within {timeout:g} s")
            self._until(lambda: False, 0.2)

    def policies(self) -> list[Any]:
        """What the policy node has loaded: rlrc/PolicyInfo."""
        return list(self._call("policy/list_policies").policies)

    def load_policy(self, label: str, policy: str = "", timeout: float = 600.0) -> float:
        """Make a policy active, loading it if a bundle is given; returns the seconds it took."""
        response = self._call("policy/load_policy", timeout, policy=policy, label=label)
        _check(response)
        return response.seconds

    def reset_scene(self, seed: int) -> ResetScene.Response:
        """Set up the simulated scene of a seed."""
        response = self._call("sim_arm/reset", seed=seed)
        _check(response)
        # What comes first may still tell of the scene before, which may have had the same seed.
        reset_at = self._node.get_clock().now().nanoseconds

        def is_up() -> bool:
            return self._task is not None and to_nanoseconds(self._task.header.stamp) > reset_at

        if not self._until(is_up, ANSWER_TIME):
            raise UserError(f"sim_arm/task_state has not come within {ANSWER_TIME:g} s")
        return response

    def label_episode(self, uri: str, outcome: str, notes: str = "") -> None:
        """Write down an episode's outcome in its bag."""
        _check(self._call("recorder/label", uri=uri, outcome=outcome, notes=notes))

    def run_episode(
        self, instruction: str, label: str, episode_id: str, max_duration: float, record: bool
    ) -> EpisodeOutcome:
        """Run one episode on the simulated arm, finishing it as soon as the task is done."""
        before = self._guard
        began = time.monotonic()
        goal = RunEpisode.Goal(
            instruction=instruction,
            policy_label=label,
            episode_id=episode_id,
            max_duration=max_duration,
            record=record,
        )
        handle = self._wait(self._run.send_goal_async(goal), ANSWER_TIME, "policy/run_episode")
        if not handle.accepted:
            raise UserError("the policy node refuses the episode; its log says why")
        result = handle.get_result_async()
        success = False
        while not self._until(result.done, 0.02):
            if time.monotonic() - began > max_duration + ANSWER_TIME:
                raise UserError(
                    f"the episode does not end; it should have after {max_duration:g} s"
                )
            if not success and self._task is not None and self._task.success:
                success = True
                self._call("policy/finish_episode")
        duration = time.monotonic() - began
        return EpisodeOutcome(result.result().result, success, duration, _rise(before, self._guard))

    def _on_task(self, message: TaskState) -> None:
        self._task = message

    def _on_guard(self, message: GuardStatus) -> None:
        self._guard = message

    def _call(self, name: str, timeout: float = ANSWER_TIME, **fields: Any) -> Any:
        client = self._clients[name]
        if not self._until(client.service_is_ready, ANSWER_TIME):
            raise UserError(f"there is no service {name}; is its node running?")
        return self._wait(client.call_async(client.srv_type.Request(**fields)), timeout, name)

    def _wait(self, future: Any, timeout: float, name: str) -> Any:
        if not self._until(future.done, timeout):
            raise UserError(f"{name} did not answer within {timeout:g} s")
        return future.result()

    def _until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Serve callbacks until the condition holds; whether it came to hold in time."""
        deadline = time.monotonic() + timeout
        while not (held := condition()) and (left := deadline - time.monotonic()) > 0:
            self._alive()
            self._executor.spin_once(timeout_sec=min(left, 0.02))
        return held


def _check(response: Any) -> None:
    if not response.success:
        raise UserError(response.message)


def _rise(before: GuardStatus | None, after: GuardStatus | None) -> dict[str, int]:
    counters = [
        name for name, kind in GuardStatus.get_fields_and_field_types().items() if kind == "uint64"
    ]
    if before is None or after is None:
        return {}
    return {name: getattr(after, name) - getattr(before, name) for name in counters}
