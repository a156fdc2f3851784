"""The nodes as a script sees them: calls that block, with time limits and clear errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import rclpy
from action_msgs.msg import GoalStatus
from rclpy.action.client import ActionClient
from rclpy.client import Client
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from rlrc.action import RunEpisode
from rlrc.msg import GuardStatus, PolicyStatus, TaskState
from rlrc.srv import LabelEpisode, ListPolicies, ResetScene
from std_msgs.msg import String
from std_srvs.srv import Trigger

from rlrc_ros.errors import UserError
from rlrc_ros.guard import STOPPED
from rlrc_ros.messages.stamps import to_nanoseconds
from rlrc_ros.nodes import dead_ports
from rlrc_ros.nodes.attendance import attending

ANSWER_TIME = 30.0
"""s for a service to answer."""
STOP_TIME = 2.0
"""s for the command guard to confirm an emergency stop."""
FAREWELL_TIME = 5.0
"""s that leaving an episode may wait for the policy node to say that it has stopped the arm."""
CLOCK_TOLERANCE = 0.5
"""s by which the clocks of two machines may differ."""
ASKING_AGAIN = 2.0
"""s after which an episode's result is asked for again, once the policy node is idle. A process
that is silent for 5 s is out of the graph, and misses what is answered meanwhile."""
STATUS_DEPTH = 10


@dataclass
class EpisodeOutcome:
    """How an episode went, as the nodes and the simulator's ground truth tell it.

    Attributes:
        result: what the policy node answered.
        success: whether the task was done, by the simulator's ground truth; None on a real arm.
        duration: s from sending the goal to the end of the episode.
        guard: by how much the guard's counters rose.
    """

    result: RunEpisode.Result
    success: bool | None
    duration: float
    guard: dict[str, int]


class RobotClient:
    """Talks to the policy node, the recorder, the guard and the simulated arm. Use in `with`."""

    def __init__(self) -> None:
        self._context = rclpy.Context()
        rclpy.init(context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        with dead_ports.avoided():
            self._node = rclpy.create_node("rlrc_client", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._alive: Callable[[], None] = lambda: None
        self._task: TaskState | None = None
        self._guard: GuardStatus | None = None
        self._status: PolicyStatus | None = None
        self._status_delay = 0.0
        self._node.create_subscription(TaskState, "sim_arm/task_state", self._on_task, 10)
        self._node.create_subscription(GuardStatus, "command_guard/status", self._on_guard, 10)
        self._node.create_subscription(PolicyStatus, "policy/status", self._on_status, STATUS_DEPTH)
        self._run: ActionClient[Any, Any, Any] = ActionClient(
            self._node, RunEpisode, "policy/run_episode"
        )
        self._attended = attending(self._node, "policy")
        # All at once: a service may not know yet where to answer a client that has just appeared.
        self._clients: dict[str, Client[Any, Any]] = {
            name: self._node.create_client(kind, name)
            for name, kind in {
                "policy/list_policies": ListPolicies,
                "policy/finish_episode": Trigger,
                "command_guard/emergency_stop": Trigger,
                "command_guard/release": Trigger,
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

    def wait_until_ready(
        self, alive: Callable[[], None], timeout: float = 60.0, simulated: bool = True
    ) -> None:
        """Wait until all nodes answer.

        Args:
            alive: called in every wait from now on; raises when a node has died.
            timeout: s.
            simulated: wait for the simulated arm too.

        Raises:
            UserError: not all of them are there in time, or their clock differs from this one.
        """
        self._alive = alive
        waiting = {
            "policy/run_episode": self._run.server_is_ready,
            "command_guard": lambda: self._guard is not None,
            "sim_arm": lambda: self._task is not None or not simulated,
            "policy/status": lambda: self._status is not None,
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
        self._check_clock()

    def _check_clock(self) -> None:
        """Compare clocks; the smallest of several delays is theirs, the rest is the machine's.

        More of them than the subscription queues: after a pause of this process those are all late.
        """
        delays = []
        for _ in range(STATUS_DEPTH + 3):
            self._status = None
            if self._until(lambda: self._status is not None, ANSWER_TIME):
                delays.append(self._status_delay)
            if delays and abs(delays[-1]) < CLOCK_TOLERANCE:
                return
        if delays:
            raise UserError(
                f"the policy node's clock is {-min(delays, key=abs):+.1f} s off this one's: stamps "
                "of different machines would not fit together; synchronise them (chrony)"
            )

    def idle(self) -> None:
        """End an episode that somebody left running, and wait until it is over.

        Raises:
            UserError: it does not end.
        """

        def is_idle() -> bool:
            return self._status is not None and self._status.state == "idle"

        self._status = None
        if not self._until(lambda: self._status is not None, ANSWER_TIME):
            raise UserError(f"policy/status has not come within {ANSWER_TIME:g} s")
        if is_idle():
            return
        self._call("policy/finish_episode")
        if not self._until(is_idle, ANSWER_TIME):
            raise UserError("an episode is running and does not end; stop the policy node")

    def stopped(self) -> str:
        """Why the command guard has stopped the arm; empty where it has not."""
        self._guard = None
        if not self._until(lambda: self._guard is not None, STOP_TIME):
            return "the command guard is silent"
        assert self._guard is not None
        return self._guard.reason if self._guard.state == STOPPED else ""

    def emergency_stop(self) -> None:
        """Have the command guard command zero at once, and stay so until it is released.

        Raises:
            UserError: it does not confirm: the arm has to be stopped by its own button.
        """
        try:
            _check(self._call("command_guard/emergency_stop", STOP_TIME))
        except UserError as error:
            raise UserError(f"use the robot's own button: {error}") from None

    def release(self) -> None:
        """End a stop.

        Raises:
            UserError: the command guard refuses or does not answer.
        """
        _check(self._call("command_guard/release"))

    def policies(self) -> list[Any]:
        """What the policy node has loaded: rlrc/PolicyInfo."""
        return list(self._call("policy/list_policies").policies)

    def reset_scene(self, seed: int, family: str = "") -> ResetScene.Response:
        """Set up the simulated scene of a seed; family: of its task, empty for the seed's own."""
        response = self._call("sim_arm/reset", seed=seed, task=family)
        _check(response)
        # What comes first may still tell of the scene before, which may have had the same seed.
        reset_at = self._node.get_clock().now().nanoseconds

        def is_up() -> bool:
            return self._task is not None and to_nanoseconds(self._task.header.stamp) > reset_at

        if not self._until(is_up, ANSWER_TIME):
            raise UserError(f"sim_arm/task_state has not come within {ANSWER_TIME:g} s")
        return response

    def run_episode(
        self,
        instruction: str,
        label: str,
        episode_id: str,
        max_duration: float,
        record: bool,
        should_stop: Callable[[], bool] = lambda: False,
        should_finish: Callable[[], bool] = lambda: False,
    ) -> EpisodeOutcome:
        """Run one episode; on the simulated arm it is finished as soon as the task is done.

        It ends with this process, however that ends. An exception, Ctrl-C among them, stops the arm
        first.

        Args:
            instruction: what the policy is told.
            label: the policy's.
            episode_id: the episode's, and its bag's.
            max_duration: s.
            record: have it recorded.
            should_stop: asked again and again; True stops the arm: operator_stop.
            should_finish: the same for an end that is no mishap: finished.

        Raises:
            UserError: the policy node refuses the episode or does not answer.
        """
        self._attended.publish(String(data=episode_id))
        before = self._guard
        began = time.monotonic()
        goal = RunEpisode.Goal(
            instruction=instruction,
            policy_label=label,
            episode_id=episode_id,
            max_duration=max_duration,
            record=record,
            attended_on=self._attended.topic_name,
        )
        sent = self._run.send_goal_async(goal)
        try:
            handle = self._wait(sent, ANSWER_TIME, "policy/run_episode")
            if not handle.accepted:
                raise UserError("the policy node refuses the episode; its log says why")
            result, asked = handle.get_result_async(), time.monotonic()
            success = None if self._task is None else False
            stopped = finished = False
            while not self._until(result.done, 0.02):
                if time.monotonic() - began > max_duration + ANSWER_TIME:
                    raise UserError(
                        f"the episode does not end; it should have after {max_duration:g} s"
                    )
                idle = self._status is not None and self._status.state == "idle"
                if idle and time.monotonic() - asked > ASKING_AGAIN:
                    result, asked = handle.get_result_async(), time.monotonic()
                if success is False and self._task is not None and self._task.success:
                    success = True
                if not stopped and should_stop():
                    stopped = True
                    handle.cancel_goal_async()
                elif not finished and not stopped and (success or should_finish()):
                    # Refused while the episode is not there yet: asked again then.
                    finished = self._call("policy/finish_episode").success
        except BaseException:  # Ctrl-C too: nobody watches the arm from here on
            self._cancel(sent)
            raise
        duration = time.monotonic() - began
        if result.result().status == GoalStatus.STATUS_UNKNOWN:
            raise UserError("the policy node knows of no such episode: it has been started anew")
        return EpisodeOutcome(result.result().result, success, duration, _rise(before, self._guard))

    def _cancel(self, sent: Any) -> None:
        """Have the policy node stop the arm; on a busy machine a mere request may not get out."""
        if self._until(sent.done, FAREWELL_TIME, watch=False) and sent.result().accepted:
            cancelled = sent.result().cancel_goal_async()
            self._until(cancelled.done, FAREWELL_TIME, watch=False)

    def _on_task(self, message: TaskState) -> None:
        self._task = message

    def _on_status(self, message: PolicyStatus) -> None:
        now = self._node.get_clock().now().nanoseconds
        self._status = message
        self._status_delay = (now - to_nanoseconds(message.header.stamp)) * 1e-9

    def _on_guard(self, message: GuardStatus) -> None:
        self._guard = message

    def _call(self, name: str, timeout: float = ANSWER_TIME, **fields: Any) -> Any:
        client = self._clients[name]
        if not self._until(client.service_is_ready, timeout):
            raise UserError(f"there is no service {name}; is its node running?")
        return self._wait(client.call_async(client.srv_type.Request(**fields)), timeout, name)

    def _wait(self, future: Any, timeout: float, name: str) -> Any:
        if not self._until(future.done, timeout):
            raise UserError(f"{name} did not answer within {timeout:g} s")
        return future.result()

    def _until(self, condition: Callable[[], bool], timeout: float, watch: bool = True) -> bool:
        """Serve callbacks until the condition holds; whether it came to hold in time.

        watch: raise when a node has died meanwhile.
        """
        deadline = time.monotonic() + timeout
        while not (held := condition()) and (left := deadline - time.monotonic()) > 0:
            if watch:
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
