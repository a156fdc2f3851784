"""The measurements, one after another, so that none disturbs the others.

1. pipeline: cameras, relay, policy, guard: latency against the relay, and the guard's jitter.
2. swap: two resident policies, one after the other, an episode each.
3. kill: the policy node is killed while the arm moves, again and again.
4. soak: cameras, policy, guard and recorder in episodes of up to ten minutes: images and messages
   lost, the recorder's share of a core, growth of memory, threads and descriptors.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlrc_ros import bringup
from rlrc_ros.errors import UserError
from rlrc_ros.execution import TIMEOUT
from rlrc_ros.profile import CameraSource, RobotProfile, load_profile
from rlrc_ros.rollouts.episode import read_episode
from rlrc_ros.ros_bench import rows, topics
from rlrc_ros.ros_bench.listener import Listener
from rlrc_ros.ros_bench.processes import Processes, Usage, module, processes
from rlrc_ros.ros_bench.rows import Sent
from rlrc_ros.ros_bench.stamps import read_stamps
from rlrc_ros.ros_bench.watched_policy import BEGAN, ENDED
from rlrc_ros.vla.config import BundleConfig

GUARD_RATE = 100.0
"""Hz."""
LONGEST_EPISODE = 600.0
"""s: what one bag of a soak holds; it is deleted when its messages are counted."""
SAMPLE_INTERVAL = 2.0
"""s between two looks at a process."""
MOVING_TIME = 2.0
"""s that the policy commands before it is killed."""
SWAPS, SWAP_EPISODE = 8, 0.5
"""How many, and s of the episode after each of them."""
WATCHED = ("policy", "guard", "recorder")
_ENDLESS = 7200.0
"""s, of a burst that is cut off: longer than any episode may be."""
_BYTES_PER_SECOND = topics.CAMERA_RATE * 2 * topics.WIDTH * topics.HEIGHT * 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to measure.

    Attributes:
        policy: bundle directory or short name.
        other: the same of a policy that it is swapped with.
        instruction: what it is asked for.
        duration: s of the pipeline.
        kills: of the policy node.
        soak: s, in all.
        directory: for logs, notes and the bag of the moment.
    """

    policy: str
    other: str
    instruction: str
    duration: float
    kills: int
    soak: float
    directory: Path

    @property
    def bag_bytes(self) -> float:
        """What the longest of the bags takes on the disk."""
        return min(self.soak, LONGEST_EPISODE) * _BYTES_PER_SECOND


def measure(plan: Plan, say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows by name, and what they were computed from.

    Raises:
        UserError: a node does not start or dies, there is no room, or no such policy.
    """
    from rlrc_ros.vla import load_policy

    config = load_policy(plan.policy).config
    if len(config.cameras) > len(topics.CAMERAS):
        raise UserError(f"{plan.policy} looks through more than {len(topics.CAMERAS)} cameras")
    free = shutil.disk_usage(plan.directory).free
    if plan.bag_bytes > 0.9 * free:
        raise UserError(
            f"{plan.directory}: the soak's bag takes {plan.bag_bytes / 1e9:.0f} GB, and"
            f" {free / 1e9:.0f} GB are free; shorten --soak, or name another --out"
        )
    found: dict[str, Any] = {}
    raw: dict[str, Any] = {}
    logs = plan.directory / "logs"
    with (
        processes(logs) as started,
        Listener(started.check, load_profile("sim").ee_command, logs) as listener,
    ):
        bench = _Bench(plan, config, started, listener, say)
        for part in (bench.pipeline, bench.swap, bench.kill, bench.soak):
            part(found, raw)
    return found, raw


class _Bench:
    """The processes of one measurement."""

    def __init__(
        self,
        plan: Plan,
        config: BundleConfig,
        started: Processes,
        listener: Listener,
        say: Callable[[str], None],
    ) -> None:
        self._plan, self._config = plan, config
        self._processes, self._listener, self._say = started, listener, say
        self._cameras = [camera.name for camera in config.cameras]
        if len(self._cameras) == 1:  # the policy node listens to both all the same
            self._cameras.append("side" if self._cameras[0] != "side" else "other")
        self._profile = _profile(self._cameras)
        specs = bringup.nodes(
            self._profile,
            output_dir=str(plan.directory / "bags"),
            policies={"bench": plan.policy},
            record_topics=[*topics.CAMERAS, topics.JOINT_STATES],
        )
        self._specs = {spec.executable: spec for spec in specs}
        self._notes = 0

    def pipeline(self, found: dict[str, Any], raw: dict[str, Any]) -> None:
        """Latency and jitter, with nothing else running."""
        plan, listener = self._plan, self._listener
        self._say(f"1 of 4: latency and the guard's jitter, {plan.duration:g} s")
        looked_at = [*topics.CAMERAS[: len(self._config.cameras)], topics.JOINT_STATES]
        rate = self._config.control_rate
        self._processes.start("relay", module("relay", rate, *looked_at))
        self._start("command_guard_node", "guard")
        policy_notes = self._start_policy({"bench": plan.policy, "other": plan.other})
        self._start_sources()
        listener.wait_for_policy()
        self._burst(_ENDLESS, 2)
        listener.forget()
        result = listener.episode(plan.instruction, plan.duration)
        listener.until(result.done, "the end of the episode", plan.duration + 60.0)
        steps = result.result().result.steps
        self._processes.stop("relay")
        notes = read_stamps(policy_notes)
        policy = rows.without_inference(
            listener.commands["policy_command"], notes.get(BEGAN, []), notes.get(ENDED, [])
        )
        relays = [
            rows.latencies(self._within(policy_commands, listener))
            for policy_commands in (
                listener.commands[topics.RELAY_AT_RATE],
                listener.commands[topics.RELAY_ON_ARRIVAL],
            )
        ]
        if len(policy) < 10 or not all(relays):
            raise UserError(
                f"the policy node took {steps} steps only; see {self._plan.directory / 'logs'}"
            )
        inference = [(e - b) * 1e-6 for b, e in zip(notes[BEGAN], notes[ENDED], strict=False)]
        found["latency"] = rows.latency_row(policy, *relays)
        found["latency"]["inference_ms"] = rows.quantiles(inference[1:])
        published = [s.published for s in listener.speeds]
        found["guard"] = rows.jitter_row(self._while_commanded(published), GUARD_RATE)
        found["guard"]["realtime"] = self._processes["guard"].realtime()
        # The policy is alive: whatever the guard has missed so far is a false alarm.
        found["guard"]["false_alarms"] = listener.liveliness_lost
        raw["latency_ms"] = {"policy": policy, "at_rate": relays[0], "on_arrival": relays[1]}
        raw["guard_published_ns"] = published

    def swap(self, found: dict[str, Any], raw: dict[str, Any]) -> None:
        """Swap between the episodes of the pipeline's policy node; the first policy at last."""
        listener = self._listener
        self._say(f"2 of 4: two policies are swapped {SWAPS} times")
        times = []
        for number in range(SWAPS):
            times.append(listener.swap("bench" if number % 2 else "other"))
            result = listener.episode(self._plan.instruction, SWAP_EPISODE)
            listener.until(result.done, "the end of the episode")
            ended = result.result().result
            if ended.termination_reason != TIMEOUT:
                raise UserError(f"after a swap: {ended.termination_reason} {ended.message}")
        calls, inside = map(list, zip(*times, strict=True))
        found["swap"] = rows.swap_row(calls, inside)
        raw["swap_ms"] = {"call": calls, "inside": inside}

    def kill(self, found: dict[str, Any], raw: dict[str, Any]) -> None:
        """Kill the policy node while the arm moves; at first that of the pipeline."""
        plan, listener = self._plan, self._listener
        self._say(f"3 of 4: the policy node is killed {plan.kills} times")
        braked, silences, inconclusive = [], [], 0
        for number in range(plan.kills):
            if number:
                self._start_policy()
                self._start_sources()
                listener.wait_for_policy()
                self._burst(_ENDLESS, 1)
            listener.forget()
            listener.episode(plan.instruction, LONGEST_EPISODE)
            listener.until(lambda: len(listener.commands["policy_command"]) > 5, "commands")
            # At another moment of the control period each time.
            listener.spin(MOVING_TIME + number / max(1, plan.kills) / self._config.control_rate)
            killed = time.time_ns()
            self._processes.kill("policy")
            listener.spin(1.5)
            self._processes.stop("sources")
            times = rows.braking(listener.speeds, killed)
            if times is None:
                inconclusive += 1
                continue
            braked.append(times)
            last = max(c.published for c in listener.commands["policy_command"])
            silences.append(times[0] - (last - killed) * 1e-6)
        found["stop"] = rows.stop_row(braked, silences, inconclusive, GUARD_RATE)
        raw["stop_ms"] = {"kill_to": braked, "last_command_to": silences}

    def soak(self, found: dict[str, Any], raw: dict[str, Any]) -> None:
        """Episodes in a row, recorded, with an eye on every process."""
        plan, listener = self._plan, self._listener
        self._say(f"4 of 4: images, recorder and soak, {plan.soak:g} s")
        policy_notes = self._start_policy()
        self._start("recorder_node", "recorder")
        sources_notes = self._start_sources()
        listener.wait_for_policy()
        usages: dict[str, list[Usage]] = {name: [] for name in WATCHED}
        sent: Counter[str] = Counter()
        recorded: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        cpu = recorded_seconds = 0.0
        left, number, start = plan.soak, 0, 0
        while left > 0:
            seconds = min(left, LONGEST_EPISODE)
            left, number = left - seconds, number + 1
            listener.forget()
            bag = Path(listener.start_recording(f"soak{number}"))
            before, began = self._processes["recorder"].cpu_seconds(), time.monotonic()
            self._burst(seconds, 2)
            result = listener.episode(plan.instruction, max(1.0, seconds - 2.0))
            while time.monotonic() < began + seconds + 2.0:
                listener.spin(SAMPLE_INTERVAL)
                listener.forget()
                for name, samples in usages.items():
                    samples.append(self._processes[name].usage())
            sent.update(self._end_burst(seconds + 60.0))
            cpu += self._processes["recorder"].cpu_seconds() - before
            recorded_seconds += time.monotonic() - began
            listener.until(result.done, "the end of the episode")
            listener.stop_recording()
            episode = read_episode(bag)
            recorded.update(episode.message_counts)
            dropped.update(episode.dropped_messages)
            shutil.rmtree(bag)
            if number == 1 and left > 0:  # what the first of several takes is a start
                start = len(usages["recorder"])
        self._processes.stop("policy")
        images = rows.images_row(
            read_stamps(sources_notes), read_stamps(policy_notes), recorded_seconds
        )
        found["images"] = images
        found["recorder"] = rows.recorder_row(sent, recorded, dropped, cpu, recorded_seconds)
        found["soak"] = rows.soak_row({name: list(u[start:]) for name, u in usages.items()})
        raw["usages"] = {name: [asdict(u) for u in samples] for name, samples in usages.items()}

    def _start(self, executable: str, name: str) -> None:
        self._processes.start(name, self._specs[executable].command())

    def _start_policy(self, policies: dict[str, str] | None = None) -> Path:
        """Start it, with the measured policy or those by label; the file of its notes."""
        self._notes += 1
        notes = self._plan.directory / f"policy{self._notes}.notes"
        spec = self._specs["policy_node"]
        if policies is not None:
            given = [f"{label}={path}" for label, path in policies.items()]
            spec = replace(spec, parameters={**spec.parameters, "policies": given})
        words = ["--ros-args", *spec.ros_arguments()]
        command = module("watched_policy", notes, ",".join(self._cameras), *words)
        self._processes.start("policy", command)
        return notes

    def _start_sources(self) -> Path:
        """Start them; the file of the stamps they sent."""
        self._notes += 1
        notes = self._plan.directory / f"sources{self._notes}.notes"
        contract = self._config.proprioception
        joints = [*contract.joints] if contract else []
        joints.append(self._profile.joint_states.gripper_joint)
        self._processes.start("sources", module("sources", notes, *joints))
        return notes

    def _burst(self, seconds: float, subscribers: int) -> None:
        """Have the sources publish for so long; returns when they have begun."""
        self._processes["sources"].tell(f"{seconds} {subscribers}")
        self._answer("began", 60.0)

    def _end_burst(self, timeout: float) -> dict[str, int]:
        """What was sent in the burst, when it has ended."""
        return dict(self._answer("sent", timeout))

    def _answer(self, key: str, timeout: float) -> Any:
        answers: list[Any] = []

        def came() -> bool:
            answer = self._processes["sources"].answer()
            if answer is not None:
                answers.append(answer)
            return bool(answers)

        self._listener.until(came, "the sources", timeout)
        return answers[0][key]

    def _within(self, commands: list[Sent], listener: Listener) -> list[Sent]:
        """Of the relay's commands, those of the time in which the policy commanded."""
        policy = listener.commands["policy_command"]
        begin, end = policy[0].published, policy[-1].published
        return [command for command in commands if begin <= command.published <= end]

    def _while_commanded(self, published: list[int]) -> list[int]:
        policy = self._listener.commands["policy_command"]
        return [time for time in published if policy[0].published <= time <= policy[-1].published]


def _profile(cameras: list[str]) -> RobotProfile:
    """The simulated robot's profile with the cameras of a measurement, and no simulated arm."""
    profile = load_profile("sim")
    named = {
        name: CameraSource(topic=topic)
        for name, topic in zip(cameras, topics.CAMERAS, strict=False)
    }
    return replace(
        profile,
        cameras=named,
        joint_states=replace(profile.joint_states, topic=topics.JOINT_STATES),
        ee_pose=topics.EE_POSE,
        simulated=False,
    )
