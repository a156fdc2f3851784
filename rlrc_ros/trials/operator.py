"""A trial from the terminal: what the operator is asked and told. Nothing names a policy."""

from __future__ import annotations

import os
import select
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlrc_ros.errors import UserError
from rlrc_ros.trials.client import RobotClient
from rlrc_ros.trials.runner import run_current
from rlrc_ros.trials.session import Trial, TrialSession

_LABELS = {"s": "success", "f": "failure", "p": "partial"}


class Operator:
    """Runs a trial with one person at the terminal."""

    def __init__(self, session: TrialSession, robot: RobotClient, *, simulated: bool) -> None:
        """A session that is ready or stopped, and the robot's nodes."""
        self._session, self._robot, self._simulated = session, robot, simulated

    def run(self) -> None:
        """Go on until all is done or the operator leaves.

        Raises:
            UserError: there is no terminal, or the nodes do not answer.
        """
        if not sys.stdin.isatty():
            raise UserError("there is no terminal to ask at; --unattended runs a simulated trial")
        while self._session.state in ("ready", "stopped"):
            if self._session.state == "ready" and not self._run_one():
                return
            if not self._label(self._session.trials[-1]):
                return

    def _run_one(self) -> bool:
        """Have the scene set up and run it; False where the operator leaves."""
        step, progress = self._session.current(), self._session.progress()
        assert step is not None
        left = progress.seconds_left
        time = "" if left is None else f", about {left / 60:.0f} min left"
        self._say(f"\n{progress.done} of {progress.steps} trials done{time}")
        self._say(f"task {step.task.name}: {step.task.rubric}")
        for text in (step.task.instruction, step.start.note):
            if text:
                self._say(f"  {text}")
        if step.start.image:
            self._say(f"  set the scene up as in {self._session.directory / step.start.image}")
        while (answer := self._ask(self._offer())) != "" or self._robot.stopped():
            if answer == "q":
                return False
            if answer == "c":
                self._correct()
            if answer == "e":
                self._try(self._robot.emergency_stop)
            if answer == "r":
                self._try(self._robot.release)
        pressed: set[str] = set()
        with _keys() as keys:
            self._say("running; [space] stop the arm, [d] the episode is over, [e] emergency stop")

            def has(key: str) -> bool:
                pressed.update(keys())
                if "e" in pressed:
                    pressed.remove("e")
                    self._try(self._robot.emergency_stop)
                return key in pressed

            trial = run_current(self._session, self._robot, lambda: has(" "), lambda: has("d"))
        told = f"{trial.termination_reason} after {trial.duration:.1f} s"
        self._say("; ".join(filter(None, (told, trial.message))))
        return True

    def _offer(self) -> str:
        """What can be done before a trial."""
        if reason := self._robot.stopped():
            return f"the arm is stopped ({reason}): [r] release it, [c] correct, [q] quit: "
        return "[enter] start, [c] correct the last label, [e] emergency stop, [q] quit: "

    def _try(self, do: Callable[[], None]) -> None:
        try:
            do()
        except UserError as error:
            self._say(str(error))

    def _label(self, trial: Trial) -> bool:
        """Ask until there is a label or an exclusion; False where the operator leaves."""
        hint = f" (the simulator says {trial.judged})" if trial.judged else ""
        rules = self._session.plan.exclusions
        while True:
            answer = self._ask(
                f"trial {trial.number}{hint}: [s]uccess, [f]ailure, [p]artial"
                f"{', [x] exclude' if rules else ''}, [q] quit: "
            )
            try:
                if answer == "q":
                    return False
                if answer in _LABELS:
                    score = self._score() if answer == "p" else None
                    notes = "" if answer == "s" else self._ask("notes: ", lower=False)
                    self._session.label(trial.number, _LABELS[answer], score, notes)
                    return True
                if answer == "x" and rules:
                    self._exclude(trial)
                    return True
            except UserError as error:
                self._say(str(error))

    def _correct(self) -> None:
        labelled = [trial for trial in self._session.trials if trial.counts]
        if not labelled:
            self._say("nothing has a label yet")
            return
        trial = labelled[-1]
        answer = self._ask(f"trial {trial.number} is {trial.outcome}; [s], [f] or [p]: ")
        if answer not in _LABELS:
            return
        try:
            score = self._score() if answer == "p" else None
            reason = self._ask("why: ", lower=False)
            self._session.correct(trial.number, _LABELS[answer], score, reason=reason)
        except UserError as error:
            self._say(str(error))

    def _exclude(self, trial: Trial) -> None:
        rules = self._session.plan.exclusions
        for number, rule in enumerate(rules, start=1):
            self._say(f"  {number}  {rule}")
        answer = self._ask("by which rule (number): ")
        if not answer.isdigit() or not 1 <= int(answer) <= len(rules):
            raise UserError("no such rule")
        notes = self._ask("notes: ", lower=False)
        self._session.exclude(trial.number, rules[int(answer) - 1], notes)

    def _score(self) -> float:
        answer = self._ask("score, 0 to 100: ")
        try:
            return float(answer)
        except ValueError:
            raise UserError(f"{answer!r} is no number") from None

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def _ask(self, question: str, lower: bool = True) -> str:
        print(question, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return "q"
        return line.strip().lower() if lower else line.strip()


@contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """Keys that were pressed since the last call, without waiting for enter."""
    before = termios.tcgetattr(sys.stdin)
    # What is already typed stays: it may be the key that stops the arm.
    tty.setcbreak(sys.stdin, termios.TCSANOW)
    terminal = sys.stdin.fileno()

    def pressed() -> str:
        ready, _, _ = select.select([terminal], [], [], 0)
        return os.read(terminal, 64).decode(errors="ignore").lower() if ready else ""

    try:
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
