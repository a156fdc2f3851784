"""Small bags, made without ROS."""

import os

import pytest
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from rlrc_ros.rollouts.definitions import message_definition
from rlrc_ros.rollouts.episode import Episode
from rlrc_ros.rollouts.recording import Recording

STRING = "std_msgs/msg/String"
# as the installed std_msgs has it; these tests need no ROS
STRING_DEFINITION = "string data\n"
SECOND = 10**9
FOREVER = {"sec": 9223372036, "nsec": 854775807}
QOS = {
    "history": "unknown",
    "depth": 0,
    "reliability": "reliable",
    "durability": "volatile",
    "deadline": FOREVER,
    "lifespan": FOREVER,
    "liveliness": "automatic",
    "liveliness_lease_duration": FOREVER,
    "avoid_ros_namespace_conventions": False,
}

store = get_typestore(Stores.EMPTY)
store.register(get_types_from_msg(STRING_DEFINITION, STRING))
STRING_HASH = store.hash_rihs01(STRING)


def string(text):
    """CDR of a std_msgs/String."""
    return bytes(store.serialize_cdr(store.types[STRING](data=text), STRING))


def record(directory, texts, episode_id="e1", period=SECOND // 10, **fields):
    """A whole bag with these strings on /text; its directory."""
    recording = Recording(directory, Episode(episode_id=episode_id, **fields))
    channel = recording.add_topic("/text", STRING, STRING_DEFINITION, [QOS], STRING_HASH)
    for k, text in enumerate(texts):
        recording.write(channel, 100 * SECOND + k * period, 99 * SECOND, string(text))
    recording.close("finished")
    assert not recording.failure
    return recording.uri


def damage(bag, cut):
    """Cut so many bytes off the bag's MCAP file."""
    (file,) = bag.glob("*.mcap")
    os.truncate(file, file.stat().st_size - cut)
    return file


def installed(type_name):
    """The definition of an installed type; skips where it is not installed."""
    pytest.importorskip(type_name.split("/")[0])
    return message_definition(type_name)
