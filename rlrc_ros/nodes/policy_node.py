"""Runs policies on the robot, an episode at a time, and swaps them in between.

    ros2 run rlrc policy_node --ros-args -p policies:="['original=DIR', 'compressed=DIR']"

A lifecycle node: configuring loads and warms up the policies, activating takes goals, deactivating
ends the episode first. Its commands go to the command guard, which alone commands the arm.
Inference runs in a thread of its own, so that a slow policy never delays a stop.
"""

from __future__ import annotations

import math
import secrets
import sys
import time
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from numpy.typing import NDArray
from rclpy.action.server import ActionServer, CancelResponse, GoalResponse
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.task import Future
from rlrc.action import RunEpisode
from rlrc.msg import GuardStatus, PolicyCommand, PolicyInfo, PolicyStatus
from rlrc.srv import ListPolicies, LoadPolicy, StartRecording
from std_srvs.srv import Trigger

from rlrc_ros import execution
from rlrc_ros.chunks import ActionPlan
from rlrc_ros.errors import UserError
from rlrc_ros.execution import Episode, NotReady, PolicyStore
from rlrc_ros.guard import STOPPED
from rlrc_ros.messages.command import action_to_twist, policy_command
from rlrc_ros.messages.observation import Gripper
from rlrc_ros.messages.stamps import to_stamp
from rlrc_ros.nodes import attendance, common, policy_reports
from rlrc_ros.nodes.attendance import Attendance
from rlrc_ros.nodes.recorder_client import RecorderClient
from rlrc_ros.nodes.sensors import listen, listen_as_asked
from rlrc_ros.rollouts.episode import LONGEST_EPISODE
from rlrc_ros.trials.seal import sealed_policies
from rlrc_ros.vla import Observation, Policy, load_policy

GUARD_PATIENCE = 1.0
"""s without a word from the command guard after which an episode ends."""
GUARD_DISCOVERY = 3.0
"""s to wait for its first word, when an episode is to begin."""
RESULT_TIME = 900
"""s that an episode's result can be asked for; its client may have been out of the graph."""
FAREWELL_TIME = 3.0
"""s that an episode cut off by SIGINT or SIGTERM may take to close its bag and give its result."""


class PolicyNode(LifecycleNode):
    """Observations in, commands out."""

    def __init__(self) -> None:
        super().__init__("policy")
        self._frame = common.text(self, "base_frame", "base_link", "frame of the commands")
        self._given = common.texts(self, "policies", "bundles to load, each as label=directory")
        self._device = common.text(self, "device", "cpu", "where policies run, as torch names it")
        self._engine = common.text(
            self, "engine", "auto", "auto, eager, unrolled, graph or openvino"
        )
        self._replan_steps = common.integer(
            self, "replan_steps", 0, "actions of a chunk before looking again; 0: half", 0, 1000
        )
        self._ensemble = common.flag(
            self, "ensemble", False, "average overlapping chunks instead of blending them"
        )
        threads = common.integer(self, "threads", 1, "threads of a policy on the CPU", 1, 64)
        self._blind = common.flag(self, "blind", False, "publish nothing that tells policies apart")
        self._sealed = common.text(self, "sealed", "", "policies of a blinded trial, a sealed file")
        self._blind = self._blind or bool(self._sealed)
        self._gripper = Gripper(
            joint=common.text(self, "gripper_joint", "finger_joint", "tells the gripper's opening"),
            closed=common.number(self, "gripper_closed", 0.0, "its position closed", -10.0, 10.0),
            open=common.number(self, "gripper_open", 0.04, "its position open", -10.0, 10.0),
        )
        torch.set_num_threads(threads)
        self._store = PolicyStore(self._load)
        self._episode: Episode | None = None
        self._attendance: Attendance | None = None
        self._done: Future[None] | None = None
        """Of the goal that was accepted; None: the next one may be."""
        self._problem = ""
        self._last = ""
        """How the last episode ended, where it did not end well."""
        self._costs: dict[str, tuple[float, float]] = {}
        """By bundle hash: s to load and warm up, ms of an inference."""
        self._sizes: dict[str, tuple[int, int]] = {}
        """Of each camera's first image in an episode: width and height."""
        self._guard: GuardStatus | None = None
        self._guard_time = -math.inf
        self._looked: dict[str, int] = {}
        """Stamps of the last look by source, until a command is sent that comes from it."""
        self._buffer = listen(self, self._frame)

        self._commands = self.create_publisher(PolicyCommand, "policy_command", common.POLICY_QOS)
        self._status = self.create_publisher(PolicyStatus, "~/status", 10)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_subscription(GuardStatus, "command_guard/status", self._on_guard, 10)
        self.create_service(LoadPolicy, "~/load_policy", self._on_load_policy)
        self.create_service(ListPolicies, "~/list_policies", self._on_list_policies)
        self.create_service(Trigger, "~/finish_episode", self._on_finish)
        self._recorder = RecorderClient(self, partial(self.end_episode, execution.RECORDING_LOST))
        self._server = ActionServer(
            self,
            RunEpisode,
            "~/run_episode",
            self._run_episode,
            goal_callback=self._on_goal,
            handle_accepted_callback=self._on_accepted,
            cancel_callback=self._on_cancel,
            result_timeout=RESULT_TIME,
        )
        self.create_timer(1.0, self._report, clock=common.STEADY_CLOCK)
        if common.flag(self, "autostart", False, "configure and activate without being asked"):
            self._autostart = self.create_timer(0.0, self._start_by_itself)

    # Lifecycle

    def _start_by_itself(self) -> None:
        self._autostart.cancel()
        if self.trigger_configure() != TransitionCallbackReturn.SUCCESS:
            raise SystemExit(2)  # whoever started it sees it end; the log says why
        self.trigger_activate()

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and warm up the policies; the first one is active."""
        try:
            for text in self._given:
                label, _, path = text.partition("=")
                if not label or not path:
                    raise UserError(f"parameter policies: '{text}' is not label=directory")
                number = f"{len(self._store.resident) + 1} of {len(self._given)}"
                self._publish_diagnostics(DiagnosticStatus.OK, f"loading {label}, {number}", {})
                policy = self._store.add(label, path)
                if not self._blind:
                    seconds, inference = self._costs[policy.hash]
                    self.get_logger().info(
                        f"{label}: {policy.hash[:12]}, ready in {seconds:.1f} s, {inference:.0f} ms"
                    )
            self._load_sealed()
        except UserError as error:
            self._store.clear()
            self._problem = str(error)
            self.get_logger().error(self._problem)
            return TransitionCallbackReturn.FAILURE
        if self._given:
            self._store.activate(self._given[0].partition("=")[0])
        self._problem = ""
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Take goals from now on."""
        self.get_logger().info("ready for episodes")
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop the arm, then take no more goals."""
        self.end_episode(execution.NODE_DEACTIVATED)
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of the policies."""
        self._store.clear()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop the arm, whatever state the node is in."""
        self.end_episode(execution.NODE_DEACTIVATED)
        return super().on_shutdown(state)

    def leave(self) -> None:
        """Before the process ends: stop the arm, close the bag, give the client its result."""
        if self._is_active():
            self.trigger_deactivate()
        self._recorder.hurry(FAREWELL_TIME / 2)
        executor, deadline = self.executor, time.monotonic() + FAREWELL_TIME
        assert executor is not None
        while self._done is not None and time.monotonic() < deadline:
            executor.spin_once(timeout_sec=0.1)
        common.linger(self)

    def end_episode(self, reason: str, message: str = "") -> None:
        """End the running episode, if any, and command a stop."""
        if self._episode is not None and not self._episode.ended:
            self._episode.end(reason, message)
            self._command_stop(self._episode)

    def _load_sealed(self) -> None:
        """Load those of a blinded trial: a label for every step, each bundle once."""
        loaded: dict[str, Policy] = {}
        sealed = sealed_policies(Path(self._sealed)) if self._sealed else {}
        for label, planned in sealed.items():
            policy = loaded.get(planned.policy) or self._store.add(label, planned.policy)
            if policy.hash != planned.hash:
                raise UserError("a bundle has changed since the trial was planned; restore it")
            loaded[planned.policy] = self._store.resident[label] = policy

    def _is_active(self) -> bool:
        return self._state_machine.current_state[1] == "active"

    def _load(self, path: str) -> Policy:
        try:
            with common.interruptible():
                began = time.monotonic()
                policy = load_policy(path, self._device, self._engine)  # type: ignore[arg-type]
                warming = "warming up" if self._blind else f"warming up {path}"
                self._publish_diagnostics(DiagnosticStatus.OK, warming, {})
                policy.warm_up()
                inference = policy.warm_up() / 2  # acts twice, now that it is warm
                self._costs[policy.hash] = time.monotonic() - began, inference * 1e3
                listen_as_asked(self, self._buffer, policy.config)
        except UserError:
            raise
        except Exception as error:  # out of memory, a damaged tokenizer: the node must live on
            first = (str(error).splitlines() or [""])[0]
            raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {first}") from None
        return policy

    # Episodes

    def _on_goal(self, _: RunEpisode.Goal) -> GoalResponse:
        if not self._is_active():
            self._refuse("the node is not active")
            return GoalResponse.REJECT
        if self._done is not None:
            self._refuse("an episode is running")
            return GoalResponse.REJECT
        return GoalResponse.ACCEPT

    def _refuse(self, reason: str) -> None:
        self.get_logger().warning(f"goal refused: {reason}", throttle_duration_sec=1.0)

    def _on_accepted(self, handle: Any) -> None:
        # Not when the goal is judged: if its client is gone by then, nothing would ever clear it.
        self._done = Future(executor=self.executor)
        handle.execute()

    def _on_cancel(self, _: Any) -> CancelResponse:
        self.end_episode(execution.OPERATOR_STOP, "the goal was cancelled")
        return CancelResponse.ACCEPT

    def _on_finish(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success = self._episode is not None and not self._episode.ended
        response.message = "" if response.success else "no episode is running"
        self.end_episode(execution.FINISHED)
        return response

    def _on_guard(self, status: GuardStatus) -> None:
        before, self._guard, self._guard_time = self._guard, status, time.monotonic()
        episode = self._episode
        if status.state == STOPPED:
            self.end_episode(execution.GUARD_STOP, status.reason)
        elif before is not None and status.accepted < before.accepted:
            self.end_episode(execution.GUARD_STOP, "the command guard has been restarted")
        elif (
            episode is not None
            and episode.elapsed > GUARD_PATIENCE
            and status.episode_id not in ("", episode.episode_id)
        ):
            self.end_episode(execution.GUARD_STOP, f"'{status.episode_id}' has the arm")

    def _watch_guard(self) -> None:
        silence = time.monotonic() - self._guard_time
        if silence > GUARD_PATIENCE:
            said = f"nothing has come from the command guard for {silence:.1f} s"
            self.end_episode(execution.GUARD_STOP, said)

    async def _run_episode(self, handle: Any) -> RunEpisode.Result:
        result = RunEpisode.Result(outcome="unlabelled")
        try:
            await self._carry_out(handle, result)
        except UserError as error:
            result.termination_reason, result.message = execution.POLICY_ERROR, str(error)
        finally:
            if self._attendance is not None:
                self._attendance.close()
            self._episode = self._attendance = self._done = None
            well = (execution.FINISHED, execution.TIMEOUT, execution.OPERATOR_STOP)
            ended = f"{result.episode_id or 'the last goal'}: {result.termination_reason}"
            ended += "" if self._blind else f" {result.message}"
            self._last = "" if result.termination_reason in well else ended
        if handle.is_cancel_requested:
            handle.canceled()
        elif result.termination_reason in (execution.FINISHED, execution.TIMEOUT):
            handle.succeed()
        else:
            handle.abort()
        told = f"{result.episode_id}: {result.termination_reason}"
        if not self._blind:
            told += f" {result.message} ({result.steps} steps, p50 {result.latency_ms_p50:.1f} ms)"
        self.get_logger().info(told)
        return result

    async def _carry_out(self, handle: Any, result: RunEpisode.Result) -> None:
        """Run the episode, and its recording around it; raises UserError before it begins."""
        began, goal = time.monotonic(), handle.request
        client = self._attendance = Attendance(self, goal.attended_on)
        if not await common.until(self, lambda: self._guard_time > began, GUARD_DISCOVERY):
            raise UserError("no command guard is heard; start command_guard_node")
        episode = self._prepare(goal)
        result.episode_id = episode.episode_id
        # From here on whatever ends an episode ends this one, though the recorder be slow.
        self._episode = episode
        if handle.is_cancel_requested:
            episode.end(execution.OPERATOR_STOP, "the goal was cancelled")
        elif not self._is_active():
            episode.end(execution.NODE_DEACTIVATED)
        patience = attendance.DISCOVERY_TIME
        if not await common.until(self, lambda: client.come or episode.ended, patience):
            silent = f"nothing has come on {goal.attended_on} within {patience:g} s"
            episode.end(execution.CLIENT_LOST, silent)
        if goal.record:
            result.bag_uri = await self._record(episode)
        try:
            await self._act(episode, handle)
        finally:
            policy_reports.fill_result(result, episode)
            if result.bag_uri:
                problem = await self._recorder.stop(episode.episode_id, result.termination_reason)
                if problem:
                    messages = filter(None, [result.message, f"recording: {problem}"])
                    result.message = "; ".join(messages)

    def _prepare(self, goal: RunEpisode.Goal) -> Episode:
        """A new episode; raises UserError for a goal that makes no sense."""
        if not self._store.resident:
            raise UserError("no policy is loaded; call ~/load_policy")
        label = goal.policy_label or self._store.active
        policy = self._store.get(label)
        policy.processor.token_ids(goal.instruction)
        self._buffer.check(policy.config)
        if not 0 < goal.max_duration <= LONGEST_EPISODE:
            raise UserError(
                f"max_duration is {goal.max_duration:g} s; it must be above 0 and at most "
                f"{LONGEST_EPISODE:g} s"
            )
        self._store.activate(label)
        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        return Episode(
            goal.episode_id or f"{stamp}-{secrets.token_hex(3)}",
            goal.instruction,
            label,
            policy,
            goal.max_duration,
            look=partial(self._look, policy, goal.instruction),
            command=self._send,
            clock_ns=self._now_ns,
            plan=ActionPlan(1 / policy.config.control_rate, self._replan_steps, self._ensemble),
        )

    async def _act(self, episode: Episode, handle: Any) -> None:
        """Step at the policy's rate until the episode ends; then stop the arm."""
        done = self._done
        assert done is not None
        self._buffer.forget()
        self._sizes.clear()

        def tick() -> None:
            episode.tick()
            self._watch_guard()
            if self._attendance is not None and self._attendance.lost:
                self.end_episode(execution.CLIENT_LOST, "the process that ran it is gone")
            self._publish_status()
            handle.publish_feedback(policy_reports.feedback(episode, self._blind))
            if episode.ended and not episode.busy and not done.done():
                done.set_result(None)

        timer = self.create_timer(
            1 / episode.policy.config.control_rate, tick, clock=common.STEADY_CLOCK
        )
        await done
        self.destroy_timer(timer)
        episode.close()
        self._command_stop(episode)

    def _look(self, policy: Policy, instruction: str) -> tuple[Observation, int]:
        try:
            snapshot = self._buffer.snapshot(policy.config, self._now_ns())
        except UserError as error:
            raise NotReady(str(error)) from None
        self._looked = snapshot.stamps
        observation = snapshot.decode(policy.config, self._gripper, instruction)
        for name, image in observation.images.items():
            height, width = image.shape[:2]
            before = self._sizes.setdefault(name, (width, height))
            if before != (width, height):
                was = "×".join(map(str, before))
                raise UserError(f"camera '{name}' has changed from {was} to {width}×{height}")
        return observation, snapshot.oldest_ns

    def _send(self, action: NDArray[np.float64], stamp_ns: int, step: int) -> None:
        episode = self._episode
        assert episode is not None
        twist, gripper = action_to_twist(action, episode.policy.config.control_rate)
        self._last_gripper = gripper
        # Only the first command that comes from a look was computed for the moment that it shows.
        looked: dict[str, int] = {}
        if self._looked and min(self._looked.values()) == stamp_ns:
            looked, self._looked = self._looked, {}
        self._publish_command(episode, twist, gripper, stamp_ns, step, looked)

    def _command_stop(self, episode: Episode) -> None:
        """Command zero speed, the gripper as it was, if anything was commanded at all."""
        if episode.statistics.steps:
            steps = episode.statistics.steps
            self._publish_command(episode, np.zeros(6), self._last_gripper, self._now_ns(), steps)

    def _publish_command(
        self,
        episode: Episode,
        twist: NDArray[np.float64],
        gripper: float,
        stamp_ns: int,
        step: int,
        looked: dict[str, int] | None = None,
    ) -> None:
        command = policy_command(
            twist,
            gripper,
            stamp=self.get_clock().now().to_msg(),
            observation_stamp=to_stamp(stamp_ns),
            frame_id=self._frame,
            policy_label=episode.label,
            episode_id=episode.episode_id,
            step=step,
            period=1 / episode.policy.config.control_rate,
            observed=looked,
        )
        self._commands.publish(command)

    async def _record(self, episode: Episode) -> str:
        request = StartRecording.Request(
            episode_id=episode.episode_id,
            instruction=episode.instruction,
            policy_label=episode.label,
            bundle_hash=self._hash(episode.policy),
        )
        return await self._recorder.start(request)

    # Policies

    def _on_load_policy(
        self, request: LoadPolicy.Request, response: LoadPolicy.Response
    ) -> LoadPolicy.Response:
        began = time.monotonic()
        try:
            if self._done is not None:
                raise UserError("an episode is running; policies are swapped between episodes")
            if request.policy and self._sealed:
                raise UserError("a blinded trial loads only its own policies; start the node anew")
            if request.policy:
                name = request.label or request.policy.rstrip("/").rpartition("/")[2]
                policy = self._store.add(name, request.policy)
            else:
                policy = self._store.activate(request.label)
        except UserError as error:
            response.message = str(error)
            return response
        response.success, response.message = True, f"'{self._store.active}' is active"
        response.bundle_hash = self._hash(policy)
        response.seconds = time.monotonic() - began
        return response

    def _on_list_policies(
        self, _: ListPolicies.Request, response: ListPolicies.Response
    ) -> ListPolicies.Response:
        response.policies = [
            PolicyInfo(
                label=label,
                bundle_hash=self._hash(policy),
                loaded=True,
                active=label == self._store.active,
                parameters=0 if self._blind else policy.parameters["total"],
                weight_bytes=0 if self._blind else policy.weight_bytes()["total"],
                control_rate=policy.config.control_rate,
                load_seconds=0.0 if self._blind else self._costs[policy.hash][0],
                inference_ms=0.0 if self._blind else self._costs[policy.hash][1],
            )
            for label, policy in self._store.resident.items()
        ]
        return response

    # Reports

    def _report(self) -> None:
        if self._episode is None:
            self._publish_status()
        active = self._is_active()
        level = DiagnosticStatus.OK if active else DiagnosticStatus.WARN
        message = self._problem or ("ready" if active else "not active")
        if self._problem:
            level = DiagnosticStatus.ERROR
        resident = self._store.resident
        values: dict[str, object] = {
            "policies": len(resident) if self._sealed else ", ".join(resident)
        }
        episode = self._episode
        if episode is not None:
            message = f"running {episode.episode_id}"
        if episode is not None and not self._blind:
            values |= policy_reports.diagnostic_values(episode)
            if reason := episode.statistics.skip_reason:
                level, message = DiagnosticStatus.WARN, reason
        elif episode is None and active and self._last:
            level, message = DiagnosticStatus.WARN, f"ready; {self._last}"
        values["command guard"] = self._guard.state if self._guard else "not heard"
        self._publish_diagnostics(level, message, values)

    def _publish_diagnostics(self, level: bytes, message: str, values: dict[str, object]) -> None:
        self._diagnostics.publish(common.diagnostics(self, level, message, values))

    def _publish_status(self) -> None:
        status = PolicyStatus(state="idle", policy_label=self._store.active)
        status.header.stamp = self.get_clock().now().to_msg()
        if self._episode is not None:
            policy_reports.fill_status(status, self._episode, self._blind)
        self._status.publish(status)

    def _hash(self, policy: Policy) -> str:
        return "" if self._blind else policy.hash

    def _now_ns(self) -> int:
        return self.get_clock().now().nanoseconds


def main() -> int:
    """Run the node."""
    return common.run(PolicyNode, PolicyNode.leave)


if __name__ == "__main__":
    sys.exit(main())
