"""Reading bags, with the message definitions that they carry; no ROS has to be installed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.rosbag2 import ReaderError

from rlrc_ros.errors import UserError


@contextmanager
def open_bag(uri: str | Path) -> Iterator[AnyReader]:
    """A rosbags reader on a bag's directory or on one MCAP file.

    Raises:
        UserError: There is no such bag, or it cannot be read, also later while it is being read.
    """
    path = Path(uri)
    if not path.exists():
        raise UserError(f"{path}: there is no such bag")
    try:
        with AnyReader([path]) as reader:
            yield reader
    except FileNotFoundError:
        raise UserError(f"{path} is not a bag: it has no metadata.yaml{_advice(path)}") from None
    except (AnyReaderError, ReaderError) as error:
        raise UserError(f"{path} cannot be read: {error}{_advice(path)}") from None


def _advice(path: Path) -> str:
    return f"; look at `rlrc bag verify {path}`"


def read_messages(
    uri: str | Path, topics: Collection[str] | None = None
) -> Iterator[tuple[str, Any, int]]:
    """Every message of a bag in the order they came.

    Args:
        uri: The bag's directory, or one MCAP file.
        topics: Only these; None: all.

    Yields:
        Topic, message (as rosbags deserialises it: fields named as in ROS, arrays as ndarrays),
        and when it was received, in ns since the epoch.

    Raises:
        UserError: The bag cannot be read, or lacks a topic.
    """
    with open_bag(uri) as reader:
        present = {connection.topic for connection in reader.connections}
        if missing := set(topics or ()) - present:
            raise UserError(
                f"{uri} has no topic {', '.join(sorted(missing))};"
                f" it has {', '.join(sorted(present)) or 'none'}"
            )
        wanted = [c for c in reader.connections if topics is None or c.topic in topics]
        if not wanted:
            return
        for connection, stamp, data in reader.messages(wanted):
            yield connection.topic, reader.deserialize(data, connection.msgtype), stamp
