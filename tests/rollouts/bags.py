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
IMAGE, JOINTS = "sensor_msgs/msg/Image", "sensor_msgs/msg/JointState"
POSE, TWIST = "geometry_msgs/msg/PoseStamped", "geometry_msgs/msg/TwistStamped"
ARRAY = "std_msgs/msg/Float64MultiArray"
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


def robot_bag(directory, camera=30, joints=100, seconds=2.0, stops=None, image=IMAGE):
    """A bag with the simulated arm's topics, no message in any; its directory.

    Args:
        camera, joints: Hz.
        stops: s after which the camera falls silent.
    """
    recording = Recording(directory, Episode(episode_id="e1"))
    rates = {"/camera/front/image_raw": (image, camera), "/joint_states": (JOINTS, joints)}
    rates |= {"/ee_pose": (POSE, 50), "/ee_command": (TWIST, 10), "/gripper_command": (ARRAY, 10)}
    for topic, (type_name, rate) in rates.items():
        channel = recording.add_topic(topic, type_name, "", [QOS], "")
        camera_end = stops if stops and topic.startswith("/camera") else seconds
        for k in range(int(rate * min(seconds, camera_end))):
            recording.write(channel, 100 * SECOND + int(k * SECOND / rate), 0, b"")
    recording.close("finished")
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
