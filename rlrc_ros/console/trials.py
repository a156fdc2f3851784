"""The trial behind the console: runs what the page starts, and says how things stand.

Whatever a page asks for names the trial that it means. A page that is behind, a second tab or a
request that was sent twice can therefore never start, stop or label another trial than the one its
user saw.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from rlrc_ros.errors import UserError
from rlrc_ros.trials.client import RobotClient
from rlrc_ros.trials.runner import run_current
from rlrc_ros.trials.session import Trial, TrialSession

SHOWN = 12
"""How many of the last trials the page lists."""
_RETRY = 2.0
"""s after which nodes that did not answer are asked again."""


class TrialRunner:
    """Runs a session's trials in a thread of its own, one when asked.

    Args:
        session: the trial; labelled from other threads meanwhile.
        alive: raises UserError when a node has died.
        on_change: called, from any thread, when something has changed.
        simulated: whether the arm is.
    """

    def __init__(
        self,
        session: TrialSession,
        alive: Callable[[], None],
        on_change: Callable[[], None],
        *,
        simulated: bool,
    ) -> None:
        self._session, self._alive, self._on_change = session, alive, on_change
        self._simulated = simulated
        self._lock = threading.Lock()
        self._asked = threading.Event()
        self._stop, self._finish, self._closing = (threading.Event() for _ in range(3))
        self._starting = 0
        """Number of the trial that has been asked for and does not run yet; else 0."""
        self.ready = False
        """Whether the nodes have answered."""
        self.problem = ""
        """What went wrong last; empty when a trial has run since."""
        self._thread = threading.Thread(target=self._run, name="trial", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the arm if a trial is running, write down how it ended, and end."""
        self._closing.set()
        self._asked.set()
        self._thread.join()

    @property
    def starting(self) -> bool:
        """Whether a trial was asked for and does not run yet."""
        return bool(self._starting)

    def start(self, trial: int) -> None:
        """Begin a trial.

        trial: the number it will have.

        Raises:
            UserError: it is not the next one, or the robot is not ready.
        """
        with self._lock:
            if not self.ready:
                raise UserError(self.problem or "the robot's nodes are still starting")
            if self._starting:
                raise UserError(f"trial {self._starting} is starting already")
            state, number = self._session.state, len(self._session.trials) + 1
            if state != "ready" or trial != number:
                raise UserError(f"trial {trial} cannot start now: this page was behind")
            self._starting = number
            self._stop.clear()
            self._finish.clear()
        self._asked.set()
        self._on_change()

    def stop(self, trial: int) -> None:
        """Stop the arm and end the trial: operator_stop.

        Raises:
            UserError: that trial does not run.
        """
        self._expect_running(trial)
        self._stop.set()

    def finish(self, trial: int) -> None:
        """End the trial because there is nothing more to see: finished.

        Raises:
            UserError: that trial does not run.
        """
        self._expect_running(trial)
        self._finish.set()

    def _expect_running(self, trial: int) -> None:
        trials = self._session.trials
        running = self._session.state == "running" and trials[-1].number == trial
        if not running and self._starting != trial:
            raise UserError(f"trial {trial} is not running")

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                with RobotClient() as robot:
                    robot.wait_until_ready(self._still_wanted, simulated=self._simulated)
                    self._set(ready=True, problem="")
                    while not self._closing.is_set():
                        self._asked.wait()
                        self._asked.clear()
                        if self._starting and not self._closing.is_set():
                            self._run_one(robot)
            except Exception as error:  # the page has to say it, whatever it is
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                self._set(ready=False, problem=f"{kind}{error}")
                self._closing.wait(_RETRY)

    def _still_wanted(self) -> None:
        """Asked in every wait: ends one for nodes that do not come. A trial ends by its stop."""
        if self._closing.is_set() and not self.ready:
            raise UserError("the console is closing")
        self._alive()

    def _run_one(self, robot: RobotClient) -> None:
        try:
            self._alive()
            self.problem = ""
            run_current(
                self._session,
                robot,
                should_stop=lambda: self._stop.is_set() or self._closing.is_set(),
                should_finish=self._finish.is_set,
                on_running=lambda _: self._on_change(),
            )
        finally:
            self._starting = 0
            self._on_change()

    def _set(self, *, ready: bool, problem: str) -> None:
        self.ready, self.problem = ready, problem
        self._on_change()


def view(session: TrialSession, runner: TrialRunner) -> dict[str, Any]:
    """How things stand, for the page: nothing in it tells one policy from another."""
    state, trials, step = session.state, session.trials, session.current()
    plan = session.plan
    return {
        "trial_id": session.trial_id,
        "name": plan.name,
        "max_duration": plan.max_duration,
        "exclusions": list(plan.exclusions),
        "state": "starting" if runner.starting and state == "ready" else state,
        "ready": runner.ready,
        "problem": runner.problem,
        "next_trial": len(trials) + 1,
        "step": None
        if step is None
        else {
            "index": step.index,
            "pair": step.pair + 1,
            "place": step.place + 1,
            "places": len(plan.arms),
            "task": step.task.name,
            "instruction": step.task.instruction,
            "rubric": step.task.rubric,
            "note": step.start.note,
            "simulated": step.start.seed is not None,
            "reference": f"api/reference/{step.index}" if step.start.image else None,
        },
        "progress": asdict(session.progress()),
        "trials": [_trial(trial) for trial in trials[: -SHOWN - 1 : -1]],
    }


def _trial(trial: Trial) -> dict[str, Any]:
    told = asdict(trial)
    names = ["number", "task", "instruction", "termination_reason", "message", "duration"]
    names += ["judged", "labels", "excluded"]
    score = trial.labels[-1].score if trial.labels else None
    running = not trial.termination_reason
    return {name: told[name] for name in names} | {
        "outcome": trial.outcome,
        "score": score,
        "elapsed": _since(trial.started) if running else trial.duration,
    }


def _since(started: str) -> float:
    begun = datetime.fromisoformat(started)
    return max(0.0, (datetime.now(timezone.utc) - begun).total_seconds())
