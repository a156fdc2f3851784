from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlrc_ros.errors import UserError
from rlrc_ros.messages.joint_state import joint_state, ordered_positions


def state(name, position):
    return SimpleNamespace(name=name, position=position)


@given(joints=st.dictionaries(st.text(min_size=1), st.floats(-10, 10), min_size=1), data=st.data())
def test_positions_are_matched_by_name_in_any_order(joints, data):
    came = data.draw(st.permutations(list(joints)))
    wanted = data.draw(st.lists(st.sampled_from(list(joints)), unique=True))
    positions = ordered_positions(state(came, [joints[name] for name in came]), wanted)
    assert positions.dtype == np.float64 and positions.shape == (len(wanted),)
    assert positions.tolist() == [joints[name] for name in wanted]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (state(["a"], [1.0]), "lacks b; it has a"),
        (state([], []), "lacks a, b; it has no joints"),
        (state(["a", "b"], [1.0]), "2 names but 1 positions"),
        (state(["a", "b"], []), "2 names but 0 positions"),
        (state(["a", "b", "a"], [1.0, 2.0, 3.0]), "names a more than once"),
        (state(["a", "b"], [float("nan"), 1.0]), "not finite: a nan"),
        (state(["a", "b"], [1.0, float("inf")]), "not finite: b inf"),
    ],
)
def test_a_state_without_the_joints_is_refused(message, words):
    with pytest.raises(UserError, match=words):
        ordered_positions(message, ["a", "b"])


def test_a_state_comes_back_from_its_message():
    time = pytest.importorskip("builtin_interfaces.msg").Time
    message = joint_state(["a", "b"], np.array([0.5, -1.0]), np.array([0.0, 2.0]), time(sec=5))
    assert message.header.stamp.sec == 5 and list(message.velocity) == [0.0, 2.0]
    assert ordered_positions(message, ["b", "a"]).tolist() == [-1.0, 0.5]
    with pytest.raises(UserError, match="numbers differ"):
        joint_state(["a", "b"], [0.5], [], time())
