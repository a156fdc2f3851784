"""Is a bag whole, does it say the same everywhere, and what is in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rlrc_ros.errors import UserError
from rlrc_ros.profile import RobotProfile
from rlrc_ros.rollouts import episode as episodes
from rlrc_ros.rollouts import metadata
from rlrc_ros.rollouts.bag import open_bag
from rlrc_ros.rollouts.mcap_file import Index, scan
from rlrc_ros.rollouts.profile_topics import profile_topics
from rlrc_ros.rollouts.recording import PARTIAL
from rlrc_ros.schema import read_yaml

GAP_FACTOR = 2.5
"""An interval longer than this many median intervals of its topic is a gap."""
_FEWEST = 10
"""Messages below which a topic has no rate that could have gaps."""


@dataclass(frozen=True, kw_only=True)
class TopicReport:
    """A topic's messages by the times they were received at."""

    topic: str
    type: str
    messages: int
    rate: float
    """Hz, over the time from its first to its last message; 0 below two messages."""
    longest_interval: float
    """s."""
    gaps: int
    """Intervals longer than `GAP_FACTOR` median intervals; 0 below ten messages."""
    silence_at_end: float
    """s from its last message to the last one of the bag."""


@dataclass(frozen=True, kw_only=True)
class BagReport:
    """What `verify` found."""

    uri: str
    ok: bool
    problems: list[str]
    """What is wrong with the bag, one line each."""
    losses: list[str]
    """What happened and is not in the bag, though the bag be whole; one line each."""
    messages: int
    duration: float
    """s."""
    bytes: int
    topics: list[TopicReport]
    episode: episodes.Episode | None
    """None where there is no episode.json, as in bags of other recorders."""


def verify(uri: str | Path, profile: RobotProfile | None = None) -> BagReport:
    """Read a bag through, checksums included.

    Args:
        uri: The bag's directory, or one MCAP file.
        profile: The robot's; what it names and the bag lacks is a problem too.

    Raises:
        UserError: There is no such bag at all.
    """
    path = Path(uri)
    if path.is_dir() and (path / metadata.FILE).exists() and not list(path.glob("*.mcap")):
        report = _verify_by_reading(path)
    else:
        report = _verify_mcap(path)
    if profile is not None:
        problems = report.problems + differences_to_profile(profile, report)
        report = replace(report, problems=problems, ok=not problems)
    return report


def _verify_by_reading(directory: Path) -> BagReport:
    """A bag of another recorder in another format: whatever rosbags can read of it."""
    times: dict[str, list[int]] = defaultdict(list)
    types: dict[str, str] = {}
    problems = []
    try:
        with open_bag(directory) as reader:
            types = {connection.topic: connection.msgtype for connection in reader.connections}
            for connection, stamp, _ in reader.messages():
                times[connection.topic].append(stamp)
    # rosbags lets through whatever sqlite3 and the decompressors raise
    except Exception as error:
        problems.append(f"it cannot be read to its end: {' '.join(str(error).split())}")
    counts = {topic: len(times[topic]) for topic in types}
    if not problems:
        problems = _unreadable(directory) + _differences_to_metadata(directory, counts)
    received = [stamp for stamps in times.values() for stamp in stamps]
    end = max(received, default=0)
    return BagReport(
        uri=str(directory),
        ok=not problems,
        problems=problems,
        losses=[],
        messages=len(received),
        duration=(end - min(received, default=0)) * 1e-9,
        bytes=sum(file.stat().st_size for file in directory.iterdir() if file.is_file()),
        topics=_topics(types, times, end),
        episode=None,
    )


def _verify_mcap(directory: Path) -> BagReport:
    files = [directory] if directory.is_file() else mcap_files(directory)
    problems: list[str] = []
    indexes: dict[str, Index] = {}
    for file in files:
        found = scan(file)
        indexes[file.name] = found.index
        if found.problem:
            whole = sum(found.index.counts.values())
            problem = f"{file.name} is truncated or damaged: {found.problem};"
            problems.append(_to_repair(directory, f"{problem} {whole} messages are whole"))
    if directory.name.endswith(PARTIAL) and not problems:
        problems.append(_to_repair(directory, "its recording was cut off or is still going on"))
    counts = _counts(indexes)
    episode = None
    if (directory / episodes.FILE).exists():
        try:
            episode = episodes.read_episode(directory)
        except UserError as error:
            problems.append(str(error))
    if not problems:
        problems += _unreadable(directory)
        if directory.is_dir():
            problems += _differences_to_metadata(directory, counts)
        problems += _differences_to_episode(directory, episode, counts) if episode else []
    spans = [index.span for index in indexes.values() if index.span != (0, 0)]
    end = max((span[1] for span in spans), default=0)
    return BagReport(
        uri=str(directory),
        ok=not problems,
        problems=problems,
        losses=_losses(episode) if episode else [],
        messages=sum(counts.values()),
        duration=(end - min((span[0] for span in spans), default=0)) * 1e-9,
        bytes=sum(file.stat().st_size for file in files),
        topics=_topics(*_types_and_times(indexes), end),
        episode=episode,
    )


def mcap_files(directory: Path) -> list[Path]:
    """The MCAP files of a bag's directory, in the order of their names' numbers.

    Raises:
        UserError: It is no directory, or has none.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: there is no such bag directory")
    files = sorted(directory.glob("*.mcap"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise UserError(f"{directory} is not a bag: it has no .mcap file")
    return files


def differences_to_profile(profile: RobotProfile, report: BagReport) -> list[str]:
    """What a robot's profile names and its bag lacks, one line each.

    Topics that the profile names relatively are looked for in the root namespace.

    A source that was silent for longer than its `max_age` is one: a policy could not act then.
    """
    topics = {topic.topic: topic for topic in report.topics}
    problems = []
    for expected in profile_topics(profile):
        name = "/" + expected.topic.lstrip("/")
        topic = topics.get(name)
        if topic is None or not topic.messages:
            problems.append(f"{name} ({expected.role} of the profile) is not in the bag")
            continue
        if expected.type and topic.type != expected.type:
            problems.append(
                f"{name} is a {topic.type}; the profile's {expected.role} is a {expected.type}"
            )
        if expected.min_rate is not None and topic.rate < expected.min_rate:
            problems.append(
                f"{name} came at {topic.rate:.1f} Hz; the min_rate of the profile's"
                f" {expected.role} is {expected.min_rate:g} Hz"
            )
        silence = max(topic.longest_interval, topic.silence_at_end)
        if expected.max_age is not None and silence > expected.max_age:
            problems.append(
                f"{name} was silent for up to {silence:.3f} s, {topic.rate:.1f} Hz all in"
                f" all; the max_age of the profile's {expected.role} is {expected.max_age:g} s"
            )
    return problems


def _to_repair(directory: Path, problem: str) -> str:
    return f"{problem}: `rlrc bag repair {directory}`"


def _counts(indexes: dict[str, Index]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for index in indexes.values():
        for topic, (_, count) in index.topics().items():
            counts[topic] += count
    return dict(counts)


def _unreadable(directory: Path) -> list[str]:
    """Topics whose first message does not deserialise with the definition in the bag."""
    problems = []
    try:
        with open_bag(directory) as reader:
            for connection in reader.connections:
                try:
                    for _, _, data in reader.messages([connection]):
                        reader.deserialize(data, connection.msgtype)
                        break
                # rosbags lets through whatever its generated code raises
                except Exception as error:
                    problems.append(f"{connection.topic} ({connection.msgtype}): {error}")
    except UserError as error:
        problems.append(str(error))
    return problems


def _differences_to_metadata(directory: Path, counts: dict[str, int]) -> list[str]:
    try:
        information = read_yaml(directory / metadata.FILE)["rosbag2_bagfile_information"]
        says: dict[str, int] = defaultdict(int)
        for topic in information["topics_with_message_count"]:
            says[topic["topic_metadata"]["name"]] += topic["message_count"]
    except (UserError, KeyError, TypeError) as error:
        return [f"{metadata.FILE} cannot be used: {error}"]
    return _differences(metadata.FILE, says, counts)


def _differences_to_episode(
    directory: Path, episode: episodes.Episode, counts: dict[str, int]
) -> list[str]:
    problems = _differences(episodes.FILE, episode.message_counts, counts)
    if episode.episode_id != directory.resolve().name:
        problems.append(f"{episodes.FILE} is of another episode: {episode.episode_id}")
    return problems


def _losses(episode: episodes.Episode) -> list[str]:
    losses = [episode.recording_error] if episode.recording_error else []
    for topic, dropped in episode.dropped_messages.items():
        losses.append(f"{topic}: {dropped} messages were dropped, the disk was too slow")
    for topic, why in episode.unrecorded_topics.items():
        losses.append(f"{topic} was not recorded: {why}")
    for jump in episode.clock_jumps:
        losses.append(f"the clock jumped by {jump.seconds:+g} s, to {jump.time}: times are off")
    return losses


def _differences(file: str, says: dict[str, int], counts: dict[str, int]) -> list[str]:
    return [
        f"{file} says {says.get(topic, 0)} messages of {topic}, there are {counts.get(topic, 0)}"
        for topic in sorted({*says, *counts})
        if says.get(topic, 0) != counts.get(topic, 0)
    ]


def _types_and_times(
    indexes: Mapping[str, Index],
) -> tuple[dict[str, str], dict[str, list[int]]]:
    times: dict[str, list[int]] = defaultdict(list)
    types: dict[str, str] = {}
    for index in indexes.values():
        for channel_id, channel in index.channels.items():
            types[channel.topic] = channel.type_name
            times[channel.topic] += index.times(channel_id)
    return types, times


def _topics(
    types: Mapping[str, str], times: Mapping[str, list[int]], end: int
) -> list[TopicReport]:
    """Of each topic, given the times of receipt in ns, and when the bag ends."""
    return [
        _topic(topic, types[topic], np.array(times.get(topic, ()), np.int64), end)
        for topic in sorted(types)
    ]


def _topic(topic: str, type_name: str, times: np.ndarray, end: int) -> TopicReport:
    times = np.sort(times)
    intervals = np.diff(times) * 1e-9
    span = float(intervals.sum())
    enough = len(times) >= _FEWEST
    return TopicReport(
        topic=topic,
        type=type_name,
        messages=len(times),
        rate=len(intervals) / span if span else 0.0,
        longest_interval=float(intervals.max(initial=0.0)),
        gaps=int((intervals > GAP_FACTOR * np.median(intervals)).sum()) if enough else 0,
        silence_at_end=(end - int(times[-1])) * 1e-9 if len(times) else 0.0,
    )
