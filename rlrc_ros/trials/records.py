"""What is analysed of a trial: one record an episode, sorted into pairs."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from rlrc_ros.errors import UserError

OUTCOMES = ("success", "failure", "partial", "unlabelled")

_TEXTS = (
    "trial_id",
    "arm",
    "episode_id",
    "task",
    "instruction",
    "outcome",
    "termination_reason",
    "bag_uri",
    "message",
)
_NEVER_EMPTY = ("trial_id", "arm", "episode_id", "termination_reason")
_COUNTS = ("pair", "order", "seed", "steps", "deadline_misses", "skipped_steps")


@dataclass(frozen=True)
class EpisodeRecord:
    """What happened in one episode of a trial.

    Args:
        trial_id: the trial the episode belongs to.
        pair: which pair of episodes; both start from the same scene.
        order: 0 for the pair's first episode, 1 for its second, and so on with more arms.
        arm: the policy's role, "original" or "compressed" or any other label.
        episode_id: unique among all episodes.
        seed: the scene's seed.
        task: task family; empty where there is only one.
        instruction: what the policy was told.
        outcome: success, failure, partial or unlabelled; says nothing of how the episode ended.
        score: 0 to 100, for a partial outcome.
        termination_reason: how the episode ended: finished, timeout, operator_stop, guard_stop,
            client_lost, policy_error, observation_lost, node_deactivated.
        steps: control steps taken.
        duration_s: seconds from the first command to the last.
        latency_ms_p50: median over the episode of observation complete to command published, in
            milliseconds; None where there was nothing to measure (NaN and infinities become None).
        latency_ms_p99: its 99th percentile.
        deadline_misses: steps whose command came later than one control period.
        skipped_steps: steps not taken because an observation was missing or too old.
        guard: what the command guard did, counter by counter.
        bag_uri: the bag's directory relative to the trial's directory; empty when nothing was
            recorded.
        message: anything a person should read.
        sparc: smoothness of the end effector's path, `rlrc_ros.trials.smoothness.sparc`; None
            where there is no recording of it.

    Raises:
        UserError: a value of the wrong type or out of range, or a bag outside the trial's
            directory.

    """

    trial_id: str
    pair: int
    order: int
    arm: str
    episode_id: str
    seed: int
    task: str
    instruction: str
    outcome: str
    score: float | None
    termination_reason: str
    steps: int
    duration_s: float
    latency_ms_p50: float | None
    latency_ms_p99: float | None
    deadline_misses: int
    skipped_steps: int
    guard: Mapping[str, int]
    bag_uri: str
    message: str
    sparc: float | None = None

    def __post_init__(self) -> None:
        for name in ("latency_ms_p50", "latency_ms_p99"):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                object.__setattr__(self, name, None)
        _check(self)


@dataclass(frozen=True)
class Pairing:
    """The episodes of a trial, pair by pair.

    Every record is in exactly one of `complete`, `incomplete` and `repeated`.

    Args:
        complete: both arms' records by pair number, then by arm.
        incomplete: pairs of which only one arm has been run, with that record.
        repeated: records of a place in a pair that an earlier episode has already filled.
        mismatched: complete pairs whose episodes differ in seed, task or instruction.

    """

    complete: dict[int, dict[str, EpisodeRecord]]
    incomplete: dict[int, EpisodeRecord]
    repeated: tuple[EpisodeRecord, ...]
    mismatched: tuple[int, ...]


def pairs(records: Iterable[EpisodeRecord]) -> Pairing:
    """Sorts the records of one trial into pairs.

    The first episode run in a place counts and later ones are listed: choosing among attempts would
    bias the trial.

    Raises:
        UserError: records of more than one trial or of more than two arms.

    """
    records = list(records)
    for name, most in (("trial_id", 1), ("arm", 2)):
        found = sorted({getattr(record, name) for record in records})
        if len(found) > most:
            raise UserError(
                f"{len(found)} values of {name} ({', '.join(found)}): at most {most} allowed"
            )
    by_pair: dict[int, dict[str, EpisodeRecord]] = {}
    repeated = []
    for record in records:
        arms = by_pair.setdefault(record.pair, {})
        if arms.setdefault(record.arm, record) is not record:
            repeated.append(record)
    complete = {pair: arms for pair, arms in sorted(by_pair.items()) if len(arms) == 2}
    return Pairing(
        complete=complete,
        incomplete={
            pair: next(iter(arms.values()))
            for pair, arms in sorted(by_pair.items())
            if len(arms) == 1
        },
        repeated=tuple(repeated),
        mismatched=tuple(
            pair
            for pair, arms in complete.items()
            if len({(record.seed, record.task, record.instruction) for record in arms.values()}) > 1
        ),
    )


def _check(record: EpisodeRecord) -> None:
    for name in _TEXTS:
        value = getattr(record, name)
        if not isinstance(value, str) or not _is_unicode(value):
            raise UserError(f"{name} is {value!r}, not a string of Unicode text")
        if not value and name in _NEVER_EMPTY:
            raise UserError(f"{name} is empty")
    for name in _COUNTS:
        _check_count(name, getattr(record, name))
    if record.outcome not in OUTCOMES:
        raise UserError(f"outcome is {record.outcome!r}, not one of {', '.join(OUTCOMES)}")
    _check_number("duration_s", record.duration_s)
    for name in ("latency_ms_p50", "latency_ms_p99"):
        if getattr(record, name) is not None:
            _check_number(name, getattr(record, name))
    if record.score is not None:
        _check_number("score", record.score)
        if record.score > 100:
            raise UserError(f"score is {record.score}: it goes from 0 to 100")
    if not isinstance(record.guard, Mapping):
        raise UserError(f"guard is {record.guard!r}, not an object of counters")
    for name, value in record.guard.items():
        _check_count(f"guard.{name}", value)
    uri = PurePosixPath(record.bag_uri)
    if uri.is_absolute() or ".." in uri.parts or "\\" in record.bag_uri or "://" in record.bag_uri:
        raise UserError(f"bag_uri is {record.bag_uri!r}: it must stay inside the trial's directory")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{name} is {value!r}, not a whole number from 0 up")


def _check_number(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.float_info.max:
        raise UserError(f"{name} is {value!r}, not a finite number from 0 up")


def _is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8; JSON can smuggle in lone surrogates, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
