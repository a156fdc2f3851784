"""metadata.yaml, by which rosbag2 and rosbags open a bag's directory (rosbag2's version 9)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlrc_ros.errors import UserError
from rlrc_ros.files import write_atomically
from rlrc_ros.rollouts.mcap_file import Channel, Index
from rlrc_ros.schema import read_yaml

FILE = "metadata.yaml"
QOS_KEY = "offered_qos_profiles"
TYPE_HASH_KEY = "topic_type_hash"
_COMPRESSION = ("compression_format", "compression_mode")


def write_metadata(
    directory: Path, files: Mapping[str, Index], compression: Mapping[str, str] | None = None
) -> None:
    """Write metadata.yaml of a bag with these MCAP files, given by name in the order of time.

    Args:
        directory: The bag's.
        files: What is in each of them.
        compression: What another bag's `compression_of` gave; None: messages are as they came.
    """
    topics: dict[str, tuple[Channel, int]] = {}
    for index in files.values():
        for topic, (channel, count) in index.topics().items():
            topics[topic] = (channel, count + (topics[topic][1] if topic in topics else 0))
    spans = [index.span for index in files.values() if index.span != (0, 0)]
    start = min((span[0] for span in spans), default=0)
    end = max((span[1] for span in spans), default=0)
    information = {
        "version": 9,
        "storage_identifier": "mcap",
        "duration": {"nanoseconds": end - start},
        "starting_time": {"nanoseconds_since_epoch": start},
        "message_count": sum(count for _, count in topics.values()),
        "topics_with_message_count": [
            {"topic_metadata": _topic(channel), "message_count": count}
            for channel, count in topics.values()
        ],
        **(compression or dict.fromkeys(_COMPRESSION, "")),
        "relative_file_paths": list(files),
        "files": [_file(name, index) for name, index in files.items()],
        "custom_data": None,
        "ros_distro": os.environ.get("ROS_DISTRO", "unknown"),
    }
    text = yaml.safe_dump({"rosbag2_bagfile_information": information}, sort_keys=False)
    write_atomically(directory / FILE, text)


def compression_of(directory: Path) -> dict[str, str]:
    """How a bag's messages are compressed one by one; nothing where its metadata.yaml is lost."""
    try:
        information = read_yaml(directory / FILE)["rosbag2_bagfile_information"]
        return {key: str(information[key]) for key in _COMPRESSION}
    except (UserError, KeyError, TypeError):
        return {}


def _topic(channel: Channel) -> dict[str, Any]:
    return {
        "name": channel.topic,
        "type": channel.type_name,
        "serialization_format": "cdr",
        "offered_qos_profiles": yaml.safe_load(channel.metadata.get(QOS_KEY, "")) or [],
        "type_description_hash": channel.metadata.get(TYPE_HASH_KEY, ""),
    }


def _file(name: str, index: Index) -> dict[str, Any]:
    start, end = index.span
    return {
        "path": name,
        "starting_time": {"nanoseconds_since_epoch": start},
        "duration": {"nanoseconds": end - start},
        "message_count": sum(index.counts.values()),
    }
