"""One episode of a policy on a robot: when it acts, what it counts, how it ends. No ROS in it."""

from __future__ import annotations

import threading
import time
from bisect import bisect
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rlrc_ros.chunks import ActionPlan
from rlrc_ros.errors import UserError
from rlrc_ros.vla.policy import Policy
from rlrc_ros.vla.processor import Observation

FINISHED = "finished"
TIMEOUT = "timeout"
OPERATOR_STOP = "operator_stop"
GUARD_STOP = "guard_stop"
CLIENT_LOST = "client_lost"
POLICY_ERROR = "policy_error"
OBSERVATION_LOST = "observation_lost"
RECORDING_LOST = "recording_lost"
NODE_DEACTIVATED = "node_deactivated"

OBSERVATION_PATIENCE = 1.0
"""s without a usable observation after which an episode ends."""
FIRST_OBSERVATION_PATIENCE = 5.0
"""s to wait for the first one: sources may still be starting."""
LONGEST_STALL = 1.0
"""s that control may be held up for, beyond its period, before the episode ends."""
OLDEST_ACTION = 1.0
"""s from an observation's oldest stamp after which the action computed from it is not sent."""


class NotReady(UserError):
    """There is no usable observation now; the message says which source lacks what."""


@dataclass
class Statistics:
    """What an episode counted; times in ms, the first inference left out of the percentiles."""

    steps: int = 0
    deadline_misses: int = 0
    skipped_steps: int = 0
    skip_reason: str = ""
    observation_age: float = 0.0
    """s, from the oldest stamp of the last step's observation to its command."""
    last_ms: dict[str, float] = field(default_factory=dict)
    totals_ms: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """s of the steady clock, when each step ended."""

    def percentile(self, q: float) -> float:
        """Of the time from looking to having actions; 0 while there are fewer than two of them."""
        later = self.totals_ms[1:]
        return float(np.percentile(later, q)) if later else 0.0

    def rate(self) -> float:
        """Hz, over the last second."""
        return float(len(self.times) - bisect(self.times, time.monotonic() - 1.0))


Look = Callable[[], tuple[Observation, int]]
"""Takes an observation and its oldest stamp (ns since the epoch); raises NotReady or UserError."""
Command = Callable[[NDArray[np.float64], int, int], None]
"""Sends an action (7,), given the observation's stamp and the number of the step."""


class Episode:
    """Looks and acts in a thread of its own, and commands one action a control period.

    A policy that gives single actions looks in every period, and its action is commanded as soon as
    it is there. One that gives chunks looks again while the rest of the chunk is being commanded.

    Args:
        episode_id: its name.
        instruction: what the policy is to do.
        label: the label the policy runs under.
        policy: what acts.
        max_duration: s after which the episode times out.
        look: gives an observation.
        command: sends an action on; never called after `end`.
        clock_ns: the clock of the observations' stamps, ns since the epoch.
        plan: what becomes of chunks.
    """

    def __init__(
        self,
        episode_id: str,
        instruction: str,
        label: str,
        policy: Policy,
        max_duration: float,
        look: Look,
        command: Command,
        clock_ns: Callable[[], int],
        plan: ActionPlan,
    ) -> None:
        self.episode_id, self.instruction, self.label = episode_id, instruction, label
        self.policy, self.max_duration = policy, max_duration
        self.statistics = Statistics()
        self.termination_reason = ""
        self.message = ""
        self._look, self._command, self._clock_ns = look, command, clock_ns
        self._plan, self._due, self._tick_time = plan, False, 0.0
        self._began: float | None = None
        self._last_step = 0.0
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._work: Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether it is over; a step that was under way no longer commands."""
        return bool(self.termination_reason)

    @property
    def elapsed(self) -> float:
        """Seconds since the first tick."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    @property
    def busy(self) -> bool:
        """Whether a step is under way."""
        return self._work is not None and not self._work.done()

    def tick(self) -> None:
        """Call once a control period: commands what is due, and has the policy look again."""
        if self.ended:
            return
        now = time.monotonic()
        if self._began is None:
            self._began = self._last_step = self._tick_time = now
        if self._held_up(now):
            return
        if self.elapsed > self.max_duration:
            self.end(TIMEOUT, f"after {self.max_duration:g} s")
            return
        with self._lock:
            self._due, self._tick_time = True, now
            self._command_next()
            late, wants_more = self._due, self._plan.wants_more
        if self.busy:
            self.statistics.deadline_misses += late
        elif wants_more:
            self._work = self._worker.submit(self._step)

    def end(self, reason: str, message: str = "") -> None:
        """End it, once: the first reason stands."""
        with self._lock:
            if not self.ended:
                self.message, self.termination_reason = message, reason

    def close(self) -> None:
        """Wait for a step that is under way."""
        self._worker.shutdown(wait=True)

    def _step(self) -> None:
        statistics, began = self.statistics, time.perf_counter()
        try:
            observation, stamp_ns = self._look()
        except NotReady as error:
            patience = OBSERVATION_PATIENCE if statistics.steps else FIRST_OBSERVATION_PATIENCE
            self._skip(OBSERVATION_LOST, str(error), patience)
            return
        except Exception as error:
            self.end(POLICY_ERROR, f"observation: {error}")
            return
        looked = time.perf_counter()
        try:
            actions = _checked(self.policy.act(observation).actions)
        except Exception as error:
            self.end(POLICY_ERROR, f"{type(error).__name__}: {error}")
            return
        acted = time.perf_counter()
        age = (self._clock_ns() - stamp_ns) * 1e-9
        if age > OLDEST_ACTION:
            late = f"the policy took {acted - looked:.1f} s: its action is for a "
            late += f"scene {age:.1f} s ago, {OLDEST_ACTION:g} s are allowed"
            self._skip(POLICY_ERROR, late, FIRST_OBSERVATION_PATIENCE)
            return
        statistics.last_ms = {
            "preprocess": (looked - began) * 1e3,
            "inference": (acted - looked) * 1e3,
            "total": (acted - began) * 1e3,
        }
        statistics.totals_ms.append(statistics.last_ms["total"])
        statistics.skip_reason = ""
        with self._lock:
            # Where this period has its action already, the next one goes out with the next tick.
            wait = 0.0 if self._due else self._tick_time + self._plan.period - time.monotonic()
            self._plan.add(actions, stamp_ns, age + max(wait, 0.0))
            self._command_next()

    def _command_next(self) -> None:
        """Command the next action if one is due and there is one; the lock is held."""
        if self.ended or not self._due or (planned := self._plan.take()) is None:
            return
        action, stamp_ns = planned
        age = (self._clock_ns() - stamp_ns) * 1e-9
        if age > OLDEST_ACTION:  # of a chunk that nothing has taken over from
            return
        statistics = self.statistics
        self._command(action, stamp_ns, statistics.steps)
        self._due = False
        statistics.observation_age = age
        statistics.steps += 1
        self._last_step = time.monotonic()
        statistics.times.append(self._last_step)

    def _held_up(self, now: float) -> bool:
        """Ends the episode where control was held up for LONGEST_STALL; whether it has ended.

        Whoever stands beside the arm takes it for stopped by then. A step that was under way may
        notice before `tick` does.
        """
        if (gap := now - self._tick_time) > self._plan.period + LONGEST_STALL:
            self.end(POLICY_ERROR, f"the node was held up for {gap:.1f} s")
        return self.ended

    def _skip(self, reason: str, message: str, patience: float) -> None:
        """Count a step not taken; ends the episode once there was none for so many seconds."""
        self.statistics.skipped_steps += 1
        self.statistics.skip_reason = message
        now = time.monotonic()
        if not self._held_up(now) and now - self._last_step > patience:
            self.end(reason, message)


def _checked(actions: NDArray[np.float64]) -> NDArray[np.float64]:
    if actions.ndim != 2 or actions.shape[1] != 7 or not len(actions):
        raise UserError(f"the policy gave actions of shape {actions.shape} instead of (T, 7)")
    if not np.isfinite(actions).all():
        raise UserError("the policy gave an action that is not finite")
    return actions


class PolicyStore:
    """Policies by label, resident once loaded, one of them active.

    Args:
        load: gives a ready policy for a bundle directory or short name; slow.
    """

    def __init__(self, load: Callable[[str], Policy]) -> None:
        self._load = load
        self.resident: dict[str, Policy] = {}
        self.active = ""

    def add(self, label: str, path: str) -> Policy:
        """Load a bundle under a label, replacing what had it, and make it active.

        Raises:
            UserError: it cannot be loaded; then nothing has changed.
        """
        policy = self._load(path)
        self.resident[label], self.active = policy, label
        return policy

    def get(self, label: str) -> Policy:
        """A resident policy.

        Raises:
            UserError: there is none of that label.
        """
        if label not in self.resident:
            there = ", ".join(sorted(self.resident)) or "none"
            raise UserError(f"no policy is loaded under the label '{label}'; loaded: {there}")
        return self.resident[label]

    def activate(self, label: str) -> Policy:
        """Make a resident policy active.

        Raises:
            UserError: there is none of that label.
        """
        policy = self.get(label)
        self.active = label
        return policy

    def clear(self) -> None:
        """Let go of all of them."""
        self.resident.clear()
        self.active = ""
