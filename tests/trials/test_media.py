import base64
import dataclasses
import math

import cv2
import numpy as np
import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.profile import load_profile
from rlrc_ros.rollouts.episode import Episode
from rlrc_ros.rollouts.recording import Recording
from rlrc_ros.trials.media import FRAME_RATE, Footage, frame_strip, read_footage, side_by_side
from rlrc_ros.trials.smoothness import path_sparc
from tests.rollouts.bags import QOS, SECOND, damage, installed

pytest.importorskip("rlrc.msg", reason="the ROS interfaces are not built")
from geometry_msgs.msg import PoseStamped
from rclpy.serialization import serialize_message
from rlrc.msg import PolicyCommand

from rlrc_ros.messages.image import rgb_to_image
from rlrc_ros.messages.stamps import to_stamp

START = 1000 * SECOND


def picture(i):
    frame = np.full((64, 96, 3), 120, np.uint8)
    frame[:, : 4 * i] = (200, 30, 30)
    return frame


@pytest.fixture
def bag(tmp_path):
    """Two seconds at 20 images and 50 poses a second; the first command comes half a second in."""
    recording = Recording(tmp_path, Episode(episode_id="e1"))
    profile = load_profile("sim")
    camera = "/" + profile.cameras["front"].topic
    kinds = {
        camera: "sensor_msgs/msg/Image",
        "/ee_pose": "geometry_msgs/msg/PoseStamped",
        "/policy_command": "rlrc/msg/PolicyCommand",
    }
    channels = {
        topic: recording.add_topic(topic, kind, installed(kind), [QOS], "")
        for topic, kind in kinds.items()
    }

    def write(topic, message, at):
        recording.write(channels[topic], at, at, serialize_message(message))

    for tick in range(200):
        at = START + tick * SECOND // 100
        if tick % 5 == 0:
            write(camera, rgb_to_image(picture(tick // 10), to_stamp(at), "camera"), at)
        if tick % 2 == 0:
            pose = PoseStamped()
            pose.header.stamp = to_stamp(at)
            pose.pose.position.x = 0.1 * math.sin(tick / 40)
            write("/ee_pose", pose, at)
        if tick >= 50 and tick % 10 == 0:
            command = PolicyCommand()
            command.header.stamp = to_stamp(at)
            write("/policy_command", command, at)
    recording.close("finished")
    return recording.uri


def test_footage_begins_with_the_first_command_and_keeps_time(bag):
    footage = read_footage(bag, load_profile("sim"))
    assert len(footage.frames) == pytest.approx(1.5 * FRAME_RATE, abs=1)
    for k in (0, 7, 14):
        assert abs(footage.frames[k].astype(int) - picture(5 + k)).max() == 0
    assert footage.pose_times[0] == pytest.approx(0.0, abs=0.02)
    assert footage.pose_times[-1] == pytest.approx(1.48, abs=0.02)
    assert footage.positions.shape == (len(footage.pose_times), 3)
    assert path_sparc(footage.pose_times, footage.positions) < -1


def test_a_bag_that_is_missing_cut_off_or_lacks_the_camera_is_one_line(bag, tmp_path):
    profile = load_profile("sim")
    with pytest.raises(UserError, match="there is no such bag"):
        read_footage(tmp_path / "none", profile)
    cameras = {"front": dataclasses.replace(profile.cameras["front"], topic="other")}
    with pytest.raises(UserError, match="has no topic /other"):
        read_footage(bag, dataclasses.replace(profile, cameras=cameras))
    damage(bag, 3000)
    with pytest.raises(UserError, match="cannot be read"):
        read_footage(bag, profile)


def made(seconds, colour):
    frames = [np.full((50, 80, 3), colour, np.uint8) for _ in range(int(seconds * FRAME_RATE))]
    return Footage(frames, np.zeros(0), np.zeros((0, 3)))


def test_a_clip_shows_both_at_one_speed_and_how_each_ended(tmp_path):
    footage = {"original": made(3, (200, 0, 0)), "compressed": made(1, (0, 0, 200))}
    ends = {"original": ("success", 3.0), "compressed": ("failure", 1.0)}
    clip = side_by_side(4, "pair 4", footage, ends)
    data = base64.b64decode(clip.uri.partition("base64,")[2])
    path = tmp_path / "clip.webm"
    path.write_bytes(data)
    video = cv2.VideoCapture(str(path))
    frames = []
    while True:
        more, frame = video.read()
        if not more:
            break
        frames.append(frame)
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(FRAME_RATE)
    assert len(frames) == pytest.approx(4 * FRAME_RATE, abs=2)  # the longer one, and a second
    left, right = frames[5][60, 40].astype(int), frames[5][60, 330].astype(int)
    assert left[2] > 150 > left[0] and right[0] > 150 > right[2]
    late = frames[25][60, 330].astype(int)
    assert late[2] > 90, "an episode that has ended is pale"


def test_a_strip_has_both_episodes_under_one_clock():
    footage = {"a": made(3, 10), "b": made(1, 20)}
    strip = frame_strip(2, footage, {"a": ("success", 3.0), "b": ("failure", 1.0)})
    assert strip.pair == 2 and len(strip.episodes["a"].frames) == 6
    assert len(strip.episodes["b"].frames) == 2
    empty = Footage([], np.zeros(0), np.zeros((0, 3)))
    ends = {"a": ("success", 3.0), "b": ("failure", 1.0)}
    assert frame_strip(2, {"a": made(3, 10), "b": empty}, ends) is None
    assert side_by_side(2, "", {"a": made(3, 10), "b": empty}, ends) is None
