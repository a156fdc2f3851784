"""Where a trial stands, as its log tells it; nothing here says which policy ran."""

from __future__ import annotations

import dataclasses
import itertools
import statistics as stdlib_statistics
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from rlrc_ros.errors import UserError
from rlrc_ros.trials.log import Event
from rlrc_ros.trials.plan import Plan, Start, Task
from rlrc_ros.trials.records import EpisodeRecord
from rlrc_ros.trials.seal import policy_label, unseal

State = Literal["ready", "running", "stopped", "complete", "unblinded"]
BAGS = "bags"
"""The recordings' directory in a trial's."""
SIMULATOR = "simulator"
"""The operator of labels that come from a simulator's ground truth."""
INTERRUPTED = "interrupted"
"""Termination reason of an episode during which the trial's process died."""


@dataclass(frozen=True)
class Label:
    """Somebody's judgement of a trial."""

    time: str
    """ISO 8601, UTC."""
    outcome: str
    score: float | None
    notes: str
    reason: str
    """Why it corrects the label before; empty for the first one."""
    operator: str


@dataclass(frozen=True)
class Step:
    """A place in the plan: one episode of one arm, whichever that is.

    Args:
        index: from 0.
        pair: from 0.
        place: 0 for the pair's first episode.
        task: what to do.
        start: the initial state.
        policy_label: what the policy node knows the step's policy by.

    """

    index: int
    pair: int
    place: int
    task: Task
    start: Start
    policy_label: str


@dataclass(frozen=True)
class Trial:
    """One attempt at a step.

    Args:
        number: from 1, over all attempts.
        step: the step's index.
        pair: the step's pair.
        place: its place in the pair.
        task: the task's name.
        instruction: what the policy was told.
        episode_id: also the name of the bag.
        started: ISO 8601, UTC.
        stopped: empty while it runs.
        termination_reason: how the episode ended; empty while it runs.
        message: anything a person should read.
        duration: s of the episode.
        bag: directory in the trial's `bags`; empty where nothing was recorded.
        judged: "success" or "failure" by a simulator's ground truth; else empty.
        labels: every label so far, oldest first; the last one counts.
        excluded: the rule by which it is excluded; empty where it is not.
        exclusion_notes: what was said beside the rule.

    """

    number: int
    step: int
    pair: int
    place: int
    task: str
    instruction: str
    episode_id: str
    started: str
    stopped: str = ""
    termination_reason: str = ""
    message: str = ""
    duration: float = 0.0
    bag: str = ""
    judged: str = ""
    labels: tuple[Label, ...] = ()
    excluded: str = ""
    exclusion_notes: str = ""

    @property
    def outcome(self) -> str:
        """Of the last label, or unlabelled."""
        return self.labels[-1].outcome if self.labels else "unlabelled"

    @property
    def counts(self) -> bool:
        """Whether it fills its step: labelled, neither excluded nor interrupted."""
        return bool(self.labels) and not self.excluded

    @property
    def awaits_label(self) -> bool:
        """Whether it has ended and should be labelled next."""
        ended = bool(self.termination_reason) and self.termination_reason != INTERRUPTED
        return ended and not self.labels and not self.excluded


@dataclass(frozen=True)
class Progress:
    """How far a trial has come.

    Args:
        done: steps with a labelled trial.
        steps: all of them; with a sequential rule at most.
        pairs_done: pairs with all steps done.
        pairs: all of them; with a sequential rule at most.
        excluded: trials that were excluded.
        interrupted: trials that a crash cut off.
        seconds_per_trial: median from one start to the next; None before there are two.
        seconds_left: at that rate.

    """

    done: int
    steps: int
    pairs_done: int
    pairs: int
    excluded: int
    interrupted: int
    seconds_per_trial: float | None
    seconds_left: float | None


class TrialView:
    """Where a trial stands after the events so far."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.trial_id = self.opened = ""
        self.sealed_sha256 = ""
        self.trials: list[Trial] = []
        self.finished = ""
        """Why the trial ended before all steps were done; empty where it did not."""
        self.allocation: dict[str, str] = {}
        """Arm by policy label; empty before unblinding."""
        self.measurements: dict[int, str] = {}
        """Sealed measurements by trial number."""
        self.requests: dict[str, int] = {}
        """Trial number by the id of the request that labelled it."""
        pairs = enumerate(plan.schedule())
        places = [(pair, place, *what) for pair, what in pairs for place in range(len(plan.arms))]
        self.steps = [Step(i, *where, policy_label(i)) for i, where in enumerate(places)]
        self._filled: set[int] = set()

    @property
    def state(self) -> State:
        """What comes next: start, stop, label, unblind, or the report."""
        if self.allocation:
            return "unblinded"
        last = self.trials[-1] if self.trials else None
        if last is not None and not last.termination_reason:
            return "running"
        if last is not None and last.awaits_label:
            return "stopped"
        return "complete" if self._next() is None else "ready"

    def current(self) -> Step | None:
        """The step that is run, labelled or comes next; None when there is none."""
        if self.state in ("running", "stopped"):
            return self.steps[self.trials[-1].step]
        return None if self.state == "unblinded" else self._next()

    def trial(self, number: int) -> Trial:
        """A trial by its number.

        Raises:
            UserError: there is none.
        """
        if not 1 <= number <= len(self.trials):
            raise UserError(
                f"there is no trial {number}; they are numbered 1 to {len(self.trials)}"
            )
        return self.trials[number - 1]

    def progress(self) -> Progress:
        """How far it has come."""
        arms = len(self.plan.arms)
        done = len(self._filled)
        pairs = [index // arms for index in self._filled]
        began = [datetime.fromisoformat(trial.started) for trial in self.trials]
        gaps = [(b - a).total_seconds() for a, b in itertools.pairwise(began)]
        each = stdlib_statistics.median(gaps) if gaps else None
        return Progress(
            done=done,
            steps=len(self.steps),
            pairs_done=sum(pairs.count(pair) == arms for pair in set(pairs)),
            pairs=self.plan.pairs,
            excluded=sum(bool(trial.excluded) for trial in self.trials),
            interrupted=sum(trial.termination_reason == INTERRUPTED for trial in self.trials),
            seconds_per_trial=each,
            seconds_left=None if each is None else each * (len(self.steps) - done),
        )

    def records(self, allocation: Mapping[str, str] | None = None) -> list[EpisodeRecord]:
        """What is analysed: every attempt that ended and was not excluded.

        allocation: arm by policy label; None: as unblinded.

        Raises:
            UserError: the trial has not been unblinded.
        """
        allocation = self.allocation if allocation is None else allocation
        if not allocation:
            raise UserError("the trial is blinded: `rlrc trial unblind` comes first")
        ended = [t for t in self.trials if t.termination_reason not in ("", INTERRUPTED)]
        return [self._record(t, allocation) for t in ended if not t.excluded]

    def _record(self, trial: Trial, allocation: Mapping[str, str]) -> EpisodeRecord:
        step = self.steps[trial.step]
        start = step.start
        measured: dict[str, Any] = dict.fromkeys(("latency_ms_p50", "latency_ms_p99"))
        measured |= {"steps": 0, "deadline_misses": 0, "skipped_steps": 0, "guard": {}}
        measured |= unseal(self.measurements[trial.number])
        return EpisodeRecord(
            trial_id=self.trial_id,
            pair=trial.pair,
            order=trial.place,
            arm=allocation[step.policy_label],
            episode_id=trial.episode_id,
            seed=step.task.starts.index(start) if start.seed is None else start.seed,
            task=trial.task,
            instruction=trial.instruction,
            outcome=trial.outcome,
            score=trial.labels[-1].score if trial.labels else None,
            termination_reason=trial.termination_reason,
            duration_s=trial.duration,
            bag_uri=f"{BAGS}/{trial.bag}" if trial.bag else "",
            **{"message": trial.message, **measured},
        )

    def apply(self, event: Event) -> None:
        """Take the next event of the log."""
        getattr(self, f"_on_{event['event']}")(event)

    def _next(self) -> Step | None:
        if self.finished:
            return None
        return next((step for step in self.steps if step.index not in self._filled), None)

    def _on_opened(self, event: Event) -> None:
        self.trial_id, self.sealed_sha256 = event["trial_id"], event["sealed_sha256"]
        self.opened = event["time"]

    def _on_resumed(self, event: Event) -> None:
        pass  # for the audit trail

    def _on_started(self, event: Event) -> None:
        step = self.steps[event["step"]]
        self.trials.append(
            Trial(
                number=event["trial"],
                step=step.index,
                pair=step.pair,
                place=step.place,
                task=step.task.name,
                instruction=event["instruction"],
                episode_id=event["episode_id"],
                started=event["time"],
            )
        )

    def _on_stopped(self, event: Event) -> None:
        self.measurements[event["trial"]] = event["sealed"]
        names = ("termination_reason", "message", "duration", "bag", "judged")
        self._change(event, stopped=event["time"], **{name: event[name] for name in names})

    def _on_interrupted(self, event: Event) -> None:
        self._change(
            event,
            stopped=event["time"],
            termination_reason=INTERRUPTED,
            message=event["message"],
        )

    def _on_labelled(self, event: Event) -> None:
        names = [field.name for field in dataclasses.fields(Label)]
        label = Label(**{name: event[name] for name in names})
        trial = self._change(event, labels=(*self.trial(event["trial"]).labels, label))
        if event["request"]:
            self.requests[event["request"]] = trial.number
        self._filled.add(trial.step)

    def _on_excluded(self, event: Event) -> None:
        trial = self._change(event, excluded=event["rule"], exclusion_notes=event["notes"])
        self._filled.discard(trial.step)

    def _on_finished(self, event: Event) -> None:
        self.finished = event["reason"]

    def _on_unblinded(self, event: Event) -> None:
        self.allocation = dict(event["allocation"])
        if event["reason"]:
            self.finished = event["reason"]

    def _change(self, event: Event, **changes: Any) -> Trial:
        trial = dataclasses.replace(self.trial(event["trial"]), **changes)
        self.trials[trial.number - 1] = trial
        return trial
