"""episode.json: what an episode's bag does not say itself.

How an episode ended (`termination_reason`) and whether the task was done (`outcome`) are two
things. Every label is kept, so that a correction can be seen.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from rlrc_ros.errors import UserError
from rlrc_ros.files import write_atomically
from rlrc_ros.schema import from_dict, read_json

FILE = "episode.json"
OUTCOMES = ("success", "failure", "partial")
UNLABELLED = "unlabelled"
LONGEST_EPISODE = 3600.0
"""s."""
_EPISODE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Label:
    """Somebody's judgement of an episode."""

    time: str
    """ISO 8601, UTC."""
    outcome: str
    score: float | None = None
    notes: str = ""


@dataclass(frozen=True, kw_only=True)
class ClockJump:
    """The system clock against the steady one."""

    time: str
    """ISO 8601, UTC, by the clock after the jump."""
    seconds: float
    """Forward, or back where negative."""


@dataclass(kw_only=True)
class Episode:
    """One episode, as far as it is known."""

    episode_id: str
    instruction: str = ""
    policy_label: str = ""
    bundle_hash: str = ""
    start_time: str = ""
    """ISO 8601, UTC."""
    stop_time: str = ""
    """Empty while it is being recorded, and where the recorder was killed."""
    termination_reason: str = ""
    """How it ended; empty like `stop_time`."""
    outcome: str = UNLABELLED
    """success, failure, partial or unlabelled."""
    score: float | None = None
    """0 to 100 where the outcome is partial."""
    notes: str = ""
    labels: list[Label] = field(default_factory=list)
    """Every label so far, oldest first; the last one is what the fields above say."""
    message_counts: dict[str, int] = field(default_factory=dict)
    """By topic, what is in the bag."""
    dropped_messages: dict[str, int] = field(default_factory=dict)
    """By topic, what came faster than the disk could take."""
    unrecorded_topics: dict[str, str] = field(default_factory=dict)
    """Topics that should be in the bag and are not, and why."""
    recording_error: str = ""
    """Why the recording ended before the episode; empty where it did not."""
    preroll: float = 0.0
    """s before `start_time` that the bag may reach back to."""
    clock_jumps: list[ClockJump] = field(default_factory=list)
    """The messages' times of receipt are of a clock that somebody set meanwhile."""
    robot_profile: dict[str, Any] = field(default_factory=dict)
    """The profile of the robot (`rlrc_ros.profile`); empty where the recorder knew none."""
    software: dict[str, str] = field(default_factory=dict)
    """Versions of what recorded it."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever the caller wanted kept."""


def check_episode_id(episode_id: str) -> str:
    """An id that is safe as a directory's name.

    Raises:
        UserError: It is not.
    """
    if not _EPISODE_ID.fullmatch(episode_id) or episode_id.endswith((".partial", ".repairing")):
        raise UserError(
            f"episode id {episode_id!r}: use 1 to 100 letters, digits, '.', '_' and '-', beginning"
            " with a letter or digit, and not ending in .partial"
        )
    return episode_id


def read_episode(directory: Path) -> Episode:
    """The episode of a bag's directory.

    Raises:
        UserError: There is no episode.json, or it is not one.
    """
    path = directory / FILE
    return from_dict(Episode, read_json(path), str(path))


def write_episode(directory: Path, episode: Episode) -> None:
    """Write episode.json so that a reader finds the old one or the new one, never half of one."""
    text = json.dumps(asdict(episode), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(directory / FILE, text + "\n")


def label(directory: Path, outcome: str, score: float | None = None, notes: str = "") -> Episode:
    """Write down whether the task was done; a correction keeps what was said before.

    Args:
        directory: The bag's directory.
        outcome: success, failure or partial.
        score: 0 to 100 where it is partial; ignored otherwise.
        notes: Anything.

    Raises:
        UserError: The directory is no episode's, or outcome or score make no sense.
    """
    if outcome not in OUTCOMES:
        raise UserError(f"outcome {outcome!r} is none of {', '.join(OUTCOMES)}")
    if outcome != "partial":
        score = None
    elif score is None or not (math.isfinite(score) and 0.0 <= score <= 100.0):
        raise UserError(f"score {score} of a partial success is not between 0 and 100")
    episode = read_episode(directory)
    episode.labels.append(Label(time=now(), outcome=outcome, score=score, notes=notes))
    episode.outcome, episode.score, episode.notes = outcome, score, notes
    write_episode(directory, episode)
    return episode


def now() -> str:
    """The time in ISO 8601, UTC, to the microsecond."""
    return iso_time(datetime.now(timezone.utc).timestamp())


def iso_time(seconds: float) -> str:
    """Seconds since the epoch in ISO 8601, UTC, to the microsecond."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="microseconds")


def software_versions() -> dict[str, str]:
    """What is running here."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for variable in ("ROS_DISTRO", "RMW_IMPLEMENTATION"):
        versions[variable.lower()] = os.environ.get(variable, "")
    for package in ("rlrc-ros", "ros-rclpy", "torch", "transformers", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = ""
    return versions
