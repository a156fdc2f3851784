"""A trial on the simulated arm, unattended: starts the nodes and runs every step that is left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rlrc_ros import bringup
from rlrc_ros.errors import UserError
from rlrc_ros.profile import RobotProfile
from rlrc_ros.trials.session import LOGS, Trial, TrialSession
from rlrc_ros.trials.state import SIMULATOR

if TYPE_CHECKING:
    from rlrc_ros.trials.client import RobotClient

STOP_TIME = 10.0
"""s that a node may take to stop before it is killed."""


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


@contextlib.contextmanager
def running_robot(
    session: TrialSession, profile: RobotProfile, *, attach: bool = False
) -> Iterator[RobotClient]:
    """The nodes of a trial, ready; their logs go to the trial's directory.

    attach: use those that run already.

    Raises:
        UserError: a node does not start, dies, or does not answer.
    """
    from rlrc_ros.trials.client import RobotClient
    from rlrc_ros.trials.runner import trial_nodes

    if attach:
        with RobotClient() as robot:
            robot.wait_until_ready(lambda: None, simulated=profile.simulated)
            yield robot
    else:
        specs = trial_nodes(session, profile)
        with running_nodes(specs, session.directory / LOGS) as alive, RobotClient() as robot:
            robot.wait_until_ready(alive, simulated=profile.simulated)
            yield robot


def run_simulated(
    session: TrialSession, profile: RobotProfile, progress: Callable[[Trial], None]
) -> None:
    """Start the nodes and run what is left of a trial on the simulated arm.

    Raises:
        UserError: a node does not start, dies, or does not answer.
    """
    with running_robot(session, profile) as robot:
        run_rest(session, robot, progress)


def run_rest(session: TrialSession, robot: RobotClient, progress: Callable[[Trial], None]) -> None:
    """Run what is left of a trial; the simulated arm's state judges every episode.

    progress: called after every trial.
    """
    from rlrc_ros.trials.runner import run_current

    while session.state in ("ready", "stopped"):
        # A trial that has ended but has no label was left by a process that was killed.
        ready = session.state == "ready"
        trial = run_current(session, robot) if ready else session.trials[-1]
        notes = "judged by the simulator's state"
        progress(session.label(trial.number, trial.judged, notes=notes, operator=SIMULATOR))
