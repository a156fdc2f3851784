"""Bags of episodes as the nodes leave them, made without ROS."""

from pathlib import Path

import numpy as np
import pytest
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from rlrc_ros.profile import load_profile
from rlrc_ros.rollouts.alignment import Contract
from rlrc_ros.rollouts.episode import Episode, label
from rlrc_ros.rollouts.recording import Recording
from tests.conftest import bundle_config
from tests.rollouts.bags import QOS, SECOND, installed

COMMAND, IMAGE, JOINTS = (
    "rlrc/msg/PolicyCommand",
    "sensor_msgs/msg/Image",
    "sensor_msgs/msg/JointState",
)
INSTRUCTION = "put the red cube on the blue plate"
NAMES = [*(f"joint{i}" for i in range(1, 8)), "finger_joint"]
START = 1_700_000_000 * SECOND
SIZE = 64

store = get_typestore(Stores.ROS2_JAZZY)
_definition = Path(__file__).parents[2] / "msg" / "PolicyCommand.msg"
store.register(get_types_from_msg(_definition.read_text(), COMMAND))


def time(ns):
    return store.types["builtin_interfaces/msg/Time"](sec=ns // SECOND, nanosec=ns % SECOND)


def header(ns, frame="base"):
    return store.types["std_msgs/msg/Header"](stamp=time(ns), frame_id=frame)


def image(ns, k, size=SIZE):
    pixels = np.random.default_rng(k).integers(0, 256, (size, size, 3), dtype=np.uint8)
    fields = {"height": size, "width": size, "encoding": "rgb8", "is_bigendian": 0}
    data = {"step": 3 * size, "data": pixels.ravel()}
    return pixels, store.types[IMAGE](header=header(ns), **fields, **data)


def joints(ns, k):
    positions = np.append(np.arange(7) + 0.01 * k, 0.02)
    return store.types[JOINTS](
        header=header(ns), name=NAMES, position=positions, velocity=np.zeros(0), effort=np.zeros(0)
    )


def command(ns, episode_id, step, looked, speed=0.1, gripper=1.0):
    vector = store.types["geometry_msgs/msg/Vector3"]
    twist = store.types["geometry_msgs/msg/Twist"](
        linear=vector(x=speed, y=0.0, z=-speed), angular=vector(x=0.0, y=0.0, z=2 * speed)
    )
    return store.types[COMMAND](
        header=header(ns),
        observation_stamp=time(min(looked.values(), default=ns)),
        observed_sources=list(looked),
        observed_stamps=[time(stamp) for stamp in looked.values()],
        period=0.0,
        twist=twist,
        gripper=gripper,
        policy_label="A",
        episode_id=episode_id,
        step=step,
    )


def contract(**changes):
    """Of the simulated arm and a policy of 64 px at 10 Hz."""
    return Contract(bundle_config(**changes), load_profile("sim"))


def record_episode(
    directory, episode_id="e1", steps=5, rate=10.0, outcome="success", named=True, namespace="",
    size=SIZE, stop=True, skip=(), dropped=(), **fields,
):  # fmt: skip
    """A bag with images at 30 Hz, joint states at 50 Hz and commands; its directory.

    Each command is issued 40 ms after its look, which was 5 ms after the newest joint state it
    names: newer ones are in the bag by then. `skip`: steps without a command; `dropped`: images
    that the recorder missed.
    """
    fields = {"instruction": INSTRUCTION, "policy_label": "A", "bundle_hash": "ab" * 32, **fields}
    recording = Recording(directory, Episode(episode_id=episode_id, **fields))
    topics = {IMAGE: "/camera/front/image_raw", JOINTS: "/joint_states"}
    channels = {
        kind: recording.add_topic(namespace + topic, kind, installed(kind), [QOS], "")
        for kind, topic in {**topics, COMMAND: "/policy_command"}.items()
    }
    length = round((steps / rate + 0.3) * SECOND)
    images = {START + k * SECOND // 30: k for k in range(length * 30 // SECOND)}
    states = {START + k * SECOND // 50: k for k in range(length * 50 // SECOND)}
    messages = [
        (ns + 8_000_000, IMAGE, image(ns, k, size)[1])
        for ns, k in images.items()
        if k not in dropped
    ]
    messages += [(ns + 1_000_000, JOINTS, joints(ns, k)) for ns, k in states.items()]
    expected = []
    for step in range(steps):
        look = START + 105_000_000 + round(step / rate * SECOND)
        seen = {
            "front": max(ns for ns in images if ns + 8_000_000 <= look),
            "joint_states": max(ns for ns in states if ns + 1_000_000 <= look),
        }
        speed = 0.1 + 0.01 * step
        issued = look + 40_000_000
        sent = command(issued, episode_id, step, seen if named else {}, speed)
        if step not in skip:
            messages.append((issued, COMMAND, sent))
            expected.append((images[seen["front"]], states[seen["joint_states"]], speed))
    if stop:
        messages.append((issued + 1, COMMAND, command(issued + 1, episode_id, steps, {}, 0.0)))
    for received, kind, message in sorted(messages, key=lambda entry: entry[0]):
        data = bytes(store.serialize_cdr(message, kind))
        recording.write(channels[kind], received, received, data)
    recording.close("finished")
    assert not recording.failure
    if outcome != "unlabelled":
        label(recording.uri, outcome, 50.0)
    return recording.uri, expected


@pytest.fixture(scope="session")
def an_episode(tmp_path_factory):
    """(bag, expected): five steps; expected has image number, joint state number and speed."""
    return record_episode(tmp_path_factory.mktemp("episode"))
