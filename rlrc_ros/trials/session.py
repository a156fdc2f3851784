"""A running trial: what comes next, what happened, and that nothing of it is ever lost.

Every method that changes something writes a line to the log and returns when that is on the disk.
The log is the only state: a process that is killed at any moment resumes from it.
"""

from __future__ import annotations

import math
import secrets
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts import episode as episodes
from rlrc_ros.trials import seal
from rlrc_ros.trials.log import TrialLog, WriterLock, read_events
from rlrc_ros.trials.plan import Plan, read_plan
from rlrc_ros.trials.records import EpisodeRecord
from rlrc_ros.trials.sequential import decided
from rlrc_ros.trials.state import BAGS, INTERRUPTED, Label, Progress, State, Step, Trial, TrialView
from rlrc_ros.trials.summary import outcome_counts

PLAN, LOG, LOCK, LOGS = "plan.yaml", "log.jsonl", "lock", "nodes"
"""What a trial's directory holds, beside `seal.FILE` and BAGS."""

__all__ = ["Ended", "Label", "Progress", "State", "Step", "Trial", "TrialSession", "read_trial"]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How an episode ended.

    Attributes:
        termination_reason: finished, timeout, operator_stop, guard_stop, policy_error, …
        message: anything a person should read.
        duration: s.
        bag: name of its directory in the trial's `bags`; empty where nothing was recorded.
        judged: "success" or "failure" by a simulator's ground truth; else empty.
        measurements: what would tell the policies apart and stays sealed until unblinding:
            fields of EpisodeRecord (steps, latency_ms_p50, latency_ms_p99, deadline_misses,
            skipped_steps, guard).
    """

    termination_reason: str
    message: str = ""
    duration: float = 0.0
    bag: str = ""
    judged: str = ""
    measurements: Mapping[str, Any] = field(default_factory=dict)


def is_begun(directory: Path) -> bool:
    """Whether there is a trial in a directory.

    Raises:
        UserError: its log is damaged.
    """
    return (directory / LOG).is_file() and bool(read_events(directory / LOG))


def read_trial(directory: Path) -> TrialView:
    """Where a trial stands, read without taking its lock.

    Raises:
        UserError: there is no trial, or a file of it is damaged or was edited.
    """
    plan = read_plan(directory / PLAN)
    return _replay(plan, read_events(directory / LOG), directory)


class TrialSession:
    """The one writer of a trial. Use in `with`, or call `close`.

    All methods may be called from any thread.
    """

    def __init__(self, directory: Path, operator: str, lock: WriterLock, log: TrialLog) -> None:
        """Not for callers: use `create` or `open`."""
        self.directory, self._operator = directory, operator
        self._writer_lock, self._log = lock, log
        self._lock = threading.RLock()
        self.plan = read_plan(directory / PLAN)
        self._view = _replay(self.plan, log.events, directory)

    @classmethod
    def create(
        cls, directory: Path, plan: Plan, operator: str = "", images: Path | None = None
    ) -> TrialSession:
        """Begin a trial: draw the order of the policies, seal it, and open the log.

        Args:
            directory: made where it is missing.
            plan: a locked one.
            operator: who begins it.
            images: what the plan's reference images are relative to; they are copied.

        Raises:
            UserError: there is a trial already, another process has it, or a bundle or an image is
                not as planned.
        """
        plan.check_bundles()
        directory.mkdir(parents=True, exist_ok=True)
        lock = WriterLock(directory / LOCK)
        try:
            log = TrialLog(directory / LOG)
            if log.events:
                log.close()
                raise UserError(f"{directory} holds a trial already: resume it, or name another")
            if images is not None:
                plan.check_images(images)
                _copy_images(plan, images, directory)
            plan.write(directory / PLAN)
            sealed = seal.draw(plan, directory)
            log.append(
                "opened",
                trial_id=f"trial-{secrets.token_hex(3)}",
                plan_sha256=plan.sha256,
                sealed_sha256=sealed,
                operator=operator,
                software=episodes.software_versions(),
            )
            session = cls(directory, operator, lock, log)
        except BaseException:
            lock.release()
            raise
        return session

    @classmethod
    def open(cls, directory: Path, operator: str = "") -> TrialSession:
        """Resume a trial.

        A trial that was running when its process died is closed as interrupted: its step is
        current again, with the same policy.

        Raises:
            UserError: there is none, another process has it, a file of it is damaged or was
                edited, or a bundle has changed.
        """
        if not is_begun(directory):
            raise UserError(f"{directory} holds no trial: begin one with a plan")
        lock = WriterLock(directory / LOCK)
        try:
            log = TrialLog(directory / LOG)
            session = cls(directory, operator, lock, log)
            if session.state != "unblinded":
                session.plan.check_bundles()
                session._resume()
        except BaseException:
            lock.release()
            raise
        return session

    def close(self) -> None:
        """Let others have it."""
        with self._lock:
            self._log.close()
            self._writer_lock.release()

    def __enter__(self) -> TrialSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What is known

    @property
    def trial_id(self) -> str:
        """The trial's name, drawn at random."""
        return self._view.trial_id

    @property
    def bags(self) -> Path:
        """Where the recordings are."""
        return self.directory / BAGS

    @property
    def state(self) -> State:
        """ready, running, stopped (to be labelled), complete or unblinded."""
        with self._lock:
            return self._view.state

    @property
    def trials(self) -> list[Trial]:
        """All attempts so far, oldest first."""
        with self._lock:
            return list(self._view.trials)

    def current(self) -> Step | None:
        """The step that is run, labelled or comes next; None when complete or unblinded."""
        with self._lock:
            return self._view.current()

    def progress(self) -> Progress:
        """How far it has come."""
        with self._lock:
            return self._view.progress()

    # What happens

    def start(self, instruction: str = "") -> Trial:
        """Begin the current step's next attempt; call before anything moves.

        instruction: what the policy is told; empty: as the task says.

        Raises:
            UserError: the last trial still runs or has no label, or all is done.
        """
        with self._lock:
            self._expect("ready", "start the next trial")
            step = self._view.current()
            assert step is not None
            number = len(self._view.trials) + 1
            self._write(
                "started",
                trial=number,
                step=step.index,
                episode_id=f"{self.trial_id}-{number:04d}",
                instruction=instruction or step.task.instruction,
                operator=self._operator,
            )
            return self._view.trial(number)

    def stop(self, trial: int, ended: Ended) -> Trial:
        """Write down how the running trial ended.

        Raises:
            UserError: that trial is not running.
        """
        with self._lock:
            found = self._view.trial(trial)
            if found.termination_reason:
                raise UserError(f"trial {trial} has ended already: {found.termination_reason}")
            if not ended.termination_reason or ended.termination_reason == INTERRUPTED:
                raise UserError(f"trial {trial}: say how it ended")
            self._write(
                "stopped",
                trial=trial,
                termination_reason=ended.termination_reason,
                message=ended.message,
                duration=round(ended.duration, 3),
                bag=ended.bag,
                judged=ended.judged,
                sealed=seal.seal(dict(ended.measurements)),
            )
            return self._view.trial(trial)

    def interrupt(self, trial: int, message: str) -> Trial:
        """Write down that the running trial could not be carried out; its step is run again.

        Only for what is no outcome of the policy's: a node that died or did not answer.

        Raises:
            UserError: that trial is not running.
        """
        with self._lock:
            if self._view.trial(trial).termination_reason:
                raise UserError(f"trial {trial} has ended already")
            self._write("interrupted", trial=trial, message=message)
            return self._view.trial(trial)

    def label(
        self,
        trial: int,
        outcome: str,
        score: float | None = None,
        notes: str = "",
        operator: str | None = None,
        request: str = "",
    ) -> Trial:
        """Say whether the task was done.

        Args:
            trial: the trial's number.
            outcome: success, failure or partial.
            score: 0 to 100 where it is partial.
            notes: anything.
            operator: who says so, where it is another than the session's.
            request: an id of this request; sent again it changes nothing and is no error.

        Raises:
            UserError: it runs, was excluded or interrupted, has a label already, or outcome or
                score make no sense.
        """
        with self._lock:
            found = self._view.trial(trial)
            if request and self._view.requests.get(request) == trial:
                return found
            if found.labels:
                by = f" by {found.labels[-1].operator}" if found.labels[-1].operator else ""
                raise UserError(
                    f"trial {trial} is labelled {found.outcome}{by} already: correct that label "
                    "if it is wrong"
                )
            return self._label(found, outcome, score, notes, "", operator, request)

    def correct(
        self,
        trial: int,
        outcome: str,
        score: float | None = None,
        notes: str = "",
        reason: str = "",
        operator: str | None = None,
        request: str = "",
    ) -> Trial:
        """Change a label; the earlier ones stay in the log.

        Raises:
            UserError: as `label`; there is no label yet, no reason is given, or the trial has been
                unblinded.
        """
        with self._lock:
            found = self._view.trial(trial)
            if request and self._view.requests.get(request) == trial:
                return found
            if not found.labels:
                raise UserError(f"trial {trial} has no label to correct")
            if not reason.strip():
                raise UserError(f"trial {trial}: a correction needs a reason")
            return self._label(found, outcome, score, notes, reason, operator, request)

    def exclude(self, trial: int, rule: str, notes: str = "", operator: str | None = None) -> Trial:
        """Take a trial out of the analysis by a rule of the plan; its step is run again.

        Raises:
            UserError: it runs, was excluded or interrupted already, the plan has no such rule, or
                the trial has been unblinded.
        """
        with self._lock:
            found = self._view.trial(trial)
            self._refuse_if_unblinded()
            self._refuse_unless_ended(found)
            if rule not in self.plan.exclusions:
                rules = "; ".join(self.plan.exclusions) or "none"
                raise UserError(f"{rule!r} is no exclusion rule of this plan; they are: {rules}")
            self._write(
                "excluded", trial=trial, rule=rule, notes=notes, operator=self._who(operator)
            )
            return self._view.trial(trial)

    def unblind(self, reason: str = "", operator: str | None = None) -> dict[str, str]:
        """Say which policy ran at which step: arm by policy label. Nothing can be changed after.

        reason: why the trial ends here although it is not complete.

        Raises:
            UserError: it is not complete and no reason is given, a trial is running, or the sealed
                order is not the one that was drawn.
        """
        with self._lock:
            if self._view.allocation:
                return dict(self._view.allocation)
            if self.state == "running":
                raise UserError(f"trial {len(self._view.trials)} is running; stop it first")
            if self.state != "complete" and not reason.strip():
                progress = self.progress()
                raise UserError(
                    f"{progress.done} of {progress.steps} trials are done; to end the trial here "
                    "give a reason, which the report will show"
                )
            policies = self._sealed()
            self._write(
                "unblinded",
                allocation={label: policy.arm for label, policy in policies.items()},
                reason="" if self.state == "complete" else reason,
                operator=self._who(operator),
            )
            self._name_bags()
            return dict(self._view.allocation)

    def records(self) -> list[EpisodeRecord]:
        """What is analysed: every trial that ended and was not excluded.

        Raises:
            UserError: the trial has not been unblinded.
        """
        with self._lock:
            return self._view.records()

    # Parts

    def _label(
        self,
        trial: Trial,
        outcome: str,
        score: float | None,
        notes: str,
        reason: str,
        operator: str | None,
        request: str,
    ) -> Trial:
        self._refuse_if_unblinded()
        self._refuse_unless_ended(trial)
        if outcome not in episodes.OUTCOMES:
            raise UserError(f"outcome {outcome!r} is none of {', '.join(episodes.OUTCOMES)}")
        if outcome != "partial":
            score = None
        elif score is None or not (math.isfinite(score) and 0 <= score <= 100):
            raise UserError(f"a partial success needs a score from 0 to 100, not {score}")
        self._write(
            "labelled",
            trial=trial.number,
            outcome=outcome,
            score=score,
            notes=notes,
            reason=reason,
            operator=self._who(operator),
            request=request,
        )
        trial = self._view.trial(trial.number)
        self._label_bag(trial)
        self._apply_stopping_rule()
        return trial

    def _resume(self) -> None:
        self._write("resumed", operator=self._operator)
        last = self._view.trials[-1] if self._view.trials else None
        if last is not None and not last.termination_reason:
            self._write(
                "interrupted",
                trial=last.number,
                message="the process that ran the trial ended before the episode did",
            )
        for trial in self._view.trials:
            self._label_bag(trial)
        self._apply_stopping_rule()

    def _apply_stopping_rule(self) -> None:
        """End an anytime trial once every comparison is decided; says nothing of how."""
        plan = self.plan
        if plan.stopping != "anytime" or self._view.finished or not self._view.trials:
            return
        allocation = {label: policy.arm for label, policy in self._sealed().items()}
        found = self._view.records(allocation)
        alpha = plan.alpha / len(plan.candidates)
        if all(
            decided(*outcome_counts(found, (plan.reference, candidate)), plan.margin, alpha)
            for candidate in plan.candidates
        ):
            self._write("finished", reason="the sequential rule has decided")

    def _sealed(self) -> dict[str, seal.SealedPolicy]:
        path = self.directory / seal.FILE
        if seal.file_hash(path) != self._view.sealed_sha256:
            raise UserError(f"{path} is not the one that was drawn for this trial; restore it")
        return seal.sealed_policies(path)

    def _label_bag(self, trial: Trial) -> None:
        """Have the bag say what the log says; bags may lie on another machine, or be lost."""
        directory = self.bags / trial.bag
        if not (trial.bag and trial.labels and (directory / episodes.FILE).is_file()):
            return
        known = len(episodes.read_episode(directory).labels)
        for label in trial.labels[known:]:
            notes = "; ".join(filter(None, (label.notes, label.reason)))
            episodes.label(directory, label.outcome, label.score, notes)

    def _name_bags(self) -> None:
        """Write into the bags what had to be kept from them."""
        for trial in self._view.trials:
            directory = self.bags / trial.bag
            if trial.bag and (directory / episodes.FILE).is_file():
                arm = self._view.allocation[self._view.steps[trial.step].policy_label]
                found = episodes.read_episode(directory)
                found.bundle_hash = self.plan.arms[arm].hash
                found.metadata = {**found.metadata, "trial": self.trial_id, "arm": arm}
                episodes.write_episode(directory, found)

    def _write(self, event: str, **fields: Any) -> None:
        self._view.apply(self._log.append(event, **fields))

    def _who(self, operator: str | None) -> str:
        return self._operator if operator is None else operator

    def _expect(self, state: State, deed: str) -> None:
        if (found := self.state) != state:
            number = len(self._view.trials)
            why = {
                "ready": "no trial has been started",
                "running": f"trial {number} is running",
                "stopped": f"trial {number} has no label yet",
                "complete": "all trials are done",
                "unblinded": "the trial has been unblinded",
            }[found]
            raise UserError(f"cannot {deed}: {why}")

    def _refuse_if_unblinded(self) -> None:
        if self._view.allocation:
            raise UserError("the trial has been unblinded: labels and exclusions stand as they are")

    def _refuse_unless_ended(self, trial: Trial) -> None:
        if not trial.termination_reason:
            raise UserError(f"trial {trial.number} is running")
        if trial.termination_reason == INTERRUPTED:
            raise UserError(f"trial {trial.number} was interrupted; its step is run again")
        if trial.excluded:
            raise UserError(f"trial {trial.number} is excluded: {trial.excluded}")


def _replay(plan: Plan, events: list[dict[str, Any]], directory: Path) -> TrialView:
    view = TrialView(plan)
    for number, event in enumerate(events, start=1):
        try:
            view.apply(event)
        except (AttributeError, KeyError, IndexError, TypeError, UserError):
            raise UserError(
                f"{directory / LOG}:{number}: not an entry that this version knows; use the one "
                "that wrote it"
            ) from None
    if events and events[0].get("plan_sha256") != plan.sha256:
        raise UserError(
            f"{directory / PLAN} is not the plan that this trial began with; restore it"
        )
    return view


def _copy_images(plan: Plan, source: Path, target: Path) -> None:
    for task in plan.tasks:
        for start in task.starts:
            if start.image:
                (target / start.image).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / start.image, target / start.image)
