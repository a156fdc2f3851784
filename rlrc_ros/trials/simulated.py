"""A trial on the simulated arm: starts the nodes, runs paired episodes, keeps a record of each."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlrc_ros import bringup
from rlrc_ros.errors import UserError
from rlrc_ros.profile import RobotProfile
from rlrc_ros.trials.records import EpisodeRecord, append

STOP_TIME = 10.0
"""s that a node may take to stop before it is killed."""


@dataclass(frozen=True, kw_only=True)
class SimulatedTrial:
    """What to run.

    Attributes:
        arms: bundles by arm, the reference first.
        pairs: how many scenes; both arms run in each.
        first_seed: the first scene's seed; the others follow.
        max_duration: s after which an episode times out.
        seed: of the order of the arms within each pair.
    """

    arms: Mapping[str, str]
    pairs: int
    first_seed: int
    max_duration: float = 12.0
    seed: int = 0


@contextlib.contextmanager
def running_nodes(specs: list[bringup.NodeSpec], logs: Path) -> Iterator[Callable[[], None]]:
    """Start nodes as processes, in a ROS domain of their own; stop them at the end.

    Gives a function that raises UserError when one of them has died.
    """
    logs.mkdir(parents=True, exist_ok=True)
    variables = {
        **bringup.TRANSPORT_ENVIRONMENT,
        # Not the domain of a robot that may be on the same network.
        "ROS_DOMAIN_ID": str(random.SystemRandom().randint(1, 101)),
        "ROS_LOG_DIR": str(logs),
    }
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(variables))  # this process joins the domain too
        stack.callback(_stop, processes)
        for spec in specs:
            log = stack.enter_context((logs / f"{spec.executable}.log").open("w"))
            processes[spec.executable] = subprocess.Popen(
                spec.command(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

        def alive() -> None:
            for name, process in processes.items():
                if process.poll() is not None:
                    log = logs / f"{name}.log"
                    last = (log.read_text().strip().splitlines() or ["it printed nothing"])[-1]
                    raise UserError(f"{name} has ended ({process.returncode}): {last}; see {log}")

        yield alive


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """In a new process: have Linux interrupt it when this one is killed and cannot stop it."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _stop(processes: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Ask all of them to end, then wait."""
    for process in processes.values():
        process.send_signal(signal.SIGINT)
    for process in processes.values():
        try:
            process.wait(STOP_TIME)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_trial(
    trial: SimulatedTrial,
    profile: RobotProfile,
    out: Path,
    progress: Callable[[EpisodeRecord], None],
) -> dict[str, int]:
    """Run it; records go to `out/episodes.jsonl`, bags to `out/bags`, node logs to `out/logs`.

    On the topics the policies are called by opaque labels. Returns the bytes of weights that each
    arm's policy holds in memory.

    Raises:
        UserError: a node does not start, dies, or does not answer.
    """
    from rlrc_ros.trials.client import RobotClient

    order = random.Random(trial.seed)
    trial_id = f"trial-{secrets.token_hex(3)}"
    labels = dict(zip(trial.arms, order.sample(["A", "B"], 2), strict=True))
    policies = {labels[arm]: path for arm, path in trial.arms.items()}
    specs = bringup.nodes(profile, output_dir=str((out / "bags").resolve()), policies=policies)
    with running_nodes(specs, out / "logs") as alive, RobotClient() as robot:
        robot.wait_until_ready(alive)
        memory = {info.label: info.weight_bytes for info in robot.policies()}
        for pair in range(trial.pairs):
            arms = order.sample(list(trial.arms), len(trial.arms))
            for place, arm in enumerate(arms):
                alive()
                seed = trial.first_seed + pair
                scene = robot.reset_scene(seed)
                robot.load_policy(labels[arm])
                episode_id = f"{trial_id}-{pair:03d}-{labels[arm]}"
                outcome = robot.run_episode(
                    scene.instruction, labels[arm], episode_id, trial.max_duration, record=True
                )
                result = outcome.result
                judged = "success" if outcome.success else "failure"
                if result.bag_uri:
                    robot.label_episode(result.bag_uri, judged, "judged by the simulator's state")
                record = EpisodeRecord(
                    trial_id=trial_id,
                    pair=pair,
                    order=place,
                    arm=arm,
                    episode_id=episode_id,
                    seed=seed,
                    task=scene.task,
                    instruction=scene.instruction,
                    outcome=judged,
                    score=None,
                    termination_reason=result.termination_reason,
                    steps=result.steps,
                    duration_s=outcome.duration,
                    latency_ms_p50=result.latency_ms_p50,
                    latency_ms_p99=result.latency_ms_p99,
                    deadline_misses=result.deadline_misses,
                    skipped_steps=result.skipped_steps,
                    guard=outcome.guard,
                    bag_uri=f"bags/{Path(result.bag_uri).name}" if result.bag_uri else "",
                    message=result.message,
                )
                append(out / "episodes.jsonl", record)
                progress(record)
        return {arm: memory[label] for arm, label in labels.items()}
