import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlrc_ros.messages.ee_pose import pose_problem, pose_vector
from rlrc_ros.motion import turn_quaternion

components = st.floats(-1.0, 1.0)
quaternions = st.tuples(*[components] * 4).filter(lambda q: math.hypot(*q) > 0.1)


def message(quaternion, place=(0.1, 0.2, 0.3), frame="base"):
    return SimpleNamespace(
        header=SimpleNamespace(frame_id=frame),
        pose=SimpleNamespace(
            position=SimpleNamespace(**dict(zip("xyz", place, strict=True))),
            orientation=SimpleNamespace(**dict(zip("xyzw", quaternion, strict=True))),
        ),
    )


@given(quaternions, st.tuples(*[st.floats(-7.0, 7.0)] * 3))
@example((0.0, 0.0, 2.2e-313, 1.0), (0.0, 0.0, 0.0))  # the reciprocal of which is infinite
def test_a_rotation_vector_is_the_orientation_and_the_nearer_one(quaternion, near):
    length = math.hypot(*quaternion)
    unit = tuple(value / length for value in quaternion)
    vector = pose_vector(message(unit), near)
    turn = tuple(vector[3:].tolist())
    assert vector[:3].tolist() == [0.1, 0.2, 0.3]
    assert math.hypot(*turn) < 2 * math.pi + 1e-9
    assert abs(np.dot(turn_quaternion(turn), unit)) > 1 - 1e-9
    negated = pose_vector(message(tuple(-value for value in unit)), near)
    distance = math.dist(turn, near)
    assert math.dist(negated[3:], near) == pytest.approx(distance, abs=1e-9)
    if (angle := math.hypot(*turn)) > 1e-6:
        other = np.array(turn) * (angle - 2 * math.pi) / angle
        assert distance <= math.dist(other, near) + 1e-9


@pytest.mark.parametrize("sign", [1, -1])
def test_a_gripper_that_points_down_does_not_jump(sign):
    turns = [(angle, 0.0, 0.0) for angle in np.linspace(math.pi - 0.3, math.pi + 0.3, 9)]
    seen = [
        pose_vector(message([sign * v for v in turn_quaternion(turn)]), (3.0, 0.1, 0.0))[3:]
        for turn in turns
    ]
    np.testing.assert_allclose(seen, turns, atol=1e-12)


def test_no_turn_is_none():
    assert pose_vector(message((0.0, 0.0, 0.0, 1.0)), (3.0, 0.0, 0.0))[3:].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frame": "world"}, "it is in frame 'world', base_frame is 'base'"),
        ({"place": (math.nan, 0.0, 0.0)}, "it is not finite"),
        ({"quaternion": (math.nan, 0.0, 0.0, 1.0)}, "or its orientation is no unit quaternion"),
        ({"quaternion": (0.0, 0.0, 0.0, 0.0)}, "or its orientation is no unit quaternion"),
        ({}, ""),
    ],
)
def test_a_pose_of_no_use_is_said_to_be(changes, words):
    problem = pose_problem(message(**{"quaternion": (1.0, 0.0, 0.0, 0.0), **changes}), "base")
    assert words in problem and bool(words) == bool(problem)
