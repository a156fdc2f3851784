import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrc_ros.guard import Guard, Output, Pose
from rlrc_ros.limits import Limits
from rlrc_ros.motion import ZERO, angle_between, multiplied, turn_between, turn_quaternion, z_axis
from rlrc_ros.pose_target import MAX_LEAD, MAX_LEAD_ANGLE, PoseTarget

PERIOD = 0.01
DOWN = (1.0, 0.0, 0.0, 0.0)
BOX = {"workspace_min": (-0.5, -0.4, 0.0), "workspace_max": (0.5, 0.4, 0.6)}
LIMITS = Limits(**BOX, max_tilt=0.4, pose_output=True)

coordinate = st.floats(-0.7, 0.7)
vector = st.tuples(coordinate, coordinate, coordinate)
poses = st.builds(
    lambda position, turn, age: Pose(
        position, age, "base_link", multiplied(turn_quaternion(turn), DOWN)
    ),
    position=vector,
    turn=vector,
    age=st.floats(0.0, 0.2),
)


def pose(position=(0.0, 0.0, 0.3), orientation=DOWN):
    return Pose(position, 0.0, "base_link", orientation)


def moving(linear=ZERO, angular=ZERO):
    return Output(linear, angular, 0.5)


@settings(max_examples=200)
@given(
    steps=st.lists(
        st.tuples(
            st.one_of(st.just(PERIOD), st.floats(0.0, 5.0)), vector, vector, st.none() | poses
        ),
        min_size=1,
        max_size=60,
    )
)
def test_whatever_comes_in_a_target_is_slow_near_the_arm_and_goes_out_nowhere(steps):
    target, now, last = PoseTarget(LIMITS), 0.0, None
    for interval, linear, angular, measured in steps:
        now += interval
        new = target.advance(now, moving(linear, angular), measured)
        if new is None:
            assert measured is None and last is None
            continue
        position, orientation = new
        assert all(map(math.isfinite, (*position, *orientation)))
        assert math.hypot(*orientation) == pytest.approx(1.0)
        if last is None:
            assert position == measured.position
        else:
            time = min(interval, 2 * PERIOD)
            assert math.dist(position, last[0]) <= math.hypot(*linear) * time + 1e-9
            assert turn_between(orientation, last[1]) <= math.hypot(*angular) * time + 1e-7
            for value, old, low, high in zip(
                position, last[0], BOX["workspace_min"], BOX["workspace_max"], strict=True
            ):
                assert min(low, old) <= value <= max(high, old)
            tilts = [angle_between(LIMITS.cone_axis, z_axis(q)) for q in (orientation, last[1])]
            assert tilts[0] <= max(LIMITS.max_tilt, tilts[1]) + 1e-7
            if measured is not None:
                leads = [math.dist(p, measured.position) for p in (position, last[0])]
                assert leads[0] <= max(MAX_LEAD, leads[1]) + 1e-9
                turns = [turn_between(measured.orientation, q) for q in (orientation, last[1])]
                assert turns[0] <= max(MAX_LEAD_ANGLE, turns[1]) + 1e-7
            else:
                assert new == last
        last = new


def test_an_arm_that_follows_goes_where_the_velocity_says():
    target, where = PoseTarget(LIMITS), pose()
    for k in range(101):
        position, orientation = target.advance(k * PERIOD, moving((0.1, 0.0, 0.0)), where)
        where = pose(position, orientation)
    assert where.position == pytest.approx((0.1, 0.0, 0.3)) and target.waited == 0


def test_an_arm_that_is_held_up_is_not_pushed_harder_and_harder():
    target = PoseTarget(LIMITS)
    for k in range(301):
        position, _ = target.advance(k * PERIOD, moving((0.1, 0.0, 0.0)), pose())
    assert 0.9 * MAX_LEAD < position[0] <= MAX_LEAD and target.waited > 200


def test_after_a_pause_it_goes_on_from_the_last_target_or_from_an_arm_that_was_moved():
    target = PoseTarget(LIMITS)
    for k in range(31):
        position, _ = target.advance(k * PERIOD, moving((0.1, 0.0, 0.0)), pose())
    target.pause()
    assert target.advance(5.0, moving(), None) is None
    sagging = pose((position[0] - 0.01, 0.0, 0.29))
    assert target.advance(5.0, moving(), sagging)[0] == position, "the arm would sag"
    target.pause()
    elsewhere = pose((0.3, 0.2, 0.1))
    assert target.advance(9.0, moving(), elsewhere)[0] == elsewhere.position


def test_with_a_guard_before_it_the_target_comes_to_rest_at_the_wall():
    from rlrc_ros.guard import Command

    guard, target, where = Guard(LIMITS), PoseTarget(LIMITS), pose()
    positions = []
    for k in range(500):
        now = 10.0 + k * PERIOD
        command = Command((0.25, 0.0, 0.0), ZERO, 0.5, 0.0, "base_link", "A", "e1")
        output = guard.step(now, command, where)
        where = pose(*target.advance(now, output, guard.pose(now)))
        positions.append(where.position[0])
    assert 0.48 < positions[-1] <= 0.5
    speeds = [(b - a) / PERIOD for a, b in itertools.pairwise(positions)]
    assert max(speeds) <= 0.25 + 1e-9 and speeds[-1] < 1e-3
