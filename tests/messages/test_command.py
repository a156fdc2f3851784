import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlrc_ros.errors import UserError
from rlrc_ros.messages.command import (
    action_to_twist,
    command_arrays,
    observed_stamps,
    policy_command,
    twist_array,
    twist_stamped,
    twist_to_action,
)
from rlrc_ros.messages.stamps import to_nanoseconds, to_seconds, to_stamp

pytest.importorskip("rlrc.msg")
twists = arrays(np.float64, 6, elements=st.floats(-5, 5))


def test_a_displacement_per_step_becomes_a_velocity():
    action = np.array([0.01, 0.0, -0.02, 0.0, 0.1, 0.0, 0.75], np.float32)
    twist, gripper = action_to_twist(action, rate=10.0)
    assert twist == pytest.approx([0.1, 0.0, -0.2, 0.0, 1.0, 0.0]) and gripper == 0.75


@given(twist=twists, gripper=st.floats(0, 1), rate=st.floats(0.5, 200))
def test_action_and_twist_are_inverse(twist, gripper, rate):
    back, grip = action_to_twist(twist_to_action(twist, gripper, rate), rate)
    assert back == pytest.approx(twist) and grip == gripper


@pytest.mark.parametrize("shape", [(6,), (8,), (1, 7)])
def test_an_action_of_another_shape_is_refused(shape):
    with pytest.raises(UserError, match="an action has 7 numbers"):
        action_to_twist(np.zeros(shape), 10.0)


@given(st.dictionaries(st.text("abc_", min_size=1), st.integers(0, 2**31 * 10**9 - 1)))
def test_what_a_command_was_computed_from_comes_back_exactly(observed):
    now = to_stamp(1)
    message = policy_command(
        np.zeros(6), 1.0, stamp=now, observation_stamp=now, frame_id="base", policy_label="A",
        episode_id="e", step=0, observed=observed,
    )  # fmt: skip
    assert observed_stamps(message) == observed
    assert observed_stamps(object()) == {}, "of a bag from before commands said it"


@given(twist=twists, gripper=st.floats(0, 1))
def test_a_command_comes_back_from_its_message(twist, gripper):
    message = policy_command(
        twist,
        gripper,
        stamp=to_stamp(1.5),
        observation_stamp=to_stamp(1),
        frame_id="base_link",
        policy_label="A",
        episode_id="e1",
        step=3,
    )
    arrays_ = command_arrays(message)
    assert np.array_equal(arrays_.twist, twist) and arrays_.gripper == gripper
    assert to_seconds(message.header.stamp) == 1.5
    assert to_nanoseconds(message.observation_stamp) == 1
    assert (message.header.frame_id, message.policy_label) == ("base_link", "A")
    assert (message.episode_id, message.step) == ("e1", 3)


@given(twist=twists)
def test_a_twist_comes_back_from_its_message(twist):
    message = twist_stamped(twist, to_stamp(2.0), "base_link")
    assert np.array_equal(twist_array(message.twist), twist)
    assert message.header.frame_id == "base_link"


@given(nanoseconds=st.integers(-(2**31) * 10**9, (2**31) * 10**9 - 1))
def test_nanoseconds_come_back_from_a_stamp_exactly(nanoseconds):
    assert to_nanoseconds(to_stamp(nanoseconds)) == nanoseconds
    assert to_nanoseconds(to_stamp(np.int64(nanoseconds))) == nanoseconds


@given(seconds=st.floats(0, 2**31 - 1))
def test_seconds_come_back_from_a_stamp_to_a_microsecond(seconds):
    assert to_seconds(to_stamp(seconds)) == pytest.approx(seconds, abs=1e-6, rel=0)
