"""MCAP files that survive their writer (https://mcap.dev/spec).

An MCAP file is a sequence of records; an index of all of them follows at the end. The writers of
`mcap` and `rosbags` lose their place where a write fails, and that of `rosbags` cannot be told to
write out what it has. This one can, knows after every failure where the last whole record ends, and
appends the index there. `scan` gets the same index out of a file whose writer was killed. Schemas
and channels stand before the chunks, messages in uncompressed chunks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import zlib
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rlrc_ros.errors import UserError

MAGIC = b"\x89MCAP0\r\n"
_HEADER, _FOOTER, _SCHEMA, _CHANNEL, _MESSAGE, _CHUNK = 0x01, 0x02, 0x03, 0x04, 0x05, 0x06
_MESSAGE_INDEX, _CHUNK_INDEX, _STATISTICS, _METADATA, _METADATA_INDEX = 0x07, 0x08, 0x0B, 0x0C, 0x0D
_SUMMARY_OFFSET, _DATA_END = 0x0E, 0x0F
# opcode and length of a record; what a message record holds before its data
_PREFIX = struct.Struct("<BQ")
_MESSAGE_HEAD = struct.Struct("<HIQQ")
_PIECES = 512
"""That one call writes; the system's limit is 1,024."""
_CHUNK_HEAD = struct.Struct("<QQQI")


class Channel(NamedTuple):
    """A topic in a file."""

    topic: str
    type_name: str
    """As in sensor_msgs/msg/Image."""
    metadata: dict[str, str]


@dataclass
class Chunk:
    """Where a chunk lies in its file, and what is in it."""

    start_time: int
    end_time: int
    offset: int
    length: int
    compression: str
    stored: int
    size: int
    entries: dict[int, list[tuple[int, int]]]
    """channel: (log time in ns, offset in the chunk) of its messages. A writer forgets them when
    they are written: in hours they would fill its memory."""
    counts: dict[int, int]
    """channel: how many messages of it there are."""
    index_offsets: dict[int, int] = field(default_factory=dict)
    index_length: int = 0


@dataclass
class Index:
    """All that a file's index says; grows with the file."""

    schemas: dict[int, bytes] = field(default_factory=dict)
    """Contents of the records."""
    channel_records: dict[int, bytes] = field(default_factory=dict)
    channels: dict[int, Channel] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)
    loose: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """channel: log times of messages outside chunks, which this project's files do not have."""
    metadata: list[tuple[int, int, str]] = field(default_factory=list)
    """Offset, length and name of the records with facts about the file."""

    def times(self, channel: int) -> list[int]:
        """Log times of a channel's messages in ns, in file order."""
        chunked = [time for chunk in self.chunks for time, _ in chunk.entries.get(channel, ())]
        return chunked + self.loose.get(channel, [])

    @property
    def counts(self) -> dict[int, int]:
        """Messages by channel."""
        counts = {channel: len(self.loose.get(channel, ())) for channel in self.channels}
        for chunk in self.chunks:
            for channel, count in chunk.counts.items():
                counts[channel] += count
        return counts

    @property
    def span(self) -> tuple[int, int]:
        """First and last log time in ns; zeros where there is no message."""
        times = [t for chunk in self.chunks for t in (chunk.start_time, chunk.end_time)]
        times += [t for loose in self.loose.values() for t in loose]
        return (min(times), max(times)) if times else (0, 0)

    def topics(self) -> dict[str, tuple[Channel, int]]:
        """The channel and the number of messages of every topic."""
        counts = self.counts
        topics: dict[str, tuple[Channel, int]] = {}
        for channel_id, channel in self.channels.items():
            before = topics[channel.topic][1] if channel.topic in topics else 0
            topics[channel.topic] = (channel, before + counts[channel_id])
        return topics

    def tail(self, offset: int) -> bytes:
        """Everything that follows the data of a file, when that ends at `offset`."""
        counts, (start, end) = self.counts, self.span
        statistics = struct.pack(
            "<QHIIIIQQ", sum(counts.values()), len(self.schemas), len(self.channels), 0,
            len(self.metadata), len(self.chunks), start, end,
        ) + _map(counts)  # fmt: skip
        groups = [
            (_SCHEMA, [_record(_SCHEMA, body) for body in self.schemas.values()]),
            (_CHANNEL, [_record(_CHANNEL, body) for body in self.channel_records.values()]),
            (_STATISTICS, [_record(_STATISTICS, statistics)]),
            (_CHUNK_INDEX, [_record(_CHUNK_INDEX, _chunk_index(chunk)) for chunk in self.chunks]),
            (
                _METADATA_INDEX,
                [
                    _record(_METADATA_INDEX, struct.pack("<QQ", where, length) + _string(name))
                    for where, length, name in self.metadata
                ],
            ),
        ]
        data_end = _record(_DATA_END, struct.pack("<I", 0))
        summary_start = offset + len(data_end)
        summary, offsets = b"", b""
        for opcode, records in groups:
            group = b"".join(records)
            if group:
                where = struct.pack("<BQQ", opcode, summary_start + len(summary), len(group))
                offsets += _record(_SUMMARY_OFFSET, where)
                summary += group
        footer = struct.pack("<QQ", summary_start, summary_start + len(summary))
        summary += offsets
        checksum = zlib.crc32(summary + _PREFIX.pack(_FOOTER, len(footer) + 4) + footer)
        return data_end + summary + _record(_FOOTER, footer + struct.pack("<I", checksum)) + MAGIC


class McapWriter:
    """Appends to a new file, which stays locked (flock) until it is closed."""

    def __init__(self, path: Path) -> None:
        self.index = Index()
        self._file = path.open("xb", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._end = 0
        """Where the last whole record ends."""
        self._schema_ids: dict[str, int] = {}
        self._reset_chunk()
        self._append(MAGIC + _record(_HEADER, _string("ros2") + _string("rlrc")))

    def add_channel(
        self, topic: str, type_name: str, definition: str, metadata: Mapping[str, str]
    ) -> int:
        """Add a topic; returns its channel.

        Args:
            topic: Its name.
            type_name: As in sensor_msgs/msg/Image.
            definition: ros2msg text of the type and of all that it is made of.
            metadata: rosbag2's keys: offered_qos_profiles (YAML), topic_type_hash.
        """
        schema = self._schema_ids.get(type_name)
        if schema is None:
            schema = len(self._schema_ids) + 1
            body = struct.pack("<H", schema) + _string(type_name) + _string("ros2msg")
            self._append(_record(_SCHEMA, body + _string(definition)))
            self.index.schemas[schema] = body + _string(definition)
            self._schema_ids[type_name] = schema
        channel = len(self.index.channels) + 1
        body = struct.pack("<HH", channel, schema) + _string(topic) + _string("cdr")
        body += _strings(metadata)
        self._append(_record(_CHANNEL, body))
        self.index.channel_records[channel] = body
        self.index.channels[channel] = Channel(topic, type_name, dict(metadata))
        return channel

    def add_metadata(self, name: str, values: Mapping[str, str]) -> None:
        """Add facts about the file, which Foxglove and `mcap get metadata` show."""
        record = _record(_METADATA, _string(name) + _strings(values))
        where = self._end
        self._append(record)
        self.index.metadata.append((where, len(record), name))

    def write(self, channel: int, log_time: int, publish_time: int, data: bytes) -> None:
        """Add a message to the chunk in memory; times in ns since the epoch."""
        head = _MESSAGE_HEAD.pack(channel, 0, log_time, publish_time)
        self._entries[channel].append((log_time, self.pending))
        self._pieces += (_PREFIX.pack(_MESSAGE, len(head) + len(data)) + head, data)
        self.pending += _PREFIX.size + len(head) + len(data)

    def write_chunk(self) -> None:
        """Hand the chunk in memory to the operating system; raises OSError where that fails."""
        if not self._entries:
            return
        times = [time for entries in self._entries.values() for time, _ in entries]
        checksum = 0
        for piece in self._pieces:
            checksum = zlib.crc32(piece, checksum)
        head = _CHUNK_HEAD.pack(min(times), max(times), self.pending, checksum) + _string("")
        head += struct.pack("<Q", self.pending)
        prefix = _PREFIX.pack(_CHUNK, len(head) + self.pending) + head
        length = len(prefix) + self.pending
        chunk = Chunk(
            min(times), max(times), self._end, length, "", self.pending, self.pending,
            dict(self._entries), _lengths(self._entries),
        )  # fmt: skip
        index = _message_indexes(chunk)
        self._append(prefix, *self._pieces, index)
        chunk.entries = {}
        self.index.chunks.append(chunk)
        self._reset_chunk()

    def sync(self) -> None:
        """Have what was written reach the disk, and then leave the system's memory.

        It will not be read soon, and a bag of minutes would push out what other processes need.
        """
        end = self._end
        os.fsync(self._file)
        os.posix_fadvise(self._file.fileno(), 0, end, os.POSIX_FADV_DONTNEED)

    def close(self, metadata: Mapping[str, Mapping[str, str]] | None = None) -> None:
        """Write the index after the last whole record, whatever failed before, and close.

        Args:
            metadata: Last facts about the file, by name.
        """
        try:
            self._file.truncate(self._end)
            for name, values in (metadata or {}).items():
                self.add_metadata(name, values)
            self._append(self.index.tail(self._end))
            self.sync()
        finally:
            self._file.close()

    def _append(self, *pieces: bytes) -> None:
        """Write them from where they lie: a copy of all would be megabytes in one piece."""
        self._file.seek(self._end)
        left = deque(memoryview(piece) for piece in pieces if piece)
        total = sum(map(len, left))
        while left:
            written = os.writev(self._file.fileno(), list(islice(left, _PIECES)))
            while left and written >= len(left[0]):
                written -= len(left.popleft())
            if written:
                left[0] = left[0][written:]
        self._end += total

    def _reset_chunk(self) -> None:
        self._pieces: list[bytes] = []
        self._entries: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.pending = 0
        """Bytes in the chunk in memory."""


@dataclass(frozen=True)
class Scan:
    """What a file holds, whole or not."""

    index: Index
    end: int
    """Where the last whole record of the data ends."""
    appendix: bytes
    """What the data lacks there: the message indexes of its last chunk, usually nothing."""
    problem: str
    """Why the file is not whole, in a few words; empty where it is."""


def scan(path: Path) -> Scan:
    """Read a file through, checking every chunk's checksum, up to its end or to the first damage.

    Raises:
        UserError: It is no MCAP file at all, or compressed in a way that is not known.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{path} is not an MCAP file")
        index = Index()
        offset, problem = len(MAGIC), ""
        for opcode, start, body in _records(file, size):
            if opcode == _DATA_END:
                problem = "" if _is_finished(file, size) else "its index is cut off"
                break
            problem = _take_in(index, opcode, start, body)
            if problem:
                break
            offset = start + _PREFIX.size + len(body)
        else:
            problem = "it ends before its index"
    last = index.chunks[-1] if index.chunks else None
    appendix = b""
    if last is not None and set(last.index_offsets) != set(last.entries):
        # Cut off between a chunk and its message indexes: they are written anew.
        offset = last.offset + last.length
        appendix = _message_indexes(last)
    return Scan(index, offset, appendix, problem)


def _records(file: BinaryIO, size: int) -> Iterator[tuple[int, int, bytes]]:
    """Opcode, offset and content of every whole record."""
    offset = file.tell()
    while len(prefix := file.read(_PREFIX.size)) == _PREFIX.size:
        opcode, length = _PREFIX.unpack(prefix)
        if offset + _PREFIX.size + length > size:
            return
        yield opcode, offset, file.read(length)
        offset += _PREFIX.size + length


def _is_finished(file: BinaryIO, size: int) -> bool:
    """Whether a footer and the magic bytes end the file, which has been read up to its summary."""
    return any(
        opcode == _FOOTER and start + _PREFIX.size + len(body) + len(MAGIC) == size
        for opcode, start, body in _records(file, size)
    ) and _ends_with_magic(file, size)


def _ends_with_magic(file: BinaryIO, size: int) -> bool:
    file.seek(size - len(MAGIC))
    return file.read() == MAGIC


def _take_in(index: Index, opcode: int, start: int, body: bytes) -> str:
    """Add a record to the index; returns what is wrong with it."""
    try:
        if opcode == 0:  # blocks of zeros, which a power cut leaves behind
            return f"the record at byte {start} is damaged"
        if opcode == _SCHEMA:
            index.schemas[struct.unpack_from("<H", body)[0]] = body
        elif opcode == _CHANNEL:
            _take_channel(index, body)
        elif opcode == _METADATA:
            name, _ = _read_string(body, 0)
            index.metadata.append((start, _PREFIX.size + len(body), name))
        elif opcode == _MESSAGE:
            channel, _, time, _ = _MESSAGE_HEAD.unpack_from(body)
            index.loose[channel].append(time)
        elif opcode == _CHUNK:
            index.chunks.append(_read_chunk(index, start, body))
        elif opcode == _MESSAGE_INDEX and index.chunks:
            last = index.chunks[-1]
            last.index_offsets[struct.unpack_from("<H", body)[0]] = start
            last.index_length = start + _PREFIX.size + len(body) - last.offset - last.length
    except (struct.error, KeyError, UnicodeDecodeError, zlib.error):
        return f"the record at byte {start} is damaged"
    except _Damaged as damage:
        return str(damage)
    return ""


class _Damaged(Exception):
    """A chunk's checksum or size does not fit."""


def _take_channel(index: Index, body: bytes) -> None:
    channel, schema = struct.unpack_from("<HH", body)
    topic, at = _read_string(body, 4)
    _, at = _read_string(body, at)
    end = at + 4 + struct.unpack_from("<I", body, at)[0]
    metadata, at = {}, at + 4
    while at < end:
        key, at = _read_string(body, at)
        metadata[key], at = _read_string(body, at)
    type_name, _ = _read_string(index.schemas[schema], 2)
    index.channel_records[channel] = body
    index.channels[channel] = Channel(topic, type_name, metadata)


def _read_chunk(index: Index, start: int, body: bytes) -> Chunk:
    start_time, end_time, size, checksum = _CHUNK_HEAD.unpack_from(body)
    compression, at = _read_string(body, _CHUNK_HEAD.size)
    (stored,) = struct.unpack_from("<Q", body, at)
    records = _decompress(compression, body[at + 8 : at + 8 + stored])
    if len(records) != size or (checksum and zlib.crc32(records) != checksum):
        raise _Damaged(f"the chunk at byte {start} is damaged")
    entries: dict[int, list[tuple[int, int]]] = defaultdict(list)
    at = 0
    while at < size:
        opcode, length = _PREFIX.unpack_from(records, at)
        if opcode == _MESSAGE:
            channel, _, time, _ = _MESSAGE_HEAD.unpack_from(records, at + _PREFIX.size)
            entries[channel].append((time, at))
        elif opcode in (_SCHEMA, _CHANNEL):
            inner = records[at + _PREFIX.size : at + _PREFIX.size + length]
            _take_in(index, opcode, start, inner)
        at += _PREFIX.size + length
    return Chunk(
        start_time, end_time, start, _PREFIX.size + len(body), compression, stored, size,
        dict(entries), _lengths(entries),
    )  # fmt: skip


def _lengths(entries: Mapping[int, list[tuple[int, int]]]) -> dict[int, int]:
    return {channel: len(times) for channel, times in entries.items()}


def _decompress(compression: str, data: bytes) -> bytes:
    """What a chunk of another writer holds; rosbags brings both libraries along."""
    if compression == "lz4":
        import lz4.frame

        return lz4.frame.decompress(data)
    if compression == "zstd":
        with contextlib.suppress(ImportError):
            from compression import zstd  # Python 3.14

            return zstd.decompress(data)
        from backports import zstd

        return zstd.decompress(data)
    if compression:
        raise UserError(f"chunks are compressed with {compression!r}; known: lz4, zstd")
    return data


def _message_indexes(chunk: Chunk) -> bytes:
    """The message index records that follow a chunk; notes in the chunk where they will lie."""
    at, records = chunk.offset + chunk.length, b""
    for channel, entries in chunk.entries.items():
        chunk.index_offsets[channel] = at + len(records)
        body = struct.pack("<H", channel)
        body += _sized(b"".join(struct.pack("<QQ", *entry) for entry in entries))
        records += _record(_MESSAGE_INDEX, body)
    chunk.index_length = len(records)
    return records


def _chunk_index(chunk: Chunk) -> bytes:
    return (
        struct.pack("<QQQQ", chunk.start_time, chunk.end_time, chunk.offset, chunk.length)
        + _map(chunk.index_offsets)
        + struct.pack("<Q", chunk.index_length)
        + _string(chunk.compression)
        + struct.pack("<QQ", chunk.stored, chunk.size)
    )


def _record(opcode: int, body: bytes) -> bytes:
    return _PREFIX.pack(opcode, len(body)) + body


def _sized(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def _string(text: str) -> bytes:
    return _sized(text.encode())


def _strings(pairs: Mapping[str, str]) -> bytes:
    return _sized(b"".join(_string(key) + _string(value) for key, value in pairs.items()))


def _map(numbers: Mapping[int, int]) -> bytes:
    return _sized(b"".join(struct.pack("<HQ", key, value) for key, value in numbers.items()))


def _read_string(data: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<I", data, at)
    text = data[at + 4 : at + 4 + length]
    if len(text) != length:
        raise struct.error("string past the end of its record")
    return text.decode(), at + 4 + length
