"""One episode's bag while it is being written.

What came is handed to the operating system twice a second, so that no more than that is lost when
this process is killed, and synced to the disk as often, in a thread of its own: a slow disk delays
the second, not the first.

`<id>.partial/` becomes `<id>/` when it is whole:

    <id>_0.mcap     the messages
    metadata.yaml   rosbag2's
    episode.json    rlrc_ros.rollouts.episode
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlrc_ros.errors import UserError
from rlrc_ros.rollouts.episode import (
    ClockJump,
    Episode,
    check_episode_id,
    now,
    software_versions,
    write_episode,
)
from rlrc_ros.rollouts.mcap_file import McapWriter
from rlrc_ros.rollouts.metadata import QOS_KEY, TYPE_HASH_KEY, write_metadata

PARTIAL = ".partial"
WRITE_INTERVAL = 0.5
"""How often what came is written, and how long after a sync the next one follows, in s."""
CLOCK_JUMP = 0.1
"""s by which the system clock has to leave the steady one between two writes to have jumped."""
CHUNK_SIZE = 8 << 20
"""Bytes after which a chunk is written without waiting for that."""
QUEUE_SIZE = 256 << 20
"""Bytes that may wait for the disk before messages are dropped: 4 s of two cameras at 30 Hz."""
RESERVE_SIZE = 4 << 20
"""Bytes kept free for the index, metadata and label of a bag that has filled the disk."""
START_METADATA, END_METADATA = "rlrc_episode", "rlrc_episode_end"
"""Names of the records in the MCAP file that say the same as episode.json, but for the labels."""
_KNOWN_AT_THE_START = (
    *("episode_id", "instruction", "policy_label", "bundle_hash", "start_time", "preroll"),
    *("robot_profile", "software", "metadata"),
)
_KNOWN_AT_THE_END = (
    *("stop_time", "termination_reason", "recording_error", "dropped_messages"),
    *("unrecorded_topics", "clock_jumps"),
)
_POLL = 0.05


class _Topic(NamedTuple):
    name: str
    type_name: str
    definition: str
    metadata: dict[str, str]


class _Message(NamedTuple):
    channel: int
    received: int
    sent: int
    data: bytes


class Recording:
    """Writes in a thread of its own; no method but `close` waits for the disk.

    All methods are called from one thread.
    """

    def __init__(self, output_dir: Path, episode: Episode) -> None:
        """Begin a bag.

        Args:
            output_dir: The bag becomes the directory `episode.episode_id` in it.
            episode: What is known of the episode so far; kept up to date.

        Raises:
            UserError: The id is unsafe or taken, or the disk is full or not writable.
        """
        episode_id = check_episode_id(episode.episode_id)
        self.episode = episode
        self.uri = output_dir.resolve() / episode_id
        """The bag's directory once it is closed."""
        self.failure = ""
        """Why nothing more is written, in one line; empty while all is well."""
        self.received: Counter[str] = Counter()
        """Messages so far by topic, the dropped ones among them."""
        self.dropped: Counter[str] = Counter()
        """Messages by topic that the disk was too slow for."""
        self.unrecorded: dict[str, str] = {}
        """Topics that should be in the bag and are not, and why; for the caller to fill."""
        self._directory = self.uri.with_name(episode_id + PARTIAL)
        self._topics: list[str] = []
        self._queue: deque[_Topic | _Message] = deque()
        # Each is written by one thread only, so that no message needs a lock.
        self._bytes_in = self._bytes_out = 0
        self._closing, self._written = threading.Event(), threading.Event()
        self._sync_error: OSError | None = None
        self._clock_offset = _clock_offset()
        episode.start_time = now()
        episode.software = software_versions()
        self._open()
        self._thread = threading.Thread(target=self._run, name="recording", daemon=True)
        self._syncing = threading.Thread(target=self._sync_until_written, name="sync", daemon=True)
        self._syncing.start()
        self._thread.start()

    def add_topic(
        self,
        name: str,
        type_name: str,
        definition: str,
        qos: Sequence[Mapping[str, Any]],
        type_hash: str,
    ) -> int:
        """Add a topic; returns the channel to write its messages to.

        Args:
            name: The topic's name.
            type_name: As in sensor_msgs/msg/Image.
            definition: What `message_definition` gives for it.
            qos: The publishers' QoS profiles, as rosbag2 writes them.
            type_hash: RIHS01 hash of the type.
        """
        metadata = {
            QOS_KEY: yaml.safe_dump([dict(profile) for profile in qos], sort_keys=False),
            TYPE_HASH_KEY: type_hash,
        }
        self._queue.append(_Topic(name, type_name, definition, metadata))
        self._topics.append(name)
        return len(self._topics)

    def write(self, channel: int, received: int, sent: int, data: bytes) -> None:
        """Take a message in; dropped and counted where too much waits for the disk.

        Args:
            channel: From `add_topic`.
            received: When it came, in ns since the epoch.
            sent: When it was published, in ns since the epoch.
            data: CDR.
        """
        if self.failure:
            return
        topic = self._topics[channel - 1]
        self.received[topic] += 1
        if self._bytes_in - self._bytes_out + len(data) > QUEUE_SIZE:
            self.dropped[topic] += 1
            return
        self._bytes_in += len(data)
        self._queue.append(_Message(channel, received, sent, data))

    def close(self, termination_reason: str) -> int:
        """Finish the bag; returns how many messages are in it. `failure` says what went wrong."""
        episode = self.episode
        if not self._closing.is_set():
            episode.termination_reason = termination_reason
            self._closing.set()
        self._thread.join()
        if self.failure and self.uri.is_dir():
            # The bag was finished when the disk was full, before the episode ended.
            try:
                write_episode(self.uri, episode)
            except OSError as error:
                self.failure += f"; how it ended could not be written: {error.strerror}"
        return sum(episode.message_counts.values())

    def _open(self) -> None:
        if self.uri.exists():
            raise UserError(f"{self.uri} exists already: choose another episode id")
        if self._directory.exists():
            raise UserError(
                f"{self._directory} was left by a recording that was cut off: choose another"
                f" episode id, or repair it with `rlrc bag repair {self._directory}`"
            )
        try:
            self._directory.mkdir(parents=True)
            with self._reserve.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_SIZE)
            write_episode(self._directory, self.episode)
            self._mcap = McapWriter(self._directory / f"{self.uri.name}_0.mcap")
            self._mcap.add_metadata(START_METADATA, _texts(self.episode, _KNOWN_AT_THE_START))
        except OSError as error:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise UserError(f"cannot record to {self._directory}: {error.strerror}") from None

    @property
    def _reserve(self) -> Path:
        return self._directory / "reserve"

    def _run(self) -> None:
        try:
            self._write_until_closed()
        except OSError as error:
            self.failure = f"recording ended early: {error.strerror}"
        except Exception as error:  # whatever it is, it must not end in silence
            self.failure = f"recording ended early: {type(error).__name__}: {error}"
        self._written.set()
        self._syncing.join()
        try:
            self._finish()
        except OSError as error:
            self.failure = (
                f"{self._directory} could not be finished: {error.strerror};"
                f" `rlrc bag repair {self._directory}` does once there is room"
            )

    def _write_until_closed(self) -> None:
        self._next_write = time.monotonic() + WRITE_INTERVAL
        closing = False
        while not closing:
            closing = self._closing.wait(_POLL)
            while self._queue:
                self._write(self._queue.popleft())
                self._write_out_if_due()
            self._write_out_if_due()
        self._mcap.write_chunk()

    def _write(self, item: _Topic | _Message) -> None:
        if isinstance(item, _Topic):
            self._mcap.add_channel(*item)
        else:
            self._mcap.write(*item)
            self._bytes_out += len(item.data)

    def _write_out_if_due(self) -> None:
        due = time.monotonic() >= self._next_write
        if due or self._mcap.pending >= CHUNK_SIZE:
            self._mcap.write_chunk()
        if due:
            if self._sync_error is not None:
                raise self._sync_error
            self._watch_clock()
            self._next_write = time.monotonic() + WRITE_INTERVAL

    def _sync_until_written(self) -> None:
        while not self._written.wait(WRITE_INTERVAL):
            try:
                self._mcap.sync()
            except OSError as error:
                self._sync_error = error
                return

    def _watch_clock(self) -> None:
        offset = _clock_offset()
        jump, self._clock_offset = offset - self._clock_offset, offset
        if abs(jump) > CLOCK_JUMP:
            self.episode.clock_jumps.append(ClockJump(time=now(), seconds=round(jump, 3)))

    def _finish(self) -> None:
        self._reserve.unlink(missing_ok=True)
        index, episode = self._mcap.index, self.episode
        episode.stop_time = now()
        episode.recording_error = self.failure
        episode.dropped_messages = dict(self.dropped)
        episode.unrecorded_topics = dict(self.unrecorded)
        self._mcap.close({END_METADATA: _texts(episode, _KNOWN_AT_THE_END)})
        episode.message_counts = {name: count for name, (_, count) in index.topics().items()}
        write_metadata(self._directory, {f"{self.uri.name}_0.mcap": index})
        write_episode(self._directory, episode)
        self._directory.rename(self.uri)
        descriptor = os.open(self.uri.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _clock_offset() -> float:
    return time.time() - time.monotonic()


def _texts(episode: Episode, names: Sequence[str]) -> dict[str, str]:
    """The fields that are not empty, those that are no text as JSON."""
    values = {name: value for name, value in asdict(episode).items() if name in names and value}
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in values.items()
    }
