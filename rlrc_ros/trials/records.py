"""One line of JSON for every episode of a trial, in a log that only ever grows."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
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

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpisodeRecord:
    """What happened in one episode of a trial.

    Args:
        trial_id: the trial the episode belongs to.
        pair: which pair of episodes; both start from the same scene.
        order: 0 for the pair's first episode, 1 for its second.
        arm: the policy's role, "original" or "compressed" or any other label.
        episode_id: unique among all episodes.
        seed: the scene's seed.
        task: task family; empty where there is only one.
        instruction: what the policy was told.
        outcome: success, failure, partial or unlabelled; says nothing of how the episode ended.
        score: 0 to 100, for a partial outcome.
        termination_reason: how the episode ended: finished, timeout, operator_stop, guard_stop,
            policy_error, observation_lost, node_deactivated.
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

    def __post_init__(self) -> None:
        for name in ("latency_ms_p50", "latency_ms_p99"):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                object.__setattr__(self, name, None)
        _check(self)

    def to_json(self) -> str:
        """One line of JSON, without the line's end."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({**values, "guard": dict(self.guard)}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> EpisodeRecord:
        """The record of one line.

        Raises:
            UserError: the line is not a JSON object with exactly this class's fields and valid
                values.

        """
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise UserError("not a JSON object")
        names = {field.name for field in dataclasses.fields(cls)}
        if missing := sorted(names - values.keys()):
            raise UserError(f"{', '.join(missing)} missing")
        if unknown := sorted(values.keys() - names):
            raise UserError(f"unknown field {', '.join(map(repr, unknown))}")
        return cls(**values)


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


def append(path: str | Path, record: EpisodeRecord) -> None:
    """Adds a record to the log and returns when it is on the disk.

    What a crash left of an unfinished last line is cut off first: the new record would become part
    of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    created = not path.exists()
    with path.open("x+b" if created else "r+b") as file:
        content = file.read()
        complete = content.rfind(b"\n") + 1
        line = record.to_json().encode() + b"\n"
        if tail := content[complete:]:
            if _is_torn(tail):
                file.truncate(complete)
            else:
                line = b"\n" + line
        file.seek(0, os.SEEK_END)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if created:
        # Without this a power cut can lose the new file's name though its content is on the disk.
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def read(path: str | Path) -> list[EpisodeRecord]:
    """Every episode of a log, in the order in which they were first written down.

    A later line with an episode's id replaces the earlier one: that is how an outcome is labelled
    or corrected. A last line that a crash cut short is left out, with a logged warning.

    Raises:
        UserError: the file cannot be read, or a line is malformed; names the file and the line.

    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    tail = lines.pop()
    if tail and _is_torn(tail):
        _log.warning(
            "%s:%d: the last line was cut short, probably by a crash; it is left out",
            path,
            len(lines) + 1,
        )
    elif tail:
        lines.append(tail)
    records: dict[str, EpisodeRecord] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = EpisodeRecord.from_json(line)
            earlier = records.get(record.episode_id, record)
            if (place := _place(record)) != _place(earlier):
                raise UserError(
                    f"episode {record.episode_id} is already {_place(earlier)}, not {place}"
                )
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}; mend or remove that line") from None
        records[record.episode_id] = record
    return list(records.values())


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


def _place(record: EpisodeRecord) -> str:
    return f"trial {record.trial_id}, pair {record.pair}, arm {record.arm}"


def _is_torn(line: bytes) -> bool:
    """Whether a line without its end was cut short: no beginning of a JSON object is JSON."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _check(record: EpisodeRecord) -> None:
    for name in _TEXTS:
        value = getattr(record, name)
        if not isinstance(value, str) or not _is_unicode(value):
            raise UserError(f"{name} is {value!r}, not a string of Unicode text")
        if not value and name in _NEVER_EMPTY:
            raise UserError(f"{name} is empty")
    for name in _COUNTS:
        _check_count(name, getattr(record, name))
    if record.order > 1:
        raise UserError(f"order is {record.order}: it is 0 or 1, the position inside the pair")
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
