import dataclasses
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest

from rlrc_ros.errors import UserError
from rlrc_ros.messages.observation import Gripper, ObservationBuffer
from rlrc_ros.vla.config import CameraConfig
from tests.conftest import bundle_config, posed_config

SECOND = 10**9
NOW = 1_700_000_000 * SECOND
GRIPPER = Gripper(joint="finger", closed=0.0, open=0.04)
NAMES = [*(f"joint{i}" for i in range(1, 8)), "finger"]


def stamped(age, **fields):
    sec, nanosec = divmod(NOW - round(age * SECOND), SECOND)
    stamp = SimpleNamespace(sec=sec, nanosec=nanosec)
    return SimpleNamespace(header=SimpleNamespace(stamp=stamp), **fields)


def image(age=0.0, value=0, encoding="rgb8"):
    return stamped(
        age, height=2, width=2, encoding=encoding, is_bigendian=0, step=6, data=bytes([value] * 12)
    )


def joints(age=0.0, positions=(0.0,) * 7 + (0.02,), names=NAMES):
    return stamped(age, name=list(names), position=list(positions))


def pose(age=0.0, frame="base", place=(0.4, 0.0, 0.3), quaternion=(1.0, 0.0, 0.0, 0.0)):
    message = stamped(
        age,
        pose=SimpleNamespace(
            position=SimpleNamespace(**dict(zip("xyz", place, strict=True))),
            orientation=SimpleNamespace(**dict(zip("xyzw", quaternion, strict=True))),
        ),
    )
    message.header.frame_id = frame
    return message


def buffer(front=None, state=None, ee_pose=None):
    """A buffer with one camera; images may be 0.2 s old, the rest 0.1 s, and 0.15 s apart."""
    made = ObservationBuffer(
        {"front": 0.2, "joint_states": 0.1, "ee_pose": 0.1},
        {"front": "/image", "joint_states": "/joints", "ee_pose": "/pose"},
        0.15,
        "base",
    )
    for source, message in (("front", front), ("joint_states", state), ("ee_pose", ee_pose)):
        if message is not None:
            made.add(source, message)
    return made


def test_an_observation_has_the_picture_the_joints_and_the_oldest_stamp():
    snapshot = buffer(image(0.05, value=9), joints(0.01)).snapshot(bundle_config(), NOW)
    assert snapshot.oldest_ns == NOW - 50_000_000
    observation = snapshot.decode(bundle_config(), GRIPPER, "go")
    assert observation.instruction == "go"
    assert np.array_equal(observation.images["front"], np.full((2, 2, 3), 9))
    assert observation.proprioception.tolist() == [0.0] * 7 + [0.5]


@pytest.mark.parametrize(("position", "opening"), [(-0.1, 0.0), (0.0, 0.0), (0.04, 1.0), (1, 1.0)])
def test_an_opening_is_between_0_and_1(position, opening):
    assert GRIPPER.opening(position) == opening
    assert Gripper(joint="f", closed=0.04, open=0.0).opening(position) == 1.0 - opening


def test_equal_gripper_positions_are_refused():
    with pytest.raises(UserError, match=r"both 0\.04: they must differ"):
        Gripper(joint="f", closed=0.04, open=0.04)


@pytest.mark.parametrize(
    ("front", "state", "words"),
    [
        (None, joints(), "nothing has come on /image ('front')"),
        (image(), None, "nothing has come on /joints ('joint_states')"),
        (image(0.3), joints(), "/image ('front') is 0.30 s old, 0.2 s are allowed"),
        (image(), joints(0.12), "/joints ('joint_states') is 0.12 s old, 0.1 s are allowed"),
        (image(0.19), joints(0.0), "/image ('front') is 0.19 s behind the other sources, 0.15 s"),
        (image(-5.0), joints(), "/image ('front') is stamped 5.00 s in the future; synchronise"),
        (image(), joints(-0.2), "/joints ('joint_states') is stamped 0.20 s in the future"),
        (stamped(NOW / SECOND), joints(), "/image ('front') is 1700000000.00 s old"),
    ],
)
def test_what_is_missing_stale_or_ahead_makes_no_observation(front, state, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        buffer(front, state).snapshot(bundle_config(), NOW)
    assert "\n" not in str(error.value)


def test_a_clock_that_is_set_back_is_followed_and_a_late_message_is_not():
    made = buffer(image(0.05, value=1), joints(0.0))
    made.add("front", image(0.15, value=2))
    made.add("front", image(0.05, value=3))
    assert made.snapshot(bundle_config(), NOW).images["front"].data[0] == 1
    made.add("front", image(5.0, value=4)), made.add("joint_states", joints(5.0))
    snapshot = made.snapshot(bundle_config(), NOW - 5 * SECOND)
    assert snapshot.images["front"].data[0] == 4


def test_what_came_long_ago_is_old_even_where_the_clock_stands_still(monkeypatch):
    made = buffer(image(), joints())
    now = time.monotonic() + 0.25
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with pytest.raises(UserError, match=r"/image \('front'\) is 0\.2\d s old"):
        made.snapshot(bundle_config(), NOW)


def test_a_camera_that_is_not_here_is_named():
    config = bundle_config(cameras=(CameraConfig(name="wrist", height=64, width=64),))
    for check in (lambda made: made.check(config), lambda made: made.snapshot(config, NOW)):
        with pytest.raises(UserError, match="looks through camera 'wrist'; cameras here: front"):
            check(buffer(image(), joints()))


def test_a_policy_without_proprioception_needs_no_joints():
    blind = dataclasses.replace(bundle_config().architecture, proprioception=0)
    config = bundle_config(proprioception=None, architecture=blind)
    observation = buffer(image()).snapshot(config, NOW).decode(config, GRIPPER, "go")
    assert observation.proprioception is None


def test_the_end_effectors_pose_comes_before_joints_and_gripper():
    config = posed_config(joints=2)
    made = buffer(image(), joints(positions=(0.1, 0.2, *[0.0] * 5, 0.04)), pose(0.02))
    snapshot = made.snapshot(config, NOW)
    assert snapshot.stamps["ee_pose"] == snapshot.oldest_ns == NOW - 20_000_000
    seen = snapshot.decode(config, GRIPPER, "go").proprioception
    np.testing.assert_allclose(seen, [0.4, 0.0, 0.3, np.pi, 0.0, 0.0, 0.1, 0.2, 1.0])


def test_a_policy_that_takes_the_pose_alone_needs_no_joints():
    config = posed_config(joints=0)
    contract = dataclasses.replace(
        config.proprioception, gripper=False, mean=(0.0,) * 6, std=(1.0,) * 6
    )
    architecture = dataclasses.replace(config.architecture, proprioception=6)
    config = dataclasses.replace(config, architecture=architecture, proprioception=contract)
    snapshot = buffer(image(), None, pose()).snapshot(config, NOW)
    assert snapshot.decode(config, GRIPPER, "go").proprioception.shape == (6,)


@pytest.mark.parametrize(
    ("ee_pose", "words"),
    [
        (None, "nothing has come on /pose ('ee_pose')"),
        (pose(0.12), "/pose ('ee_pose') is 0.12 s old, 0.1 s are allowed"),
        (pose(-0.2), "/pose ('ee_pose') is stamped 0.20 s in the future"),
        (pose(frame="world"), "/pose ('ee_pose'): it is in frame 'world', base_frame is 'base'"),
        (pose(place=(0.0, np.inf, 0.0)), "/pose ('ee_pose'): it is not finite, or its orientation"),
    ],
)
def test_a_pose_that_will_not_do_makes_no_observation(ee_pose, words):
    with pytest.raises(UserError, match=re.escape(words)):
        buffer(image(), joints(), ee_pose).snapshot(posed_config(), NOW)
    buffer(image(), joints(), ee_pose).snapshot(bundle_config(), NOW)  # who takes none minds none


def test_a_message_older_than_the_latest_is_ignored_until_all_is_forgotten():
    made = buffer(image(0.0, value=1), joints())
    made.add("front", image(0.1, value=2))
    assert made.snapshot(bundle_config(), NOW).images["front"].data[0] == 1
    made.forget()
    made.add("front", image(0.1, value=2))
    made.add("joint_states", joints())
    assert made.snapshot(bundle_config(), NOW).images["front"].data[0] == 2


@pytest.mark.parametrize(
    ("front", "state", "words"),
    [
        (image(encoding="16UC1"), joints(), "camera 'front': image encoding '16UC1'"),
        (image(), joints(names=NAMES[:-1], positions=[0.0] * 7), "joint state lacks finger"),
        (image(), joints(positions=[np.nan] * 8), "joint state is not finite: joint1 nan"),
    ],
)
def test_bad_contents_are_named(front, state, words):
    snapshot = buffer(front, state).snapshot(bundle_config(), NOW)
    with pytest.raises(UserError, match=re.escape(words)):
        snapshot.decode(bundle_config(), GRIPPER, "go")
